"""What follows from the requests that the callers of a load have written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

__all__ = ["NOBODY", "Request", "Share", "Summary", "jain", "percentile", "shares"]

NOBODY = "(nobody)"
"""Answers for the waiting while no connection was held: the first ones were being opened."""


@dataclass(slots=True)
class Request:
    """One request as its caller saw it; times in seconds of one monotonic clock."""

    label: str
    asked_at: float
    had_at: float | None = None
    ended_at: float = 0.0
    failure: Literal["", "timeout", "error"] = ""

    @property
    def wait_seconds(self) -> float:
        """From asking to having, or to giving up."""
        return (self.ended_at if self.had_at is None else self.had_at) - self.asked_at


@dataclass(slots=True)
class Share:
    """What the callers with one label got, waited and made others wait."""

    served: int = 0
    wait_seconds: float = 0.0
    wait_caused_seconds: float = 0.0


@dataclass(frozen=True)
class Summary:
    """The figures of one run."""

    served: int
    timeouts: int
    errors: int
    waits: Sequence[float]
    """From asking to having or to giving up, of every request, in order of length."""
    least_served: int
    most_served: int
    jain: float
    """Jain's index over the web workers: 1 is equal shares, 1/n one who gets everything."""
    luckiest_wait: float
    """The shortest of the callers' average waits; web workers and jobs, who ask all the time."""
    unluckiest_wait: float
    opened: int
    labels: dict[str, Share]

    def wait(self, q: float) -> float:
        """Return the wait in seconds that a share ``q`` of all requests did not exceed."""
        return percentile(self.waits, q)

    @property
    def wait_seconds(self) -> float:
        """All waits added up."""
        return sum(self.waits)


def percentile(ordered: Sequence[float], q: float) -> float:
    """Return the smallest of the sorted values that a share ``q`` of them does not exceed."""
    return ordered[max(0, ceil(q * len(ordered)) - 1)] if ordered else 0.0


def jain(counts: Sequence[int]) -> float:
    """Return Jain's fairness index (Jain, Chiu, Hawe: DEC-TR-301, 1984)."""
    squares = sum(count * count for count in counts)
    return sum(counts) ** 2 / (len(counts) * squares) if squares else 0.0


def shares(requests: Sequence[Request]) -> dict[str, Share]:
    """Return per label who was served, who waited, and who made the others wait.

    At each instant the waiting is split equally over those who hold a connection: one second in
    which six callers wait for two holders is three seconds caused by each.
    """
    labels: dict[str, Share] = {}
    for request in requests:
        share = labels.setdefault(request.label, Share())
        share.served += request.had_at is not None
        share.wait_seconds += request.wait_seconds
    waiting = held = 0
    holders = dict.fromkeys(labels, 0)
    before = 0.0
    for moment, more_waiting, more_held, label in sorted(_changes(requests)):
        if waited := (moment - before) * waiting:
            for name, number in holders.items() if held else [(NOBODY, 1)]:
                share = labels.setdefault(name, Share())
                share.wait_caused_seconds += waited * number / (held or 1)
        before = moment
        waiting += more_waiting
        held += more_held
        holders[label] += more_held
    return labels


def _changes(requests: Sequence[Request]) -> list[tuple[float, int, int, str]]:
    """Return when how many more waited and how many more held, with the label of who did."""
    changes = []
    for request in requests:
        label = request.label
        changes.append((request.asked_at, 1, 0, label))
        if request.had_at is None:
            changes.append((request.ended_at, -1, 0, label))
        else:
            changes.append((request.had_at, -1, 1, label))
            changes.append((request.ended_at, 0, -1, label))
    return changes
