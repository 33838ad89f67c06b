"""The public names of the package; ``from sqla_poolkit import ...`` finds them."""

from .core.events import PoolEvent
from .core.holders import held_by
from .core.snapshot import PoolInterval, PoolSnapshot
from .errors import PoolClosed, PoolDeadlock, PoolOverloaded, PoolTimeout, PoolUnavailable
from .pool.managed import ManagedPool
from .pool.managed_async import AsyncManagedPool
from .pool.monitored import AsyncMonitoredQueuePool, MonitoredNullPool, MonitoredQueuePool
from .pool.reading import snapshot
from .watch.monitor import monitor

__all__ = [
    "AsyncManagedPool",
    "AsyncMonitoredQueuePool",
    "ManagedPool",
    "MonitoredNullPool",
    "MonitoredQueuePool",
    "PoolClosed",
    "PoolDeadlock",
    "PoolEvent",
    "PoolInterval",
    "PoolOverloaded",
    "PoolSnapshot",
    "PoolTimeout",
    "PoolUnavailable",
    "held_by",
    "monitor",
    "snapshot",
]
