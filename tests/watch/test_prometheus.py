"""PoolCollector tells Prometheus what a pool's books say, under names that stay."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_of
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from sqlalchemy import create_engine, exc

from sqla_poolkit import (
    ManagedPool,
    MonitoredNullPool,
    MonitoredQueuePool,
    PoolTimeout,
    held_by,
    snapshot,
)
from sqla_poolkit.core.histogram import Recorder
from sqla_poolkit.watch._readings import cumulated
from sqla_poolkit.watch.health import health
from sqla_poolkit.watch.opentelemetry import export_pools
from sqla_poolkit.watch.prometheus import PoolCollector
from tests.watch.exporting import POOL, collected, scrape, text_of

ROOT = Path(__file__).parents[2]

# Dashboards and alerts depend on these: to rename one is a major version.
NAMES = {
    "db_client_connection_count": ("gauge", "db_client_connection_state"),
    "db_client_connection_idle_max": ("gauge",),
    "db_client_connection_idle_min": ("gauge",),
    "db_client_connection_max": ("gauge",),
    "db_client_connection_pending_requests": ("gauge",),
    "db_client_connection_timeouts": ("counter",),
    "db_client_connection_create_time_seconds": ("histogram",),
    "db_client_connection_wait_time_seconds": ("histogram",),
    "db_client_connection_use_time_seconds": ("histogram",),
    "sqlalchemy_pool_queue_time_seconds": ("histogram",),
    "sqlalchemy_pool_slots": ("gauge", "state"),
    "sqlalchemy_pool_requests": ("counter", "outcome"),
    "sqlalchemy_pool_connects": ("counter", "outcome"),
    "sqlalchemy_pool_closed": ("counter", "reason"),
    "sqlalchemy_pool_pings": ("counter",),
    "sqlalchemy_pool_ping_failures": ("counter",),
    "sqlalchemy_pool_reset_failures": ("counter",),
    "sqlalchemy_pool_invalidations": ("counter",),
    "sqlalchemy_pool_detached": ("counter",),
    "sqlalchemy_pool_forgotten": ("counter",),
    "sqlalchemy_pool_observer_errors": ("counter",),
    "sqlalchemy_pool_oldest_wait_seconds": ("gauge",),
    "sqlalchemy_pool_oldest_checkout_seconds": ("gauge",),
    "sqlalchemy_pool_checked_out_peak": ("gauge",),
    "sqlalchemy_pool_waiting_peak": ("gauge",),
    "sqlalchemy_pool_health": ("gauge", "status"),
    "sqlalchemy_pool_info": ("gauge", "class"),
}
NAMES_OF_LABELS = {
    "sqlalchemy_pool_label_checkouts": ("counter", "label"),
    "sqlalchemy_pool_label_use_time_seconds": ("counter", "label"),
    "sqlalchemy_pool_label_wait_time_seconds": ("counter", "label"),
    "sqlalchemy_pool_label_wait_caused_seconds": ("counter", "label"),
}
_WAITS = "0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1.0 2.5 5.0 7.0 10.0 30.0 +Inf"
BUCKETS = {
    "db_client_connection_create_time_seconds": (
        "0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1.0 2.5 5.0 10.0 +Inf"
    ),
    "db_client_connection_wait_time_seconds": _WAITS,
    "db_client_connection_use_time_seconds": (
        "0.001 0.005 0.01 0.05 0.1 0.5 1.0 5.0 10.0 30.0 60.0 300.0 +Inf"
    ),
    "sqlalchemy_pool_queue_time_seconds": _WAITS,
}

# In each of these places a URL can hold a secret.
SECRETIVE_URLS = [
    "postgresql+psycopg2://app:hunter2@db.example:5433/shop",
    "postgresql+psycopg2://db.example/shop?user=app&password=hunter2",
    "postgresql+psycopg2://app@db.example/shop?passfile=hunter2&sslpassword=hunter2",
    "postgresql+psycopg2://app:hunter2@/shop?host=db.example",
    "mysql+pymysql://app:hunter2@db.example/shop?ssl_key=hunter2",
    "mssql+pyodbc:///?odbc_connect=SERVER%3Ddb.example%3BUID%3Dapp%3BPWD%3Dhunter2",
    "sqlite:///file:/nowhere/app.db?token=hunter2&uri=true",
]


@pytest.fixture
def collector() -> PoolCollector:
    return PoolCollector(registry=None)


def test_the_names_kinds_and_labels_stay_as_they_are(make):
    make().connect().close()
    families = list(PoolCollector(registry=None, labels=True).collect())
    assert {
        family.name: (
            family.type,
            *(name for name in family.samples[0].labels if name not in (POOL, "le")),
        )
        for family in families
    } == NAMES | NAMES_OF_LABELS
    assert all(POOL in sample.labels for family in families for sample in family.samples)
    assert all(family.documentation.endswith(".") for family in families)


def test_each_metric_is_told_of_in_the_readme():
    told = (ROOT / "README.md").read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    words = set(re.findall(r"`(\w+)`", told))
    for name, (kind, *_) in (NAMES | NAMES_OF_LABELS).items():
        short = re.sub("^(db_client_connection|sqlalchemy_pool)_", "", name)
        assert short + ("_total" if kind == "counter" else "") in words, name


def test_the_series_of_labels_are_left_out_unless_asked_for(make, collector):
    make().connect().close()
    assert {family.name for family in collector.collect()} == NAMES.keys()


def test_the_buckets_stay_as_they_are_and_include_the_timeout(make, collector):
    make(pool_timeout=7)
    make(pool_timeout=None, pool_name="other")  # the buckets of all pools are the same
    for family in collector.collect():
        if family.type == "histogram":
            for pool in ("app", "other"):
                limits = [
                    sample.labels["le"]
                    for sample in family.samples
                    if "le" in sample.labels and sample.labels[POOL] == pool
                ]
                assert " ".join(limits) == BUCKETS[family.name], family.name


def test_what_is_said_is_what_is_the_case(make, wait, collector):
    engine = make(max_size=2, min_size=1)
    with ExitStack() as held:
        for _ in range(2):
            held.enter_context(engine.connect())
        wait(engine)
        now = scrape(collector)["app"]
        oldest = now.pop("sqlalchemy_pool_oldest_checkout_seconds")
        first = now.pop("sqlalchemy_pool_oldest_wait_seconds")
        assert 0 < first < oldest
    expected = {
        "db_client_connection_count{db_client_connection_state=idle}": 0,
        "db_client_connection_count{db_client_connection_state=used}": 2,
        "db_client_connection_idle_max": 2,
        "db_client_connection_idle_min": 1,
        "db_client_connection_max": 2,
        "db_client_connection_pending_requests": 1,
        "db_client_connection_timeouts_total": 0,
        "db_client_connection_wait_time_seconds_count": 2,
        "sqlalchemy_pool_slots{state=checked_out}": 2,
        "sqlalchemy_pool_requests_total{outcome=ok}": 2,
        "sqlalchemy_pool_connects_total{outcome=ok}": 2,
        "sqlalchemy_pool_closed_total{reason=leaked}": 0,
        "sqlalchemy_pool_health{status=busy}": 1,
        "sqlalchemy_pool_health{status=ok}": 0,
        "sqlalchemy_pool_info{class=ManagedPool}": 1,
    }
    assert {series: now[series] for series in expected} == expected


def test_a_wait_in_vain_is_above_the_bucket_of_the_timeout(make, collector):
    engine = make(max_size=1, pool_timeout=0.2)
    with engine.connect(), pytest.raises(PoolTimeout):
        engine.connect()
    now = scrape(collector)["app"]
    assert now["db_client_connection_timeouts_total"] == 1
    for name in ("db_client_connection_wait_time_seconds", "sqlalchemy_pool_queue_time_seconds"):
        assert now[f"{name}_bucket{{le=0.2}}"] == now[f"{name}_bucket{{le=0.1}}"]
        assert now[f"{name}_bucket{{le=0.25}}"] == now[f"{name}_bucket{{le=0.2}}"] + 1
        assert now[f"{name}_count"] == now[f"{name}_bucket{{le=+Inf}}"]
    waited = snapshot(engine)
    assert now["db_client_connection_wait_time_seconds_sum"] == pytest.approx(
        waited.checkout_time.sum_seconds + waited.failed_wait_time.sum_seconds
    )


def test_no_duration_is_shown_shorter_than_it_was():
    recorder = Recorder()
    values = [0.0004999, 0.0005, 0.00101, 0.0099, 0.01, 0.0101, 0.3, 7.0, 7.1, 29.9, 30.1]
    for value in values:
        recorder.record(value)
    limits = (0.0005, 0.001, 0.01, 0.3, 7.0, 30.0)
    times = recorder.freeze()
    for limit, count in zip(limits, cumulated(times, limits), strict=True):
        truth = sum(value <= limit for value in values)
        by_a_bucket = sum(value <= limit * 0.875 for value in values)
        assert by_a_bucket <= count <= truth


def test_two_engines_on_one_url_are_two_series(make, collector):
    first, second = make(pool_name=None), make(pool_name=None)
    first.connect().close()
    now = scrape(collector)
    assert sorted(now) == ["app.db", "app.db#2"]
    ok = "sqlalchemy_pool_requests_total{outcome=ok}"
    assert (now["app.db"][ok], now["app.db#2"][ok]) == (1, 0)
    assert second.pool.snapshot().requests == 0


def test_the_series_of_a_disposed_engine_go_on(make, collector):
    for pool_class in (ManagedPool, MonitoredQueuePool):
        engine = make(poolclass=pool_class, pool_name=pool_class.__name__)
        engine.connect().close()
        engine.dispose()
        engine.connect().close()
        now = scrape(collector)[pool_class.__name__]
        assert now["sqlalchemy_pool_requests_total{outcome=ok}"] == 2
        assert now["db_client_connection_count{db_client_connection_state=idle}"] == 1
        assert now["sqlalchemy_pool_closed_total{reason=disposed}"] == 1


@pytest.mark.parametrize("pool_class", [ManagedPool, MonitoredQueuePool, MonitoredNullPool])
def test_a_detached_connection_is_in_use_no_longer(make, collector, pool_class: type):
    engine = make(poolclass=pool_class)
    with engine.connect() as connection:
        connection.detach()
    now = scrape(collector)["app"]
    assert now["db_client_connection_count{db_client_connection_state=used}"] == 0
    assert now["sqlalchemy_pool_detached_total"] == 1


def test_only_the_engines_that_were_given_are_exported(make):
    make(pool_name="other")
    mine = make()
    collector = PoolCollector([mine], registry=None)
    assert sorted(scrape(collector)) == ["app"]
    mine.dispose()
    assert sorted(scrape(collector)) == ["app"]


def test_without_a_limit_there_is_none_to_be_exported(make, collector):
    make(max_overflow=-1)
    make(poolclass=MonitoredNullPool, pool_name="null").connect().close()
    now = scrape(collector)
    limits = {"db_client_connection_max", "db_client_connection_idle_max"}
    assert not limits & now["app"].keys()
    kept = "db_client_connection_count{db_client_connection_state=idle}"
    assert kept in now["app"]
    assert not {*limits, kept, "db_client_connection_idle_min"} & now["null"].keys()
    assert now["null"]["db_client_connection_count{db_client_connection_state=used}"] == 0
    assert now["null"]["db_client_connection_use_time_seconds_count"] == 1


def test_of_the_queue_pool_fewer_may_be_idle_than_open(make, collector):
    make(poolclass=MonitoredQueuePool, pool_size=2, max_overflow=3)
    now = scrape(collector)["app"]
    assert (now["db_client_connection_idle_max"], now["db_client_connection_max"]) == (2, 5)
    assert not any(series.startswith("sqlalchemy_pool_ping") for series in now)


def test_labels_say_who_makes_whom_wait(make, wait):
    engine = make(max_size=1)
    with held_by("report"), engine.connect():
        wait(engine)
    now = scrape(PoolCollector(registry=None, labels=True))["app"]
    assert now["sqlalchemy_pool_label_checkouts_total{label=report}"] == 1
    assert now["sqlalchemy_pool_label_wait_caused_seconds_total{label=report}"] > 0


def test_a_registry_takes_the_metrics_once():
    registry = CollectorRegistry()
    PoolCollector(registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        PoolCollector(registry=registry)


def test_the_form_of_openmetrics_is_valid_too(make, collector):
    make().connect().close()
    registry = CollectorRegistry()
    registry.register(collector)
    families = list(parse_openmetrics(openmetrics_of(registry).decode()))
    units = {family.name: family.unit for family in families if family.unit}
    assert units == {name: "seconds" for name in NAMES if name.endswith("_seconds")}


@pytest.mark.parametrize("url", SECRETIVE_URLS)
def test_no_secret_of_a_url_is_exported(url: str, make):
    drivers = {"module": Odbc} if "odbc" in url else {}
    engine = make(url=url, pool_name=None, **drivers)
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    export_pools([engine], meter_provider=provider)
    with held_by("shop"):
        for _ in range(2):
            with pytest.raises((exc.SQLAlchemyError, TypeError)):
                engine.connect()
    said = {
        "prometheus": text_of(PoolCollector(registry=None, labels=True)),
        "opentelemetry": str(collected(reader)),
        "health": str(health(engine).to_dict()),
    }
    provider.shutdown()
    for where, text in said.items():
        assert snapshot(engine).name in text, where
        assert "hunter2" not in text, where
        assert "app:" not in text, where


class Odbc:
    """A driver that takes all of ODBC's settings in one string, and refuses them."""

    paramstyle = "qmark"
    version = "5.0"
    Cursor = sqlite3.Cursor
    Error = OperationalError = ProgrammingError = sqlite3.OperationalError

    @staticmethod
    def connect(settings: str, **_: object) -> None:
        assert "hunter2" in settings
        raise sqlite3.OperationalError("refused")


def test_names_that_would_break_a_line_are_escaped(make, collector):
    make(pool_name='a "quoted"\nname\\')
    assert sorted(scrape(collector)) == ['a "quoted"\nname\\']


def run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_imports_no_exporter():
    program = """
        import sys
        import sqla_poolkit, sqla_poolkit.watch, sqla_poolkit.watch.health
        print([name for name in ("prometheus_client", "opentelemetry") if name in sys.modules])
    """
    assert run(program) == "[]\n"


def test_a_forked_child_counts_from_nought(tmp_path: Path):
    program = """
        import os, sys
        from sqlalchemy import create_engine
        from sqla_poolkit import MonitoredQueuePool
        from sqla_poolkit.watch.prometheus import PoolCollector
        from tests.watch.exporting import scrape

        engine = create_engine(f"sqlite:///{sys.argv[1]}/app.db", poolclass=MonitoredQueuePool)
        collector = PoolCollector()
        series = "sqlalchemy_pool_requests_total{outcome=ok}"
        engine.connect().close()
        child = os.fork()
        if not child:
            engine.connect().close()
            engine.connect().close()
            print(scrape(collector)["app.db"][series], flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print(scrape(collector)["app.db"][series])
    """
    assert run(program, str(tmp_path)).split() == ["2.0", "1.0"]


def test_the_docstring_example_registers_where_the_library_looks(tmp_path: Path):
    program = """
        import sys
        from prometheus_client import generate_latest
        from sqlalchemy import create_engine
        from sqla_poolkit import ManagedPool
        from sqla_poolkit.watch.prometheus import PoolCollector

        engine = create_engine(f"sqlite:///{sys.argv[1]}/app.db", poolclass=ManagedPool)
        PoolCollector()
        print(b"db_client_connection_max{" in generate_latest())
    """
    assert run(program, str(tmp_path)) == "True\n"


def test_engines_made_later_are_exported_too(tmp_path: Path, collector):
    engine = create_engine(f"sqlite:///{tmp_path}/late.db", poolclass=MonitoredQueuePool)
    assert "late.db" in scrape(collector)
    engine.dispose()
