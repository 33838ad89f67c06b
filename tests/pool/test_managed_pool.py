"""ManagedPool as a program sees it: through create_engine, with a stub driver and SQLite files."""

from __future__ import annotations

import gc
import json
import logging
import re
import sqlite3
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.dialects import registry
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from sqla_poolkit import (
    ManagedPool,
    PoolClosed,
    PoolOverloaded,
    PoolSnapshot,
    PoolTimeout,
    held_by,
    snapshot,
    watch,
)
from sqla_poolkit.errors import PoolMisuse
from sqla_poolkit.pool import _sync, managed
from sqla_poolkit.watch import recent_events
from tests.pool.callers import in_thread
from tests.pool.laws import assert_lawful
from tests.pool.stub import Database, Disconnected, Error, Interrupt, StubDialect
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("idle_threads_leave_soon")

PATIENCE = 10.0

registry.register("stub", "tests.pool.stub", "StubDialect")


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


class Pools:
    """Makes pools for one test, and closes them after it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.made: list[ManagedPool] = []

    def __call__(self, *, pings: bool = False, **settings: Any) -> ManagedPool:
        if pings:
            settings["dialect"] = StubDialect.of(self.database)
        pool = ManagedPool(self.database.connect, **settings)
        self.made.append(pool)
        return pool

    def engine(self, url: str = "stub://joe:canary@db.example:5433/shop", **kw: Any) -> sa.Engine:
        engine = sa.create_engine(url, poolclass=ManagedPool, module=self.database.module, **kw)
        self.made.append(engine.pool)
        return engine

    def steered(self, **settings: Any) -> tuple[ManagedPool, Clock]:
        """Return a pool without threads, and the clock that it goes by."""
        pool = self(upkeep="inline", **settings)
        clock = Clock()
        pool._driver.clock = clock
        return pool, clock

    def close(self) -> None:
        for pool in self.made:
            pool._driver.clock = time.monotonic
            pool.resume()
            # a holder that is left would never come back; a worker that closes soon has
            pool.close(timeout=0 if pool.checkedout() else PATIENCE)


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def pools(database: Database) -> Iterator[Pools]:
    pools = Pools(database)
    yield pools
    pools.close()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Callable[..., sa.Engine]]:
    """Makes engines on one SQLite file."""
    engines: list[sa.Engine] = []

    def make(**kw: Any) -> sa.Engine:
        engines.append(
            sa.create_engine(f"sqlite:///{tmp_path / 'shop.db'}", poolclass=ManagedPool, **kw)
        )
        return engines[-1]

    yield make
    for engine in engines:
        engine.pool.close(timeout=PATIENCE)


def waiter_at(pool: ManagedPool, waiting: int = 1) -> Future[Any]:
    """Start a caller, and return once it waits."""
    caller = in_thread(pool.connect)
    until(lambda: pool._driver.machine.waiting == waiting)
    return caller


def audit(pool: ManagedPool, clock: Clock) -> None:
    """Have the auditor look twice, a while apart."""
    for _ in range(2):
        clock.move(2)
        pool._driver.upkeep()


def gauges(pool: ManagedPool, *, was_shrunk: bool = False) -> tuple[int, int, int]:
    """Return how many connections are open, idle and checked out."""
    reading = pool.snapshot()
    assert_lawful(reading, was_shrunk=was_shrunk)
    return reading.open, reading.idle, reading.checked_out


def line_of(text: str) -> int:
    """Return the number of the only line of this file that ends in this remark."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# {text}")]
    return number


# -- settings ------------------------------------------------------------------------------------

SETTINGS = {
    "min_size": (2, "2"),
    "max_size": (7, "7"),
    "idle_timeout": (61.0, "61"),
    "max_lifetime": (62.0, "62"),
    "max_uses": (63, "63"),
    "connect_timeout": (4.0, "4"),
    "max_waiting": (64, "64"),
    "max_connecting": (2, "2"),
    "ping_after": (2.5, "2.5"),
    "upkeep": ("inline", "inline"),
    "track": ("stack", "stack"),
    "collect_leaks": (True, "true"),
    "pool_timeout": (3.0, "3"),
    "pool_use_lifo": (False, "false"),
    "pool_pre_ping": (False, "false"),
    "ping_timeout": (2.5, "2.5"),
    "keepalive": (30.0, "30"),
    "hold_warning": (5.0, "5"),
    "on_outage": ("wait", "wait"),
    "on_deadlock": ("raise", "raise"),
    "evict_on": (("08", "25006"), "08, 25006"),
    "session_reset": ("rollback", "rollback"),
}
FIELD_OF = {"pool_timeout": "timeout", "pool_use_lifo": "use_lifo", "pool_pre_ping": "pre_ping"}
EXPECTED = {FIELD_OF.get(name, name): value for name, (value, _) in SETTINGS.items()}


def arrived(pool: ManagedPool) -> dict[str, Any]:
    settings = pool.snapshot().settings
    return {name: settings[name] for name in EXPECTED}


def test_create_engine_passes_every_setting(pools: Pools) -> None:
    engine = pools.engine(**{name: value for name, (value, _) in SETTINGS.items()})
    assert arrived(engine.pool) == EXPECTED


def test_engine_from_config_passes_every_setting_as_a_string(tmp_path: Path) -> None:
    texts = {f"sqlalchemy.{name}": text for name, (_, text) in SETTINGS.items()}
    engine = sa.engine_from_config(
        {**texts, "sqlalchemy.url": f"sqlite:///{tmp_path / 'a.db'}"}, poolclass=ManagedPool
    )
    assert arrived(engine.pool) == EXPECTED


def test_every_setting_of_a_snapshot_is_one_that_these_tests_pass(pools: Pools) -> None:
    assert set(pools().snapshot().settings) - set(EXPECTED) == {"name", "pool_size"}


def test_queue_pool_arguments_make_the_limit(pools: Pools) -> None:
    engine = pools.engine(pool_size=3, max_overflow=4, pool_recycle=99)
    settings = engine.pool.snapshot().settings
    assert (settings["max_size"], settings["pool_size"], settings["max_lifetime"]) == (7, 3, 99)


@pytest.mark.parametrize("limits", [{"pool_size": 0}, {"max_overflow": -1}, {"max_size": None}])
def test_no_limit_is_said_in_three_ways(pools: Pools, limits: dict[str, Any]) -> None:
    reading = pools(**limits).snapshot()
    assert (reading.max_size, reading.is_unlimited) == (None, True)


def test_connections_are_checked_by_default_with_a_dialect_and_not_without(pools: Pools) -> None:
    of_engine = pools.engine().pool.snapshot().settings["pre_ping"]
    assert (of_engine, pools().snapshot().settings["pre_ping"]) == (True, False)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("min_size", -1),
        ("max_size", 0),
        ("max_size", "many"),
        ("pool_timeout", -1),
        ("idle_timeout", float("nan")),
        ("max_lifetime", True),
        ("max_uses", 0),
        ("connect_timeout", 0),
        ("max_waiting", 1.5),
        ("max_connecting", 0),
        ("ping_after", "soon"),
        ("upkeep", "fork"),
        ("track", "all"),
        ("pool_pre_ping", "maybe"),
        ("pool_recycle", -2),
        ("max_overflow", -2),
    ],
)
def test_a_bad_value_is_refused_by_name_and_value(pools: Pools, setting: str, value: Any) -> None:
    with pytest.raises(exc.ArgumentError, match=rf"{setting}={re.escape(repr(value))} is not"):
        pools.engine(**{setting: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"max_size": 3, "pool_size": 2},
        {"max_lifetime": 5, "pool_recycle": 6},
        {"min_size": 4, "max_size": 3},
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    pools: Pools, settings: dict[str, int]
) -> None:
    first, second = settings.items()
    with pytest.raises(exc.ArgumentError) as caught:
        pools.engine(**settings)
    assert f"{first[0]}={first[1]}" in str(caught.value)
    assert str(second[1]) in str(caught.value)


# -- what cannot work ----------------------------------------------------------------------------


@pytest.mark.extra
def test_an_asyncio_driver_is_refused_with_a_sentence() -> None:
    from sqlalchemy.ext.asyncio import create_async_engine

    with pytest.raises(exc.ArgumentError, match="serves threads, but the driver 'aiosqlite' is"):
        create_async_engine("sqlite+aiosqlite:///shop.db", poolclass=ManagedPool)


def test_any_dialect_for_asyncio_is_refused(database: Database) -> None:
    dialect = StubDialect.of(database)
    dialect.is_async = True
    with pytest.raises(exc.ArgumentError, match="'stub' is for asyncio"):
        ManagedPool(database.connect, dialect=dialect)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file::memory:?uri=true",
        "sqlite:///file:shop?mode=memory&cache=shared&uri=true",
    ],
)
def test_in_memory_sqlite_is_refused_and_the_right_class_named(url: str) -> None:
    with pytest.raises(exc.ArgumentError, match=r"in-memory SQLite .* poolclass=StaticPool"):
        sa.create_engine(url, poolclass=ManagedPool)


def test_sqlite_connections_tied_to_a_thread_are_refused(
    sqlite: Callable[..., sa.Engine],
) -> None:
    with pytest.raises(exc.ArgumentError, match="check_same_thread=True ties"):
        sqlite(connect_args={"check_same_thread": True})


def test_a_sqlite_connection_serves_several_threads(sqlite: Callable[..., sa.Engine]) -> None:
    engine = sqlite(max_size=1)

    def answer() -> int:
        with engine.connect() as connection:
            return connection.scalar(sa.text("SELECT 6 * 7"))

    assert [answer(), in_thread(answer).result(PATIENCE)] == [42, 42]
    assert engine.pool.snapshot().connects == 1


# -- names and words -----------------------------------------------------------------------------


def test_the_default_name_is_host_port_and_database(pools: Pools) -> None:
    engine = pools.engine("stub://joe:secret@names.example:5433/shop")
    assert engine.pool.snapshot().name == "names.example:5433/shop"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("stub://names.example/shop", "names.example/shop"),
        ("stub://names.example", "names.example"),
        ("stub:///shop", "shop"),
        ("stub://", "stub+stub"),
    ],
)
def test_the_default_name_is_as_much_as_the_url_says(pools: Pools, url: str, name: str) -> None:
    gc.collect()  # the pools of other tests have had that name
    assert pools.engine(url).pool.snapshot().name == name


def test_a_sqlite_pool_is_named_after_its_file(sqlite: Callable[..., sa.Engine]) -> None:
    gc.collect()  # the pools of other tests have had that name
    assert sqlite().pool.snapshot().name == "shop.db"


def test_the_second_pool_of_a_name_gets_a_number(pools: Pools) -> None:
    names = [pools(pool_name="orders").snapshot().name for _ in range(3)]
    assert names == ["orders", "orders#2", "orders#3"]


def test_a_closed_pool_leaves_its_name_to_the_next_one(pools: Pools) -> None:
    first = pools.engine(pool_name="ledger")
    assert pools.engine(pool_name="ledger").pool.snapshot().name == "ledger#2"
    first.pool.close()
    assert pools.engine(pool_name="ledger").pool.snapshot().name == "ledger"
    assert first.pool.snapshot().name == "ledger"
    assert recent_events(first) == ()


def test_a_name_is_free_again_once_its_pool_is_gone(database: Database) -> None:
    pool = ManagedPool(database.connect, pool_name="brief")
    del pool
    gc.collect()
    assert ManagedPool(database.connect, pool_name="brief").snapshot().name == "brief"


def test_repr_is_the_state(pools: Pools) -> None:
    pool = pools(pool_name="state", max_size=4)
    first, second = pool.connect(), pool.connect()
    first.close()
    assert repr(pool) == (
        "<ManagedPool 'state' 2 of 4 open: 1 idle, 1 checked out, 0 connecting, 0 waiting>"
    )
    second.close()


def test_repr_tells_the_phase(pools: Pools) -> None:
    pool = pools(pool_name="phases", max_size=None)
    pool.pause()
    paused = repr(pool)
    pool.close()
    assert paused.startswith("<ManagedPool 'phases' paused, 0 unlimited open")
    assert repr(pool).startswith("<ManagedPool 'phases' closed, 0 unlimited open")


def test_status_sizes_and_timeout_are_what_queue_pool_would_say(database: Database) -> None:
    """At each step of one and the same use."""

    def answers(pool: Any) -> list[tuple[Any, ...]]:
        seen = []

        def look() -> None:
            numbers = (pool.size(), pool.checkedin(), pool.checkedout(), pool.overflow())
            seen.append((*numbers, pool.timeout(), pool.status()))

        look()
        held = [pool.connect() for _ in range(3)]
        look()
        while held:
            held.pop().close()
            look()
        pool.dispose()
        return seen

    settings = {"pool_size": 3, "max_overflow": 2, "timeout": 5}
    pool = ManagedPool(database.connect, upkeep="inline", **settings)
    assert answers(pool) == answers(QueuePool(database.connect, **settings))


def test_overflow_counts_what_is_above_pool_size(pools: Pools) -> None:
    pool = pools(pool_size=1, max_overflow=2)
    held = [pool.connect() for _ in range(3)]
    assert (pool.size(), pool.checkedout(), pool.overflow()) == (1, 3, 2)
    assert [c.close() for c in held] == [None] * 3


# -- creators ------------------------------------------------------------------------------------


def test_a_creator_may_take_the_record_as_its_argument(database: Database) -> None:
    records = []

    def creator(record: Any) -> Any:
        records.append(record)
        return database.connect()

    pool = ManagedPool(creator, upkeep="inline")
    connection = pool.connect()
    assert records == [connection._connection_record]
    connection.close()
    pool.close()


@pytest.mark.parametrize("upkeep", ["thread", "inline"])
def test_a_creator_that_returns_none_is_told_so(upkeep: str) -> None:
    pool = ManagedPool(lambda: None, upkeep=upkeep, pool_name="void")
    with pytest.raises(PoolMisuse, match=r"the creator of pool 'void(#\d)?' returned None"):
        pool.connect()
    assert (gauges(pool), pool.snapshot().failed) == ((0, 0, 0), 1)
    pool.close()


def test_a_failed_connect_reaches_the_caller_as_the_drivers_error(
    pools: Pools, database: Database
) -> None:
    def refuse(site: str) -> None:
        if site == "connect":
            raise Error("no more room")

    database.act = refuse
    engine = pools.engine()
    with pytest.raises(exc.DBAPIError, match="no more room") as caught:
        engine.connect()
    assert isinstance(caught.value.orig, Error)
    assert (engine.pool.snapshot().failed, engine.pool.snapshot().connect_failures) == (1, 1)


# -- dispose, recreate, close --------------------------------------------------------------------


def test_a_successor_keeps_name_settings_and_totals(pools: Pools) -> None:
    pool = pools(pool_name="heir", max_size=3, timeout=7, track="label", max_uses=9)
    pool.connect().close()
    before = pool.snapshot()
    pool.dispose()
    after = pool.recreate().snapshot()
    assert (after.name, after.settings) == (before.name, before.settings)
    assert (after.checkouts, after.connects, after.closes) == (1, 1, {"disposed": 1})


def test_engine_dispose_keeps_the_totals(pools: Pools) -> None:
    engine = pools.engine()
    engine.connect().close()
    engine.dispose()
    engine.connect().close()
    assert (engine.pool.snapshot().checkouts, engine.pool.snapshot().connects) == (2, 2)


def test_a_pool_and_its_successors_share_one_limit(pools: Pools, database: Database) -> None:
    pool = pools(max_size=2, timeout=0)
    held = [pool.connect(), pool.connect()]
    successor = pool.recreate()
    for either in (pool, successor, successor.recreate()):
        with pytest.raises(PoolTimeout):
            either.connect()
    assert (database.most_sockets, gauges(successor)) == (2, (2, 0, 2))
    del held


def test_who_waits_when_the_pool_is_replaced_is_served_by_the_successor(
    pools: Pools, database: Database
) -> None:
    pool = pools(max_size=1)
    held = pool.connect()
    caller = waiter_at(pool)
    successor = pool.recreate()
    held.close()
    served = caller.result(PATIENCE)
    assert served.dbapi_connection is database.connections[1]
    served.close()
    assert gauges(successor) == (1, 1, 0)
    assert successor.snapshot().closes == {"disposed": 1}


def test_a_connection_that_comes_back_to_a_replaced_pool_is_closed(
    pools: Pools, database: Database
) -> None:
    pool = pools(upkeep="inline")
    held = pool.connect()
    successor = pool.recreate()
    held.close()
    assert gauges(successor) == (0, 0, 0)
    assert database.open == []


def test_a_replaced_pool_still_serves_but_keeps_nothing(pools: Pools, database: Database) -> None:
    pool = pools(upkeep="inline")
    successor = pool.recreate()
    pool.connect().close()
    assert (gauges(successor), database.open) == ((0, 0, 0), [])
    assert successor.snapshot().checkouts == 1


def test_dispose_alone_leaves_the_pool_working_and_pools_late_returns(
    pools: Pools, database: Database
) -> None:
    pool = pools(upkeep="inline")
    idle, late = pool.connect(), pool.connect()
    idle.close()
    pool.dispose()
    assert len(database.open) == 1
    late.close()
    assert gauges(pool) == (1, 1, 0)
    pool.connect().close()
    assert (pool.snapshot().connects, pool.snapshot().checkouts) == (2, 3)


def test_close_waits_for_the_holders(pools: Pools, database: Database) -> None:
    pool = pools()
    held = pool.connect()
    closer = in_thread(lambda: pool.close(timeout=PATIENCE))
    until(lambda: pool._driver.machine.is_closed)
    assert (closer.done(), len(database.open)) == (False, 1)
    held.close()
    closer.result(PATIENCE)
    assert (gauges(pool), database.open) == ((0, 0, 0), [])


def test_close_cuts_off_who_is_left(pools: Pools, database: Database) -> None:
    pool = pools(upkeep="inline")
    held = pool.connect()
    pool.close(timeout=0)
    assert database.open == []
    with pytest.raises(Disconnected):
        held.dbapi_connection.commit()
    held.invalidate()
    held.close()
    assert gauges(pool) == (0, 0, 0)


def test_close_fails_those_who_wait(pools: Pools) -> None:
    pool = pools(max_size=1, pool_name="shut")
    held = pool.connect()
    caller = waiter_at(pool)
    closer = in_thread(lambda: pool.close(timeout=PATIENCE))
    with pytest.raises(PoolClosed, match="pool 'shut' is closed"):
        caller.result(PATIENCE)
    held.close()
    closer.result(PATIENCE)
    assert (pool.snapshot().failed, pool.snapshot().waiting) == (1, 0)


def test_a_closed_pool_hands_nothing_out(pools: Pools) -> None:
    pool = pools()
    pool.connect().close()
    pool.close()
    with pytest.raises(PoolClosed, match="which is final"):
        pool.connect()
    assert_lawful(pool.snapshot())


def test_dispose_does_not_open_a_closed_pool_again(pools: Pools) -> None:
    engine = pools.engine()
    engine.pool.close()
    engine.dispose()
    with pytest.raises(PoolClosed):
        engine.connect()


# -- min_size, wait_ready ------------------------------------------------------------------------


@pytest.mark.parametrize("upkeep", ["thread", "inline"])
def test_wait_ready_opens_min_size_connections(pools: Pools, upkeep: str) -> None:
    pool = pools(min_size=3, upkeep=upkeep)
    assert gauges(pool) == (0, 0, 0)
    pool.wait_ready(PATIENCE)
    assert gauges(pool) == (3, 3, 0)


def test_wait_ready_gives_up_at_its_timeout_and_tells_why(pools: Pools, database: Database) -> None:
    def refuse(site: str) -> None:
        if site == "connect":
            raise Error("no more room")

    database.act = refuse
    pool = pools(min_size=2, pool_name="unready")
    with pytest.raises(PoolTimeout) as caught:
        pool.wait_ready(0.05)
    assert re.fullmatch(
        r"pool 'unready' is not ready after 0\.05 s: 0 of min_size=2 connections are open; "
        r"the last attempt ended in Error: no more room\. Check .*",
        caught.value.args[0],
    )
    assert caught.value.snapshot.open == 0


def test_wait_ready_succeeds_after_it_gave_up_once(pools: Pools, database: Database) -> None:
    gate = threading.Event()
    database.act = lambda site: site == "connect" and gate.wait(PATIENCE)
    pool = pools(min_size=2)
    with pytest.raises(PoolTimeout):
        pool.wait_ready(0.02)
    gate.set()
    pool.wait_ready(PATIENCE)
    assert gauges(pool) == (2, 2, 0)


def test_the_first_checkout_warms_the_pool(pools: Pools) -> None:
    pool = pools(min_size=3)
    pool.connect().close()
    until(lambda: pool.snapshot().open == 3)
    assert gauges(pool) == (3, 3, 0)


def test_min_size_outlives_the_idle_timeout(pools: Pools) -> None:
    pool, clock = pools.steered(min_size=2, idle_timeout=60)
    held = [pool.connect() for _ in range(4)]
    for connection in held:
        connection.close()
    clock.move(61)
    pool._driver.upkeep()
    assert gauges(pool) == (2, 2, 0)
    assert pool.snapshot().closes == {"idle": 2}


def test_min_size_is_filled_up_after_a_loss(pools: Pools) -> None:
    pool, _ = pools.steered(min_size=2)
    pool.wait_ready()
    lost = pool.connect()
    lost.invalidate()
    lost.close()
    pool._driver.upkeep()
    assert gauges(pool) == (2, 2, 0)
    assert pool.snapshot().connects == 3


# -- policies, by a clock that tests move --------------------------------------------------------


def test_an_idle_connection_is_closed_after_idle_timeout_and_not_before(pools: Pools) -> None:
    pool, clock = pools.steered(idle_timeout=60)
    pool.connect().close()
    clock.move(59)
    pool._driver.upkeep()
    assert gauges(pool) == (1, 1, 0)
    clock.move(2)
    pool._driver.upkeep()
    assert (gauges(pool), pool.snapshot().closes) == ((0, 0, 0), {"idle": 1})


def test_no_connection_older_than_max_lifetime_is_handed_out(
    pools: Pools, database: Database
) -> None:
    pool, clock = pools.steered(max_lifetime=100, idle_timeout=None)
    pool.connect().close()
    clock.move(101)
    younger = pool.connect()
    assert younger.dbapi_connection is not database.connections[0]
    younger.close()
    assert pool.snapshot().closes == {"age": 1}


def test_a_connection_is_replaced_between_three_quarters_and_all_of_its_lifetime(
    pools: Pools,
) -> None:
    pool, clock = pools.steered(max_lifetime=100, idle_timeout=None)
    pool.connect().close()
    clock.move(74)
    pool._driver.upkeep()
    assert pool.snapshot().connects == 1
    clock.move(26)
    pool._driver.upkeep()
    assert (pool.snapshot().connects, pool.snapshot().closes) == (2, {"age": 1})
    assert gauges(pool) == (1, 1, 0)


def test_a_connection_is_retired_after_max_uses(pools: Pools, database: Database) -> None:
    pool = pools(max_uses=2, upkeep="inline")
    used = []
    for _ in range(4):
        connection = pool.connect()
        used.append(connection.dbapi_connection.number)
        connection.close()
    assert used == [1, 1, 2, 2]
    assert gauges(pool) == (1, 1, 0)  # its replacement is open already
    assert pool.snapshot().closes == {"uses": 2}


def test_retire_all_replaces_idle_connections_now_and_others_on_return(
    pools: Pools, database: Database
) -> None:
    pool = pools(upkeep="inline")
    idle, held = pool.connect(), pool.connect()
    idle.close()
    pool.retire_all()
    assert [c.number for c in database.open] == [2]
    held.close()
    assert (gauges(pool), database.open) == ((0, 0, 0), [])
    assert pool.snapshot().closes == {"retired": 2}


def test_pause_lets_callers_queue_and_resume_serves_them(pools: Pools) -> None:
    pool = pools()
    pool.connect().close()
    pool.pause()
    caller = waiter_at(pool)
    assert gauges(pool) == (1, 1, 0)
    pool.resume()
    caller.result(PATIENCE).close()
    assert (pool.snapshot().waits, pool.snapshot().connects) == (2, 1)


def test_a_deadline_goes_on_during_a_pause(pools: Pools) -> None:
    pool = pools(timeout=0.02)
    pool.pause()
    with pytest.raises(PoolTimeout):
        pool.connect()


@pytest.mark.parametrize("upkeep", ["thread", "inline"])
def test_a_raised_limit_serves_who_waits(pools: Pools, upkeep: str) -> None:
    pool = pools(max_size=1, upkeep=upkeep)
    held = pool.connect()
    caller = waiter_at(pool)
    pool.resize(max_size=2)
    caller.result(PATIENCE).close()
    held.close()
    assert gauges(pool) == (2, 2, 0)


def test_a_lowered_limit_closes_idle_connections_first(pools: Pools, database: Database) -> None:
    pool = pools(max_size=3, upkeep="inline")
    held = [pool.connect() for _ in range(3)]
    held.pop().close()
    pool.resize(max_size=1)
    assert [c.number for c in database.open] == [1, 2]
    held.pop().close()
    assert gauges(pool, was_shrunk=True) == (1, 0, 1)
    held.pop().close()
    assert gauges(pool) == (1, 1, 0)
    assert [c.number for c in database.open] == [1]
    assert pool.snapshot().closes == {"resize": 2}


def test_a_resize_that_cannot_be_changes_nothing(pools: Pools) -> None:
    pool = pools(max_size=3)
    with pytest.raises(exc.ArgumentError, match="min_size=4 is more than the limit of 3"):
        pool.resize(min_size=4)
    assert (pool.snapshot().min_size, pool.snapshot().max_size) == (0, 3)


# -- the way back --------------------------------------------------------------------------------


def test_a_second_checkin_is_refused_and_the_books_stay_right(pools: Pools) -> None:
    pool = pools(pool_name="twice")
    connection = pool.connect()
    record = connection._connection_record
    connection.close()
    assert gauges(pool) == (1, 1, 0)
    with pytest.raises(PoolMisuse, match="of pool 'twice' was checked in twice"):
        pool._return_conn(record)
    assert gauges(pool) == (1, 1, 0)


def test_two_checkins_before_anyone_looks_are_one(pools: Pools) -> None:
    pool = pools()
    connection = pool.connect()
    record = connection._connection_record
    connection.close()
    pool._return_conn(record)
    first, second = pool.connect(), pool.connect()
    assert first.dbapi_connection is not second.dbapi_connection
    assert gauges(pool) == (2, 0, 2)
    first.close()
    second.close()


def test_a_connection_that_was_dropped_unclosed_comes_back(pools: Pools) -> None:
    pool = pools(max_size=1, timeout=0)
    pool.connect()  # and dropped
    gc.collect()
    pool.connect().close()
    assert (gauges(pool), pool.snapshot().connects) == ((1, 1, 0), 1)


@pytest.mark.parametrize("listens", [False, True])
def test_a_connection_that_was_dropped_unclosed_is_told(pools: Pools, listens: bool) -> None:
    pool = pools(max_size=1, timeout=0)
    if listens:
        sa.event.listen(pool, "checkin", lambda *_: None)
    with held_by("careless"):
        pool.connect()  # and dropped
    gc.collect()
    with held_by("careful"):
        pool.connect().close()
        pool.connect().close()
    leaked = [event for event in recent_events(pool) if isinstance(event, watch.ConnectionLeaked)]
    assert [event.label for event in leaked] == ["careless"]
    assert pool.snapshot().closes == {}


def test_connections_for_one_use_cannot_be_kept_open(pools: Pools) -> None:
    with pytest.raises(exc.ArgumentError, match="min_size=1 cannot be kept open"):
        pools(max_lifetime=0, min_size=1)


@pytest.mark.parametrize("over", [-1.0, float("nan"), float("inf")])
def test_connections_are_replaced_over_a_number_of_seconds(pools: Pools, over: float) -> None:
    with pytest.raises(exc.ArgumentError, match="over="):
        pools().retire_all(over=over)


def test_a_detached_connection_is_its_holders_own(pools: Pools, database: Database) -> None:
    pool = pools(max_size=1, timeout=0)
    connection = pool.connect()
    connection.detach()
    assert (gauges(pool), pool.snapshot().detached) == ((0, 0, 0), 1)
    assert len(database.open) == 1
    pool.connect().close()
    connection.close()
    assert [c.number for c in database.open] == [2]
    assert pool.snapshot().closes == {}


def test_a_hard_invalidation_closes_the_connection_at_once(
    pools: Pools, database: Database
) -> None:
    pool = pools()
    connection = pool.connect()
    connection.invalidate()
    assert database.open == []
    connection.close()
    assert gauges(pool) == (0, 0, 0)
    assert (pool.snapshot().invalidations, pool.snapshot().closes) == (1, {"invalidated": 1})


def test_a_soft_invalidation_closes_the_connection_on_its_return(
    pools: Pools, database: Database
) -> None:
    pool = pools(upkeep="inline")
    connection = pool.connect()
    connection.invalidate(soft=True)
    connection.dbapi_connection.commit()
    assert gauges(pool) == (1, 0, 1)
    connection.close()
    assert (gauges(pool), database.open) == ((0, 0, 0), [])
    assert (pool.snapshot().invalidations, pool.snapshot().closes) == (1, {"invalidated": 1})


def test_an_invalidated_connection_of_an_engine_connects_anew(pools: Pools) -> None:
    engine = pools.engine()
    with engine.connect() as connection:
        connection.invalidate()
        connection.rollback()
        connection.exec_driver_sql("SELECT 1")
        assert gauges(engine.pool) == (1, 0, 1)
    reading = engine.pool.snapshot()
    assert (reading.checkouts, reading.connects, reading.invalidations) == (2, 2, 1)
    assert reading.closes == {"invalidated": 1}


def test_a_disconnect_retires_all_connections_of_its_generation(
    pools: Pools, database: Database
) -> None:
    engine = pools.engine(upkeep="inline", pool_pre_ping=False)
    idle, held = engine.connect(), engine.connect()
    idle.close()
    held.connection.dbapi_connection.cursor = lambda: SimpleNamespace(
        execute=lambda *args: gone(), close=lambda: None
    )

    def gone() -> None:
        raise Disconnected("the server is gone")

    with pytest.raises(exc.DBAPIError, match="the server is gone"):
        held.exec_driver_sql("SELECT 1")
    held.close()
    assert (gauges(engine.pool), database.open) == ((0, 0, 0), [])
    assert engine.pool.snapshot().closes == {"generation": 2}


# -- listeners -----------------------------------------------------------------------------------


class Raiser:
    """A listener that raises as long as it has errors left, and hears in any case."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.heard = 0

    def __call__(self, *args: Any) -> None:
        self.heard += 1
        if self.errors:
            raise self.errors.pop(0)


@pytest.mark.parametrize("error", [RuntimeError, Interrupt])
def test_a_checkout_that_a_listener_refuses_has_failed_and_keeps_no_place(
    pools: Pools, error: type[BaseException]
) -> None:
    pool = pools(max_size=1, timeout=0)
    event.listen(pool, "checkout", Raiser(error("no")))
    with pytest.raises(error):
        pool.connect()
    reading = pool.snapshot()
    assert_lawful(reading)
    assert (reading.checkouts, reading.failed, reading.checked_out) == (0, 1, 0)
    pool.connect().close()
    assert (gauges(pool), pool.snapshot().checkouts) == ((1, 1, 0), 1)


def test_a_checkout_counts_as_asking_while_its_listeners_decide(pools: Pools) -> None:
    pool = pools()
    seen = []
    event.listen(pool, "checkout", lambda *_: seen.append(pool.snapshot()))
    pool.connect().close()
    (reading,) = seen
    assert_lawful(reading)
    assert (reading.requesting, reading.checkouts, reading.checked_out) == (1, 0, 1)
    assert (pool.snapshot().requesting, pool.snapshot().checkouts) == (0, 1)


@pytest.mark.parametrize("error", [RuntimeError, Interrupt])
def test_a_checkin_listener_that_raises_loses_nothing_after_two_audits(
    pools: Pools, error: type[BaseException]
) -> None:
    pool, clock = pools.steered(max_size=2, timeout=0)
    kept = pool.connect()
    event.listen(pool, "checkin", Raiser(error("no")))
    lost = pool.connect()
    with pytest.raises(error):
        lost.close()
    del lost
    audit(pool, clock)
    assert (gauges(pool), pool.snapshot().closes) == ((1, 0, 1), {"leaked": 1})
    pool.connect().close()
    kept.close()
    assert gauges(pool) == (2, 2, 0)


def test_the_auditor_takes_nothing_from_its_holder(pools: Pools) -> None:
    pool, clock = pools.steered()
    held = pool.connect()
    audit(pool, clock)
    audit(pool, clock)
    assert gauges(pool) == (1, 0, 1)
    held.close()
    assert (gauges(pool), pool.snapshot().closes) == ((1, 1, 0), {})


def test_a_disconnection_error_reconnects_in_place(pools: Pools, database: Database) -> None:
    pool = pools()
    event.listen(pool, "checkout", Raiser(exc.DisconnectionError("gone")))
    connection = pool.connect()
    assert [c.number for c in database.open] == [2]
    assert gauges(pool) == (1, 0, 1)
    connection.close()
    reading = pool.snapshot()
    assert (reading.checkouts, reading.failed, reading.connects) == (1, 0, 2)
    assert (reading.invalidations, reading.closes) == (1, {"invalidated": 1})


def test_an_invalidate_pool_error_retires_the_others_too(pools: Pools, database: Database) -> None:
    pool = pools(upkeep="inline")
    first, second = pool.connect(), pool.connect()
    first.close()
    second.close()
    event.listen(pool, "checkout", Raiser(exc.InvalidatePoolError("all gone")))
    connection = pool.connect()
    assert [c.number for c in database.open] == [3]
    connection.close()
    assert gauges(pool) == (1, 1, 0)


def test_a_listener_that_finds_every_connection_dead_fails_the_checkout(pools: Pools) -> None:
    pool = pools(max_size=1, timeout=0)
    event.listen(pool, "checkout", Raiser(*(exc.DisconnectionError("gone") for _ in range(2))))
    with pytest.raises(exc.InvalidRequestError):
        pool.connect()
    reading = pool.snapshot()
    assert_lawful(reading)
    assert (reading.checkouts, reading.failed, reading.open) == (0, 1, 0)
    pool.connect().close()


def test_a_connect_listener_that_raises_fails_the_checkout_and_keeps_no_place(
    pools: Pools, database: Database
) -> None:
    pool = pools(max_size=1, timeout=PATIENCE)
    event.listen(pool, "connect", Raiser(Error("bad setup")))
    with pytest.raises(Error, match="bad setup"):
        pool.connect()
    assert_lawful(pool.snapshot())
    pool.connect().close()
    assert (gauges(pool), pool.snapshot().failed) == ((1, 1, 0), 1)


def test_listeners_of_a_connect_do_not_see_the_callers_context(pools: Pools) -> None:
    variable: ContextVar[str] = ContextVar("request")
    engine = pools.engine()
    seen = {}
    event.listen(engine, "do_connect", lambda *_: seen.update(do=variable.get("empty")))
    event.listen(engine, "connect", lambda *_: seen.update(connect=variable.get("empty")))
    event.listen(engine, "first_connect", lambda *_: seen.update(first=variable.get("empty")))
    token = variable.set("GET /users")
    engine.connect().close()
    variable.reset(token)
    assert seen == {"do": "empty", "connect": "empty", "first": "empty"}


def test_listeners_of_a_pool_hear_its_successor(pools: Pools) -> None:
    engine = pools.engine()
    listener = Raiser()
    event.listen(engine.pool, "checkout", listener)
    engine.dispose()
    engine.connect().close()
    assert listener.heard == 1


# -- who holds -----------------------------------------------------------------------------------


def test_held_by_makes_a_row_per_label(pools: Pools) -> None:
    pool = pools(track="label")
    with held_by("GET /users"):
        pool.connect().close()
        pool.connect().close()
    with held_by("job"), held_by("job: mail"):
        pool.connect().close()
    pool.connect().close()
    labels = pool.snapshot().labels
    checkouts = {name: row.checkouts for name, row in labels.items() if row.checkouts}
    assert checkouts == {"GET /users": 2, "job: mail": 1, "(unlabelled)": 1}


def test_a_held_connection_shows_its_label(pools: Pools) -> None:
    pool = pools(track="label")
    with held_by("GET /users"):
        held = pool.connect()
    (slot,) = pool.snapshot().slots
    assert (slot.state, slot.label, slot.caller) == ("checked_out", "GET /users", None)
    assert slot.held_seconds is not None
    held.close()
    (slot,) = pool.snapshot().slots
    assert (slot.state, slot.label, slot.held_seconds) == ("idle", None, None)


def test_track_label_keeps_no_callers(pools: Pools) -> None:
    pool = pools(track="label")
    pool.connect().close()
    assert pool.snapshot().callers is None


def holder_of(pool: ManagedPool) -> str:
    (caller,) = [s.caller for s in pool.snapshot().slots if s.state == "checked_out"]
    return caller


def test_track_caller_names_the_line_that_asked(pools: Pools) -> None:
    pool = pools(track="caller")
    held = pool.connect()  # the line that asked
    function = "test_track_caller_names_the_line_that_asked"
    assert holder_of(pool) == f"{__file__}:{line_of('the line that asked')} {function}"
    held.close()


def test_track_caller_sees_through_engine_connect(pools: Pools) -> None:
    engine = pools.engine()
    with engine.connect():  # the line with connect
        assert f"{__file__}:{line_of('the line with connect')} " in holder_of(engine.pool)


def test_track_caller_sees_through_a_session(sqlite: Callable[..., sa.Engine]) -> None:
    engine = sqlite()
    with Session(engine) as session:
        session.execute(sa.text("SELECT 1"))  # the line with execute
        assert f"{__file__}:{line_of('the line with execute')} " in holder_of(engine.pool)


def test_track_caller_makes_a_row_per_place(pools: Pools) -> None:
    pool = pools()
    for _ in range(3):
        pool.connect().close()  # the busy line
    pool.connect().close()  # the quiet line
    callers = pool.snapshot().callers
    checkouts = {name.split()[0]: row.checkouts for name, row in callers.items() if row.checkouts}
    assert checkouts == {
        f"{__file__}:{line_of('the busy line')}": 3,
        f"{__file__}:{line_of('the quiet line')}": 1,
    }


def test_track_stack_names_the_callers_of_the_caller(pools: Pools) -> None:
    pool = pools(track="stack")

    def inner() -> Any:
        return pool.connect()  # the inner line

    held = inner()  # the outer line
    places = holder_of(pool).splitlines()
    assert places[0] == f"{__file__}:{line_of('the inner line')} inner"
    assert places[1].startswith(f"{__file__}:{line_of('the outer line')} test_track_stack")
    held.close()


# -- waiting, and giving up ----------------------------------------------------------------------


def test_waiters_are_served_first_come_first_served(pools: Pools) -> None:
    pool = pools(max_size=1)
    held = pool.connect()
    served = []

    def ask(number: int) -> None:
        connection = pool.connect()
        served.append(number)
        connection.close()

    callers = []
    for number in range(5):
        callers.append(in_thread(lambda number=number: ask(number)))
        until(lambda: pool._driver.machine.waiting == len(callers))
    held.close()
    for caller in callers:
        caller.result(PATIENCE)
    assert served == [0, 1, 2, 3, 4]


def test_a_newcomer_does_not_overtake_a_waiter(pools: Pools) -> None:
    pool = pools(max_size=1)
    held = pool.connect()
    caller = waiter_at(pool)
    held.close()
    newcomer = in_thread(pool.connect)
    first = caller.result(PATIENCE)
    until(lambda: pool.snapshot().waiting == 1)
    assert not newcomer.done()
    first.close()
    newcomer.result(PATIENCE).close()


def test_a_timeout_tells_state_holders_and_what_to_do(pools: Pools) -> None:
    pool = pools(max_size=2, timeout=0, pool_name="tight")
    with held_by("GET /users"):
        first = pool.connect()  # the first holder
    second = pool.connect()  # the second holder
    with pytest.raises(PoolTimeout) as caught:
        pool.connect()
    text = re.sub(r"0\.0\d s", "0.00 s", caught.value.args[0])  # a busy machine takes a moment
    state, holders, advice = text.splitlines()
    assert state == (
        "no connection from pool 'tight' within 0.00 s (pool_timeout=0.0): 2 checked out, 0 idle, "
        "0 connecting, 0 still waiting, max_size=2."
    )
    place = f"{__file__}:%d test_a_timeout_tells_state_holders_and_what_to_do"
    assert holders == (
        f"Held longest: GET /users ({place % line_of('the first holder')}) for 0.00 s; "
        f"{place % line_of('the second holder')} for 0.00 s."
    )
    assert re.fullmatch(r"What to do: 1\. .*; 2\. .*; 3\. .*\.", advice)
    first.close()
    second.close()


def test_a_timeout_while_nothing_is_open_tells_the_last_failure(
    pools: Pools, database: Database
) -> None:
    def refuse(site: str) -> None:
        if site == "connect":
            raise Error("no more room\nand a second line")

    database.act = refuse
    pool = pools(timeout=0.05)
    with pytest.raises(Error):
        pool.connect()
    database.act = lambda site: threading.Event().wait(0.2) if site == "connect" else None
    with pytest.raises(PoolTimeout) as caught:
        pool.connect()
    _, failure, advice = caught.value.args[0].splitlines()
    assert failure == "The last connection attempt that failed: Error: no more room."
    assert "see whether the database accepts connections" in advice


def test_a_timeout_is_sqlalchemys_and_carries_its_code_and_the_snapshot(pools: Pools) -> None:
    pool = pools(max_size=1, timeout=0.02)
    held = pool.connect()
    with pytest.raises(exc.TimeoutError) as caught:
        pool.connect()
    error = caught.value
    assert (type(error), error.code) == (PoolTimeout, "3o7r")
    assert isinstance(error.snapshot, PoolSnapshot)
    assert (error.snapshot.timeouts, error.snapshot.checked_out) == (1, 1)
    assert_lawful(error.snapshot)
    held.close()


def test_one_waiter_too_many_is_turned_away_at_once_with_the_gauges(pools: Pools) -> None:
    pool = pools(max_size=1, max_waiting=1, pool_name="busy")
    held = pool.connect()
    caller = waiter_at(pool)
    with pytest.raises(PoolOverloaded, match=r"1 waiting already \(max_waiting=1\)") as caught:
        pool.connect()
    assert caught.value.gauges == {
        "open": 1,
        "idle": 0,
        "checked_out": 1,
        "checking": 0,
        "connecting": 0,
        "closing": 0,
        "requesting": 1,
        "waiting": 1,
    }
    assert isinstance(caught.value, exc.TimeoutError)
    held.close()
    caller.result(PATIENCE).close()
    assert pool.snapshot().rejected == 1


def test_a_caller_with_timeout_zero_connects_by_itself(pools: Pools, database: Database) -> None:
    threads = []
    database.act = lambda site: threads.append(threading.current_thread())
    pool = pools(timeout=0)
    pool.connect().close()
    assert threads[0] is threading.current_thread()


def test_who_waits_is_charged_to_who_holds(pools: Pools) -> None:
    pool = pools(max_size=1, track="label")
    with held_by("slow"):
        held = pool.connect()
    with held_by("fast"):
        caller = waiter_at(pool)
    held.close()
    caller.result(PATIENCE).close()
    reading = pool.snapshot()
    assert_lawful(reading)
    waited = reading.wait_time.sum_seconds - reading.labels["(connecting)"].wait_caused_seconds
    assert reading.labels["slow"].wait_caused_seconds == pytest.approx(waited)


# -- liveness ------------------------------------------------------------------------------------


def test_a_dead_connection_is_replaced_without_the_caller_noticing(
    pools: Pools, database: Database
) -> None:
    pool = pools(pings=True, ping_after=0)
    pool.connect().close()
    database.connections[0].is_closed = True  # by the server
    connection = pool.connect()
    assert connection.dbapi_connection is database.connections[1]
    connection.close()
    reading = pool.snapshot()
    assert_lawful(reading)
    assert (reading.ping_failures, reading.closes, reading.failed) == (1, {"ping": 1}, 0)


def test_a_driver_without_a_probe_is_pinged_at_every_checkout(
    pools: Pools, database: Database
) -> None:
    pool = pools(pings=True)
    for _ in range(3):
        pool.connect().close()
    assert (database.visits["ping"], pool.snapshot().pings) == (2, 2)


def test_nothing_is_pinged_with_pool_pre_ping_off(pools: Pools, database: Database) -> None:
    engine = pools.engine(pool_pre_ping=False, ping_after=0)
    for _ in range(3):
        engine.connect().close()
    assert (database.visits["ping"], engine.pool.snapshot().pings) == (0, 0)


def test_after_a_sleep_of_the_machine_every_connection_is_pinged(
    pools: Pools, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, clock = pools.steered(dialect=StubDialect.of(database), keepalive=0, ping_after=60)
    monkeypatch.setattr(managed, "probe_for", lambda _: lambda: "alive")
    slept = [0.0]
    monkeypatch.setattr(_sync, "wall_clock", lambda: clock.now + slept[0])
    pool._driver.upkeep()  # from here on the two clocks agree
    for connection in [pool.connect() for _ in range(2)]:
        connection.close()
    for seconds, pings in ((0.0, 0), (0.9, 0), (600.0, 2), (600.0, 2)):
        slept[0] = seconds  # which only one of the clocks counts
        clock.move(2)
        pool._driver.upkeep()
        for connection in [pool.connect() for _ in range(2)]:
            connection.close()
        assert database.visits["ping"] == pings
    assert pool.snapshot().closes == {}


# -- the end of a pool ---------------------------------------------------------------------------


def test_a_dropped_pool_is_collected_and_its_threads_end(database: Database) -> None:
    before = set(threading.enumerate())
    pool = ManagedPool(database.connect, pool_name="dropped", min_size=2)
    pool.connect().close()
    pool.wait_ready(PATIENCE)
    assert set(threading.enumerate()) > before
    gone = [weakref.ref(pool), weakref.ref(pool._driver)]
    del pool

    def is_gone() -> bool:
        gc.collect()
        return not any(reference() for reference in gone)

    until(is_gone)
    until(lambda: set(threading.enumerate()) <= before)


# -- without threads -----------------------------------------------------------------------------


@pytest.fixture
def threads_started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    started: list[str] = []
    start = _sync.start_thread

    def note(work: Callable[[], None], name: str) -> threading.Thread:
        started.append(name)
        return start(work, name)

    monkeypatch.setattr(_sync, "start_thread", note)
    return started


def use_and_return(pool: ManagedPool) -> None:
    pool.connect().close()


def run_into_a_timeout(pool: ManagedPool) -> None:
    pool.resize(max_size=1)
    held = pool.connect()
    with pytest.raises(PoolTimeout):
        pool.connect()
    held.close()


def serve_a_waiter(pool: ManagedPool) -> None:
    pool.resize(max_size=1)
    held = pool.connect()
    caller = waiter_at(pool)
    held.close()
    caller.result(PATIENCE).close()


def warm_up(pool: ManagedPool) -> None:
    pool.resize(min_size=2)
    pool.wait_ready(PATIENCE)
    assert gauges(pool) == (2, 2, 0)


def shrink(pool: ManagedPool) -> None:
    held = [pool.connect(), pool.connect()]
    pool.resize(max_size=1)
    while held:
        held.pop().close()
    pool.connect().close()
    assert pool.snapshot().closes == {"resize": 1}


def lose_one(pool: ManagedPool) -> None:
    lost = pool.connect()
    lost.invalidate()
    lost.close()


def start_over(pool: ManagedPool) -> None:
    pool.connect().close()
    pool.dispose()
    pool.recreate().connect().close()


def pause_and_resume(pool: ManagedPool) -> None:
    pool.pause()
    caller = waiter_at(pool)
    pool.resume()
    caller.result(PATIENCE).close()


def end(pool: ManagedPool) -> None:
    pool.connect().close()
    pool.close()


@pytest.mark.parametrize(
    "use",
    [
        use_and_return,
        run_into_a_timeout,
        serve_a_waiter,
        warm_up,
        shrink,
        lose_one,
        start_over,
        pause_and_resume,
        end,
    ],
)
def test_inline_upkeep_works_without_a_thread(
    pools: Pools, threads_started: list[str], use: Callable[[ManagedPool], None]
) -> None:
    pool = pools(upkeep="inline", timeout=0.5 if use is run_into_a_timeout else PATIENCE)
    use(pool)
    reading = pool.snapshot()
    assert_lawful(reading)
    assert (threads_started, reading.checked_out, reading.waiting) == ([], 0, 0)


def test_a_pool_that_may_starts_threads_for_the_same(
    pools: Pools, threads_started: list[str]
) -> None:
    pools(pool_name="threaded").connect().close()
    assert "poolkit worker threaded" in threads_started


# -- secrets -------------------------------------------------------------------------------------


def test_no_password_shows_anywhere(
    pools: Pools, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    engine = pools.engine(max_size=1, pool_timeout=0, pool_name=None, echo_pool="debug")
    pool = engine.pool
    held = engine.connect()
    with pytest.raises(PoolTimeout) as caught:
        engine.connect()
    held.close()
    reading = snapshot(engine)
    texts = [
        repr(pool),
        pool.status(),
        str(caught.value),
        repr(reading),
        json.dumps(reading.to_dict()),
        caplog.text,
    ]
    assert [text for text in texts if "canary" in text or not text] == []


# -- all at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("upkeep", ["thread", "inline"])
def test_sixteen_threads_break_no_law_and_no_limit(
    pools: Pools, database: Database, upkeep: str
) -> None:
    pool = pools(max_size=4, upkeep=upkeep, max_uses=20, timeout=PATIENCE)
    barrier = threading.Barrier(17)

    def work(number: int) -> None:
        barrier.wait(PATIENCE)
        for turn in range(60):
            connection = pool.connect()
            if (turn + number) % 20 == 0:
                connection.invalidate()
            connection.close()

    workers = [in_thread(lambda number=number: work(number)) for number in range(16)]
    barrier.wait(PATIENCE)
    while not all(worker.done() for worker in workers):
        assert_lawful(pool.snapshot())
    outcomes = Counter(type(worker.exception()) for worker in workers)
    assert outcomes == {type(None): 16}
    reading = pool.snapshot()
    assert (reading.checkouts, reading.checkins, reading.checked_out) == (960, 960, 0)
    assert database.most_sockets <= 4
    pool.close(PATIENCE)
    assert database.sockets == 0


def test_a_sqlite_file_is_written_by_many_threads(sqlite: Callable[..., sa.Engine]) -> None:
    engine = sqlite(max_size=3, connect_args={"timeout": PATIENCE})
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE bought (number INTEGER)"))

    def buy(number: int) -> None:
        with engine.begin() as connection:
            connection.execute(sa.text("INSERT INTO bought VALUES (:n)"), {"n": number})

    workers = [in_thread(lambda number=number: buy(number)) for number in range(12)]
    for worker in workers:
        worker.result(PATIENCE)
    with engine.connect() as connection:
        numbers = connection.scalars(sa.text("SELECT number FROM bought ORDER BY number")).all()
        assert isinstance(connection.connection.dbapi_connection, sqlite3.Connection)
    assert numbers == list(range(12))
    assert_lawful(snapshot(engine))
