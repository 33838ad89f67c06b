"""Let go of asyncio connections without the help of their event loop, one adapter per driver.

A connection that was dropped unreturned, or whose loop is closed, cannot be closed in the ordinary
way: that would need its loop.  Its socket has to go all the same, or the server would keep the
session.  ``tests/pool/test_abandon.py`` tries each adapter on the real driver.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["abandon", "native_connection"]


def native_connection(dbapi_connection: Any) -> Any:
    """Return the driver's own connection behind SQLAlchemy's adapter for asyncio."""
    return getattr(dbapi_connection, "driver_connection", dbapi_connection)


def abandon(dbapi_connection: Any) -> None:
    """End a connection of an asyncio driver from any thread, whether its loop runs or not."""
    native = native_connection(dbapi_connection)
    driver = type(native).__module__.partition(".")[0]
    _ADAPTERS.get(driver, _abandon_unknown)(native)


def _abandon_asyncpg(native: Any) -> None:
    loop = native._loop
    transport = native._transport
    if not loop.is_closed():
        # the transport is the loop's, so that is who has to abort it; the server shall know now
        _shut_down(transport.get_extra_info("socket"))
        with contextlib.suppress(RuntimeError):  # it was closed this very moment
            loop.call_soon_threadsafe(native.terminate)
        return
    native._aborted = True  # or its __del__ would warn of what is done here
    native._protocol = None
    _end_transport(transport)


def _end_transport(transport: Any) -> None:
    """Close the socket of a transport whose loop is closed."""
    # TLS stands on a transport of its own
    tls = getattr(transport, "_ssl_protocol", None)
    plain = getattr(tls, "_transport", None) or transport
    _shut_down(plain.get_extra_info("socket"))
    own_socket = getattr(plain, "_sock", None)
    if own_socket is not None:
        own_socket.close()
        plain._sock = None  # or its __del__ would warn
    if tls is not None:
        transport._closed = True


def _abandon_psycopg(native: Any) -> None:
    native.pgconn.finish()  # needs no loop


def _abandon_aiosqlite(native: Any) -> None:
    # what its stop() does, but for the future that it would make on whatever loop there is
    sentinel = getattr(sys.modules["aiosqlite.core"], "_STOP_RUNNING_SENTINEL", None)

    def close() -> object:
        connection, native._connection = native._connection, None
        if connection is not None:
            connection.close()
        return sentinel

    native._running = False
    native._tx.put_nowait((None, close))


def _abandon_unknown(native: Any) -> None:
    """Shut down what looks like the socket of a connection."""
    for owner in (native, getattr(native, "_writer", None), getattr(native, "transport", None)):
        get_extra_info = getattr(owner, "get_extra_info", None)
        if get_extra_info is not None:
            _shut_down(get_extra_info("socket"))
            return


def _shut_down(end: Any) -> None:
    """Shut a socket down; its owner still has to close it."""
    if end is None:
        return
    descriptor = end.fileno()
    if descriptor < 0:
        return
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


_ADAPTERS: dict[str, Callable[[Any], None]] = {
    "asyncpg": _abandon_asyncpg,
    "psycopg": _abandon_psycopg,
    "aiosqlite": _abandon_aiosqlite,
}
