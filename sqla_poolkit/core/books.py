"""The pool's books: counters, durations, and who made whom wait.

Plain numbers without a lock: the pool's lock guards them.  Totals that follow from others are
derived when a snapshot is taken, never stored.
"""

from __future__ import annotations

from collections.abc import Hashable

from .histogram import Recorder
from .slots import CloseReason

__all__ = ["Books", "Row", "Table"]

OTHERS = "(other)"
_MOST_ROWS = 2000


class Row:
    """What one holder asked, used and made others wait."""

    __slots__ = ("checkouts", "use_seconds", "wait_caused_seconds", "wait_seconds")

    def __init__(self) -> None:
        self.checkouts = 0
        self.use_seconds = 0.0
        self.wait_seconds = 0.0
        self.wait_caused_seconds = 0.0


class Table(dict[Hashable, Row]):
    """A row per holder; past two thousand the newcomers share one, so memory stays bounded."""

    def __missing__(self, key: Hashable) -> Row:
        if len(self) >= _MOST_ROWS and key != OTHERS:
            return self[OTHERS]
        row = self[key] = Row()
        return row


class Books:
    """All numbers of a pool but its gauges."""

    __slots__ = (
        "cancelled",
        "caused",
        "caused_by_checking",
        "caused_by_closing",
        "caused_by_connecting",
        "caused_by_pool",
        "checkout_time",
        "closes",
        "connect_failures",
        "connect_time",
        "connects",
        "detached",
        "failed",
        "failed_wait_time",
        "forgotten",
        "integrated_until",
        "invalidations",
        "peak_checked_out",
        "peak_waiting",
        "ping_failures",
        "pings",
        "probes",
        "rejected",
        "requesting",
        "reset_failures",
        "rows",
        "started_at",
        "timeouts",
        "unavailable",
        "use_time",
        "wait_time",
        "waits",
    )

    def __init__(self, now: float) -> None:
        self.started_at = now
        self.requesting = 0
        """Asked, and neither served nor failed yet."""
        self.waits = 0
        self.timeouts = 0
        self.rejected = 0
        self.cancelled = 0
        self.failed = 0
        self.unavailable = 0
        self.connects = 0
        self.connect_failures = 0
        self.pings = 0
        self.probes = 0
        self.ping_failures = 0
        self.reset_failures = 0
        self.invalidations = 0
        self.detached = 0
        self.forgotten = 0
        self.closes: dict[CloseReason, int] = {}
        self.peak_checked_out = 0
        self.peak_waiting = 0
        self.checkout_time = Recorder()
        self.wait_time = Recorder()
        self.connect_time = Recorder()
        self.use_time = Recorder()
        self.failed_wait_time = Recorder()
        self.rows = Table()
        self.caused = 0.0
        """Integral over time of waiting / (slots that could end it).

        A holder's part of all waiting is the growth of this integral while it held.
        """
        self.integrated_until = now
        self.caused_by_connecting = 0.0
        self.caused_by_checking = 0.0
        self.caused_by_closing = 0.0
        self.caused_by_pool = 0.0

    @property
    def checkouts(self) -> int:
        """How many requests were served."""
        return sum(row.checkouts for row in self.rows.values())

    @property
    def requests(self) -> int:
        """How often a connection was asked for."""
        return (
            self.checkouts
            + self.requesting
            + self.timeouts
            + self.rejected
            + self.cancelled
            + self.failed
            + self.unavailable
        )

    @property
    def checkins(self) -> int:
        """How often a connection came back."""
        return self.use_time.count

    def charge(
        self, waited: float, slots: int, connecting: int, checking: int, closing: int
    ) -> None:
        """Charge seconds of waiting to those who caused them.

        The waiting is split equally over the ``slots`` that are not idle: those that connect, are
        checked or close, and for the rest their holders.  With no such slot the pool itself
        answers for it.
        """
        if not slots:
            self.caused_by_pool += waited
            return
        share = waited / slots
        self.caused += share
        if connecting:
            self.caused_by_connecting += share * connecting
        if checking:
            self.caused_by_checking += share * checking
        if closing:
            self.caused_by_closing += share * closing

    def count_close(self, reason: CloseReason) -> None:
        """Count a connection that was closed."""
        self.closes[reason] = self.closes.get(reason, 0) + 1

    def wait_ended(self, seconds: float, holder: Hashable, *, served: bool) -> None:
        """Record a whole wait, however it ended."""
        (self.wait_time if served else self.failed_wait_time).record(seconds)
        self.rows[holder].wait_seconds += seconds

    def sort_records(self) -> None:
        """Sort all durations into their buckets, so that none gathers without end."""
        self.checkout_time.sort()
        self.use_time.sort()
        self.wait_time.sort()
        self.failed_wait_time.sort()
        self.connect_time.sort()
