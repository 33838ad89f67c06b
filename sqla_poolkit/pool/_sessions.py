"""What a holder leaves behind in a session, and how it is cleared away before the next one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..errors import ArgumentError
from ._abandon import native_connection
from ._sqlalchemy import await_only

__all__ = ["SessionCleaner", "session_cleaner"]

SessionCleaner = Callable[[Any], object]
"""Clears away what a holder left behind, given the DBAPI connection; raises if that fails."""

# DISCARD ALL less what would throw away the plans that drivers rely on
_CLEAN = (
    "SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL; "
    "RESET SESSION AUTHORIZATION; DISCARD TEMP; DISCARD SEQUENCES"
)
_DISCARD_ALL = "DISCARD ALL"


def session_cleaner(session_reset: Any, dialect: Any) -> SessionCleaner | None:
    """Return what ``session_reset`` means for this database; None if a rollback is all.

    :raises sqlalchemy.exc.ArgumentError: if it means nothing there.
    """
    if callable(session_reset):
        if inspect.iscoroutinefunction(session_reset):
            raise ArgumentError(
                "session_reset= must be a plain function, also with asyncio: give one that calls "
                "the DBAPI connection's cursor().execute(), which SQLAlchemy awaits inside"
            )
        cleaner: SessionCleaner = session_reset
        return cleaner
    if session_reset == "rollback":
        return None
    name, driver = getattr(dialect, "name", None), getattr(dialect, "driver", None)
    if name != "postgresql":
        raise ArgumentError(
            f"session_reset={session_reset!r} is for PostgreSQL; for this database give a function "
            "that resets the session of the DBAPI connection it is called with"
        )
    if session_reset == "discard_all" and driver == "asyncpg":
        raise ArgumentError(
            "session_reset='discard_all' would break asyncpg, whose prepared statements it throws "
            "away; use session_reset='clean', which leaves them and resets all the rest"
        )
    statements = _CLEAN if session_reset == "clean" else _DISCARD_ALL
    run = _run_asyncpg if driver == "asyncpg" else _run
    return lambda connection: run(connection, statements)


def _run(connection: Any, statements: str) -> None:
    """Run statements outside of any transaction, in one round trip."""
    was_autocommit = connection.autocommit
    connection.autocommit = True
    try:
        cursor = connection.cursor()
        try:
            cursor.execute(statements)
        finally:
            cursor.close()
    finally:
        connection.autocommit = was_autocommit


def _run_asyncpg(connection: Any, statements: str) -> None:
    # SQLAlchemy's adapter would prepare this, which is one statement at a time
    await_only(native_connection(connection).execute(statements))
