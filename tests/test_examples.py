"""Each example runs as a newcomer would run it, on both databases, and shows its point."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import PostgresServer

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
        r"found dead before they were handed out: 4,",
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
}
NEEDS_EXTRAS = {"asyncio_pool"}
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
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHOWN)


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
