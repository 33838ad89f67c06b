"""In Prometheus' multiprocess mode whichever process is asked answers for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pytest
from prometheus_client import CollectorRegistry

from sqla_poolkit.watch import _shared
from sqla_poolkit.watch.prometheus import PoolCollector
from tests.servers import PostgresServer
from tests.waiting import until
from tests.watch.exporting import parsed, scrape
from tests.watch.service import VARIABLE, get, gunicorn

ROOT = Path(__file__).parents[2]

# A process with an engine that does what it is told, a line at a time, and says when it is done.
WORKER = """
import os, sys
from sqlalchemy import create_engine
from sqla_poolkit import ManagedPool
from sqla_poolkit.watch.prometheus import PoolCollector

PoolCollector(share_every=0.01)
engine = create_engine(sys.argv[1], poolclass=ManagedPool, max_size=3, pool_name="app")
held = []

def fork(number):
    "Start a process that holds so many connections until the pipe closes."
    end, pipe = os.pipe()
    if os.fork():
        os.close(end)
        return pipe
    os.close(pipe)
    mine = [engine.connect() for _ in range(number)]
    os.read(end, 1)
    os._exit(0)

for line in sys.stdin:
    exec(line)
    print(line, end="", flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shared"
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.fixture
def collector(folder: Path) -> Iterator[PoolCollector]:
    collector = PoolCollector(registry=None)
    yield collector
    collector.close()


class Worker:
    """Another process."""

    def __init__(self, database: Path, program: str = WORKER) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-c",
                textwrap.dedent(program),
                f"sqlite:///{database}",
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, line: str) -> None:
        stdin, stdout = self._pipes()
        stdin.write(f"{line}\n")
        stdin.flush()
        assert stdout.readline() == f"{line}\n"

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin
        assert self.process.stdout
        return self.process.stdin, self.process.stdout

    def end(self) -> None:
        for pipe in self._pipes():
            pipe.close()
        self.process.wait()


@contextmanager
def workers(tmp_path: Path, number: int) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        each = [Worker(tmp_path / "app.db") for _ in range(number)]
        for worker in each:
            stack.callback(worker.end)
        yield each


def test_processes_add_up(tmp_path: Path, collector: PoolCollector):
    with workers(tmp_path, 2) as each:
        for number, worker in enumerate(each, 1):
            worker.do(f"held += [engine.connect() for _ in range({number})]")
        until(lambda: used(collector) == 3)
        now = scrape(collector)["app"]
        assert {
            "max": now["db_client_connection_max"],
            "ok": now["sqlalchemy_pool_requests_total{outcome=ok}"],
            "waits": now["db_client_connection_wait_time_seconds_count"],
            "processes": now["sqlalchemy_pool_info{class=ManagedPool}"],
            "most in one": now["sqlalchemy_pool_checked_out_peak"],
        } == {"max": 6, "ok": 3, "waits": 3, "processes": 2, "most in one": 2}


def used(collector: PoolCollector) -> float:
    app = scrape(collector).get("app", {})
    return app.get("db_client_connection_count{db_client_connection_state=used}", 0)


def test_of_a_process_that_has_ended_the_counters_stay_and_the_gauges_go(
    tmp_path: Path, collector: PoolCollector, folder: Path
):
    with workers(tmp_path, 2) as (first, second):
        for worker in (first, second):
            worker.do("held.append(engine.connect())")
        until(lambda: used(collector) == 2)
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        until(lambda: used(collector) == 1)
        for _ in range(2):  # what was added to the past is added once
            now = scrape(collector)["app"]
            assert now["sqlalchemy_pool_requests_total{outcome=ok}"] == 2
            assert now["db_client_connection_create_time_seconds_count"] == 2
            assert now["db_client_connection_max"] == 3
        assert len([*folder.glob("*.lock")]) == 2  # that of all, and the second worker's
    now = scrape(collector)["app"]
    assert "db_client_connection_max" not in now
    assert now["sqlalchemy_pool_requests_total{outcome=ok}"] == 2
    assert now["db_client_connection_use_time_seconds_count"] <= 1
    assert sorted(path.name for path in folder.iterdir()) == [
        "sqla_poolkit-ended.json",
        "sqla_poolkit.lock",
    ]


def test_the_last_uses_of_a_process_are_not_lost(tmp_path: Path, collector: PoolCollector):
    with workers(tmp_path, 1) as (worker,):
        worker.do("for _ in range(7): engine.connect().close()")
    assert scrape(collector)["app"]["sqlalchemy_pool_requests_total{outcome=ok}"] == 7


def test_whoever_comes_clears_up_though_nobody_asks(tmp_path: Path, folder: Path):
    """Workers that are replaced every few minutes leave no file each."""
    for _ in range(3):
        with workers(tmp_path, 1) as (worker,):
            worker.do("engine.connect().close()")
    assert len([*folder.iterdir()]) <= 4


def test_what_was_counted_but_not_cleared_up_is_counted_once(
    tmp_path: Path, collector: PoolCollector, folder: Path
):
    """The process that clears up may end in the middle of it."""
    with workers(tmp_path, 1) as (worker,):
        worker.do("engine.connect().close()")
    kept = {path: path.read_text() for path in folder.iterdir() if "-" in path.name}
    for _ in range(3):
        assert scrape(collector)["app"]["sqlalchemy_pool_requests_total{outcome=ok}"] == 1
        for path, text in kept.items():
            path.write_text(text)


def test_a_process_that_nobody_asks_for_a_connection_says_nothing(
    tmp_path: Path, collector: PoolCollector
):
    """As the one that only starts the others."""
    with workers(tmp_path, 1) as (worker,):
        worker.do("import time; time.sleep(0.1)")
        assert scrape(collector) == {}


def test_a_forked_process_speaks_for_itself(tmp_path: Path, collector: PoolCollector):
    with workers(tmp_path, 1) as (worker,):
        worker.do("held.append(engine.connect())")
        worker.do("pipe = fork(2)")
        until(lambda: used(collector) == 3)
        assert scrape(collector)["app"]["db_client_connection_max"] == 6
        worker.do("os.close(pipe)")
        until(lambda: used(collector) == 1)
        worker.do("held.append(engine.connect())")
        until(lambda: used(collector) == 2)
        assert scrape(collector)["app"]["sqlalchemy_pool_requests_total{outcome=ok}"] == 4


def test_a_process_that_starts_others_and_uses_a_pool_later_is_counted_then(
    tmp_path: Path, collector: PoolCollector
):
    with workers(tmp_path, 1) as (worker,):
        worker.do("import threading; assert threading.active_count() == 1")
        worker.do("pipe = fork(1)")
        worker.do("assert threading.active_count() == 1")
        until(lambda: used(collector) == 1)
        worker.do("held.append(engine.connect())")
        until(lambda: used(collector) == 2)
        worker.do("os.close(pipe)")
        until(lambda: used(collector) == 1)


def test_a_process_that_cannot_connect_says_so(tmp_path: Path, collector: PoolCollector):
    with workers(tmp_path / "nowhere", 1) as (worker,):
        worker.do("import contextlib, sqlalchemy")
        worker.do("with contextlib.suppress(sqlalchemy.exc.OperationalError): engine.connect()")
        failed = "sqlalchemy_pool_connects_total{outcome=error}"
        until(lambda: scrape(collector).get("app", {}).get(failed) == 1)


def test_a_folder_that_was_emptied_is_filled_again(tmp_path: Path, collector: PoolCollector):
    with workers(tmp_path, 1) as (worker,):
        worker.do("held.append(engine.connect())")
        until(lambda: used(collector) == 1)
        for path in (tmp_path / "shared").iterdir():
            path.unlink()
        worker.do("held.append(engine.connect())")
        until(lambda: used(collector) == 2)


def test_what_cannot_be_written_is_told_once_and_the_others_are_read(
    make, tmp_path: Path, folder: Path, monkeypatch, caplog: pytest.LogCaptureFixture
):
    engine = make(max_size=2)
    with workers(tmp_path, 1) as (worker,):
        worker.do("held.append(engine.connect())")
        until(lambda: len([*folder.glob("*.json")]) == 1)
        collector = PoolCollector(registry=None, share_every=60)

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(_shared.Share, "_replace", fail)
        with engine.connect():
            for _ in range(2):
                assert used(collector) == 2
        monkeypatch.undo()
        collector.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the metrics of this process could not be shared: [Errno 28] No space left on device"
    ]


def test_a_file_of_another_version_or_half_a_file_is_left_out(
    tmp_path: Path, collector: PoolCollector, folder: Path
):
    with workers(tmp_path, 1) as (worker,):
        worker.do("engine.connect().close()")
    for path in folder.glob("*.json"):
        path.write_text(json.dumps({"version": 99, "pools": {"app": "what may come"}}))
    assert scrape(collector) == {}
    (folder / "sqla_poolkit-ended.json").write_text('{"version": 1, "poo')
    assert scrape(collector) == {}


def test_a_pool_that_is_gone_goes_on_counting_in_its_process(
    tmp_path: Path, collector: PoolCollector
):
    """Or the sum of all processes would drop, which Prometheus takes for a new beginning."""
    with workers(tmp_path, 1) as (worker,):
        for number in (1, 2):
            worker.do("engine.connect().close()")
            until(lambda expected=number: requests(collector) == expected)
            worker.do("engine.pool.close(); engine = None; import gc; gc.collect()")
            until(lambda: "db_client_connection_max" not in scrape(collector)["app"])
            worker.do("engine = create_engine(sys.argv[1], poolclass=ManagedPool, pool_name='app')")
        assert requests(collector) == 2


def requests(collector: PoolCollector) -> float:
    return scrape(collector).get("app", {}).get("sqlalchemy_pool_requests_total{outcome=ok}", 0)


def test_own_metrics_and_the_pools_are_on_one_page(
    tmp_path: Path, folder: Path, collector: PoolCollector
):
    """The library's own collector leaves our files alone, and the other way round."""
    from prometheus_client.multiprocess import MultiProcessCollector

    with workers(tmp_path, 1) as (worker,):
        worker.do("from prometheus_client import Counter; c = Counter('mine', 'x'); c.inc()")
        worker.do("held.append(engine.connect())")
        until(lambda: used(collector) == 1)
        registry = CollectorRegistry(support_collectors_without_names=True)
        MultiProcessCollector(registry)
        registry.register(collector)
        names = {family.name for family in registry.collect()}
        assert {"mine", "db_client_connection_count"} <= names


# -- gunicorn --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--preload"]])
def test_the_workers_of_gunicorn_add_up(
    options: list[str], postgres: PostgresServer, tmp_path: Path
):
    with gunicorn(postgres.url("psycopg2"), tmp_path, *options) as address:
        asked = 0

        def metrics() -> dict[str, float]:
            return parsed(get(f"{address}/metrics")).get("app", {})

        def both_worked() -> bool:
            nonlocal asked
            get(f"{address}/users")
            asked += 1
            return metrics().get("sqlalchemy_pool_info{class=ManagedPool}") == 2

        until(both_worked, seconds=30)
        until(lambda: metrics()["sqlalchemy_pool_requests_total{outcome=ok}"] == asked)
        answers = [metrics() for _ in range(6)]  # of whichever worker
        for now in answers:
            assert now["sqlalchemy_pool_requests_total{outcome=ok}"] == asked
            assert now["db_client_connection_max"] == 4
            assert now["db_client_connection_wait_time_seconds_count"] == asked
            assert now["sqlalchemy_pool_label_checkouts_total{label=GET /users}"] == asked
            assert (
                sum(
                    now[f"db_client_connection_count{{db_client_connection_state={state}}}"]
                    for state in ("idle", "used")
                )
                == postgres.sessions()
            )
    until(lambda: postgres.sessions() == 0)


def test_each_folder_has_its_own_share(tmp_path: Path):
    shares = [_shared.share_in(tmp_path / name, 60.0) for name in ("one", "two", "one")]
    assert shares[0] is shares[2] is not shares[1]
    for share in shares[:2]:
        _shared.close_share(share)
