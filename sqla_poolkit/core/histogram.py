"""Durations counted in log-linear buckets: cheap to record, mergeable, at most 6.25 % off.

Each octave of seconds is cut into eight equal steps, so a bucket is at most 12.5 % wide and its
middle at most 6.25 % away from any value in it.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

__all__ = ["Histogram", "Recorder"]

_STEPS = 8
_LOWEST = -21  # 2**-21 seconds, half a microsecond: everything shorter shares the first bucket
_HIGHEST = 20  # 2**20 seconds, twelve days: everything longer shares the last bucket
_LAST = (_HIGHEST - _LOWEST) * _STEPS + 1

# The first 16 bits of a double are its sign, the 11 bits of its exponent (1023 more than the power
# of two) and the 4 highest bits of its mantissa; without the last they number octaves and steps.
_HEAD = 3 if sys.byteorder == "little" else 0
_FIRST_HEAD = (1023 + _LOWEST) * _STEPS - 1


def _upper_bound(index: int) -> float:
    """Return the upper end of bucket ``index`` in seconds."""
    octave, step = divmod(index - 1, _STEPS)
    return 2.0 ** (_LOWEST + octave) * (1 + (step + 1) / _STEPS)


class Recorder:
    """Counts durations as they happen; not thread-safe, the pool's lock guards it.

    ``record`` is a bare ``list.append``; ``sort`` puts what has gathered into the buckets, all at
    once at half the price.  Nothing is read without sorting first, and whoever records has to see
    to it that ``gathered`` is sorted now and then.
    """

    __slots__ = ("_count", "_counts", "_max", "_sum", "gathered", "record")

    def __init__(self) -> None:
        self._counts = [0] * (_LAST + 1)
        self._sum = 0.0
        self._max = 0.0
        self._count = 0
        self.gathered: list[float] = []
        self.record: Callable[[float], None] = self.gathered.append
        """Count one duration in seconds."""

    def sort(self) -> None:
        """Put what was recorded since the last time into the buckets."""
        gathered = self.gathered
        if not gathered:
            return
        counts = self._counts
        heads = memoryview(array("d", gathered)).cast("B").cast("H")[_HEAD::4]
        for head, number in Counter(heads.tolist()).items():
            counts[min(max(0, (head >> 1) - _FIRST_HEAD), _LAST)] += number
        self._count += len(gathered)
        self._sum += sum(gathered)
        self._max = max(self._max, max(gathered))
        gathered.clear()

    @property
    def count(self) -> int:
        """How many durations were recorded."""
        return self._count + len(self.gathered)

    @property
    def sum_seconds(self) -> float:
        """All durations added up."""
        self.sort()
        return self._sum

    def freeze(self) -> Histogram:
        """Return what was recorded so far."""
        self.sort()
        counts = {index: number for index, number in enumerate(self._counts) if number}
        return Histogram(self._count, self._sum, self._max, counts)


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

    def ranges(self) -> tuple[tuple[float, float, int], ...]:
        """Return ``(lower, upper bound in seconds, records between)`` of each non-empty bucket."""
        return tuple(
            (_upper_bound(index - 1) if index else 0.0, _upper_bound(index), self.counts[index])
            for index in sorted(self.counts)
        )

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
