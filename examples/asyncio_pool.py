"""A pool for asyncio: tasks that queue, one that is cancelled, and two event loops on one engine.

`AsyncManagedPool` takes the settings of `ManagedPool` and gives the same snapshot.  Six tasks share
two connections; a task that gives up costs nothing; the second `asyncio.run` gets connections of
its own within the same limit, and those of the first, whose loop is closed, are forgotten.

    python examples/asyncio_pool.py
    python examples/asyncio_pool.py postgresql+asyncpg://user:password@localhost/db

Without a URL it runs on an SQLite file in a temporary folder.  It needs aiosqlite, or asyncpg (also
for postgresql:// and postgresql+psycopg2://), or psycopg for postgresql+psycopg://.
"""

from __future__ import annotations

import asyncio
import sys
from tempfile import TemporaryDirectory

from sqlalchemy import URL, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sqla_poolkit import AsyncManagedPool, PoolSnapshot, held_by, snapshot

CONNECTIONS = 2
FOR_ASYNCIO = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgresql+psycopg2": "postgresql+asyncpg",
}


def for_asyncio(url: str) -> URL:
    """Return the URL with a driver for asyncio in place of one for threads."""
    given = make_url(url)
    return given.set(drivername=FOR_ASYNCIO.get(given.drivername, given.drivername))


async def request(engine: AsyncEngine, label: str, seconds: float) -> None:
    """Hold a connection for a while, as a query would."""
    with held_by(label):
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            await asyncio.sleep(seconds)


def show(when: str, reading: PoolSnapshot) -> None:
    """Print how things stand."""
    print(
        f"{when}: {reading.open} of {reading.max_size} connections open, {reading.idle} idle, "
        f"{reading.checked_out} checked out, {reading.waiting} waiting; so far "
        f"{reading.checkouts} checkouts, {reading.cancelled} cancelled, {reading.connects} "
        f"connects, {reading.forgotten} forgotten"
    )


async def queue(engine: AsyncEngine) -> None:
    """Let six tasks share the connections, and print who waited for whom."""
    tasks = [asyncio.create_task(request(engine, "report", 0.3))]
    tasks += [asyncio.create_task(request(engine, "GET /users", 0.05)) for _ in range(5)]
    await asyncio.gather(*tasks)
    reading = snapshot(engine)
    show("six tasks", reading)
    for label in ("report", "GET /users"):
        row = reading.labels[label]
        print(
            f"  {label}: {row.checkouts} checkouts, waited {row.wait_seconds * 1000:.0f} ms, "
            f"made others wait {row.wait_caused_seconds * 1000:.0f} ms"
        )


async def give_up(engine: AsyncEngine) -> None:
    """Let a task be cancelled while it waits; then use every connection once more."""
    reports = [asyncio.create_task(request(engine, "report", 0.3)) for _ in range(CONNECTIONS)]
    await asyncio.sleep(0)  # the reports ask first
    try:
        # asyncio.timeout of Python 3.11 and newer does the same to a block
        await asyncio.wait_for(request(engine, "GET /users", 0.05), timeout=0.1)
    except asyncio.TimeoutError:
        show("one gave up", snapshot(engine))
    await asyncio.gather(*reports)
    await asyncio.gather(*(request(engine, "GET /users", 0.05) for _ in range(CONNECTIONS)))
    show("all are there", snapshot(engine))


async def first_loop(engine: AsyncEngine) -> None:
    """Do what a program does in its event loop."""
    await queue(engine)
    await give_up(engine)


async def second_loop(engine: AsyncEngine) -> None:
    """Go on with the same engine on another loop, and close the pool at the end."""
    await asyncio.gather(*(request(engine, "GET /orders", 0.05) for _ in range(CONNECTIONS)))
    show("second loop", snapshot(engine))
    await engine.pool.close()
    print(repr(engine.pool))


def main(url: str | None = None) -> None:
    """Run two event loops, one after the other, on one engine."""
    with TemporaryDirectory() as folder:
        engine = create_async_engine(
            for_asyncio(url or f"sqlite:///{folder}/example.db"),
            poolclass=AsyncManagedPool,
            max_size=CONNECTIONS,
            pool_name="app",
        )
        asyncio.run(first_loop(engine))
        asyncio.run(second_loop(engine))


if __name__ == "__main__":
    main(*sys.argv[1:2])
