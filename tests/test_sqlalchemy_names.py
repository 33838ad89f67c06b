"""A canary for each private name of SQLAlchemy: it dies where a release changes what we rely on."""

from __future__ import annotations

import ast
import contextlib
import gc
import inspect
import sqlite3
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, Pool, QueuePool, base

from sqla_poolkit.pool import _sqlalchemy
from tests.pool.stub import Database, Disconnected, Error, Interrupt, StubDialect

FOLDER = Path(_sqlalchemy.__file__).parent
CANARIES: dict[str, str] = {}

# These are names of our own that SQLAlchemy happens to have as well.
OURS_TOO = {"_close", "_pool"}


def canary(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Say which private names a test watches."""

    def watch(test: Callable[..., None]) -> Callable[..., None]:
        CANARIES.update(dict.fromkeys(names, test.__name__))
        return test

    return watch


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def pool(database: Database) -> QueuePool:
    return QueuePool(database.connect, dialect=StubDialect.of(database))


def record_of(proxy: Any) -> Any:
    return proxy._connection_record


# -- records ---------------------------------------------------------------------------------


def test_the_last_listener_to_connects_can_be_made_the_first(tmp_path: Path):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")
    heard: list[str] = []
    for name in ("first", "second"):
        event.listen(engine, "do_connect", lambda *_, name=name: heard.append(name))
    _sqlalchemy.hear_of_connects_first(engine)
    engine.connect().close()
    engine.dispose()
    assert heard == ["second", "first"]


@canary("_ConnectionRecord")
def test_a_record_can_be_subclassed_with_a_slot_and_connects_at_once(
    database: Database, pool: QueuePool
):
    record = _sqlalchemy.Record(pool)
    assert record.slot is None
    assert record.dbapi_connection is database.open[0]
    record.close()
    assert (record.dbapi_connection, database.open) == (None, [])


@canary("_ConnDialect")
def test_a_pool_without_an_engine_has_a_dialect_of_its_own(database: Database, pool: QueuePool):
    assert isinstance(QueuePool(database.connect)._dialect, base._ConnDialect)
    assert not isinstance(pool._dialect, base._ConnDialect)


@canary("_reset")
def test_a_reset_on_return_calls_the_dialect_from_a_function_that_can_be_told(
    database: Database, pool: QueuePool
):
    callers = []

    def look(proxy: Any) -> None:
        callers.append(sys._getframe(1).f_code)

    pool._dialect.do_rollback = look  # type: ignore[method-assign]
    pool.connect().close()
    assert callers == [base._ConnectionFairy._reset.__code__]


@canary("_counter", "_connection_record")
def test_the_checkout_of_a_record_makes_an_uncounted_proxy(pool: QueuePool):
    proxy = base._ConnectionRecord.checkout(pool)
    assert proxy._counter == 0
    assert isinstance(record_of(proxy), base._ConnectionRecord)
    proxy._counter += 1
    proxy.close()
    assert record_of(proxy) is None


def test_a_record_knows_its_proxy_weakly(pool: QueuePool):
    proxy = pool.connect()
    record = record_of(proxy)
    assert isinstance(record.fairy_ref, weakref.ref)
    assert record.fairy_ref() is proxy
    proxy.close()
    assert record.fairy_ref is None


def test_the_reference_to_a_proxy_that_was_dropped_is_dead_while_it_is_returned(
    database: Database, pool: QueuePool
):
    proxy = pool.connect()
    record = record_of(proxy)
    seen = []
    database.act = lambda site: seen.append((site, record.fairy_ref()))
    del proxy
    gc.collect()
    assert seen == [("reset", None)]


def test_who_refers_to_a_proxy_after_its_checkout_is_told_of_its_end_before_sqlalchemy(
    database: Database, pool: QueuePool
):
    proxy = pool.connect()
    record = record_of(proxy)
    checked_out_as = record.fairy_ref
    seen = []
    reference = weakref.ref(proxy, lambda _: seen.append(record.fairy_ref is checked_out_as))
    del proxy
    gc.collect()
    assert (seen, record.fairy_ref, reference()) == ([True], None, None)


@canary("_creator")
def test_a_pool_and_its_successors_share_their_creator(pool: QueuePool, database: Database):
    proxy = pool.connect()
    assert _sqlalchemy.pool_of(proxy) is pool
    assert _sqlalchemy.is_same_pool(pool.recreate().recreate(), pool)
    assert not _sqlalchemy.is_same_pool(QueuePool(Database().connect), pool)
    proxy.close()


def test_an_emptied_record_connects_anew_in_get_connection(database: Database, pool: QueuePool):
    record = base._ConnectionRecord(pool)
    record.close()
    record.get_connection()
    assert record.dbapi_connection is database.open[0]
    assert len(database.connections) == 2


def test_a_record_lets_go_of_its_connection(database: Database, pool: QueuePool):
    record = base._ConnectionRecord(pool)
    record.dbapi_connection = None
    record.close()
    assert database.visits["close"] == 0


def test_a_hard_invalidation_empties_a_record_and_a_soft_one_does_not(pool: QueuePool):
    record = base._ConnectionRecord(pool)
    record.invalidate(soft=True)
    assert record.dbapi_connection is not None
    record.invalidate(Error("gone"))
    assert record.dbapi_connection is None


@canary("_finalize_fairy")
@pytest.mark.parametrize(
    ("function", "local"),
    [
        (base._ConnectionRecord.checkout.__func__, "rec"),
        (base._ConnectionRecord.checkin, "self"),
        (base._finalize_fairy, "connection_record"),
    ],
    ids=["checkout", "checkin", "finalize"],
)
def test_whoever_handles_a_record_has_it_in_a_local_variable(function: Any, local: str):
    code = function.__code__
    assert local in code.co_varnames + code.co_cellvars


# -- proxies and listeners -------------------------------------------------------------------


@canary("_ConnectionFairy", "_checkout")
def test_the_checkout_of_a_proxy_calls_the_listeners(pool: QueuePool):
    heard = []
    event.listen(pool, "checkout", lambda *arguments: heard.append(arguments))
    proxy = base._ConnectionFairy._checkout(pool)
    assert heard == [(proxy.dbapi_connection, record_of(proxy), proxy)]
    proxy.close()


def test_nobody_listens_to_the_checkout_of_a_new_pool(pool: QueuePool):
    listeners = pool.dispatch.checkout
    assert not listeners.listeners
    assert not listeners.parent_listeners


def test_a_listener_of_a_pool_is_among_its_listeners(pool: QueuePool):
    event.listen(pool, "checkout", print)
    assert list(pool.dispatch.checkout.listeners) == [print]


def test_a_listener_of_all_pools_is_among_the_parents_listeners(pool: QueuePool):
    event.listen(Pool, "checkout", print)
    try:
        assert print in pool.dispatch.checkout.parent_listeners
    finally:
        event.remove(Pool, "checkout", print)


@canary("_exec_once_mutex")
def test_the_lock_of_the_first_connect_is_made_when_it_is_not_there(pool: QueuePool):
    event.listen(pool, "connect", lambda *arguments: None)
    pool.connect().close()
    listeners = pool.dispatch.connect
    assert listeners._exec_once_mutex is not None
    listeners._exec_once_mutex = None
    listeners._exec_w_sync_once = False
    pool.dispose()
    pool.connect().close()
    assert listeners._exec_once_mutex is not None


# -- pools -----------------------------------------------------------------------------------


class Told(QueuePool):
    """A pool that tells which of its methods SQLAlchemy calls."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.calls: list[str] = []
        super().__init__(*arguments, **settings)

    def _should_wrap_creator(self, creator: Any) -> Any:
        self.calls.append("_should_wrap_creator")
        return super()._should_wrap_creator(creator)

    def _create_connection(self) -> Any:
        self.calls.append("_create_connection")
        return super()._create_connection()

    def _do_get(self) -> Any:
        self.calls.append("_do_get")
        return super()._do_get()

    def _return_conn(self, record: Any) -> None:
        self.calls.append("_return_conn")
        super()._return_conn(record)

    def _do_return_conn(self, record: Any) -> None:
        self.calls.append("_do_return_conn")
        super()._do_return_conn(record)

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        self.calls.append("_close_connection")
        super()._close_connection(connection, terminate=terminate)

    def _invalidate(self, *arguments: Any, **more: Any) -> None:
        self.calls.append("_invalidate")
        super()._invalidate(*arguments, **more)


@pytest.fixture
def told(database: Database) -> Told:
    return Told(database.connect, dialect=StubDialect.of(database))


@canary("_should_wrap_creator")
def test_a_pool_wraps_its_creator_when_it_is_made(told: Told):
    assert told.calls == ["_should_wrap_creator"]


def test_a_wrapped_creator_is_called_with_the_record(database: Database):
    creator = Told(lambda: database.connect())._should_wrap_creator(database.connect)
    assert creator(None) is database.open[0]


@canary("_do_get", "_return_conn", "_do_return_conn", "_create_connection")
def test_a_checkout_gets_and_a_checkin_returns(told: Told):
    told.calls.clear()
    told.connect().close()
    assert told.calls == ["_do_get", "_create_connection", "_return_conn", "_do_return_conn"]


def test_a_detached_proxy_returns_its_emptied_record_past_return_conn(told: Told):
    proxy = told.connect()
    told.calls.clear()
    proxy.detach()
    assert told.calls == ["_do_return_conn"]
    proxy.close()


@canary("_close_connection")
def test_every_close_goes_through_one_method_of_the_pool(told: Told):
    hard, soft = told.connect(), told.connect()
    told.calls.clear()
    hard.invalidate()
    soft.close()
    told.dispose()
    assert told.calls.count("_close_connection") == 2


@canary("_close_connection")
def test_closing_a_connection_raises_only_what_is_no_exception(database: Database, told: Told):
    def fail(site: str) -> None:
        raise failures.pop()

    failures = [Interrupt("close"), Error("close")]
    connection = database.connect.__self__.connect()
    database.act = fail
    told._close_connection(connection)
    with pytest.raises(Interrupt):
        told._close_connection(connection)


@canary("_invalidate")
def test_an_engine_invalidates_the_pool_of_a_connection_that_is_disconnected(tmp_path: Path):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/database", poolclass=Told)
    engine.dialect.is_disconnect = lambda *arguments: True
    with engine.connect() as connection, pytest.raises(exc.DBAPIError):
        connection.exec_driver_sql("no statement")
    assert "_invalidate" in engine.pool.calls
    engine.dispose()


@canary("_invalidate_time", "_recycle", "_orig_logging_name", "_reset_on_return", "_dialect")
def test_a_pool_keeps_its_settings_under_these_names(database: Database):
    dialect = StubDialect.of(database)
    pool = NullPool(database.connect, recycle=7, logging_name="here", dialect=dialect)
    assert pool._dialect is dialect
    assert pool._recycle == 7
    assert pool._orig_logging_name == "here"
    assert pool._reset_on_return is base.ResetStyle.reset_rollback
    assert pool._invalidate_time == 0


@canary("_creator")
def test_a_pool_keeps_the_creator_it_was_given(database: Database):
    assert NullPool(database.connect)._creator == database.connect


def test_the_parameters_of_a_pool_are_passed_on_by_recreate(pool: QueuePool):
    parameters = inspect.signature(Pool.__init__).parameters
    needed = {"recycle", "echo", "logging_name", "reset_on_return", "dialect", "_dispatch"}
    assert needed <= parameters.keys()


@canary("_sqla_logger_namespace")
def test_a_pool_may_choose_the_name_of_its_logger(database: Database):
    class Named(NullPool):
        _sqla_logger_namespace = "sqlalchemy.pool.impl.Named"

    assert Named(database.connect).logger.name == "sqlalchemy.pool.impl.Named"


@canary("_timeout", "_max_overflow", "_overflow", "_pre_ping", "_is_asyncio", "_queue_class")
def test_queue_pool_keeps_its_settings_and_its_queue_under_these_names(database: Database):
    dialect = StubDialect.of(database)
    pool = QueuePool(database.connect, max_overflow=7, timeout=0.5, pre_ping=True, dialect=dialect)
    assert (pool._max_overflow, pool._timeout, pool._pre_ping) == (7, 0.5, True)
    assert (pool._overflow, pool._is_asyncio) == (-5, False)
    assert isinstance(pool._pool, QueuePool._queue_class)


# -- dialects and engines --------------------------------------------------------------------


@canary("_do_ping_w_event")
def test_a_ping_is_true_or_tells_that_the_connection_is_gone(database: Database):
    dialect = StubDialect.of(database)
    connection = database.connect()
    assert dialect._do_ping_w_event(connection) is True

    def disconnect(site: str) -> None:
        raise Disconnected(site)

    database.act = disconnect
    assert dialect._do_ping_w_event(connection) is False
    assert DefaultDialect._do_ping_w_event is StubDialect._do_ping_w_event


def test_the_creator_of_an_engine_encloses_the_connect_arguments(tmp_path: Path):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/database", poolclass=NullPool)
    assert _sqlalchemy.connect_arguments(engine.pool._creator) == (
        (f"{tmp_path}/database",),
        {"check_same_thread": False},
    )


def test_a_creator_of_ones_own_tells_no_connect_arguments():
    assert _sqlalchemy.connect_arguments(lambda: sqlite3.connect(":memory:")) == ((), {})


def test_a_listener_of_do_connect_may_add_arguments(tmp_path: Path):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/database", poolclass=NullPool)
    seen = []

    def add(dialect: Any, record: Any, positional: Any, named: dict[str, Any]) -> None:
        named.setdefault("isolation_level", "EXCLUSIVE")

    event.listen(engine.dialect, "do_connect", add)
    event.listen(engine, "connect", lambda connection, _: seen.append(connection.isolation_level))
    engine.connect().close()
    assert seen == ["EXCLUSIVE"]


# -- how connections end -----------------------------------------------------------------------


def rollbacks(engine: sa.Engine, use: Callable[[sa.Engine], None]) -> list[bool]:
    """Return of each ROLLBACK but the pool's whether it is seen to end the use of a connection."""
    seen = []

    def look(proxy: Any) -> None:
        frame = sys._getframe(1)
        if frame.f_code is _sqlalchemy._ROLLBACK:
            seen.append(_sqlalchemy._ends_use(frame))

    engine.connect().close()  # the first one rolls back what it asks of the server
    engine.dialect.do_rollback = look
    use(engine)
    return seen


def close(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))


def close_a_session(engine: sa.Engine) -> None:
    with Session(engine) as session:
        session.execute(sa.text("SELECT 1"))


def fail_in_begin(engine: sa.Engine) -> None:
    with contextlib.suppress(ZeroDivisionError), engine.begin() as connection:
        connection.execute(sa.text("SELECT 1"))
        _ = 1 / 0


def roll_back(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
        connection.rollback()


def fail_in_a_block(engine: sa.Engine) -> None:
    failing = contextlib.suppress(ZeroDivisionError)
    with engine.connect() as connection, failing, connection.begin():
        _ = 1 / 0


def roll_back_a_session(engine: sa.Engine) -> None:
    with Session(engine) as session:
        session.execute(sa.text("SELECT 1"))
        session.rollback()


def close_a_session_on_a_connection(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        with Session(connection, join_transaction_mode="rollback_only") as session:
            session.execute(sa.text("SELECT 1"))
        connection.commit()


@pytest.mark.parametrize(
    ("use", "ends"),
    [
        (close, True),
        (close_a_session, True),
        (fail_in_begin, True),
        (roll_back, False),
        (fail_in_a_block, False),
        (roll_back_a_session, False),
        (close_a_session_on_a_connection, False),
    ],
)
def test_the_rollback_that_ends_a_use_can_be_told_from_the_applications_own(
    use: Callable[[sa.Engine], None], ends: bool, tmp_path: Path
):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/database")
    assert rollbacks(engine, use) == [ends]
    engine.dispose()


def test_a_close_can_be_told_from_what_wants_it(database: Database):
    pool = QueuePool(database.connect, pool_size=1, dialect=StubDialect.of(database))
    reasons = []

    def look(connection: Any, record: Any) -> None:
        reasons.append(_sqlalchemy.reason_to_close(record, -1, 0.0))

    event.listen(pool, "close", look)
    first, second, third = (pool.connect() for _ in range(3))
    first.close()
    second.close()
    third.invalidate()
    broken = pool.connect()
    broken.dbapi_connection.is_closed = True  # so that its reset fails
    broken.close()
    pool.connect().close()
    pool.dispose()
    assert reasons == ["overflow", "invalidated", "reset", "disposed"]


def test_the_records_of_a_pool_are_found_in_use_or_not(pool: QueuePool):
    proxies = [pool.connect() for _ in range(3)]
    records = {record_of(proxy) for proxy in proxies}
    proxies.pop().close()
    assert set(_sqlalchemy.records_of(pool)) == records


def test_a_record_knows_when_it_began_to_connect(database: Database, pool: QueuePool):
    record = record_of(pool.connect())
    assert _sqlalchemy.seconds_since_connect(record, record.starttime + 2.0) == 2.0
    assert _sqlalchemy.seconds_since_connect(record, record.starttime - 2.0) == 0.0


def test_an_engine_with_options_stands_for_another_one():
    engine = sa.create_engine("sqlite://", poolclass=NullPool)
    twice = engine.execution_options(a=1).execution_options(b=1)
    assert _sqlalchemy.root_engine(twice) is engine
    assert _sqlalchemy.root_engine(engine) is engine


# -- asyncio ---------------------------------------------------------------------------------


@canary("_AsyncConnDialect")
def test_a_pool_for_asyncio_without_a_dialect_has_a_stand_in():
    assert base._AsyncConnDialect().is_async is True
    assert isinstance(_sqlalchemy.DIALECT_OF_ASYNCIO, base._AsyncConnDialect)


def test_the_lock_of_the_first_connection_can_be_replaced(pool: QueuePool):
    _sqlalchemy.share_first_connect(pool)
    collection = pool.dispatch.connect.for_modify(pool.dispatch)
    assert collection is pool.dispatch.connect
    assert isinstance(collection._exec_once_mutex, _sqlalchemy._LockOfAnyLoop)
    pool.connect().close()
    assert not collection._exec_once_mutex._lock.locked()


@pytest.mark.parametrize(
    ("version", "leaks"),
    [
        ("2.0.57", True),
        ("2.0.58", False),
        ("2.1.0b4", True),
        ("2.1.8", True),
        ("2.1.9", False),
        ("2.1.10", False),
        ("2.2.0", False),
    ],
)
def test_versions_that_lose_connections_on_cancellation_are_known(
    version: str, leaks: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sa, "__version__", version)
    assert _sqlalchemy.leaks_on_cancellation() is leaks


# -- completeness ----------------------------------------------------------------------------


def private_names_of_sqlalchemy() -> set[str]:
    """Return the private names on everything of SQLAlchemy's that a pool has to do with."""
    pool = QueuePool(lambda: None)
    owners = (base, Pool, pool, NullPool, base._ConnectionRecord, base._ConnectionFairy)
    owners += (DefaultDialect, pool.dispatch.connect.for_modify(pool.dispatch))
    return {name for owner in owners for name in dir(owner) if is_private(name)} | {
        "_sqla_logger_namespace"
    }


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and "__" not in name


def names_in(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_every_private_name_has_its_canary():
    used = {name for file in FOLDER.glob("*.py") for name in names_in(file)}
    theirs = (used & private_names_of_sqlalchemy()) - OURS_TOO
    assert theirs == set(CANARIES)
