"""What can go wrong, in sentences, inside SQLAlchemy's own hierarchy.

``except sqlalchemy.exc.TimeoutError`` and ``except sqlalchemy.exc.OperationalError`` keep working
in programs that were written for QueuePool.  Every error can be pickled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import exc
from sqlalchemy.exc import ArgumentError

if TYPE_CHECKING:
    from .core.events import PoolEvent
    from .core.snapshot import PoolSnapshot

__all__ = [
    "ArgumentError",
    "PoolClosed",
    "PoolDeadlock",
    "PoolMisuse",
    "PoolOverloaded",
    "PoolTimeout",
    "PoolUnavailable",
]


class PoolTimeout(exc.TimeoutError):
    """No connection could be had within ``pool_timeout`` seconds.

    Carries the code ``3o7r`` of QueuePool's timeout.  ``snapshot`` is the whole state of the pool,
    read when the caller gave up, or up to 20 ms before if others gave up then; ``None`` where the
    pool keeps no books.  ``events`` is what happened in the pool before: the last twenty events of
    each kind, the newest last.
    """

    def __init__(
        self,
        message: str,
        snapshot: PoolSnapshot | None = None,
        events: tuple[PoolEvent, ...] = (),
    ) -> None:
        super().__init__(message, code="3o7r")
        self.snapshot = snapshot
        self.events = events

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.args[0], self.snapshot, self.events))


class PoolDeadlock(PoolTimeout):
    """Whoever asked would have waited for himself: all connections are held by who waits for one.

    Only with ``on_deadlock="raise"``, and then at once; otherwise such callers get ``PoolTimeout``
    at their deadline.
    """


class PoolOverloaded(exc.TimeoutError):
    """As many callers as may (``max_waiting``) wait already for a connection to be given back.

    Whoever asks is turned away at once; those for whom a connection can be opened do not count.
    ``gauges`` holds the pool's gauges at that moment (``waiting``, ``checked_out``, ...).
    """

    def __init__(self, message: str, gauges: dict[str, int] | None = None) -> None:
        super().__init__(message)
        self.gauges = gauges or {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.args[0], self.gauges))


class PoolUnavailable(exc.OperationalError):
    """The database is known to be down; ``orig`` is what the driver said when it was last tried.

    ``events`` is what happened in the pool before, as in ``PoolTimeout``.
    """

    def __init__(
        self,
        message: str,
        orig: BaseException | None = None,
        events: tuple[PoolEvent, ...] = (),
    ) -> None:
        super().__init__(None, None, orig or ConnectionError(message))
        self.message = message
        self.events = events

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.message, self.orig, self.events))


class PoolClosed(exc.InvalidRequestError):
    """The pool was closed for good by ``pool.close()``; make a new engine to connect again."""


class PoolMisuse(exc.InvalidRequestError):
    """The pool was used in a way that cannot work, as the message says."""
