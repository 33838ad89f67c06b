"""The pool under schedules that a seed decides, in simulated time: no law breaks in any of them.

A run that fails prints its seed (or its plan, where hypothesis found it); ``replay(seed)`` runs it
again, step by step the same.  From a shell, to look at one or to hunt for long::

    python -m tests.pool.test_schedules 12345
    python -m tests.pool.test_schedules 0 100000
"""

from __future__ import annotations

import gc
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from math import inf
from random import Random
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from sqlalchemy import exc
from sqlalchemy.pool import QueuePool

from sqla_poolkit import (
    ManagedPool,
    PoolClosed,
    PoolOverloaded,
    PoolSnapshot,
    PoolTimeout,
    PoolUnavailable,
)
from sqla_poolkit.core.machine import Machine
from sqla_poolkit.core.snapshot import read_machine
from sqla_poolkit.pool import _driver, _threads, _upkeep, _workers, managed
from sqla_poolkit.pool._callers import describe_holder
from tests.pool.laws import assert_lawful
from tests.pool.stub import Database, Disconnected, Error, Interrupt, StubDialect
from tests.simulation import (
    Broken,
    Dice,
    Inbox,
    Parker,
    Simulation,
    statement_by_statement,
)

PRECISION = 1e-6
GLANCE = 0.011
"""The upkeep looks so often at callers who wait beside a free place."""
DRIVER_MODULES = (_driver, _threads, managed, _upkeep, _workers)

# What the database does when asked: after how many seconds, and how it ends.
HANGS = 1e9
Answer = tuple[float, str]


@dataclass(frozen=True)
class Use:
    """One checkout of a caller: after a pause, held for a while, given back in some way."""

    pause: float = 0.0
    hold: float = 0.0
    ending: str = "close"
    killed_after: float | None = None
    """An exception reaches the caller that waits, so many seconds after it asked."""


@dataclass(frozen=True)
class Plan:
    """Everything that happens in a run but the order of it."""

    max_size: int = 2
    timeout: float | None = 5.0
    max_connecting: int = 3
    connects: tuple[Answer, ...] = ()
    pings: tuple[Answer, ...] = ()
    resets: tuple[Answer, ...] = ()
    closes: tuple[Answer, ...] = ()
    callers: tuple[tuple[Use, ...], ...] = ()
    owner: tuple[tuple[float, str], ...] = ()
    """After so many seconds: ``resize 1``, ``dispose``, ``replace``, ``retire_all`` ..."""
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def pings_idle(self) -> bool:
        return dict(self.settings).get("pre_ping", False)

    @property
    def is_inline(self) -> bool:
        return dict(self.settings).get("upkeep") == "inline"


@dataclass
class Caller:
    """What one caller does at this moment."""

    state: str = "away"
    asked_at: float = 0.0
    task: Any = None


def override(thing: Any, **methods: Callable[..., Any]) -> None:
    """Have one object, whose attributes are slots, do something else."""
    own = {name: staticmethod(method) for name, method in methods.items()}
    thing.__class__ = type("Overridden", (type(thing),), {"__slots__": (), **own})


@dataclass
class World:
    """One run: a pool, its database, its callers, and the laws."""

    plan: Plan
    dice: Dice
    chance: Random = field(default_factory=lambda: Random(1))
    pool_class: type = ManagedPool
    by_statement: bool = False

    def __post_init__(self) -> None:
        self.answers = {
            site: iter(answers)
            for site, answers in (
                ("connect", self.plan.connects),
                ("ping", self.plan.pings),
                ("reset", self.plan.resets),
                ("close", self.plan.closes),
            )
        }
        self.simulation = Simulation(self.dice, self.after_each_step, self.when_quiet)
        self.database = Database(self.act)
        self.callers = [Caller() for _ in self.plan.callers]
        self.outcomes: Counter[str] = Counter()
        self.is_healed = False
        self.pool: Any = None
        self.driver: Any = None
        self.machine: Any = None
        self.requests: dict[Any, Any] = {}
        self.queue_before: list[Any] = []
        self.widest = 0
        self.errors: list[str] = []

    # -- the database ------------------------------------------------------------------------

    def act(self, site: str) -> None:
        seconds, ending = next(self.answers.get(site, iter(())), (0.0, "ok"))
        if self.is_healed:
            return
        if seconds:
            self.simulation.block(lambda: seconds >= HANGS and self.is_healed, seconds)
        if ending == "disconnected":
            raise Disconnected(f"{site}: the server is gone")
        if ending == "fails":
            raise Error(f"{site} failed")
        if ending == "interrupt":
            raise Interrupt(site)

    # -- the pool ----------------------------------------------------------------------------

    def make_pool(self) -> Any:
        plan = self.plan
        if self.pool_class is QueuePool:
            return QueuePool(
                self.database.connect,
                pool_size=plan.max_size,
                max_overflow=0,
                timeout=plan.timeout,
                dialect=StubDialect.of(self.database),
            )
        pool = ManagedPool(
            self.database.connect,
            max_size=plan.max_size,
            timeout=plan.timeout,
            max_connecting=plan.max_connecting,
            dialect=StubDialect.of(self.database),
            **{"pre_ping": False, "track": "label", **dict(plan.settings)},
        )
        pool._driver.inbox = Inbox(self.simulation)
        self.driver = pool._driver
        self.machine = pool._driver.machine
        self.database.limit = self.limit
        self.watch_the_queue()
        self.watch_the_attempts()
        return pool

    def limit(self) -> float:
        """Return how many sockets there may be: who has begun when it is lowered goes on."""
        self.widest = max(self.widest, self.machine._limit)
        return self.widest

    def watch_the_attempts(self) -> None:
        """Have no attempt begun beyond the limit."""
        starting = self.machine.starting

        def watched(slot: Any, now: float) -> bool:
            is_wanted = starting(slot, now)
            if is_wanted and len(self.machine.slots) > self.machine._limit:
                self.errors.append("an attempt starts beyond the limit")
            return is_wanted

        override(self.machine, starting=watched)

    def watch_the_queue(self) -> None:
        """Have nobody served at once while somebody waits."""
        checkout = self.machine.checkout

        def watched(*args: Any) -> Any:
            may_serve = not self.machine.waiting or self.machine.phase != "open"
            got = checkout(*args)
            if got.state != "waiting" and not may_serve:
                self.errors.append("a newcomer overtook those who wait")
            self.requests[self.simulation.current] = got
            return got

        override(self.machine, checkout=watched)

    # -- the laws ----------------------------------------------------------------------------

    def after_each_step(self) -> None:
        self.look_at_limit()
        if self.pool_class is ManagedPool and self.pool is not None:
            self.look_at_queue()
        if self.errors:
            raise Broken("; ".join(self.errors))

    def look_at_limit(self) -> None:
        if self.pool_class is ManagedPool:
            if self.machine is not None:
                self.limit()
            self.errors += self.database.breaches
        elif self.database.sockets > self.plan.max_size:
            self.errors.append(f"{self.database.sockets} sockets")

    def look_at_queue(self) -> None:
        if not self.driver.lock.is_free:
            return  # in the middle of a change
        queue = self.machine.queue
        tickets = [request.ticket for request in queue]
        if tickets != sorted(tickets):
            self.errors.append(f"the queue is out of order: {tickets}")
        remaining = set(queue)
        left_behind = [request for request in self.queue_before if request in remaining]
        if left_behind:
            first = left_behind[0].ticket
            overtook = [
                request
                for request in self.queue_before
                if request not in remaining and request.slot and request.ticket > first
            ]
            if overtook:
                self.errors.append(f"{overtook} overtook {left_behind[0]}")
        self.queue_before = queue

    def reading(self) -> PoolSnapshot:
        """Read the state machine without changing anything."""
        now = self.simulation.now
        values = read_machine(self.machine, now, describe_holder, has_callers=False)
        return PoolSnapshot(name="", pool_class="", pid=None, taken_at=now, **values)

    def when_quiet(self) -> None:
        if self.pool is None:
            return
        self.look_for_lost_wakeup()
        self.look_for_missed_deadline()
        if self.pool_class is ManagedPool:
            assert_lawful(self.reading(), was_shrunk=self.is_shrunk)
            self.look_for_stranded_work()
        if self.errors:
            raise Broken("; ".join(self.errors))

    @property
    def is_shrunk(self) -> bool:
        return any(action.startswith("resize") for _, action in self.plan.owner)

    def look_for_lost_wakeup(self) -> None:
        """Nobody waits beside a free place for which nothing is being done."""
        states = Counter(caller.state for caller in self.callers)
        busy = sum(self.database.busy.values())
        limit = self.plan.max_size
        if self.pool_class is ManagedPool:
            machine = self.machine
            limit = machine._limit
            if machine.phase == "paused" or self.is_backing_off:
                return
        if states["asking"] and not busy and states["holding"] < limit:
            self.errors.append(
                f"lost wakeup: {states['asking']} wait while only {states['holding']} of {limit} "
                "are held and nothing is in flight"
            )

    @property
    def is_backing_off(self) -> bool:
        """Whether a failed connect holds growth back; inline nobody comes back to it by himself."""
        if self.plan.is_inline:
            return bool(self.machine.books.connect_failures)
        breaker = self.machine.breaker
        holds_back = self.machine.open or breaker.is_open
        return bool(holds_back) and self.simulation.now < breaker.until + GLANCE

    def look_for_missed_deadline(self) -> None:
        timeout = self.plan.timeout
        if timeout is None or timeout == 0 or not self.has_punctual_callers:
            return
        for caller in self.callers:
            if caller.state == "asking" and (
                self.simulation.now - caller.asked_at > timeout + PRECISION
            ):
                self.errors.append(f"{caller} waits beyond its deadline")

    @property
    def has_punctual_callers(self) -> bool:
        """Whether callers do nothing but wait: no ping, no connect of their own."""
        if self.pool_class is not ManagedPool:
            return not any(seconds for seconds, _ in self.plan.connects)
        return not (self.plan.pings_idle or self.plan.is_inline)

    def look_for_stranded_work(self) -> None:
        """When nobody can run, all that was decided is done or being done."""
        machine = self.machine
        if self.driver.inbox and machine.waiting:
            self.errors.append("a return lies in the inbox while callers wait")
        if not self.plan.is_inline:
            if self.driver.backlog or machine.decisions:
                self.errors.append("decisions that nobody carries out")
            asleep = [
                request
                for task, request in self.requests.items()
                if task.is_parked and request.state == "waiting" and request not in machine.queue
            ]
            if asleep:
                self.errors.append(f"nobody wakes {asleep}")
        if machine.waiting and machine.phase == "open":
            if machine.idle:
                self.errors.append("callers wait beside idle connections")
            self.look_at_growth()

    def look_at_growth(self) -> None:
        machine = self.machine
        now = self.simulation.now
        if len(machine.slots) >= machine._limit or self.is_backing_off:
            return
        # the upkeep looks eight times in so many seconds
        patience = inf if self.plan.is_inline else machine.config.connect_timeout * 9 / 8 + 0.1
        wanted = [
            slot
            for slot in machine.slots
            if slot.state == "connecting"
            and (slot.reason is None or slot.is_own_connect)
            and now - slot.started_at <= patience
        ]
        if not wanted:
            self.errors.append("callers wait beside a free place, and no attempt is in flight")

    # -- who does what -----------------------------------------------------------------------

    def call(self, caller: Caller, uses: tuple[Use, ...]) -> None:
        for use in uses:
            if use.pause:
                self.simulation.sleep(use.pause)
            self.use(caller, use)

    def use(self, caller: Caller, use: Use) -> None:
        caller.state, caller.asked_at = "asking", self.simulation.now
        if use.killed_after is not None:
            self.simulation.start(lambda: self.kill(caller, use), "killer")
        try:
            proxy = self.pool.connect()
        except BaseException as error:
            caller.state = "away"
            self.outcomes[self.outcome(error, caller)] += 1
            del error
            return
        self.outcomes["checkouts"] += 1
        waited = self.simulation.now - caller.asked_at
        if self.has_punctual_callers and self.plan.timeout and waited > self.plan.timeout:
            self.errors.append(f"served after {waited} s")
        caller.state = "holding"
        if use.hold:
            self.simulation.sleep(use.hold)
        else:
            self.simulation.point()
        caller.state = "returning"
        self.give_back(proxy, use.ending)
        del proxy
        caller.state = "away"

    def kill(self, caller: Caller, use: Use) -> None:
        self.simulation.sleep(use.killed_after or 0.0)
        if caller.state == "asking":
            caller.task.interrupt(Interrupt("killed"))

    def outcome(self, error: BaseException, caller: Caller) -> str:
        """Return which counter counts this error."""
        if isinstance(error, PoolTimeout):
            waited = self.simulation.now - caller.asked_at
            if self.has_punctual_callers and abs(waited - self.plan.timeout) > PRECISION:
                self.errors.append(f"PoolTimeout after {waited} s")
            return "timeouts"
        if isinstance(error, PoolOverloaded):
            return "rejected"
        if isinstance(error, PoolUnavailable):
            return "unavailable"
        if isinstance(error, Interrupt):
            return "cancelled" if str(error) in ("killed", "ping", "close") else "failed"
        if isinstance(error, PoolClosed | Error):
            return "failed"
        if self.pool_class is not ManagedPool and isinstance(error, exc.TimeoutError):
            return "timeouts"
        raise error

    def give_back(self, proxy: Any, ending: str) -> None:
        try:
            if ending == "invalidate":
                proxy.invalidate()
            elif ending == "invalidate softly":
                proxy.invalidate(soft=True)
                proxy.close()
            elif ending == "detach":
                self.database.keep(proxy.dbapi_connection)
                proxy.detach()
                proxy.close()
            elif ending != "drop":
                proxy.close()
        except Interrupt:
            self.outcomes["interrupted returns"] += 1

    def own(self) -> None:
        for seconds, action in self.plan.owner:
            self.simulation.sleep(seconds)
            verb, _, number = action.partition(" ")
            if verb == "resize":
                self.pool.resize(max_size=int(number))
            elif verb == "replace":
                predecessor = self.pool
                with suppress(Interrupt):
                    predecessor.dispose()
                self.pool = predecessor.recreate()
            elif verb == "snapshot":
                assert_lawful(self.pool.snapshot(), was_shrunk=self.is_shrunk)
            elif verb == "close":
                with suppress(Interrupt):
                    self.pool.close(timeout=float(number or 1.0))
            else:
                with suppress(Interrupt):  # a close that he did with his own hands
                    getattr(self.pool, verb)()

    # -- the run -----------------------------------------------------------------------------

    def run(self) -> World:
        """Run the plan and what comes after it; raise if a law breaks."""
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable()
            warnings.simplefilter("ignore")  # SQLAlchemy warns of a reset that failed
            # an error of a connection that was dropped has nobody to go to
            stack.enter_context(mock.patch.object(sys, "unraisablehook"))
            stack.enter_context(self.simulation.installed(self.chance.random))
            if self.by_statement:
                stack.enter_context(statement_by_statement(self.simulation, DRIVER_MODULES))
            self.simulation.start(self.conduct, "conductor")
            self.simulation.run()
            if self.errors:
                raise Broken("; ".join(self.errors))
            assert self.database.sockets == 0, f"{self.database.sockets} sockets are left"
        return self

    def conduct(self) -> None:
        self.pool = self.make_pool()
        tasks = [
            self.simulation.start(lambda c=caller, u=uses: self.call(c, u), f"caller {number}")
            for number, (caller, uses) in enumerate(
                zip(self.callers, self.plan.callers, strict=True)
            )
        ]
        for caller, task in zip(self.callers, tasks, strict=True):
            caller.task = task
        owner = self.simulation.start(self.own, "owner")
        self.heal_in_time([*tasks, owner])
        if self.pool_class is ManagedPool:
            self.look_at_the_end()
        elif self.pool is not None:
            self.pool.dispose()
        self.pool = self.driver = self.machine = self.database.limit = None
        self.queue_before.clear()
        self.requests.clear()
        gc.collect()

    def heal_in_time(self, tasks: list[Any]) -> None:
        """Wait for everybody; what hangs comes back after a while."""
        simulation = self.simulation
        simulation.block(lambda: all(task.is_done for task in tasks), 60.0)
        self.is_healed = True
        if self.pool_class is ManagedPool and self.machine.phase == "paused":
            self.pool.resume()
        simulation.block(lambda: all(task.is_done for task in tasks))

    def look_at_the_end(self) -> None:
        simulation = self.simulation
        gc.collect()  # SQLAlchemy keeps the frames of a failed connect in a cycle
        if self.plan.is_inline:
            for _ in range(3):
                simulation.sleep(2.0)
                self.driver.upkeep()
        else:
            simulation.sleep(12.0)  # two rounds of the auditor
        self.look_at_books()
        if self.machine.phase != "closed":
            self.look_at_capacity()
            self.pool.close()
        simulation.sleep(1.0)
        final = self.pool.snapshot()
        assert_lawful(final)
        if final.slots:
            self.errors.append(f"not all is gone: {final.slots}")
        del final

    def look_at_books(self) -> None:
        """Compare what the books say with what the callers saw."""
        snapshot = self.pool.snapshot()
        assert_lawful(snapshot)
        names = ("checkouts", "timeouts", "rejected", "cancelled", "failed", "unavailable")
        said = {name: getattr(snapshot, name) for name in names}
        seen = {name: self.outcomes[name] for name in names}
        # a caller may be killed at the moment when its request ends in another way
        agree = sum(said.values()) == sum(seen.values()) and all(
            said[name] <= seen[name] if name == "cancelled" else said[name] >= seen[name]
            for name in names
        )
        if not agree:
            self.errors.append(f"the books say {said}, the callers saw {seen}")
        if snapshot.checked_out or snapshot.requesting:
            self.errors.append(f"a place is lost: {self.machine!r}")
        if self.plan.timeout is not None and snapshot.wait_time.count != 0:
            longest = snapshot.wait_time.max_seconds
            if self.has_punctual_callers and longest > self.plan.timeout + PRECISION:
                self.errors.append(f"the books tell of a wait of {longest} s")

    def look_at_capacity(self) -> None:
        """See that the pool serves as many at once as it may."""
        calm = replace(self.machine.config, timeout=20.0, max_lifetime=None, idle_timeout=None)
        self.driver.reconfigure(calm)
        proxies = [self.pool.connect() for _ in range(calm.max_size or 0)]
        if len({id(proxy.dbapi_connection) for proxy in proxies}) != calm.max_size:
            self.errors.append("a connection was handed out twice")
        for proxy in proxies:
            proxy.close()


# -- plans -----------------------------------------------------------------------------------

ENDINGS = ("close", "close", "close", "drop", "invalidate", "invalidate softly", "detach")
ACTIONS = (
    *("resize 1", "resize 2", "resize 4", "dispose", "replace", "retire_all"),
    *("pause", "resume", "snapshot", "close 1"),
)


def random_plan(random: Random) -> Plan:
    """Return a plan: few places, many callers, and much that goes wrong."""

    def some(values: Any, most: int) -> tuple[Any, ...]:
        return tuple(random.choice(values) for _ in range(random.randint(0, most)))

    def answers(troubles: tuple[Answer, ...], most: int = 6) -> tuple[Answer, ...]:
        return some(((0.0, "ok"), (0.05, "ok"), *troubles), most) if random.random() < 0.6 else ()

    def use() -> Use:
        return Use(
            pause=random.choice((0.0, 0.0, 0.1, 1.0)),
            hold=random.choice((0.0, 0.0, 0.1, 0.25, 2.0)),
            ending=random.choice(ENDINGS),
            killed_after=random.choice((None, None, None, 0.0, 0.1, 0.25)),
        )

    setting: dict[str, Any] = {}
    if random.random() < 0.3:
        setting["pre_ping"] = True
        setting["ping_after"] = random.choice((0, 1.0))
    for name, values in (
        ("min_size", (1,)),
        ("max_waiting", (1, 2)),
        ("max_uses", (1, 2)),
        ("max_lifetime", (0.3, 2.0)),
        ("idle_timeout", (0.2, 1.0)),
        ("connect_timeout", (0.2, 2.0)),
        ("use_lifo", (False,)),
        ("upkeep", ("inline",)),
    ):
        if random.random() < 0.2:
            setting[name] = random.choice(values)
    return Plan(
        max_size=random.randint(1, 3),
        timeout=random.choice((0, 0.25, 1.0, 5.0, 5.0, None)),
        max_connecting=random.randint(1, 3),
        connects=answers(((0.0, "fails"), (0.5, "fails"), (0.3, "interrupt"), (HANGS, "ok"))),
        pings=answers(((0.0, "disconnected"), (0.5, "fails"), (0.1, "interrupt"))),
        resets=answers(((0.0, "fails"), (0.5, "ok"), (0.1, "interrupt"), (4.0, "ok"))),
        closes=answers(((0.0, "fails"), (0.5, "ok"), (0.1, "interrupt"))),
        callers=tuple(
            tuple(use() for _ in range(random.randint(1, 3))) for _ in range(random.randint(2, 6))
        ),
        owner=tuple((random.choice((0.0, 0.1, 0.5)), action) for action in some(ACTIONS, 3)),
        settings=tuple(setting.items()),
    )


def replay(seed: int, pool_class: type = ManagedPool) -> World:
    """Run what this seed stands for."""
    random = Random(seed)
    plan = random_plan(random)
    by_statement = random.random() < 0.5
    world = World(plan, Dice.seeded(seed), Random(seed), pool_class, by_statement)
    try:
        return world.run()
    except BaseException as error:
        if hasattr(error, "add_note"):
            error.add_note(f"replay({seed}): {plan}")
        else:
            sys.stderr.write(f"replay({seed}): {plan}\n")
        raise


# -- the tests -------------------------------------------------------------------------------

SEEDS = 320
BLOCK = 40


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_no_law_breaks_whatever_goes_wrong_in_whatever_order(first: int):
    for seed in range(first, first + BLOCK):
        replay(seed)


PLANS = st.builds(
    Plan,
    max_size=st.integers(1, 3),
    timeout=st.sampled_from((5.0, 0.25, None)),
    max_connecting=st.integers(1, 3),
    connects=st.lists(
        st.sampled_from(((0.0, "ok"), (0.0, "fails"), (0.5, "ok"), (0.5, "fails"), (HANGS, "ok"))),
        max_size=4,
    ),
    callers=st.lists(
        st.lists(
            st.builds(
                Use,
                hold=st.sampled_from((0.0, 1.0)),
                ending=st.sampled_from(("close", "invalidate", "drop")),
                killed_after=st.sampled_from((None, 0.0, 0.5)),
            ),
            min_size=1,
            max_size=2,
        ),
        min_size=2,
        max_size=4,
    ),
    owner=st.lists(
        st.tuples(st.sampled_from((0.0, 0.5)), st.sampled_from(("replace", "retire_all"))),
        max_size=1,
    ),
)
CHOICES = st.lists(st.integers(0, 5), max_size=150)


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(PLANS, CHOICES, st.booleans())
def test_no_law_breaks_for_the_simplest_plans(plan: Plan, choices: list[int], by_statement: bool):
    World(plan, Dice(choices), by_statement=by_statement).run()


def test_a_seed_stands_for_one_run():
    # an earlier pool may still have the name
    one, other = ([re.sub(r"#\d+", "", step) for step in replay(7).simulation.trace] for _ in "12")
    assert one == other


def test_different_seeds_give_different_runs_of_one_plan():
    plan = random_plan(Random(7))
    runs = {tuple(World(plan, Dice.seeded(seed)).run().simulation.trace) for seed in range(5)}
    assert len(runs) == 5


# -- what the same harness finds elsewhere ---------------------------------------------------

FAILING_CONNECT = Plan(
    max_size=1,
    connects=((0.5, "fails"),),
    callers=((Use(hold=1.0),), (Use(hold=1.0),)),
)


def lost_wakeup_of_queue_pool(seed: int) -> World:
    return World(FAILING_CONNECT, Dice.seeded(seed), pool_class=QueuePool).run()


def test_queue_pool_loses_a_wakeup_when_a_connect_fails():
    def look_for_it() -> None:
        for seed in range(20):
            lost_wakeup_of_queue_pool(seed)

    with pytest.raises(Broken, match="lost wakeup: 1 wait while only 0 of 1 are held"):
        look_for_it()


def test_managed_pool_survives_the_plan_in_which_queue_pool_loses_a_wakeup():
    for seed in range(20):
        World(FAILING_CONNECT, Dice.seeded(seed)).run()


def test_hypothesis_finds_the_lost_wakeup_of_queue_pool_by_itself():
    def breaks(run: tuple[Plan, list[int]]) -> bool:
        plan = replace(run[0], owner=())
        try:
            World(plan, Dice(run[1]), pool_class=QueuePool).run()
        except Broken as broken:
            return "lost wakeup" in str(broken)
        return False

    plan, _ = find(
        st.tuples(PLANS, CHOICES),
        breaks,
        settings=settings(
            max_examples=500,
            phases=[Phase.generate],
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
        random=Random(1),
    )
    assert any(ending == "fails" for _, ending in plan.connects)


def test_a_run_that_fails_tells_its_seed(monkeypatch, capsys):
    monkeypatch.setattr(World, "look_at_books", lambda world: world.errors.append("wrong"))
    with pytest.raises(Broken, match="wrong") as caught:
        replay(3)
    told = "".join(getattr(caught.value, "__notes__", [])) + capsys.readouterr().err
    assert "replay(3): Plan(max_size=" in told


def forget_to_wake(monkeypatch):
    monkeypatch.setattr(_threads.ThreadDriver, "_wake_upkeep", lambda driver: None)


def leave_returns_in_the_inbox(monkeypatch):
    monkeypatch.setattr(_threads.ThreadDriver, "empty_inbox", lambda driver: None)


def lose_the_place_of_a_failed_connect(monkeypatch):
    monkeypatch.setattr(Machine, "_drop", lambda machine, slot: None)


def keep_the_place_of_a_killed_waiter(monkeypatch):
    monkeypatch.setattr(Machine, "abandon", lambda machine, got, now, **ends: None)


def serve_the_last_first(monkeypatch):
    grant = Machine._grant

    def grant_last(machine: Machine, slot: Any, now: float) -> None:
        queue = machine.lanes[0].queue
        queue.move_to_end(next(reversed(queue)), last=False)
        grant(machine, slot, now)

    monkeypatch.setattr(Machine, "_grant", grant_last)


def ignore_the_limit(monkeypatch):
    adopt = Machine._adopt

    def adopt_more(machine: Machine, config: Any) -> None:
        adopt(machine, config)
        machine._limit += 1

    monkeypatch.setattr(Machine, "_adopt", adopt_more)


def miss_a_wake_up(monkeypatch):
    monkeypatch.setattr(Parker, "unpark", lambda parker: None)


@pytest.mark.parametrize(
    "sabotage",
    [
        forget_to_wake,
        leave_returns_in_the_inbox,
        lose_the_place_of_a_failed_connect,
        keep_the_place_of_a_killed_waiter,
        serve_the_last_first,
        ignore_the_limit,
        miss_a_wake_up,
    ],
    ids=lambda sabotage: sabotage.__name__,
)
def test_a_pool_that_is_broken_on_purpose_is_found(sabotage, monkeypatch):
    sabotage(monkeypatch)

    def replay_all() -> None:
        for seed in range(SEEDS):
            replay(seed)

    with pytest.raises((Broken, AssertionError, PoolTimeout, KeyError, AttributeError)):
        replay_all()


if __name__ == "__main__":
    first = int(sys.argv[1])
    for number in range(first, int(sys.argv[2]) if len(sys.argv) > 2 else first + 1):
        replay(number)
