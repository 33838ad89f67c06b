"""A fair connection pool for SQLAlchemy that keeps honest books, and a monitor of pools."""

from .core.holders import held_by
from .core.snapshot import PoolInterval, PoolSnapshot
from .errors import PoolClosed, PoolOverloaded, PoolTimeout, PoolUnavailable
from .pool.managed import ManagedPool
from .pool.managed_async import AsyncManagedPool
from .pool.monitored import AsyncMonitoredQueuePool, MonitoredNullPool, MonitoredQueuePool
from .pool.reading import snapshot

__all__ = [
    "AsyncManagedPool",
    "AsyncMonitoredQueuePool",
    "ManagedPool",
    "MonitoredNullPool",
    "MonitoredQueuePool",
    "PoolClosed",
    "PoolInterval",
    "PoolOverloaded",
    "PoolSnapshot",
    "PoolTimeout",
    "PoolUnavailable",
    "held_by",
    "snapshot",
]
