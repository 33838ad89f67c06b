"""A database that does as it is told: a driver after PEP 249, and a dialect to go with it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy
from sqlalchemy.dialects import registry
from sqlalchemy.engine.default import DefaultDialect

from ..errors import ArgumentError

__all__ = ["FakeConnection", "FakeCursor", "FakeDBAPI", "FakeDialect"]

SITES = ("connect", "execute", "ping", "rollback", "commit", "close")

registry.register("fakedb", __name__, "FakeDialect")


class Warning(Exception):
    """What the driver warns with; nothing here raises it."""


class Error(Exception):
    """What the driver raises."""


class InterfaceError(Error):
    """The driver was used wrongly."""


class DatabaseError(Error):
    """The server refused something."""


class OperationalError(DatabaseError):
    """The server, or the way to it, is in trouble."""


class ServerGone(OperationalError):
    """The connection is lost: a disconnect to SQLAlchemy."""


class ProgrammingError(DatabaseError):
    """The statement makes no sense."""


class IntegrityError(DatabaseError):
    """The data would contradict each other."""


class DataError(DatabaseError):
    """A value is impossible."""


class InternalError(DatabaseError):
    """The server is confused."""


class NotSupportedError(DatabaseError):
    """The server cannot do that."""


@dataclass(slots=True)
class _Order:
    """What is to happen at one site, so many times; None for ever."""

    site: str
    seconds: float
    error: Callable[[], BaseException] | None
    times: int | None


@dataclass(frozen=True, slots=True)
class _Answer:
    """The rows that a statement brings."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


_ONE = _Answer(("one",), ((1,),))


class FakeCursor:
    """A cursor; a SELECT brings what :meth:`FakeDBAPI.answer` was told, else one row with 1."""

    arraysize = 1
    lastrowid = None

    def __init__(self, connection: FakeConnection) -> None:
        self._connection = connection
        self._rows: list[tuple[Any, ...]] = []
        self.description: tuple[tuple[Any, ...], ...] | None = None
        self.rowcount = -1

    def execute(self, statement: str, parameters: Any = ()) -> None:  # noqa: ARG002 - PEP 249
        """Run a statement."""
        self._connection.visit("execute")
        answer = self._connection.database.answer_to(statement)
        self._rows = [] if answer is None else list(answer.rows)
        self.rowcount = 1 if answer is None else len(self._rows)
        self.description = None
        if answer is not None:
            self.description = tuple((name, *[None] * 6) for name in answer.columns)

    def executemany(self, statement: str, parameters: Sequence[Any]) -> None:
        """Run a statement for each of the parameters."""
        for each in parameters:
            self.execute(statement, each)
        self.rowcount = len(parameters)

    def fetchone(self) -> tuple[Any, ...] | None:
        """Return the next row, None if there is none."""
        return self._rows.pop(0) if self._rows else None

    def fetchmany(self, size: int | None = None) -> list[tuple[Any, ...]]:
        """Return so many rows."""
        count = self.arraysize if size is None else size
        taken, self._rows = self._rows[:count], self._rows[count:]
        return taken

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return the rows that are left."""
        taken, self._rows = self._rows, []
        return taken

    def close(self) -> None:
        """Forget the rows."""
        self._rows = []


class FakeConnection:
    """A connection of a :class:`FakeDBAPI`."""

    def __init__(self, database: Any, number: int) -> None:
        self.database = database
        self.number = number
        """The first one of a database has 1."""
        self.is_closed = False
        self.is_dead = False

    def __repr__(self) -> str:
        state = " closed" if self.is_closed else " dead" if self.is_dead else ""
        return f"<{type(self).__name__.removeprefix('Fake')} {self.number}{state}>"

    def kill(self) -> None:
        """Have the server cut it off: whoever uses it finds out, ``close()`` excepted."""
        self.is_dead = True

    def visit(self, site: str) -> None:
        """Have done at ``site`` what the database was told to do there.

        :raises ServerGone: if this connection was closed, or killed.
        """
        if self.is_closed or self.is_dead:
            state = "closed" if self.is_closed else "lost"
            raise ServerGone(f"{site} on a connection that is {state}")
        self.database.visit(site)

    def cursor(self) -> Any:
        """Return a cursor."""
        return FakeCursor(self)

    def ping(self) -> bool:
        """Return True if the server is there."""
        self.visit("ping")
        return True

    def rollback(self) -> None:
        """End the transaction."""
        self.visit("rollback")

    def commit(self) -> None:
        """End the transaction for good."""
        self.visit("commit")

    def close(self) -> None:
        """Close; also where that fails, the connection is gone."""
        try:
            if not self.is_closed:
                self.database.visit("close")
        finally:
            self.database.disconnected(self)


class FakeDBAPI:
    """A database and its driver that do as they are told, for tests of what goes wrong.

    Each is a DBAPI module by itself, with a dialect of its own::

        fake = FakeDBAPI()
        engine = fake.create_engine(poolclass=ManagedPool)

    Then let it misbehave: at the sites ``connect``, ``execute``, ``ping``, ``rollback``, ``commit``
    and ``close`` with :meth:`fail` and :meth:`slow`, and to connections that are open with
    :meth:`kill`.  What was asked of it is in ``visits`` and ``statements``, what it made in
    ``connections``.  Any thread may use it.

    :param act: called with each site, after the orders; may raise, or wait for your test.
    """

    apilevel = "2.0"
    threadsafety = 2
    paramstyle = "qmark"
    url = "fakedb://app@fake.example/app"
    connection_class: type[FakeConnection] = FakeConnection

    Warning = Warning
    Error = Error
    InterfaceError = InterfaceError
    DatabaseError = DatabaseError
    OperationalError = OperationalError
    ServerGone = ServerGone
    ProgrammingError = ProgrammingError
    IntegrityError = IntegrityError
    DataError = DataError
    InternalError = InternalError
    NotSupportedError = NotSupportedError

    def __init__(self, act: Callable[[str], Any] = lambda site: None) -> None:  # noqa: ARG005
        self.act = act
        self.connections: list[Any] = []
        """Every one there ever was."""
        self.visits: Counter[str] = Counter()
        """How often each site was called."""
        self.statements: list[str] = []
        """What was executed, in order."""
        self._orders: list[_Order] = []
        self._answers: list[tuple[str, _Answer]] = []
        self._lock = threading.RLock()  # the garbage collector may close a connection meanwhile

    def create_engine(self, **settings: Any) -> sqlalchemy.Engine:
        """Return an engine on this database; the settings are those of SQLAlchemy's function."""
        return sqlalchemy.create_engine(self.url, module=self, **settings)

    @property
    def open(self) -> list[Any]:
        """The connections that are not closed."""
        return [connection for connection in self.connections if not connection.is_closed]

    # -- what the test says --------------------------------------------------------------------

    def fail(
        self,
        site: str,
        error: BaseException | type[BaseException] | None = None,
        *,
        times: int | None = None,
    ) -> None:
        """Have calls at ``site`` fail, so many times, or until :meth:`heal`.

        :param error: what they raise; without it an ``OperationalError``.
        """
        make: Callable[[], BaseException]
        if isinstance(error, BaseException):
            # without the traceback of the last time, which holds the frames of its caller
            make = partial(error.with_traceback, None)
        elif error is None:
            make = partial(OperationalError, f"{site} failed, as it was told to")
        else:
            make = error
        self._order(_Order(site, 0.0, make, times))

    def slow(self, site: str, seconds: float, *, times: int | None = None) -> None:
        """Have calls at ``site`` take so long, so many times, or until :meth:`heal`."""
        self._order(_Order(site, seconds, None, times))

    def kill(self) -> None:
        """Cut off every open connection, as a restart of the server does; new ones are fine."""
        for connection in self.open:
            connection.kill()

    def heal(self) -> None:
        """Forget what was to fail or to be slow; connections that were killed stay dead."""
        with self._lock:
            self._orders.clear()

    def answer(
        self, words: str, rows: Sequence[Sequence[Any]], columns: Sequence[str] | None = None
    ) -> None:
        """Have each statement that contains these words bring these rows; the last one counts."""
        width = len(rows[0]) if rows else 1
        names = columns or [f"column_{number}" for number in range(1, width + 1)]
        with self._lock:
            self._answers.append((words, _Answer(tuple(names), tuple(map(tuple, rows)))))

    def _order(self, order: _Order) -> None:
        if order.site not in SITES:
            raise ArgumentError(f"{order.site!r} is no site; there are {', '.join(SITES)}")
        with self._lock:
            self._orders.append(order)

    # -- what SQLAlchemy asks ------------------------------------------------------------------

    def connect(self, *_arguments: Any, **_named: Any) -> Any:
        """Open a connection."""
        self.visit("connect")
        with self._lock:
            connection = self.connection_class(self, len(self.connections) + 1)
            self.connections.append(connection)
            return connection

    def answer_to(self, statement: str) -> _Answer | None:
        """Note a statement; return the rows it brings, None if it brings none."""
        with self._lock:
            self.statements.append(statement)
            for words, answer in reversed(self._answers):
                if words in statement:
                    return answer
        return _ONE if statement.lstrip().upper().startswith("SELECT") else None

    def disconnected(self, connection: FakeConnection) -> None:
        """Note that a connection is closed."""
        connection.is_closed = True

    def visit(self, site: str) -> None:
        """Count a call, and do what was ordered for it."""
        with self._lock:
            self.visits[site] += 1
        self._let_act(site)

    def _let_act(self, site: str) -> None:
        with self._lock:
            due = [order for order in self._orders if order.site == site]
            for order in due:
                if order.times is not None:
                    order.times -= 1
            self._orders = [order for order in self._orders if order.times != 0]
        for order in due:
            if order.seconds:
                time.sleep(order.seconds)
        for order in due:
            if order.error is not None:
                raise order.error()
        self.act(site)


class FakeDialect(DefaultDialect):
    """SQLAlchemy's way to a :class:`FakeDBAPI`."""

    name = "fakedb"
    driver = "fakedb"
    supports_statement_cache = True

    def do_ping(self, dbapi_connection: Any) -> bool:
        """Ping the server."""
        return bool(dbapi_connection.ping())

    def is_disconnect(self, e: BaseException, connection: Any, cursor: Any) -> bool:  # noqa: ARG002
        """Tell whether an error means that the connection is lost."""
        return isinstance(e, ServerGone)
