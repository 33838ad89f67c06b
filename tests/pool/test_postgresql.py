"""The pool with a real server: dead sessions, deadlines, refused connects, the limit."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from sqla_poolkit import ManagedPool, PoolTimeout
from sqla_poolkit.pool import _upkeep, _workers
from tests.pool.laws import assert_lawful
from tests.servers import PostgresServer
from tests.waiting import until

pytestmark = pytest.mark.extra

PATIENCE_SECONDS = 10.0
ESTABLISHED = "01"
ClientPorts = frozenset[int]
MakeEngine = Callable[..., sa.Engine]


@pytest.fixture(autouse=True)
def impatient_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the threads of closed pools go at once, so that no test has to wait for them."""
    before = set(threading.enumerate())
    monkeypatch.setattr(_workers, "_LINGER_SECONDS", 0.02)
    monkeypatch.setattr(_upkeep, "_LINGER_SECONDS", 0.02)
    yield
    until(lambda: before.issuperset(threading.enumerate()))


@pytest.fixture(params=["psycopg2", "psycopg"])
def driver(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_engine(driver: str) -> Iterator[MakeEngine]:
    """Make engines whose pools are closed after the test."""
    engines: list[sa.Engine] = []

    def make(server: PostgresServer, change_url: str = "", **settings: Any) -> sa.Engine:
        url = sa.make_url(server.url(driver) + change_url)
        user = settings.pop("user", None)
        if user is not None:
            url = url.set(username=user, password=settings.pop("password", None))
        engine = sa.create_engine(url, poolclass=ManagedPool, **settings)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.pool.close(1.0)


def all_together(count: int, work: Callable[[], Any]) -> list[Any]:
    """Return what ``work`` returned or raised in each of so many threads."""
    start = threading.Barrier(count)

    def run(_: int) -> Any:
        start.wait()
        try:
            return work()
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def hold_together(engine: sa.Engine, count: int) -> list[int]:
    """Check out so many connections at once and return the server's process of each."""
    with ExitStack() as held:
        connections = [held.enter_context(engine.connect()) for _ in range(count)]
        return [connection.scalar(sa.text("SELECT pg_backend_pid()")) for connection in connections]


def idle_connections(engine: sa.Engine) -> list[Any]:
    return [record.dbapi_connection for record in engine.pool._driver.idle_records()]


def pass_time(engine: sa.Engine, seconds: float) -> None:
    """Make the pool believe that so much time has gone by."""
    driver = engine.pool._driver
    clock = driver.clock
    driver.clock = lambda: clock() + seconds


def hung_up(connection: Any) -> bool:
    """Tell whether the server's farewell has arrived."""
    return bool(select.select([connection.fileno()], [], [], 0)[0])


# -- sessions that died ----------------------------------------------------------------------


@pytest.mark.parametrize("death", ["terminate", "restart"])
def test_callers_do_not_notice_that_idle_sessions_died(
    postgres: PostgresServer, make_engine: MakeEngine, death: str
):
    engine = make_engine(postgres, max_size=3)
    before = hold_together(engine, 3)
    idle = idle_connections(engine)
    if death == "terminate":
        assert postgres.terminate_sessions() == 3
    else:
        postgres.restart("immediate")
    until(lambda: all(hung_up(connection) for connection in idle))
    after = hold_together(engine, 3)
    snapshot = engine.pool.snapshot()
    assert len({*before, *after}) == 6 or death == "restart"
    assert snapshot.failed == snapshot.timeouts == 0
    assert set(snapshot.closes) <= {"ping", "probe", "generation"}
    assert sum(snapshot.closes.values()) == 3
    assert_lawful(snapshot)


def test_a_session_terminated_in_its_holders_hands_costs_only_that_holder(
    postgres: PostgresServer, make_engine: MakeEngine
):
    engine = make_engine(postgres, max_size=2)
    with engine.connect() as connection:
        postgres.terminate_sessions()
        with pytest.raises(exc.OperationalError):
            connection.execute(sa.text("SELECT 1"))
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
    assert_lawful(engine.pool.snapshot())


# -- probes and pings ------------------------------------------------------------------------


def probes_and_pings(engine: sa.Engine) -> tuple[int, int]:
    snapshot = engine.pool.snapshot()
    return snapshot.probes, snapshot.pings


def test_a_connection_just_opened_is_handed_out_as_it_is(
    postgres: PostgresServer, make_engine: MakeEngine
):
    engine = make_engine(postgres, max_size=1)
    engine.connect().close()
    assert probes_and_pings(engine) == (0, 0)


def test_a_connection_just_used_is_probed_and_not_pinged(
    postgres: PostgresServer, make_engine: MakeEngine
):
    engine = make_engine(postgres, max_size=1, ping_after=60)
    for _ in range(4):
        engine.connect().close()
    assert probes_and_pings(engine) == (3, 0)


def test_a_connection_idle_for_longer_than_ping_after_is_pinged(
    postgres: PostgresServer, make_engine: MakeEngine
):
    engine = make_engine(postgres, max_size=1, ping_after=60)
    engine.connect().close()
    pass_time(engine, 61)
    engine.connect().close()
    engine.connect().close()
    assert probes_and_pings(engine)[1] == 1


def test_ping_after_zero_pings_at_every_checkout(postgres: PostgresServer, make_engine: MakeEngine):
    engine = make_engine(postgres, max_size=1, ping_after=0)
    for _ in range(3):
        engine.connect().close()
    assert probes_and_pings(engine)[1] == 2


def test_no_ping_is_made_where_pre_ping_is_off(postgres: PostgresServer, make_engine: MakeEngine):
    engine = make_engine(postgres, max_size=1, pool_pre_ping=False)
    engine.connect().close()
    pass_time(engine, 61)
    engine.connect().close()
    assert probes_and_pings(engine) == (0, 0)


# -- connects that are refused ---------------------------------------------------------------


@pytest.fixture
def narrow_role(postgres: PostgresServer) -> Iterator[str]:
    """A role that may have two sessions."""
    postgres.query("CREATE ROLE narrow LOGIN CONNECTION LIMIT 2")
    yield "narrow"
    until(lambda: postgres.sessions() == 0)
    postgres.query("DROP ROLE narrow")


def test_a_role_with_two_sessions_serves_all_waiters_of_a_pool_of_five(
    postgres: PostgresServer, narrow_role: str, make_engine: MakeEngine
):
    engine = make_engine(postgres, user=narrow_role, max_size=5, pool_timeout=10)
    hold_together(engine, 2)

    def work() -> int:
        with engine.connect() as connection:
            return connection.scalar(sa.text("SELECT pg_backend_pid() FROM pg_sleep(0.03)"))

    answers = all_together(8, work)
    snapshot = engine.pool.snapshot()
    engine.pool.close(1.0)
    assert all(isinstance(answer, int) for answer in answers)
    assert len(set(answers)) <= 2
    assert snapshot.connect_failures > 0
    assert snapshot.failed == 0
    assert_lawful(snapshot)


PASSWORD = "not-the-pass-word"


@pytest.fixture
def guarded_role(postgres: PostgresServer) -> Iterator[str]:
    """A role that needs a password, which PASSWORD is not."""
    rules = Path(postgres.query("SHOW hba_file")[0][0])
    trusting = rules.read_text()
    postgres.query("CREATE ROLE guarded LOGIN PASSWORD 'right'")
    with rules.open("r+") as file:  # written in place: the file stays the server's own
        file.write("host all guarded 127.0.0.1/32 scram-sha-256\n" + trusting)
    loaded_at = postgres.query("SELECT pg_conf_load_time()")
    postgres.query("SELECT pg_reload_conf()")
    until(lambda: postgres.query("SELECT pg_conf_load_time()") != loaded_at)
    yield "guarded"
    with rules.open("r+") as file:
        file.write(trusting)
        file.truncate()
    postgres.query("SELECT pg_reload_conf()")
    postgres.query("DROP ROLE guarded")


def test_a_wrong_password_reaches_each_caller_once_and_is_in_no_message(
    postgres: PostgresServer, guarded_role: str, make_engine: MakeEngine
):
    engine = make_engine(postgres, user=guarded_role, password=PASSWORD, max_size=5)
    errors = all_together(4, engine.connect)
    snapshot = engine.pool.snapshot()
    assert [type(error) for error in errors] == [exc.OperationalError] * 4
    assert all("password authentication failed" in str(error) for error in errors)
    assert (snapshot.failed, snapshot.requesting, snapshot.checkouts) == (4, 0, 0)
    texts = [str(error) + repr(error) + repr(error.orig) for error in errors]
    assert PASSWORD not in "".join([*texts, repr(snapshot.to_dict()), repr(engine.pool)])


# -- the limit -------------------------------------------------------------------------------


def open_ports(server_port: int) -> ClientPorts:
    """Return the local ports of the sockets that are connected to the server."""
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return frozenset(
        int(row[1].rpartition(":")[2], 16)
        for row in rows
        if row[3] == ESTABLISHED and int(row[2].rpartition(":")[2], 16) == server_port
    )


def sessions_with_socket(server: PostgresServer) -> int:
    """Count the sessions whose clients have not hung up.

    A session may outlive its socket until the server notices.  Ports are read after the
    sessions, so those that are in both were there at one and the same moment.
    """
    ports = server.query(
        "SELECT client_port FROM pg_stat_activity WHERE backend_type = 'client backend'"
        " AND application_name <> 'poolkit-admin'"
    )
    return len({port for (port,) in ports} & open_ports(server.port))


@pytest.mark.skipif(not os.path.exists("/proc/self/net/tcp"), reason="counts sockets in /proc")
def test_the_server_never_has_more_sessions_than_max_size_while_the_pool_is_disposed(
    postgres: PostgresServer, make_engine: MakeEngine
):
    engine = make_engine(postgres, max_size=4, pool_timeout=20)
    is_over = threading.Event()
    counts: list[int] = []

    def work() -> int:
        rounds = 0
        while not is_over.is_set():
            with engine.connect() as connection:
                connection.execute(sa.text("SELECT pg_sleep(0.002)"))
            rounds += 1
        return rounds

    def disturb() -> None:
        for _ in range(40):
            counts.append(sessions_with_socket(postgres))
            engine.dispose()
        is_over.set()

    with ThreadPoolExecutor(9) as threads:
        rounds = [threads.submit(work) for _ in range(8)]
        try:
            threads.submit(disturb).result()
        finally:
            is_over.set()
    assert all(done.result() for done in rounds)
    assert 1 <= max(counts) <= 4
    snapshot = engine.pool.snapshot()
    assert snapshot.closes["disposed"] >= 4
    assert_lawful(snapshot)


# -- time ------------------------------------------------------------------------------------


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that accepts connections and never says a word; it hangs up after the test."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield listener.getsockname()[1]


def test_the_deadline_holds_and_the_pool_closes_although_the_server_never_answers(
    driver: str, deaf_port: int
):
    engine = sa.create_engine(
        f"postgresql+{driver}://poolkit@127.0.0.1:{deaf_port}/postgres",
        poolclass=ManagedPool,
        max_size=2,
        pool_timeout=0.25,
    )
    took = []
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(PoolTimeout):
            engine.connect()
        took.append(time.monotonic() - began)
    # the best of three: this machine may be busy with something else
    assert 0.2 <= min(took) <= 0.3
    assert_lawful(engine.pool.snapshot())
    began = time.monotonic()
    engine.pool.close(timeout=0.2)
    assert time.monotonic() - began < 1.0


def test_close_cuts_off_a_holder_in_the_middle_of_a_query(
    postgres: PostgresServer, make_engine: MakeEngine
):
    engine = make_engine(postgres, max_size=1)
    has_begun = threading.Event()

    def sleep() -> float:
        with engine.connect() as connection:
            has_begun.set()
            with pytest.raises(exc.OperationalError):
                connection.execute(sa.text("SELECT pg_sleep(30)"))
            return time.monotonic()

    with ThreadPoolExecutor(1) as threads:
        sleeper = threads.submit(sleep)
        assert has_begun.wait(PATIENCE_SECONDS)
        began = time.monotonic()
        engine.pool.close(timeout=0.3)
        ended = sleeper.result(PATIENCE_SECONDS)
    assert 0.25 <= ended - began < 1.3
    # the session itself sleeps on, for the server looks at its socket only afterwards
    postgres.terminate_sessions()


# -- what the driver is told -----------------------------------------------------------------


def connect_arguments(engine: sa.Engine) -> dict[str, Any]:
    """Return what the driver is given at a connect."""
    seen: dict[str, Any] = {}

    @sa.event.listens_for(engine, "do_connect")
    def note(dialect: Any, record: Any, positional: Any, named: dict[str, Any]) -> None:
        seen.update(named)

    engine.connect().close()
    return seen


def test_the_driver_is_given_connect_timeout_in_whole_seconds(
    postgres: PostgresServer, make_engine: MakeEngine
):
    engine = make_engine(postgres, connect_timeout=6.5)
    assert connect_arguments(engine)["connect_timeout"] == 7


def test_the_connect_timeout_of_the_url_comes_first(
    postgres: PostgresServer, make_engine: MakeEngine
):
    engine = make_engine(postgres, "?connect_timeout=3", connect_timeout=6.5)
    assert int(connect_arguments(engine)["connect_timeout"]) == 3
