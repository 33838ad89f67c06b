"""SQLAlchemy's own pools, measured: the same algorithms, with the books of ManagedPool."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, cast

from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool
from sqlalchemy.util import queue as queues

from ..config import UNSET, PoolConfig
from ..core.slots import CloseReason
from ..core.snapshot import PoolSnapshot
from . import _sqlalchemy, _sync
from ._fork import start_over_after_fork
from ._recorder import Recorder
from ._registry import connecting, register
from ._sqlalchemy import ConnectionPoolEntry, Creator, PoolProxiedConnection

__all__ = ["AsyncMonitoredQueuePool", "MonitoredNullPool", "MonitoredQueuePool"]

# What the present thread or task is doing in a pool.
_request: ContextVar[int | None] = ContextVar("sqla_poolkit_request", default=None)
_closing: ContextVar[CloseReason | None] = ContextVar("sqla_poolkit_closing", default=None)


class _Monitored:
    """Tells a recorder what a pool does; goes before one of SQLAlchemy's pool classes."""

    _recorder: Recorder

    def _begin_recording(self, track: Any, dialect: Any) -> None:
        given = {} if track is UNSET else {"track": track}
        is_asyncio = getattr(dialect, "is_async", False) is True
        is_asyncio |= getattr(type(self), "_is_asyncio", None) is True
        self._recorder = Recorder(PoolConfig.from_arguments(given).track, is_asyncio=is_asyncio)
        start_over_after_fork(self._recorder)

    def _name_recording(self, pool_name: str | None) -> None:
        wanted = pool_name or _sqlalchemy.database_name(cast(Any, self))
        self._recorder.name = register(wanted, self._recorder)
        self._recorder.serve(cast(Any, self))

    def continue_recording(self, predecessor: _Monitored) -> None:
        """Write on in the predecessor's books."""
        self._recorder = predecessor._recorder
        self._recorder.serve(cast(Any, self))

    def connect(self) -> PoolProxiedConnection:
        """Return a connection from the pool, as ``Engine.raw_connection`` does."""
        recorder = self._recorder
        with recorder.request() as request:
            token = _request.set(request)
            try:
                proxy: Any = super().connect()  # type: ignore[misc]
            finally:
                _request.reset(token)
            recorder.note(recorder.ledger.served, request, _sqlalchemy.record_of(proxy))
        return cast(PoolProxiedConnection, proxy)

    def _do_get(self) -> ConnectionPoolEntry:
        # QueuePool's calls itself when it loses a race; what it returns is noted once all the same
        record: ConnectionPoolEntry = super()._do_get()  # type: ignore[misc]
        request = _request.get()
        if request is not None:
            self._recorder.note(self._recorder.ledger.taken, request, record)
        return record

    def _return_conn(self, record: ConnectionPoolEntry) -> None:
        self._recorder.note(self._recorder.ledger.returned, record)
        is_replaced = self._recorder.served_pool() is not cast(Any, self)
        token = _closing.set("disposed" if is_replaced else "overflow")
        try:
            if is_replaced:
                # SQLAlchemy leaves it to the collector, together with the pool that nobody has
                record.close()
            super()._do_return_conn(record)  # type: ignore[misc]
        finally:
            _closing.reset(token)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        # checkins come through _return_conn; only a proxy that detaches itself calls this one
        recorder = self._recorder
        dropped = _sqlalchemy.connection_being_collected()
        if dropped is None:
            recorder.note(recorder.ledger.detached_from, record)
        else:
            recorder.note(recorder.ledger.closed, id(dropped), "leaked")
        recorder.note(recorder.ledger.returned, record)
        super()._do_return_conn(record)  # type: ignore[misc]

    def _should_wrap_creator(self, creator: Creator) -> Callable[[ConnectionPoolEntry], Any]:
        connect: Any = super()._should_wrap_creator(creator)  # type: ignore[misc]

        def invoke(record: ConnectionPoolEntry) -> Any:
            connecting()
            recorder = self._recorder
            ledger = recorder.ledger
            began_at = recorder.note(ledger.connect_began, record)
            try:
                connection = connect(record)
            except BaseException:
                recorder.note(ledger.connect_failed, record)
                raise
            seconds = _sync.monotonic() - began_at
            recorder.note(ledger.connected, id(connection), record, seconds)
            return connection

        return invoke

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        recorder = self._recorder
        reason = _closing.get() or self._reason_to_close(connection, terminate=terminate)
        recorder.note(recorder.ledger.close_began, id(connection))
        try:
            super()._close_connection(connection, terminate=terminate)  # type: ignore[misc]
        finally:
            recorder.note(recorder.ledger.closed, id(connection), reason)

    def _reason_to_close(self, connection: Any, *, terminate: bool) -> CloseReason:
        if not terminate:
            return "closed"
        recycle: float = vars(self)["_recycle"]
        opened_at = self._recorder.ledger.opened_at(id(connection))
        age = 0.0 if opened_at is None else _sync.monotonic() - opened_at
        return "age" if -1 < recycle < age else "invalidated"

    def dispose(self) -> None:
        """Close the idle connections; the pool goes on."""
        token = _closing.set("disposed")
        try:
            super().dispose()  # type: ignore[misc]
        finally:
            _closing.reset(token)

    def recreate(self) -> Any:
        """Return a pool that takes this one's place: same settings, name and totals."""
        successor = super().recreate()  # type: ignore[misc]
        successor.continue_recording(self)
        return successor

    def snapshot(self) -> PoolSnapshot:
        """Return one consistent reading of the pool."""
        return self._recorder.snapshot(cast(Any, self), self._settings(), self._limit())

    def glance(self) -> PoolSnapshot:
        """Return a reading without ``labels`` and ``callers``, cheap however many there are."""
        return self._recorder.snapshot(
            cast(Any, self), self._settings(), self._limit(), has_rows=False
        )

    def _settings(self) -> dict[str, Any]:
        return {}

    def _limit(self) -> int | None:
        return None

    def __repr__(self) -> str:
        reading = self.snapshot()
        limit = "" if reading.max_size is None else f" of {reading.max_size}"
        return (
            f"<{type(self).__name__} {reading.name!r} {reading.open}{limit} open: "
            f"{reading.idle} idle, {reading.checked_out} checked out, "
            f"{reading.connecting} connecting, {reading.waiting} waiting>"
        )


class _Measured:
    """Notes who has to wait for a queue; goes before the queue of one of SQLAlchemy's pools."""

    pool: MonitoredQueuePool

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:
        take: Callable[..., ConnectionPoolEntry] = super().get  # type: ignore[misc]
        if not block:
            return take(False)
        try:
            return take(False)
        except queues.Empty:
            pass
        with self.pool.waiting():
            return take(True, timeout)


class _MeasuredQueue(_Measured, queues.Queue[ConnectionPoolEntry]):
    """The queue of threads."""


class _MeasuredAsyncQueue(_Measured, queues.AsyncAdaptedQueue[ConnectionPoolEntry]):
    """The queue of tasks."""


class MonitoredQueuePool(_Monitored, QueuePool):
    """SQLAlchemy's QueuePool, measured: the same order, the same limits, with a ``snapshot()``.

    Use it to see how an engine fares before anything is changed:
    ``create_engine(url, poolclass=MonitoredQueuePool)``.

    :param track: what is remembered of a holder, as ManagedPool's.
    :param pool_name: the name in snapshots, as ManagedPool's.

    The other arguments are QueuePool's, with QueuePool's defaults.
    """

    _sqla_logger_namespace = "sqlalchemy.pool.impl.MonitoredQueuePool"
    _queue_class = _MeasuredQueue

    def __init__(
        self,
        creator: Creator,
        pool_size: int = 5,
        max_overflow: int = 10,
        timeout: float = 30.0,
        use_lifo: bool = False,
        track: str = UNSET,
        pool_name: str | None = None,
        **kw: Any,
    ) -> None:
        self._begin_recording(track, kw.get("dialect"))
        super().__init__(creator, pool_size, max_overflow, timeout, use_lifo, **kw)
        cast(_Measured, self._pool).pool = self
        self._name_recording(pool_name)

    def waiting(self) -> Any:
        """Note that the present caller waits while the block runs."""
        return self._recorder.waiting(_request.get())

    def _settings(self) -> dict[str, Any]:
        return {
            "pool_size": self.size(),
            "max_overflow": self._max_overflow,
            "timeout": self._timeout,
            "recycle": self._recycle,
            "use_lifo": self._pool.use_lifo,
            "pre_ping": self._pre_ping,
        }

    def _limit(self) -> int | None:
        return None if self._max_overflow == -1 else self.size() + self._max_overflow


class AsyncMonitoredQueuePool(MonitoredQueuePool, AsyncAdaptedQueuePool):
    """SQLAlchemy's AsyncAdaptedQueuePool, measured; see ``MonitoredQueuePool``.

    Use it as ``create_async_engine(url, poolclass=AsyncMonitoredQueuePool)``.
    """

    _sqla_logger_namespace = "sqlalchemy.pool.impl.AsyncMonitoredQueuePool"
    _queue_class = _MeasuredAsyncQueue  # type: ignore[assignment]


class MonitoredNullPool(_Monitored, NullPool):
    """SQLAlchemy's NullPool, measured: one connection per checkout, with a ``snapshot()``.

    :param track: what is remembered of a holder, as ManagedPool's.
    :param pool_name: the name in snapshots, as ManagedPool's.
    """

    _sqla_logger_namespace = "sqlalchemy.pool.impl.MonitoredNullPool"

    def __init__(
        self,
        creator: Creator,
        track: str = UNSET,
        pool_name: str | None = None,
        **kw: Any,
    ) -> None:
        self._begin_recording(track, kw.get("dialect"))
        super().__init__(creator, **kw)
        self._name_recording(pool_name)
