"""Each example runs as a newcomer would run it, on both databases, and shows its point."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers import PostgresServer, _free_ports
from tests.waiting import until

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

# What has to be seen: regular expressions, found in this order. Figures that depend on the
# machine's mood are left open.
SHOWN = {
    "postgresql_pool": [
        r"each of 200 requests found \{1\} user",
        r"pool_size \+ max_overflow +-> max_size=30",
        r"pool_recycle +-> max_lifetime=3600 s",
        r"pool_pre_ping +-> pre_ping=True",
        r"checkouts +201",
        r"connections opened +([1-9]|[12]\d|30) \(of at most 30\)",
        r"as QueuePool puts it +Pool size: 10 .*Current Checked out connections: 0",
        r"as ManagedPool puts it +<ManagedPool '.*' \d+ of 30 open: \d+ idle, 0 checked out",
    ],
    "logs": [
        r"\[warning  \] checkout_timed_out .* label='GET /users' pool=shop waited_seconds=0\.[2-9]",
        r"\[warning  \] hold_exceeded .* label=report now_at='thread reporter at .*make_report'",
        r"\[info     \] hold_returned ",
        r"remembered: checkout_timed_out, connection_opened, hold_exceeded, hold_returned",
        r'"event": "checkout_timed_out", "level": "warning"',
        r'"label": "report", .*"event": "hold_returned", "level": "info"',
    ],
    "pool_monitoring": [
        r"SQLAlchemy's way",
        r"Connection created +\(thread: report\)",
        r"Connection checked out +\(thread: report\)",
        r"Size: 1$",
        r"Checked out: 2$",
        r"Overflow: 1$",
        r"Connection checked in ",
        r"With the snapshot",
        r"Connection created +\(thread: poolkit worker .*\)",
        r"Size: 1, checked out: 2, overflow: 1",
        r"Waiting: 1, for [1-9]\d* ms so far",
        r"Held by report for [1-9]\d* ms",
        r"Held by GET /users for [1-9]\d* ms",
        r"Connection checked in ",
        r"Checkouts: 3, of which waited: 3",
        r"Longest wait: [1-9]\d* ms, timeouts: 0",
        r"report: waited \d+ ms, made others wait [1-9]\d* ms",
        r"POST /orders: waited [1-9]\d* ms, made others wait \d+ ms",
    ],
    "pool_configuration": [
        r"nobody has asked yet +open 0 .*opened so far 0",
        r"min_size: ready +open 2 \(idle 2, checked out 0\)",
        r"max_size: eight callers +open 4 \(idle 0, checked out 4\), waiting 4",
        r"all served +open \d .*waiting 0",
        r"idle_timeout: back to two +open 2",
        r"max_lifetime: both replaced +open 2 .*\d for age",
    ],
    "multi_database": [
        r"user7@example.org and 39 others were found",
        r"read +get_user +401 checkouts, at most \d+ of 50 connections at once",
        r"write +create_user +40 checkouts, at most \d+ of 15 connections at once",
    ],
    "too_small": [
        r"max_size=2: 48 requests in .*, 4\d of them had to wait",
        r"PoolTimeout: no connection from pool '.*' within 0\.[5-9]\d s \(pool_timeout=0.5\)",
        r"Held longest: report \(.*too_small.py:\d+ request\)",
        r"What to do: 1\.",
        r"max_size=8: 48 requests in ",
    ],
    "too_large": [
        r"after a burst of 60 callers: +60 connections open, 60 idle",
        r"then one caller at a time: +1 connections open, 1 idle",
        r"closed for being idle: 59",
    ],
    "stale_connections": [
        r"pool_pre_ping=False, all 4 idle connections have died:",
        *[rf"caller {number}: (?!served)" for number in (1, 2, 3, 4)],
        r"four more callers: 4 served",
        r"found dead before they were handed out: 0,",
        r"pool_pre_ping=True, all 4 idle connections have died:",
        *[rf"caller {number}: served" for number in (1, 2, 3, 4)],
        # the second one within a second condemns those that are left
        r"found dead before they were handed out: [234],",
    ],
    "leaking_connections": [
        r"careful: everything was returned",
        r"hasty: 1 connection was taken and not returned:",
        r"pool '.*' \(QueuePool\), taken 0\.\d\d s ago by GET /hasty in thread MainThread:",
        r" +\S*leaking_connections.py:\d+ hasty",
        r" +\S*leaking_connections.py:\d+ check",
        r"forgetful: 1 connection was taken and not returned:",
        r" +\S*leaking_connections.py:\d+ forgetful",
        r"Return each: use it in a 'with' block",
    ],
    "outage": [
        r"web service: .*\b\d{2,} PoolUnavailable",
        r"the slowest answer took \d{1,3} ms",
        r"worker: 10 of 10 jobs done",
        r"the longest wait for the database took [12]\.\d s",
    ],
    "asyncio_pool": [
        r"six tasks: 2 of 2 connections open, 2 idle, .* 6 checkouts, 0 cancelled",
        r"report: 1 checkouts, waited \d+ ms, made others wait [1-9]\d* ms",
        r"GET /users: 5 checkouts, waited [1-9]\d* ms, made others wait \d+ ms",
        r"one gave up: .* 2 checked out, 0 waiting; .* 8 checkouts, 1 cancelled, 2 connects",
        r"all are there: .* 2 idle, .* 10 checkouts, 1 cancelled, 2 connects, 0 forgotten",
        r"second loop: 2 of 2 connections open, .* 12 checkouts, .* 4 connects, 2 forgotten",
        r"<AsyncManagedPool 'app' closed, 0 of 2 open: 0 idle, 0 checked out",
    ],
    "prometheus_metrics": [
        r"db_client_connection_count\{.*state=\"idle\"\} [12]\.0",
        r"db_client_connection_max\{.*\} 2\.0",
        r"db_client_connection_timeouts_total\{.*\} 0\.0",
        r"db_client_connection_wait_time_seconds_count\{.*\} 9\.0",
        r"wait_caused_seconds_total\{.*label=\"GET /(report|users)\"\} 0\.[1-9]",
        r"wait_caused_seconds_total\{.*label=\"GET /(report|users)\"\} 0\.[1-9]",
    ],
    "opentelemetry_metrics": [
        r"while one works and others wait:",
        r"db\.client\.connection\.wait_time: 2 records, 0\.[4-9]\d s together",
        r"db\.client\.connection\.count used: 1 \{connection\}",
        r"db\.client\.connection\.pending_requests: 2 \{request\}",
        r"sqlalchemy\.pool\.health busy: 1 \{process\}",
        r"afterwards:",
        r"db\.client\.connection\.use_time: 4 records, [12]\.\d\d s together",
        r"db\.client\.connection\.count idle: 1 \{connection\}",
        r"sqlalchemy\.pool\.health ok: 1 \{process\}",
    ],
}
# Those that are served by a server of the web, with the command that starts it.  A worker that
# gunicorn starts at the very moment of the signal misses it, so here there is one.
SERVED = {
    "gunicorn_shutdown": "-m gunicorn -c python:gunicorn_shutdown --workers 1 --no-control-socket",
    "uvicorn_shutdown": "uvicorn_shutdown.py",
}
WEB_DRIVERS = {"gunicorn_shutdown": "psycopg2", "uvicorn_shutdown": "asyncpg"}
NEEDS_EXTRAS = {"asyncio_pool", "logs", "prometheus_metrics", "opentelemetry_metrics"}
PATIENCE_SECONDS = 10.0  # half of what the servers allow for their end
ON_SQLITE = [
    pytest.param(example, marks=pytest.mark.extra) if example in NEEDS_EXTRAS else example
    for example in SHOWN
]
SHOWN_ON_POSTGRESQL = SHOWN | {
    "too_large": [
        r"after a burst of 60 callers: +60 connections open, 60 idle",
        r"the server counts \d+ sessions of at most 200",
        r"closed for being idle: 59",
        r"QueuePool: 4 of 12 callers served, the others failed: too many connections for role",
        r"ManagedPool: 12 of 12 callers served",
        r"it opened 4 connections, \d+ attempts were refused",
    ],
}


def run(example: str, *arguments: str) -> str:
    """Run an example in a process of its own and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{example}.py", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def not_shown(output: str, expected: list[str]) -> list[str]:
    """Return what is expected and does not follow in this order."""
    missing = []
    rest = output
    for pattern in expected:
        if found := re.search(pattern, rest, re.MULTILINE):
            rest = rest[found.end() :]
        else:
            missing.append(pattern)
    return missing


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SHOWN.keys() | SERVED.keys()


@pytest.mark.parametrize("example", ON_SQLITE)
def test_it_shows_its_point_on_sqlite(example: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    output = run(example)
    assert not_shown(output, SHOWN[example]) == [], output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("example", SHOWN)
def test_it_shows_its_point_on_postgresql(example: str, postgres: PostgresServer):
    before = belongings(postgres)
    output = run(example, postgres.url("psycopg2"))
    assert not_shown(output, SHOWN_ON_POSTGRESQL[example]) == [], output
    assert belongings(postgres) == before


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_the_pool_for_asyncio_shows_its_point_with_either_driver(
    driver: str, postgres: PostgresServer
):
    output = run("asyncio_pool", postgres.url(driver))
    assert not_shown(output, SHOWN["asyncio_pool"]) == [], output


def belongings(server: PostgresServer) -> list[tuple[str]]:
    """Return what an example could leave in the database."""
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
    return server.query(f"{tables} UNION SELECT rolname FROM pg_roles ORDER BY 1")


@pytest.mark.parametrize("example", SHOWN)
def test_its_docstring_tells_how_to_run_it(example: str):
    source = (EXAMPLES / f"{example}.py").read_text()
    assert f"    python examples/{example}.py\n" in source
    driver = "asyncpg" if example == "asyncio_pool" else "psycopg2"
    assert f"    python examples/{example}.py postgresql+{driver}://" in source
    assert "Without a URL it runs on an SQLite file in a temporary folder." in source


# -- servers of the web ------------------------------------------------------------------------

IN_FLIGHT = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'"


class Service:
    """An example that is served, with one request in flight."""

    def __init__(self, example: str, server: PostgresServer, threads: ThreadPoolExecutor) -> None:
        port = next(_free_ports())
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", *SERVED[example].split()],
            cwd=EXAMPLES,
            env=os.environ
            | {
                "DATABASE_URL": server.url(WEB_DRIVERS[example]),
                "PORT": str(port),
                "PYTHONPATH": str(ROOT),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: self.process.poll() is not None or listens(port), "it does not listen")
        self.answer = threads.submit(get, f"http://127.0.0.1:{port}/users")
        until(lambda: server.query(IN_FLIGHT) == [(1,)], "no request is in flight")

    def end(self, by: signal.Signals) -> str:
        """End the service in its time; return what it wrote."""
        self.process.send_signal(by)
        return self.process.communicate(timeout=PATIENCE_SECONDS)[1]


@contextmanager
def serving(example: str, server: PostgresServer) -> Iterator[Service]:
    with ThreadPoolExecutor(1) as threads:
        service = Service(example, server, threads)
        try:
            yield service
        finally:
            service.process.kill()
            service.process.communicate()


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=PATIENCE_SECONDS) as answer:
        return answer.read()


@pytest.mark.parametrize("example", SERVED)
def test_sigterm_lets_a_request_end_and_leaves_no_session(example: str, postgres: PostgresServer):
    with serving(example, postgres) as service:
        written = service.end(signal.SIGTERM)
        assert service.answer.result() == b"done\n"
        # uvicorn ends itself by the signal it was sent, as it should
        assert service.process.returncode in (0, -signal.SIGTERM)
    until(lambda: postgres.sessions() == 0, "sessions stay")
    assert re.findall(r"(?i).*(?:warn|error|critical|exception|traceback).*", written) == []


def test_sigquit_cuts_off_a_request_of_gunicorn(postgres: PostgresServer):
    with serving("gunicorn_shutdown", postgres) as service:
        service.end(signal.SIGQUIT)
        assert isinstance(service.answer.exception(), OSError)  # an HTTPError is one
    until(lambda: postgres.sessions() == 0, "sessions stay")


@pytest.mark.parametrize("example", SERVED)
def test_its_docstring_tells_how_to_serve_it(example: str):
    source = (EXAMPLES / f"{example}.py").read_text()
    command = SERVED[example].removeprefix("-m ").partition(" --")[0]
    assert re.search(rf"^    (python examples/)?{re.escape(command)}$", source, re.MULTILINE)
    assert f"postgresql+{WEB_DRIVERS[example]}://" in source
    assert "Without DATABASE_URL it runs on an SQLite file" in source
