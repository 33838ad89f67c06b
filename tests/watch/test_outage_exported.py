"""The database goes away and comes back; every gauge of both exporters returns to the truth."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import create_engine, exc, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sqla_poolkit import (
    AsyncManagedPool,
    AsyncMonitoredQueuePool,
    ManagedPool,
    MonitoredNullPool,
    MonitoredQueuePool,
)
from sqla_poolkit.watch.opentelemetry import export_pools
from sqla_poolkit.watch.prometheus import PoolCollector
from tests.servers import PostgresServer
from tests.waiting import PATIENCE_SECONDS, until
from tests.watch.exporting import collected, scrape

FAILURES = 20
# What a driver raises, as SQLAlchemy wraps it; asyncpg's refused connection it does not wrap.
LOST = (exc.DBAPIError, OSError)


class Exporters:
    """What both exporters say of one engine."""

    def __init__(self, engine: Any) -> None:
        self.prometheus = PoolCollector([engine], registry=None)
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader])
        self.opentelemetry = export_pools([engine], meter_provider=self.provider)
        self.has_idle = not isinstance(engine.pool, MonitoredNullPool)

    def gauges(self) -> dict[str, float]:
        """Return the gauges without those that tell of the past; both exporters agree on them."""
        (ours,) = scrape(self.prometheus).values()
        (theirs,) = collected(self.reader).values()
        gauges = {
            "used": "db.client.connection.count{db.client.connection.state=used}",
            "idle": "db.client.connection.count{db.client.connection.state=idle}",
            "pending": "db.client.connection.pending_requests",
            "checked out": "sqlalchemy.pool.slots{state=checked_out}",
            "checking": "sqlalchemy.pool.slots{state=checking}",
            "connecting": "sqlalchemy.pool.slots{state=connecting}",
            "closing": "sqlalchemy.pool.slots{state=closing}",
            "oldest wait": "sqlalchemy.pool.oldest_wait",
            "down": "sqlalchemy.pool.health{status=down}",
            "stuck": "sqlalchemy.pool.health{status=stuck}",
        }
        said = {what: theirs[name] for what, name in gauges.items() if name in theirs}
        for what, name in gauges.items():
            spelled = name.replace(".", "_") + ("_seconds" if what == "oldest wait" else "")
            if name in theirs and what != "oldest wait":
                assert ours[spelled] == said[what], what
        return said

    def truth(self, used: int, sessions: int) -> dict[str, float]:
        """Return what has to be said when so many sessions of the server are in use."""
        idle = {"idle": sessions - used} if self.has_idle else {}
        nought = dict.fromkeys(
            ("pending", "checking", "connecting", "closing", "oldest wait", "down", "stuck"), 0
        )
        return {"used": used, "checked out": used, **idle, **nought}

    def close(self) -> None:
        self.opentelemetry.stop()
        self.provider.shutdown()


@pytest.mark.parametrize("pool_class", [ManagedPool, MonitoredQueuePool, MonitoredNullPool])
def test_an_outage_leaves_no_wrong_gauge(pool_class: type, postgres: PostgresServer):
    engine = create_engine(postgres.url("psycopg2"), poolclass=pool_class, pool_pre_ping=True)
    exporters = Exporters(engine)

    def is_true(used: int) -> bool:
        return exporters.gauges() == exporters.truth(used, postgres.sessions())

    for connection in [engine.connect() for _ in range(3)]:
        connection.close()
    until(lambda: is_true(0))

    lost = engine.connect()
    lost.execute(text("SELECT 1"))
    postgres.stop()
    with pytest.raises(LOST):
        lost.execute(text("SELECT 1"))
    lost.close()
    for _ in range(FAILURES):
        with pytest.raises(LOST):
            engine.connect()
    during = exporters.gauges()
    assert during["used"] == 0
    assert during.get("idle", 0) == 0
    if pool_class is ManagedPool:
        until(lambda: not works(engine) and exporters.gauges()["down"] == 1)

    postgres.start()
    until(lambda: works(engine))
    held = [engine.connect() for _ in range(2)]
    until(lambda: is_true(2))
    for connection in held:
        connection.close()
    until(lambda: is_true(0))
    exporters.close()
    if pool_class is ManagedPool:
        engine.pool.close()
    engine.dispose()


def works(engine: Any) -> bool:
    try:
        engine.connect().close()
    except LOST:
        return False
    return True


@pytest.mark.parametrize("pool_class", [AsyncManagedPool, AsyncMonitoredQueuePool])
def test_an_outage_leaves_no_wrong_gauge_with_asyncio(pool_class: type, postgres: PostgresServer):
    asyncio.run(survive(pool_class, postgres))


async def survive(pool_class: type, postgres: PostgresServer) -> None:
    engine = create_async_engine(postgres.url("asyncpg"), poolclass=pool_class, pool_pre_ping=True)
    exporters = Exporters(engine)

    async def is_true(used: int) -> bool:
        return exporters.gauges() == exporters.truth(used, postgres.sessions())

    for connection in [await engine.connect() for _ in range(3)]:
        await connection.close()
    await until_async(lambda: is_true(0))

    postgres.stop()
    for _ in range(FAILURES):
        with pytest.raises(LOST):
            await engine.connect()
    during = exporters.gauges()
    assert (during["used"], during["idle"]) == (0, 0)

    postgres.start()
    await until_async(lambda: works_async(engine))
    held = [await engine.connect() for _ in range(2)]
    await until_async(lambda: is_true(2))
    for connection in held:
        await connection.close()
    await until_async(lambda: is_true(0))
    exporters.close()
    if pool_class is AsyncManagedPool:
        await engine.pool.close()  # type: ignore[attr-defined]
    await engine.dispose()


async def works_async(engine: AsyncEngine) -> bool:
    try:
        await (await engine.connect()).close()
    except LOST:
        return False
    return True


async def until_async(is_so: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not await is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
