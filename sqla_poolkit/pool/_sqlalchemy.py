"""Every private name of SQLAlchemy that this package relies on, and nothing else uses them.

``tests/test_sqlalchemy_names.py`` checks each on every supported version.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Callable, Hashable, Mapping
from math import ceil
from typing import Any, TypeVar, cast

import sqlalchemy
from sqlalchemy import event, exc
from sqlalchemy.engine import Connection, Engine, Transaction
from sqlalchemy.engine import base as _engine
from sqlalchemy.engine.util import TransactionalContext
from sqlalchemy.pool import (
    AssertionPool,
    NullPool,
    Pool,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
)
from sqlalchemy.pool import base as _base
from sqlalchemy.pool.base import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from ..core.slots import CloseReason, Slot
from ._liveness import Probe

__all__ = [
    "DIALECT_OF_ASYNCIO",
    "BasePool",
    "ConnectionPoolEntry",
    "Creator",
    "PoolProxiedConnection",
    "Record",
    "allow_terminate",
    "asks_for_invalidation",
    "assign_slot",
    "await_only",
    "can_ping",
    "cancellations",
    "connect_arguments",
    "connection_being_collected",
    "current_greenlet",
    "end_connection",
    "forget_connection",
    "greenlet_spawn",
    "guard_of",
    "guard_resets",
    "has_engine",
    "has_queue",
    "hear_of_connects_first",
    "in_greenlet",
    "is_asyncio",
    "is_being_handled",
    "is_of_driver",
    "is_referenced",
    "is_same_pool",
    "judge_errors",
    "keeps_connect_arguments",
    "leaks_on_cancellation",
    "limit_of",
    "missing_greenlet",
    "pass_connect_timeout",
    "pass_credentials",
    "ping",
    "pool_of",
    "proxy_reference",
    "public_words",
    "reason_to_close",
    "record_of",
    "records_of",
    "refill",
    "release_first_connect",
    "resets_on_return",
    "root_engine",
    "seconds_since_connect",
    "set_adapters",
    "settings_of",
    "share_first_connect",
    "slot_behind",
    "slot_of",
]

Creator = Callable[..., Any]

_frame = sys._getframe  # inspect.currentframe would have to climb frame by frame


class Record(_base._ConnectionRecord):
    """A record that knows which slot of the pool it fills."""

    __slots__ = ("guard", "home", "is_busy", "probe", "slot", "tidy")

    slot: Slot | None

    def __init__(self, pool: Pool) -> None:
        self.slot = None
        self.probe: Probe | None = None
        """Tells without a round trip what the present connection looks like."""
        self.tidy: Callable[[], bool] | None = None
        """Sees to it that the next holder finds the connection as he may; False if it must go."""
        self.is_busy: Callable[[], bool] | None = None
        """Tells that a reset would wait for ever."""
        self.guard: Any = None
        """What limits the time of pings, resets and closes; made by the driver on first use."""
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
            if self.slot is not None and _frame(1).f_code is _FINALIZE:
                self.slot.reason = "reset"
                self.slot.review_at = _AT_ONCE
            elif self.slot is not None and self.dbapi_connection is not None:
                # not under the pool's lock, but only the holder does this, to what it holds
                self.slot.reason = "invalidated"
                self.slot.review_at = _AT_ONCE

    def checkin(self, _fairy_was_created: bool = True) -> None:
        """Return to the pool; without listeners and callbacks that is little."""
        pool = self.home
        proxy = self.fairy_ref
        if proxy is not None and proxy() is None:
            self._note_drop()
        listeners = pool.dispatch.checkin
        if (
            proxy is None
            or self.finalize_callback
            or listeners.listeners
            or listeners.parent_listeners
        ):
            super().checkin(_fairy_was_created)
            return
        self.fairy_ref = None
        pool._return_conn(self)

    def _note_drop(self) -> None:
        """Note that the garbage collector gives the connection back."""
        slot = self.slot
        if slot is not None and slot.reason != "leaked":
            slot.is_dropped = True
            slot.review_at = _AT_ONCE

    def get_connection(self) -> Any:
        """Return the connection, or open one if there is none.

        SQLAlchemy's would compare wall-clock times here, and reconnect in the caller's time.
        Whether a connection may still be handed out is the state machine's to say.
        """
        connection = self.dbapi_connection
        return super().get_connection() if connection is None else connection


_AT_ONCE = float("-inf")
_records = _base._ConnectionRecord


class BasePool(Pool):
    """SQLAlchemy's Pool, told apart by whether anybody listens to ``checkout``."""

    def connect(self) -> PoolProxiedConnection:
        """Return a connection from the pool, as ``Engine.raw_connection`` does."""
        listeners = self.dispatch.checkout
        if listeners.listeners or listeners.parent_listeners:
            return self._connect_heard()
        # what Pool.connect comes to without listeners and without pings of its own
        proxy = _records.checkout(self)  # looked up here, as it can be patched
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


_RESET = _base._ConnectionFairy._reset.__code__
_CHECKOUT = _base._ConnectionRecord.checkout.__func__.__code__  # type: ignore[attr-defined]
_CHECKIN = _base._ConnectionRecord.checkin.__code__
_OWN_CHECKIN = Record.checkin.__code__
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


def set_adapters(
    record: ConnectionPoolEntry,
    probe: Probe | None = None,
    tidy: Callable[[], bool] | None = None,
    is_busy: Callable[[], bool] | None = None,
) -> None:
    """Remember how the present connection of a record is looked at, and tidied up."""
    own = cast(Record, record)
    own.probe = probe
    own.tidy = tidy
    own.is_busy = is_busy


_Guard = TypeVar("_Guard")


def guard_of(record: ConnectionPoolEntry, make: Callable[[], _Guard]) -> _Guard:
    """Return the guard of a record, made on its first use."""
    own = cast(Record, record)
    if own.guard is None:
        own.guard = make()
    guard: _Guard = own.guard
    return guard


def slot_behind(found: object) -> Slot | None:
    """Return the slot of a connection if ``found`` is what its holder has of it."""
    # not isinstance, which would ask the object itself
    if not issubclass(type(found), _base._ConnectionFairy):
        return None
    return getattr(cast(Any, found)._connection_record, "slot", None)


def record_of(proxy: PoolProxiedConnection) -> ConnectionPoolEntry | None:
    """Return the record behind a proxy, None if it was detached."""
    record: ConnectionPoolEntry | None = cast(Any, proxy)._connection_record
    return record


def pool_of(proxy: PoolProxiedConnection) -> Pool:
    """Return the pool that a connection was taken from."""
    pool: Pool = cast(Any, proxy)._pool
    return pool


def proxy_reference(record: ConnectionPoolEntry) -> object:
    """Return what stands for the present checkout of a record; None if it is checked in."""
    return cast(Any, record).fairy_ref


def is_same_pool(pool: Pool, other: Pool) -> bool:
    """Tell whether two pools are one to the program: the same, or made of it by ``recreate()``."""
    return type(pool) is type(other) and cast(Any, pool)._creator is cast(Any, other)._creator


def is_asyncio(pool: Pool) -> bool:
    """Tell whether the connections of a pool belong to event loops."""
    return getattr(pool._dialect, "is_async", False) is True


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
    if code is _CHECKIN or code is _OWN_CHECKIN:
        return frame.f_locals.get("self") is record
    if code is _FINALIZE:
        return frame.f_locals.get("connection_record") is record
    # a caller who was granted this slot and has not returned with it yet
    got = frame.f_locals.get("got") if frame.f_globals.get("__package__") == __package__ else None
    return got is slot or getattr(got, "slot", None) is slot


def can_ping(pool: Pool) -> bool:
    """Tell whether the pool's dialect knows how to ping."""
    dialect = cast(Any, pool._dialect)
    return callable(getattr(dialect, "do_ping", None)) and hasattr(dialect, "dispatch")


def ping(pool: Pool, dbapi_connection: Any) -> bool:
    """Ping through the dialect, ``handle_error`` listeners included; False if disconnected."""
    dialect = cast(Any, pool._dialect)
    if not all(isinstance(listener, _Judge) for listener in dialect.dispatch.handle_error):
        return bool(dialect._do_ping_w_event(dbapi_connection))
    # the same without listeners, whose error is part of a cycle that keeps the caller's frames
    try:
        return bool(dialect.do_ping(dbapi_connection))
    except dialect.loaded_dbapi.Error as error:
        if dialect.is_disconnect(error, dbapi_connection, None):
            return False
        raise


Guarded = Callable[[Any, Callable[[], object]], None]
"""Called with a record and with what resets its connection."""


def guard_resets(pool: Pool, on_return: Guarded, at_the_end: Guarded) -> None:
    """Have resets done by functions that limit their time.

    :param on_return: does the rollback or commit by which the pool resets a returned connection.
    :param at_the_end: does the rollback of a transaction that ends with the use of its connection.
    """
    dialect = cast(Any, pool._dialect)
    for name in ("do_rollback", "do_commit"):
        setattr(dialect, name, _guarded_reset(getattr(dialect, name), on_return, at_the_end))


def _guarded_reset(
    reset: Callable[[Any], object], on_return: Guarded, at_the_end: Guarded
) -> Callable[[Any], None]:
    def reset_within_limit(proxy: Any) -> None:
        frame = _frame(1)
        guarded: Guarded | None = None
        if frame.f_code is _RESET:
            guarded = on_return
        elif frame.f_code is _ROLLBACK and _ends_use(frame):
            guarded = at_the_end
        record = None if guarded is None else proxy._connection_record
        if guarded is None or record is None or record.probe is None:
            # the application's own, which may take as long as it takes; or nothing can be cut off
            reset(proxy)
        else:
            guarded(record, lambda: reset(proxy))

    return reset_within_limit


_ROLLBACK = _engine.Connection._rollback_impl.__code__
_CLOSE_TRANSACTION = Transaction.close.__code__
_ROLL_TRANSACTION_BACK = Transaction.rollback.__code__
_CLOSE = Connection.close.__code__
_EXIT = TransactionalContext.__exit__.__code__
_BEGIN = cast(Any, Engine.begin).__wrapped__.__code__
_SESSION = os.path.join("sqlalchemy", "orm", "session.py")

# _rollback_impl -> _connection_rollback_impl -> _close_impl -> _do_close -> Transaction.close
_FRAMES_OF_A_ROLLBACK = 5


def _ends_use(frame: Any) -> bool:
    """Tell whether a ROLLBACK is the last thing that is asked of a connection before its return.

    It is in ``Connection.close()``, at the end of a session, and where an error ends the block of
    ``engine.begin()``.
    """
    for _ in range(_FRAMES_OF_A_ROLLBACK):
        code, frame = frame.f_code, frame.f_back
        if frame is None:
            return False
        caller = frame.f_code
        if code is _CLOSE_TRANSACTION:
            return caller is _CLOSE or _is_end_of_session(frame)
        if code is _ROLL_TRANSACTION_BACK:
            return caller is _EXIT and frame.f_back is not None and frame.f_back.f_code is _BEGIN
    return False


def _is_end_of_session(frame: Any) -> bool:
    """Tell whether this is a session that closes, and returns its connection right after."""
    code = frame.f_code
    is_close = code.co_name == "close" and code.co_filename.endswith(_SESSION)
    return is_close and frame.f_locals.get("autoclose") is True


def pass_credentials(pool: Pool, supply: Callable[[], Mapping[str, Any]]) -> None:
    """Have each connect use what ``supply`` returns at that moment."""

    def add_credentials(
        _dialect: Any, _record: Any, _args: list[Any], named: dict[str, Any]
    ) -> None:
        named.update(supply())

    event.listen(cast(Any, pool._dialect), "do_connect", add_credentials)


def resets_on_return(pool: Pool) -> bool:
    """Tell whether SQLAlchemy rolls a connection back, or commits, when it is returned."""
    return cast(Any, pool)._reset_on_return is not _base.reset_none


def judge_errors(pool: Pool, evicts: Callable[[BaseException], bool]) -> None:
    """Have SQLAlchemy take further errors of statements for the loss of their connection."""
    event.listen(cast(Any, pool._dialect), "handle_error", _Judge(evicts))


class _Judge:
    """A ``handle_error`` listener that takes some errors for the loss of their connection."""

    def __init__(self, evicts: Callable[[BaseException], bool]) -> None:
        self._evicts = evicts

    def __call__(self, context: Any) -> None:
        if not context.is_disconnect and self._evicts(context.original_exception):
            context.is_disconnect = True


# -- pools of SQLAlchemy's own -----------------------------------------------------------------


def root_engine(engine: Engine) -> Engine:
    """Return the engine whose pool this one shares, ``engine.execution_options()``."""
    while (proxied := getattr(engine, "_proxied", None)) is not None:
        engine = proxied
    return engine


def records_of(pool: Pool) -> list[ConnectionPoolEntry]:
    """Return all records of a pool, those in use too, which only the collector knows of."""
    return [
        cast(ConnectionPoolEntry, each)
        for each in gc.get_referrers(pool)
        if isinstance(each, _base._ConnectionRecord)
    ]


def seconds_since_connect(record: ConnectionPoolEntry, wall_clock: float) -> float:
    """Return how long ago a record began to connect, by the wall clock that SQLAlchemy goes by."""
    began_at: float = cast(Any, record).starttime
    return max(0.0, wall_clock - began_at)


def keeps_connect_arguments(pool: Pool) -> bool:
    """Tell whether ``create_engine`` made the creator, so that ``do_connect`` is fired."""
    return connect_arguments(cast(Any, pool)._creator) != ((), {})


def hear_of_connects_first(engine: Engine) -> None:
    """Have the ``do_connect`` listener that was added last called before those that may raise.

    For this event ``insert=True`` is ignored.
    """
    cast(Any, engine.dialect.dispatch).do_connect.listeners.rotate(1)


def has_queue(pool: Pool) -> bool:
    """Tell whether callers may have to wait for this pool."""
    return not isinstance(pool, NullPool | StaticPool | SingletonThreadPool | AssertionPool)


def settings_of(pool: Pool) -> dict[str, Any]:
    """Return what one of SQLAlchemy's own pools was told."""
    settings: dict[str, Any] = {}
    if isinstance(pool, QueuePool):
        settings = {
            "pool_size": pool.size(),
            "max_overflow": pool._max_overflow,
            "timeout": pool._timeout,
            "use_lifo": pool._pool.use_lifo,
        }
    return {**settings, "recycle": pool._recycle, "pre_ping": pool._pre_ping}


def limit_of(pool: Pool) -> int | None:
    """Return how many connections one of SQLAlchemy's own pools may have; None if no limit."""
    if isinstance(pool, QueuePool):
        return None if pool._max_overflow == -1 else pool.size() + pool._max_overflow
    if isinstance(pool, SingletonThreadPool):
        return pool.size
    return 1 if isinstance(pool, StaticPool | AssertionPool) else None


_GET_CONNECTION = _base._ConnectionRecord.get_connection.__code__
_INVALIDATE = _base._ConnectionRecord.invalidate.__code__
_REASONS: Mapping[str, CloseReason] = {
    "_do_return_conn": "overflow",
    "_cleanup": "overflow",
    "dispose": "disposed",
}

# the listener -> __call__ -> __close -> close -> what wants it closed
_FRAMES_OF_A_CLOSE = 5


def reason_to_close(record: ConnectionPoolEntry, recycle: float, wall_clock: float) -> CloseReason:
    """Return why a record closes its connection; to be called by a ``close`` listener itself."""
    frame: Any = _frame(2)
    for _ in range(_FRAMES_OF_A_CLOSE):
        if frame is None:
            break
        code = frame.f_code
        if code is _INVALIDATE:
            caller = frame.f_back
            is_reset = caller is not None and caller.f_code is _FINALIZE
            return "reset" if is_reset else "invalidated"
        if code is _GET_CONNECTION:
            is_old = -1 < recycle < seconds_since_connect(record, wall_clock)
            return "age" if is_old else "invalidated"
        if code.co_name in _REASONS:
            return _REASONS[code.co_name]
        frame = frame.f_back
    return "closed"


def asks_for_invalidation(error: BaseException | None) -> bool:
    """Tell whether a ``checkout`` listener wants the whole pool invalidated."""
    return isinstance(error, exc.DisconnectionError) and error.invalidate_pool


def has_engine(pool: Pool) -> bool:
    """Tell whether a dialect of its own stands behind this pool: ``create_engine`` made it."""
    return not isinstance(pool._dialect, _base._ConnDialect)


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
    host = _without_secrets(named.get("host"))
    database = _without_secrets(named.get("dbname") or named.get("database") or named.get("db"))
    port = named.get("port")
    if host:
        address = f"{host}:{port}" if port else host
        return f"{address}/{database}" if database else address
    if database:
        return database
    if isinstance(kind, str):
        driver = getattr(dialect, "driver", None)
        return f"{kind}+{driver}" if isinstance(driver, str) else kind
    return "pool"


def _without_secrets(word: object) -> str:
    """Return a word of the connect arguments as far as anybody may see it.

    An ``@`` in a password that was not escaped makes the rest of it a part of the host; and where a
    database is named a driver may take a whole URL or ``name=value ...``.
    """
    last = str(word or "").rpartition("@")[2]
    return "" if "=" in last or "://" in last else last


def public_words(pool: Pool) -> set[str]:
    """Return the words of the connect arguments that an error may quote: no secrets."""
    _, named = connect_arguments(cast(Any, pool)._creator)
    names = ("host", "hostaddr", "port", "dbname", "database", "db", "user")
    words = {_without_secrets(named.get(name)) for name in names} - {""}
    return words | {"127.0.0.1", "::1"}


def is_of_driver(pool: Pool, error: BaseException) -> bool:
    """Tell whether an error is the driver's or the system's, and not the application's own."""
    if isinstance(error, exc.SQLAlchemyError):
        return True
    if isinstance(error, OSError | asyncio.TimeoutError):
        # what fetches a token derives its errors from these, and may quote it
        return type(error).__module__ in ("builtins", "socket", "ssl", "asyncio.exceptions")
    # PEP 249: the base of all that a driver raises; asyncpg, behind its adapter, has its own
    if any(kind.__name__ == "Error" for kind in type(error).__mro__):
        return True
    driver = str(getattr(pool._dialect, "driver", "")).partition("_")[0]
    return type(error).__module__.partition(".")[0] == driver


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
