"""What every test shares: a PostgreSQL server, and the proof that it cleans up behind itself."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest

import sqla_poolkit.watch  # noqa: F401  # starts that log
from sqla_poolkit.pool import _registry
from tests.network import LossyLink, NotPermitted
from tests.servers import (
    MariaDBServer,
    NotInstalled,
    PgBouncer,
    PostgresError,
    PostgresServer,
    Server,
)

pytest_plugins = ["pytester"]

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

# A worker thread of a pool stays for about a second in case there is more to do.
PATIENCE_SECONDS = 3.0
DESCRIPTORS = Path("/proc/self/fd")
# Fixtures that are servers, each shared by all tests.
SERVERS = ("postgres", "pgbouncer", "mariadb")

# The log of warnings sums up ten seconds, and would speak in the middle of another test.
_registry.newcomers.clear()

# These run the pool in greenlets, a package that only the extras bring.
NEED_GREENLET = (
    "pool/test_async_pool.py",
    "pool/test_deadlock.py",
    "pool/test_fault_schedules.py",
    "pool/test_outages.py",
    "pool/test_schedules.py",
    "watch/test_last_rollback.py",
    "watch/test_monitor_servers.py",
)
# What these test needs packages of its own.
NEED_EXPORTERS = (
    "watch/test_multiprocess.py",
    "watch/test_opentelemetry.py",
    "watch/test_outage_exported.py",
    "watch/test_prometheus.py",
    "watch/test_prometheus_server.py",
)
collect_ignore = [] if importlib.util.find_spec("greenlet") else [*NEED_GREENLET]
if not importlib.util.find_spec("prometheus_client"):
    collect_ignore += NEED_EXPORTERS

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
        if set(SERVERS) & set(getattr(item, "fixturenames", ())):
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


@pytest.fixture(scope="module")
def _fragile() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture
def own_server(_fragile: PostgresServer) -> Iterator[PostgresServer]:
    """A server of the module's own to be stopped and frozen, which runs again after each test."""
    yield _fragile
    _fragile.mend()


@pytest.fixture(scope="session")
def pgbouncer(postgres: PostgresServer) -> Iterator[PgBouncer]:
    """A running PgBouncer in front of ``postgres``; where it is not installed, a skip."""
    try:
        server = PgBouncer(postgres)
    except NotInstalled as missing:
        pytest.skip(str(missing))
    with server:
        yield server


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDBServer]:
    """A running MariaDB; where it is not installed, a skip."""
    try:
        server = MariaDBServer()
    except NotInstalled as missing:
        pytest.skip(str(missing))
    with server:
        yield server


@pytest.fixture
def lossy_link(postgres: PostgresServer) -> Iterator[LossyLink]:
    """A TCP address of ``postgres`` behind a network that can lose packets; or a skip."""
    with ExitStack() as stack:
        try:
            link = stack.enter_context(LossyLink(postgres.socket))
        except NotPermitted as refused:
            pytest.skip(str(refused))
        yield link


@dataclass(frozen=True)
class Belongings:
    """What a process holds at one moment that a test could leave behind."""

    threads: frozenset[threading.Thread]
    descriptors: frozenset[tuple[str, str]]
    sessions: Mapping[str, int]
    """Of each server in use."""

    @classmethod
    def now(cls, servers: Iterable[Server]) -> Belongings:
        return cls(
            # Python lists also those whose start a signal has prevented
            frozenset(filter(threading.Thread.is_alive, threading.enumerate())),
            frozenset(_descriptors()),
            {server.name: server.sessions() for server in servers},
        )

    def beyond(self, before: Belongings) -> list[str]:
        """Return what is here now and was not before, in words."""
        extra = [f"thread {t.name} {_place(t)}" for t in self.threads - before.threads]
        extra += [f"descriptor {n} -> {it}" for n, it in self.descriptors - before.descriptors]
        for name, count in self.sessions.items():
            if count > before.sessions[name]:
                extra.append(f"{count - before.sessions[name]} session(s) of {name}")
        return sorted(extra)


def _place(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    stack = traceback.extract_stack(frame)
    return "at " + " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(stack))


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
    """Fail the test that ends with a thread, descriptor or server session more than before.

    Also one that leaves a server frozen or stopped; the next test finds it running.
    """
    servers = [request.getfixturevalue(name) for name in SERVERS if name in request.fixturenames]
    before = Belongings.now(servers)
    yield
    undone = [f"{server.name} {state}" for server in servers for state in server.mend()]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while extra := Belongings.now(servers).beyond(before):
        if time.monotonic() > deadline:
            break
        gc.collect()
        time.sleep(0.02)
    if undone or extra:
        pytest.fail(f"The test left behind: {'; '.join([*undone, *extra])}", pytrace=False)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin with no pool in the process: those of other tests may not be collected yet."""
    monkeypatch.setattr(_registry, "_keepers", weakref.WeakValueDictionary())
