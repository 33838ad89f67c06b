"""The stub for asyncio: a database whose every call awaits, and may be slow, fail or hang."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from sqlalchemy.dialects import registry
from sqlalchemy.util import await_only

from tests.pool.stub import Connection, Database, Disconnected, Error, StubDialect

__all__ = ["URL", "AsyncConnection", "AsyncDatabase", "AsyncStubDialect", "Gate"]

URL = "asyncstub://joe:canary@db.example:5433/shop"

registry.register("asyncstub", "tests.pool.async_stub", "AsyncStubDialect")


class AsyncConnection(Connection):
    """A connection as SQLAlchemy's adapters make them: plain methods that await inside."""

    database: AsyncDatabase

    def cursor(self) -> Any:
        cursor = super().cursor()
        cursor.execute = lambda *args: self._visit("execute")
        return cursor

    def close(self) -> None:
        """Close; a close that is cancelled, unlike one that fails, leaves the socket open."""
        try:
            self.database.visit("close")
        except Exception:
            self.database.disconnected(self)
            raise
        self.database.disconnected(self)

    def get_extra_info(self, name: str) -> None:
        """Lose the socket: it is asked for where a connection is let go without its loop."""
        self.database.abandoned.append(self)
        self.database.disconnected(self)


class AsyncDatabase(Database):
    """Lets ``act`` delay or fail whatever is asked of it, after a turn of the loop at least.

    :param act: called with ``"connect"``, ``"ping"``, ``"reset"``, ``"commit"``, ``"execute"`` or
        ``"close"``; what it returns is awaited.
    """

    connection_class = AsyncConnection
    act: Callable[[str], Awaitable[None] | None]

    def __init__(self, act: Callable[[str], Any] = lambda site: None, **kw: Any) -> None:
        super().__init__(act, **kw)
        self.abandoned: list[AsyncConnection] = []

    def _let_act(self, site: str) -> None:
        await_only(self._act(site))

    async def _act(self, site: str) -> None:
        await asyncio.sleep(0)
        doing = self.act(site)
        if doing is not None:
            await doing

    @property
    def module(self) -> Any:
        """The DBAPI module."""
        return SimpleNamespace(**{**vars(super().module), "__name__": "asyncstub"})


class AsyncStubDialect(StubDialect):
    """SQLAlchemy's way to the stub."""

    name = "asyncstub"
    driver = "asyncstub"
    is_async = True
    supports_statement_cache = True

    def is_disconnect(self, e: BaseException, connection: Any, cursor: Any) -> bool:
        return isinstance(e, Disconnected)


class Gate:
    """An ``act`` that holds everybody up who comes to one site, until it is opened.

    :param passing: so many pass before anybody is held up.
    :param error: what those get who were held up.
    """

    def __init__(self, site: str, *, passing: int = 0, error: Error | None = None) -> None:
        self.site = site
        self.passing = passing
        self.error = error
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()

    def __call__(self, site: str) -> Awaitable[None] | None:
        if site != self.site:
            return None
        self.passing -= 1
        return self._hold_up() if self.passing < 0 else None

    async def _hold_up(self) -> None:
        self.begun.set()
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
