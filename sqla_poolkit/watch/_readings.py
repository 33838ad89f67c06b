"""What pools say, in the terms of the metrics: read, put together, and counted into buckets."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ..core.histogram import Histogram
from ..core.snapshot import PoolSnapshot
from ..pool._registry import Keeper, living_books
from ..pool.reading import glance, snapshot
from ._metrics import METRICS, METRICS_BY_NAME, OF_LABELS, Attributes, Metric

__all__ = ["Reading", "boundaries", "cumulated", "merge", "read", "readings_of_this_process"]


@dataclass
class Reading:
    """What one pool has to say, or the pools of one name in several processes together."""

    values: dict[str, dict[Attributes, float]] = field(default_factory=dict)
    """Of gauges and counters: metric -> attributes -> value."""
    times: dict[str, Histogram] = field(default_factory=dict)
    timeouts: tuple[float, ...] = ()

    def history(self) -> Reading:
        """Return what stays true when the process is gone: all but the gauges."""
        return Reading(
            {
                name: points
                for name, points in self.values.items()
                if name in METRICS_BY_NAME and METRICS_BY_NAME[name].kind == "counter"
            },
            self.times,
            self.timeouts,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {
            "values": {
                name: [[*attributes, value] for attributes, value in points.items()]
                for name, points in self.values.items()
            },
            "times": {
                name: [times.count, times.sum_seconds, times.max_seconds, [*times.counts.items()]]
                for name, times in self.times.items()
            },
            "timeouts": self.timeouts,
        }

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> Reading:
        """Return what ``to_dict`` made."""
        return cls(
            {
                name: {tuple(attributes): value for *attributes, value in points}
                for name, points in known["values"].items()
            },
            {
                name: Histogram(count, total, highest, dict(counts))
                for name, (count, total, highest, counts) in known["times"].items()
            },
            tuple(known["timeouts"]),
        )


def read(taken: PoolSnapshot, metrics: Iterable[Metric] = METRICS) -> Reading:
    """Return what the metrics say about a pool."""
    reading = Reading()
    for metric in metrics:
        if metric.points is not None:
            reading.values[metric.name] = dict(metric.points(taken))
        elif metric.times is not None and (times := metric.times(taken)) is not None:
            reading.times[metric.name] = times
    timeout = taken.settings.get("timeout")
    reading.timeouts = (float(timeout),) if timeout else ()
    return reading


def readings_of_this_process(*, has_labels: bool) -> list[tuple[Keeper, PoolSnapshot, Reading]]:
    """Return what each pool of this process says now."""
    look = snapshot if has_labels else glance
    metrics = (*METRICS, *OF_LABELS) if has_labels else METRICS
    found = [(keeper, look(pool)) for keeper, pool in living_books()]
    return [(keeper, reading, read(reading, metrics)) for keeper, reading in found]


def merge(one: Reading, other: Reading) -> Reading:
    """Return what both say together; a metric that is not known here is left out."""
    return Reading(
        {
            name: _merge_points(
                METRICS_BY_NAME[name], one.values.get(name, {}), other.values.get(name, {})
            )
            for name in {**one.values, **other.values}
            if name in METRICS_BY_NAME
        },
        {
            name: one.times.get(name, Histogram()) + other.times.get(name, Histogram())
            for name in {**one.times, **other.times}
        },
        tuple(sorted({*one.timeouts, *other.timeouts})),
    )


def _merge_points(
    metric: Metric, one: Mapping[Attributes, float], other: Mapping[Attributes, float]
) -> dict[Attributes, float]:
    merged = dict(one)
    for attributes, value in other.items():
        known = merged.get(attributes)
        merged[attributes] = value if known is None else metric.merged_by(known, value)
    return merged


# -- histograms ------------------------------------------------------------------------------


def boundaries(metric: Metric, timeouts: Iterable[float]) -> tuple[float, ...]:
    """Return the boundaries of a histogram, the pools' timeouts among them where it has these.

    All pools of a process share them: only then do the buckets of several pools add up.
    """
    return tuple(
        sorted({*map(float, metric.boundaries), *(timeouts if metric.has_timeout else ())})
    )


def cumulated(times: Histogram, limits: tuple[float, ...]) -> list[int]:
    """Return for each limit how many durations did not exceed it.

    Our own buckets, 12.5 % wide at most, are counted whole: one that a limit cuts through lies
    above it, so no duration is shown shorter than it was.
    """
    counts = [0] * (len(limits) + 1)
    for upper, number in times.buckets():
        counts[bisect_left(limits, upper)] += number
    return list(accumulate(counts))[:-1]
