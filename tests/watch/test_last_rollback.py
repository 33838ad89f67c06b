"""The ROLLBACK that ends the use of a connection is limited in time, the application's own is not.

On a server that is frozen: it takes what it is sent, and says nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqla_poolkit import AsyncManagedPool, ManagedPool, monitor, snapshot
from sqla_poolkit.testing import FaultProxy
from tests.servers import MariaDBServer, PostgresServer
from tests.waiting import until

PING_TIMEOUT = 0.3
LATE_SECONDS = 0.05
PATIENCE_SECONDS = 10.0
ASK = sa.text("SELECT 1")


class Failed(Exception):
    """An error of the application's."""


@pytest.fixture
def engine_of(own_server: PostgresServer) -> Iterator[Callable[..., sa.Engine]]:
    engines = []

    def make(driver: str, through: Any = None, ping_timeout: float = PING_TIMEOUT) -> sa.Engine:
        engines.append(
            sa.create_engine(
                own_server.url(driver, through),
                poolclass=ManagedPool,
                max_size=1,
                ping_timeout=ping_timeout,
            )
        )
        return engines[-1]

    yield make
    own_server.thaw()
    for engine in engines:
        engine.pool.close(timeout=1.0)


def seconds_since(begin: float) -> float:
    return time.monotonic() - begin


def is_free_again(engine: Any) -> bool:
    reading = snapshot(engine)
    return (reading.open, reading.closing, reading.closes) == (0, 0, {"reset": 1})


@pytest.mark.parametrize("is_monitored", [True, False])
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_close_returns_in_time_and_the_place_is_free(
    driver: str, is_monitored: bool, own_server: PostgresServer, engine_of: Any
):
    engine = engine_of(driver)
    if is_monitored:
        monitor(engine)
    connection = engine.connect()
    connection.execute(ASK)
    own_server.freeze()
    begin = time.monotonic()
    connection.close()
    assert PING_TIMEOUT <= seconds_since(begin) + 0.01 <= PING_TIMEOUT + LATE_SECONDS
    until(lambda: is_free_again(engine))
    assert (snapshot(engine).reset_failures, snapshot(engine).checked_out) == (1, 0)
    own_server.thaw()
    with engine.connect() as again:
        assert again.execute(ASK).scalar() == 1


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg_async"])
@pytest.mark.parametrize("way", ["connection", "session"])
def test_an_asyncio_close_returns_in_time_and_the_place_is_free(
    way: str, driver: str, own_server: PostgresServer
):
    async def run() -> None:
        engine = create_async_engine(
            own_server.url(driver),
            poolclass=AsyncManagedPool,
            max_size=1,
            ping_timeout=PING_TIMEOUT,
        )
        held: Any = engine.connect() if way == "connection" else AsyncSession(engine)
        if way == "connection":
            await held.start()
        await held.execute(ASK)
        own_server.freeze()
        begin = time.monotonic()
        await held.close()
        assert PING_TIMEOUT <= seconds_since(begin) + 0.01 <= PING_TIMEOUT + LATE_SECONDS
        own_server.thaw()
        while not is_free_again(engine):
            assert seconds_since(begin) < PATIENCE_SECONDS
            await asyncio.sleep(0.01)
        assert snapshot(engine).reset_failures == 1
        async with engine.connect() as again:
            assert (await again.execute(ASK)).scalar() == 1
        await engine.pool.close()

    asyncio.run(run())


def end_a_session(engine: sa.Engine, freeze: Callable[[], None]) -> float:
    with Session(engine) as session:
        session.execute(ASK)
        freeze()
        begin = time.monotonic()
    return seconds_since(begin)


def fail() -> None:
    raise Failed


def fail_in_begin(engine: sa.Engine, freeze: Callable[[], None]) -> float:
    begin = 0.0
    try:
        with engine.begin() as connection:
            connection.execute(ASK)
            freeze()
            begin = time.monotonic()
            fail()
    except Failed:
        return seconds_since(begin)


@pytest.mark.parametrize("end", [end_a_session, fail_in_begin])
def test_other_ends_of_a_use_are_limited_too(end: Any, own_server: Any, engine_of: Any):
    engine = engine_of("psycopg2")
    seconds = end(engine, own_server.freeze)
    assert seconds <= PING_TIMEOUT + LATE_SECONDS
    until(lambda: is_free_again(engine))
    assert snapshot(engine).reset_failures == 1


@pytest.mark.parametrize("driver", ["pymysql", "psycopg2"])
def test_a_network_that_says_nothing_is_as_good_as_a_frozen_server(
    driver: str, postgres: PostgresServer, mariadb: MariaDBServer
):
    server = mariadb if driver == "pymysql" else postgres
    with FaultProxy("127.0.0.1", server.port) as proxy:
        engine = sa.create_engine(
            server.url(driver, proxy), poolclass=ManagedPool, ping_timeout=PING_TIMEOUT
        )
        connection = engine.connect()
        connection.execute(ASK)
        proxy.black_hole()
        begin = time.monotonic()
        connection.close()
        assert seconds_since(begin) <= PING_TIMEOUT + LATE_SECONDS
        until(lambda: is_free_again(engine))
        proxy.heal()
        with engine.connect() as again:
            assert again.execute(ASK).scalar() == 1
        engine.pool.close(timeout=1.0)


def roll_back_a_connection(engine: sa.Engine, slow: Callable[[], None]) -> None:
    with engine.connect() as connection:
        connection.execute(ASK)
        slow()
        connection.rollback()
        assert connection.execute(ASK).scalar() == 1
        connection.commit()


def roll_back_a_session(engine: sa.Engine, slow: Callable[[], None]) -> None:
    with Session(engine) as session:
        session.execute(ASK)
        slow()
        session.rollback()
        assert session.execute(ASK).scalar() == 1
        session.commit()


def close_a_session_on_a_connection(engine: sa.Engine, slow: Callable[[], None]) -> None:
    with engine.connect() as connection:
        session = Session(connection, join_transaction_mode="rollback_only")
        session.execute(ASK)
        slow()
        session.close()
        assert connection.execute(ASK).scalar() == 1
        connection.commit()


@pytest.mark.parametrize(
    "roll_back", [roll_back_a_connection, roll_back_a_session, close_a_session_on_a_connection]
)
def test_a_rollback_in_the_middle_takes_as_long_as_it_takes(
    roll_back: Any, own_server: PostgresServer, engine_of: Any
):
    with FaultProxy("127.0.0.1", own_server.port) as proxy:
        engine = engine_of("psycopg2", proxy, ping_timeout=0.1)
        engine.connect().close()
        roll_back(engine, lambda: proxy.delay(0.2))
        proxy.heal()
        assert snapshot(engine).reset_failures == 0


def test_an_open_copy_of_psycopg_does_not_hang_close(engine_of: Any):
    engine = engine_of("psycopg")
    connection = engine.connect()
    connection.execute(sa.text("CREATE TEMPORARY TABLE t (a int)"))
    copy = connection.connection.driver_connection.cursor().copy("COPY t FROM STDIN")
    copy.__enter__()
    begin = time.monotonic()
    connection.close()
    assert seconds_since(begin) < PING_TIMEOUT
    until(lambda: is_free_again(engine))
