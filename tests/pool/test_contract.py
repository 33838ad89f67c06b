"""What every pool promises, whether threads or tasks use it: each test runs with both."""

from __future__ import annotations

import gc
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from sqlalchemy import event

from sqla_poolkit import (
    AsyncManagedPool,
    AsyncMonitoredQueuePool,
    ManagedPool,
    MonitoredQueuePool,
    PoolClosed,
    PoolOverloaded,
    PoolTimeout,
    held_by,
)
from sqla_poolkit.errors import PoolMisuse
from tests.pool.callers import PATIENCE_SECONDS, Callers, Tasks, Threads
from tests.pool.laws import assert_lawful, broken_laws
from tests.pool.stub import Database, Disconnected, Error, StubDialect

pytestmark = pytest.mark.usefixtures("idle_threads_leave_soon")

asyncio_too = pytest.mark.extra
MANAGED = [
    pytest.param((ManagedPool, Threads), id="ManagedPool"),
    pytest.param((AsyncManagedPool, Tasks), id="AsyncManagedPool", marks=asyncio_too),
]
MEASURED = [
    *MANAGED,
    pytest.param((MonitoredQueuePool, Threads), id="MonitoredQueuePool"),
    pytest.param((AsyncMonitoredQueuePool, Tasks), id="AsyncMonitoredQueuePool", marks=asyncio_too),
]


class World:
    """A pool of one kind, its callers, and a database that does as it is told."""

    def __init__(self, pool_class: type[Any], callers: Callers) -> None:
        self.pool_class = pool_class
        self.callers = callers
        self.database = Database()
        self.pool: Any = None

    @property
    def is_asyncio(self) -> bool:
        return isinstance(self.callers, Tasks)

    def make(self, *, pings: bool = False, **settings: Any) -> Any:
        if pings:
            settings["dialect"] = StubDialect.of(self.database)
            settings["dialect"].is_async = self.is_asyncio
        self.pool = self.pool_class(self.database.connect, **settings)
        return self.pool

    def take(self) -> Any:
        """Check a connection out, as a caller who is done with that at once."""
        return self.callers.call(self.pool.connect)

    def give(self, connection: Any) -> None:
        self.callers.call(connection.close)

    def ask(self, who: str, served: list[str]) -> Future[Any]:
        """Start a caller who has to queue; come back when he does."""
        before = self.pool.snapshot().waiting

        def work() -> Any:
            connection = self.pool.connect()
            served.append(who)
            return connection

        future = self.callers.start(work)
        self.until(lambda: future.done() or self.pool.snapshot().waiting > before)
        assert not future.done(), future
        return future

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so():
            assert time.monotonic() < deadline, f"it never came to be so: {self.pool}"
            time.sleep(0.001)

    def finish(self, answer: Any) -> Any:
        return self.callers.finish(answer)

    def all_can_be_had(self, number: int) -> None:
        """Take the whole pool at once and give it back."""
        held = [self.take() for _ in range(number)]
        for connection in held:
            self.give(connection)

    def end(self) -> None:
        if hasattr(self.pool, "resume"):
            self.pool.resume()
            self.finish(self.pool.close(0 if self.pool.checkedout() else PATIENCE_SECONDS))
        elif self.pool is not None:
            self.callers.call(self.pool.dispose)
        self.callers.stop()


@pytest.fixture(params=MANAGED)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A world with one of our pools."""
    pool_class, callers = request.param
    world = World(pool_class, callers())
    yield world
    world.end()


@pytest.fixture(params=MEASURED)
def measured(request: pytest.FixtureRequest) -> Iterator[World]:
    """A world with any pool that keeps books."""
    pool_class, callers = request.param
    world = World(pool_class, callers())
    yield world
    world.end()


class Gate:
    """Keeps who comes to a site of the database until it is opened."""

    def __init__(self, world: World, site: str) -> None:
        self.world = world
        self.site = site
        self.is_open = threading.Event()
        self.arrived = 0
        self.keeps = True
        world.database.act = self

    def __call__(self, site: str) -> None:
        if site == self.site and self.keeps:
            self.arrived += 1
            self.world.callers.wait_for(self.is_open)


# -- order ---------------------------------------------------------------------------------------


def test_callers_are_served_in_the_order_in_which_they_asked(world: World):
    world.make(max_size=1)
    held = world.take()
    served: list[str] = []
    waiting = [world.ask(who, served) for who in "abcd"]
    for future in waiting:
        world.give(held)
        held = future.result(PATIENCE_SECONDS)
    assert served == ["a", "b", "c", "d"]
    world.give(held)


def test_a_newcomer_does_not_overtake_who_waits(world: World):
    world.make(max_size=1)
    held = world.take()
    served: list[str] = []
    first = world.ask("first", served)

    def give_and_ask() -> Any:
        held.close()
        connection = world.pool.connect()
        served.append("newcomer")
        return connection

    newcomer = world.callers.start(give_and_ask)
    world.give(first.result(PATIENCE_SECONDS))
    world.give(newcomer.result(PATIENCE_SECONDS))
    assert served == ["first", "newcomer"]


def test_who_waited_in_vain_is_gone_from_the_queue(world: World):
    world.make(max_size=1, timeout=0.05)
    held = world.take()
    with pytest.raises(PoolTimeout):
        world.take()
    assert world.pool.snapshot().waiting == 0
    world.give(held)
    assert world.pool.snapshot().idle == 1


def test_the_connection_used_last_is_used_first(world: World):
    world.make(max_size=3)
    held = [world.take() for _ in range(3)]
    last = held[1].dbapi_connection
    for index in (0, 2, 1):
        world.give(held[index])
    again = world.take()
    assert again.dbapi_connection is last
    world.give(again)


# -- deadlines and limits ------------------------------------------------------------------------


def test_the_deadline_covers_a_connect_that_hangs(world: World):
    world.make(max_size=1, timeout=0.1)
    gate = Gate(world, "connect")
    began = time.monotonic()
    with pytest.raises(PoolTimeout) as caught:
        world.take()
    assert 0.1 <= time.monotonic() - began < 0.5
    assert caught.value.code == "3o7r"
    assert caught.value.snapshot.connecting == 1
    gate.is_open.set()
    world.until(lambda: world.pool.snapshot().idle == 1)


def test_more_waiters_than_max_waiting_are_turned_away_at_once(world: World):
    world.make(max_size=1, max_waiting=1)
    held = world.take()
    served: list[str] = []
    waiting = world.ask("first", served)
    with pytest.raises(PoolOverloaded) as caught:
        world.take()
    assert caught.value.gauges["waiting"] == 1
    world.give(held)
    world.give(waiting.result(PATIENCE_SECONDS))
    assert world.pool.snapshot().rejected == 1


def test_with_a_timeout_of_zero_nobody_queues(world: World):
    world.make(max_size=1, timeout=0)
    held = world.take()
    with pytest.raises(PoolTimeout):
        world.take()
    assert world.pool.snapshot().waits == 0
    world.give(held)


def test_there_are_never_more_sockets_than_max_size(world: World):
    pool = world.make(max_size=3)

    def use() -> None:
        for turn in range(20):
            connection = pool.connect()
            if turn % 7 == 0:
                connection.invalidate()
            world.callers.sleep(0)
            connection.close()

    for future in [world.callers.start(use) for _ in range(12)]:
        future.result(PATIENCE_SECONDS)
    assert world.database.most_sockets <= 3
    assert_lawful(pool.snapshot())


# -- growth --------------------------------------------------------------------------------------


def test_a_waiter_takes_what_comes_first_a_returned_connection_or_a_new_one(world: World):
    pool = world.make(max_size=2)
    held = world.take()
    gate = Gate(world, "connect")
    served: list[str] = []
    waiting = world.ask("waiter", served)
    world.until(lambda: gate.arrived == 1)
    world.give(held)
    again = waiting.result(PATIENCE_SECONDS)
    assert again.dbapi_connection.number == 1
    gate.is_open.set()
    world.until(lambda: pool.snapshot().idle == 1)
    world.give(again)


def test_a_failed_connect_reaches_the_caller_it_was_made_for(world: World):
    def refuse(site: str) -> None:
        if site == "connect":
            raise Error("refused")

    pool = world.make(max_size=2)
    world.database.act = refuse
    with pytest.raises(Error, match="refused"):
        world.take()
    world.database.act = lambda site: None
    world.all_can_be_had(2)
    reading = pool.snapshot()
    assert (reading.failed, reading.connect_failures, reading.checkouts) == (1, 1, 2)


def test_the_attempt_of_the_next_in_line_starts_when_one_has_failed(world: World):
    world.make(max_size=1)
    gate = Gate(world, "connect")
    fails = [True]

    def act(site: str) -> None:
        gate(site)
        if site == "connect" and fails.pop() if fails else False:
            raise Error("refused")

    world.database.act = act
    served: list[str] = []
    first = world.ask("first", served)
    second = world.ask("second", served)
    gate.is_open.set()
    with pytest.raises(Error):
        first.result(PATIENCE_SECONDS)
    world.give(second.result(1.0))


def test_waiters_wait_for_open_connections_when_a_connect_fails(world: World):
    pool = world.make(max_size=2)
    held = world.take()

    def refuse(site: str) -> None:
        if site == "connect":
            raise Error("refused")

    world.database.act = refuse
    served: list[str] = []
    waiting = world.ask("waiter", served)
    world.until(lambda: pool.snapshot().connect_failures > 0)
    world.give(held)
    world.give(waiting.result(PATIENCE_SECONDS))


def test_min_size_is_opened_by_wait_ready_and_kept(world: World):
    pool = world.make(min_size=2, max_size=3)
    assert pool.snapshot().open == 0
    world.finish(pool.wait_ready(PATIENCE_SECONDS))
    assert pool.snapshot().idle == 2
    pool.retire_all()
    world.until(lambda: pool.snapshot().connects == 4)
    world.until(lambda: pool.snapshot().idle == 2)


def test_wait_ready_says_why_it_gave_up(world: World):
    def refuse(site: str) -> None:
        if site == "connect":
            raise Error("the server is starting up")

    pool = world.make(min_size=1)
    world.database.act = refuse
    with pytest.raises(PoolTimeout, match="the server is starting up"):
        world.finish(pool.wait_ready(0.1))
    world.database.act = lambda site: None


def test_idle_connections_above_min_size_go_after_idle_timeout(world: World):
    pool = world.make(min_size=1, max_size=3, idle_timeout=0.05)
    world.all_can_be_had(3)
    world.until(lambda: pool.snapshot().closes == {"idle": 2})
    assert pool.snapshot().open == 1


def test_a_connection_is_replaced_after_max_uses(world: World):
    pool = world.make(max_size=1, max_uses=2)
    for _ in range(4):
        world.give(world.take())
    world.until(lambda: pool.snapshot().closes == {"uses": 2})


def test_aged_connections_are_replaced_in_the_background(world: World):
    pool = world.make(max_size=2, max_lifetime=0.2)
    world.give(world.take())
    world.until(lambda: pool.snapshot().closes.get("age", 0) >= 2)
    assert pool.snapshot().connects >= 2


# -- what goes wrong -----------------------------------------------------------------------------


def test_a_dead_connection_is_replaced_without_its_caller_noticing(world: World):
    pool = world.make(pings=True, max_size=2)
    world.give(world.take())

    def lose(site: str) -> None:
        if site == "ping":
            raise Disconnected("gone")

    world.database.act = lose
    connection = world.take()
    assert connection.dbapi_connection.number == 2
    world.database.act = lambda site: None
    world.give(connection)
    reading = pool.snapshot()
    assert (reading.ping_failures, reading.closes["ping"]) == (1, 1)


def test_a_reset_that_fails_closes_the_connection(world: World, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.CRITICAL, "sqlalchemy.pool")
    pool = world.make(max_size=1)
    connection = world.take()

    def break_reset(site: str) -> None:
        if site == "reset":
            raise Error("no")

    world.database.act = break_reset
    world.give(connection)
    world.database.act = lambda site: None
    world.all_can_be_had(1)
    assert len(world.database.open) == 1
    assert_lawful(pool.snapshot())


def test_an_invalidated_connection_frees_its_place(world: World):
    pool = world.make(max_size=1)
    connection = world.take()
    world.callers.call(connection.invalidate)
    world.give(connection)
    world.all_can_be_had(1)
    assert pool.snapshot().closes == {"invalidated": 1}


def test_a_detached_connection_frees_its_place(world: World):
    pool = world.make(max_size=1)
    connection = world.take()
    world.callers.call(connection.detach)
    world.all_can_be_had(1)
    world.give(connection)
    reading = pool.snapshot()
    assert (reading.detached, reading.open) == (1, 1)


def test_a_connection_that_is_dropped_frees_its_place(
    world: World, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.CRITICAL, "sqlalchemy.pool")
    pool = world.make(max_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world.callers.call(lambda: pool.connect() and None)
        gc.collect()
        world.all_can_be_had(1)
    assert_lawful(pool.snapshot())


def test_a_checkout_whose_listener_raises_has_failed_and_loses_nothing(world: World):
    pool = world.make(max_size=1)

    def refuse(*_: Any) -> None:
        raise Error("not you")

    event.listen(pool, "checkout", refuse)
    with pytest.raises(Error, match="not you"):
        world.take()
    event.remove(pool, "checkout", refuse)
    world.all_can_be_had(1)
    reading = pool.snapshot()
    assert (reading.requests, reading.failed, reading.checkouts) == (2, 1, 1)


def test_a_creator_that_returns_none_is_told_so(world: World):
    pool = world.make(max_size=1)
    pool._creator = lambda: None
    with pytest.raises(PoolMisuse, match="returned None"):
        world.take()
    assert_lawful(pool.snapshot())


def test_a_second_checkin_is_refused_and_changes_nothing(world: World):
    pool = world.make(max_size=1)
    connection = world.take()
    record = connection._connection_record
    world.give(connection)
    pool.snapshot()
    with pytest.raises(PoolMisuse, match="checked in twice"):
        pool._return_conn(record)
    assert pool.snapshot().idle == 1


# -- the owner of the pool -----------------------------------------------------------------------


def test_a_smaller_limit_holds_as_connections_come_back(world: World):
    pool = world.make(max_size=3)
    held = [world.take() for _ in range(3)]
    pool.resize(max_size=1)
    for connection in held:
        world.give(connection)
    world.until(lambda: pool.snapshot().open + pool.snapshot().closing == 1)
    assert pool.snapshot().closes == {"resize": 2}


def test_a_larger_limit_serves_who_waits(world: World):
    pool = world.make(max_size=1)
    held = world.take()
    served: list[str] = []
    waiting = world.ask("waiter", served)
    pool.resize(max_size=2)
    world.give(waiting.result(PATIENCE_SECONDS))
    world.give(held)


def test_a_paused_pool_hands_nothing_out_until_it_resumes(world: World):
    pool = world.make(max_size=2)
    world.all_can_be_had(1)
    pool.pause()
    served: list[str] = []
    waiting = world.ask("waiter", served)
    assert pool.snapshot().idle == 1
    pool.resume()
    world.give(waiting.result(PATIENCE_SECONDS))


def test_close_fails_who_waits_and_waits_for_holders(world: World):
    pool = world.make(max_size=1)
    held = world.take()
    served: list[str] = []
    waiting = world.ask("waiter", served)
    closing = Threads().start(lambda: world.finish(pool.close(PATIENCE_SECONDS)))
    with pytest.raises(PoolClosed):
        waiting.result(PATIENCE_SECONDS)
    assert not closing.done()
    world.give(held)
    closing.result(PATIENCE_SECONDS)
    with pytest.raises(PoolClosed):
        world.take()
    assert world.database.open == []


def test_a_pool_and_its_successor_share_one_limit_name_and_totals(world: World):
    name = f"{world.pool_class.__name__} and its successor"
    pool = world.make(max_size=2, pool_name=name)
    held = world.take()
    world.callers.call(pool.dispose)
    world.pool = successor = pool.recreate()
    assert successor.snapshot().name == name
    other = world.take()
    served: list[str] = []
    waiting = world.ask("waiter", served)
    world.give(held)
    world.give(waiting.result(PATIENCE_SECONDS))
    world.give(other)
    assert world.database.most_sockets == 2
    assert successor.snapshot().checkouts == 3


def test_the_repr_shows_the_state(world: World):
    name = world.pool_class.__name__
    pool = world.make(max_size=2, pool_name=f"the one {name}")
    held = world.take()
    assert repr(pool) == (
        f"<{name} 'the one {name}' 1 of 2 open: 0 idle, 1 checked out, 0 connecting, 0 waiting>"
    )
    world.give(held)


# -- books ---------------------------------------------------------------------------------------


def test_waits_are_counted_and_charged_to_who_held(measured: World):
    pool = measured.make(**small(measured))
    measured.give(measured.take())
    before = pool.snapshot()

    def take() -> Any:
        with held_by("report"):
            return pool.connect()

    held = measured.callers.call(take)
    served: list[str] = []
    waiting = measured.ask("waiter", served)
    time.sleep(0.05)
    measured.give(held)
    measured.give(waiting.result(PATIENCE_SECONDS))
    reading = pool.snapshot() - before
    assert (reading.waits, reading.wait_time.count, reading.checkouts) == (1, 1, 2)
    report = reading.labels["report"]
    assert report.wait_caused_seconds == pytest.approx(reading.wait_time.sum_seconds, rel=0.2)
    assert report.wait_caused_seconds >= 0.045


def small(world: World) -> dict[str, Any]:
    """Return the settings of a pool of one."""
    if world.pool_class in (ManagedPool, AsyncManagedPool):
        return {"max_size": 1}
    return {"pool_size": 1, "max_overflow": 0}


def test_the_caller_is_the_place_in_the_program_that_asked(measured: World):
    pool = measured.make()
    measured.give(measured.take())
    (caller,) = (place for place, row in pool.snapshot().callers.items() if row.checkouts)
    # the pool's connect is handed over as it is, so the place is that of whoever calls it
    assert "sqlalchemy" not in caller
    assert "sqla_poolkit" not in caller.rpartition("/")[2]


def test_a_timeout_is_counted_and_nobody_waits_after_it(measured: World):
    pool = measured.make(timeout=0.05, **small(measured))
    held = measured.take()
    for _ in range(2):
        with pytest.raises(Exception, match=r"0\.05|timed out"):
            measured.take()
    reading = pool.snapshot()
    assert (reading.timeouts, reading.waiting, reading.failed_wait_time.count) == (2, 0, 2)
    measured.give(held)


def test_no_snapshot_breaks_a_law_while_many_use_the_pool(measured: World):
    pool = measured.make(timeout=PATIENCE_SECONDS)

    def use(number: int) -> None:
        for turn in range(30):
            with held_by(f"worker {number % 3}"):
                connection = pool.connect()
            if (turn + number) % 10 == 0:
                connection.invalidate()
            if turn % 3 == 0:
                measured.callers.sleep(0)
            connection.close()

    users = [measured.callers.start(lambda number=number: use(number)) for number in range(24)]
    while not all(user.done() for user in users):
        broken = set(broken_laws(pool.snapshot()))
        # a holder whose connection is gone still uses its place, but there is no slot to show
        assert broken <= {"the labels' use is all use"}
    for user in users:
        user.result(0)
    reading = pool.snapshot()
    assert_lawful(reading)
    assert (reading.checkouts, reading.checked_out, reading.requesting) == (720, 0, 0)
    assert reading.open + reading.closing == measured.database.sockets
