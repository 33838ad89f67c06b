"""``snapshot(engine)``: read the pool behind an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..core.snapshot import PoolSnapshot
from ..errors import ArgumentError
from ._registry import keeper_of, living_pools

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import Pool

__all__ = ["glance", "pools", "snapshot"]


def pools() -> list[Any]:
    """Return the pools of this process that keep books, sorted by name.

    Each has a ``snapshot()``; in place of a pool that is only monitored there is its monitor.
    A pool that took another's place (``engine.dispose()``) goes on under its name and in its books.
    """
    return living_pools()


def snapshot(engine: Engine | AsyncEngine | Pool) -> PoolSnapshot:
    """Return one consistent reading of an engine's pool.

    :param engine: an ``Engine``, an ``AsyncEngine``, or a pool itself.
    :raises sqlalchemy.exc.ArgumentError: if the pool keeps no books.
    """
    pool: Any = getattr(engine, "pool", engine)
    read = getattr(pool, "snapshot", None) or getattr(keeper_of(pool), "snapshot", None)
    if read is None:
        raise ArgumentError(
            f"{type(pool).__name__} keeps no books, so there is nothing to read; call "
            "monitor(engine), or create the engine with poolclass=ManagedPool (asyncio: "
            "AsyncManagedPool), or with MonitoredQueuePool (AsyncMonitoredQueuePool) or "
            "MonitoredNullPool to keep SQLAlchemy's own behaviour"
        )
    reading: PoolSnapshot = read()
    return reading


def glance(engine: Engine | AsyncEngine | Pool) -> PoolSnapshot:
    """Return a reading for whoever reads often: ``labels`` and ``callers`` may be left out.

    There may be thousands of them, and reading them takes microseconds each under the pool's lock.
    """
    pool: Any = getattr(engine, "pool", engine)
    look: Callable[[], PoolSnapshot] | None = getattr(pool, "glance", None) or getattr(
        keeper_of(pool), "glance", None
    )
    return snapshot(engine) if look is None else look()
