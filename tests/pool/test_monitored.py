"""The monitored pools tell what SQLAlchemy's own algorithms really did."""

from __future__ import annotations

import gc
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, QueuePool

from sqla_poolkit import (
    ManagedPool,
    MonitoredNullPool,
    MonitoredQueuePool,
    PoolSnapshot,
    held_by,
    snapshot,
)
from tests.pool.callers import in_thread
from tests.pool.laws import assert_lawful, broken_laws
from tests.pool.stub import Database, Error, Interrupt, StubDialect

PATIENCE = 10.0

Pool = MonitoredQueuePool | MonitoredNullPool


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def queue_pool(database: Database) -> Iterator[Callable[..., MonitoredQueuePool]]:
    """Makes pools of one connection with none above it, unless told otherwise."""
    made = []

    def make(**settings: Any) -> MonitoredQueuePool:
        one = {"pool_size": 1, "max_overflow": 0, "timeout": PATIENCE}
        made.append(MonitoredQueuePool(database.connect, **{**one, **settings}))
        return made[-1]

    yield make
    for pool in made:
        pool.dispose()


@pytest.fixture(params=[MonitoredQueuePool, MonitoredNullPool])
def any_pool(request: pytest.FixtureRequest, database: Database) -> Iterator[Pool]:
    pool = request.param(database.connect)
    yield pool
    pool.dispose()


def waiter_at(pool: MonitoredQueuePool) -> Future[Any]:
    """Start a caller, and return once it waits."""
    caller = in_thread(pool.connect)
    deadline = time.monotonic() + PATIENCE
    while not pool.snapshot().waiting:
        assert time.monotonic() < deadline, "it never waited"
    return caller


def lawful(pool: Pool) -> PoolSnapshot:
    reading = pool.snapshot()
    assert_lawful(reading)
    return reading


def refuse(site: str) -> None:
    if site == "connect":
        raise Error("no more room")


def line_of(text: str) -> int:
    """Return the number of the only line of this file that ends in this remark."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# {text}")]
    return number


# -- checkouts -----------------------------------------------------------------------------------


def test_a_checkout_and_its_checkin_are_counted(any_pool: Pool) -> None:
    connection = any_pool.connect()
    held = lawful(any_pool)
    connection.close()
    back = lawful(any_pool)
    assert (held.requests, held.checkouts, held.checkins, held.checked_out) == (1, 1, 0, 1)
    assert (back.requests, back.checkouts, back.checkins, back.checked_out) == (1, 1, 1, 0)
    assert back.use_time.count == 1


def test_a_null_pool_closes_what_comes_back(database: Database) -> None:
    pool = MonitoredNullPool(database.connect)
    for _ in range(3):
        pool.connect().close()
    reading = lawful(pool)
    assert (reading.connects, sum(reading.closes.values()), reading.open) == (3, 3, 0)
    assert (reading.max_size, reading.is_unlimited) == (None, True)


def test_a_queue_pool_keeps_what_comes_back(queue_pool: Callable[..., MonitoredQueuePool]) -> None:
    pool = queue_pool()
    for _ in range(3):
        pool.connect().close()
    reading = lawful(pool)
    assert (reading.checkouts, reading.connects, reading.idle) == (3, 1, 1)
    assert reading.slots[0].uses == 3


def test_the_limit_is_that_of_queue_pool(queue_pool: Callable[..., MonitoredQueuePool]) -> None:
    limits = [
        queue_pool(pool_size=2, max_overflow=3).snapshot().max_size,
        queue_pool(pool_size=2, max_overflow=-1).snapshot().max_size,
    ]
    assert limits == [5, None]


def test_a_connection_above_pool_size_is_closed_as_overflow(
    queue_pool: Callable[..., MonitoredQueuePool],
) -> None:
    pool = queue_pool(max_overflow=1)
    first, second = pool.connect(), pool.connect()
    first.close()
    second.close()
    reading = lawful(pool)
    assert (reading.closes, reading.idle, reading.peak_checked_out) == ({"overflow": 1}, 1, 2)


def test_a_connection_that_was_dropped_unclosed_is_seen_to_come_back(any_pool: Pool) -> None:
    any_pool.connect()  # and dropped
    gc.collect()
    assert (lawful(any_pool).checkins, lawful(any_pool).checked_out) == (1, 0)


def test_a_snapshot_during_a_connect_shows_it(database: Database) -> None:
    seen = []
    pool = MonitoredQueuePool(database.connect)
    database.act = lambda site: site == "connect" and seen.append(pool.snapshot())
    pool.connect().close()
    (reading,) = seen
    assert (reading.connecting, reading.requesting, reading.open) == (1, 1, 0)
    assert_lawful(reading)
    pool.dispose()


# -- waiting -------------------------------------------------------------------------------------


def test_a_wait_is_seen_while_it_lasts_and_after(
    queue_pool: Callable[..., MonitoredQueuePool],
) -> None:
    pool = queue_pool()
    held = pool.connect()
    caller = waiter_at(pool)
    during = lawful(pool)
    held.close()
    caller.result(PATIENCE).close()
    after = lawful(pool)
    assert (during.waiting, during.waits, during.wait_time.count) == (1, 1, 0)
    assert during.oldest_wait_seconds > 0
    assert (after.waiting, after.waits, after.wait_time.count) == (0, 1, 1)
    assert (after.oldest_wait_seconds, after.peak_waiting) == (0, 1)


def test_a_checkout_that_need_not_wait_has_not_waited(
    queue_pool: Callable[..., MonitoredQueuePool],
) -> None:
    pool = queue_pool()
    for _ in range(2):
        pool.connect().close()
    assert (lawful(pool).waits, lawful(pool).wait_time.count) == (0, 0)


def test_a_wait_counts_once_although_queue_pool_asks_itself_again(
    queue_pool: Callable[..., MonitoredQueuePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = queue_pool()
    get = pool._pool.get
    faster: list[Any] = []
    asked: list[bool] = []

    def get_too_late(block: bool, timeout: float) -> Any:
        asked.append(block)
        if len(asked) == 1:
            faster.append(in_thread(pool.connect).result(PATIENCE))
        return get(block, timeout)

    monkeypatch.setattr(pool._pool, "get", get_too_late)
    caller = waiter_at(pool)
    faster.pop().close()
    caller.result(PATIENCE).close()
    reading = lawful(pool)
    assert asked == [False, False, True]
    assert (reading.requests, reading.checkouts, reading.waits) == (2, 2, 1)
    assert reading.wait_time.count == 1


def test_a_timeout_is_queue_pools_own_and_counted(
    queue_pool: Callable[..., MonitoredQueuePool],
) -> None:
    pool = queue_pool(timeout=0.02)
    held = pool.connect()
    with pytest.raises(exc.TimeoutError, match="QueuePool limit of size 1 overflow 0 reached"):
        pool.connect()
    reading = lawful(pool)
    assert (reading.timeouts, reading.waits, reading.failed_wait_time.count) == (1, 1, 1)
    assert reading.failed_wait_time.sum_seconds >= 0.02
    held.close()


def test_who_holds_is_charged_with_all_the_waiting(
    queue_pool: Callable[..., MonitoredQueuePool],
) -> None:
    pool = queue_pool()
    with held_by("slow"):
        held = pool.connect()
    caller = waiter_at(pool)
    during = lawful(pool)
    held.close()
    caller.result(PATIENCE).close()
    after = lawful(pool)
    assert during.labels["slow"].wait_caused_seconds == pytest.approx(during.waiting_seconds)
    caused = sum(row.wait_caused_seconds for row in after.labels.values())
    assert caused == pytest.approx(after.wait_time.sum_seconds)
    assert after.labels["slow"].wait_caused_seconds > 0


def test_a_wait_during_a_connect_is_charged_to_both_places(
    queue_pool: Callable[..., MonitoredQueuePool], database: Database
) -> None:
    pool = queue_pool(pool_size=2)
    reached, gate = threading.Event(), threading.Event()
    with held_by("holder"):
        held = pool.connect()

    def hang(site: str) -> None:
        if site == "connect":
            reached.set()
            gate.wait(PATIENCE)

    database.act = hang
    connecting = in_thread(pool.connect)
    assert reached.wait(PATIENCE)
    caller = waiter_at(pool)
    reading = lawful(pool)
    causes = [reading.labels[name].wait_caused_seconds for name in ("holder", "(connecting)")]
    assert causes == [pytest.approx(reading.waiting_seconds / 2)] * 2
    gate.set()
    held.close()
    connecting.result(PATIENCE).close()
    caller.result(PATIENCE).close()


def test_two_holders_share_what_they_cause(queue_pool: Callable[..., MonitoredQueuePool]) -> None:
    pool = queue_pool(pool_size=2)
    held = []
    for label in ("one", "other"):
        with held_by(label):
            held.append(pool.connect())
    caller = waiter_at(pool)
    labels = lawful(pool).labels
    assert labels["one"].wait_caused_seconds == pytest.approx(labels["other"].wait_caused_seconds)
    assert labels["one"].wait_caused_seconds > 0
    held.pop().close()
    caller.result(PATIENCE).close()
    held.pop().close()


# -- failures ------------------------------------------------------------------------------------


def test_a_failed_connect_is_a_failed_request(any_pool: Pool, database: Database) -> None:
    database.act = refuse
    with pytest.raises(Error, match="no more room"):
        any_pool.connect()
    reading = lawful(any_pool)
    assert (reading.failed, reading.connect_failures, reading.open) == (1, 1, 0)


@pytest.mark.parametrize(
    ("error", "counter"), [(RuntimeError("no"), "failed"), (Interrupt("stop"), "cancelled")]
)
def test_a_checkout_that_a_listener_refuses_is_not_served(
    any_pool: Pool, error: BaseException, counter: str
) -> None:
    def stop(*args: Any) -> None:
        raise error

    event.listen(any_pool, "checkout", stop)
    with pytest.raises(type(error)):
        any_pool.connect()
    reading = lawful(any_pool)
    assert (reading.checkouts, getattr(reading, counter), reading.checked_out) == (0, 1, 0)


def test_a_checkout_counts_as_asking_while_its_listeners_decide(any_pool: Pool) -> None:
    seen = []
    event.listen(any_pool, "checkout", lambda *_: seen.append(any_pool.snapshot()))
    any_pool.connect().close()
    (reading,) = seen
    assert_lawful(reading)
    assert (reading.requesting, reading.checkouts, reading.checking) == (1, 0, 1)


def test_an_emptied_place_is_connected_again_after_a_connect_that_failed(
    queue_pool: Callable[..., MonitoredQueuePool], database: Database
) -> None:
    pool = queue_pool()
    connection = pool.connect()
    connection.invalidate()
    connection.close()
    database.act = refuse
    with pytest.raises(Error):
        pool.connect()
    failed = lawful(pool)
    assert (failed.open, failed.connect_failures, failed.failed) == (0, 1, 1)
    database.act = lambda site: None
    pool.connect().close()
    reading = lawful(pool)
    assert (reading.connects, reading.checkouts, reading.idle) == (2, 2, 1)
    assert reading.closes == {"invalidated": 1}


# -- closing -------------------------------------------------------------------------------------


def test_an_invalidation_is_counted_when_it_happens(any_pool: Pool, database: Database) -> None:
    connection = any_pool.connect()
    connection.invalidate()
    during = lawful(any_pool)
    assert (during.invalidations, during.closes, during.open) == (1, {"invalidated": 1}, 0)
    assert database.open == []
    connection.close()
    assert lawful(any_pool).closes == {"invalidated": 1}


def test_a_recycled_connection_is_closed_for_its_age(
    queue_pool: Callable[..., MonitoredQueuePool], database: Database
) -> None:
    pool = queue_pool(recycle=0)
    pool.connect().close()
    pool.connect().close()
    reading = lawful(pool)
    opened, closed = len(database.connections), len(database.connections) - 1
    assert closed > 0
    assert (reading.connects, reading.closes, reading.idle) == (opened, {"age": closed}, 1)
    assert reading.invalidations == 0


def test_a_ping_that_fails_replaces_the_connection_in_place(
    queue_pool: Callable[..., MonitoredQueuePool], database: Database
) -> None:
    pool = queue_pool(pre_ping=True, dialect=StubDialect.of(database))
    pool.connect().close()
    database.connections[0].is_closed = True  # by the server
    pool.connect().close()
    reading = lawful(pool)
    assert (reading.checkouts, reading.connects, reading.idle) == (2, 2, 1)
    assert reading.closes == {"invalidated": 1}


def test_a_disconnection_error_replaces_the_connection_in_place(any_pool: Pool) -> None:
    errors = [exc.DisconnectionError("gone")]

    def check(*args: Any) -> None:
        if errors:
            raise errors.pop()

    event.listen(any_pool, "checkout", check)
    connection = any_pool.connect()
    reading = lawful(any_pool)
    assert (reading.checkouts, reading.connects, reading.checked_out) == (1, 2, 1)
    assert reading.closes == {"invalidated": 1}
    connection.close()


def test_a_detached_connection_is_no_longer_the_pools(any_pool: Pool, database: Database) -> None:
    connection = any_pool.connect()
    connection.detach()
    reading = lawful(any_pool)
    assert (reading.detached, reading.open, reading.checked_out) == (1, 0, 0)
    assert len(database.open) == 1
    connection.close()
    assert lawful(any_pool).closes == {}


def test_dispose_closes_what_is_idle_and_says_so(
    queue_pool: Callable[..., MonitoredQueuePool], database: Database
) -> None:
    pool = queue_pool()
    pool.connect().close()
    pool.dispose()
    assert (lawful(pool).closes, database.open) == ({"disposed": 1}, [])


def test_a_successor_writes_on_in_the_same_books(any_pool: Pool) -> None:
    any_pool.connect().close()
    before = any_pool.snapshot()
    any_pool.dispose()
    successor = any_pool.recreate()
    successor.connect().close()
    after = lawful(successor)
    assert (after.name, after.pool_class) == (before.name, before.pool_class)
    assert (after.settings, after.checkouts, after.connects) == (before.settings, 2, 2)
    successor.dispose()


def test_a_connection_that_returns_after_dispose_goes_and_so_does_its_pool(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'shop.db'}", poolclass=MonitoredQueuePool)
    held = engine.connect()
    native = held.connection.dbapi_connection
    before = weakref.ref(engine.pool)
    engine.dispose()
    held.close()
    reading = lawful(engine.pool)
    assert (reading.open, reading.closes) == (0, {"disposed": 1})
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        native.cursor()
    del held, native
    gc.collect()
    assert before() is None
    engine.connect().close()
    assert lawful(engine.pool).open == 1
    engine.dispose()


def test_engine_dispose_keeps_track_name_and_totals(tmp_path: Path) -> None:
    engine = sa.create_engine(
        f"sqlite:///{tmp_path / 'a.db'}",
        poolclass=MonitoredQueuePool,
        track="label",
        pool_name="books",
    )
    for _ in range(2):
        engine.connect().close()
        engine.dispose()
    reading = snapshot(engine)
    assert (reading.name, reading.checkouts, reading.callers) == ("books", 2, None)
    assert reading.closes == {"disposed": 2}


# -- who holds -----------------------------------------------------------------------------------


def test_the_caller_is_the_line_that_asked(any_pool: Pool) -> None:
    held = any_pool.connect()  # the line that asked
    (slot,) = any_pool.snapshot().slots
    assert slot.caller == (
        f"{__file__}:{line_of('the line that asked')} test_the_caller_is_the_line_that_asked"
    )
    held.close()


def test_the_caller_is_seen_through_a_session(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'a.db'}", poolclass=MonitoredNullPool)
    with Session(engine) as session:
        session.execute(sa.text("SELECT 1"))  # the line with execute
        (slot,) = snapshot(engine).slots
    assert slot.caller.startswith(f"{__file__}:{line_of('the line with execute')} ")


def test_labels_are_rows(any_pool: Pool) -> None:
    with held_by("GET /users"):
        any_pool.connect().close()
    any_pool.connect().close()
    labels = any_pool.snapshot().labels
    checkouts = {label: row.checkouts for label, row in labels.items() if row.checkouts}
    assert checkouts == {"GET /users": 1, "(unlabelled)": 1}


# -- reading -------------------------------------------------------------------------------------


def test_what_cannot_be_known_is_none(any_pool: Pool) -> None:
    any_pool.connect().close()
    reading = any_pool.snapshot()
    unknown = ("pings", "probes", "ping_failures", "reset_failures")
    assert [getattr(reading, name) for name in unknown] == [None] * 4


def test_repr_is_the_state(queue_pool: Callable[..., MonitoredQueuePool]) -> None:
    pool = queue_pool(pool_name="measured", max_overflow=2)
    held = pool.connect()
    assert repr(pool) == (
        "<MonitoredQueuePool 'measured' 1 of 3 open: "
        "0 idle, 1 checked out, 0 connecting, 0 waiting>"
    )
    held.close()


@pytest.mark.parametrize("poolclass", [MonitoredQueuePool, MonitoredNullPool, ManagedPool])
def test_snapshot_reads_an_engine_or_its_pool(tmp_path: Path, poolclass: Any) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'read.db'}", poolclass=poolclass)
    assert snapshot(engine).pool_class == poolclass.__name__
    assert snapshot(engine).name == snapshot(engine.pool).name


@pytest.mark.parametrize("poolclass", [QueuePool, NullPool])
def test_snapshot_of_a_pool_without_books_is_refused_with_a_sentence(poolclass: Any) -> None:
    engine = sa.create_engine("sqlite://", poolclass=poolclass)
    name = poolclass.__name__
    with pytest.raises(exc.ArgumentError, match=f"{name} keeps no books, .* poolclass=Managed"):
        snapshot(engine)


def test_a_bad_track_is_refused(database: Database) -> None:
    with pytest.raises(exc.ArgumentError, match="track='all' is not possible"):
        MonitoredQueuePool(database.connect, track="all")


# -- all at once ---------------------------------------------------------------------------------


def test_sixteen_threads_break_no_law_in_any_snapshot(any_pool: Pool, database: Database) -> None:
    barrier = threading.Barrier(17)

    def work(number: int) -> None:
        barrier.wait(PATIENCE)
        for turn in range(40):
            with held_by(f"worker {number % 4}"):
                connection = any_pool.connect()
            if (turn + number) % 20 == 0:
                connection.invalidate()
            if (turn + number) % 33 == 0:
                connection.detach()
            connection.close()

    workers = [in_thread(lambda number=number: work(number)) for number in range(16)]
    barrier.wait(PATIENCE)
    while not all(worker.done() for worker in workers):
        broken = set(broken_laws(any_pool.snapshot()))
        # a holder whose connection is gone still uses its place, but there is no slot to show
        assert broken <= {"the labels' use is all use"}
    assert [worker.exception() for worker in workers] == [None] * 16
    reading = lawful(any_pool)
    assert (reading.checkouts, reading.checkins, reading.checked_out) == (640, 640, 0)
    assert reading.open == database.sockets
