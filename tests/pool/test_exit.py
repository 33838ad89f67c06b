"""An interpreter with a pool ends at once and in silence, whatever the pool is in the middle of."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 3.0

PRELUDE = """
import sys, threading, time
import sqlalchemy as sa
from sqla_poolkit import ManagedPool

URL = "sqlite:///" + sys.argv[1]


def make_engine(**settings):
    engine = sa.create_engine(URL, poolclass=ManagedPool, **settings)
    return engine


def hang_at_connect(engine):
    '''Let connects of this engine take for ever; return an event that tells that one has begun.'''
    begun = threading.Event()

    @sa.event.listens_for(engine, "do_connect")
    def hang(*_):
        begun.set()
        threading.Event().wait()

    return begun


def wait_until(is_so):
    deadline = time.monotonic() + 15
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def background(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


before_exit = lambda: print(f"{time.monotonic():.6f}", flush=True)
"""


def assert_ends_well(script: str, folder: Path, code: int = 0) -> None:
    """Run a script; from its last line on it must end in time, with this code, in silence."""
    done = subprocess.Popen(
        [
            sys.executable,
            "-X",
            "dev",
            # SQLite's connections complain at the end since Python 3.13, with any pool
            "-W",
            "ignore:unclosed database:ResourceWarning",
            "-c",
            PRELUDE + textwrap.dedent(script),
            str(folder / "database.sqlite"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = done.communicate(timeout=60)
    finally:
        done.kill()
    took = time.monotonic() - float(output or "0")
    assert (done.returncode, errors) == (code, "")
    assert took < MOST_SECONDS


@pytest.mark.parametrize("upkeep", ["thread", "inline"])
def test_the_interpreter_ends_with_idle_connections(tmp_path: Path, upkeep: str):
    assert_ends_well(
        f"""
        engine = make_engine(upkeep={upkeep!r})
        with engine.connect() as one, engine.connect() as two:
            one.execute(sa.text("SELECT 1"))
        before_exit()
        """,
        tmp_path,
    )


@pytest.mark.parametrize("upkeep", ["thread", "inline"])
def test_the_interpreter_ends_with_a_holder_out(tmp_path: Path, upkeep: str):
    assert_ends_well(
        f"""
        engine = make_engine(upkeep={upkeep!r}, max_size=2)
        held = engine.connect()
        held.execute(sa.text("SELECT 1"))
        also_held = engine.raw_connection()
        before_exit()
        """,
        tmp_path,
    )


def test_the_interpreter_ends_while_upkeep_has_much_to_do(tmp_path: Path):
    assert_ends_well(
        """
        engine = make_engine(min_size=3, max_size=5, idle_timeout=0.02, max_lifetime=0.1)
        engine.pool.wait_ready()
        wait_until(lambda: engine.pool.snapshot().connects > 6)
        before_exit()
        """,
        tmp_path,
    )


def test_the_interpreter_ends_while_a_connect_hangs(tmp_path: Path):
    assert_ends_well(
        """
        engine = make_engine(min_size=2)
        begun = hang_at_connect(engine)
        background(engine.connect)
        assert begun.wait(15)
        before_exit()
        """,
        tmp_path,
    )


def test_the_interpreter_ends_with_waiters_in_daemon_threads(tmp_path: Path):
    assert_ends_well(
        """
        engine = make_engine(max_size=1, pool_timeout=None)
        held = engine.connect()
        for _ in range(5):
            background(engine.connect)
        wait_until(lambda: engine.pool.snapshot().waiting == 5)
        before_exit()
        """,
        tmp_path,
    )


@pytest.mark.parametrize("upkeep", ["thread", "inline"])
def test_the_interpreter_ends_while_daemon_threads_use_the_pool(tmp_path: Path, upkeep: str):
    assert_ends_well(
        f"""
        engine = make_engine(max_size=2, upkeep={upkeep!r})

        def use():
            while True:
                with engine.connect() as connection:
                    connection.execute(sa.text("SELECT 1"))

        for _ in range(4):
            background(use)
        wait_until(lambda: engine.pool.snapshot().checkouts > 50)
        before_exit()
        """,
        tmp_path,
    )


def test_the_interpreter_waits_for_a_thread_that_is_no_daemon(tmp_path: Path):
    assert_ends_well(
        """
        engine = make_engine(max_size=1)
        held = engine.connect()

        def use():
            with engine.connect() as connection:
                connection.execute(sa.text("SELECT 1"))
            before_exit()

        threading.Thread(target=use).start()
        wait_until(lambda: engine.pool.snapshot().waiting == 1)
        held.close()
        """,
        tmp_path,
    )


def test_the_exit_code_is_the_programs_own(tmp_path: Path):
    assert_ends_well(
        """
        engine = make_engine(min_size=2)
        held = engine.connect()
        before_exit()
        sys.exit(7)
        """,
        tmp_path,
        code=7,
    )


def test_the_interpreter_ends_after_the_pool_was_closed(tmp_path: Path):
    assert_ends_well(
        """
        engine = make_engine(min_size=2)
        engine.pool.wait_ready()
        engine.pool.close()
        before_exit()
        """,
        tmp_path,
    )


def test_the_pool_works_in_functions_that_run_at_exit(tmp_path: Path):
    assert_ends_well(
        """
        import atexit

        engine = make_engine(max_size=1)

        @atexit.register
        def say_goodbye():
            with engine.connect() as connection:
                connection.execute(sa.text("SELECT 1"))
            engine.dispose()
            with engine.connect() as connection:
                connection.execute(sa.text("SELECT 1"))
            engine.pool.close()

        before_exit()
        """,
        tmp_path,
    )


def test_an_engine_that_dies_with_the_interpreter_is_silent(tmp_path: Path):
    assert_ends_well(
        """
        class Service:
            def __init__(self):
                self.engine = make_engine()
                self.held = self.engine.connect()
                self.itself = self

        service = Service()
        before_exit()
        """,
        tmp_path,
    )
