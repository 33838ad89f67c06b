"""The rules that weigh: how many connects are worth it, when to try again, who is due when."""

from __future__ import annotations

from math import ceil, inf

from .histogram import Recorder
from .slots import ConnectFault

__all__ = ["Breaker", "Pace", "spread"]

_LEAST_CONNECT_SECONDS = 0.05
_SHARE_TO_WATCH = 0.1  # of a connect: so long a queue is watched before a second attempt starts
_GOLDEN = 0.6180339887498949
_FAILURES_TO_OPEN = 3
_FAILING_SECONDS = 0.5
_LEAST_SECONDS_APART = 0.5
_MOST_SECONDS_APART = 0.9  # a recovery shall be noticed within a second
_MOST_SECONDS_AFTER_DENIAL = 30.0


def spread(offset: float, number: int) -> float:
    """Return a number between 0 and 1 for connection ``number``, to space what is due for each.

    Multiples of the golden ratio are spaced as evenly as can be at every length of the sequence,
    so a fleet opened at once never reconnects at once; ``offset`` (0 to 1) tells processes apart.
    """
    return (offset + number * _GOLDEN) % 1.0


class Breaker:
    """When to leave connecting alone after failures, and when to call the database down.

    *Closed*, each failure pauses growth: for 0.1 s, doubled each time, up to 1 s, stretched by up
    to half at random so that processes do not knock together.  It *opens* after three failures in
    a row over at least half a second while no connection was open.  Open, it allows one attempt at
    a time, 0.5 to 0.9 s after the one before (decorrelated jitter: M. Brooker, "Exponential Backoff
    and Jitter"); after a refused password up to 30 s, or the server would lock the account.  The
    first success closes it.
    """

    __slots__ = (
        "_bare_failures",
        "_denials",
        "_failing_since",
        "_failures",
        "_pause",
        "failed_at",
        "is_congested",
        "is_open",
        "until",
    )

    def __init__(self) -> None:
        self.is_open = False
        self._failures = 0
        self._bare_failures = 0
        self._denials = 0
        self._failing_since = inf
        self._pause = 0.0
        self.until = -inf
        """No attempt before this moment, except for who waits and has no connection to wait for."""
        self.failed_at = -inf
        """When the last attempt failed, or took too long."""
        self.is_congested = False
        """The server said that it has too many connections."""

    def failed(
        self, began_at: float, now: float, chance: float, fault: ConnectFault, *, is_bare: bool
    ) -> bool:
        """Note a failed attempt; return whether the breaker opens because of it.

        :param began_at: when the attempt began.
        :param chance: a random number between 0 and 1.
        :param is_bare: whether no connection is open.
        """
        if fault == "congestion" or not is_bare:
            # the server is there
            self._failing_since = inf
            self._bare_failures = 0
        else:
            self._failing_since = min(self._failing_since, began_at)
            self._bare_failures += 1
        pause = min(1.0, 0.1 * 2.0 ** min(self._failures, 10)) * (1.0 + 0.5 * chance)
        self._failures += 1
        self._denials = self._denials + 1 if fault == "authentication" else 0
        has_failed_long = now - self._failing_since >= _FAILING_SECONDS
        has_failed_often = self._bare_failures >= _FAILURES_TO_OPEN
        opens = not self.is_open and has_failed_often and has_failed_long
        self.is_open |= opens
        if self.is_open:
            self._pause = min(_MOST_SECONDS_APART, _apart(self._pause, chance))
            pause = self._pause
            if self._denials > _FAILURES_TO_OPEN:
                doublings = min(self._denials - _FAILURES_TO_OPEN, 10)
                pause = min(_MOST_SECONDS_AFTER_DENIAL, pause * 2.0**doublings)
        elif fault == "congestion":
            pause = max(pause, _LEAST_SECONDS_APART * (1.0 + chance))
        self.is_congested = fault == "congestion"
        self.failed_at = now
        self.until = now + pause
        return opens

    def succeeded(self) -> None:
        """Forget the failures."""
        self.is_open = False
        self.is_congested = False
        self.until = -inf
        self._failures = 0
        self._bare_failures = 0
        self._denials = 0
        self._failing_since = inf
        self._pause = 0.0

    def forget(self) -> None:
        """Let the next caller try for himself; one more failure opens the breaker again."""
        self.is_open = False
        self.until = -inf


def _apart(before: float, chance: float) -> float:
    """Return a pause that depends on the one before and on chance."""
    return _LEAST_SECONDS_APART + chance * max(0.0, 3.0 * before - _LEAST_SECONDS_APART)


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
