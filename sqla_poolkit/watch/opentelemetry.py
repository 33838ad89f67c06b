"""OpenTelemetry: what the pools say, under the names of its semantic conventions.

Needs the extra ``opentelemetry``, which is the API alone: without an SDK in the program nothing is
done.  Everything is read when the SDK collects; nothing is added to a checkout.
"""

from __future__ import annotations

import sys
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from typing import TYPE_CHECKING, Literal

from opentelemetry.metrics import (
    CallbackOptions,
    Histogram,
    MeterProvider,
    Observation,
    get_meter,
    get_meter_provider,
)

from ..core.histogram import Histogram as Times
from ..errors import ArgumentError
from ..pool._fork import start_over_after_fork
from ..pool._registry import Keeper
from ..pool.reading import glance, pools
from ._metrics import METRICS, OF_LABELS, POOL, Metric
from ._readings import Reading, boundaries, read, readings_of_this_process

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["PoolExporter", "export_pools"]

SCHEMA = "https://opentelemetry.io/schemas/1.44.0"
COUNT = "db.client.connection.count"
LEFT_OUT = "sqlalchemy.pool.times_left_out"
_FRESH_SECONDS = 1.0
_RECORDS_AT_A_TIME = 50

EmitCount = bool | Literal["auto"]


def export_pools(
    engines: Iterable[Engine | AsyncEngine] | None = None,
    *,
    meter_provider: MeterProvider | None = None,
    emit_count: EmitCount = "auto",
    labels: bool = False,
    max_records: int = 50_000,
) -> PoolExporter:
    """Let OpenTelemetry collect what the pools of this process say.

    To be called once the engines are there, as a pool's timeout becomes a boundary of its
    histograms.  Called again it changes nothing; what it returns has a ``stop()``.

    OpenTelemetry can only be told durations one by one, at microseconds each.  So each collection
    tells it those of our own histograms that are new, each by a value of its bucket: a duration is
    at most 12.5 % off, and on the true side of each boundary but for the bucket that it cuts
    through.  If there are more than ``max_records`` every bucket is thinned out by the same factor,
    and ``sqlalchemy.pool.times_left_out`` counts what is missing.  All other counters are exact.

    :param engines: whose pools; default all pools of the process that keep books.
    :param meter_provider: default the global one.
    :param emit_count: whether to export ``db.client.connection.count``; ``"auto"`` leaves it to
        OpenTelemetry's own ``SQLAlchemyInstrumentor`` while that is active, lest a sum count each
        connection twice.
    :param labels: also a series per ``held_by`` label: who waits, and who makes others wait.  Only
        for a program whose labels are few.
    :param max_records: most durations told in one collection, of all pools together; 50,000 take
        the collecting thread about half a second.
    :raises sqlalchemy.exc.ArgumentError: if other pools are exported to this provider already.
    """
    names = None if engines is None else frozenset(glance(engine).name for engine in engines)
    # the global one may be set later than this is called
    is_global = meter_provider in (None, get_meter_provider())
    provider: object = _Global if is_global else meter_provider
    exporter = _exporters.get(provider)
    if exporter is None:
        exporter = _exporters[provider] = PoolExporter(meter_provider)
    exporter.start(names, emit_count, max_records, has_labels=labels)
    return exporter


class _Global:
    """Stands for the global meter provider, whichever that is by now."""


_exporters: weakref.WeakKeyDictionary[object, PoolExporter] = weakref.WeakKeyDictionary()


class PoolExporter:
    """The instruments at one meter provider; made by ``export_pools``."""

    def __init__(self, meter_provider: MeterProvider | None) -> None:
        self._names: frozenset[str] | None = None
        self._emit_count: EmitCount = "auto"
        self._max_records = 0
        self._has_labels = False
        self._is_on = False
        self._readings: list[tuple[str, Reading]] = []
        self._read_at = 0.0
        self._given: set[str] = set()
        self.after_fork_in_child()
        meter = get_meter("sqla_poolkit", _version(), meter_provider, SCHEMA)
        timeouts = [timeout for pool in pools() for timeout in read(glance(pool), ()).timeouts]
        self._histograms: dict[str, tuple[Histogram, tuple[float, ...]]] = {}
        for metric in (*METRICS, *OF_LABELS):
            if metric.kind == "histogram":
                limits = boundaries(metric, timeouts)
                histogram = meter.create_histogram(
                    metric.name,
                    metric.unit,
                    metric.help,
                    explicit_bucket_boundaries_advisory=limits,
                )
                self._histograms[metric.name] = histogram, limits
                continue
            callbacks = [self._callback(metric)]
            if metric.kind == "counter":
                meter.create_observable_counter(metric.name, callbacks, metric.unit, metric.help)
            elif metric.merged_by is max:
                meter.create_observable_gauge(metric.name, callbacks, metric.unit, metric.help)
            else:
                meter.create_observable_up_down_counter(
                    metric.name, callbacks, metric.unit, metric.help
                )
        meter.create_observable_counter(
            LEFT_OUT,
            [self._observe_left_out],
            "{duration}",
            "Durations that are missing in the histograms, as there were too many at a time.",
        )
        start_over_after_fork(self)

    def start(
        self,
        names: frozenset[str] | None,
        emit_count: EmitCount,
        max_records: int,
        *,
        has_labels: bool = False,
    ) -> None:
        """Export these pools from now on."""
        if self._is_on and names != self._names:
            raise ArgumentError(
                "other pools are exported to this meter provider already; give all engines to one "
                "call of export_pools(), or call stop() of what the first one returned"
            )
        self._names, self._emit_count, self._max_records = names, emit_count, max_records
        self._has_labels = has_labels
        self._is_on = True

    def stop(self) -> None:
        """Export nothing any more."""
        self._is_on = False
        self._given.clear()
        self._readings = []

    def after_fork_in_child(self) -> None:
        """Start over: the books of the child's pools are empty."""
        self._told: weakref.WeakKeyDictionary[Keeper, dict[str, Times]] = (
            weakref.WeakKeyDictionary()
        )
        self._left_out: dict[tuple[str, str], int] = {}

    # -- one reading per collection ----------------------------------------------------------

    def _callback(self, metric: Metric) -> Callable[[CallbackOptions], Iterator[Observation]]:
        def observe(_options: CallbackOptions) -> Iterator[Observation]:
            if metric.name == COUNT and not self._counts():
                return
            for name, reading in self._read_for(metric.name):
                for attributes, value in reading.values.get(metric.name, {}).items():
                    named = dict(zip(metric.attributes, attributes, strict=True))
                    yield Observation(value, {POOL: name, **named})

        return observe

    def _counts(self) -> bool:
        if self._emit_count == "auto":
            return not _is_instrumented()
        return self._emit_count

    def _observe_left_out(self, _options: CallbackOptions) -> Iterator[Observation]:
        self._read_for(LEFT_OUT)
        for (name, metric), number in self._left_out.items():
            yield Observation(number, {POOL: name, "metric": metric})

    def _read_for(self, instrument: str) -> list[tuple[str, Reading]]:
        """Return what the pools say, one reading for all instruments of a collection.

        An instrument that asks again means that there is a new collection.
        """
        if not self._is_on:
            return []
        is_old = time.monotonic() - self._read_at > _FRESH_SECONDS
        if is_old or instrument in self._given or not self._given:
            self._given.clear()
            found = [
                (keeper, snapshot.name, reading)
                for keeper, snapshot, reading in readings_of_this_process(
                    has_labels=self._has_labels
                )
                if self._names is None or snapshot.name in self._names
            ]
            self._readings = [(name, reading) for _, name, reading in found]
            self._read_at = time.monotonic()
            self._tell_times(found)
        self._given.add(instrument)
        return self._readings

    # -- histograms --------------------------------------------------------------------------

    def _tell_times(self, readings: list[tuple[Keeper, str, Reading]]) -> None:
        """Tell the durations that are new since the last reading, or as many as may be."""
        new = []
        for keeper, name, reading in readings:
            told = self._told.get(keeper, {})
            self._told[keeper] = reading.times
            new += [
                (name, metric, times - told.get(metric, Times()))
                for metric, times in reading.times.items()
            ]
        number = sum(times.count for _, _, times in new)
        share = min(1.0, self._max_records / number) if number else 1.0
        for name, metric, times in new:
            key = name, metric
            left_out = times.count - self._tell(name, metric, times, share)
            if left_out:
                self._left_out[key] = self._left_out.get(key, 0) + left_out

    def _tell(self, name: str, metric: str, times: Times, share: float) -> int:
        """Tell a value for each of these durations, or for a share; return for how many."""
        histogram, limits = self._histograms[metric]
        attributes = {POOL: name}
        told = 0
        for lower, upper, number in times.ranges():
            # as in Prometheus' buckets: one that a limit cuts through lies above it
            at = bisect_left(limits, upper)
            value = (max(lower, limits[at - 1] if at else 0.0) + upper) / 2
            for _ in range(ceil(number * share)):
                histogram.record(value, attributes)
                told += 1
                if told % _RECORDS_AT_A_TIME == 0:
                    time.sleep(0)  # let the threads that serve requests go first
        return told


def _is_instrumented() -> bool:
    """Tell whether OpenTelemetry's own instrumentation is active; not loaded it is not."""
    module = sys.modules.get("opentelemetry.instrumentation.sqlalchemy")
    instrumentor = getattr(module, "SQLAlchemyInstrumentor", None)
    return instrumentor is not None and bool(instrumentor().is_instrumented_by_opentelemetry)


def _version() -> str:
    try:
        return version("sqla_poolkit")
    except PackageNotFoundError:  # run from a checkout
        return ""
