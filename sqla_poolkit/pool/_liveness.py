"""Whether an idle connection is still alive: a look at its socket, then a ping.

An idle connection has nothing to say.  A socket that is readable or hung up means that the server
closed it, or sent something that only a round trip can explain; then the connection is pinged.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from typing import Any

from ._abandon import native_connection

__all__ = ["Probe", "cut_off", "lay_dead", "probe_for"]

Probe = Callable[[], bool]
"""Answers without a round trip whether the connection looks alive."""


def _fileno(native: Any) -> Any:
    return native.fileno()


def _fileno_of_asyncpg(native: Any) -> Any:
    return native._transport.get_extra_info("socket").fileno()  # noqa: SLF001 - there is no other way


_FILENO_OF: dict[str, Callable[[Any], Any]] = {
    "psycopg2": _fileno,
    "psycopg": _fileno,
    "asyncpg": _fileno_of_asyncpg,
}


def _file_descriptor(dbapi_connection: Any) -> int | None:
    """Return the descriptor of the connection's socket, None if the driver does not tell."""
    native = native_connection(dbapi_connection)
    find = _FILENO_OF.get(type(native).__module__.partition(".")[0])
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
    if descriptor is None or not hasattr(select, "poll"):
        return None
    poller = select.poll()
    poller.register(descriptor, select.POLLIN | select.POLLPRI)
    poll = poller.poll
    is_closed = getattr(native_connection(dbapi_connection), "is_closed", None)
    if is_closed is None:

        def looks_alive() -> bool:
            return not poll(0)

        return looks_alive

    # the loop reads for this driver, so the end of the connection may have been read already
    def is_open() -> bool:
        return not is_closed() and not poll(0)

    return is_open


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
