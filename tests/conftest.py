"""What every test shares: a PostgreSQL server, and the proof that it cleans up behind itself."""

from __future__ import annotations

import gc
import importlib.util
import os
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest

from tests.servers import PostgresError, PostgresServer

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

# A worker thread of a pool stays for about a second in case there is more to do.
PATIENCE_SECONDS = 3.0
DESCRIPTORS = Path("/proc/self/fd")

# These run the pool in greenlets, a package that only the extras bring.
collect_ignore = (
    []
    if importlib.util.find_spec("greenlet")
    else ["pool/test_schedules.py", "pool/test_fault_schedules.py", "pool/test_async_pool.py"]
)

# No deadline per example: a machine that is busy with something else is no fault of the code.
# Where CI is set, Hypothesis draws the same examples in each run: a red one can be repeated.
hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.register_profile(
    "ci-short",
    hypothesis.settings.get_profile("default"),
    max_examples=25,
    stateful_step_count=30,
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a skipped test is a failed test")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "postgres" in getattr(item, "fixturenames", ()):
            item.add_marker("extra")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return _without_skip(report, collector.config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return _without_skip(report, item.config)


def _without_skip(report: Report, config: pytest.Config) -> Report:
    if report.skipped and config.getoption("--no-skips") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which --no-skips forbids: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running PostgreSQL, shared by all tests; who stops it starts it again."""
    try:
        server = PostgresServer()
    except PostgresError as missing:
        pytest.fail(str(missing), pytrace=False)
    with server:
        yield server


@dataclass(frozen=True)
class Belongings:
    """What a process holds at one moment that a test could leave behind."""

    threads: frozenset[threading.Thread]
    descriptors: frozenset[tuple[str, str]]
    sessions: int

    @classmethod
    def now(cls, server: PostgresServer | None) -> Belongings:
        return cls(
            frozenset(threading.enumerate()),
            frozenset(_descriptors()),
            server.sessions() if server else 0,
        )

    def beyond(self, before: Belongings) -> list[str]:
        """Return what is here now and was not before, in words."""
        extra = [f"thread {thread.name}" for thread in self.threads - before.threads]
        extra += [f"descriptor {n} -> {it}" for n, it in self.descriptors - before.descriptors]
        if self.sessions > before.sessions:
            extra.append(f"{self.sessions - before.sessions} session(s) of the PostgreSQL server")
        return sorted(extra)


def _descriptors() -> Iterator[tuple[str, str]]:
    if not DESCRIPTORS.exists():  # macOS
        return
    for entry in os.listdir(DESCRIPTORS):
        try:
            target = os.readlink(DESCRIPTORS / entry)
        except FileNotFoundError:  # the listing's own, closed by now
            continue
        # The libraries keep /dev/null and /dev/urandom open from their first use on.
        if not target.startswith("/dev/"):
            yield entry, target


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that ends with a thread, descriptor or server session more than before."""
    server = None
    if "postgres" in request.fixturenames:
        server = request.getfixturevalue("postgres")
    before = Belongings.now(server)
    yield
    deadline = time.monotonic() + PATIENCE_SECONDS
    while extra := Belongings.now(server).beyond(before):
        if time.monotonic() > deadline:
            pytest.fail(f"The test left behind: {'; '.join(extra)}", pytrace=False)
        gc.collect()
        time.sleep(0.02)
