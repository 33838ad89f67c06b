"""Drivers, creators and listeners that do what they should not: a clear error, and nothing lost."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine.default import DefaultDialect

from sqla_poolkit import ManagedPool, PoolTimeout
from sqla_poolkit.errors import ArgumentError
from tests.pool.laws import assert_lawful
from tests.pool.stub import Connection, Database, Disconnected, Interrupt, StubDialect
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("idle_threads_leave_soon")

PATIENCE_SECONDS = 10.0


def pool_of(database: Database, **settings: Any) -> ManagedPool:
    return ManagedPool(database.connect, dialect=StubDialect.of(database), **settings)


def assert_whole(pool: ManagedPool, database: Database, size: int) -> None:
    """All places can be had, the books add up, and no socket is left at the end."""
    held = [pool.connect() for _ in range(size)]
    assert_lawful(pool.snapshot())
    for proxy in held:
        proxy.close()
    pool.close()
    assert database.sockets == 0


def test_pings_without_a_dialect_are_refused():
    with pytest.raises(ArgumentError, match="needs a dialect that can ping"):
        ManagedPool(Database().connect, pre_ping=True)


@pytest.mark.parametrize("setting", [{"credentials": dict}, {"session_reset": "clean"}])
def test_what_needs_an_engine_is_refused_without_one(setting):
    with pytest.raises(ArgumentError, match="need an engine"):
        ManagedPool(Database().connect, **setting)


def test_a_session_reset_for_another_database_is_refused():
    with pytest.raises(ArgumentError, match="is for PostgreSQL"):
        pool_of(Database(), session_reset="clean")


def test_a_session_reset_that_nobody_would_await_is_refused():
    async def reset(connection: Any) -> None: ...

    with pytest.raises(ArgumentError, match="must be a plain function"):
        pool_of(Database(), session_reset=reset)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("ping_timeout", 0),
        ("keepalive", -1),
        ("hold_warning", -1),
        ("on_outage", "hope"),
        ("on_deadlock", "ignore"),
        ("evict_on", "08, 5-7-1"),
        ("evict_on", 57),
        ("session_reset", "thoroughly"),
        ("writable", "perhaps"),
    ],
)
def test_a_value_that_cannot_be_is_named(setting, value):
    with pytest.raises(ArgumentError, match=setting):
        pool_of(Database(), **{setting: value})


def test_credentials_that_are_no_function_are_refused():
    with pytest.raises(ArgumentError, match="credentials= must be a function"):
        pool_of(Database(), credentials="secret")


def test_a_creator_that_hangs_holds_its_place_and_nobody_beyond_the_deadline():
    gate = threading.Event()
    database = Database(lambda site: gate.wait(PATIENCE_SECONDS) if site == "connect" else None)
    pool = pool_of(database, max_size=1, timeout=0.2, connect_timeout=0.1)
    begin = time.monotonic()
    with pytest.raises(PoolTimeout):
        pool.connect()
    assert time.monotonic() - begin == pytest.approx(0.2, abs=0.15)
    assert pool.snapshot().connecting == 1
    gate.set()
    assert_whole(pool, database, 1)


def test_a_creator_that_returns_dead_connections_is_asked_again():
    database = Database()
    alive = database.connect

    def connect() -> Connection:
        connection = alive()
        if len(database.connections) <= 2:
            connection.close()
        return connection

    pool = ManagedPool(connect, max_size=2, ping_after=0, dialect=StubDialect.of(database))
    first = [pool.connect() for _ in range(2)]  # a new connection is not pinged
    for proxy in first:
        proxy.close()
    with pool.connect() as proxy:
        assert not proxy.dbapi_connection.is_closed
    assert_whole(pool, database, 2)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, Interrupt])
def test_a_creator_that_ends_the_program_says_so_to_its_caller(error):
    database = Database()

    def fail(site: str) -> None:
        if site == "connect" and len(database.visits) == 1 and database.visits["connect"] == 1:
            raise error("now")

    database.act = fail
    pool = pool_of(database, max_size=2)
    with pytest.raises(error):
        pool.connect()
    assert_whole(pool, database, 2)


class NoPing(DefaultDialect):
    """A dialect whose driver cannot run even the smallest statement."""

    name = "noping"
    supports_statement_cache = True

    def do_ping(self, dbapi_connection: Any) -> bool:
        raise NotImplementedError("no ping here")


def test_a_dialect_that_cannot_ping_after_all_says_so_and_loses_nothing():
    database = Database()
    pool = ManagedPool(database.connect, max_size=1, dialect=NoPing(dbapi=database.module))
    pool.connect().close()
    with pytest.raises(NotImplementedError, match="no ping here"):
        pool.connect()
    pool.connect().close()  # a new connection needs none
    pool.close()
    assert database.sockets == 0


@pytest.mark.parametrize("error", [ValueError, Interrupt])
@pytest.mark.parametrize(
    "name",
    ["first_connect", "connect", "checkout", "reset", "checkin", "invalidate", "close"],
)
def test_a_listener_that_raises_loses_nothing(name, error, caplog):
    caplog.set_level("CRITICAL")
    database = Database()
    pool = pool_of(database, max_size=2)
    is_on = [True]

    def listener(*arguments: Any) -> None:
        if is_on[0]:
            raise error("listener")

    event.listen(pool, name, listener)
    for _ in range(6):
        try:
            proxy = pool.connect()
            if name in ("invalidate", "close"):
                proxy.invalidate()
            else:
                proxy.close()
        except (ValueError, Interrupt):
            pass
        proxy = None
    is_on[0] = False
    until(lambda: pool.snapshot().checked_out == 0)
    assert_whole(pool, database, 2)


def test_a_disconnect_that_the_driver_reports_in_the_reset_is_no_error():
    database = Database()
    pool = pool_of(database, max_size=1)
    proxy = pool.connect()

    def fail(site: str) -> None:
        if site == "reset":
            raise Disconnected("gone")

    database.act = fail
    proxy.close()
    database.act = lambda site: None
    assert pool.snapshot().reset_failures == 1
    assert_whole(pool, database, 1)
