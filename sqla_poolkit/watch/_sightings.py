"""The books of a pool that keeps none, made of what SQLAlchemy's listeners see.

Events do not come in pairs: a reconnect that fails checks in what was never checked out, and who
raises in one listener keeps the next from hearing.  So nothing is counted up and down.  How many
connections are open, and which of them are in use, is looked up on SQLAlchemy's own records when
it is asked for; events tell the rest: since when, by whom, how often.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from typing import Any

from ..core.books import Books
from ..core.events import (
    ConnectFailed,
    ConnectionClosed,
    ConnectionLeaked,
    ConnectionLost,
    ConnectionOpened,
)
from ..core.journal import Journal
from ..core.slots import CloseReason
from ..core.snapshot import Describe, SlotReading, read_books, read_rows

__all__ = ["Note", "Seat", "Sightings"]

_NOBODY = object()

# SQLAlchemy tells neither of asking nor of waiting
_UNKNOWN = (
    *("requesting", "requests", "checkout_time", "connecting"),
    *("cancelled", "failed", "pings", "probes"),
)
_UNKNOWN_OF_QUEUES = (
    *("waiting", "oldest_wait_seconds", "waiting_seconds", "peak_waiting"),
    *("waits", "timeouts", "wait_time", "failed_wait_time"),
)


class Seat:
    """A record of SQLAlchemy's, and what was seen of it."""

    __slots__ = (
        "closing_at",
        "connection",
        "counted",
        "entered",
        "holder",
        "idle_since",
        "is_open",
        "key",
        "latest",
        "opened_at",
        "reason",
        "record",
        "since",
        "uses",
        "was_adopted",
        "was_out",
    )

    def __init__(self, record: Any) -> None:
        self.record: weakref.ref[Any] = weakref.ref(record)
        self.key = id(record)
        self.latest = 0
        """The identity of its last connection; written by who opened it."""
        self.connection = 0
        """The identity of the last connection that was entered."""
        self.is_open = False
        """That connection is not known to be gone."""
        self.reason: CloseReason | None = None
        """Why it is being closed."""
        self.closing_at = 0.0
        self.opened_at = 0.0
        self.idle_since = 0.0
        self.uses = 0
        self.was_adopted = False
        """Its connection was there before anybody looked."""
        self.was_out = False
        """It was in use when it was first seen."""
        # a hold is told by its begin, the very object
        self.holder: Hashable = None
        """Who took it last."""
        self.since: float | None = None
        """When that was; written by its holder alone."""
        self.counted: float | None = None
        """The last hold that counts as a checkout."""
        self.entered: float | None = None
        """The last hold whose end was entered."""


Note = tuple["Seat | None", Any, Hashable, float]
"""What a listener saw: a seat that came back, since when it was held, by whom, and the time; or
None, what is to be called with the time, None, and the time."""


class Sightings:
    """What was seen of a pool.

    Listeners append to ``notes``, which takes no lock; the garbage collector may have called them,
    anywhere.  All else needs the lock of whoever owns this.
    """

    def __init__(self, now: float, journal: Journal, notes: list[Note]) -> None:
        self.books = Books(now)
        self.notes = notes
        self._journal = journal
        self._seats: dict[Seat, None] = {}
        self._attempts: dict[int, tuple[weakref.ref[Any], int]] = {}
        """Records that are about to connect, or failed to, by their identity; and who does it."""

    def seats(self) -> Iterator[tuple[Any, Seat]]:
        """Yield the records that are alive, each with its seat."""
        for seat in self._seats:
            record = seat.record()
            if record is not None:
                yield record, seat

    # -- entering notes ----------------------------------------------------------------------

    def enter(self) -> None:
        """Enter what was noted so far."""
        notes = self.notes
        news = notes[:]
        del notes[: len(news)]
        books = self.books
        rows, record_use = books.rows, books.use_time.record
        last_holder: Hashable = _NOBODY
        if len(self._seats) > books.peak_checked_out:
            self._find_peak(news)
        for seat, since, holder, now in news:
            if seat is None:
                since(now)
            elif since is not seat.entered:  # otherwise it comes back without having been taken
                seat.entered = since
                seat.idle_since = now
                seconds = now - since
                record_use(seconds)
                if holder is not last_holder:
                    row = rows[holder]
                    last_holder = holder
                row.use_seconds += seconds
                if since is not seat.counted:
                    row.checkouts += 1
                    seat.uses += 1
        books.use_time.sort()

    def _find_peak(self, news: list[Note]) -> None:
        """Find out how many were held at a time; never asked for once all were."""
        changes = [
            change
            for seat, since, _, now in news
            if seat is not None and since is not seat.entered
            for change in ((since, 1), (now, -1))
        ]
        changes += [(seat.since, 1) for seat in self._seats if _is_held(seat)]
        held = peak = 0
        for _, change in sorted(changes):
            held += change
            peak = max(peak, held)
        self.books.peak_checked_out = max(self.books.peak_checked_out, peak)

    def _count_holds(self) -> None:
        """Count the holds in progress as checkouts."""
        for seat in self._seats:
            if _is_held(seat) and seat.counted is not seat.since:
                self.books.rows[seat.holder].checkouts += 1
                seat.counted = seat.since
                seat.uses += 1

    def adopted(self, seat: Seat, connection: int, age: float, now: float) -> None:
        """Note a connection that was open before anybody looked; it counts as a connect."""
        if not seat.is_open and connection:
            self.books.connects += 1
            self._fill(seat, connection, now - age)
            seat.idle_since = now
            seat.was_adopted = True
        self._seats[seat] = None

    def opened(self, seat: Seat, connection: int, seconds: float, now: float) -> None:
        """Note a new connection."""
        self._attempts.pop(seat.key, None)
        if seat.is_open and seat.reason is None:
            # its holder has detached it, and somebody else was faster than the news of that
            self.detached(seat, seat.connection, None, 0.0, now, is_leak=False)
        elif seat.is_open:
            self._gone(seat, seat.reason or "closed", now)
        self.books.connects += 1
        self.books.connect_time.record(seconds)
        self._fill(seat, connection, now)
        self._seats[seat] = None
        self._journal.write(ConnectionOpened, now, seconds)

    def _fill(self, seat: Seat, connection: int, opened_at: float) -> None:
        seat.connection = connection
        seat.is_open = True
        seat.reason = None
        seat.opened_at = seat.idle_since = opened_at
        seat.uses = 0

    def closing(self, seat: Seat, reason: CloseReason, now: float) -> None:
        """Note that a connection is about to be closed."""
        seat.reason = reason
        seat.closing_at = now

    def detached(
        self,
        seat: Seat,
        connection: int,
        holder: Hashable,
        held_seconds: float,
        now: float,
        *,
        is_leak: bool,
    ) -> None:
        """Note that a holder keeps its connection, or that it was dropped and cannot come back."""
        if not seat.is_open or seat.connection != connection:
            return
        if is_leak:
            self._journal.write_of(ConnectionLeaked, now, holder, held_seconds)
            self._gone(seat, "leaked", now)
        else:
            self.books.detached += 1
            seat.is_open = False
            self._journal.write_of(ConnectionLost, now, holder, True)

    def _gone(self, seat: Seat, reason: CloseReason, now: float) -> None:
        seat.is_open = False
        self.books.count_close(reason)
        self.books.invalidations += reason == "invalidated"
        self.books.reset_failures += reason == "reset"
        self._journal.write(ConnectionClosed, now, reason, now - seat.opened_at, seat.uses)

    # -- attempts to connect -----------------------------------------------------------------

    def attempted(self, key: int, record: weakref.ref[Any], caller: int, now: float) -> None:
        """Note that a record is about to connect."""
        self.attempt_failed(key, now)  # the one before
        self.caller_failed(caller, now)
        self._attempts[key] = record, caller

    def attempt_failed(self, key: int, now: float) -> None:
        """Note that a record did not get a connection, if it wanted one."""
        if self._attempts.pop(key, None) is not None:
            self.books.connect_failures += 1
            self._journal.write(ConnectFailed, now, self._journal.last_connect_error)

    def caller_failed(self, caller: int, now: float) -> None:
        """Note that whatever this caller connected has failed, for it does something else now."""
        for key in [key for key, (_, who) in self._attempts.items() if who == caller]:
            self.attempt_failed(key, now)

    def ping_failed(self, now: float) -> None:  # noqa: ARG002 - all entries take the time
        """Note a pre-ping that found its connection dead."""
        self.books.ping_failures += 1

    # -- looking -----------------------------------------------------------------------------

    def review(self, now: float) -> None:
        """Find out which connections are gone, and which attempts have failed."""
        # what closes a connection is noted before it is closed, so look first
        gone = [seat for seat in self._seats if not _is_there(seat)]
        dead = [key for key, (record, _) in self._attempts.items() if record() is None]
        self.enter()
        for key in dead:
            self.attempt_failed(key, now)
        for seat in gone:
            is_dead = seat.record() is None
            if seat.is_open and not _is_there(seat):
                if seat.reason is not None:
                    self._gone(seat, seat.reason, now)
                elif is_dead and not seat.uses and not seat.was_adopted:
                    self._gone(seat, "setup", now)  # a listener of its connect has raised
                elif is_dead:
                    self._forget(seat, now)
            if is_dead:
                self.notes.append((seat, seat.since, seat.holder, now))
                del self._seats[seat]
        self.enter()

    def _forget(self, seat: Seat, now: float) -> None:
        """Count a connection that was dropped with its pool, ``dispose(close=False)``."""
        seat.is_open = False
        self.books.forgotten += 1
        self._journal.write_of(ConnectionLost, now, seat.holder, False)

    def read(
        self,
        now: float,
        describe: Describe,
        *,
        has_callers: bool,
        has_queue: bool,
        has_rows: bool = True,
    ) -> dict[str, Any]:
        """Return the fields of a snapshot; what only a queue could tell is None if there is one.

        :param has_rows: as in ``read_rows``.
        """
        self.review(now)
        self._count_holds()
        self.books.sort_records()
        slots: list[SlotReading] = []
        parts: list[tuple[Hashable, float, float, float]] = []
        leaving = 0  # being detached at this moment
        for seat in self._seats:
            held = now - seat.since if _is_held(seat) and seat.since is not None else None
            if held is not None:
                parts.append((seat.holder, held, 0.0, 0.0))
            if seat.is_open and not _is_there(seat):
                leaving += 1
            elif seat.is_open:
                slots.append(_read_slot(seat, now, held, describe))
        states = [slot.state for slot in slots]
        values = read_books(self.books, now)
        return {
            **values,
            "peak_checked_out": max(values["peak_checked_out"], states.count("checked_out")),
            **self._read_rows(
                parts, describe, has_callers=has_callers, has_queue=has_queue, has_rows=has_rows
            ),
            "phase": "open",
            "is_down": None,
            "open": len(states) - states.count("closing"),
            **{state: states.count(state) for state in ("idle", "checked_out", "checking")},
            "closing": states.count("closing"),
            "forgotten": self.books.forgotten + leaving,
            "waiting": 0,
            "oldest_wait_seconds": 0.0,
            "waiting_seconds": 0.0,
            "observer_errors": self._journal.errors,
            "slots": tuple(slots),
            **dict.fromkeys(_UNKNOWN),
            **(dict.fromkeys(_UNKNOWN_OF_QUEUES) if has_queue else {}),
        }

    def _read_rows(
        self,
        parts: Any,
        describe: Describe,
        *,
        has_callers: bool,
        has_queue: bool,
        has_rows: bool,
    ) -> dict[str, Any]:
        tables = read_rows(self.books, parts, describe, has_callers=has_callers, has_rows=has_rows)
        if has_queue:
            for name, rows in tables.items():
                if rows is not None:
                    tables[name] = {key: row.without_waits() for key, row in rows.items()}
        return tables


def _is_there(seat: Seat) -> bool:
    record = seat.record()
    if record is None:
        return False
    connection = record.dbapi_connection
    return connection is not None and id(connection) == seat.connection


def _is_held(seat: Seat) -> bool:
    """Tell whether somebody was seen to take it and is not back."""
    record = seat.record()
    return record is not None and record.in_use and seat.since is not seat.entered


def _state(seat: Seat, held_since: float | None) -> str:
    if seat.reason is not None and (held_since is None or held_since < seat.closing_at):
        return "closing"
    record = seat.record()
    if record is None or not record.in_use:
        return "idle"
    # pinged, or before a listener, as long as its checkout was not seen
    is_taken = held_since is not None or (seat.was_out and seat.since is None)
    return "checked_out" if is_taken else "checking"


def _read_slot(seat: Seat, now: float, held: float | None, describe: Describe) -> SlotReading:
    state = _state(seat, None if held is None else seat.since)
    label, caller = describe(seat.holder) if held is not None else (None, None)
    return SlotReading(
        state=state,
        age_seconds=now - seat.opened_at,
        idle_seconds=now - seat.idle_since if state == "idle" else None,
        uses=seat.uses,
        label=label,
        caller=caller,
        held_seconds=held if state == "checked_out" else None,
    )
