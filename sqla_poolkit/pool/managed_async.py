"""AsyncManagedPool: the same pool behind ``create_async_engine``."""

from __future__ import annotations

import asyncio
from typing import Any

from ..errors import ArgumentError
from . import _sqlalchemy
from ._abandon import abandon
from ._loops import LoopDriver
from .managed import Managed

__all__ = ["AsyncManagedPool"]


class AsyncManagedPool(Managed):
    """A fair connection pool for asyncio that keeps honest books.

    Use it as ``create_async_engine(url, poolclass=AsyncManagedPool)``.  Settings, snapshots and
    promises are those of ``ManagedPool``.  A connection is used on the event loop that opened it;
    one engine may serve several loops, one after the other or in several threads at a time, within
    one limit.  Needs SQLAlchemy 2.0.58, or 2.1.9.
    """

    _sqla_logger_namespace = "sqlalchemy.pool.impl.AsyncManagedPool"
    _driver_class = LoopDriver
    _driver: LoopDriver
    _is_asyncio = True
    _dialect = _sqlalchemy.DIALECT_OF_ASYNCIO

    def _refuse_the_wrong_kind_of_driver(self) -> None:
        name = type(self).__name__
        if self._dialect.is_async is False:
            raise ArgumentError(
                f"{name} serves asyncio, but the driver "
                f"{getattr(self._dialect, 'driver', '')!r} is for threads; with create_engine use "
                "poolclass=ManagedPool, or write create_async_engine and a driver for asyncio "
                "(asyncpg, psycopg, aiosqlite)"
            )
        if _sqlalchemy.leaks_on_cancellation():
            raise ArgumentError(
                f"{name} needs SQLAlchemy 2.0.58 or newer, or 2.1.9 or newer: earlier ones lose "
                "connections when a task is cancelled. Upgrade SQLAlchemy"
            )

    def new_record(self) -> _sqlalchemy.Record:
        """Connect, firing the events of a connect."""
        _sqlalchemy.share_first_connect(self)
        _sqlalchemy.allow_terminate(self)
        return super().new_record()

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        is_collected = _sqlalchemy.connection_being_collected() is not None
        if is_collected or (terminate and not _sqlalchemy.in_greenlet()):
            # the garbage collector may run anywhere, where nothing can be awaited
            abandon(connection)
            return
        kind = "terminate" if terminate else "close"
        self.logger.debug("Going to %s connection %r", kind, connection)
        try:
            _sqlalchemy.end_connection(self, connection, terminate=terminate)
        except asyncio.CancelledError:
            # no error of the connection's: its loop ends, or its caller is gone
            abandon(connection)
            raise
        except Exception:
            self.logger.exception("Exception when about to %s connection %r", kind, connection)

    async def wait_ready(self, timeout: float | None = 30.0) -> None:
        """Open ``min_size`` connections and wait until they are.

        :raises PoolTimeout: if they are not within ``timeout`` seconds; the pool goes on trying.
        """
        await _sqlalchemy.greenlet_spawn(self._wait_ready, timeout)

    def _wait_ready(self, timeout: float | None) -> None:
        self._driver.find_lane()
        self._driver.wait_ready(timeout)

    async def close(self, timeout: float | None = 5.0) -> None:
        """Close for good: nothing is handed out any more, and callers who wait get ``PoolClosed``.

        Waits for the holders, at most ``timeout`` seconds (None: until they are done), then cuts
        their connections off.  Unlike ``await engine.dispose()`` this is final.
        """
        await _sqlalchemy.greenlet_spawn(self._driver.close, timeout)
