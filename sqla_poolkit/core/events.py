"""What happens in a pool, as observers and logs hear of it.

The name of an event in logs (``checkout_timed_out``) is the name of its class in small letters.
``at`` is the only wall-clock time; durations are seconds of the pool's own clock.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .slots import CloseReason

if TYPE_CHECKING:
    from .snapshot import PoolSnapshot

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
    "PoolEvent",
    "PoolExhausted",
    "PoolRecovered",
    "SnapshotTaken",
    "event_classes",
]

_WORD = re.compile(r"(?<!^)(?=[A-Z])")


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """Something that happened in a pool.

    Events hold plain values only: no connection, no statement, nothing of a URL but the pool's
    name.
    """

    name: ClassVar[str] = "pool_event"
    """What logs call it."""

    pool: str
    """The pool's name."""
    at: float
    """When it happened: seconds since the epoch."""

    def __init_subclass__(cls) -> None:
        cls.name = _WORD.sub("_", cls.__name__).lower()

    def to_dict(self) -> dict[str, Any]:
        """Return the event as plain values, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"event": self.name, **values}


# -- who asks for a connection ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _OfCaller(PoolEvent):
    """Something that happened to somebody who asked for a connection, or holds one."""

    label: str | None
    """What ``held_by`` called it; None without a label."""
    caller: str | None
    """Its place in the program, as ``track`` says; None where that is not remembered."""


@dataclass(frozen=True, slots=True)
class CheckoutWaited(_OfCaller):
    """A caller was served who had to wait.

    Made for observers that ask for it; without any, only waits of a second or more are remembered.
    """

    waited_seconds: float
    """How long it stood in the queue."""


@dataclass(frozen=True, slots=True)
class CheckoutTimedOut(_OfCaller):
    """A caller got no connection before its deadline (``PoolTimeout``)."""

    waited_seconds: float
    """How long it stood in the queue."""
    checked_out: int
    """How many connections were held then."""
    waiting: int
    """How many others still wait."""


@dataclass(frozen=True, slots=True)
class CheckoutRejected(_OfCaller):
    """A caller was turned away because ``max_waiting`` others wait (``PoolOverloaded``)."""

    waiting: int
    """How many wait."""


@dataclass(frozen=True, slots=True)
class CheckoutCancelled(_OfCaller):
    """A caller left before it was served: a cancelled task, an interrupted thread."""

    waited_seconds: float
    """How long it stood in the queue."""


@dataclass(frozen=True, slots=True)
class CheckoutFailed(_OfCaller):
    """A caller got an error instead: the driver's, a listener's, or that the pool is closed."""

    waited_seconds: float
    """How long it stood in the queue."""


@dataclass(frozen=True, slots=True)
class CheckoutUnavailable(_OfCaller):
    """A caller was turned away because the database is known to be down (``PoolUnavailable``)."""

    waited_seconds: float
    """How long it stood in the queue."""


# -- the pool as a whole ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PoolExhausted(PoolEvent):
    """Every connection that ``max_size`` allows is held, and somebody has waited for a second.

    Told once, until ``PoolRecovered``.
    """

    checked_out: int
    """How many connections are held: all there may be."""
    waiting: int
    """How many callers wait."""
    oldest_wait_seconds: float
    """How long the first of them has waited."""


@dataclass(frozen=True, slots=True)
class PoolRecovered(PoolEvent):
    """Nobody had to wait for a second, after the pool was exhausted."""

    exhausted_seconds: float
    """How long it was, from the beginning of the first long wait."""
    waits: int
    """How many callers had to wait meanwhile."""


@dataclass(frozen=True, slots=True)
class DeadlockFound(PoolEvent):
    """Every connection seems to be held by a caller who himself waits for another one.

    Then none of them can go on before one gives up, at its deadline.
    """

    checked_out: int
    """How many connections are held: all there may be."""
    waiting: int
    """How many callers wait."""
    holds: tuple[str, ...]
    """For each connection who took it, and where he waits for the next; at most ten."""


@dataclass(frozen=True, slots=True)
class DatabaseLost(PoolEvent):
    """Connecting failed so often that the database counts as down.

    Callers who would need a new connection are turned away until ``DatabaseFound``.
    """

    error: str | None
    """What the driver said last, without what it quotes; None if it did not answer."""


@dataclass(frozen=True, slots=True)
class DatabaseFound(PoolEvent):
    """Connecting succeeded again after the database was down."""

    down_seconds: float
    """How long it counted as down."""


@dataclass(frozen=True, slots=True)
class GenerationRetired(PoolEvent):
    """Something happened to the server, so all connections opened before are replaced."""

    connections: int
    """How many connections there were."""


# -- connections -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConnectionOpened(PoolEvent):
    """A connection was opened."""

    connect_seconds: float
    """How long that took."""


@dataclass(frozen=True, slots=True)
class ConnectionClosed(PoolEvent):
    """A connection was closed."""

    reason: CloseReason
    """Why; the same reasons count the ``closes`` of a snapshot."""
    age_seconds: float
    """How long it was open."""
    uses: int
    """How often it was checked out."""


@dataclass(frozen=True, slots=True)
class ConnectionLost(_OfCaller):
    """A connection left the pool unclosed: its holder keeps it, or its event loop is gone."""

    is_detached: bool
    """The holder called ``detach()``; otherwise the connection's event loop is gone."""


@dataclass(frozen=True, slots=True)
class ConnectionLeaked(_OfCaller):
    """A connection came back because the garbage collector found it, or nobody had it any more."""

    held_seconds: float
    """How long it was out."""


@dataclass(frozen=True, slots=True)
class ConnectFailed(PoolEvent):
    """An attempt to connect failed."""

    error: str | None
    """What the driver said, without what it quotes."""


# -- holders ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HoldExceeded(_OfCaller):
    """A connection is held for longer than ``hold_warning``; told once per checkout."""

    held_seconds: float
    """How long so far."""
    now_at: str | None
    """The thread or task that has it, and where that is just now; None if none was found."""


@dataclass(frozen=True, slots=True)
class HoldReturned(_OfCaller):
    """A connection came back after ``HoldExceeded`` was told of it."""

    held_seconds: float
    """How long it was held."""


@dataclass(frozen=True, slots=True)
class SnapshotTaken(PoolEvent):
    """A snapshot was taken because somebody asked for one from time to time."""

    snapshot: PoolSnapshot
    """The snapshot."""

    def to_dict(self) -> dict[str, Any]:
        """Return the event as plain values, ready for JSON."""
        return {
            "event": self.name,
            "pool": self.pool,
            "at": self.at,
            "snapshot": self.snapshot.to_dict(),
        }


def event_classes() -> tuple[type[PoolEvent], ...]:
    """Return every kind of event."""
    return tuple(
        found
        for name in __all__
        if isinstance(found := globals()[name], type)
        and issubclass(found, PoolEvent)
        and found is not PoolEvent
    )
