"""A monitor's gauges are true after an outage, on real servers, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, StaticPool

from sqla_poolkit import held_by, monitor, snapshot
from tests.servers import PostgresServer
from tests.waiting import until

ASK = sa.text("SELECT 1")


def gauges(engine: Any) -> tuple[int, int, int]:
    reading = snapshot(engine)
    gone = sum(reading.closes.values()) + reading.detached + reading.forgotten
    assert reading.connects - gone == reading.open + reading.closing
    assert reading.checkouts == sum(row.checkouts for row in reading.labels.values())
    return reading.open, reading.idle, reading.checked_out


def warm(engine: sa.Engine) -> None:
    for connection in [engine.connect() for _ in range(3)]:
        connection.execute(ASK)
        connection.close()


@pytest.mark.parametrize("poolclass", [None, NullPool])
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_gauges_are_true_after_an_outage(driver: str, poolclass: Any, own_server: PostgresServer):
    engine = sa.create_engine(own_server.url(driver), poolclass=poolclass, pool_pre_ping=True)
    watching = monitor(engine)
    idle = 0 if poolclass is NullPool else 3
    warm(engine)
    assert gauges(engine) == (idle, idle, 0)
    own_server.stop("immediate")
    for _ in range(20):
        with pytest.raises(sa.exc.OperationalError):
            engine.connect()
    assert gauges(engine)[2] == 0
    own_server.start()
    warm(engine)
    assert gauges(engine) == (idle, idle, 0)
    reading = watching.snapshot()
    assert (reading.connect_failures, reading.checkouts, reading.checkins) == (20, 6, 6)
    until(lambda: own_server.sessions() == idle, "the server does not end them")
    engine.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg_async"])
def test_gauges_are_true_after_an_outage_of_asyncio(driver: str, own_server: PostgresServer):
    async def run() -> None:
        engine = create_async_engine(own_server.url(driver), pool_pre_ping=True)
        watching = monitor(engine)
        assert watching is monitor(engine.sync_engine)
        await warm_async(engine)
        assert gauges(engine) == (3, 3, 0)
        own_server.stop("immediate")
        for _ in range(20):
            with pytest.raises((sa.exc.DBAPIError, OSError)):
                await engine.connect()
        assert gauges(engine)[2] == 0
        own_server.start()
        await warm_async(engine)
        assert gauges(engine) == (3, 3, 0)
        gc.collect()
        reading = watching.snapshot()
        assert (reading.connect_failures, reading.checkouts, reading.checkins) == (20, 6, 6)
        assert own_server.sessions() == 3
        await engine.dispose()

    asyncio.run(run())


async def warm_async(engine: AsyncEngine) -> None:
    held = [await engine.connect() for _ in range(3)]
    for connection in held:
        await connection.execute(ASK)
        await connection.close()


@pytest.mark.parametrize("poolclass", [AsyncAdaptedQueuePool, NullPool, StaticPool])
def test_every_pool_of_asyncio_is_watched(poolclass: Any, postgres: PostgresServer):
    async def run() -> None:
        engine = create_async_engine(postgres.url("asyncpg"), poolclass=poolclass)
        early = await engine.connect()
        monitor(engine)
        assert gauges(engine) == (1, 0, 1)
        await early.close()
        with held_by("GET /users"):
            async with engine.connect() as connection:
                await connection.execute(ASK)
                (slot,) = snapshot(engine).slots
                assert (slot.label, slot.state) == ("GET /users", "checked_out")
                assert slot.caller is not None
                assert "test_monitor_servers.py" in slot.caller
                assert gauges(engine) == (1, 0, 1)
        idle = 0 if poolclass is NullPool else 1
        assert gauges(engine) == (idle, idle, 0)
        await engine.dispose()
        assert gauges(engine) == (0, 0, 0)

    asyncio.run(run())


def test_what_the_collector_takes_from_a_dropped_task_is_a_leak(postgres: PostgresServer):
    async def run() -> None:
        engine = create_async_engine(postgres.url("asyncpg"))
        monitor(engine)
        held = [await engine.connect()]
        assert gauges(engine) == (1, 0, 1)
        with pytest.warns(sa.exc.SAWarning, match="garbage collector"):
            held.clear()
        assert gauges(engine) == (0, 0, 0)
        assert (snapshot(engine).closes, snapshot(engine).detached) == ({"leaked": 1}, 0)
        await engine.dispose()

    asyncio.run(run())


def test_a_cancelled_checkout_leaves_nothing(postgres: PostgresServer):
    async def run() -> None:
        engine = create_async_engine(postgres.url("asyncpg"), pool_size=1, max_overflow=0)
        monitor(engine)
        async with engine.connect():
            task = asyncio.create_task(warm_async(engine))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert gauges(engine) == (1, 1, 0)
        await engine.dispose()

    asyncio.run(run())
