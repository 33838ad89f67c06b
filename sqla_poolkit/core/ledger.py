"""The books of a pool that decides for itself: SQLAlchemy's own, told what it does.

The counterpart of ``machine``: there the state is made, here it is observed.  Connections and
holds are kept by identity, never counted up and down, so an event that does not come in pairs
cannot make the numbers drift.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from .books import Books, Row
from .events import (
    CheckoutCancelled,
    CheckoutFailed,
    CheckoutTimedOut,
    CheckoutWaited,
    ConnectFailed,
    ConnectionClosed,
    ConnectionLeaked,
    ConnectionLost,
    ConnectionOpened,
)
from .journal import Journal
from .slots import CloseReason
from .snapshot import Describe, SlotReading, read_books, read_rows

__all__ = ["Ledger"]

Outcome = Literal["timeout", "failed", "cancelled"]

_SORT_EACH = 512  # returns


@dataclass(slots=True)
class _Request:
    """A caller who asks."""

    asked_at: float
    holder: Hashable
    waiting_since: float | None = None
    has_waited: bool = False
    waited: float = 0.0


@dataclass(slots=True)
class _Link:
    """An open connection, and the place in the pool it belongs to."""

    place: Hashable
    opened_at: float
    idle_since: float
    uses: int = 0
    is_closing: bool = False


@dataclass(slots=True)
class _Hold:
    """A place that somebody has; ``since`` and ``row`` once its request was served."""

    holder: Hashable
    is_served: bool = False
    since: float = 0.0
    mark: float = 0.0
    row: Row | None = None


class Ledger:
    """What happened in a pool, and what is the case now.

    Requests, places and connections are whatever the pool tells them apart by.  Each call takes
    the time; the caller sees to it that calls do not overlap.
    """

    def __init__(self, now: float, journal: Journal | None = None) -> None:
        self.books = Books(now)
        self.journal = journal or Journal()
        self._requests: dict[Hashable, _Request] = {}
        self._waiting: dict[Hashable, _Request] = {}
        self._links: dict[Hashable, _Link] = {}
        self._at: dict[Hashable, _Link] = {}
        self._holds: dict[Hashable, _Hold] = {}
        self._attempts: dict[Hashable, float] = {}

    # -- what is the case --------------------------------------------------------------------

    def _gauges(self) -> dict[str, int]:
        closing = sum(link.is_closing for link in self._links.values())
        held = [self._holds[place] for place in self._at if place in self._holds]
        checked_out = sum(hold.is_served for hold in held)
        checking = len(held) - checked_out
        is_open = len(self._links) - closing
        return {
            "open": is_open,
            "idle": max(0, is_open - checked_out - checking),
            "checked_out": checked_out,
            "checking": checking,
            "connecting": len(self._attempts),
            "closing": closing,
            "waiting": len(self._waiting),
        }

    def _advance(self, now: float) -> None:
        """Charge the waiting since the last call, before anything changes."""
        books = self.books
        waited = (now - books.integrated_until) * len(self._waiting)
        books.integrated_until = now
        if waited:
            # by places, not by connections: a holder who lost its connection keeps its place
            served = sum(hold.is_served for hold in self._holds.values())
            connecting = len(self._attempts)
            checking = sum(
                not hold.is_served and place not in self._attempts
                for place, hold in self._holds.items()
            )
            closing = sum(link.is_closing for link in self._links.values())
            busy = served + connecting + checking + closing
            books.charge(waited, busy, connecting, checking, closing)

    # -- asking ------------------------------------------------------------------------------

    def asked(self, now: float, request: Hashable, holder: Hashable) -> None:
        """Note a caller who asks for a connection."""
        self._requests[request] = _Request(now, holder)
        self.books.requesting += 1

    def wait_began(self, now: float, request: Hashable) -> None:
        """Note that the caller has to queue."""
        self._advance(now)
        asking = self._requests.get(request)
        if asking is None:
            return
        asking.waiting_since = now
        if not asking.has_waited:
            asking.has_waited = True
            self.books.waits += 1
        self._waiting[request] = asking
        self.books.peak_waiting = max(self.books.peak_waiting, len(self._waiting))

    def wait_ended(self, now: float, request: Hashable) -> None:
        """Note that the caller queues no longer."""
        self._advance(now)
        asking = self._waiting.pop(request, None)
        if asking is not None and asking.waiting_since is not None:
            asking.waited += now - asking.waiting_since
            asking.waiting_since = None

    def taken(self, now: float, request: Hashable, place: Hashable) -> None:
        """Note that the caller was given a place, which is yet to be checked."""
        self._advance(now)
        asking = self._requests.get(request)
        self._holds[place] = _Hold(None if asking is None else asking.holder)

    def served(self, now: float, request: Hashable, place: Hashable) -> None:
        """Note that the caller has its connection."""
        self._advance(now)
        asking = self._requests.pop(request, None)
        if asking is None:
            return
        books = self.books
        hold = self._holds.setdefault(place, _Hold(asking.holder))
        hold.is_served = True
        hold.since = now
        hold.mark = books.caused
        hold.row = books.rows[asking.holder]
        hold.row.checkouts += 1
        link = self._at.get(place)
        if link is not None:
            link.uses += 1
        books.requesting -= 1
        books.checkout_time.record(now - asking.asked_at)
        if asking.has_waited:
            books.wait_ended(asking.waited, asking.holder, served=True)
            if asking.waited >= self.journal.longest_untold_wait:
                self.journal.write_of(CheckoutWaited, now, asking.holder, asking.waited)
        held = sum(hold.is_served for hold in self._holds.values())
        books.peak_checked_out = max(books.peak_checked_out, held)

    def failed(self, now: float, request: Hashable, outcome: Outcome) -> None:
        """Note that the caller got nothing."""
        asking = self._requests.pop(request, None)
        if asking is None:
            return
        books = self.books
        if len(books.failed_wait_time.gathered) >= _SORT_EACH:
            books.sort_records()
        books.requesting -= 1
        write_of = self.journal.write_of
        if outcome == "timeout":
            books.timeouts += 1
            held = sum(hold.is_served for hold in self._holds.values())
            write_of(CheckoutTimedOut, now, asking.holder, asking.waited, held, len(self._waiting))
        elif outcome == "failed":
            books.failed += 1
            write_of(CheckoutFailed, now, asking.holder, asking.waited)
        else:
            books.cancelled += 1
            write_of(CheckoutCancelled, now, asking.holder, asking.waited)
        if asking.has_waited:
            books.wait_ended(asking.waited, asking.holder, served=False)

    # -- giving back -------------------------------------------------------------------------

    def returned(self, now: float, place: Hashable) -> None:
        """Note that a place came back."""
        self._advance(now)
        if len(self.books.use_time.gathered) >= _SORT_EACH:
            self.books.sort_records()
        hold = self._holds.pop(place, None)
        link = self._at.get(place)
        if link is not None:
            link.idle_since = now
        if hold is None or hold.row is None:
            return
        self.books.use_time.record(now - hold.since)
        hold.row.use_seconds += now - hold.since
        hold.row.wait_caused_seconds += self.books.caused - hold.mark

    def detached_from(self, now: float, place: Hashable) -> None:
        """Note that the holder of a place keeps its connection for itself."""
        self._advance(now)
        kept = self._at.pop(place, None)
        if kept is not None:
            self._links = {key: link for key, link in self._links.items() if link is not kept}
            self.books.detached += 1
            hold = self._holds.get(place)
            holder = None if hold is None else hold.holder
            self.journal.write_of(ConnectionLost, now, holder, True)

    # -- connecting and closing --------------------------------------------------------------

    def connect_began(self, now: float, place: Hashable) -> None:
        """Note an attempt to connect."""
        self._advance(now)
        self._attempts[place] = now

    def connected(self, now: float, connection: Hashable, place: Hashable, seconds: float) -> None:
        """Note that the attempt succeeded."""
        self._advance(now)
        self._attempts.pop(place, None)
        self.books.connects += 1
        self.books.connect_time.record(seconds)
        self.journal.write(ConnectionOpened, now, seconds)
        self._links[connection] = self._at[place] = _Link(place, now, now)

    def connect_failed(self, now: float, place: Hashable) -> None:
        """Note that the attempt failed."""
        self._advance(now)
        self._attempts.pop(place, None)
        self.books.connect_failures += 1
        self.journal.write(ConnectFailed, now, self.journal.last_connect_error)

    def close_began(self, now: float, connection: Hashable) -> None:
        """Note that a connection is being closed."""
        self._advance(now)
        link = self._links.get(connection)
        if link is not None:
            link.is_closing = True
            if self._at.get(link.place) is link:
                del self._at[link.place]

    def closed(self, now: float, connection: Hashable, reason: CloseReason) -> None:
        """Note that a connection was closed."""
        self._advance(now)
        link = self._unlink(connection)
        if link is None:
            return
        self.books.count_close(reason)
        self.books.invalidations += reason == "invalidated"
        hold = self._holds.get(link.place)
        if reason == "leaked" and hold is not None:
            self.journal.write_of(ConnectionLeaked, now, hold.holder, now - hold.since)
        self.journal.write(ConnectionClosed, now, reason, now - link.opened_at, link.uses)

    def _unlink(self, connection: Hashable) -> _Link | None:
        link = self._links.pop(connection, None)
        if link is not None and self._at.get(link.place) is link:
            del self._at[link.place]
        return link

    # -- reading -----------------------------------------------------------------------------

    def opened_at(self, connection: Hashable) -> float | None:
        """Return when a connection was opened, None if that was not seen."""
        link = self._links.get(connection)
        return None if link is None else link.opened_at

    def read(
        self,
        now: float,
        describe: Describe,
        *,
        has_callers: bool,
        max_size: int | None,
        has_rows: bool = True,
    ) -> dict[str, Any]:
        """Return the fields of a snapshot; ``has_rows`` as in ``read_rows``."""
        self._advance(now)
        self.books.sort_records()
        waits = {
            request: asking.waited + (now - asking.waiting_since if asking.waiting_since else 0.0)
            for request, asking in self._requests.items()
            if asking.has_waited
        }
        parts = [
            *(
                (hold.holder, now - hold.since, 0.0, self.books.caused - hold.mark)
                for hold in self._holds.values()
                if hold.is_served
            ),
            *(
                (self._requests[request].holder, 0.0, seconds, 0.0)
                for request, seconds in waits.items()
            ),
        ]
        return {
            **read_books(self.books, now),
            **read_rows(self.books, parts, describe, has_callers=has_callers, has_rows=has_rows),
            **self._gauges(),
            "oldest_wait_seconds": max((waits[request] for request in self._waiting), default=0.0),
            "waiting_seconds": sum(waits.values()),
            "observer_errors": self.journal.errors,
            "phase": "open",
            "is_down": None,
            "max_size": max_size,
            "is_unlimited": max_size is None,
            "slots": tuple(self._read_slots(now, describe)),
            # pings are made by SQLAlchemy where nothing tells of them
            "pings": None,
            "probes": None,
            "ping_failures": None,
            "reset_failures": None,
        }

    def _read_slots(self, now: float, describe: Describe) -> Iterable[SlotReading]:
        for began_at in self._attempts.values():
            yield SlotReading("connecting", now - began_at, None, 0, None, None, None)
        for link in self._links.values():
            hold = self._holds.get(link.place)
            state = "closing" if link.is_closing else "idle"
            if hold is not None and not link.is_closing:
                state = "checked_out" if hold.is_served else "checking"
            label, caller = describe(hold.holder) if hold is not None else (None, None)
            yield SlotReading(
                state=state,
                age_seconds=now - link.opened_at,
                idle_seconds=now - link.idle_since if state == "idle" else None,
                uses=link.uses,
                label=label,
                caller=caller,
                held_seconds=now - hold.since if hold is not None and hold.is_served else None,
            )
