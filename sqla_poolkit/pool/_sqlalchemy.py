"""Every private name of SQLAlchemy that this package relies on, and nothing else uses them.

``tests/test_sqlalchemy_names.py`` checks each on every supported version.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Hashable, Mapping
from math import ceil
from typing import Any, cast

import sqlalchemy
from sqlalchemy import event, exc
from sqlalchemy.pool import Pool
from sqlalchemy.pool import base as _base
from sqlalchemy.pool.base import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from ..core.slots import Slot

__all__ = [
    "DIALECT_OF_ASYNCIO",
    "BasePool",
    "ConnectionPoolEntry",
    "Creator",
    "PoolProxiedConnection",
    "Record",
    "allow_terminate",
    "assign_slot",
    "await_only",
    "cancellations",
    "connect_arguments",
    "connection_being_collected",
    "current_greenlet",
    "end_connection",
    "forget_connection",
    "greenlet_spawn",
    "in_greenlet",
    "is_being_handled",
    "is_referenced",
    "leaks_on_cancellation",
    "missing_greenlet",
    "pass_connect_timeout",
    "ping",
    "public_words",
    "record_of",
    "refill",
    "release_first_connect",
    "share_first_connect",
    "slot_of",
]

Creator = Callable[..., Any]

_frame = sys._getframe  # inspect.currentframe would have to climb frame by frame


class Record(_base._ConnectionRecord):
    """A record that knows which slot of the pool it fills."""

    __slots__ = ("home", "probe", "slot")

    slot: Slot | None

    def __init__(self, pool: Pool) -> None:
        self.slot = None
        self.probe: Callable[[], bool] | None = None
        """Tells without a round trip whether the present connection looks alive."""
        self.home = pool
        super().__init__(pool)

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:
        """Invalidate as SQLAlchemy does; a connection that is still there goes on its return.

        It is there after a soft invalidation, and after a listener has interrupted a hard one.
        """
        try:
            super().invalidate(e, soft)
        except BaseException as error:
            # after a failed reset SQLAlchemy returns the record only if nothing interrupts this
            interrupts = not isinstance(error, Exception)
            if interrupts and self.in_use and _frame(1).f_code is _FINALIZE:
                self.checkin()
            raise
        finally:
            if self.slot is not None and self.dbapi_connection is not None:
                # not under the pool's lock, but only the holder does this, to what it holds
                self.slot.reason = "invalidated"
                self.slot.review_at = _AT_ONCE

    def get_connection(self) -> Any:
        """Return the connection, or open one if there is none.

        SQLAlchemy's would compare wall-clock times here, and reconnect in the caller's time.
        Whether a connection may still be handed out is the state machine's to say.
        """
        connection = self.dbapi_connection
        return super().get_connection() if connection is None else connection


_AT_ONCE = float("-inf")


class BasePool(Pool):
    """SQLAlchemy's Pool, told apart by whether anybody listens to ``checkout``."""

    def connect(self) -> PoolProxiedConnection:
        """Return a connection from the pool, as ``Engine.raw_connection`` does."""
        listeners = self.dispatch.checkout
        if listeners.listeners or listeners.parent_listeners:
            return self._connect_heard()
        # what Pool.connect comes to without listeners and without pings of its own
        proxy = _base._ConnectionRecord.checkout(self)
        proxy._counter += 1
        return proxy

    def new_record(self) -> Record:
        """Connect, firing the events of a connect."""
        return Record(self)

    def close_connection(self, connection: Any) -> None:
        """Close a connection through the dialect; what goes wrong is logged."""
        self._close_connection(connection)

    def _connect_heard(self) -> PoolProxiedConnection:
        """Return a connection after the ``checkout`` listeners agreed."""
        return _base._ConnectionFairy._checkout(self)


_CHECKOUT = _base._ConnectionRecord.checkout.__func__.__code__  # type: ignore[attr-defined]
_CHECKIN = _base._ConnectionRecord.checkin.__code__
_FINALIZE = _base._finalize_fairy.__code__


def assign_slot(record: ConnectionPoolEntry, slot: Slot | None) -> None:
    """Remember which slot a record fills, None for a record outside the pool."""
    cast(Record, record).slot = slot


def slot_of(record: ConnectionPoolEntry) -> Slot | None:
    """Return the slot that a record fills."""
    return cast(Record, record).slot


def refill(record: ConnectionPoolEntry) -> None:
    """Open a new connection in an emptied record, firing the events of a connect."""
    cast(Record, record).get_connection()


def forget_connection(record: ConnectionPoolEntry) -> None:
    """Empty a record without closing what it held."""
    cast(Any, record).dbapi_connection = None


def release_first_connect(pool: Pool) -> None:
    """Let go of the lock under which SQLAlchemy's listeners prepare the first connection.

    In a forked child nobody else would, if another thread of the parent was about to connect.
    """
    for listeners in (pool.dispatch.first_connect, pool.dispatch.connect):
        if hasattr(listeners, "_exec_once_mutex"):
            cast(Any, listeners)._exec_once_mutex = None


def share_first_connect(pool: Pool) -> None:
    """Have the lock of the first connection work for several event loops at a time.

    SQLAlchemy's is an ``asyncio.Lock``, which belongs to the first loop that has to wait for it.
    """
    for listeners in (pool.dispatch.first_connect, pool.dispatch.connect):
        collection = cast(Any, listeners).for_modify(pool.dispatch)
        if not isinstance(getattr(collection, "_exec_once_mutex", None), _LockOfAnyLoop):
            collection._exec_once_mutex = _LockOfAnyLoop()


class _LockOfAnyLoop:
    """A lock for tasks of any loop and thread; rarely contended, so waiting is polling."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> bool:
        while not self._lock.acquire(blocking=False):
            await_only(asyncio.sleep(0.001))
        return True

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def current_greenlet() -> Callable[[], Hashable]:
    """Return the function that returns the present greenlet: a caller of asyncio's."""
    from greenlet import getcurrent  # late: only asyncio needs it

    return cast(Callable[[], Hashable], getcurrent)


def cancellations() -> tuple[type[BaseException], ...]:
    """Return what a task is ended with that somebody cancelled or that nobody will finish."""
    from greenlet import GreenletExit  # late: only asyncio needs it

    return (asyncio.CancelledError, GeneratorExit, GreenletExit)


def missing_greenlet(name: str) -> exc.MissingGreenlet:
    """Return the error of a caller who is outside of SQLAlchemy's asyncio classes."""
    return exc.MissingGreenlet(
        f"pool {name!r} is for asyncio and was used outside of SQLAlchemy's asyncio classes; write "
        "'async with engine.connect() as connection' on the AsyncEngine, or hand the function that "
        "wants a plain connection to 'await connection.run_sync(function)'"
    )


def leaks_on_cancellation() -> bool:
    """Tell whether this SQLAlchemy loses connections by itself when a task is cancelled."""
    numbers = []
    for part in sqlalchemy.__version__.split(".")[:3]:
        digits = "".join(character for character in part if character.isdigit())
        numbers.append(int(digits or 0))
    version = tuple(numbers)
    return version < (2, 0, 58) or (2, 1) <= version < (2, 1, 9)


DIALECT_OF_ASYNCIO: Any = _base._AsyncConnDialect()
"""Stands in for the dialect of a pool that was made without one."""


def allow_terminate(pool: Pool) -> None:
    """Have SQLAlchemy end dropped connections of every driver, for this pool knows how."""
    cast(Any, pool)._dialect.has_terminate = True


def end_connection(pool: Pool, connection: Any, *, terminate: bool) -> None:
    """Close a connection through the dialect, or terminate it."""
    dialect = cast(Any, pool)._dialect
    (dialect.do_terminate if terminate else dialect.do_close)(connection)


def connection_being_collected() -> Any:
    """Return the connection that the garbage collector is just now taking from a dropped proxy."""
    frame: Any = _frame(1)
    for _ in range(_FRAMES_OF_A_DETACH):
        if frame is None:
            return None
        if frame.f_code is _FINALIZE:
            found = frame.f_locals
            return found.get("dbapi_connection") if found.get("is_gc_cleanup") else None
        frame = frame.f_back
    return None


# _finalize_fairy -> detach -> _do_return_conn -> take_back
_FRAMES_OF_A_DETACH = 5


def is_referenced(record: ConnectionPoolEntry) -> bool:
    """Tell whether a proxy for this record is alive, so that somebody holds the connection."""
    reference = cast(Any, record).fairy_ref
    return reference is not None and reference() is not None


def record_of(proxy: PoolProxiedConnection) -> ConnectionPoolEntry | None:
    """Return the record behind a proxy, None if it was detached."""
    record: ConnectionPoolEntry | None = cast(Any, proxy)._connection_record
    return record


def is_being_handled(record: ConnectionPoolEntry, slot: Slot) -> bool:
    """Tell whether some thread is just now checking this record out or in."""
    for frame in sys._current_frames().values():
        current: Any = frame
        while current is not None:
            if _handles(current, record, slot):
                return True
            current = current.f_back
    return False


def _handles(frame: Any, record: ConnectionPoolEntry, slot: Slot) -> bool:
    code = frame.f_code
    if code is _CHECKOUT:
        return frame.f_locals.get("rec") is record
    if code is _CHECKIN:
        return frame.f_locals.get("self") is record
    if code is _FINALIZE:
        return frame.f_locals.get("connection_record") is record
    # a caller who was granted this slot and has not returned with it yet
    got = frame.f_locals.get("got") if frame.f_globals.get("__package__") == __package__ else None
    return got is slot or getattr(got, "slot", None) is slot


def ping(pool: Pool, dbapi_connection: Any) -> bool:
    """Ping through the dialect, ``handle_error`` listeners included; False if disconnected."""
    return bool(cast(Any, pool._dialect)._do_ping_w_event(dbapi_connection))


def connect_arguments(creator: Creator) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return the driver's connect arguments that ``create_engine`` put into its creator."""
    closure = getattr(creator, "__closure__", None) or ()
    names = getattr(getattr(creator, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, closure, strict=False))
    try:
        positional = cells["cargs_tup"].cell_contents
        named = cells["cparams"].cell_contents
    except (KeyError, ValueError):
        return (), {}
    if isinstance(positional, list | tuple) and isinstance(named, Mapping):
        return tuple(positional), named
    return (), {}


_CONNECT_TIMEOUT_OF: Mapping[str, str] = {
    "psycopg2": "connect_timeout",
    "psycopg": "connect_timeout",
    "psycopg_async": "connect_timeout",
    "MySQLdb": "connect_timeout",
    "pymysql": "connect_timeout",
    "aiomysql": "connect_timeout",
    "asyncmy": "connect_timeout",
    "asyncpg": "timeout",
}


def pass_connect_timeout(pool: Pool, seconds: float) -> None:
    """Pass ``connect_timeout`` to a driver that knows it, unless the user did."""
    dialect = cast(Any, pool._dialect)
    # a driver for asyncio stands behind an adapter without a name of its own
    is_async = getattr(dialect, "is_async", False) is True
    owner, name = (dialect, "driver") if is_async else (getattr(dialect, "dbapi", None), "__name__")
    argument = _CONNECT_TIMEOUT_OF.get(getattr(owner, name, ""))
    if argument is None:
        return
    whole_seconds = max(1, ceil(seconds))

    def add_timeout(_dialect: Any, _record: Any, _args: list[Any], named: dict[str, Any]) -> None:
        named.setdefault(argument, whole_seconds)

    event.listen(dialect, "do_connect", add_timeout)


def database_name(pool: Pool) -> str:
    """Return ``host:port/database`` as far as the connect arguments tell, else the driver."""
    positional, named = connect_arguments(cast(Any, pool)._creator)
    dialect = pool._dialect
    kind = getattr(dialect, "name", None)
    if kind == "sqlite" and positional:
        # what follows may be the key of an encrypted file
        path = str(positional[0]).partition("?")[0]
        return os.path.basename(path).removeprefix("file:") or "sqlite"
    host = named.get("host")
    database = named.get("dbname") or named.get("database") or named.get("db")
    port = named.get("port")
    if isinstance(host, str) and host:
        address = f"{host}:{port}" if port else host
        return f"{address}/{database}" if database else address
    if isinstance(database, str) and database:
        return database
    if isinstance(kind, str):
        driver = getattr(dialect, "driver", None)
        return f"{kind}+{driver}" if isinstance(driver, str) else kind
    return "pool"


def public_words(pool: Pool) -> set[str]:
    """Return the words of the connect arguments that an error may quote: no secrets."""
    _, named = connect_arguments(cast(Any, pool)._creator)
    names = ("host", "hostaddr", "port", "dbname", "database", "db", "user")
    words = {str(named[name]) for name in names if named.get(name)}
    return words | {"127.0.0.1", "::1"}


def why_unsuitable(pool: Pool) -> str | None:
    """Return in a sentence why connections of this driver cannot be pooled for threads."""
    dialect = cast(Any, pool._dialect)
    if getattr(dialect, "name", None) != "sqlite":
        return None
    positional, named = connect_arguments(cast(Any, pool)._creator)
    if not positional:
        return None
    database = str(positional[0])
    if database in ("", ":memory:") or "mode=memory" in database or ":memory:" in database:
        per_thread = "" if dialect.is_async else "or SingletonThreadPool (one per thread) "
        return (
            "an in-memory SQLite database lives in one connection, so a pool of several would be "
            "several databases; use poolclass=StaticPool (one connection shared by all) "
            f"{per_thread}from sqlalchemy.pool, or a database file"
        )
    if named.get("check_same_thread", True) is True and "check_same_thread" in named:
        return (
            "check_same_thread=True ties each SQLite connection to the thread that opened it; "
            "use poolclass=SingletonThreadPool from sqlalchemy.pool, or leave that argument out"
        )
    return None
