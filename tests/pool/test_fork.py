"""A forked child starts with nothing, and what the parent has survives whatever the child does."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.servers import PostgresServer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

ROOT = Path(__file__).parents[2]
POSTGRES_DRIVERS = ["psycopg2", "psycopg"]
PARTING_SECONDS = 60.0

# What every script starts with.  ``in_child(work)`` forks, runs ``work`` in the child and fails the
# script if that raised or hung; ``leave`` ends the child as an interpreter ends, os._exit does not.
PRELUDE = """
import contextlib, faulthandler, gc, logging, os, signal, sys, threading, time, traceback, warnings
import sqlalchemy as sa
from sqla_poolkit import ManagedPool

warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
URL = sys.argv[1]

# An alarm, for it needs no thread: those of faulthandler's own watchdog would not survive a fork.
faulthandler.register(signal.SIGALRM, chain=True)


def make_engine(**settings):
    return sa.create_engine(URL, poolclass=ManagedPool, **settings)


def session_of(connection):
    if URL.startswith("sqlite"):
        return id(connection.connection.dbapi_connection)
    return connection.scalar(sa.text("SELECT pg_backend_pid()"))


def works(connection):
    return connection.scalar(sa.text("SELECT 6 * 7")) == 42


def in_child(work, leave=os._exit, seconds=15):
    child = os.fork()
    if not child:
        signal.alarm(seconds)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        leave(0)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"the child ended with {status}"


class Gate:
    '''A listener that comes back when it is told to.'''

    def __init__(self):
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, *_):
        self.begun.set()
        self.go_on.wait(20)
"""


def run(script: str, url: str) -> None:
    """Run a script in an interpreter of its own; it must end well and say nothing."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", PRELUDE + textwrap.dedent(script), url],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PARTING_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'database.sqlite'}"


@pytest.fixture(params=["sqlite", *POSTGRES_DRIVERS])
def url(request: pytest.FixtureRequest) -> str:
    """The address of a database of each kind."""
    if request.param == "sqlite":
        return request.getfixturevalue("sqlite_url")
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.url(request.param)


# The fixture asks for the server by name, which the marker of its users cannot see.
every_database = [pytest.mark.extra, pytest.mark.usefixtures("postgres")]


def for_every_database(test):
    for mark in every_database:
        test = mark(test)
    return test


@for_every_database
def test_a_child_starts_with_no_connection_and_zeroed_books(url: str):
    run(
        """
        engine = make_engine(max_size=3)
        held = engine.connect()
        session = session_of(held)
        engine.connect().close()

        def work():
            snapshot = engine.pool.snapshot()
            assert (snapshot.open, snapshot.idle, snapshot.checked_out) == (0, 0, 0), snapshot
            assert (snapshot.requests, snapshot.connects, snapshot.checkins) == (0, 0, 0), snapshot
            assert snapshot.pid == os.getpid()
            assert snapshot.name == before.name and snapshot.settings == before.settings
            with engine.connect() as one, engine.connect() as two, engine.connect() as three:
                sessions = {session_of(each) for each in (one, two, three)}
                assert len(sessions) == 3
                assert session not in sessions or URL.startswith("sqlite")
            assert engine.pool.snapshot().connects == 3

        before = engine.pool.snapshot()
        in_child(work)
        held.close()
        assert engine.pool.snapshot().connects == before.connects
        engine.pool.close()
        """,
        url,
    )


@for_every_database
@pytest.mark.parametrize(
    "deed",
    [
        "pass",
        "with engine.connect() as one: assert works(one)",
        "engine.dispose()",
        "engine.dispose(); assert works(engine.connect())",
        "gc.collect(); gc.collect()",
        "del globals()['engine'], globals()['held']; gc.collect()",
        "engine.pool.close()",
        "with contextlib.suppress(sa.exc.DBAPIError): held.close()",
        "held.invalidate()",
    ],
)
def test_the_connections_of_the_parent_survive_what_the_child_does(url: str, deed: str):
    run(
        f"""
        engine = make_engine(max_size=3)
        held, idle = engine.connect(), engine.connect()
        sessions = session_of(held), session_of(idle)
        idle.close()

        def work():
            # that a held connection of the parent cannot be reset here may be told
            logging.disable()
            {deed}

        in_child(work)
        in_child(work, leave=sys.exit)
        assert works(held) and session_of(held) == sessions[0]
        with engine.connect() as again:
            assert works(again) and session_of(again) == sessions[1]
        held.close()
        snapshot = engine.pool.snapshot()
        assert (snapshot.connects, snapshot.closes) == (2, {{}}), snapshot
        engine.pool.close()
        """,
        url,
    )


@for_every_database
def test_the_child_of_a_child_starts_with_nothing_too(url: str):
    run(
        """
        engine = make_engine(max_size=2)
        held = engine.connect()

        def grandchild():
            assert engine.pool.snapshot().open == 0
            with engine.connect() as connection:
                assert works(connection)

        def child():
            with engine.connect() as connection:
                in_child(grandchild)
                assert works(connection)

        in_child(child)
        assert works(held)
        held.close()
        engine.pool.close()
        """,
        url,
    )


@for_every_database
@pytest.mark.parametrize("stage", ["do_connect", "first_connect", "connect"])
def test_a_child_works_that_was_forked_while_a_connect_was_under_way(url: str, stage: str):
    run(
        f"""
        engine = make_engine(max_size=1)
        gate = Gate()
        sa.event.listen(engine, {stage!r}, gate)
        answers = []
        asker = threading.Thread(target=lambda: answers.append(works(engine.connect())))
        asker.start()
        assert gate.begun.wait(20)

        def work():
            gate.go_on = threading.Event()
            gate.go_on.set()
            snapshot = engine.pool.snapshot()
            assert (snapshot.connecting, snapshot.requesting) == (0, 0), snapshot
            with engine.connect() as connection:
                assert works(connection)

        in_child(work)
        gate.go_on.set()
        asker.join(20)
        assert answers == [True]
        gc.collect()
        engine.pool.close()
        """,
        url,
    )


@for_every_database
def test_a_child_works_that_was_forked_while_callers_wait(url: str):
    run(
        """
        engine = make_engine(max_size=1)
        held = engine.connect()
        answers = []

        def ask():
            with engine.connect() as connection:
                answers.append(works(connection))

        askers = [threading.Thread(target=ask) for _ in range(3)]
        for asker in askers:
            asker.start()
        while engine.pool.snapshot().waiting < 3:
            time.sleep(0.002)

        def work():
            snapshot = engine.pool.snapshot()
            assert (snapshot.waiting, snapshot.requesting) == (0, 0), snapshot
            with engine.connect() as connection:
                assert works(connection)

        in_child(work)
        assert answers == []
        held.close()
        for asker in askers:
            asker.join(20)
        assert answers == [True] * 3
        engine.pool.close()
        """,
        url,
    )


def test_a_child_works_that_was_forked_while_another_thread_held_the_lock(sqlite_url: str):
    run(
        """
        engine = make_engine(max_size=2)
        engine.connect().close()
        has_it, done = threading.Event(), threading.Event()

        def keep_lock():
            with engine.pool._driver.lock:
                has_it.set()
                done.wait(20)

        keeper = threading.Thread(target=keep_lock)
        keeper.start()
        assert has_it.wait(20)

        def work():
            with engine.connect() as connection:
                assert works(connection)

        in_child(work)
        done.set()
        keeper.join(20)
        with engine.connect() as connection:
            assert works(connection)
        engine.pool.close()
        """,
        sqlite_url,
    )


def test_a_child_keeps_its_limit_and_its_queue(sqlite_url: str):
    run(
        """
        engine = make_engine(max_size=2, pool_timeout=10)
        held = engine.connect()

        def ask():
            for _ in range(20):
                with engine.connect() as connection:
                    answers.append(works(connection))

        def work():
            askers = [threading.Thread(target=ask) for _ in range(6)]
            for asker in askers:
                asker.start()
            for asker in askers:
                asker.join()
            snapshot = engine.pool.snapshot()
            assert answers == [True] * 120
            assert snapshot.connects <= 2 and snapshot.checkouts == 120, snapshot

        answers = []
        in_child(work)
        held.close()
        engine.pool.close()
        """,
        sqlite_url,
    )


def test_upkeep_starts_anew_in_a_child(sqlite_url: str):
    run(
        """
        engine = make_engine(max_size=3, idle_timeout=0.05)
        engine.connect().close()

        def work():
            engine.connect().close()
            deadline = time.monotonic() + 15
            while not engine.pool.snapshot().closes.get("idle"):
                assert time.monotonic() < deadline
                time.sleep(0.01)

        in_child(work)
        engine.pool.close()
        """,
        sqlite_url,
    )


# Not with SQLite: its own memory lock may be held by another thread at the fork, with any pool.
@for_every_database
@pytest.mark.parametrize("url", POSTGRES_DRIVERS, indirect=True)
def test_no_child_hangs_of_thirty_forked_while_threads_use_the_pool(url: str):
    run(
        """
        engine = make_engine(max_size=3, pool_timeout=20)
        is_over = threading.Event()
        failures = []

        def use():
            try:
                while not is_over.is_set():
                    with engine.connect() as connection:
                        assert works(connection)
            except BaseException as error:
                failures.append(error)

        users = [threading.Thread(target=use) for _ in range(5)]
        for user in users:
            user.start()

        def work():
            with engine.connect() as connection:
                assert works(connection)

        for _ in range(30):
            in_child(work)
        is_over.set()
        for user in users:
            user.join(20)
        assert failures == []
        assert engine.pool.snapshot().checked_out == 0
        engine.pool.close()
        """,
        url,
    )


@for_every_database
def test_processes_of_multiprocessing_use_the_pool_of_their_parent(url: str):
    run(
        """
        import multiprocessing

        engine = make_engine(max_size=2)
        held = engine.connect()
        session = session_of(held)

        def work(number):
            with engine.connect() as connection:
                return works(connection), engine.pool.snapshot().requests

        with multiprocessing.get_context("fork").Pool(2) as processes:
            answers = processes.map(work, range(6))
        assert all(answer for answer, _ in answers)
        assert sum(requests == 1 for _, requests in answers) <= 2, answers
        assert works(held) and session_of(held) == session
        held.close()
        engine.pool.close()
        """,
        url,
    )
