"""Reading what the exporters say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sqla_poolkit.watch.prometheus import PoolCollector

POOL = "db_client_connection_pool_name"

Samples = Mapping[tuple[str, str], float]
"""By the series as Prometheus writes it, without its pool; and by the pool."""


def text_of(collector: PoolCollector) -> str:
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


def scrape(collector: PoolCollector) -> dict[str, dict[str, float]]:
    return parsed(text_of(collector))


def parsed(text: str) -> dict[str, dict[str, float]]:
    """Return pool -> series -> value; a series as ``name{label=value,...}`` without its pool."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            pool = labels.pop(POOL, "")
            inside = ",".join(f"{name}={value}" for name, value in labels.items())
            series = f"{sample.name}{{{inside}}}" if inside else sample.name
            found.setdefault(pool, {})[series] = sample.value
    return found


def collected(reader: Any) -> dict[str, dict[str, Any]]:
    """Return the same of an SDK of OpenTelemetry; histograms as (count, sum, bounds, counts)."""
    found: dict[str, dict[str, Any]] = {}
    data = reader.get_metrics_data()
    for resource in data.resource_metrics if data else []:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    labels = dict(point.attributes)
                    pool = labels.pop("db.client.connection.pool.name")
                    inside = ",".join(f"{name}={value}" for name, value in labels.items())
                    series = f"{metric.name}{{{inside}}}" if inside else metric.name
                    if hasattr(point, "value"):
                        value = point.value
                    else:
                        value = point.count, point.sum, point.explicit_bounds, point.bucket_counts
                    found.setdefault(pool, {})[series] = value
    return found
