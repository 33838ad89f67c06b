"""Whether an idle connection is still alive: a look at its socket, then a ping.

An idle connection has nothing to say.  A socket that is readable or hung up means that the server
closed it, or sent something that only a round trip can explain; then the connection is pinged.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from typing import Any, Literal

from ._abandon import native_connection

__all__ = [
    "Look",
    "Probe",
    "busy_check_for",
    "cut_off",
    "lay_dead",
    "probe_for",
    "rest_check_for",
]

Look = Literal["alive", "suspect", "dead"]
Probe = Callable[[], Look]
"""Tells without a round trip what the connection looks like."""


_CAN_POLL = hasattr(select, "poll")
_HUNG_UP: int = getattr(select, "POLLRDHUP", 0)  # Linux
_ENDED = (_HUNG_UP | select.POLLHUP | select.POLLERR | select.POLLNVAL) if _CAN_POLL else 0


def _fileno(native: Any) -> Any:
    return native.fileno()


def _fileno_of_asyncpg(native: Any) -> Any:
    return native._transport.get_extra_info("socket").fileno()  # noqa: SLF001 - there is no other way


def _fileno_of_pymysql(native: Any) -> Any:
    return native._sock.fileno()  # noqa: SLF001 - as above


def _fileno_of_aiomysql(native: Any) -> Any:
    return native._writer.transport.get_extra_info("socket").fileno()  # noqa: SLF001 - as above


_FILENO_OF: dict[str, Callable[[Any], Any]] = {
    "psycopg2": _fileno,
    "psycopg": _fileno,
    "asyncpg": _fileno_of_asyncpg,
    "pymysql": _fileno_of_pymysql,
    "MySQLdb": _fileno,
    "aiomysql": _fileno_of_aiomysql,
}


def _is_closed_asyncpg(native: Any) -> Any:
    return native.is_closed()


def _is_closed_aiomysql(native: Any) -> Any:
    return native.closed or native._reader.at_eof()  # noqa: SLF001 - as above


_IS_CLOSED_OF: dict[str, Callable[[Any], Any]] = {
    # their loop reads, so the end of the connection may have been read already
    "asyncpg": _is_closed_asyncpg,
    "aiomysql": _is_closed_aiomysql,
}


def _driver_of(native: Any) -> str:
    return type(native).__module__.partition(".")[0]


def _file_descriptor(dbapi_connection: Any) -> int | None:
    """Return the descriptor of the connection's socket, None if the driver does not tell."""
    native = native_connection(dbapi_connection)
    find = _FILENO_OF.get(_driver_of(native))
    if find is None:
        return None
    try:
        descriptor = find(native)
    except Exception:  # noqa: BLE001 - each driver has its own error for a closed connection
        return None
    return descriptor if isinstance(descriptor, int) and descriptor >= 0 else None


def probe_for(dbapi_connection: Any) -> Probe | None:
    """Return the probe of this connection, None if its driver has none.

    About a microsecond a call: one ``poll`` with timeout zero.
    """
    descriptor = _file_descriptor(dbapi_connection)
    if descriptor is None or not _CAN_POLL:
        return None
    poller = select.poll()
    poller.register(descriptor, select.POLLIN | select.POLLPRI | _HUNG_UP)
    poll = poller.poll
    native = native_connection(dbapi_connection)
    is_closed = _IS_CLOSED_OF.get(_driver_of(native))

    def look() -> Look:
        if is_closed is not None and is_closed(native):
            return "dead"
        events = poll(0)
        if not events:
            return "alive"
        # data may be a notice or TLS's own; a connection that was ended has nothing to explain
        return "dead" if events[0][1] & _ENDED else "suspect"

    return look


def cut_off(dbapi_connection: Any) -> bool:
    """Shut a connection's socket down under whoever uses it; False if that is not possible.

    A driver that is stuck in C comes back with an error of its own; closing the connection from
    another thread could instead wait for that driver.
    """
    descriptor = _file_descriptor(dbapi_connection)
    if descriptor is None:
        return False
    try:
        with socket.socket(fileno=os.dup(descriptor)) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    return True


def lay_dead(dbapi_connection: Any) -> None:
    """Cover the connection's socket with ``/dev/null``, so that this process cannot use it.

    After a fork the child must neither talk on its parent's sockets nor close them: drivers say
    goodbye when they close, and the server would end the parent's session.
    """
    descriptor = _file_descriptor(dbapi_connection)
    if descriptor is None:
        return
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        os.dup2(nothing, descriptor)
    finally:
        os.close(nothing)


# -- busy, and at rest ----------------------------------------------------------------------


def _is_at_rest_psycopg2(native: Any) -> bool:
    return bool(native.get_transaction_status() == 0)


def _is_at_rest_psycopg(native: Any) -> bool:
    # where it is left open a pipeline keeps answers for the next holder
    is_open = getattr(native.pgconn, "pipeline_status", 0) != 0
    return bool(native.pgconn.transaction_status == 0) and not is_open


def _is_at_rest_asyncpg(native: Any) -> bool:
    return not native.is_in_transaction()


def _is_at_rest_pymysql(native: Any) -> bool:
    return not native.server_status & 1


_AT_REST: dict[str, Callable[[Any], bool]] = {
    "psycopg2": _is_at_rest_psycopg2,
    "psycopg": _is_at_rest_psycopg,
    "asyncpg": _is_at_rest_asyncpg,
    "pymysql": _is_at_rest_pymysql,
    "aiomysql": _is_at_rest_pymysql,
}


def busy_check_for(dbapi_connection: Any) -> Callable[[], bool] | None:
    """Return what tells that a connection is in the middle of what a reset would wait for.

    psycopg locks a connection during a COPY; who returns it then would wait for himself, for ever.
    None where a reset fails by itself.
    """
    native = native_connection(dbapi_connection)
    if _driver_of(native) != "psycopg":
        return None
    is_locked: Callable[[], bool] = native.lock.locked
    return is_locked


def rest_check_for(dbapi_connection: Any) -> Callable[[], bool] | None:
    """Return what tells, without a round trip, that a connection is in no transaction and not busy.

    A rollback does not always end what a holder began: a ``BEGIN`` written out by hand is invisible
    to a driver in autocommit mode.  None where the driver does not tell.
    """
    native = native_connection(dbapi_connection)
    is_at_rest = _AT_REST.get(_driver_of(native))
    if is_at_rest is None:
        return None

    def look() -> bool:
        try:
            return is_at_rest(native)
        except Exception:  # noqa: BLE001 - each driver has its own error for a closed connection
            return False

    return look
