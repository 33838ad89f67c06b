"""What people see of a pool: events and observers, logs, and what is made of them.

From its first import on, the warnings of all pools are written where logging is configured.
"""

from ..core.events import (
    CheckoutCancelled,
    CheckoutFailed,
    CheckoutRejected,
    CheckoutTimedOut,
    CheckoutUnavailable,
    CheckoutWaited,
    ConnectFailed,
    ConnectionClosed,
    ConnectionLeaked,
    ConnectionLost,
    ConnectionOpened,
    DatabaseFound,
    DatabaseLost,
    DeadlockFound,
    GenerationRetired,
    HoldExceeded,
    HoldReturned,
    PoolEvent,
    PoolExhausted,
    PoolRecovered,
    SnapshotTaken,
)
from .logs import log_events, log_warnings
from .monitor import Monitor, monitor
from .observers import Observation, Observer, observe, recent_events

__all__ = [
    "CheckoutCancelled",
    "CheckoutFailed",
    "CheckoutRejected",
    "CheckoutTimedOut",
    "CheckoutUnavailable",
    "CheckoutWaited",
    "ConnectFailed",
    "ConnectionClosed",
    "ConnectionLeaked",
    "ConnectionLost",
    "ConnectionOpened",
    "DatabaseFound",
    "DatabaseLost",
    "DeadlockFound",
    "GenerationRetired",
    "HoldExceeded",
    "HoldReturned",
    "Monitor",
    "Observation",
    "Observer",
    "PoolEvent",
    "PoolExhausted",
    "PoolRecovered",
    "SnapshotTaken",
    "log_events",
    "monitor",
    "observe",
    "recent_events",
]

log_warnings()
