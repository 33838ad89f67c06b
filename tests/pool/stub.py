"""The public fake, with what only our tests want of it: a count of its sockets, and a limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sqla_poolkit.testing.fake import Error, FakeConnection, FakeDBAPI, FakeDialect

__all__ = ["Connection", "Database", "Disconnected", "Error", "Interrupt", "StubDialect"]


class Disconnected(Error):
    """What the driver raises when the server is gone."""


class Interrupt(BaseException):
    """As KeyboardInterrupt: no error of anybody's, but the end of what was going on."""


class Connection(FakeConnection):
    """A connection of the stub, where statements are no business of ``act``."""

    def __init__(self, database: Database, number: int) -> None:
        super().__init__(database, number)
        self.is_private = False

    def rollback(self) -> None:
        self._visit("reset")

    def commit(self) -> None:
        self._visit("commit")

    def ping(self) -> bool:
        self._visit("ping")
        return True

    def cursor(self) -> Any:
        return SimpleNamespace(
            execute=lambda *args: None,
            close=lambda: None,
            fetchone=lambda: (1,),
            fetchall=list,
            description=None,
            rowcount=-1,
            lastrowid=None,
        )

    def close(self) -> None:
        try:
            self.database.visit("close")
        finally:
            self.database.disconnected(self)

    def _visit(self, site: str) -> None:
        if self.is_closed:
            raise Disconnected(f"{site} on a closed connection")
        self.database.visit(site)


class Database(FakeDBAPI):
    """Counts its sockets, and lets ``act`` delay or fail whatever is asked of it.

    :param act: called with ``"connect"``, ``"ping"``, ``"reset"``, ``"commit"`` or ``"close"``.
    :param limit: returns how many sockets there may be at this moment.
    """

    connection_class = Connection

    def __init__(
        self,
        act: Callable[[str], None] = lambda site: None,
        limit: Callable[[], float] = lambda: float("inf"),
    ) -> None:
        super().__init__(act)
        self.limit = limit
        self.sockets = 0
        self.most_sockets = 0
        self.breaches: list[str] = []
        self.busy: Counter[str] = Counter()

    def connect(self, *arguments: Any, **named: Any) -> Connection:
        """Open a connection; a socket counts from the beginning of the attempt."""
        with self._lock:
            self.sockets += 1
            self.most_sockets = max(self.most_sockets, self.sockets)
            if self.sockets > self.limit():
                self.breaches.append(f"{self.sockets} sockets where {self.limit()} are allowed")
        try:
            connection: Connection = super().connect()
        except BaseException:
            with self._lock:
                self.sockets -= 1
            raise
        return connection

    def disconnected(self, connection: Connection) -> None:
        """Count a socket less."""
        with self._lock:
            if not connection.is_closed:
                connection.is_closed = True
                self.sockets -= not connection.is_private

    def keep(self, connection: Connection) -> None:
        """Count a socket less: a caller is about to detach it, so it is no longer the pool's."""
        with self._lock:
            connection.is_private = True
            self.sockets -= not connection.is_closed

    def visit(self, site: str) -> None:
        """Count a call, and let ``act`` have its way."""
        with self._lock:
            self.busy[site] += 1
        try:
            super().visit(site)
        finally:
            with self._lock:
                self.busy[site] -= 1

    @property
    def module(self) -> Any:
        """The DBAPI module."""
        return SimpleNamespace(
            connect=lambda *args, **kw: self.connect(),
            Error=Error,
            paramstyle="qmark",
            threadsafety=2,
            apilevel="2.0",
            __name__="stub",
        )


class StubDialect(FakeDialect):
    """SQLAlchemy's way to the stub."""

    name = "stub"
    driver = "stub"
    supports_statement_cache = True

    @classmethod
    def of(cls, database: Database) -> StubDialect:
        """Return the dialect of this database."""
        return cls(dbapi=database.module)

    def is_disconnect(self, e: BaseException, connection: Any, cursor: Any) -> bool:
        return isinstance(e, Disconnected)
