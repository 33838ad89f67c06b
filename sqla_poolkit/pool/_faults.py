"""What a driver's error says about the database, by its SQLSTATE or, failing that, its words."""

from __future__ import annotations

import copy
from collections.abc import Collection

from ..config import CONNECTION_STATES
from ..core.slots import ConnectFault

__all__ = [
    "connect_fault",
    "evicts",
    "is_of_the_application",
    "is_read_only",
    "keepsake",
    "sqlstate",
]

_READ_ONLY = "25006"
_OUT_OF_STEP = "cannot switch to state"  # asyncpg, between the server's last words and the end
_DENIED = ("28P01", "28000")
_CONGESTED = ("53300",)
_SHUTTING_DOWN = ("57P01", "57P02", "57P03")
_MYSQL: dict[int, ConnectFault] = {
    1040: "congestion",  # too many connections
    1203: "congestion",  # too many connections of this user
    1226: "congestion",  # a limit of this user
    1045: "authentication",
    1698: "authentication",
    1053: "refused",  # the server shuts down
}
_WORDS: tuple[tuple[str, ConnectFault], ...] = (
    # psycopg2 and psycopg have no code for what happens at connect
    ("too many connections", "congestion"),
    ("too many clients", "congestion"),
    ("remaining connection slots are reserved", "congestion"),
    ("no more connections allowed", "congestion"),
    ("password authentication failed", "authentication"),
    ("no pg_hba.conf entry", "authentication"),
    ("access denied for user", "authentication"),
    ("the database system is starting up", "refused"),
    ("the database system is shutting down", "refused"),
    ("the database system is in recovery mode", "refused"),
    ("connection refused", "refused"),
)


def sqlstate(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of a driver's error, as far as the driver tells."""
    for name in ("sqlstate", "pgcode"):
        state = getattr(error, name, None)
        if isinstance(state, str):
            return state
    return None


def evicts(error: BaseException | None, states: Collection[str]) -> bool:
    """Tell whether a connection that ended a statement with this error must not be used again.

    :param states: SQLSTATEs, or the first two characters for all of a class.
    """
    state = sqlstate(error)
    if state is None:
        return _OUT_OF_STEP in str(error)
    return state in states or state[:2] in states


def is_of_the_application(error: BaseException | None, states: Collection[str]) -> bool:
    """Tell whether a connection is evicted by the application's wish, not by the server's end."""
    return evicts(error, states) and not evicts(error, CONNECTION_STATES)


def is_read_only(error: BaseException | None) -> bool:
    """Tell whether the server takes no writes: it may be a replica since a failover."""
    return sqlstate(error) == _READ_ONLY


def connect_fault(error: BaseException) -> ConnectFault:
    """Return what a failed attempt to connect says."""
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    state = sqlstate(error)
    if state is not None:
        if state in _DENIED:
            return "authentication"
        if state in _CONGESTED:
            return "congestion"
        if state in _SHUTTING_DOWN:
            return "refused"
    number = error.args[0] if error.args else None
    if isinstance(number, int) and number in _MYSQL:
        return _MYSQL[number]
    text = str(error).lower()
    return next((fault for words, fault in _WORDS if words in text), "other")


def keepsake(error: BaseException) -> BaseException:
    """Return a copy of an error without its traceback, to be shown to many callers.

    The frames of a traceback hold connect arguments, and grow with each raise.
    """
    try:
        kept = copy.copy(error)
    except Exception:  # noqa: BLE001 - errors of drivers copy as they like
        kept = ConnectionError(type(error).__name__)
    kept.__traceback__ = kept.__cause__ = kept.__context__ = None
    return kept
