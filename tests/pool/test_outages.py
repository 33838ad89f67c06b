"""What the database does to a pool, on real servers and drivers, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import await_only

from sqla_poolkit import (
    AsyncManagedPool,
    ManagedPool,
    PoolTimeout,
    PoolUnavailable,
    snapshot,
)
from sqla_poolkit.pool._threads import ThreadDriver
from sqla_poolkit.testing import FaultProxy
from tests.pool.laws import assert_lawful
from tests.servers import PgBouncer, PostgresServer
from tests.waiting import until

Got = TypeVar("Got")

DRIVERS = ("psycopg2", "psycopg", "asyncpg", "psycopg_async")
MYSQL_DRIVERS = ("pymysql", "aiomysql")
ASYNC = ("asyncpg", "psycopg_async", "aiomysql")
BEHIND_PGBOUNCER: dict[str, dict[str, Any]] = {
    "asyncpg": {"statement_cache_size": 0, "prepared_statement_cache_size": 0},
    "psycopg": {"prepare_threshold": None},
    "psycopg_async": {"prepare_threshold": None},
}
PATIENCE_SECONDS = 10.0
LATE_SECONDS = 0.25


class App:
    """An application on one engine; its callers look the same for threads and for asyncio."""

    def __init__(self, server: Any, driver: str, through: Any = None, **settings: Any) -> None:
        self.is_async = driver in ASYNC
        self.is_closed = False
        url = server.url(driver, through)
        if self.is_async:
            self.engine: Any = create_async_engine(url, poolclass=AsyncManagedPool, **settings)
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="loop")
            self._thread.start()
        else:
            self.engine = sa.create_engine(url, poolclass=ManagedPool, **settings)
        self.pool = self.engine.pool

    def call(self, work: Callable[[sa.Connection], Got]) -> Got:
        """Do something with a connection."""
        if not self.is_async:
            with self.engine.connect() as connection:
                return work(connection)

        async def call() -> Got:
            async with self.engine.connect() as connection:
                return await connection.run_sync(work)

        return self.run(call())

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def warm(self, connections: int) -> None:
        """Have so many connections open and idle."""
        barrier = threading.Barrier(connections)

        def hold(connection: sa.Connection) -> None:
            connection.execute(sa.text("SELECT 1"))
            if not self.is_async:
                barrier.wait(PATIENCE_SECONDS)

        if self.is_async:
            self.run(self._warm(connections))
        else:
            with ThreadPoolExecutor(connections) as executor:
                list(executor.map(lambda _: self.call(hold), range(connections)))
        assert self.read().idle == connections

    async def _warm(self, connections: int) -> None:
        held = [await self.engine.connect() for _ in range(connections)]
        for connection in held:
            await connection.close()

    def read(self) -> Any:
        reading = snapshot(self.engine)
        assert_lawful(reading)
        return reading

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        if self.is_async:
            self.run(self.pool.close(timeout=5.0))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        else:
            self.pool.close(timeout=5.0)


def ask(connection: sa.Connection) -> Any:
    return connection.execute(sa.text("SELECT 1")).scalar()


def end_sessions(server: Any, sessions: int) -> None:
    """End so many sessions, and wait until the server has done so."""
    before = server.sessions()
    assert server.terminate(sessions) == sessions
    until(lambda: server.sessions() == before - sessions, "the server does not end them")


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


@pytest.fixture
def apps() -> Iterator[Callable[..., App]]:
    """Return what makes applications that are closed at the end."""
    made: list[App] = []

    def make(*arguments: Any, **settings: Any) -> App:
        made.append(App(*arguments, **settings))
        return made[-1]

    yield make
    for app in made:
        app.close()


# -- connections that end ---------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
def test_nobody_gets_a_connection_that_was_terminated_while_idle(driver, postgres, apps):
    app = apps(postgres, driver, max_size=10)
    app.warm(10)
    end_sessions(postgres, 10)
    assert [app.call(ask) for _ in range(10)] == [1] * 10
    reading = app.read()
    assert reading.ping_failures >= 2
    # the second dead one in a second was an event of the server's
    until(lambda: app.read().closes.get("generation", 0) >= 1, "the others stay")


@pytest.mark.parametrize("driver", DRIVERS)
def test_one_terminated_connection_costs_one_connection(driver, postgres, apps):
    app = apps(postgres, driver, max_size=5)
    app.warm(5)
    end_sessions(postgres, 1)
    for _ in range(20):
        assert app.call(ask) == 1
    app.warm(5)
    reading = app.read()
    assert (reading.ping_failures, sum(reading.closes.values())) == (1, 1)


@pytest.mark.parametrize("driver", MYSQL_DRIVERS)
def test_nobody_gets_a_mariadb_connection_that_was_killed_while_idle(driver, mariadb, apps):
    app = apps(mariadb, driver, max_size=5)
    app.warm(5)
    end_sessions(mariadb, 5)
    assert [app.call(ask) for _ in range(5)] == [1] * 5
    assert app.read().ping_failures >= 1


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("ended", ["bouncer", "server"])
def test_behind_pgbouncer_nobody_gets_a_connection_that_has_ended(
    ended, driver, pgbouncer, own_server, apps
):
    """``pgbouncer`` is here to skip where there is none."""
    with PgBouncer(own_server, pool_mode="transaction", default_pool_size=4) as bouncer:
        arguments = BEHIND_PGBOUNCER.get(driver, {})
        app = apps(bouncer, driver, max_size=4, connect_args=arguments)
        app.warm(4)
        (bouncer if ended == "bouncer" else own_server).restart()
        assert [app.call(ask) for _ in range(20)] == [1] * 20
        app.warm(4)
        until(lambda: bouncer.sessions() == app.read().open == 4, "the books are wrong")
        app.close()


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_connection_lost_in_its_holders_hands_is_one_error_and_no_more(driver, postgres, apps):
    app = apps(postgres, driver, max_size=3)
    app.warm(3)

    def lose(connection: sa.Connection) -> None:
        pid = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar()
        postgres.terminate([pid])
        connection.execute(sa.text("SELECT 1"))

    with pytest.raises(exc.DBAPIError) as caught:
        app.call(lose)
    assert caught.value.connection_invalidated
    assert [app.call(ask) for _ in range(6)] == [1] * 6
    reading = app.read()
    assert (reading.checked_out, reading.open) == (0, 3 - 1 + (reading.connects - 3))


@pytest.mark.parametrize("driver", DRIVERS)
def test_after_a_restart_nobody_notices_anything(driver, own_server, apps):
    app = apps(own_server, driver, max_size=5)
    app.warm(5)
    own_server.restart("immediate")
    assert [app.call(ask) for _ in range(10)] == [1] * 10


# -- servers that do not answer ----------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_ping_of_a_frozen_server_is_cut_off_in_time(driver, own_server, apps):
    app = apps(own_server, driver, max_size=2, pool_timeout=1.0, ping_timeout=0.3, ping_after=0)
    app.warm(2)
    own_server.freeze()
    begin = time.monotonic()
    with pytest.raises(PoolTimeout):
        app.call(ask)
    assert time.monotonic() - begin == pytest.approx(1.0, abs=LATE_SECONDS)
    assert app.read().ping_failures == 2
    own_server.thaw()
    until(lambda: app.call(ask) == 1, "the pool does not recover")


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_deadline_holds_for_the_ping(driver, postgres, apps):
    with FaultProxy("127.0.0.1", postgres.port) as proxy:
        app = apps(postgres, driver, proxy, max_size=1, pool_timeout=0.4, ping_after=0)
        app.warm(1)
        proxy.black_hole()
        begin = time.monotonic()
        with pytest.raises(PoolTimeout):
            app.call(ask)
        assert time.monotonic() - begin == pytest.approx(0.4, abs=LATE_SECONDS)
        proxy.heal()
        until(lambda: app.call(ask) == 1, "the pool does not recover")


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg", "pymysql"])
def test_a_reset_on_return_is_cut_off_in_time(driver, postgres, mariadb, apps):
    server = mariadb if driver == "pymysql" else postgres
    with FaultProxy("127.0.0.1", server.port) as proxy:
        app = apps(server, driver, proxy, max_size=1, ping_timeout=0.3)
        raw = app.engine.raw_connection()
        raw.cursor().execute("SELECT 1")
        proxy.black_hole()
        assert seconds_of(raw.close) == pytest.approx(0.3, abs=LATE_SECONDS)
        until(lambda: app.read().closing == 0, "it is not closed")
        assert (app.read().reset_failures, app.read().closes) == (1, {"reset": 1})
        proxy.heal()
        assert app.call(ask) == 1


def test_a_rollback_of_the_applications_own_takes_as_long_as_it_takes(postgres, apps):
    with FaultProxy("127.0.0.1", postgres.port) as proxy:
        app = apps(postgres, "psycopg2", proxy, max_size=1, ping_timeout=0.1)
        with app.engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
            proxy.delay(0.2)
            connection.rollback()
            assert ask(connection) == 1
            connection.rollback()
            proxy.heal()
        assert app.read().reset_failures == 0


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_connection_collected_in_the_upkeep_does_not_stop_it(driver, postgres, apps, monkeypatch):
    """Its reset would wait for a silent server, and nobody else could cut it off."""
    dropped: list[Any] = []
    look_after = ThreadDriver.look_after

    def collect(driver: ThreadDriver) -> float:
        while dropped:
            proxy.black_hole()
            dropped.pop()
        return look_after(driver)

    with FaultProxy("127.0.0.1", postgres.port) as proxy:
        app = apps(postgres, driver, proxy, max_size=2, ping_timeout=0.5)
        held = app.engine.raw_connection()
        held.cursor().execute("SELECT 1")
        monkeypatch.setattr(ThreadDriver, "look_after", collect)
        dropped.append(held)
        del held
        app.pool.resize(max_size=3)  # which has the upkeep look
        until(lambda: not dropped and app.read().checked_out == 0, "it is not given back")
        proxy.heal()
        until(lambda: app.read().open == 0, "the upkeep does not go on")
        assert app.call(ask) == 1


@pytest.mark.parametrize("driver", DRIVERS)
def test_idle_connections_are_kept_alive_in_the_background(driver, postgres, apps):
    app = apps(postgres, driver, max_size=3, keepalive=0.2)
    app.warm(3)
    until(lambda: app.read().pings >= 6, "nothing is pinged")
    reading = app.read()
    assert (reading.open, reading.ping_failures, reading.checkouts) == (3, 0, 3)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_connection_that_dies_while_idle_is_found_by_the_keepalive(driver, postgres, apps):
    app = apps(postgres, driver, max_size=1, keepalive=0.2)
    app.warm(1)
    end_sessions(postgres, 1)
    until(lambda: app.read().open + app.read().closing == 0, "it is not found")
    assert app.read().closes == {"ping": 1}


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg_async", "aiomysql", "psycopg2"])
def test_a_server_that_accepts_and_says_nothing_keeps_no_place(driver, postgres, mariadb, apps):
    server = mariadb if driver == "aiomysql" else postgres
    with FaultProxy("127.0.0.1", server.port) as proxy:
        proxy.black_hole()
        app = apps(server, driver, proxy, max_size=2, connect_timeout=1.0, pool_timeout=0.3)
        with pytest.raises(PoolTimeout):
            app.call(ask)
        assert snapshot(app.engine).connecting == 1
        # libpq takes a second for two
        until(lambda: snapshot(app.engine).connecting == 0, "the attempt keeps its place")
        assert app.read().connect_failures >= 1


# -- databases that are down -------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
def test_while_the_database_is_down_callers_hear_so_at_once(driver, own_server, apps):
    app = apps(own_server, driver, max_size=3, pool_timeout=5.0)
    app.warm(3)
    own_server.stop("immediate")
    errors: Counter[str] = Counter()
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        try:
            app.call(ask)
        except Exception as error:
            errors[type(error).__name__] += 1
            last = error
        time.sleep(0.02)
    assert isinstance(last, PoolUnavailable), last
    assert isinstance(last, exc.OperationalError)
    assert last.orig is not None
    assert last.orig.__traceback__ is None
    assert errors["PoolUnavailable"] > 20
    assert errors["PoolTimeout"] == 0
    before = app.read().connect_failures
    begin = time.monotonic()
    with pytest.raises(PoolUnavailable, match="cannot reach its database"):
        app.call(ask)
    assert time.monotonic() - begin < 0.1
    time.sleep(1.5)
    assert 1 <= app.read().connect_failures - before <= 3
    own_server.start()
    assert seconds_of(lambda: recover(app)) <= 1.2


def recover(app: App) -> None:
    while True:
        try:
            app.call(ask)
        except exc.SQLAlchemyError:
            time.sleep(0.01)
        else:
            return


@pytest.mark.parametrize("driver", ["psycopg2", "asyncpg"])
def test_callers_may_wait_for_a_database_that_is_down(driver, own_server, apps):
    app = apps(own_server, driver, max_size=3, pool_timeout=20.0, on_outage="wait")
    app.warm(1)
    own_server.stop("immediate")
    with ThreadPoolExecutor(4) as executor:
        asking = [executor.submit(app.call, ask) for _ in range(4)]
        time.sleep(2.0)
        assert not any(future.done() for future in asking)
        own_server.start()
        begin = time.monotonic()
        assert [future.result(10) for future in asking] == [1] * 4
        assert time.monotonic() - begin <= 1.5
    assert app.read().failed == 0


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg", "asyncpg"])
def test_too_many_connections_make_callers_wait_for_those_that_are_open(driver, postgres, apps):
    postgres.query("CREATE ROLE few LOGIN CONNECTION LIMIT 2")
    try:
        app = apps(postgres, driver, max_size=5, connect_args={"user": "few"}, pool_timeout=10.0)

        def hold(connection: sa.Connection) -> Any:
            return connection.execute(sa.text("SELECT 1 FROM pg_sleep(0.05)")).scalar()

        with ThreadPoolExecutor(10) as executor:
            assert list(executor.map(lambda _: app.call(hold), range(20))) == [1] * 20
        reading = app.read()
        assert (reading.failed, reading.unavailable, reading.open) == (0, 0, 2)
        app.close()
    finally:
        until(lambda: postgres.sessions() == 0, "sessions stay")
        postgres.query("DROP ROLE few")


# -- what a holder leaves behind -----------------------------------------------------------------

LEFT_BEHIND = {
    "search_path": ("SET search_path TO elsewhere", "SHOW search_path"),
    "role": ("SET ROLE left_behind", "SELECT current_user"),
    "setting": (
        "SELECT set_config('app.tenant', 'one', false)",
        "SELECT current_setting('app.tenant', true)",
    ),
    "statement_timeout": ("SET statement_timeout = 12345", "SHOW statement_timeout"),
    "read only": (
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        "SHOW default_transaction_read_only",
    ),
    "temporary table": (
        "CREATE TEMPORARY TABLE left_over (n int)",
        "SELECT count(*) FROM pg_class WHERE relname = 'left_over'",
    ),
    "advisory lock": (
        "SELECT pg_advisory_lock(77)",
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'",
    ),
    "listen": ("LISTEN left_behind", "SELECT count(*) FROM pg_listening_channels()"),
    "cursor": (
        "DECLARE left_behind CURSOR WITH HOLD FOR SELECT 1",
        "SELECT count(*) FROM pg_cursors WHERE name = 'left_behind'",
    ),
}


@pytest.fixture
def role(postgres: PostgresServer) -> Iterator[None]:
    postgres.query("CREATE ROLE left_behind")
    yield
    postgres.query("DROP ROLE left_behind")


@pytest.mark.usefixtures("role")
@pytest.mark.parametrize(
    ("driver", "mode"),
    [
        *((driver, "clean") for driver in DRIVERS),
        *((driver, "discard_all") for driver in DRIVERS if driver != "asyncpg"),
    ],
)
def test_a_clean_session_keeps_nothing_of_its_last_holder(driver, mode, postgres, apps):
    app = apps(postgres, driver, max_size=1, session_reset=mode)

    def look(query: str) -> Any:
        return app.call(lambda connection: connection.execute(sa.text(query)).scalar())

    for what, (leave, query) in LEFT_BEHIND.items():
        before = look(query)

        def leave_behind(connection: sa.Connection, statement: str = leave) -> None:
            connection.execute(sa.text(statement))
            connection.commit()

        app.call(leave_behind)
        assert (look(query) or None) == (before or None), what
    reading = app.read()
    assert (reading.connects, reading.reset_failures) == (1, 0)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_session_reset_of_ones_own_that_fails_discards_the_connection(driver, postgres, apps):
    def fail(connection: Any) -> None:
        raise ValueError("no")

    app = apps(postgres, driver, max_size=1, session_reset=fail)
    assert [app.call(ask) for _ in range(2)] == [1, 1]
    until(lambda: app.read().open + app.read().closing == 0, "it is kept")
    assert (app.read().reset_failures, app.read().closes) == (2, {"reset": 2})


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_session_reset_that_took_too_long_discards_the_connection(driver, postgres, apps):
    def dawdle(connection: Any) -> None:
        if app.is_async:
            await_only(asyncio.sleep(0.6))
        else:
            time.sleep(0.6)

    app = apps(postgres, driver, max_size=1, session_reset=dawdle, ping_timeout=0.2)
    assert [app.call(ask) for _ in range(2)] == [1, 1]
    until(lambda: app.read().open + app.read().closing == 0, "it is kept")
    assert (app.read().reset_failures, app.read().closes) == (2, {"reset": 2})


def test_a_pipeline_that_is_left_open_goes_with_its_connection(postgres, apps):
    app = apps(postgres, "psycopg", max_size=1)

    def leave_open(connection: sa.Connection) -> None:
        native = connection.connection.driver_connection
        native.pgconn.enter_pipeline_mode()

    app.call(leave_open)
    assert app.call(ask) == 1
    assert app.read().closes == {"reset": 1}


def test_a_connection_that_comes_back_in_a_hidden_transaction_is_closed(postgres, apps):
    app = apps(postgres, "psycopg2", max_size=1, isolation_level="AUTOCOMMIT")
    app.call(lambda connection: connection.exec_driver_sql("BEGIN"))
    assert app.call(ask) == 1
    reading = app.read()
    assert (reading.reset_failures, reading.closes) == (1, {"reset": 1})


@pytest.mark.timeout(20)
def test_a_connection_that_comes_back_in_the_middle_of_a_copy_is_closed(postgres, apps):
    # psycopg holds a lock of its own as long as the copy lasts, so a rollback would wait for ever
    app = apps(postgres, "psycopg", max_size=1)
    raw = app.engine.raw_connection()
    copy = raw.cursor().copy("COPY (SELECT generate_series(1, 100000)) TO STDOUT")
    rows = copy.__enter__()
    next(iter(rows))
    raw.close()
    assert app.call(ask) == 1
    assert app.read().closes == {"reset": 1}


# -- credentials and failover ----------------------------------------------------------------


@pytest.fixture
def guarded(own_server: PostgresServer) -> Iterator[PostgresServer]:
    """A server that asks its user ``rotating`` for a password."""
    own_server.query("CREATE ROLE rotating LOGIN PASSWORD 'first'")
    ((path,),) = own_server.query("SHOW hba_file")
    rules = Path(path).read_text()
    Path(path).write_text(f"host all rotating all scram-sha-256\n{rules}")
    reload(own_server)
    yield own_server
    Path(path).write_text(rules)
    reload(own_server)
    until(lambda: own_server.sessions() == 0, "sessions stay")
    own_server.query("DROP ROLE rotating")


def reload(server: PostgresServer) -> None:
    """Have the server take in its changed configuration."""
    ((before,),) = server.query("SELECT pg_conf_load_time()")
    server.query("SELECT pg_reload_conf()")
    until(lambda: server.query("SELECT pg_conf_load_time()") != [(before,)], "it does not reload")


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_rotated_password_is_asked_for_again_once(driver, guarded, apps):
    known = ["first"]
    calls = []

    def credentials() -> dict[str, str]:
        calls.append(1)
        return {"user": "rotating", "password": known[0] if len(calls) != 2 else "first"}

    app = apps(guarded, driver, max_size=2, credentials=credentials)
    assert app.call(ask) == 1
    guarded.query("ALTER ROLE rotating PASSWORD 'second'")
    known[0] = "second"
    end_sessions(guarded, 1)
    assert app.call(ask) == 1
    reading = app.read()
    assert (len(calls), reading.connect_failures, reading.failed) == (3, 0, 0)


@pytest.mark.parametrize("driver", ["asyncpg"])
def test_a_wrong_password_is_not_tried_in_a_storm(driver, guarded, apps):
    app = apps(
        guarded, driver, max_size=5, credentials=lambda: {"user": "rotating", "password": "wrong"}
    )
    errors: Counter[str] = Counter()
    deadline = time.monotonic() + 3.5
    while time.monotonic() < deadline:
        try:
            app.call(ask)
        except exc.OperationalError as error:
            errors[type(error).__name__] += 1
        except exc.DBAPIError as error:
            errors[type(error).__name__] += 1
        except Exception as error:
            errors[type(error).__name__] += 1
        time.sleep(0.005)
    before = app.read().connect_failures
    time.sleep(1.0)
    assert app.read().connect_failures - before <= 1
    assert errors["PoolUnavailable"] > 100


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_writable_pool_leaves_a_server_that_takes_no_writes(driver, postgres, own_server, apps):
    own_server.query("ALTER SYSTEM SET default_transaction_read_only = on")
    reload(own_server)
    with FaultProxy("127.0.0.1", own_server.port) as proxy:
        app = apps(postgres, driver, proxy, max_size=3, writable=True)
        app.warm(3)
        proxy.retarget("127.0.0.1", postgres.port)

        def write(connection: sa.Connection) -> None:
            connection.execute(sa.text("CREATE SCHEMA written"))
            connection.rollback()

        with pytest.raises(exc.DBAPIError):
            app.call(write)
        for _ in range(5):
            app.call(write)
        until(lambda: app.read().closing == 0, "they are not closed")
        assert app.read().closes == {"generation": 3}
    own_server.query("ALTER SYSTEM RESET default_transaction_read_only")
    reload(own_server)
