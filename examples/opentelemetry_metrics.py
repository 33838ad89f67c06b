"""OpenTelemetry: what the pools say, under the names of its semantic conventions.

Four callers share one connection.  An SDK that keeps what it collects stands for yours,
which sends it to a collector:

    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    reader = PeriodicExportingMetricReader(OTLPMetricExporter())
    set_meter_provider(MeterProvider([reader]))

    python examples/opentelemetry_metrics.py
    python examples/opentelemetry_metrics.py postgresql+psycopg2://user:password@localhost/db

Without a URL it runs on an SQLite file in a temporary folder.  It needs opentelemetry-sdk.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory

from opentelemetry.metrics import set_meter_provider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from sqlalchemy import create_engine, text

from sqla_poolkit import ManagedPool
from sqla_poolkit.watch.opentelemetry import export_pools


def show(reader: InMemoryMetricReader) -> None:
    """Print what was collected, without what is nought."""
    data = reader.get_metrics_data()
    if data is None:
        return
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        for point in metric.data.data_points:
            rest = [str(value) for value in (point.attributes or {}).values()][1:]
            name = " ".join([metric.name, *rest])
            if isinstance(point, HistogramDataPoint):
                print(f"  {name}: {point.count} records, {point.sum:.2f} s together")
            elif point.value:
                print(f"  {name}: {point.value:.3g} {metric.unit}")


def main(url: str | None = None) -> None:
    """Have callers wait, and collect what there is to say about it."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    set_meter_provider(provider)
    with TemporaryDirectory() as folder:
        engine = create_engine(
            url or f"sqlite:///{folder}/example.db",
            poolclass=ManagedPool,
            max_size=1,
            pool_name="app",
        )
        export_pools()

        def use(seconds: float) -> None:
            with engine.connect() as connection:
                connection.execute(text("SELECT 1"))
                time.sleep(seconds)  # stands for your queries

        with ThreadPoolExecutor(4) as threads:
            for _ in range(4):
                threads.submit(use, 0.5)
            time.sleep(0.75)
            print("while one works and others wait:")
            show(reader)
        print("afterwards:")
        show(reader)
        engine.pool.close()
    provider.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:2])
