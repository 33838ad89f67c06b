"""The rules that weigh: how many connects are worth starting, when to try again, who ages when."""

from __future__ import annotations

from math import ceil

from .histogram import Recorder

__all__ = ["Backoff", "Pace", "spread_age"]

_LEAST_CONNECT_SECONDS = 0.05
_SHARE_TO_WATCH = 0.1  # of a connect: so long a queue is watched before a second attempt starts
_GOLDEN = 0.6180339887498949


def spread_age(offset: float, number: int) -> float:
    """Return the share of ``max_lifetime`` after which connection ``number`` ages: 0.75 to 1.

    Multiples of the golden ratio are spaced as evenly as can be at every length of the sequence,
    so a fleet opened at once never reconnects at once; ``offset`` (0 to 1) tells processes apart.
    """
    return 0.75 + 0.25 * ((offset + number * _GOLDEN) % 1.0)


class Backoff:
    """How long to leave connecting alone after failures: 0.1 s, doubled each time, up to 1 s.

    The pause is stretched by up to half at random, so that processes do not knock together.
    """

    __slots__ = ("_failures", "until")

    def __init__(self) -> None:
        self._failures = 0
        self.until = float("-inf")

    def failed(self, now: float, chance: float) -> None:
        """Note a failed attempt; ``chance`` is a random number between 0 and 1."""
        pause = min(1.0, 0.1 * 2.0 ** min(self._failures, 10)) * (1.0 + 0.5 * chance)
        self._failures += 1
        self.until = now + pause

    def succeeded(self) -> None:
        """Forget the failures."""
        self._failures = 0
        self.until = float("-inf")


class Pace:
    """How soon connections are likely to come back, from the books.

    While callers queue every slot is busy, so the time on slots since the queue formed, divided
    by the returns since then, estimates how long a use takes.  The uses that have not ended yet
    count as if each were about to end, after what a use took before the queue formed.
    """

    __slots__ = ("_formed_at", "_known_count", "_known_sum", "_prior", "_returns_before")

    def __init__(self) -> None:
        self._formed_at = 0.0
        self._returns_before = 0
        self._prior = 0.0
        self._known_count = 0
        self._known_sum = 0.0

    def queue_formed(self, now: float, use_time: Recorder) -> None:
        """Note that somebody waits who is the first to do so."""
        self._formed_at = now
        self._returns_before = checkins = use_time.count
        recent = checkins - self._known_count
        if recent > 0:
            self._prior = (use_time.sum_seconds - self._known_sum) / recent
        self._known_count, self._known_sum = checkins, use_time.sum_seconds

    def attempts_worth(
        self, now: float, waiting: int, serving: int, checkins: int, connect_seconds: float
    ) -> int:
        """Return how many attempts the present queue is worth, at least one.

        Those waiters need no attempt who will probably be served by returned connections before
        a new one could be open.
        """
        if not serving:
            return waiting
        # what connecting took before is no promise, and where it is quick one attempt after the
        # other is quick as well: growth is never judged by less than this
        connect_seconds = max(connect_seconds, _LEAST_CONNECT_SECONDS)
        if now - self._formed_at < connect_seconds * _SHARE_TO_WATCH:
            return 1
        returns = checkins - self._returns_before
        use = serving * (self._prior + now - self._formed_at) / (returns + serving)
        if use <= 0.0:
            return 1
        return max(1, ceil(waiting - serving * connect_seconds / use))
