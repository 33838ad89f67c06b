"""Whatever callers, database and clock do, in whatever order: the pool keeps its laws.

The test plays the driver of the state machine in virtual time.  It carries decisions out late and
in any order, lets attempts fail or hang, lets connections and the whole server die, claims grants
late, cancels, expires, interrupts.  Beside it keeps its own simple books of the same pool, and
after every step compares the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from math import ceil, inf

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sqla_poolkit.config import PoolConfig
from sqla_poolkit.core.books import Books
from sqla_poolkit.core.events import ConnectionClosed, PoolEvent
from sqla_poolkit.core.journal import Journal
from sqla_poolkit.core.lanes import Lane
from sqla_poolkit.core.machine import Machine
from sqla_poolkit.core.slots import Check, Close, Locate, Open, Request, SeekDeadlock, Slot, Wake
from sqla_poolkit.core.snapshot import PoolSnapshot, read_machine

# All times are multiples of a power of two, so that sums of them are exact.
MOMENT = 1 / 64
SECONDS = st.sampled_from([0.0, MOMENT, 0.125, 0.5, 1.0, 2.0, 8.0, 64.0])
PICK = st.integers(0, 5)
LABELS = st.sampled_from(["web", "job", None])
FAULTS = st.sampled_from(["refused", "authentication", "congestion", "other"])
ACTS = st.sampled_from(
    ["warm", "warm", "pause", "retire_all", "retire_generation", "dispose", "close"]
)
GRACE_SECONDS = 1.0
# What the documentation promises about outages.
FAILURES_TO_OPEN = 3
FAILING_SECONDS = 0.5
LEAST_APART = 0.5
MOST_APART = 0.9
MOST_AFTER_DENIALS = 30.0
INTEREST_SECONDS = 30.0
SLOW_TRIAL_SECONDS = 1.0
EVENT_SECONDS = 1.0
OUTCOMES = ("checkouts", "timeouts", "rejected", "cancelled", "failed", "unavailable")
COUNTERS = (
    *("requests", "waits", "connects", "connect_failures", "pings", "probes", "ping_failures"),
    *("reset_failures", "invalidations", "detached", "forgotten"),
    *OUTCOMES,
)
BOOKED: dict[str, Callable[[Books], int]] = {
    "checkout_waited": lambda books: books.wait_time.count,
    "checkout_timed_out": lambda books: books.timeouts,
    "checkout_rejected": lambda books: books.rejected,
    "checkout_cancelled": lambda books: books.cancelled,
    "checkout_failed": lambda books: books.failed,
    "checkout_unavailable": lambda books: books.unavailable,
    "connection_opened": lambda books: books.connects,
    "connect_failed": lambda books: books.connect_failures,
    "connection_closed": lambda books: sum(books.closes.values()),
    "connection_leaked": lambda books: books.closes.get("leaked", 0),
    "connection_lost": lambda books: books.detached + books.forgotten,
}
ENDS = st.sampled_from([None, ValueError(), KeyboardInterrupt()])


class Told:
    """A reader who wants to hear of everything."""

    def __init__(self) -> None:
        self.events: list[PoolEvent] = []

    def wants(self, kind: type[PoolEvent]) -> bool:
        return True

    def put(self, event: PoolEvent, journal: Journal) -> None:
        self.events.append(event)

    def wake(self) -> None:
        raise AssertionError("the state machine wakes nobody by itself")


@st.composite
def configs(draw: st.DrawFn) -> PoolConfig:
    max_size = draw(st.sampled_from([1, 2, 3, 4, None]))
    return PoolConfig(
        min_size=draw(st.integers(0, 3 if max_size is None else max_size)),
        max_size=max_size,
        timeout=draw(st.sampled_from([8.0, None, 0.5, 0.0])),
        idle_timeout=draw(st.sampled_from([None, None, 2.0, 0.0])),
        max_lifetime=draw(st.sampled_from([None, None, 8.0, 1.0])),
        max_uses=draw(st.sampled_from([None, 1, 2])),
        connect_timeout=draw(st.sampled_from([1.0, 4.0])),
        max_waiting=draw(st.sampled_from([None, 0, 1, 3])),
        max_connecting=draw(st.integers(1, 3)),
        use_lifo=draw(st.booleans()),
        pre_ping=draw(st.sampled_from([True, True, False])),
        ping_after=draw(st.sampled_from([1.0, 0.0])),
        ping_timeout=draw(st.sampled_from([2.0, 0.25])),
        keepalive=draw(st.sampled_from([1.0, 1.0, 8.0, 0.0])),
        on_outage=draw(st.sampled_from(["raise", "wait"])),
        hold_warning=draw(st.sampled_from([1.0, 4.0, 0.0])),
        upkeep=draw(st.sampled_from(["thread", "inline"])),
    )


@dataclass(eq=False)
class Connection:
    """What the driver keeps in a slot."""

    opened_at: float
    used_at: float
    checked_at: float
    expires_at: float
    generation: int
    uses: int = 0
    has_been_used: bool = False
    is_suspect: bool = False
    checking_since: float = 0.0
    closes: int = 0
    # why it may be closed
    is_dead: bool = False
    is_unclean: bool = False
    is_disposed: bool = False
    retires_at: float = inf

    @property
    def heard_at(self) -> float:
        return max(self.used_at, self.checked_at)


@dataclass(eq=False)
class Attempt:
    """An attempt to connect, ordered or under way."""

    began_at: float
    own_of: Caller | None = None
    is_started: bool = False
    is_in_turn: bool = True
    is_retired: bool = False


@dataclass(eq=False)
class Caller:
    """Somebody who asked for a connection."""

    number: int
    label: str | None
    asked_at: float
    deadline: float
    has_listeners: bool
    lane: Lane
    request: Request | None = None
    slot: Slot | None = None
    stage: str = "asking"
    is_served: bool = False
    queued_at: float = 0.0
    has_queued: bool = False
    waited: float = 0.0
    held_since: float = 0.0


@dataclass
class Row:
    """What a label did, by the test's own books."""

    checkouts: int = 0
    use_seconds: float = 0.0
    wait_seconds: float = 0.0
    wait_caused_seconds: float = 0.0


@dataclass
class Expected:
    """The test's own counters and sums of durations."""

    counters: Counter[str] = field(default_factory=Counter)
    closes: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    records: Counter[str] = field(default_factory=Counter)
    rows: dict[str | None, Row] = field(default_factory=dict)

    def row(self, label: str | None) -> Row:
        return self.rows.setdefault(label, Row())

    def record(self, histogram: str, seconds: float) -> None:
        self.seconds[histogram] += seconds
        self.records[histogram] += 1


@dataclass
class Outage:
    """When the database should count as down, and when attempts may be made."""

    chance: float
    is_down: bool = False
    is_congested: bool = False
    failures: int = 0
    bare_failures: int = 0
    denials: int = 0
    failing_since: float = inf
    failed_at: float = -inf
    backs_off_until: float = -inf

    def failed(self, began_at: float, now: float, fault: str, *, is_bare: bool) -> bool:
        """Note a failed attempt; return whether the database counts as down from now on."""
        if fault == "congestion" or not is_bare:
            self.bare_failures, self.failing_since = 0, inf
        else:
            self.bare_failures += 1
            self.failing_since = min(self.failing_since, began_at)
        pause = min(1.0, 0.1 * 2**self.failures) * (1 + self.chance / 2)
        self.failures += 1
        self.denials = self.denials + 1 if fault == "authentication" else 0
        self.is_congested = fault == "congestion"
        if self.is_congested:
            pause = max(pause, LEAST_APART * (1 + self.chance))
        opens = (
            not self.is_down
            and self.bare_failures >= FAILURES_TO_OPEN
            and now - self.failing_since >= FAILING_SECONDS
        )
        self.is_down |= opens
        self.failed_at = now
        self.backs_off_until = now + pause
        return opens

    @property
    def earliest(self) -> float:
        """While it is down: no attempt before this moment."""
        return self.failed_at + LEAST_APART

    @property
    def latest(self) -> float:
        """While it is down: from here on there should be an attempt."""
        doublings = min(max(0, self.denials - 3), 10)
        return self.failed_at + min(MOST_APART * 2**doublings, MOST_AFTER_DENIALS)

    def forget(self) -> None:
        self.is_down = False
        self.backs_off_until = -inf


def describe(holder: object) -> tuple[str | None, None]:
    return holder, None


def assert_it_adds_up(snapshot: PoolSnapshot) -> None:
    """Hold a snapshot, or several merged ones, against the laws that a reader relies on."""
    s = snapshot
    assert s.open == s.idle + s.checked_out + s.checking
    assert s.connects - sum(s.closes.values()) - s.detached - s.forgotten == s.open + s.closing
    assert s.requests == sum(getattr(s, outcome) for outcome in OUTCOMES) + s.requesting
    assert s.waiting <= s.requesting
    waits = s.wait_time.sum_seconds + s.failed_wait_time.sum_seconds + s.waiting_seconds
    assert sum(row.wait_caused_seconds for row in s.labels.values()) == pytest.approx(waits)
    assert sum(row.wait_seconds for row in s.labels.values()) == pytest.approx(waits)
    assert sum(row.checkouts for row in s.labels.values()) == s.checkouts


class PoolLaws(RuleBasedStateMachine):
    @initialize(
        config=configs(),
        chance=st.sampled_from([0.0, 0.5, 0.9]),
        rushed=st.booleans(),
        lanes=st.sampled_from([1, 1, 2, 3]),
        callers=st.integers(0, 4),
        fault=st.one_of(st.none(), st.none(), st.none(), FAULTS),
    )
    def set_up(
        self,
        config: PoolConfig,
        chance: float,
        rushed: bool,
        lanes: int,
        callers: int,
        fault: str | None,
    ) -> None:
        self.now = 1024.0
        self.chance = chance
        self.config = config
        self.told = Told()
        journal = Journal()
        journal.add(self.told)
        self.machine = Machine(config, self.now, lambda: chance, lanes=lanes, journal=journal)
        self.lanes = list(self.machine.lanes)
        self.phase = "open"
        self.is_rushed = rushed
        self.numbers = count(1)
        self.expected = Expected()
        # where every slot is, by the driver's own knowledge
        self.attempts: dict[Slot, Attempt] = {}
        self.connections: dict[Slot, Connection] = {}
        self.closing: dict[Slot, str] = {}
        self.users: dict[Slot, Caller] = {}
        self.checking: set[Slot] = set()
        self.keeping: dict[Slot, None] = {}
        self.given_up: list[Slot] = []
        self.asleep: set[Lane] = set()
        self.queue: list[Caller] = []
        self.callers: list[Caller] = []
        self.asking: dict[Request, Caller] = {}
        self.ever_opened: list[Connection] = []
        self.to_fail: dict[Caller, tuple[str, BaseException | None]] = {}
        self.peaks = Counter[str]()
        self.outage = Outage(chance)
        self.leftovers: set[Slot] = set()
        self.generation = 0
        self.deaths: list[float] = []
        self.asked_at = self.now
        self.is_warm = False
        self.grace = GRACE_SECONDS
        self.ticked_at = self.now
        self.places_before = 0
        self.counters_before = Counter[str]()
        self.snapshot_before: PoolSnapshot | None = None
        self.to_locate: list[tuple[Slot, int]] = []
        self.sought: set[tuple[Slot, int]] = set()
        self.deadlocks = 0
        self.callers_come_and_go(callers, 0, 0.0)
        if fault is not None:
            self.server_is_lost(fault)

    # -- what the driver knows ---------------------------------------------------------------

    @property
    def limit(self) -> float:
        return inf if self.config.max_size is None else self.config.max_size

    @property
    def idle(self) -> list[Slot]:
        return [
            slot
            for slot in self.connections
            if slot not in self.users and slot not in self.closing and slot not in self.keeping
        ]

    def open_in(self, *lanes: Lane) -> list[Slot]:
        """Return what is open in some lanes; but for what goes at once with its generation."""
        idle = set(self.idle)
        return [
            slot
            for slot, connection in self.connections.items()
            if slot not in self.closing
            and slot.lane in lanes
            and (slot not in idle or connection.generation == self.generation)
        ]

    @property
    def has_room(self) -> bool:
        return len(self.attempts) + len(self.connections) < self.limit

    @property
    def is_down(self) -> bool:
        return self.outage.is_down

    @property
    def keeps_some_open(self) -> bool:
        return self.is_warm and self.config.min_size > 0

    @property
    def is_wanted(self) -> bool:
        """Tell whether anybody may want a database that is down."""
        is_recent = self.now - self.asked_at <= INTEREST_SECONDS
        return is_recent or bool(self.queue) or self.keeps_some_open

    def queue_of(self, lane: Lane) -> list[Caller]:
        return [caller for caller in self.queue if caller.lane is lane]

    def states(self) -> dict[Slot, str]:
        """Return where every slot is."""
        states = dict.fromkeys(self.attempts, "connecting")
        for slot in self.connections:
            if slot in self.closing:
                states[slot] = "closing"
            elif slot in self.checking or slot in self.keeping:
                states[slot] = "checking"
            else:
                states[slot] = "checked_out" if slot in self.users else "idle"
        return states

    def at(self, *stages: str) -> list[Caller]:
        return [caller for caller in self.callers if caller.stage in stages]

    @property
    def in_turn(self) -> int:
        return sum(attempt.is_in_turn for attempt in self.attempts.values())

    def note_peaks(self) -> None:
        held = Counter(self.states().values())["checked_out"]
        self.peaks["checked_out"] = max(self.peaks["checked_out"], held)
        self.peaks["waiting"] = max(self.peaks["waiting"], len(self.queue))

    # -- decisions ---------------------------------------------------------------------------

    def carry_on(self) -> None:
        """Take the decisions in, and hold each against the laws."""
        self.note_peaks()
        decisions = self.machine.take_decisions()
        self.note_that_it_is_forgotten()
        for decision in decisions:
            if isinstance(decision, Open):
                self.order(decision.slot)
            elif isinstance(decision, Close):
                self.begin_to_close(decision.slot)
            elif isinstance(decision, Check):
                self.begin_to_keep(decision.slot)
            elif isinstance(decision, Wake):
                self.wake(decision.request)
            elif isinstance(decision, Locate):
                self.begin_to_locate(decision.slots)
            elif isinstance(decision, SeekDeadlock):
                assert self.queue
                assert self.is_all_held
        assert not self.to_fail, "somebody is not told that there is nothing to wait for"
        self.note_peaks()

    def order(self, slot: Slot) -> None:
        """Note an attempt that is ordered, and hold it against the laws."""
        assert self.phase != "closed"
        assert slot not in self.states()
        assert slot.lane not in self.asleep, "an attempt is made where nobody could make it"
        if self.is_down:
            self.begin_trial()
            assert self.config.upkeep == "thread"
            assert slot.purpose == "trial"
            assert self.is_wanted
        else:
            assert slot.purpose != "trial"
            # within one tick ages are looked at before attempts that take too long
            is_earlier = slot.replaces is not None and self.outage.failed_at == self.now
            assert is_earlier or not self.holds_back(slot.lane), "growth does not back off"
        self.attempts[slot] = Attempt(self.now)

    def begin_trial(self) -> None:
        """Hold an attempt that is made while the database is down against the laws."""
        assert self.phase == "open"
        assert self.in_turn == 0, "the database is tried twice at a time"
        assert self.now >= self.outage.earliest, "the database is tried too soon"
        event("a trial")

    def holds_back(self, lane: Lane) -> bool:
        """Tell whether growth of a lane backs off after a failure."""
        is_paused = self.now < self.outage.backs_off_until
        has_others = self.open_in(lane) or not self.queue_of(lane)
        return is_paused and bool(
            has_others or self.outage.is_congested or self.config.on_outage == "wait"
        )

    def note_that_it_is_forgotten(self) -> None:
        """Note that nobody asked for long, so the next who does may see for himself."""
        if self.is_down and not self.machine.breaker.is_open:
            assert self.phase == "open"
            assert all(
                caller in self.to_fail or self.now >= caller.deadline + GRACE_SECONDS
                for caller in self.queue
            )
            assert self.now - self.asked_at > INTEREST_SECONDS
            assert not self.keeps_some_open
            assert self.now >= self.outage.earliest
            assert not self.in_turn
            self.outage.forget()
            event("an outage is forgotten")

    def begin_to_close(self, slot: Slot) -> None:
        assert slot in self.connections
        assert slot not in self.users, "a connection is closed in its holder's hands"
        assert slot not in self.keeping, "a connection is closed while it is pinged"
        assert slot not in self.closing, "a connection is closed twice"
        self.closing[slot] = slot.reason
        assert self.is_justified(self.connections[slot], slot.reason)
        if slot.reason == "loop":
            assert len(self.attempts) + len(self.connections) >= self.limit
            assert any(caller.lane is not slot.lane for caller in self.queue)

    def is_justified(self, connection: Connection, reason: str) -> bool:
        """Tell whether a policy really asked for what was closed because of it."""
        config = self.config
        not_closing = len(self.attempts) + len(self.connections) - len(self.closing)
        still_open = len(self.connections) - len(self.closing)
        age = self.now - connection.opened_at
        return {
            "age": config.max_lifetime is not None and age >= 0.75 * (config.max_lifetime or 0),
            "uses": connection.uses == config.max_uses,
            # this one is among those that close by now
            "resize": not_closing >= self.limit,
            "idle": config.idle_timeout is not None and still_open >= config.min_size,
            "ping": connection.is_dead,
            "probe": connection.is_dead,
            "generation": connection.generation < self.generation,
            "retired": connection.retires_at <= self.now,
            "reset": connection.is_unclean,
            "disposed": connection.is_disposed,
            "closed": self.phase == "closed",
            "loop": True,
        }[reason]

    def begin_to_keep(self, slot: Slot) -> None:
        """Note a connection that is pinged in the background, and hold that against the laws."""
        config, connection = self.config, self.connections[slot]
        assert slot in self.idle
        assert slot.lane not in self.asleep
        assert config.pre_ping
        assert self.phase == "open"
        assert self.now - connection.heard_at >= 0.9 * config.keepalive > 0
        assert len(self.checking) + len(self.keeping) < config.max_connecting
        self.keeping[slot] = None
        connection.checking_since = self.now

    def wake(self, request: Request) -> None:
        caller = self.asking[request]
        assert caller.stage == "waiting", "a caller is woken who does not wait"
        first = self.queue_of(caller.lane)[0]
        gives_up_earlier = request.failure == "timeout" and caller.deadline < first.deadline
        assert caller is first or gives_up_earlier, "a caller is served before who came first"
        self.leave_queue(caller)
        if request.slot is not None:
            assert request.failure is None
            caller.stage = "granted"
            self.hand_out(request.slot, caller)
            if request.slot.state == "checked_out":
                self.serve(caller, is_granted=True)
        elif request.failure == "timeout":
            assert self.now >= caller.deadline + self.grace, "given up before its time"
            self.end(caller, "timeouts")
        else:
            assert (request.failure, request.error) == self.to_fail.pop(caller)
            self.end(caller, "unavailable" if request.failure == "unavailable" else "failed")

    def hand_out(self, slot: Slot, caller: Caller) -> None:
        """Note who has a slot from now on, and hold that against the laws."""
        assert slot not in self.users, "a slot has two holders"
        assert slot.lane is caller.lane, "a connection is used in another lane than its own"
        assert slot not in self.closing
        caller.slot = slot
        self.users[slot] = caller
        if slot not in self.connections:
            if self.is_down:
                self.begin_trial()
            self.attempts[slot] = Attempt(self.now, own_of=caller)
            return
        assert self.phase == "open"
        connection = self.connections[slot]
        assert connection.generation == self.generation, "a connection is used after its end"
        assert self.now < connection.expires_at
        just_opened = self.now - connection.opened_at <= self.config.ping_after
        is_new = just_opened and not connection.has_been_used and not connection.is_suspect
        if self.config.pre_ping and not is_new:
            self.checking.add(slot)
            connection.checking_since = self.now
            is_quiet = self.now - connection.heard_at >= self.config.ping_after
            assert slot.needs_ping == (connection.is_suspect or is_quiet)
            if connection.is_suspect:
                event("a suspect is pinged first")
        else:
            self.begin_use(slot, caller)

    def begin_use(self, slot: Slot, caller: Caller) -> None:
        connection = self.connections[slot]
        connection.uses += 1
        assert connection.uses <= (self.config.max_uses or inf)
        caller.held_since = self.now

    def serve(self, caller: Caller, *, is_granted: bool = False) -> None:
        """Note that a caller has its connection; with listeners it counts when they agree."""
        self.expected.record("checkout_time", self.now - caller.asked_at)
        self.record_wait(caller, "wait_time")
        if not is_granted:
            caller.stage = "holding"
        if not caller.has_listeners:
            self.confirm_service(caller)
        elif not is_granted:
            self.machine.hold_back(caller.slot)

    def confirm_service(self, caller: Caller) -> None:
        caller.is_served = True
        self.expected.counters["checkouts"] += 1
        self.expected.row(caller.label).checkouts += 1

    def record_wait(self, caller: Caller, histogram: str) -> None:
        if caller.has_queued:
            self.expected.record(histogram, caller.waited)
            self.expected.row(caller.label).wait_seconds += caller.waited
        caller.waited = 0.0

    def end(self, caller: Caller, outcome: str) -> None:
        assert caller.stage != "over", "a request ends twice"
        assert not caller.is_served, "a request ends twice"
        caller.stage = "over"
        self.callers.remove(caller)
        self.users.pop(caller.slot, None)
        self.expected.counters[outcome] += 1
        if outcome != "rejected":
            self.record_wait(caller, "failed_wait_time")

    def join_queue(self, caller: Caller) -> None:
        caller.stage = "waiting"
        caller.slot = None
        caller.queued_at = self.now
        self.expected.counters["waits"] += not caller.has_queued
        caller.has_queued = True
        self.queue.append(caller)
        self.queue.sort(key=lambda each: each.number)

    def leave_queue(self, caller: Caller) -> None:
        self.queue.remove(caller)
        caller.waited += self.now - caller.queued_at

    # -- callers ask -------------------------------------------------------------------------

    @rule(
        callers=st.integers(1, 3),
        late=st.sampled_from([0.0, 0.0, MOMENT]),
        label=LABELS,
        has_listeners=st.booleans(),
        lane=PICK,
    )
    def ask(
        self, callers: int, late: float, label: str | None, has_listeners: bool, lane: int
    ) -> None:
        for _ in range(callers):
            self.make_caller(self.now - late, label, has_listeners, chosen(self.lanes, lane))

    def make_caller(
        self, asked_at: float, label: str | None, has_listeners: bool, lane: Lane
    ) -> Caller:
        timeout = self.config.timeout
        deadline = inf if timeout is None else asked_at + timeout
        caller = Caller(next(self.numbers), label, asked_at, deadline, has_listeners, lane)
        self.callers.append(caller)
        self.expected.counters["requests"] += 1
        self.asked_at = self.now
        self.asleep.discard(lane)
        answers = self.expected_answers(caller)
        got = self.machine.checkout(asked_at, self.now, label, lane)
        self.is_warm |= self.machine.is_warm
        self.receive(caller, got, answers)
        return caller

    def expected_answers(self, caller: Caller) -> set[str]:
        """Return what the machine may do with somebody who asks now."""
        if self.phase == "closed":
            return {"closed"}
        config = self.config
        is_first = self.phase == "open"
        rivals = self.queue_of(caller.lane)
        is_first = is_first and all(other.number > caller.number for other in rivals)
        if is_first and any(
            self.now < self.connections[slot].expires_at
            and self.connections[slot].generation == self.generation
            for slot in self.idle
            if slot.lane is caller.lane
        ):
            return {"idle"}
        may_connect = is_first and self.has_room
        if may_connect and (config.timeout == 0 or config.upkeep == "inline"):
            if self.is_down:
                if not self.in_turn and self.now >= self.outage.latest:
                    return {"own connect"}
                if not self.in_turn and self.now >= self.outage.earliest:
                    return {"own connect", *self.answers_without_connecting(caller)}
            elif config.timeout == 0 or self.in_turn < config.max_connecting:
                return {"own connect"}
        return self.answers_without_connecting(caller)

    def answers_without_connecting(self, caller: Caller) -> set[str]:
        config = self.config
        answers = set()
        if self.is_down and self.phase == "open" and config.on_outage == "raise":
            is_tried = self.in_turn or config.timeout == 0 or not self.has_room
            if is_tried or self.now < self.outage.earliest:
                return {"unavailable"}
            # a trial is made for him, if it is due
            if self.now < self.outage.latest:
                answers.add("unavailable")
        if config.timeout == 0:
            return answers | {"timeout"}
        if caller.stage == "asking" and config.max_waiting is not None:
            taken = Counter(self.states().values())
            held = sum(taken[state] for state in ("idle", "checked_out", "checking"))
            places = max(0, self.limit - held) if self.phase == "open" else 0
            if len(self.queue) >= config.max_waiting + places:
                return answers | {"rejected"}
        return answers | {"wait"}

    def receive(self, caller: Caller, got: Slot | Request, answers: set[str]) -> None:
        """Note what the machine answered, and hold it against what it should have been."""
        if isinstance(got, Slot):
            assert ("own connect" if got.state == "connecting" else "idle") in answers
            self.carry_on()
            caller.stage = "claimed"
            self.hand_out(got, caller)
            if got.state == "checked_out":
                self.serve(caller)
            self.note_peaks()
            return
        caller.request = got
        got.is_held_back = caller.has_listeners
        self.asking[got] = caller
        assert (got.failure or "wait") in answers
        if got.failure is None:
            self.join_queue(caller)
        else:
            outcomes = {"closed": "failed", "timeout": "timeouts"}
            self.end(caller, outcomes.get(got.failure, got.failure))
        self.carry_on()

    @rule(callers=st.integers(1, 4), lane=PICK)
    def callers_are_served(self, callers: int, lane: int) -> None:
        """Let callers come, and everything go well."""
        for _ in range(callers):
            self.make_caller(self.now, "web", False, chosen(self.lanes, lane))
        for _ in range(8 * callers):
            if not self.go_well():
                break

    @rule(callers=st.integers(1, 4), lane=PICK, seconds=st.sampled_from([0.0, 1.0, 2.0, 8.0]))
    def callers_come_and_go(self, callers: int, lane: int, seconds: float) -> None:
        """Let callers be served, all connections come back, and stay idle for a while."""
        self.callers_are_served(callers, lane)
        for caller in self.at("holding"):
            self.return_slot(caller, self.now)
        self.time_goes_by(seconds)

    @precondition(lambda self: self.at("granted"))
    @rule(pick=PICK)
    def wake_up(self, pick: int) -> None:
        """Let a caller find what it was granted."""
        self.take_grant(chosen(self.at("granted"), pick))

    def take_grant(self, caller: Caller) -> None:
        assert caller.request.slot is caller.slot
        caller.stage = "holding" if caller.slot.state == "checked_out" else "claimed"

    @precondition(lambda self: any(c.deadline < inf for c in self.at("waiting", "granted")))
    @rule(pick=PICK)
    def expire(self, pick: int) -> None:
        """Let a deadline pass; who was granted a connection at the last moment uses it."""
        waiting = [c for c in self.at("waiting", "granted") if c.deadline < inf]
        caller = chosen(waiting, pick)
        self.pass_time(max(0.0, caller.deadline - self.now))
        was_granted = caller.stage == "granted"
        if not was_granted:
            self.leave_queue(caller)
            self.end(caller, "timeouts")
        slot = self.machine.expire(caller.request, self.now)
        if was_granted:
            assert slot is caller.slot
            self.take_grant(caller)
        else:
            assert (slot, caller.request.failure) == (None, "timeout")
        self.carry_on()

    @precondition(lambda self: self.at("waiting"))
    @rule(lane=PICK)
    def expire_overdue(self, lane: int) -> None:
        """Let a timer end whoever waited in vain, all at once; the next one is when it says."""
        lane = chosen(self.lanes, lane)
        self.grace = 0.0
        due = self.machine.expire_overdue(lane, self.now)
        self.carry_on()
        self.grace = GRACE_SECONDS
        deadlines = [caller.deadline for caller in self.queue_of(lane)]
        assert self.now < due
        assert min(deadlines, default=inf) <= due <= min(deadlines, default=inf) + MOMENT

    @precondition(lambda self: self.at("waiting", "granted"))
    @rule(pick=PICK, error=ENDS)
    def cancel(self, pick: int, error: BaseException | None) -> None:
        """Let a caller go away, before or after it was granted a connection."""
        caller = chosen(self.at("waiting", "granted"), pick)
        slot = caller.slot
        if slot in self.connections and slot not in self.checking:
            self.note_return(caller, self.now)
        else:
            if caller.stage == "waiting":
                self.leave_queue(caller)
            self.attempts.pop(slot, None)
            self.checking.discard(slot)
            self.end(caller, "cancelled")
        if error is None:
            self.machine.cancel(caller.request, self.now)
        else:
            self.machine.abandon(caller.request, self.now, error)
        self.carry_on()

    # -- who holds what ----------------------------------------------------------------------

    @property
    def is_all_held(self) -> bool:
        """Tell whether only a holder could serve the next caller."""
        return Counter(self.states().values())["checked_out"] >= self.limit

    def begin_to_locate(self, slots: list[Slot]) -> None:
        """Note who is looked for, and hold it against the laws: long holders, each once."""
        for slot in slots:
            use = (slot, slot.uses)
            assert self.now - self.users[slot].held_since >= self.config.hold_warning > 0
            assert use not in self.sought
            self.sought.add(use)
            self.to_locate.append(use)

    def long_holds(self) -> Iterator[tuple[Slot, int]]:
        limit = self.config.hold_warning
        for slot, state in self.states().items():
            if state == "checked_out" and 0 < limit <= self.now - self.users[slot].held_since:
                yield slot, slot.uses

    @precondition(lambda self: self.to_locate)
    @rule(pick=PICK)
    def holder_is_located(self, pick: int) -> None:
        """Say where a holder is, who may have returned the connection meanwhile."""
        slot, use = chosen(self.to_locate, pick)
        self.to_locate.remove((slot, use))
        self.machine.long_held(slot, use, self.now, "somewhere")
        self.carry_on()

    @precondition(lambda self: self.at("waiting"))
    @rule(is_complete=st.booleans(), is_late=st.booleans())
    def holders_seem_to_wait(self, is_complete: bool, is_late: bool) -> None:
        """Say that the holders wait themselves: all of them or not, as it is or as it was."""
        request = self.at("waiting")[0].request
        slots = list(self.users)[: None if is_complete else -1]
        found = {slot: (slot.uses - is_late, request, "somewhere") for slot in slots}
        is_told = is_complete and not is_late and self.is_all_held and request.deadlock is None
        self.deadlocks += is_told
        self.machine.entangled(self.now, found)
        assert (request.deadlock is not None) or not is_told
        self.carry_on()

    @precondition(lambda self: self.at("waiting"))
    @rule(pick=PICK, others=st.integers(0, 1))
    def would_wait_for_himself(self, pick: int, others: int) -> None:
        """Let a caller wait who is turned away if all that are held are held by who waits."""
        caller = chosen(self.at("waiting"), pick)
        for waiting in self.at("waiting"):
            waiting.request.owner = waiting
        holders = [caller, *["an outsider"] * others]
        for number, slot in enumerate(self.users):
            slot.owner = (slot.uses, holders[number % len(holders)])
        is_refused = self.is_all_held and (not others or len(self.users) == 1)
        if is_refused:
            self.deadlocks += 1
            self.leave_queue(caller)
            self.end(caller, "failed")
        self.machine.refuse_deadlock(caller.request, self.now)
        assert (caller.request.failure == "deadlock") == is_refused
        self.carry_on()

    # -- looking whether connections are alive -----------------------------------------------

    @precondition(lambda self: self.checking_callers())
    @rule(pick=PICK, pinged=st.booleans(), probed=st.booleans())
    def check_passes(self, pick: int, pinged: bool, probed: bool) -> None:
        caller = chosen(self.checking_callers(), pick)
        self.finish_check(caller, pinged or caller.slot.needs_ping, probed, None)

    @precondition(lambda self: self.checking_callers())
    @rule(pick=PICK, stale=st.sampled_from(["ping", "probe"]), was_cut=st.booleans())
    def check_fails(self, pick: int, stale: str, was_cut: bool) -> None:
        caller = chosen(self.checking_callers(), pick)
        pinged = stale == "ping"
        self.finish_check(caller, pinged, True, stale, was_cut=was_cut and pinged)

    def checking_callers(self) -> list[Caller]:
        return [caller for caller in self.at("claimed") if caller.slot in self.checking]

    def finish_check(
        self,
        caller: Caller,
        pinged: bool,
        probed: bool,
        stale: str | None,
        *,
        was_cut: bool = False,
    ) -> None:
        slot = caller.slot
        connection = self.connections[slot]
        is_unwanted = slot.reason is not None
        self.expected.counters["pings"] += pinged
        self.expected.counters["probes"] += probed
        self.checking.remove(slot)
        answers = set()
        if stale is None:
            self.note_answer(connection, pinged)
        else:
            self.note_dead(slot, was_cut=was_cut)
        if stale or is_unwanted:
            del self.users[slot]
            self.asleep.discard(caller.lane)
            # it goes before anything else is looked for
            self.closing[slot] = stale or slot.reason
            answers = self.expected_answers(caller)
            del self.closing[slot]
        got = self.machine.checked(
            slot, self.now, pinged=pinged, probed=probed, stale=stale, was_cut=was_cut
        )
        if not (stale or is_unwanted):
            assert got is slot
            self.begin_use(slot, caller)
            self.serve(caller)
            self.carry_on()
        else:
            self.receive(caller, got, answers)

    def note_answer(self, connection: Connection, pinged: bool) -> None:
        """Note that a connection is alive, by the server's own word if it was pinged."""
        if pinged:
            connection.checked_at = self.now
            connection.is_suspect = False

    def note_dead(self, slot: Slot, *, was_cut: bool) -> None:
        """Note that a connection was found dead, and what that says of the others."""
        connection = self.connections[slot]
        connection.is_dead = True
        self.expected.counters["ping_failures"] += 1
        took = self.now - connection.checking_since
        if not was_cut:
            self.note_death(slot)
        elif took >= min(self.config.ping_timeout, 0.5):
            self.note_death(slot, was_slow=True)

    def note_death(self, slot: Slot, *, was_slow: bool = False) -> None:
        """Note what the end of a connection says of the others; two soon after each other: all."""
        config = self.config
        if self.connections[slot].generation != self.generation:
            event("a death that tells nothing new")
            return
        window = EVENT_SECONDS + (config.ping_timeout if was_slow else 0.0)
        had_another = any(self.now - moment <= window for moment in self.deaths)
        if had_another or not config.pre_ping:
            self.note_generation_ends()
            return
        self.deaths.append(self.now)
        self.note_suspicion()

    def note_suspicion(self) -> None:
        event("all are suspect")
        for connection in self.connections.values():
            connection.is_suspect = True

    def note_generation_ends(self) -> None:
        event("a generation ends")
        self.generation += 1
        self.deaths.clear()

    @precondition(lambda self: self.late_callers())
    @rule(pick=PICK)
    def check_begins_too_late(self, pick: int) -> None:
        """Let the deadline of a caller pass before he could look whether his slot is alive."""
        caller = chosen(self.late_callers(), pick)
        self.pass_time(max(0.0, caller.deadline - self.now))
        self.checking.remove(caller.slot)
        slot = caller.slot
        self.end(caller, "timeouts")
        request = self.machine.check_expired(slot, self.now)
        assert (request.failure, request.slot) == ("timeout", None)
        self.carry_on()

    def late_callers(self) -> list[Caller]:
        if self.config.timeout == 0:
            return []
        return [caller for caller in self.checking_callers() if caller.deadline < inf]

    @precondition(lambda self: self.checking_callers())
    @rule(pick=PICK, error=ENDS.filter(bool))
    def check_is_interrupted(self, pick: int, error: BaseException) -> None:
        caller = chosen(self.checking_callers(), pick)
        self.checking.remove(caller.slot)
        self.connections[caller.slot].is_dead = True
        self.end(caller, "failed" if isinstance(error, Exception) else "cancelled")
        self.machine.abandon(caller.slot, self.now, error)
        self.carry_on()
        assert caller.slot in self.closing

    @precondition(lambda self: self.checking_callers())
    @rule(pick=PICK)
    def check_is_declined(self, pick: int) -> None:
        """Let a caller leave before it looked; all is well with the connection."""
        caller = chosen(self.checking_callers(), pick)
        self.checking.remove(caller.slot)
        self.end(caller, "cancelled")
        self.machine.decline(caller.slot, self.now)
        self.carry_on()

    # -- keeping idle connections alive ------------------------------------------------------

    @precondition(lambda self: self.keeping)
    @rule(pick=PICK)
    def ping_passes(self, pick: int) -> None:
        slot = chosen(list(self.keeping), pick)
        del self.keeping[slot]
        self.note_answer(self.connections[slot], True)
        self.end_ping(slot, is_alive=True)

    @precondition(lambda self: self.keeping)
    @rule(pick=PICK, was_cut=st.booleans())
    def ping_fails(self, pick: int, was_cut: bool) -> None:
        slot = chosen(list(self.keeping), pick)
        if was_cut:
            cut_at = self.connections[slot].checking_since + self.config.ping_timeout
            self.pass_time(max(0.0, cut_at - self.now))
        del self.keeping[slot]
        self.note_dead(slot, was_cut=was_cut)
        self.end_ping(slot, is_alive=False, was_cut=was_cut)
        assert slot in self.closing

    def end_ping(self, slot: Slot, *, is_alive: bool, was_cut: bool = False) -> None:
        """Say how the ping of an idle connection ended."""
        self.expected.counters["pings"] += 1
        self.machine.kept(slot, self.now, is_alive=is_alive, was_cut=was_cut)
        self.carry_on()
        event(f"a ping ends: {is_alive}, {slot.state}")

    @precondition(lambda self: self.given_up)
    @rule(is_alive=st.booleans())
    def ping_ends_after_it_was_given_up(self, is_alive: bool) -> None:
        slot = self.given_up.pop()
        if slot not in self.keeping:
            self.machine.kept(slot, self.now, is_alive=is_alive)
            assert not self.machine.decisions
            event("a ping ends after it was given up")

    # -- holders -----------------------------------------------------------------------------

    def held_back(self) -> list[Caller]:
        return [caller for caller in self.at("holding") if not caller.is_served]

    @precondition(lambda self: self.held_back())
    @rule(pick=PICK)
    def listeners_agree(self, pick: int) -> None:
        caller = chosen(self.held_back(), pick)
        self.machine.confirm(caller.slot)
        self.confirm_service(caller)

    @precondition(lambda self: self.at("holding"))
    @rule(pick=PICK, reason=st.sampled_from([None, None, None, "reset", "lost", "detached"]))
    def give_back(self, pick: int, reason: str | None) -> None:
        self.return_slot(chosen(self.at("holding"), pick), self.now, reason)

    def return_slot(self, caller: Caller, returned_at: float, reason: str | None = None) -> None:
        slot = caller.slot
        is_unwanted = slot.reason is not None or reason == "reset"
        self.note_return(caller, self.now if self.queue else returned_at, reason)
        assert self.machine.checkin(slot, returned_at, reason)
        self.carry_on()
        if is_unwanted:
            assert slot in self.closing or slot not in self.connections

    def note_return(self, caller: Caller, ends_at: float, reason: str | None = None) -> None:
        """Note that a hold ends, confirmed or not."""
        slot = caller.slot
        counters = self.expected.counters
        connection = self.connections[slot]
        used = ends_at - caller.held_since
        self.expected.record("use_time", used)
        self.expected.row(caller.label).use_seconds += used
        counters["failed"] += not caller.is_served
        counters["detached"] += reason == "detached"
        counters["forgotten"] += reason == "forgotten"
        if reason == "lost":
            counters["invalidations"] += 1
            self.expected.closes[slot.reason or "invalidated"] += 1
            connection.closes += 1
        if reason in ("lost", "detached", "forgotten"):
            del self.connections[slot]
        connection.is_unclean = reason == "reset"
        connection.used_at = ends_at
        connection.has_been_used = True
        caller.stage = "over"
        self.callers.remove(caller)
        del self.users[slot]

    @precondition(lambda self: self.at("holding") and self.phase != "closed")
    @rule(pick=PICK, label=LABELS)
    def give_back_while_somebody_asks(self, pick: int, label: str | None) -> None:
        """Let a return be dealt with a moment after it happened, behind a newcomer."""
        caller = chosen(self.at("holding"), pick)
        returned_at = self.now
        self.pass_time(MOMENT)
        newcomer = self.make_caller(self.now, label, False, caller.lane)
        is_noted = newcomer.stage == "waiting" or not self.queue
        self.return_slot(caller, returned_at if is_noted else self.now)

    @precondition(lambda self: self.at("holding"))
    @rule(pick=PICK, seconds=SECONDS)
    def reconnect_in_place(self, pick: int, seconds: float) -> None:
        self.reconnect(chosen(self.at("holding"), pick), seconds)

    def reconnect(self, caller: Caller, seconds: float) -> None:
        slot = caller.slot
        self.connections[slot].closes += 1
        self.open_connection(slot, seconds)
        self.connections[slot].uses = 1
        self.connections[slot].has_been_used = True
        self.expected.counters["invalidations"] += 1
        self.expected.closes["invalidated"] += 1
        self.machine.reconnected(slot, self.now, seconds)
        self.carry_on()

    @precondition(lambda self: self.at("holding"))
    @rule(pick=PICK, reconnects=st.booleans())
    def connection_dies(self, pick: int, reconnects: bool) -> None:
        """Let the server end a connection in its holder's hands."""
        self.lose_connection(chosen(self.at("holding"), pick), reconnects=reconnects)

    def lose_connection(self, caller: Caller, *, reconnects: bool = False) -> None:
        self.note_death(caller.slot)
        self.machine.note_death(caller.slot, self.now)
        self.carry_on()
        if reconnects:
            self.reconnect(caller, 0.0)
        else:
            self.return_slot(caller, self.now, "lost")

    # -- the database ------------------------------------------------------------------------

    def ordered(self) -> list[Slot]:
        return [slot for slot, a in self.attempts.items() if not a.is_started and not a.own_of]

    def under_way(self) -> list[Slot]:
        return [
            slot
            for slot, attempt in self.attempts.items()
            if attempt.is_started or (attempt.own_of and attempt.own_of.stage == "claimed")
        ]

    @precondition(lambda self: self.ordered())
    @rule(pick=PICK)
    def start_attempt(self, pick: int) -> None:
        slot = chosen(self.ordered(), pick)
        is_unwanted = slot.reason is not None
        is_for_nobody = slot.purpose == "demand" and not self.queue_of(slot.lane)
        if self.machine.starting(slot, self.now):
            assert not is_unwanted, "an attempt begins that nobody wants"
            assert not is_for_nobody, "an attempt begins whose demand is gone"
            assert self.is_down == (slot.purpose == "trial"), "the wrong attempt begins"
            self.attempts[slot].began_at = self.now
            self.attempts[slot].is_started = True
        else:
            del self.attempts[slot]
        self.carry_on()

    def open_connection(self, slot: Slot, seconds: float) -> None:
        expires_at = self.now + (self.config.max_lifetime or inf)
        connection = Connection(self.now, self.now, self.now, expires_at, self.generation)
        slot.resource = self.connections[slot] = connection
        self.ever_opened.append(slot.resource)
        self.expected.counters["connects"] += 1
        self.expected.record("connect_time", seconds)

    @precondition(lambda self: self.under_way())
    @rule(pick=PICK)
    def attempt_succeeds(self, pick: int) -> None:
        slot = chosen(self.under_way(), pick)
        attempt = self.attempts.pop(slot)
        self.open_connection(slot, self.now - attempt.began_at)
        if attempt.is_retired:
            self.connections[slot].retires_at = self.now
        if self.is_down:
            event("the database is there again")
        self.outage = Outage(self.chance)
        self.leftovers.clear()
        self.machine.connected(slot, self.now)
        caller = attempt.own_of
        if caller is None:
            self.carry_on()
        elif self.phase == "closed":
            self.end(caller, "failed")
            self.carry_on()
            assert slot in self.closing
        else:
            assert slot.state == "checked_out"
            self.begin_use(slot, caller)
            self.serve(caller)
            self.carry_on()

    @precondition(lambda self: self.under_way())
    @rule(pick=PICK, fault=FAULTS, kind=st.sampled_from([OSError, OSError, KeyboardInterrupt]))
    def attempt_fails(self, pick: int, fault: str, kind: type[BaseException]) -> None:
        slot = chosen(self.under_way(), pick)
        attempt = self.attempts.pop(slot)
        error = kind(fault)
        self.expected.counters["connect_failures"] += 1
        if fault == "refused":
            self.note_generation_ends()
        if attempt.is_in_turn and kind is OSError:
            self.note_failure(attempt, fault, is_bare=not self.open_in(*self.lanes))
        if attempt.own_of:
            self.end(attempt.own_of, "failed")
            self.machine.abandon(slot, self.now, error, fault)
        else:
            self.expect_to_be_told(slot.lane, error, fault)
            self.machine.connect_failed(slot, self.now, error, fault)
        self.carry_on()

    @precondition(lambda self: self.under_way())
    @rule(pick=PICK)
    def attempt_is_given_up(self, pick: int) -> None:
        """Let an attempt be ended by who makes it, which says nothing about the database."""
        slot = chosen(self.under_way(), pick)
        caller = self.attempts.pop(slot).own_of
        if caller:
            self.end(caller, "cancelled")
            self.machine.decline(slot, self.now)
        else:
            self.machine.attempt_cancelled(slot, self.now)
        self.carry_on()

    def note_failure(self, attempt: Attempt, fault: str, *, is_bare: bool) -> None:
        """Note a failed attempt, and who is turned away because of it."""
        opens = self.outage.failed(attempt.began_at, self.now, fault, is_bare=is_bare)
        if not opens:
            return
        event(f"the database is down: {self.config.on_outage}, {self.config.upkeep}")
        self.asked_at = self.now
        self.leftovers = {slot for slot, each in self.attempts.items() if each.is_in_turn}
        if self.phase == "open" and self.config.on_outage == "raise":
            self.to_fail = dict.fromkeys(self.queue, ("unavailable", None))

    def expect_to_be_told(self, lane: Lane, error: BaseException, fault: str) -> None:
        """Expect the head of the queue to hear of a failed attempt, if there is nothing else."""
        queue = self.queue_of(lane)
        in_turn = sum(a.is_in_turn for s, a in self.attempts.items() if s.lane is lane)
        is_told = fault == "authentication" or (
            fault != "congestion" and self.config.on_outage == "raise"
        )
        if is_told and in_turn < len(queue) and not self.open_in(lane) and not self.to_fail:
            self.to_fail = {queue[0]: ("failed", error)}

    @precondition(lambda self: self.phase == "open" and not self.is_down)
    @rule(fault=FAULTS)
    def server_is_lost(self, fault: str) -> None:
        """Let every connection end, and callers ask while nobody can connect."""
        self.lose_all_connections()
        for number in range(8):
            if self.is_down:
                break
            self.make_caller(self.now, None, False, chosen(self.lanes, number))
            while self.ordered() and not self.is_down:
                self.start_attempt(0)
            self.pass_time(0.125)
            self.wake_all()
            if self.under_way():
                self.attempt_fails(0, fault, OSError)
            self.tick()
        if fault == "congestion":
            assert not self.is_down
        event(f"the server is lost: {fault}, {'known' if self.is_down else 'not known'}")

    def lose_all_connections(self) -> None:
        self.wake_all()
        for caller in self.at("holding"):
            self.lose_connection(caller)
        while self.checking_callers():
            self.check_fails(0, "probe", False)
        while self.keeping:
            self.ping_fails(0, False)
        self.retire_generation()

    def wake_all(self) -> None:
        while self.at("granted"):
            self.wake_up(0)

    @precondition(lambda self: self.closing)
    @rule(pick=PICK)
    def finish_close(self, pick: int) -> None:
        slot = chosen(list(self.closing), pick)
        self.expected.closes[self.closing.pop(slot)] += 1
        self.connections.pop(slot).closes += 1
        self.machine.closed(slot, self.now)
        self.carry_on()

    # -- time --------------------------------------------------------------------------------

    @rule(seconds=SECONDS)
    def pass_time(self, seconds: float) -> None:
        """Charge the waiting to those who could end it, as the books promise."""
        rows = []
        for slot, state in self.states().items():
            if state == "checked_out":
                rows.append(self.users[slot].label)
            elif state != "idle":
                rows.append(f"({state})")
        waited = seconds * len(self.queue)
        for label in rows or ["(pool)"]:
            self.expected.row(label).wait_caused_seconds += waited / max(1, len(rows))
        self.now += seconds

    @rule()
    def tick(self) -> None:
        self.upkeep()

    @rule(seconds=SECONDS)
    def time_goes_by(self, seconds: float) -> None:
        """Let time pass while the upkeep comes when it was asked to, and at last a little late."""
        until = self.now + seconds
        for _ in range(16):
            due = self.upkeep()
            if due >= until:
                break
            self.pass_time(min(until - self.now, ceil((due - self.now) / MOMENT) * MOMENT))
        self.pass_time(until - self.now)
        self.upkeep()

    def upkeep(self) -> float:
        """Do what is due, and see that nothing that is due is left undone."""
        self.ticked_at = self.now
        due = self.machine.tick(self.now)
        assert due > self.now
        self.note_late_attempts()
        self.carry_on()
        assert set(self.long_holds()) <= self.sought
        # who comes first may have read the clock a moment later
        last = self.now - GRACE_SECONDS - MOMENT
        assert all(last < caller.deadline for caller in self.queue)
        if self.phase == "open":
            self.see_that_the_database_is_tried(due)
            self.see_that_idle_connections_are_kept_alive()
            for lane in self.lanes:
                if self.queue_of(lane) and self.has_room and not self.is_down:
                    assert self.in_turn or self.holds_back(lane)
        return due

    def note_late_attempts(self) -> None:
        """Note which attempts gave up their turn in this tick."""
        if self.phase == "closed":
            return
        going = {
            decision.slot
            for decision in self.machine.decisions
            if isinstance(decision, Close) and decision.slot.reason != "loop"
        }
        is_bare = going.issuperset(self.open_in(*self.lanes))
        for slot, attempt in self.attempts.items():
            took = self.now - attempt.began_at
            if not attempt.is_in_turn:
                continue
            if took >= self.config.connect_timeout:
                attempt.is_in_turn = False
                self.note_failure(attempt, "other", is_bare=is_bare)
            elif slot.purpose == "trial" and took >= SLOW_TRIAL_SECONDS:
                overdue = len(self.attempts) - self.in_turn
                attempt.is_in_turn = 2 * (overdue + 1) > self.limit
                event(f"a slow trial keeps its turn: {attempt.is_in_turn}")
        for caller in [c for c in self.to_fail if self.now >= c.deadline + GRACE_SECONDS]:
            del self.to_fail[caller]

    def see_that_the_database_is_tried(self, due: float) -> None:
        """See that a lost database is looked for as long as anybody may want it."""
        can_be_tried = (
            len(self.asleep) < len(self.lanes) if self.config.upkeep == "thread" else self.queue
        )
        if not (self.is_down and self.is_wanted and can_be_tried and self.has_room):
            return
        if self.now >= self.outage.latest:
            assert self.in_turn, "nobody looks whether the database is there again"
        soon = self.now + SLOW_TRIAL_SECONDS / 4
        assert due <= (soon if self.in_turn else max(soon, self.outage.latest))

    def see_that_idle_connections_are_kept_alive(self) -> None:
        seconds = self.config.keepalive
        if not seconds or not self.config.pre_ping:
            return
        for slot in self.idle:
            if self.now - self.connections[slot].heard_at >= seconds:
                is_busy = len(self.checking) + len(self.keeping) >= self.config.max_connecting
                assert is_busy or slot.lane in self.asleep

    # -- the owner of the pool ---------------------------------------------------------------

    @rule(act=ACTS)
    def owner_acts(self, act: str) -> None:
        """Do what ends many connections at once; one rule, or few would live long enough."""
        if act != "close" or self.expected.counters["requests"] > 8:
            getattr(self, act)()

    def warm(self) -> None:
        self.is_warm = True
        self.machine.warm(self.now)
        self.carry_on()

    def pause(self) -> None:
        self.machine.pause()
        if self.phase == "open":
            self.phase = "paused"

    @precondition(lambda self: self.phase == "paused")
    @rule()
    def resume(self) -> None:
        self.phase = "open"
        if self.is_down and self.config.on_outage == "raise":
            self.to_fail = dict.fromkeys(self.queue, ("unavailable", None))
        self.machine.resume(self.now)
        self.carry_on()

    @rule(max_size=st.one_of(st.integers(1, 4), st.none()), min_size=st.integers(0, 3))
    def resize(self, max_size: int | None, min_size: int) -> None:
        min_size = min_size if max_size is None else min(min_size, max_size)
        self.config = self.config.resized(min_size, max_size)
        self.machine.resize(self.config, self.now)
        self.carry_on()

    @precondition(lambda self: self.config.timeout != 0)
    @rule(seconds=st.sampled_from([1.0, 8.0, None]))
    def change_timeout(self, seconds: float | None) -> None:
        """From here on, whoever asks later may have the earlier deadline."""
        self.config = replace(self.config, timeout=seconds)
        self.machine.resize(self.config, self.now)
        self.carry_on()

    def retire_all(self) -> None:
        self.note_that_all_are_retired()
        self.machine.retire_all(self.now)
        self.carry_on()
        assert self.idle == []

    def note_that_all_are_retired(self) -> None:
        for attempt in self.attempts.values():
            attempt.is_retired = True
            if attempt.own_of is None:
                attempt.is_in_turn = False
        for connection in self.connections.values():
            connection.retires_at = self.now

    @rule(seconds=st.sampled_from([0.125, 1.0, 8.0]))
    def retire_gradually(self, seconds: float) -> None:
        """Have the connections retired one after the other, each if nothing else is sooner."""
        there = [slot for slot in self.machine.slots if slot in self.open_in(*self.lanes)]
        for number, slot in enumerate(there, 1):
            connection = self.connections[slot]
            due = self.now + seconds * number / len(there)
            if due < slot.ages_at:
                gone = self.now + seconds * (number + 1) / len(there)
                connection.retires_at = min(connection.retires_at, due)
                connection.expires_at = min(connection.expires_at, gone)
        self.machine.retire_gradually(self.now, seconds)
        self.carry_on()

    def retire_generation(self) -> None:
        """Let the driver know of an event of the server's."""
        self.note_generation_ends()
        self.machine.retire_generation(self.now)
        self.carry_on()
        assert self.idle == []

    @rule()
    def suspect_all(self) -> None:
        self.note_suspicion()
        self.machine.suspect_all()

    def dispose(self) -> None:
        for slot in (*self.idle, *self.keeping):
            self.connections[slot].is_disposed = True
        self.is_warm = False
        self.machine.dispose(self.now)
        self.carry_on()
        assert self.idle == []

    def close(self) -> None:
        self.phase = "closed"
        self.note_that_all_are_retired()
        self.to_fail = dict.fromkeys(self.queue, ("closed", None))
        self.machine.close(self.now)
        self.carry_on()

    # -- event loops -------------------------------------------------------------------------

    @precondition(lambda self: len(self.lanes) < 3)
    @rule()
    def add_lane(self) -> None:
        self.lanes.append(self.machine.add_lane())

    @precondition(lambda self: len(self.lanes) > 1)
    @rule(pick=PICK)
    def forget_lane(self, pick: int) -> None:
        """Let an event loop be closed, with all who are on it."""
        lane = chosen(self.lanes, pick)
        self.lanes.remove(lane)
        self.asleep.discard(lane)
        for caller in [caller for caller in self.callers if caller.lane is lane]:
            slot = caller.slot
            if slot in self.connections and slot not in self.checking:
                self.note_return(caller, self.now, "forgotten")
            else:
                if caller.stage == "waiting":
                    self.leave_queue(caller)
                self.checking.discard(slot)
                self.end(caller, "cancelled")
        slots = [slot for slot in self.machine.slots if slot.lane is lane]
        for slot in slots:
            self.attempts.pop(slot, None)
            self.closing.pop(slot, None)
            self.give_up_ping(slot)
            self.expected.counters["forgotten"] += self.connections.pop(slot, None) is not None
        self.machine.forget_lane(lane, self.now)
        assert {slot.state for slot in slots} <= {"gone"}
        self.carry_on()

    @precondition(lambda self: len(self.lanes) > 1)
    @rule(pick=PICK)
    def put_to_sleep(self, pick: int) -> None:
        """Let an event loop be stopped that nobody waits on; the next who asks there wakes it."""
        lane = chosen(self.lanes, pick)
        if self.queue_of(lane):
            return
        self.asleep.add(lane)
        for slot in [slot for slot in self.states() if slot.lane is lane]:
            if slot in self.keeping:
                self.give_up_ping(slot)
                self.expected.counters["forgotten"] += self.connections.pop(slot) is not None
            elif slot in self.attempts and self.attempts[slot].own_of is None:
                del self.attempts[slot]
            elif slot in self.closing:
                self.expected.closes[self.closing.pop(slot)] += 1
                self.connections.pop(slot).closes += 1
        self.machine.put_to_sleep(lane, self.now)
        self.carry_on()

    def give_up_ping(self, slot: Slot) -> None:
        if slot in self.keeping:
            del self.keeping[slot]
            self.given_up.append(slot)

    # -- the laws ----------------------------------------------------------------------------

    @invariant()
    def slots_are_where_the_driver_knows_them(self) -> None:
        states = self.states()
        assert {slot: slot.state for slot in self.machine.slots} == states
        assert {slot.lane for slot in states} <= set(self.machine.lanes)
        assert sorted(id(slot) for lane in self.machine.lanes for slot in lane.idle) == sorted(
            map(id, self.idle)
        )

    @invariant()
    def gauges_are_right(self) -> None:
        machine = self.machine
        states = Counter(self.states().values())
        assert {
            "open": machine.open,
            "idle": machine.idle,
            "checked_out": machine.checked_out,
            "checking": machine.checking,
            "connecting": machine.connecting,
            "closing": machine.closing,
            "requesting": machine.books.requesting,
            "waiting": [self.asking[request] for request in machine.queue],
        } == {
            "open": states["idle"] + states["checked_out"] + states["checking"],
            "idle": states["idle"],
            "checked_out": states["checked_out"],
            "checking": states["checking"],
            "connecting": states["connecting"],
            "closing": states["closing"],
            "requesting": sum(not caller.is_served for caller in self.callers),
            "waiting": self.queue,
        }

    @invariant()
    def counters_are_right_and_never_fall(self) -> None:
        books = self.machine.books
        counters = Counter({name: getattr(books, name) for name in COUNTERS})
        assert counters == self.expected.counters
        assert dict(books.closes) == dict(self.expected.closes)
        assert counters >= self.counters_before
        self.counters_before = counters

    @invariant()
    def events_tell_what_the_books_count(self) -> None:
        """Each thing that is counted is told once, under its reason; nothing else is."""
        told = Counter(event.name for event in self.told.events)
        books = self.machine.books
        assert {name: told[name] for name in BOOKED} == {
            name: count(books) for name, count in BOOKED.items()
        }
        reasons = Counter(e.reason for e in self.told.events if isinstance(e, ConnectionClosed))
        assert reasons == books.closes
        reported = sum(slot.is_reported for slot in self.users)
        assert told["hold_exceeded"] - told["hold_returned"] == reported
        assert told["hold_exceeded"] == 0 or self.config.hold_warning
        assert told["deadlock_found"] == self.deadlocks
        is_exhausted = told["pool_exhausted"] - told["pool_recovered"]
        assert is_exhausted in (0, 1)
        is_lost = told["database_lost"] - told["database_found"]
        assert self.is_down <= is_lost <= 1

    @invariant()
    def limit_is_a_limit(self) -> None:
        """Never more than ``max_size``; after it was lowered, never more than there were."""
        places = len(self.machine.slots)
        assert places <= max(self.limit, self.places_before)
        self.places_before = places
        if places - self.machine.closing > self.limit:
            assert self.idle == []
        if self.config.timeout != 0:
            assert self.in_turn <= self.config.max_connecting

    @invariant()
    def nobody_waits_beside_an_idle_connection(self) -> None:
        for lane in self.lanes:
            is_idle = any(slot.lane is lane for slot in self.idle)
            assert not (self.queue_of(lane) and is_idle) or self.phase == "paused"
        if self.phase == "closed":
            assert (self.queue, self.idle) == ([], [])

    @invariant()
    def nobody_waits_beside_a_free_place(self) -> None:
        """While somebody waits and there is room, an attempt is on its way."""
        has_room = len(self.machine.slots) < self.limit
        holds_back = self.is_down or self.outage.backs_off_until > self.ticked_at
        if self.queue and has_room and self.phase == "open" and not holds_back:
            assert self.attempts
            assert self.in_turn

    @invariant()
    def nobody_waits_with_nothing_while_another_lane_has_idle_connections(self) -> None:
        """A full pool makes room for a lane that has no connection at all."""
        is_held_up = self.in_turn >= self.config.max_connecting
        if self.outage.backs_off_until > self.ticked_at or self.phase != "open" or is_held_up:
            return
        makes_room = len(self.machine.slots) < self.limit or "loop" in self.closing.values()
        for lane in self.lanes:
            if self.queue_of(lane) and not any(slot.lane is lane for slot in self.states()):
                assert makes_room or not self.idle

    @invariant()
    def one_at_a_time_looks_for_a_lost_database(self) -> None:
        assert self.machine.breaker.is_open == self.is_down
        if not self.is_down:
            return
        assert not self.open_in(*self.lanes)
        trials = [slot for slot, attempt in self.attempts.items() if attempt.is_in_turn]
        assert len(set(trials) - self.leftovers) <= 1
        if self.phase == "open" and self.config.on_outage == "raise" and self.queue:
            is_tried = self.attempts or self.outage.is_congested
            assert is_tried, "somebody waits for a database that is known to be down"

    @invariant()
    def nothing_outlives_its_generation(self) -> None:
        assert self.machine.generation == self.generation
        assert {self.connections[slot].generation for slot in self.idle} <= {self.generation}

    @invariant()
    def somebody_answers_for_every_wait(self) -> None:
        machine, books = self.machine, self.machine.books
        caused = (
            books.caused_by_connecting
            + books.caused_by_checking
            + books.caused_by_closing
            + books.caused_by_pool
            + sum(row.wait_caused_seconds for row in books.rows.values())
            + sum(books.caused - s.mark for s in machine.slots if s.state == "checked_out")
            + (self.now - books.integrated_until) * machine.waiting
        )
        in_progress = sum(
            caller.waited + (self.now - caller.queued_at if caller.stage == "waiting" else 0.0)
            for caller in self.callers
        )
        ended = books.wait_time.sum_seconds + books.failed_wait_time.sum_seconds
        assert caused == pytest.approx(ended + in_progress)

    @invariant()
    def snapshot_tells_all_this(self) -> None:
        if not self.is_rushed:
            self.read()

    @rule()
    def read(self) -> None:
        """Compare a snapshot with the test's own books, and the rows of who made whom wait."""
        snapshot = PoolSnapshot(
            name="pool",
            pool_class="Machine",
            pid=None,
            taken_at=self.now,
            **read_machine(self.machine, self.now, describe, has_callers=False),
        )
        assert_it_adds_up(snapshot)
        states = Counter(self.states().values())
        histograms = ("checkout_time", "wait_time", "failed_wait_time", "use_time", "connect_time")
        assert {
            "states": Counter(slot.state for slot in snapshot.slots),
            "peaks": (snapshot.peak_checked_out, snapshot.peak_waiting),
            "oldest wait": snapshot.oldest_wait_seconds,
            "records": {name: getattr(snapshot, name).count for name in histograms},
            "seconds": {name: getattr(snapshot, name).sum_seconds for name in histograms},
            "checkins": snapshot.checkins,
        } == {
            "states": states,
            "peaks": (self.peaks["checked_out"], self.peaks["waiting"]),
            "oldest wait": max(
                (c.waited + self.now - c.queued_at for c in self.queue), default=0.0
            ),
            "records": {name: self.expected.records[name] for name in histograms},
            "seconds": {name: self.expected.seconds[name] for name in histograms},
            "checkins": self.expected.records["use_time"],
        }
        self.compare_rows(snapshot)
        if self.snapshot_before is not None:
            self.compare_with_an_earlier(snapshot, self.snapshot_before)
        self.snapshot_before = snapshot

    def compare_rows(self, snapshot: PoolSnapshot) -> None:
        rows = {label: Row(**vars(row)) for label, row in self.expected.rows.items()}
        for caller in self.callers:
            row = rows.setdefault(caller.label, Row())
            row.wait_seconds += caller.waited
            if caller.stage == "waiting":
                row.wait_seconds += self.now - caller.queued_at
            is_held = caller.slot in self.connections and caller.slot not in self.checking
            if is_held:
                row.use_seconds += self.now - caller.held_since
        assert {
            (label, name): getattr(row, name)
            for label, row in snapshot.labels.items()
            for name in vars(Row())
            if getattr(row, name)
        } == pytest.approx(
            {
                (label or "(unlabelled)", name): value
                for label, row in rows.items()
                for name, value in vars(row).items()
                if value
            }
        )

    def compare_with_an_earlier(self, later: PoolSnapshot, earlier: PoolSnapshot) -> None:
        """An interval and a sum of snapshots obey the same laws."""
        assert_it_adds_up(PoolSnapshot.merge([later, earlier]))
        interval = later - earlier
        ended = sum(getattr(interval, outcome) for outcome in OUTCOMES)
        assert interval.requests == ended + later.requesting - earlier.requesting
        left = interval.connects - sum(interval.closes.values())
        left -= interval.detached + interval.forgotten
        assert left == later.open + later.closing - earlier.open - earlier.closing
        waited = (
            interval.wait_time.sum_seconds
            + interval.failed_wait_time.sum_seconds
            + later.waiting_seconds
            - earlier.waiting_seconds
        )
        caused = sum(row.wait_caused_seconds for row in interval.labels.values())
        assert caused == pytest.approx(waited, abs=1e-6)

    # -- the end -----------------------------------------------------------------------------

    def teardown(self) -> None:
        """Let everybody be served and go, then close: the pool is empty and the books balance."""
        if not hasattr(self, "machine"):
            return
        if self.phase == "paused":
            self.resume()
        for _ in range(2000):
            if not self.go_on():
                break
        else:
            raise AssertionError("the pool never comes to rest")
        assert (self.queue, self.callers, self.ordered()) == ([], [], [])
        self.close()
        while self.closing:
            self.finish_close(0)
        self.read()
        assert (len(self.machine.slots), self.machine.books.requesting) == (0, 0)
        assert self.machine.next_tick(self.now) == inf
        kept = self.expected.counters["detached"] + self.expected.counters["forgotten"]
        assert Counter(c.closes for c in self.ever_opened) == Counter(
            {0: kept, 1: len(self.ever_opened) - kept}
        )

    def go_on(self) -> bool:
        """Do one thing that is due; return whether there was any."""
        if self.go_well():
            return True
        if self.at("holding"):
            self.give_back(0, None)
        elif self.queue:
            self.pass_time(0.5 if self.is_down else MOMENT)
            self.tick()
        else:
            return False
        return True

    def go_well(self) -> bool:
        """Bring one thing that was begun to a good end; return whether there was any."""
        todo = [
            (self.closing, self.finish_close),
            (self.ordered(), self.start_attempt),
            (self.under_way(), self.attempt_succeeds),
            (self.at("granted"), self.wake_up),
            (self.held_back(), self.listeners_agree),
            (self.keeping, self.ping_passes),
            (self.checking_callers(), lambda pick: self.check_passes(pick, False, False)),
        ]
        for things, do in todo:
            if things:
                do(0)
                return True
        return False


def chosen(things: list, pick: int):
    return things[pick % len(things)]


def test_the_pool_keeps_its_laws_whatever_happens():
    run_state_machine_as_test(PoolLaws, settings=settings(settings.default, stateful_step_count=40))
