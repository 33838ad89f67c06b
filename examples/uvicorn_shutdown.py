"""Uvicorn: a server ends without a lost request and without a connection left behind.

On SIGTERM uvicorn takes no more requests and finishes those in flight, for
`timeout_graceful_shutdown` seconds.  Then it ends the lifespan, which closes the pool.  FastAPI and
Starlette take the same function: `FastAPI(lifespan=lifespan)`.

    python examples/uvicorn_shutdown.py
    DATABASE_URL=postgresql+asyncpg://user:password@localhost/db \
        python examples/uvicorn_shutdown.py

Without DATABASE_URL it runs on an SQLite file, `example.db`.  It needs uvicorn, and aiosqlite or
asyncpg.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_poolkit import AsyncManagedPool, held_by

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

engine = create_async_engine(
    os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///example.db"),
    poolclass=AsyncManagedPool,
    min_size=1,
    max_size=8,
    pool_name="web",
)


@asynccontextmanager
async def lifespan(_app: object) -> AsyncIterator[None]:
    """Do not start without a database; close the pool after the last request."""
    try:
        await engine.pool.wait_ready(timeout=10)
        yield
    finally:
        await engine.pool.close(timeout=5)


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answer a request that works with the database for a second."""
    if scope["type"] == "lifespan":
        await live(receive, send)
        return
    with held_by(scope["path"]):
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            await asyncio.sleep(1.0)  # stands for your queries
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"done\n"})


async def live(receive: Receive, send: Send) -> None:
    """Enter and leave the lifespan when the server says so, as frameworks do."""
    await receive()
    async with lifespan(app):
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await send({"type": "lifespan.shutdown.complete"})


def main() -> None:
    """Serve on the port that PORT names."""
    port = int(os.environ.get("PORT", "8000"))
    uvicorn.run(app, port=port, lifespan="on", timeout_graceful_shutdown=20)


if __name__ == "__main__":
    main()
