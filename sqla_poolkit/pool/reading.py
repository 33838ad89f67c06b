"""``snapshot(engine)``: read the pool behind an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.snapshot import PoolSnapshot
from ..errors import ArgumentError

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import Pool

__all__ = ["snapshot"]


def snapshot(engine: Engine | AsyncEngine | Pool) -> PoolSnapshot:
    """Return one consistent reading of an engine's pool.

    :param engine: an ``Engine``, an ``AsyncEngine``, or a pool itself.
    :raises sqlalchemy.exc.ArgumentError: if the pool keeps no books.
    """
    pool: Any = getattr(engine, "pool", engine)
    read = getattr(pool, "snapshot", None)
    if read is None:
        raise ArgumentError(
            f"{type(pool).__name__} keeps no books, so there is nothing to read; create the engine "
            "with poolclass=ManagedPool (asyncio: AsyncManagedPool), or with MonitoredQueuePool "
            "(AsyncMonitoredQueuePool) or MonitoredNullPool to keep SQLAlchemy's own behaviour"
        )
    reading: PoolSnapshot = read()
    return reading
