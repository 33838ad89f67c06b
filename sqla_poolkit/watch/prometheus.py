"""Prometheus: what the pools say, for ``prometheus_client``.

Needs the extra ``prometheus``.  Everything is read when Prometheus asks; nothing is added to a
checkout.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..pool.reading import glance
from ._metrics import METRICS, OF_LABELS, POOL, Metric
from ._readings import Reading, boundaries, cumulated, readings_of_this_process
from ._shared import Share, close_share, share_in

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["PoolCollector"]

Family = GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily


class PoolCollector(Collector):
    """Collects what the pools of this process say, or in multiprocess mode of all processes.

    Multiprocess mode is on where the environment variable ``PROMETHEUS_MULTIPROC_DIR`` is set, as
    for ``prometheus_client``.  Make the collector when the program starts, in each process or
    before they are forked, and register it on the registry that is exposed.  Each process then
    writes what its pools say into that folder once a second, from the first use of a pool on, and
    the one that is asked adds all up.  Of a process that has ended the counters stay.

    :param engines: whose pools; default all pools of the process that keep books.
    :param registry: where to register; None for nowhere yet.
    :param labels: also a series per ``held_by`` label: who waits, and who makes others wait.  Only
        for a program whose labels are few.
    :param share_every: seconds between two writes in multiprocess mode.
    """

    def __init__(
        self,
        engines: Iterable[Engine | AsyncEngine] | None = None,
        *,
        registry: CollectorRegistry | None = REGISTRY,
        labels: bool = False,
        share_every: float = 1.0,
    ) -> None:
        self._names = None if engines is None else {glance(engine).name for engine in engines}
        self._metrics = (*METRICS, *OF_LABELS) if labels else METRICS
        self._has_labels = labels
        self._share: Share | None = None
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if folder:
            self._share = share_in(Path(folder), share_every)
            self._share.has_labels |= labels
        if registry is not None:
            registry.register(self)

    def describe(self) -> Iterator[Family]:
        """Yield the metrics without values, so that the registry refuses the same ones twice."""
        for metric in self._metrics:
            yield _family(metric)

    def collect(self) -> Iterator[Family]:
        """Yield the metrics with what the pools say now."""
        readings = self._readings()
        timeouts = {timeout for reading in readings.values() for timeout in reading.timeouts}
        for metric in self._metrics:
            family = _family(metric)
            limits = boundaries(metric, timeouts)
            for name, reading in sorted(readings.items()):
                _add_samples(family, metric, name, reading, limits)
            if family.samples:
                yield family

    def _readings(self) -> dict[str, Reading]:
        if self._share is not None:
            readings = self._share.gather()
        else:
            readings = {
                reading.name: said
                for _, reading, said in readings_of_this_process(has_labels=self._has_labels)
            }
        if self._names is None:
            return readings
        return {name: said for name, said in readings.items() if name in self._names}

    def save(self) -> None:
        """Write what the pools of this process say now, where multiprocess mode has no thread.

        Otherwise nobody needs to call it.
        """
        if self._share is not None:
            self._share.save()

    def close(self) -> None:
        """End what multiprocess mode needs in this process; what it wrote stays."""
        if self._share is not None:
            close_share(self._share)


def _spelled(name: str) -> str:
    return name.replace(".", "_")


def _family(metric: Metric) -> Family:
    unit = "seconds" if metric.unit == "s" else ""
    name = f"{_spelled(metric.name)}_{unit}" if unit else _spelled(metric.name)
    labels = [_spelled(POOL), *map(_spelled, metric.attributes)]
    if metric.kind == "histogram":
        return HistogramMetricFamily(name, metric.help, labels=labels, unit=unit)
    if metric.kind == "counter":
        return CounterMetricFamily(name, metric.help, labels=labels, unit=unit)
    return GaugeMetricFamily(name, metric.help, labels=labels, unit=unit)


def _add_samples(
    family: Family, metric: Metric, pool: str, reading: Reading, limits: tuple[float, ...]
) -> None:
    if isinstance(family, HistogramMetricFamily):
        times = reading.times.get(metric.name)
        if times is not None:
            counts = [*cumulated(times, limits), times.count]
            names = [*map(floatToGoString, limits), "+Inf"]
            buckets = list(zip(names, counts, strict=True))
            family.add_metric([pool], buckets, sum_value=times.sum_seconds)
        return
    for attributes, value in reading.values.get(metric.name, {}).items():
        family.add_metric([pool, *attributes], value)
