"""SQLAlchemy's own pools, measured: the same algorithms, with the books of ManagedPool."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

from sqlalchemy.pool import NullPool, QueuePool
from sqlalchemy.util import queue as queues

from ..config import UNSET, PoolConfig
from ..core.slots import CloseReason
from ..core.snapshot import PoolSnapshot
from . import _sqlalchemy, _sync
from ._fork import start_over_after_fork
from ._names import unique_name
from ._recorder import Recorder
from ._sqlalchemy import ConnectionPoolEntry, Creator, PoolProxiedConnection

__all__ = ["MonitoredNullPool", "MonitoredQueuePool"]


class _Here(threading.local):
    """What the present thread is doing in a pool."""

    request: int | None = None
    closing: CloseReason | None = None


class _Monitored:
    """Tells a recorder what a pool does; goes before one of SQLAlchemy's pool classes."""

    _recorder: Recorder
    _here: _Here

    def _begin_recording(self, track: Any) -> None:
        given = {} if track is UNSET else {"track": track}
        self._recorder = Recorder(PoolConfig.from_arguments(given).track)
        self._here = _Here()
        start_over_after_fork(self._recorder)

    def _name_recording(self, pool_name: str | None) -> None:
        wanted = pool_name or _sqlalchemy.database_name(cast(Any, self))
        self._recorder.name = unique_name(wanted, self._recorder)

    def continue_recording(self, predecessor: _Monitored) -> None:
        """Write on in the predecessor's books."""
        self._recorder = predecessor._recorder

    def connect(self) -> PoolProxiedConnection:
        """Return a connection from the pool, as ``Engine.raw_connection`` does."""
        recorder, here = self._recorder, self._here
        with recorder.request() as request:
            outer, here.request = here.request, request
            try:
                proxy: Any = super().connect()  # type: ignore[misc]
            finally:
                here.request = outer
            recorder.note(recorder.ledger.served, request, _sqlalchemy.record_of(proxy))
        return cast(PoolProxiedConnection, proxy)

    def _do_get(self) -> ConnectionPoolEntry:
        # QueuePool's calls itself when it loses a race; what it returns is noted once all the same
        record: ConnectionPoolEntry = super()._do_get()  # type: ignore[misc]
        if self._here.request is not None:
            self._recorder.note(self._recorder.ledger.taken, self._here.request, record)
        return record

    def _return_conn(self, record: ConnectionPoolEntry) -> None:
        self._recorder.note(self._recorder.ledger.returned, record)
        here = self._here
        outer, here.closing = here.closing, "overflow"
        try:
            super()._do_return_conn(record)  # type: ignore[misc]
        finally:
            here.closing = outer

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        # checkins come through _return_conn; only a proxy that detaches itself calls this one
        recorder = self._recorder
        recorder.note(recorder.ledger.detached_from, record)
        recorder.note(recorder.ledger.returned, record)
        super()._do_return_conn(record)  # type: ignore[misc]

    def _should_wrap_creator(self, creator: Creator) -> Callable[[ConnectionPoolEntry], Any]:
        connect: Any = super()._should_wrap_creator(creator)  # type: ignore[misc]

        def invoke(record: ConnectionPoolEntry) -> Any:
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
        reason = self._here.closing or self._reason_to_close(connection, terminate=terminate)
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
        here = self._here
        outer, here.closing = here.closing, "disposed"
        try:
            super().dispose()  # type: ignore[misc]
        finally:
            here.closing = outer

    def recreate(self) -> Any:
        """Return a pool that takes this one's place: same settings, name and totals."""
        successor = super().recreate()  # type: ignore[misc]
        successor.continue_recording(self)
        return successor

    def snapshot(self) -> PoolSnapshot:
        """Return one consistent reading of the pool."""
        return self._recorder.snapshot(cast(Any, self), self._settings(), self._limit())

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


class _MeasuredQueue(queues.Queue[ConnectionPoolEntry]):
    """QueuePool's queue, which notes who has to wait."""

    pool: MonitoredQueuePool

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:
        if not block:
            return super().get(False)
        try:
            return super().get(False)
        except queues.Empty:
            pass
        with self.pool.waiting():
            return super().get(True, timeout)


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
        self._begin_recording(track)
        super().__init__(creator, pool_size, max_overflow, timeout, use_lifo, **kw)
        cast(_MeasuredQueue, self._pool).pool = self
        self._name_recording(pool_name)

    def waiting(self) -> Any:
        """Note that the present caller waits while the block runs."""
        return self._recorder.waiting(self._here.request)

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
        self._begin_recording(track)
        super().__init__(creator, **kw)
        self._name_recording(pool_name)
