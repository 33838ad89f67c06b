"""Durations counted in log-linear buckets: cheap to record, mergeable, at most 6.25 % off.

Each octave of seconds is cut into eight equal steps, so a bucket is at most 12.5 % wide and its
middle at most 6.25 % away from any value in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, frexp, ldexp
from typing import Any

__all__ = ["Histogram", "Recorder"]

_STEPS = 8
_LOWEST = -20  # 2**-21 seconds, half a microsecond: everything shorter shares the first bucket
_HIGHEST = 20  # 2**20 seconds, twelve days: everything longer shares the last bucket
# frexp's mantissa lies in [0.5, 1), so int(mantissa * 16) counts the steps from 8 to 15
_OFFSET = -(_LOWEST * _STEPS) - _STEPS + 1
_LAST = (_HIGHEST - _LOWEST + 1) * _STEPS + 1
_SHORTEST = ldexp(0.5, _LOWEST)
_LONGEST = ldexp(1.0, _HIGHEST)


def _upper_bound(index: int) -> float:
    """Return the upper end of bucket ``index`` in seconds."""
    if index == 0:
        return _SHORTEST
    octave, step = divmod(index - 1, _STEPS)
    return ldexp((_STEPS + step + 1) / (2 * _STEPS), octave + _LOWEST)


class Recorder:
    """Counts durations as they happen; not thread-safe, the pool's lock guards it."""

    __slots__ = ("_counts", "max_seconds", "sum_seconds")

    def __init__(self) -> None:
        self._counts = [0] * (_LAST + 1)
        self.sum_seconds = 0.0
        self.max_seconds = 0.0

    def record(self, seconds: float) -> None:
        """Count one duration."""
        if _SHORTEST <= seconds < _LONGEST:
            mantissa, exponent = frexp(seconds)
            self._counts[(exponent << 3) + int(mantissa * 16.0) + _OFFSET] += 1
        else:
            self._counts[0 if seconds < _SHORTEST else _LAST] += 1
        self.sum_seconds += seconds
        if seconds > self.max_seconds:
            self.max_seconds = seconds

    @property
    def count(self) -> int:
        """How many durations were recorded."""
        return sum(self._counts)

    def freeze(self) -> Histogram:
        """Return what was recorded so far."""
        counts = {index: number for index, number in enumerate(self._counts) if number}
        return Histogram(sum(counts.values()), self.sum_seconds, self.max_seconds, counts)


@dataclass(frozen=True, slots=True)
class Histogram:
    """A frozen distribution of durations in seconds."""

    count: int = 0
    sum_seconds: float = 0.0
    max_seconds: float = 0.0
    counts: Mapping[int, int] = field(default_factory=dict, repr=False)
    """How many durations fell into each bucket; the numbering is private, see ``buckets()``."""

    @property
    def mean_seconds(self) -> float:
        """The average duration, 0 when nothing was recorded."""
        return self.sum_seconds / self.count if self.count else 0.0

    def quantile(self, q: float) -> float:
        """Return the duration that a share ``q`` of all records did not exceed (nearest rank).

        :param q: between 0 and 1; 1 is the exact maximum.
        :return: seconds, at most 6.25 % off; 0 when nothing was recorded.
        :raises ValueError: if ``q`` lies outside 0..1.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q={q!r} is not a share; it must lie between 0 and 1")
        if q == 1 or not self.count:
            return self.max_seconds
        rank = max(1, ceil(q * self.count))
        seen = 0
        for index in sorted(self.counts):
            seen += self.counts[index]
            if seen >= rank:
                middle = (_upper_bound(index) + (_upper_bound(index - 1) if index else 0.0)) / 2
                return min(middle, self.max_seconds)
        return self.max_seconds

    def buckets(self) -> tuple[tuple[float, int], ...]:
        """Return ``(upper bound in seconds, records in this bucket)`` of each non-empty bucket."""
        return tuple((_upper_bound(index), self.counts[index]) for index in sorted(self.counts))

    def __sub__(self, earlier: Histogram) -> Histogram:
        """Return what was recorded after ``earlier``; its maximum is exact to its bucket."""
        counts = {
            index: number - earlier.counts.get(index, 0)
            for index, number in self.counts.items()
            if number != earlier.counts.get(index, 0)
        }
        if any(number < 0 for number in counts.values()):
            raise ValueError("the histogram to subtract is the later one, or of another pool")
        highest = min(_upper_bound(max(counts)), self.max_seconds) if counts else 0.0
        if self.max_seconds > earlier.max_seconds:
            highest = self.max_seconds
        return Histogram(
            self.count - earlier.count,
            max(0.0, self.sum_seconds - earlier.sum_seconds),
            highest,
            counts,
        )

    def __add__(self, other: Histogram) -> Histogram:
        """Return both distributions together."""
        counts = dict(self.counts)
        for index, number in other.counts.items():
            counts[index] = counts.get(index, 0) + number
        return Histogram(
            self.count + other.count,
            self.sum_seconds + other.sum_seconds,
            max(self.max_seconds, other.max_seconds),
            counts,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the distribution JSON-ready, with the quantiles that people ask for."""
        return {
            "count": self.count,
            "sum_seconds": self.sum_seconds,
            "max_seconds": self.max_seconds,
            "mean_seconds": self.mean_seconds,
            "p50_seconds": self.quantile(0.5),
            "p95_seconds": self.quantile(0.95),
            "p99_seconds": self.quantile(0.99),
            "buckets": [list(bucket) for bucket in self.buckets()],
        }
