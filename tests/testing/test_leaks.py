"""The pytest plugin, run by pytest itself in a process of its own, and ``assert_no_leaks``."""

from __future__ import annotations

import asyncio
import configparser
import gc
import re
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool, Pool, QueuePool, SingletonThreadPool, StaticPool

from sqla_poolkit import ManagedPool, MonitoredQueuePool, held_by
from sqla_poolkit.testing import LeakedConnections, assert_no_leaks
from sqla_poolkit.testing.leaks import checkouts
from tests.servers import PostgresServer

ROOT = Path(__file__).parents[2]
FIXTURES = """
import asyncio, gc, threading, unittest
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from sqla_poolkit import held_by

SELECT = sa.text("SELECT 1")
held = []

@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    engine = sa.create_engine(f"sqlite:///{tmp_path_factory.mktemp('data') / 'app.db'}")
    yield engine
    engine.dispose()

def take(engine):
    held.append(engine.connect())
"""

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs tests in a pytest of their own, with the plugin loaded by name."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    plugins = ("-p", "sqla_poolkit.testing.plugin")

    def run(source: str, *arguments: str, fixtures: str = FIXTURES) -> pytest.RunResult:
        pytester.makepyfile(fixtures + source)
        return pytester.runpytest_subprocess(*plugins, *(arguments or ("--pool-leaks=fail",)))

    return run


def leaking(result: pytest.RunResult) -> set[str]:
    """Return the names of the tests that were failed for what they did not return."""
    return set(re.findall(r"^_+ ERROR at teardown of (\S+) _+$", str(result.stdout), re.MULTILINE))


# -- the plugin --------------------------------------------------------------------------------


def test_a_test_that_returns_less_than_it_took_fails_and_its_report_names_the_taker(run: Run):
    result = run("""
def test_good(engine):
    with engine.connect() as connection:
        connection.execute(SELECT)

def test_bad(engine):
    with held_by("GET /users"):
        take(engine)

def test_after_the_bad_one(engine):
    with engine.connect():
        pass
""")
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_bad*",
            "1 connection was taken and not returned:",
            "[*] pool 'app.db' (QueuePool), taken 0.?? s ago by GET /users in thread MainThread:",
            "    test_*.py:* take",
            "    test_*.py:* test_bad",
            "Return each:*",
        ],
        consecutive=True,
    )


def test_what_only_the_collector_returns_is_a_leak_whether_it_ran_or_not(run: Run):
    result = run("""
def test_left_to_the_collector(engine):
    connection = engine.connect()
    connection.execute(SELECT)  # connection and transaction refer to each other

def test_collected_already(engine):
    engine.connect().execute(SELECT)
    gc.collect()

def test_session_left_open(engine):
    Session(engine).execute(SELECT)

def test_returned_where_it_was_dropped(engine):
    engine.connect()

def test_closed_and_collected(engine):
    connection = engine.connect()
    connection.execute(SELECT)
    connection.itself = connection
    connection.close()
    del connection
    gc.collect()

def test_detached(engine):
    connection = engine.connect()
    connection.detach()
    held.append(connection)
""")
    assert leaking(result) == {
        "test_left_to_the_collector",
        "test_collected_already",
        "test_session_left_open",
    }
    result.stdout.fnmatch_lines(["*pool 'app.db'*, and dropped without being closed:"])


def test_a_fixture_may_hold_a_connection_as_long_as_it_lives(run: Run):
    result = run("""
@pytest.fixture(scope="session")
def good(engine):
    with engine.connect() as connection:
        yield connection

@pytest.fixture(scope="module")
def bad(engine):
    take(engine)
    yield held[-1]

@pytest.fixture
def function_scoped(engine):
    with engine.connect() as connection:
        yield connection

@pytest.fixture
def careless(engine):
    take(engine)

@pytest.fixture(scope="class", params=[1, 2])
def each(engine, request):
    take(engine)

class TestEach:
    def test_a(self, each): pass
    def test_b(self, each): pass

def test_first(good, bad): good.execute(SELECT)
def test_second(good, function_scoped): pass
def test_careless(careless): pass
def test_late(request, engine):
    with engine.connect():
        request.getfixturevalue("good")

def test_last(good): pass  # bad is torn down after it
""")
    # a parameter's fixture is torn down when the next one is needed
    each = {"TestEach.test_a[2]", "TestEach.test_b[2]"}
    assert leaking(result) == {*each, "test_careless", "test_last"}
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_last*", "*", "*", "*:* bad"])


def test_a_test_that_fails_already_is_not_failed_twice_but_shows_the_leak(run: Run):
    result = run("""
def test_failing(engine):
    take(engine)
    assert False

@pytest.mark.xfail
def test_known_to_fail(engine):
    take(engine)
    assert False

@pytest.fixture
def broken(engine):
    take(engine)
    raise ValueError

def test_with_a_broken_fixture(broken): pass
""")
    result.assert_outcomes(failed=1, xfailed=1, errors=1)
    assert leaking(result) == set()
    result.stdout.fnmatch_lines(
        [
            "*test_failing*",
            "*Connections not returned, found at teardown*",
            "*:* take",
            "*connections that tests did not return*",
            "*::test_known_to_fail",
            "*::test_with_a_broken_fixture",
        ]
    )


def test_unittest_threads_and_skips_are_covered(run: Run):
    result = run("""
class TestOld(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.engine = sa.create_engine("sqlite://")
        cls.shared = cls.engine.raw_connection()

    @classmethod
    def tearDownClass(cls):
        cls.shared.close()

    def test_good(self):
        with self.engine.connect(): pass

def test_thread(engine):
    thread = threading.Thread(target=take, args=[engine], name="courier")
    thread.start()
    thread.join()

def test_skipped(engine):
    take(engine)
    pytest.skip("too late")

@pytest.mark.pool_leaks_allowed
def test_allowed(engine):
    take(engine)

class TestNew(unittest.TestCase):
    def test_bad(self):
        take(sa.create_engine("sqlite://"))
""")
    assert leaking(result) == {"test_thread", "test_skipped", "TestNew.test_bad"}
    result.stdout.fnmatch_lines(["* by thread courier:"])


@pytest.mark.extra
def test_tasks_are_named_and_one_that_is_about_to_return_is_given_a_moment(run: Run):
    result = run("""
from sqlalchemy.ext.asyncio import create_async_engine

def url(tmp_path):
    return f"sqlite+aiosqlite:///{tmp_path / 'app.db'}"

async def hold(engine):
    held.append(await engine.connect())

def test_held(tmp_path):
    async def main():
        await asyncio.create_task(hold(create_async_engine(url(tmp_path))), name="greedy")
    asyncio.run(main())

@pytest.mark.filterwarnings("ignore")
def test_dropped(tmp_path):
    async def main():
        await create_async_engine(url(tmp_path)).connect()
    asyncio.run(main())

@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()

def test_about_to_return(tmp_path, loop):
    engine = create_async_engine(url(tmp_path))
    taken = threading.Event()
    async def main():
        async with engine.connect():
            taken.set()
            await asyncio.sleep(0.1)
        await engine.dispose()
    held.append(asyncio.run_coroutine_threadsafe(main(), loop))
    taken.wait()

def test_that_keeps_the_loop_alive(loop): pass

@pytest.fixture(scope="module")
def stopped_loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()

@pytest.mark.parametrize("seconds", [0.1, 60])
def test_about_to_return_on_a_stopped_loop(tmp_path, stopped_loop, seconds):
    engine = create_async_engine(url(tmp_path))
    async def use():
        async with engine.connect():
            await asyncio.sleep(seconds)
    async def main():
        held.append(asyncio.create_task(use()))
        await asyncio.sleep(0.05)
    stopped_loop.run_until_complete(main())

def test_last(stopped_loop):
    held[-1].cancel()
    stopped_loop.run_until_complete(asyncio.sleep(0.1))
""")
    slow = "test_about_to_return_on_a_stopped_loop[60]"
    assert leaking(result) == {"test_held", "test_dropped", slow}
    result.stdout.fnmatch_lines(["* by task greedy:", "*:* hold"])


def test_pools_of_every_class_are_covered(run: Run):
    result = run("""
from sqlalchemy import pool
from sqla_poolkit import ManagedPool, MonitoredNullPool, MonitoredQueuePool

CLASSES = [
    pool.QueuePool, pool.NullPool, pool.StaticPool, pool.SingletonThreadPool, pool.AssertionPool,
    ManagedPool, MonitoredQueuePool, MonitoredNullPool,
]

@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("is_good", [True, False])
def test_it(kind, is_good, tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}", poolclass=kind)
    take(engine)
    held[-1].execute(SELECT)
    if is_good:
        held[-1].close()
""")
    classes = "Queue Null Static SingletonThread Assertion Managed MonitoredQueue MonitoredNull"
    assert leaking(result) == {f"test_it[False-{name}Pool]" for name in classes.split()}


def test_nothing_is_looked_at_until_that_is_asked_for(run: Run, pytester: pytest.Pytester):
    source = "def test_bad(engine): take(engine)"
    run(source, "--strict-markers").assert_outcomes(passed=1)
    pytester.makeini("[pytest]\npool_leaks = warn")
    result = run(source, "-W", "error")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*connections that tests did not return*", "*::test_bad", "1 *"])
    result = run(source, "--pool-leaks=off")
    assert "not return" not in str(result.stdout)
    pytester.makeini("[pytest]\npool_leaks = fial")
    result = run(source, "-q")
    result.stderr.fnmatch_lines(["*pool_leaks = fial is not possible; it is one of *'fail'*"])


@pytest.mark.extra
def test_xdist_sends_all_of_it_to_the_terminal(run: Run):
    result = run(
        """
def test_bad(engine): take(engine)

def test_failing(engine):
    take(engine)
    assert False

@pytest.mark.xfail
def test_known_to_fail(engine):
    take(engine)
    assert False
""",
        *("-p", "xdist", "-n", "1", "--pool-leaks=fail"),
    )
    result.assert_outcomes(passed=1, failed=1, errors=1, xfailed=1)
    assert leaking(result) == {"test_bad"}
    result.stdout.fnmatch_lines(
        [
            "*Connections not returned, found at teardown*",
            "*connections that tests did not return*",
            "*::test_known_to_fail",
        ]
    )


def test_a_suite_without_a_database_does_not_load_sqlalchemy(run: Run):
    result = run(
        """
def test_it():
    import sys
    assert "sqla_poolkit.testing.plugin" in sys.modules
    assert not {"sqlalchemy", "asyncio"} & set(sys.modules)
""",
        "-q",
        fixtures="",
    )
    result.assert_outcomes(passed=1)


def test_it_is_registered_for_pytest_under_its_name():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, module = setup["options.entry_points"]["pytest11"].strip().partition(" = ")
    assert name == "poolkit"
    assert callable(import_module(module).pytest_configure)


def test_a_leak_on_postgresql_is_found(run: Run, postgres: PostgresServer):
    result = run(f"""
@pytest.fixture(scope="module")
def postgresql():
    engine = sa.create_engine({postgres.url("psycopg2")!r})
    yield engine
    for connection in held: connection.close()
    engine.dispose()

def test_good(postgresql):
    with Session(postgresql) as session:
        session.execute(SELECT)

def test_bad(postgresql):
    take(postgresql)
    held[-1].execute(SELECT)

def test_after_an_error_the_connection_is_still_out(postgresql):
    take(postgresql)
    with pytest.raises(sa.exc.DBAPIError):
        held[-1].execute(sa.text("SELECT 1 / 0"))

def test_lost(postgresql):
    with postgresql.connect() as connection:
        connection.invalidate()
""")
    assert leaking(result) == {"test_bad", "test_after_an_error_the_connection_is_still_out"}


# -- assert_no_leaks ---------------------------------------------------------------------------


@pytest.fixture(params=[QueuePool, NullPool, StaticPool, ManagedPool, MonitoredQueuePool])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}", poolclass=request.param)
    yield engine
    if isinstance(engine.pool, ManagedPool):
        engine.pool.close()
    engine.dispose()


def leak_in_block(target: object, take: Callable[[], object]) -> LeakedConnections:
    """Return what is said of that which ``take`` takes."""
    with pytest.raises(LeakedConnections) as error, assert_no_leaks(target):  # type: ignore[arg-type]
        take()
    return error.value


def test_a_block_fails_that_does_not_return_what_it_took(engine: sa.Engine):
    held = [engine.connect()]
    with assert_no_leaks(engine), engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
    with held_by("job"):
        error = leak_in_block(engine.pool, lambda: held.append(engine.connect()))
    assert re.search(r"taken 0.\d\d s ago by job in thread MainThread:\n    tests/", str(error))
    assert f"{Path(__file__).name}:" in str(error)
    for connection in held:
        connection.close()


def test_a_block_is_about_its_own_engine_also_when_that_is_disposed(
    engine: sa.Engine, tmp_path: Path
):
    other = sa.create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    held = []

    def take_and_dispose() -> None:
        held.append(engine.connect())
        engine.dispose()
        engine.dispose()

    with assert_no_leaks(engine):
        held.append(other.connect())
    assert str(leak_in_block(engine, take_and_dispose)).startswith("1 connection was")
    both = leak_in_block(None, lambda: held.extend([engine.connect(), other.connect()]))
    assert str(both).startswith("2 connections were")
    for connection in held:
        connection.invalidate()  # what comes back to a pool that was disposed would stay open
        connection.close()
    other.dispose()


def test_an_error_of_the_block_is_not_covered_up(engine: sa.Engine):
    held = []

    def take_and_fail() -> None:
        held.append(engine.connect())
        raise KeyError

    with pytest.raises(KeyError), assert_no_leaks(engine):
        take_and_fail()
    held[0].close()


def test_a_block_listens_no_longer_than_it_lasts(engine: sa.Engine):
    with assert_no_leaks(engine), assert_no_leaks():
        assert sa.event.contains(Pool, "checkout", checkouts._note)
    assert not sa.event.contains(Pool, "checkout", checkouts._note)
    assert checkouts._collects not in gc.callbacks


def test_nested_checkouts_of_one_thread_count_as_one_with_singletonthreadpool(tmp_path: Path):
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}", poolclass=SingletonThreadPool)
    with assert_no_leaks(engine), engine.connect(), engine.connect():
        pass
    engine.dispose()


def test_what_cannot_be_watched_is_refused():
    with pytest.raises(ArgumentError, match="takes an engine or a pool, "):
        assert_no_leaks("sqlite://")


def test_a_pool_class_that_is_made_meanwhile_is_watched(tmp_path: Path):
    engines, held = [], []

    def take() -> None:
        class Mine(QueuePool):
            pass

        engines.append(sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}", poolclass=Mine))
        held.append(engines[0].connect())

    assert "(Mine)" in str(leak_in_block(None, take))
    held[0].close()
    engines[0].dispose()


@pytest.mark.extra
def test_tasks_that_are_about_to_return_get_a_moment_in_an_async_block(tmp_path: Path):
    from sqlalchemy.ext.asyncio import create_async_engine  # which needs greenlet

    async def main() -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}")

        async def use(seconds: float) -> None:
            async with engine.connect():
                await asyncio.sleep(seconds)

        async with assert_no_leaks(engine):
            task = asyncio.create_task(use(0.05))
            await asyncio.sleep(0.02)
        await task
        watched = await assert_no_leaks(engine).__aenter__()
        keeper = asyncio.create_task(use(60), name="keeper")
        await asyncio.sleep(0.02)
        with pytest.raises(LeakedConnections, match="by task keeper"):
            await watched.__aexit__(None, None, None)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        await engine.dispose()

    asyncio.run(main())


def test_threads_that_take_and_return_all_the_time_do_not_confuse_it(tmp_path: Path):
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}", poolclass=QueuePool)
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            with engine.connect():
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    with assert_no_leaks(engine):
        for thread in threads:
            thread.start()
        for _ in range(20):
            with assert_no_leaks(sa.create_engine("sqlite://")):
                gc.collect()
        is_over.set()
        for thread in threads:
            thread.join()
    engine.dispose()
