"""What was found broken once, by readers and by chance, each as small as it could be made."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.pool import NullPool
from sqlalchemy.util import greenlet_spawn

from sqla_poolkit import (
    AsyncManagedPool,
    ManagedPool,
    MonitoredQueuePool,
    PoolClosed,
    PoolTimeout,
    held_by,
)
from sqla_poolkit.config import PoolConfig
from sqla_poolkit.core.holders import current_label
from sqla_poolkit.core.machine import Machine
from sqla_poolkit.core.slots import Close, Slot
from sqla_poolkit.pool import _sqlalchemy, _sync
from sqla_poolkit.pool._messages import describe_error
from sqla_poolkit.testing import FaultProxy
from sqla_poolkit.watch import recent_events
from tests.pool.stub import Database, Error, StubDialect
from tests.servers import PostgresServer
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("idle_threads_leave_soon")

PATIENCE_SECONDS = 10.0

MakePool = Callable[..., ManagedPool]


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def make_pool(database: Database) -> Iterator[MakePool]:
    """Makes pools on the stub, and closes them after the test."""
    made: list[ManagedPool] = []

    def make(**settings: Any) -> ManagedPool:
        made.append(ManagedPool(database.connect, **settings))
        return made[-1]

    yield make
    for pool in made:
        pool.close(PATIENCE_SECONDS)


# -- memory --------------------------------------------------------------------------------------


def test_no_durations_gather_without_end_where_nobody_reads_them(make_pool: MakePool):
    pool = make_pool(max_size=1, upkeep="inline")
    books = pool._driver.machine.books
    for _ in range(5000):
        books.wait_time.record(0.001)
        pool.connect().close()
    recorders = (books.wait_time, books.use_time, books.checkout_time)
    assert max(len(recorder.gathered) for recorder in recorders) <= 1024


def test_no_durations_gather_without_end_in_a_measured_pool(database: Database):
    pool = MonitoredQueuePool(database.connect)
    for _ in range(2000):
        pool.connect().close()
    assert len(pool._recorder.ledger.books.use_time.gathered) <= 512
    pool.dispose()


# -- upkeep --------------------------------------------------------------------------------------


def test_the_upkeep_goes_on_after_a_round_that_failed(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    pool = make_pool(max_size=1, idle_timeout=0.05)
    tick = Machine.tick
    failures = [RuntimeError("a bad round")]

    def fail_once(machine: Machine, now: float) -> float:
        if failures:
            raise failures.pop()
        return tick(machine, now)

    monkeypatch.setattr(Machine, "tick", fail_once)
    pool.connect().close()
    until(lambda: pool.snapshot().closes == {"idle": 1})
    assert "The upkeep of the pool failed; it goes on" in caplog.text


def test_the_auditor_reclaims_a_slot_whose_record_is_gone(make_pool: MakePool):
    pool = make_pool(max_size=1)
    held = pool.connect()
    (slot,) = pool._driver.machine.slots
    record, slot.resource = slot.resource, None  # a signal came between two statements
    until(lambda: pool.snapshot().checked_out == 0)
    pool.connect().close()
    _sqlalchemy.assign_slot(record, None)
    held.close()


def test_work_is_done_at_once_when_the_upkeep_was_stopped_at_the_end(make_pool: MakePool):
    pool = make_pool(max_size=2, max_uses=1)
    first, second = pool.connect(), pool.connect()
    pool._driver._upkeep.stop(1.0)
    first.close()
    second.close()
    pool.connect().close()
    until(lambda: pool.snapshot().closes.get("uses", 0) >= 2)


def test_many_connections_are_closed_by_few_threads(make_pool: MakePool, database: Database):
    pool = make_pool(max_size=60, max_connecting=60)
    held = [pool.connect() for _ in range(60)]
    for connection in held:
        connection.close()
    most = [0]

    def close_slowly(site: str) -> None:
        if site == "close":
            most[0] = max(most[0], database.busy["close"])
            time.sleep(0.002)

    database.act = close_slowly
    pool.retire_all()
    until(lambda: pool.snapshot().closes == {"retired": 60})
    assert 1 <= most[0] <= 8


def test_without_threads_idle_connections_go_as_others_ask(make_pool: MakePool):
    pool = make_pool(max_size=3, idle_timeout=0.05, upkeep="inline")
    held = [pool.connect() for _ in range(3)]
    for connection in held:
        connection.close()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while pool.snapshot().open > 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        pool.connect().close()
    assert pool.snapshot().closes["idle"] >= 2


def test_without_threads_a_waiter_connects_when_the_back_off_is_over(
    make_pool: MakePool, database: Database
):
    pool = make_pool(max_size=10, timeout=PATIENCE_SECONDS, upkeep="inline", max_connecting=3)
    held = pool.connect()
    may_fail = threading.Event()

    def fail_late(site: str) -> None:
        if site == "connect":
            may_fail.wait(PATIENCE_SECONDS)
            raise Error("refused")

    def ask(outcomes: list[Any]) -> None:
        try:
            outcomes.append(pool.connect())
        except Error as error:
            outcomes.append(error)

    def start(outcomes: list[Any]) -> threading.Thread:
        thread = threading.Thread(target=ask, args=(outcomes,))
        thread.start()
        return thread

    database.act = fail_late
    failed: list[Any] = []
    served: list[Any] = []
    threads = [start(failed) for _ in range(3)]
    until(lambda: database.busy["connect"] == 3)
    threads.append(start(served))
    until(lambda: pool.snapshot().waiting == 1)
    database.act = lambda site: may_fail.wait(PATIENCE_SECONDS) and None
    may_fail.set()
    until(lambda: bool(served))
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert [type(outcome) for outcome in failed] == [Error] * 3
    served[0].close()
    held.close()


# -- order and life ------------------------------------------------------------------------------


def test_a_lane_with_nothing_gets_the_place_of_a_busy_one_when_it_has_waited_longest():
    machine = Machine(PoolConfig(max_size=1), 0.0, lambda: 0.5, lanes=2)
    busy, poor = machine.lanes
    slot = machine._open(busy, 0.0, "fill")
    machine.starting(slot, 0.0)
    machine.connected(slot, 0.0)
    assert isinstance(machine.checkout(0.0, 0.0, "busy", busy), Slot)
    first = machine.checkout(1.0, 1.0, "poor", poor)
    machine.checkout(2.0, 2.0, "busy", busy)
    machine.take_decisions()
    machine.checkin(slot, 3.0)
    (decision,) = machine.take_decisions()
    assert isinstance(decision, Close)
    assert (slot.reason, list(poor.queue)) == ("loop", [first])


@pytest.mark.parametrize("settings", [{"recycle": 0}, {"max_lifetime": 0}, {"recycle": 0.0001}])
def test_a_lifetime_of_nothing_is_one_use(
    make_pool: MakePool, database: Database, settings: dict[str, float]
):
    pool = make_pool(max_size=1, **settings)
    for _ in range(3):
        pool.connect().close()
    assert len(database.connections) <= 8


# -- the end -------------------------------------------------------------------------------------


def test_wait_ready_says_at_once_that_the_pool_is_closed(make_pool: MakePool):
    pool = make_pool(min_size=1)
    pool.close()
    with pytest.raises(PoolClosed):
        pool.wait_ready(PATIENCE_SECONDS)


def test_wait_ready_says_that_the_pool_is_paused(make_pool: MakePool):
    pool = make_pool(min_size=1)
    pool.pause()
    with pytest.raises(PoolTimeout, match=r"paused: call pool\.resume"):
        pool.wait_ready(0.02)
    pool.resume()


def test_a_timeout_says_that_the_pool_is_paused(make_pool: MakePool):
    pool = make_pool(timeout=0.02)
    pool.pause()
    with pytest.raises(PoolTimeout, match=r"the pool is paused, .*\n.*call pool.resume"):
        pool.connect()
    pool.resume()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_closed_pool_stays_closed_in_a_forked_child(make_pool: MakePool):
    pool = make_pool()
    pool.close()
    child = os.fork()
    if not child:
        try:
            pool.connect()
        except PoolClosed:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"pool_size": float("inf")},
        {"max_overflow": float("inf")},
        {"max_size": float("nan")},
        {"pool_name": 5},
    ],
    ids=str,
)
def test_what_is_no_number_or_name_is_refused_in_a_sentence(
    make_pool: MakePool, settings: dict[str, Any]
):
    (name,) = settings
    with pytest.raises(exc.ArgumentError, match=name):
        make_pool(**settings)


def test_two_names_of_one_lifetime_may_agree_as_strings():
    same = PoolConfig.from_arguments({"max_lifetime": "60", "recycle": "60"})
    none = PoolConfig.from_arguments({"max_lifetime": "none", "recycle": -1})
    assert (same.max_lifetime, none.max_lifetime) == (60.0, None)


def test_a_smaller_limit_shows_in_what_queue_pool_would_say(make_pool: MakePool):
    pool = make_pool(pool_size=5, max_overflow=0)
    pool.resize(max_size=4)
    assert (pool.size(), pool._max_overflow) == (4, 0)


def test_a_pool_may_be_the_first_thing_that_a_thread_calls(make_pool: MakePool):
    import _thread

    pool = make_pool()
    _thread.start_new_thread(lambda connect: connect().close(), (pool.connect,))
    until(lambda: pool.snapshot().checkins == 1)


def test_one_label_serves_several_threads_and_itself_at_a_time():
    label = held_by("report")
    seen = []

    def use() -> None:
        with label:
            seen.append(current_label.get())

    with label, label:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert current_label.get() == "report"
    assert (current_label.get(), seen) == (None, ["report"])


def test_a_label_may_end_in_another_context_than_it_began():
    block = held_by("request")
    contextvars.copy_context().run(block.__enter__)
    with held_by("own"):
        contextvars.copy_context().run(block.__exit__, None, None, None)
        block.__exit__(None, None, None)
        assert current_label.get() == "own"
    assert current_label.get() is None


def test_labels_may_end_in_the_order_in_which_they_began():
    first, second = held_by("first"), held_by("second")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert current_label.get() == "second"
    second.__exit__(None, None, None)
    assert current_label.get() is None


def test_a_label_can_be_printed():
    with held_by("report \udc80 é"):
        assert current_label.get() == "report ? é"


def test_an_upkeep_whose_start_was_interrupted_is_one_thread_all_the_same(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
):
    start = _sync.start_thread

    def start_and_interrupt(work: Callable[[], None], name: str) -> None:
        start(work, name)
        monkeypatch.undo()
        raise KeyboardInterrupt

    def threads() -> int:
        names = [thread.name for thread in threading.enumerate()]
        return names.count(f"poolkit upkeep {pool._driver.config.name}")

    pool = make_pool(max_size=1, hold_warning=0.2)
    upkeep = pool._driver._upkeep
    monkeypatch.setattr(_sync, "start_thread", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        upkeep.wake()
    upkeep.wake()
    pool.connect().close()
    until(lambda: threads() == 1)
    upkeep.wake()
    assert threads() == 1


# -- secrets -------------------------------------------------------------------------------------


def test_the_key_of_an_encrypted_file_is_no_part_of_the_name():
    engine = sa.create_engine("sqlite:///file:app.db?hexkey=c0ffee&uri=true", poolclass=NullPool)
    assert _sqlalchemy.database_name(engine.pool) == "app.db"


@pytest.mark.extra
@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("postgresql+psycopg2://shop:pa@ss-W0RD@db.example/shop", "db.example/shop"),
        ("postgresql+psycopg2:///postgresql://shop:secret@db.example/shop", "db.example/shop"),
        ("postgresql+psycopg2:///host=db.example password=secret", "postgresql+psycopg2"),
    ],
)
def test_a_password_in_the_wrong_place_is_no_part_of_the_name(url: str, name: str):
    engine = sa.create_engine(url, poolclass=NullPool)
    assert _sqlalchemy.database_name(engine.pool) == name
    words = " ".join(_sqlalchemy.public_words(engine.pool))
    assert "W0RD" not in words
    assert "secret" not in words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('host name "ab"s3cret@host" is unknown', 'host name "..." is unknown'),
        (
            "Can't connect to server on 's3cret@host' (111)",
            "Can't connect to server on '...' (111)",
        ),
        ('role "s3cret', 'role "..."'),
        ("server on 'db.example' is gone", "server on 'db.example' is gone"),
    ],
)
def test_what_an_error_quotes_is_left_out_whole(text: str, shown: str):
    assert describe_error(OSError(text), {"db.example"}) == f"OSError: {shown}"


def test_the_sentence_of_an_error_of_mysqls_is_shown():
    error = OSError(2003, "Can't connect to MySQL server on 'db.example' (timed out)")
    mysql = type("OperationalError", (Exception,), {})(*error.args)
    assert describe_error(mysql, {"db.example"}) == (
        "OperationalError: Can't connect to MySQL server on 'db.example' (timed out) (2003)"
    )


def test_what_the_application_says_of_a_connect_is_not_shown(tmp_path: Path):
    def fetch() -> str:
        raise LookupError("vault answered 403 for token hvs.t0ken")

    engine = sa.create_engine(
        f"sqlite:///{tmp_path}/app.db", poolclass=ManagedPool, credentials=fetch, pool_timeout=1
    )
    with pytest.raises(LookupError, match=r"hvs\.t0ken"):  # its own caller may know
        engine.connect()
    (failed,) = [e for e in recent_events(engine) if e.name == "connect_failed"]
    assert failed.error.startswith("LookupError (raised by the application")
    engine.pool.close()


def test_an_error_is_shown_without_what_it_quotes():
    error = ValueError('invalid integer value "se:cr" for connection option "port"')
    assert describe_error(error, {"db.example"}) == (
        'ValueError: invalid integer value "..." for connection option "..."'
    )


def test_an_error_is_shown_with_the_address_it_quotes():
    error = ValueError('connection to server at "db.example" failed')
    assert describe_error(error, {"db.example"}).endswith('at "db.example" failed')


# -- event loops ---------------------------------------------------------------------------------


@pytest.mark.extra
def test_a_loop_that_ends_with_a_holder_leaves_nothing_behind(database: Database):
    pool = AsyncManagedPool(database.connect, max_size=2, min_size=1)
    kept: list[Any] = []

    async def hold() -> None:
        kept.append(await greenlet_spawn(pool.connect))

    async def use() -> None:
        connection = await greenlet_spawn(pool.connect)
        await greenlet_spawn(connection.close)

    asyncio.run(hold())
    asyncio.run(use())
    reading = pool.snapshot()
    assert (reading.connecting, reading.forgotten >= 1) == (0, True)
    assert {slot.lane for slot in pool._driver.machine.slots} <= set(pool._driver.machine.lanes)
    asyncio.run(pool.close())


def test_a_stopped_loop_does_not_keep_another_from_the_place(postgres: PostgresServer):
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(
        postgres.url("asyncpg"),
        poolclass=AsyncManagedPool,
        max_size=1,
        max_uses=1,
        pool_timeout=5.0,
    )

    async def use() -> None:
        async with engine.connect() as connection:
            await connection.execute(sa.text("SELECT 1"))

    one, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        for loop in (one, other, one, other):
            loop.run_until_complete(use())
        other.run_until_complete(engine.pool.close())
    finally:
        for loop in (one, other):
            loop.run_until_complete(asyncio.sleep(0.05))
            loop.close()
    assert engine.pool.snapshot().open == 0
    gc.collect()


def test_a_ping_that_stops_with_its_loop_is_nobodys_connection(postgres: PostgresServer):
    from sqlalchemy.ext.asyncio import create_async_engine

    with FaultProxy("127.0.0.1", postgres.port) as proxy:
        engine = create_async_engine(
            postgres.url("asyncpg", proxy), poolclass=AsyncManagedPool, max_size=2, keepalive=0.1
        )

        async def use() -> int:
            async with engine.connect() as connection:
                return (await connection.execute(sa.text("SELECT 1"))).scalar()

        one, other = asyncio.new_event_loop(), asyncio.new_event_loop()
        try:
            one.run_until_complete(use())
            proxy.delay(0.3)
            while not engine.pool.snapshot().checking:
                one.run_until_complete(asyncio.sleep(0.01))
            proxy.heal()
            assert [loop.run_until_complete(use()) for loop in (other, one, other)] == [1] * 3
            reading = engine.pool.snapshot()
            other.run_until_complete(engine.pool.close())
        finally:
            for loop in (one, other):
                loop.run_until_complete(asyncio.sleep(0.4))
                loop.close()
    # whether it is given up depends on whether the upkeep looks while its loop is stopped
    assert (reading.forgotten <= 1, reading.checkouts) == (True, 4)
    assert engine.pool.snapshot().open == 0


@pytest.mark.extra
def test_a_close_that_the_end_of_its_loop_cancels_is_no_error(caplog: pytest.LogCaptureFixture):
    from sqlalchemy.util import await_only

    class Connection:
        def rollback(self) -> None:
            pass

        def close(self) -> None:
            await_only(asyncio.sleep(PATIENCE_SECONDS))

    pool = AsyncManagedPool(Connection, max_size=1)

    async def main() -> None:
        connection = await greenlet_spawn(pool.connect)
        await greenlet_spawn(connection.close)
        pool.retire_all()
        await asyncio.sleep(0.02)

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert caplog.text == ""
    assert pool.snapshot().open == 0


def test_the_auditor_leaves_what_a_slow_dispose_has_yet_to_close():
    at_a_time = []

    def act(site: str) -> None:
        if site == "close":
            at_a_time.append(database.busy["close"])
            time.sleep(0.8)

    database = Database(act)
    pool = ManagedPool(database.connect, max_size=5, dialect=StubDialect.of(database))
    held = [pool.connect() for _ in range(5)]
    for proxy in held:
        proxy.close()
    pool.dispose()  # four seconds, one after the other: four rounds of the auditor
    assert at_a_time == [1] * 5
    assert (database.sockets, pool.snapshot().closes) == (0, {"disposed": 5})
    pool.close()
