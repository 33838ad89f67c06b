"""export_pools tells OpenTelemetry what a pool's books say, under the names of its conventions."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import create_engine

from sqla_poolkit import (
    ManagedPool,
    MonitoredNullPool,
    MonitoredQueuePool,
    held_by,
    snapshot,
)
from sqla_poolkit.errors import ArgumentError
from sqla_poolkit.watch import opentelemetry
from sqla_poolkit.watch.opentelemetry import export_pools
from sqla_poolkit.watch.prometheus import PoolCollector
from tests.waiting import until
from tests.watch.exporting import collected, scrape

ROOT = Path(__file__).parents[2]

# OpenTelemetry's semantic conventions 1.44.
CONVENTIONS = {
    "db.client.connection.count": ("UpDownCounter", "{connection}"),
    "db.client.connection.idle.max": ("UpDownCounter", "{connection}"),
    "db.client.connection.idle.min": ("UpDownCounter", "{connection}"),
    "db.client.connection.max": ("UpDownCounter", "{connection}"),
    "db.client.connection.pending_requests": ("UpDownCounter", "{request}"),
    "db.client.connection.timeouts": ("Counter", "{timeout}"),
    "db.client.connection.create_time": ("Histogram", "s"),
    "db.client.connection.wait_time": ("Histogram", "s"),
    "db.client.connection.use_time": ("Histogram", "s"),
}
OWN = {
    "sqlalchemy.pool.queue_time": ("Histogram", "s"),
    "sqlalchemy.pool.slots": ("UpDownCounter", "{slot}"),
    "sqlalchemy.pool.requests": ("Counter", "{request}"),
    "sqlalchemy.pool.connects": ("Counter", "{attempt}"),
    "sqlalchemy.pool.closed": ("Counter", "{connection}"),
    "sqlalchemy.pool.pings": ("Counter", "{ping}"),
    "sqlalchemy.pool.ping_failures": ("Counter", "{connection}"),
    "sqlalchemy.pool.reset_failures": ("Counter", "{connection}"),
    "sqlalchemy.pool.invalidations": ("Counter", "{connection}"),
    "sqlalchemy.pool.detached": ("Counter", "{connection}"),
    "sqlalchemy.pool.forgotten": ("Counter", "{connection}"),
    "sqlalchemy.pool.observer_errors": ("Counter", "{error}"),
    "sqlalchemy.pool.oldest_wait": ("Gauge", "s"),
    "sqlalchemy.pool.oldest_checkout": ("Gauge", "s"),
    "sqlalchemy.pool.checked_out_peak": ("Gauge", "{connection}"),
    "sqlalchemy.pool.waiting_peak": ("Gauge", "{request}"),
    "sqlalchemy.pool.health": ("UpDownCounter", "{process}"),
    "sqlalchemy.pool.info": ("UpDownCounter", "{process}"),
}


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def provider(reader: InMemoryMetricReader) -> Iterator[MeterProvider]:
    provider = MeterProvider([reader])
    yield provider
    provider.shutdown()


def kind(metric: Any) -> str:
    name = type(metric.data).__name__
    if name == "Sum":
        return "Counter" if metric.data.is_monotonic else "UpDownCounter"
    return name


def test_the_names_kinds_and_units_are_those_of_the_conventions(make, reader, provider):
    make().connect().close()
    export_pools(meter_provider=provider)
    make(max_size=1).connect().close()
    (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    assert scope.scope.name == "sqla_poolkit"
    assert scope.schema_url == "https://opentelemetry.io/schemas/1.44.0"
    assert {m.name: (kind(m), m.unit) for m in scope.metrics} == CONVENTIONS | OWN
    assert {
        key
        for metric in scope.metrics
        if metric.name in CONVENTIONS
        for point in metric.data.data_points
        for key in point.attributes
    } == {"db.client.connection.pool.name", "db.client.connection.state"}


def test_the_buckets_stay_as_they_are_and_include_the_timeout(make, reader, provider):
    make(pool_timeout=7).connect().close()
    export_pools(meter_provider=provider)
    now = collected(reader)["app"]
    waits = "0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 7 10 30"
    assert {
        name: " ".join(f"{limit:g}" for limit in now[name][2])
        for name in (
            "db.client.connection.create_time",
            "db.client.connection.wait_time",
            "db.client.connection.use_time",
            "sqlalchemy.pool.queue_time",
        )
    } == {
        "db.client.connection.create_time": (
            "0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10"
        ),
        "db.client.connection.wait_time": waits,
        "db.client.connection.use_time": "0.001 0.005 0.01 0.05 0.1 0.5 1 5 10 30 60 300",
        "sqlalchemy.pool.queue_time": waits,
    }


def test_both_exporters_say_the_same(make, wait, reader, provider):
    engine = make(max_size=2)
    export_pools(meter_provider=provider)
    collector = PoolCollector(registry=None)
    for _ in range(100):
        engine.connect().close()
    with engine.connect(), engine.connect():
        wait(engine)
        theirs = collected(reader)["app"]
        ours = scrape(collector)["app"]
    compared = 0
    for series, value in theirs.items():
        name, _, labels = series.replace(".", "_").partition("{")
        if isinstance(value, tuple):
            count, total, _, counts = value
            own = [v for key, v in ours.items() if key.startswith(f"{name}_seconds_bucket")]
            assert [sum(counts[: n + 1]) for n in range(len(counts))] == own, series
            assert count == ours[f"{name}_seconds_count"]
            assert total == pytest.approx(ours[f"{name}_seconds_sum"], rel=0.125)
        elif not name.endswith(("oldest_wait", "oldest_checkout")):
            name += "_total" if f"{name}_total{{{labels}" in ours or f"{name}_total" in ours else ""
            assert ours[f"{name}{{{labels}" if labels else name] == value, series
        compared += 1
    assert compared > 40


def test_labels_say_who_makes_whom_wait(make, wait, reader, provider):
    engine = make(max_size=1)
    with held_by("report"), engine.connect():
        wait(engine)
    export_pools(meter_provider=provider, labels=True)
    now = collected(reader)["app"]
    assert now["sqlalchemy.pool.label.checkouts{label=report}"] == 1
    assert now["sqlalchemy.pool.label.wait_caused{label=report}"] > 0


def test_each_collection_tells_what_is_new(make, reader, provider):
    engine = make()
    engine.connect().close()
    export_pools(meter_provider=provider)
    counts = []
    for number in (0, 3, 0, 2):
        for _ in range(number):
            engine.connect().close()
        counts.append(collected(reader)["app"]["db.client.connection.use_time"][0])
    assert counts == [1, 4, 4, 6]


def test_too_many_durations_are_thinned_out_and_counted(make, reader, provider):
    engine = make(track="label")
    engine.connect().close()
    exporter = export_pools(meter_provider=provider, max_records=100)
    for _ in range(999):
        engine.connect().close()
    now = collected(reader)["app"]
    told = {name: value[0] for name, value in now.items() if isinstance(value, tuple)}
    # at least one of each bucket, so that the rare long ones are seen
    assert 100 <= sum(told.values()) < 400
    left_out = {
        series: value for series, value in now.items() if series.startswith(opentelemetry.LEFT_OUT)
    }
    assert sum(told.values()) + sum(left_out.values()) == sum(
        times.count
        for times in (
            snapshot(engine).use_time,
            snapshot(engine).checkout_time,
            snapshot(engine).connect_time,
            snapshot(engine).wait_time,
        )
    )
    assert now["sqlalchemy.pool.requests{outcome=ok}"] == 1000
    exporter.stop()


def test_collecting_fifty_thousand_durations_takes_a_bounded_time(make, reader, provider):
    engine = make(track="label", pool_pre_ping=False)
    export_pools(meter_provider=provider)
    for _ in range(30_000):
        engine.connect().close()
    began = time.monotonic()
    reader.collect()
    assert time.monotonic() - began < 10


def test_stopped_it_says_nothing_and_can_be_started_again(make, reader, provider):
    engine = make()
    engine.connect().close()
    exporter = export_pools(meter_provider=provider)
    assert "app" in collected(reader)
    exporter.stop()
    gauges = collected(reader).get("app", {})
    assert "db.client.connection.max" not in gauges
    engine.connect().close()
    assert export_pools(meter_provider=provider) is exporter
    assert collected(reader)["app"]["db.client.connection.use_time"][0] == 2


def test_asked_twice_it_exports_once(make, reader, provider):
    engine = make(max_size=3)
    assert export_pools(meter_provider=provider) is export_pools(meter_provider=provider)
    assert collected(reader)["app"]["db.client.connection.max"] == 3
    with pytest.raises(ArgumentError, match="other pools are exported"):
        export_pools([engine], meter_provider=provider)


def test_only_the_engines_that_were_given_are_exported(make, reader, provider):
    make(pool_name="other")
    export_pools([make()], meter_provider=provider)
    assert sorted(collected(reader)) == ["app"]


def test_the_series_of_a_disposed_engine_go_on(make, reader, provider):
    engine = make(poolclass=MonitoredQueuePool)
    export_pools(meter_provider=provider)
    engine.connect().close()
    assert collected(reader)["app"]["db.client.connection.use_time"][0] == 1
    engine.dispose()
    engine.connect().close()
    now = collected(reader)["app"]
    assert now["db.client.connection.use_time"][0] == 2
    assert now["sqlalchemy.pool.requests{outcome=ok}"] == 2


def test_two_engines_on_one_url_are_two_series(make, reader, provider):
    for _ in range(2):
        make(pool_name=None)
    export_pools(meter_provider=provider)
    assert sorted(collected(reader)) == ["app.db", "app.db#2"]


def test_a_new_pool_of_an_old_name_begins_from_nought(tmp_path: Path, reader, provider):
    export_pools(meter_provider=provider)
    for number in (1, 2):
        engine = create_engine(
            f"sqlite:///{tmp_path}/app.db", poolclass=MonitoredNullPool, pool_name="brief"
        )
        engine.connect().close()
        assert collected(reader)["brief"]["db.client.connection.use_time"][0] == number
        del engine
        gc.collect()


def test_a_null_pool_has_no_idle_connections_to_speak_of(make, reader, provider):
    engine = make(poolclass=MonitoredNullPool)
    export_pools(meter_provider=provider)
    with engine.connect():
        now = collected(reader)["app"]
    counts = {name: value for name, value in now.items() if name.startswith("db.") and "{" in name}
    assert counts == {"db.client.connection.count{db.client.connection.state=used}": 1}
    assert "db.client.connection.max" not in now


def test_what_opentelemetrys_own_instrumentation_counts_is_left_to_it(make, reader, provider):
    engine = make()
    engine.connect().close()
    exporter = export_pools(meter_provider=provider)
    count = "db.client.connection.count{db.client.connection.state=idle}"
    instrumentor = SQLAlchemyInstrumentor()
    instrumentor.instrument(skip_dep_check=True, meter_provider=provider)
    try:
        assert count not in collected_of_ours(reader)
        exporter.start(None, True, 100)
        assert collected_of_ours(reader)[count] == 1
    finally:
        instrumentor.uninstrument()
    exporter.start(None, "auto", 100)
    assert collected_of_ours(reader)[count] == 1
    exporter.start(None, False, 100)
    assert count not in collected_of_ours(reader)


def collected_of_ours(reader: InMemoryMetricReader) -> dict[str, Any]:
    return collected(reader)["app"]


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


def test_its_prometheus_exporter_spells_the_names_as_ours_does(tmp_path: Path):
    """So one dashboard serves both."""
    program = """
        import sys
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from opentelemetry.sdk.metrics import MeterProvider
        from prometheus_client import REGISTRY, CollectorRegistry
        from sqlalchemy import create_engine
        from sqla_poolkit import ManagedPool
        from sqla_poolkit.watch.opentelemetry import export_pools
        from sqla_poolkit.watch.prometheus import PoolCollector

        provider = MeterProvider([PrometheusMetricReader()])
        engine = create_engine(f"sqlite:///{sys.argv[1]}/app.db", poolclass=ManagedPool)
        engine.connect().close()
        export_pools(meter_provider=provider, labels=True)

        def names(collector):
            return {
                sample.name
                for family in collector.collect()
                for sample in family.samples
                if family.name.startswith(("db_client", "sqlalchemy"))
            }

        ours, theirs = names(PoolCollector(registry=None, labels=True)), names(REGISTRY)
        print(sorted(ours ^ theirs))
        engine.pool.close()
    """
    assert run(program, str(tmp_path)) == "[]\n"


def test_without_an_sdk_nothing_happens(tmp_path: Path):
    program = """
        import sys
        sys.modules["opentelemetry.sdk"] = None
        from sqlalchemy import create_engine
        from sqla_poolkit import MonitoredNullPool
        from sqla_poolkit.watch.opentelemetry import export_pools

        engine = create_engine(f"sqlite:///{sys.argv[1]}/app.db", poolclass=MonitoredNullPool)
        export_pools()
        engine.connect().close()
        print([name for name in sys.modules if name.startswith("opentelemetry.sdk.")])
    """
    assert run(program, str(tmp_path)) == "[]\n"


def test_a_provider_that_is_set_later_is_found(tmp_path: Path):
    program = """
        import sys
        from opentelemetry.metrics import set_meter_provider
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from sqlalchemy import create_engine
        from sqla_poolkit import MonitoredNullPool
        from sqla_poolkit.watch.opentelemetry import export_pools
        from tests.watch.exporting import collected

        engine = create_engine(f"sqlite:///{sys.argv[1]}/app.db", poolclass=MonitoredNullPool)
        before = export_pools()
        reader = InMemoryMetricReader()
        set_meter_provider(MeterProvider([reader]))
        assert export_pools() is before
        engine.connect().close()
        print(collected(reader)["app.db"]["sqlalchemy.pool.requests{outcome=ok}"])
    """
    assert run(program, str(tmp_path)) == "1\n"


def test_a_forked_child_counts_from_nought(tmp_path: Path):
    program = """
        import os, sys
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from sqlalchemy import create_engine
        from sqla_poolkit import MonitoredNullPool
        from sqla_poolkit.watch.opentelemetry import export_pools
        from tests.watch.exporting import collected

        engine = create_engine(f"sqlite:///{sys.argv[1]}/app.db", poolclass=MonitoredNullPool)
        reader = InMemoryMetricReader()
        export_pools(meter_provider=MeterProvider([reader]))

        def used():
            engine.connect().close()
            now = collected(reader)["app.db"]
            return now["sqlalchemy.pool.requests{outcome=ok}"], now[
                "db.client.connection.use_time"
            ][0]

        print(*used(), flush=True)
        child = os.fork()
        if not child:
            # the SDK of the child goes on from what the parent's had; the pool's books are new
            print(*used(), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print(*used())
    """
    assert run(program, str(tmp_path)).splitlines() == ["1 1", "1 2", "2 2"]


def test_two_providers_get_everything(make):
    make().connect().close()
    readers = [InMemoryMetricReader() for _ in range(2)]
    providers = [MeterProvider([reader]) for reader in readers]
    for each in providers:
        export_pools(meter_provider=each)
    counts = [collected(reader)["app"]["db.client.connection.use_time"][0] for reader in readers]
    assert counts == [1, 1]
    for each in providers:
        each.shutdown()


def test_two_readers_of_one_provider_get_everything(make):
    make().connect().close()
    readers = [InMemoryMetricReader() for _ in range(2)]
    provider = MeterProvider(readers)
    export_pools(meter_provider=provider)
    counts = [collected(reader)["app"]["db.client.connection.use_time"][0] for reader in readers]
    assert counts == [1, 1]
    provider.shutdown()


def test_pools_for_threads_are_not_kept_alive(tmp_path: Path, provider):
    engine = create_engine(f"sqlite:///{tmp_path}/app.db", poolclass=ManagedPool)
    export_pools(meter_provider=provider)
    engine.connect().close()
    engine.pool.close()
    pool = weakref.ref(engine.pool)
    del engine
    until(lambda: gc.collect() >= 0 and pool() is None)
