"""``monitor(engine)`` tells the truth about any pool, whatever its listeners hear."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.pool import (
    AssertionPool,
    NullPool,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
)

from sqla_poolkit import ManagedPool, MonitoredQueuePool, PoolSnapshot, held_by, monitor, snapshot
from sqla_poolkit.core.events import ConnectFailed, ConnectionClosed, ConnectionLost
from sqla_poolkit.pool.reading import pools
from sqla_poolkit.watch import Monitor, observe, recent_events
from tests.pool.stub import Database, Disconnected, Error, StubDialect

CLASSES = [QueuePool, NullPool, StaticPool, SingletonThreadPool, AssertionPool]
# what SQLAlchemy's listeners cannot know of a pool with a queue
UNKNOWN = {
    "is_down",
    *("connecting", "requesting", "waiting", "oldest_wait_seconds", "waiting_seconds"),
    *("peak_waiting", "requests", "waits", "timeouts", "cancelled", "failed"),
    *("probes", "checkout_time", "wait_time", "failed_wait_time"),
}
PATIENCE_SECONDS = 10.0


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def engine_of(database: Database) -> Iterator[Callable[..., Engine]]:
    engines = []

    def make(poolclass: Any = QueuePool, **settings: Any) -> Engine:
        dialect = StubDialect.of(database)

        # as create_engine's own, the names of what it encloses included
        cargs_tup: Any = ("stub",)
        cparams: Any = {"host": "db", "port": 5432, "database": "app", "password": "hunter2"}

        def connect(connection_record: Any = None) -> Any:
            if dialect._has_events:
                for listener in dialect.dispatch.do_connect:
                    listener(dialect, connection_record, list(cargs_tup), dict(cparams))
            return database.connect()

        pool = poolclass(connect, dialect=dialect, **settings)
        engines.append(Engine(pool, dialect, make_url("stub://app:hunter2@db:5432/app")))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()


def read(engine: Engine) -> PoolSnapshot:
    """Return a reading after it was seen to add up."""
    s = snapshot(engine)
    gone = sum(s.closes.values()) + s.detached + s.forgotten
    rows = [slot.state for slot in s.slots]
    held = sum(slot.held_seconds or 0.0 for slot in s.slots)
    used = sum(row.use_seconds for row in s.labels.values())
    assert s.open == s.idle + s.checked_out + s.checking
    assert s.connects - gone == s.open + s.closing
    assert all(rows.count(state) == getattr(s, state) for state in ("idle", "checked_out"))
    assert s.checkouts == sum(row.checkouts for row in s.labels.values())
    assert used == pytest.approx(s.use_time.sum_seconds + held)
    assert s.peak_checked_out >= s.checked_out
    return s


def gauges(engine: Engine) -> tuple[int, int, int]:
    reading = read(engine)
    return reading.open, reading.idle, reading.checked_out


def listeners(engine: Engine) -> list[Any]:
    names = ("connect", "first_connect", "checkout", "checkin", "close", "detach", "reset")
    names += ("invalidate", "soft_invalidate", "close_detached")
    found = [list(getattr(engine.pool.dispatch, name)) for name in names]
    found += [list(getattr(engine.dialect.dispatch, n)) for n in ("do_connect", "handle_error")]
    return [each for some in found for each in some]


# -- every class of pool -------------------------------------------------------------------------


@pytest.mark.parametrize("poolclass", CLASSES)
def test_gauges_are_those_of_the_database(poolclass: Any, engine_of: Any, database: Database):
    engine = engine_of(poolclass)
    monitor(engine)
    assert gauges(engine) == (0, 0, 0)
    for _ in range(3):
        proxy = engine.raw_connection()
        assert gauges(engine) == (len(database.open), 0, 1)
        proxy.close()
        assert gauges(engine) == (len(database.open), len(database.open), 0)
    reading = read(engine)
    assert (reading.checkouts, reading.checkins, reading.use_time.count) == (3, 3, 3)
    assert (reading.connects, reading.connect_time.count) == (len(database.connections),) * 2
    engine.dispose()
    assert gauges(engine) == (0, 0, 0)


def test_what_was_there_before_and_is_let_go_of_is_forgotten(engine_of: Any):
    engine = engine_of(QueuePool)
    engine.raw_connection().close()
    watching = monitor(engine)
    engine.dispose(close=False)
    gc.collect()
    reading = watching.snapshot()
    assert (reading.forgotten, reading.closes, reading.open) == (1, {}, 0)


def test_a_monitor_of_a_pool_that_was_replaced_can_be_stopped(database: Database, engine_of: Any):
    engine = engine_of(ManagedPool)
    watching = monitor(engine)
    engine.pool.close()
    engine.pool = QueuePool(database.connect, dialect=engine.dialect)
    assert repr(watching).startswith("<Monitor of an engine that is gone, or")
    watching.stop()
    with pytest.raises(exc.ArgumentError, match="keeps no books"):
        watching.snapshot()


@pytest.mark.parametrize("listens_first", [True, False])
def test_a_connect_that_a_listener_ends_is_a_failure(engine_of: Any, listens_first: bool):
    def deny(*_: Any) -> None:
        raise LookupError("no token")

    engine = engine_of(QueuePool)
    if listens_first:
        event.listen(engine, "do_connect", deny)
    watching = monitor(engine)
    if not listens_first:
        event.listen(engine, "do_connect", deny)
    for _ in range(3):
        with suppress(LookupError):  # which keeps no traceback, and so no record
            engine.raw_connection()
    gc.collect()
    assert watching.snapshot().connect_failures == 3


def test_a_glance_leaves_the_rows_out(engine_of: Any):
    engine = engine_of(QueuePool)
    watching = monitor(engine)
    with held_by("GET /users"):
        engine.raw_connection().close()
    taken, seen = watching.snapshot(), watching.glance()
    assert (set(taken.labels), set(seen.labels)) == ({"GET /users"}, set())
    assert (seen.checkouts, seen.open) == (taken.checkouts, taken.open) == (1, 1)


@pytest.mark.parametrize("poolclass", CLASSES)
def test_connections_that_were_there_before_are_seen_at_once(
    poolclass: Any, engine_of: Any, database: Database
):
    engine = engine_of(poolclass)
    proxy = engine.raw_connection()
    monitor(engine)
    assert gauges(engine) == (1, 0, 1)
    (slot,) = snapshot(engine).slots
    assert (slot.held_seconds, slot.label) == (None, None)  # since when, nobody knows
    proxy.close()
    left = len(database.open)
    assert gauges(engine) == (left, left, 0)
    assert (read(engine).checkouts, read(engine).checkins) == (0, 0)


def test_idle_connections_that_were_there_before_are_seen_at_once(engine_of: Any):
    engine = engine_of()
    for proxy in [engine.raw_connection() for _ in range(3)]:
        proxy.close()
    monitor(engine)
    assert gauges(engine) == (3, 3, 0)


@pytest.mark.parametrize("poolclass", CLASSES)
def test_what_cannot_be_known_is_none(poolclass: Any, engine_of: Any):
    engine = engine_of(poolclass)
    monitor(engine)
    engine.raw_connection().close()
    reading = read(engine)
    unknown = {name for name in PoolSnapshot.__slots__ if getattr(reading, name) is None}
    has_queue = poolclass is QueuePool
    if has_queue:
        assert unknown == UNKNOWN
        assert reading.labels["(unlabelled)"].wait_seconds is None
        assert reading.labels["(unlabelled)"].wait_caused_seconds is None
    else:
        assert (reading.waiting, reading.waits, reading.timeouts) == (0, 0, 0)
        assert unknown - {"max_size"} < UNKNOWN
    json.dumps(reading.to_dict())


@pytest.mark.parametrize(
    ("poolclass", "settings", "limit"),
    [
        (QueuePool, {"pool_size": 2, "max_overflow": 3}, 5),
        (QueuePool, {"max_overflow": -1}, None),
        (NullPool, {}, None),
        (StaticPool, {}, 1),
        (SingletonThreadPool, {"pool_size": 7}, 7),
        (AssertionPool, {}, 1),
    ],
)
def test_the_limit_is_the_pools(poolclass: Any, settings: Any, limit: int | None, engine_of: Any):
    engine = engine_of(poolclass, **settings)
    monitor(engine)
    assert (read(engine).max_size, read(engine).is_unlimited) == (limit, limit is None)


def test_two_who_share_a_static_pool_are_two_checkouts(engine_of: Any):
    engine = engine_of(StaticPool)
    monitor(engine)
    first, second = engine.raw_connection(), engine.raw_connection()
    assert gauges(engine) == (1, 0, 1)
    first.close()
    second.close()
    assert (read(engine).checkouts, gauges(engine)) == (2, (1, 1, 0))


def test_the_most_at_a_time_are_remembered(engine_of: Any):
    engine = engine_of()
    monitor(engine)
    for count in (1, 3, 2):
        for proxy in [engine.raw_connection() for _ in range(count)]:
            proxy.close()
    assert read(engine).peak_checked_out == 3


def test_many_checkouts_are_entered_without_a_reading(engine_of: Any):
    engine = engine_of()
    watching: Any = monitor(engine, track="label")
    for _ in range(1200):
        engine.raw_connection().close()
    assert len(watching._notes) < 600
    assert (read(engine).checkouts, read(engine).use_time.count) == (1200, 1200)


# -- events that do not come in pairs ------------------------------------------------------------


def test_reconnects_that_fail_leave_the_gauges_true(engine_of: Any, database: Database):
    engine = engine_of(pre_ping=True)
    monitor(engine)
    for proxy in [engine.raw_connection() for _ in range(3)]:
        proxy.close()
    for connection in database.connections:
        connection.is_closed = True  # by the server

    def refuse(site: str) -> None:
        if site == "connect":
            raise Error("down")

    database.act = refuse
    for _ in range(20):
        with pytest.raises(Error):
            engine.raw_connection()
    assert gauges(engine)[2] == 0
    gc.collect()
    reading = read(engine)
    assert (reading.connect_failures, reading.ping_failures, reading.checkouts) == (20, 1, 3)
    database.act = lambda site: None
    for proxy in [engine.raw_connection() for _ in range(3)]:
        proxy.close()
    assert gauges(engine) == (3, 3, 0)


def test_a_connection_that_never_came_to_be_is_a_failure(engine_of: Any, database: Database):
    engine = engine_of()
    watching: Any = monitor(engine)
    database.act = lambda site: (_ for _ in ()).throw(Error("password 'hunter2' refused"))
    for _ in range(2):
        with pytest.raises(exc.DBAPIError):
            engine.connect()
    gc.collect()
    assert (read(engine).connect_failures, gauges(engine)) == (2, (0, 0, 0))
    last = [event for event in watching.journal.last() if isinstance(event, ConnectFailed)]
    assert len(last) == 2
    assert "hunter2" not in repr(watching.journal.last())


@pytest.mark.parametrize("poolclass", CLASSES)
def test_a_listener_of_a_connect_that_raises_leaves_nothing_open(
    poolclass: Any, engine_of: Any, database: Database
):
    engine = engine_of(poolclass)
    monitor(engine)

    def fail(*args: Any) -> None:
        raise Error("not this one")

    event.listen(engine, "connect", fail)
    with pytest.raises(Error):
        engine.raw_connection()
    gc.collect()
    assert (gauges(engine), database.open) == ((0, 0, 0), [])
    assert read(engine).closes == {"setup": 1}


def test_a_listener_that_raises_before_ours_hides_no_return(engine_of: Any):
    engine = engine_of()
    failures = [Error("no")]

    def fail(*args: Any) -> None:
        if failures:
            raise failures.pop()

    event.listen(engine, "checkin", fail)
    monitor(engine)
    with pytest.raises(Error):
        engine.raw_connection().close()
    assert read(engine).checked_out == 0


def test_a_checkout_that_is_tried_again_counts_once(engine_of: Any, database: Database):
    engine = engine_of()
    monitor(engine)
    errors = [exc.DisconnectionError("gone")]

    def refuse(*args: Any) -> None:
        if errors:
            raise errors.pop()

    event.listen(engine, "checkout", refuse)
    proxy = engine.raw_connection()
    assert gauges(engine) == (1, 0, 1)
    proxy.close()
    reading = read(engine)
    assert (reading.checkouts, reading.connects, reading.closes) == (1, 2, {"invalidated": 1})


def test_a_checkout_counts_once_its_listeners_begin(engine_of: Any):
    engine = engine_of()
    seen = []
    event.listen(engine, "checkout", lambda *_: seen.append(read(engine)))
    monitor(engine)
    engine.raw_connection().close()
    assert [(each.checking, each.checked_out) for each in seen] == [(1, 0)]


def test_a_detached_connection_is_no_longer_the_pools(engine_of: Any, database: Database):
    engine = engine_of()
    watching: Any = monitor(engine)
    proxy = engine.raw_connection()
    proxy.detach()
    assert gauges(engine) == (0, 0, 0)
    proxy.close()
    reading = read(engine)
    assert (reading.detached, reading.closes, reading.checkins) == (1, {}, 1)
    assert isinstance(watching.journal.last()[-1], ConnectionLost)


def test_a_soft_invalidation_closes_at_the_next_checkout(engine_of: Any):
    engine = engine_of()
    monitor(engine)
    proxy = engine.raw_connection()
    proxy.invalidate(soft=True)
    assert gauges(engine) == (1, 0, 1)
    proxy.close()
    engine.raw_connection().close()
    assert (read(engine).closes, gauges(engine)) == ({"invalidated": 1}, (1, 1, 0))


def test_each_close_has_its_reason(engine_of: Any, database: Database):
    engine = engine_of(pool_size=1, max_overflow=3)
    watching: Any = monitor(engine)
    held = [engine.raw_connection() for _ in range(3)]
    held[0].invalidate(Disconnected("gone"))
    held[1].close()
    held[2].close()
    proxy = engine.raw_connection()
    database.act = lambda site: (_ for _ in ()).throw(Error("no")) if site == "reset" else None
    proxy.close()
    database.act = lambda site: None
    engine.raw_connection().close()
    engine.dispose()
    reading = read(engine)
    assert sum(reading.closes.values()) == len(database.connections)
    assert {"invalidated", "overflow", "reset"} <= reading.closes.keys()
    assert (reading.reset_failures, reading.invalidations) == (1, 1)
    told = [one.reason for one in watching.journal.last() if isinstance(one, ConnectionClosed)]
    assert sorted(told) == sorted(
        reason for reason, number in reading.closes.items() for _ in range(number)
    )


def test_a_recycled_connection_is_closed_for_its_age(engine_of: Any, database: Database):
    engine = engine_of(recycle=0)
    monitor(engine)
    engine.raw_connection().close()
    time.sleep(0.01)
    engine.raw_connection().close()
    assert read(engine).closes == {"age": len(database.connections) - 1}


# -- dispose, drop, fork -------------------------------------------------------------------------


def test_listeners_survive_dispose_and_both_pools_count(engine_of: Any, database: Database):
    engine = engine_of()
    monitor(engine, pool_name="survivor")
    held = engine.raw_connection()
    engine.dispose()
    engine.raw_connection().close()
    assert gauges(engine) == (2, 1, 1)
    held.close()
    engine.dispose()
    engine.raw_connection().close()
    reading = read(engine)
    assert (reading.name, reading.checkouts) == ("survivor", 3)
    assert reading.open >= len(database.open) - 1


def test_a_pool_that_is_dropped_with_its_connections_leaves_none(engine_of: Any):
    engine = engine_of()
    monitor(engine)
    for proxy in [engine.raw_connection() for _ in range(2)]:
        proxy.close()
    del proxy
    engine.dispose(close=False)
    gc.collect()
    assert (gauges(engine), read(engine).forgotten) == ((0, 0, 0), 2)


FORK = """
import os, sys
from sqlalchemy import create_engine
from sqla_poolkit import monitor, snapshot

engine = create_engine("sqlite:///" + sys.argv[1])
monitor(engine)
engine.connect().close()
if os.fork() == 0:
    engine.dispose(close=False)
    engine.connect().close()
    reading = snapshot(engine)
    print(reading.checkouts, reading.open, reading.connects, flush=True)
    os._exit(0)
os.wait()
engine.connect().close()
reading = snapshot(engine)
print(reading.checkouts, reading.open, reading.connects)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_starts_with_empty_books(tmp_path: Path):
    command = [sys.executable, "-c", FORK, str(tmp_path / "a.db")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "1 1 1\n2 1 1\n"


def test_an_engine_that_is_dropped_takes_its_monitor_along(database: Database):
    engine = sa.create_engine("sqlite://", poolclass=NullPool)
    monitor(engine, pool_name="dropped")
    assert "dropped" in [pool.name for pool in pools() if isinstance(pool, Monitor)]
    del engine
    gc.collect()
    assert "dropped" not in [pool.name for pool in pools() if isinstance(pool, Monitor)]


# -- the garbage collector ------------------------------------------------------------------------


def test_leaks_that_are_collected_in_a_listener_do_not_deadlock(engine_of: Any):
    """Connections in reference cycles are returned inside whatever code is running."""
    engine = engine_of(max_overflow=-1)
    monitor(engine)
    done = threading.Event()

    def work() -> None:
        for turn in range(3000):
            proxy = engine.raw_connection()
            if turn % 3 == 0:
                cycle: list[Any] = [proxy]
                cycle.append(cycle)
                del cycle, proxy
            else:
                proxy.close()
            if turn % 50 == 0:
                snapshot(engine)

    def run() -> None:
        work()
        done.set()

    before = gc.get_threshold()
    gc.set_threshold(20, 2, 2)
    try:
        threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a deadlock"
    finally:
        gc.set_threshold(*before)
    gc.collect()
    reading = read(engine)
    assert (reading.checkouts, reading.checkins, reading.checked_out) == (6000, 6000, 0)


def test_a_finalizer_that_reads_in_the_middle_of_it_hears_so(engine_of: Any):
    watching: Any = monitor(engine_of())
    with watching._lock, pytest.raises(exc.InvalidRequestError, match="by a finalizer"):
        watching.snapshot()


def test_eight_threads_break_no_law(engine_of: Any, database: Database):
    engine = engine_of(pool_size=4, max_overflow=2)
    monitor(engine)
    errors = []

    def work(number: int) -> None:
        try:
            for turn in range(150):
                with held_by(f"worker {number % 2}"):
                    proxy = engine.raw_connection()
                if (turn + number) % 20 == 0:
                    proxy.invalidate()
                elif (turn + number) % 33 == 0:
                    proxy.detach()
                    proxy.close()
                else:
                    proxy.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        reading = snapshot(engine)
        gone = sum(reading.closes.values()) + reading.detached + reading.forgotten
        assert reading.connects - gone == reading.open + reading.closing
        assert reading.checkouts == sum(row.checkouts for row in reading.labels.values())
    assert errors == []
    reading = read(engine)
    assert (reading.checkouts, reading.checked_out) == (1200, 0)
    assert reading.open == len(database.open)
    assert reading.forgotten == 0


# -- observers -----------------------------------------------------------------------------------


def test_observers_hear_of_connections_and_failures(engine_of: Any, database: Database):
    engine = engine_of()
    monitor(engine, pool_name="observed")
    heard: list[str] = []
    with observe(lambda told: heard.append(f"{told.pool} {told.name}"), engine) as observation:
        engine.raw_connection().close()
        engine.dispose()
        database.act = lambda site: (_ for _ in ()).throw(Error("down"))
        with pytest.raises(exc.DBAPIError):
            engine.connect()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(heard) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert heard == [
        f"observed {name}" for name in ("connection_opened", "connection_closed", "connect_failed")
    ]
    assert len(recent_events(engine)) == 3
    assert observation is not None


# -- who holds -------------------------------------------------------------------------------------


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# {text}")]
    return number


def test_holders_have_label_and_caller(engine_of: Any):
    engine = engine_of()
    monitor(engine)
    with held_by("GET /users"):
        proxy = engine.raw_connection()  # the line that asked
    (slot,) = read(engine).slots
    assert slot.label == "GET /users"
    assert slot.caller is not None
    assert slot.caller.startswith(f"{__file__}:{line_of('the line that asked')} ")
    proxy.close()
    assert read(engine).labels["GET /users"].checkouts == 1


def test_only_the_label_is_remembered_if_that_is_wanted(engine_of: Any):
    engine = engine_of()
    monitor(engine, track="label")
    engine.raw_connection().close()
    assert read(engine).callers is None


# -- one monitor per engine -----------------------------------------------------------------------


def test_a_second_call_returns_the_same_monitor(engine_of: Any):
    engine = engine_of()
    first = monitor(engine)
    assert monitor(engine) is first
    assert monitor(engine.execution_options(isolation_level="AUTOCOMMIT")) is first


def test_stop_leaves_no_listener_behind_and_is_final(engine_of: Any):
    engine = engine_of()
    before = listeners(engine)
    with monitor(engine, pool_name="stopped") as watching:
        engine.dispose()
        engine.raw_connection().close()
        assert listeners(engine) != before
    assert listeners(engine) == before
    watching.stop()
    engine.raw_connection().close()
    assert watching.snapshot().checkouts == 1
    with pytest.raises(exc.ArgumentError, match=r"call monitor\(engine\)"):
        snapshot(engine)
    again = monitor(engine, pool_name="stopped")
    assert again is not watching
    assert (read(engine).name, read(engine).checkouts, gauges(engine)) == ("stopped", 0, (1, 1, 0))


def test_exporters_find_it_among_all_pools(engine_of: Any):
    engine = engine_of()
    watching = monitor(engine)
    assert watching in pools()
    assert [pool.snapshot().name for pool in pools() if pool is watching] == [watching.name]


@pytest.mark.parametrize("poolclass", [ManagedPool, MonitoredQueuePool])
def test_a_pool_with_books_of_its_own_needs_no_listeners(poolclass: Any, tmp_path: Path):
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'a.db'}", poolclass=poolclass)
    before = listeners(engine)
    with monitor(engine) as watching:
        engine.connect().close()
        assert listeners(engine) == before
        assert watching.snapshot().checkouts == 1
        assert watching.name == snapshot(engine).name
    assert snapshot(engine).checkouts == 1
    engine.dispose()


def test_other_listeners_go_on_whichever_came_first(engine_of: Any):
    engine = engine_of()
    heard: list[str] = []
    event.listen(engine, "checkout", lambda *_: heard.append("checkout"))
    monitor(engine)
    event.listen(engine, "checkin", lambda *_: heard.append("checkin"))
    engine.raw_connection().close()
    assert heard == ["checkout", "checkin"]
    assert read(engine).checkouts == 1


@pytest.mark.parametrize("what", [None, "sqlite://", QueuePool(lambda: None)])
def test_what_is_no_engine_is_refused_with_a_sentence(what: Any):
    with pytest.raises(exc.ArgumentError, match="watches an Engine or an AsyncEngine, not"):
        monitor(what)


def test_a_bad_track_is_refused(engine_of: Any):
    with pytest.raises(exc.ArgumentError, match="track='all' is not possible"):
        monitor(engine_of(), track="all")


# -- names and secrets ---------------------------------------------------------------------------


def test_the_default_name_is_where_the_database_is(engine_of: Any):
    names = [monitor(engine_of()).name for _ in range(2)]
    assert [name.partition("#")[0] for name in names] == ["db:5432/app"] * 2
    assert len(set(names)) == 2


@pytest.mark.extra
def test_with_a_creator_of_ones_own_the_url_tells_the_name(tmp_path: Path):
    pytest.importorskip("psycopg2")
    engine = sa.create_engine("postgresql+psycopg2://app:hunter2@db:1234/x", creator=lambda: None)
    watching = monitor(engine)
    assert watching.name == "db:1234/x"
    assert watching.snapshot().connect_failures is None


def test_secrets_are_nowhere_in_a_snapshot(engine_of: Any, database: Database):
    engine = engine_of()
    watching = monitor(engine)
    engine.raw_connection().close()
    told = repr(watching) + json.dumps(watching.snapshot().to_dict()) + repr(watching.snapshot())
    assert "hunter2" not in told
