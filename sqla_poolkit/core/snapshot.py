"""One consistent reading of a pool, frozen; what lies between two readings; many as one."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .books import Books
from .histogram import Histogram
from .machine import Machine
from .slots import Slot

__all__ = ["HolderTotals", "PoolInterval", "PoolSnapshot", "SlotReading", "read_machine"]

UNLABELLED = "(unlabelled)"
UNKNOWN_CALLER = "(unknown)"

_GAUGES = (
    "open",
    "idle",
    "checked_out",
    "checking",
    "connecting",
    "closing",
    "requesting",
    "waiting",
)
_COUNTERS = (
    "requests",
    "checkouts",
    "waits",
    "timeouts",
    "rejected",
    "cancelled",
    "failed",
    "unavailable",
    "checkins",
    "connects",
    "connect_failures",
    "pings",
    "probes",
    "ping_failures",
    "reset_failures",
    "invalidations",
    "detached",
    "forgotten",
    "observer_errors",
)
_COUNTERS_OF_BOOKS = tuple(name for name in _COUNTERS if name != "observer_errors")
_HISTOGRAMS = ("checkout_time", "wait_time", "connect_time", "use_time", "failed_wait_time")


@dataclass(frozen=True, slots=True)
class HolderTotals:
    """What one label or caller did, holds and waits in progress included.

    ``wait_caused_seconds`` is its part of everybody's waiting: at each instant the waiting is
    split equally over the slots that are not idle, and a holder answers for its slots.  ``None``
    means that this kind of pool cannot know.
    """

    checkouts: int = 0
    use_seconds: float = 0.0
    wait_seconds: float | None = 0.0
    wait_caused_seconds: float | None = 0.0

    def __add__(self, other: HolderTotals) -> HolderTotals:
        """Return both together."""
        return self._with(operator.add, other)

    def __sub__(self, earlier: HolderTotals) -> HolderTotals:
        """Return what was added since ``earlier``."""
        return self._with(operator.sub, earlier)

    def _with(self, combine: Callable[[Any, Any], Any], other: HolderTotals) -> HolderTotals:
        names = [field.name for field in fields(self)]
        return HolderTotals(
            *(_maybe(combine, getattr(self, name), getattr(other, name)) for name in names)
        )

    def without_waits(self) -> HolderTotals:
        """Return the same where waits are not known."""
        return replace(self, wait_seconds=None, wait_caused_seconds=None)


@dataclass(frozen=True, slots=True)
class SlotReading:
    """One slot at the moment of the snapshot; times in seconds, None where they do not apply."""

    state: str
    age_seconds: float | None
    """Since its connection was opened, or since the attempt began."""
    idle_seconds: float | None
    uses: int
    label: str | None
    caller: str | None
    held_seconds: float | None


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """One consistent reading of a pool.

    Taken under the pool's lock, so it always adds up: ``open = idle + checked_out + checking``,
    ``open + connecting + closing <= max_size`` (where the pool is ours), ``connects - sum(closes) -
    detached - forgotten = open + closing`` and ``requests = checkouts + timeouts + rejected +
    cancelled + failed + unavailable + requesting``.  ``None`` means that this kind of pool cannot
    know.

    ``later - earlier`` is a :class:`PoolInterval`; :meth:`merge` puts several processes together.
    """

    name: str
    pool_class: str
    pid: int | None
    taken_at: float
    """Wall clock, seconds since the epoch."""
    uptime_seconds: float
    settings: Mapping[str, Any]

    phase: str
    """``open``, ``paused`` (nothing is handed out) or ``closed`` (for good)."""
    is_down: bool | None
    """Whether the pool knows that the database is down."""
    open: int
    """Connections open: idle, checked out or being checked."""
    idle: int
    checked_out: int
    checking: int
    """Being seen to be alive before they are handed out."""
    connecting: int | None
    closing: int
    requesting: int | None
    """Callers that asked and are neither served nor turned away yet; ``waiting`` are among them."""
    waiting: int | None
    oldest_wait_seconds: float | None
    """How long the first in the queue has waited; 0 when nobody waits."""
    waiting_seconds: float | None
    """All waits in progress, added up."""
    min_size: int | None
    max_size: int | None
    """The limit; None if there is none."""
    is_unlimited: bool
    peak_checked_out: int | None
    peak_waiting: int | None

    requests: int | None
    checkouts: int
    """Requests that were served."""
    waits: int | None
    """Requests that had to queue, whatever became of them."""
    timeouts: int | None
    rejected: int
    """Turned away because ``max_waiting`` callers waited already."""
    cancelled: int | None
    failed: int | None
    """Requests that ended in the driver's or a listener's error, or in a closed pool."""
    unavailable: int
    checkins: int
    connects: int
    connect_failures: int | None
    pings: int | None
    probes: int | None
    ping_failures: int | None
    reset_failures: int | None
    invalidations: int
    detached: int
    forgotten: int
    """Connections let go without closing: after a fork, or with their event loop."""
    closes: Mapping[str, int]
    """How many connections were closed, by reason."""
    observer_errors: int

    checkout_time: Histogram | None
    """From asking to having, of requests that were served."""
    wait_time: Histogram | None
    """In the queue, of requests that were served."""
    connect_time: Histogram
    use_time: Histogram
    """From checkout to checkin."""
    failed_wait_time: Histogram | None
    """In the queue, of requests that were not served."""

    slots: tuple[SlotReading, ...]
    labels: Mapping[str, HolderTotals]
    """Totals per ``held_by`` label; ``(unlabelled)`` for the rest, ``(connecting)``,
    ``(checking)``, ``(closing)`` and ``(pool)`` for the waiting that no holder caused."""
    callers: Mapping[str, HolderTotals] | None
    """The same per place in the program; None if ``track="label"``."""

    def __sub__(self, earlier: PoolSnapshot) -> PoolInterval:
        """Return what happened between ``earlier`` and this snapshot of the same pool."""
        return PoolInterval(
            name=self.name,
            started_at=earlier.taken_at,
            seconds=self.uptime_seconds - earlier.uptime_seconds,
            closes=_less(self.closes, earlier.closes),
            labels=_rows_less(self.labels, earlier.labels),
            callers=_maybe(_rows_less, self.callers, earlier.callers),
            **{n: _maybe(_minus, getattr(self, n), getattr(earlier, n)) for n in _COUNTERS},
            **{n: _maybe(_minus, getattr(self, n), getattr(earlier, n)) for n in _HISTOGRAMS},
        )

    @classmethod
    def merge(cls, snapshots: Iterable[PoolSnapshot], name: str | None = None) -> PoolSnapshot:
        """Return the snapshots of several pools or processes as one.

        Counts, durations and rows are added up; the oldest wait is the oldest of all; what only
        one process can know (pid, peaks) is None, settings are those on which all agree.

        :raises ValueError: without any snapshot.
        """
        each = list(snapshots)
        if not each:
            raise ValueError("there is nothing to merge: give at least one snapshot")
        first = each[0]
        limits = [snapshot.max_size for snapshot in each]
        names = {snapshot.name for snapshot in each}
        classes = {snapshot.pool_class for snapshot in each}
        return cls(
            name=name or (first.name if len(names) == 1 else ", ".join(sorted(names))),
            pool_class=first.pool_class if len(classes) == 1 else ", ".join(sorted(classes)),
            pid=None,
            taken_at=max(snapshot.taken_at for snapshot in each),
            uptime_seconds=max(snapshot.uptime_seconds for snapshot in each),
            phase=first.phase if len({s.phase for s in each}) == 1 else "mixed",
            settings={
                key: value
                for key, value in first.settings.items()
                if all(key in s.settings and s.settings[key] == value for s in each)
            },
            oldest_wait_seconds=_total(max, [s.oldest_wait_seconds for s in each]),
            waiting_seconds=_total(sum, [s.waiting_seconds for s in each]),
            min_size=_total(sum, [s.min_size for s in each]),
            max_size=_total(sum, limits),
            is_unlimited=any(s.is_unlimited for s in each),
            is_down=_total(any, [s.is_down for s in each]),
            peak_checked_out=None,
            peak_waiting=None,
            closes=_merge_maps([s.closes for s in each]),
            slots=tuple(reading for s in each for reading in s.slots),
            labels=_merge_maps([s.labels for s in each]),
            callers=_total(_merge_maps, [s.callers for s in each]),
            **{n: _total(sum, [getattr(s, n) for s in each]) for n in (*_GAUGES, *_COUNTERS)},
            **{n: _total(_sum_histograms, [getattr(s, n) for s in each]) for n in _HISTOGRAMS},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the snapshot JSON-ready; ``version`` changes when a name goes or changes."""
        return {"version": 1, **_plain(self)}


@dataclass(frozen=True, slots=True)
class PoolInterval:
    """What happened in a pool between two snapshots."""

    name: str
    started_at: float
    """Wall clock, seconds since the epoch."""
    seconds: float
    requests: int | None
    checkouts: int
    waits: int | None
    timeouts: int | None
    rejected: int
    cancelled: int | None
    failed: int | None
    unavailable: int
    checkins: int
    connects: int
    connect_failures: int | None
    pings: int | None
    probes: int | None
    ping_failures: int | None
    reset_failures: int | None
    invalidations: int
    detached: int
    forgotten: int
    closes: Mapping[str, int]
    observer_errors: int
    checkout_time: Histogram | None
    wait_time: Histogram | None
    connect_time: Histogram
    use_time: Histogram
    failed_wait_time: Histogram | None
    labels: Mapping[str, HolderTotals]
    callers: Mapping[str, HolderTotals] | None

    def per_second(self, counter: str) -> float | None:
        """Return the rate of a counter, for example ``per_second("checkouts")``.

        None for what the pool cannot know.

        :raises ValueError: if ``counter`` is none of the interval's counters.
        """
        if counter not in _COUNTERS:
            raise ValueError(f"{counter!r} is not a counter; there are: {', '.join(_COUNTERS)}")
        value: float | None = getattr(self, counter)
        if value is None:
            return None
        return value / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the interval JSON-ready."""
        return {"version": 1, **_plain(self)}


# -- reading a state machine -----------------------------------------------------------------


Describe = Callable[[Hashable], tuple[str | None, str | None]]
"""Turns a holder as the driver remembers it into its label and its place in the program."""


def read_books(books: Books, now: float) -> dict[str, Any]:
    """Return the fields of a snapshot that come from the books alone."""
    values: dict[str, Any] = {
        name: getattr(books, name)
        for name in (*_COUNTERS_OF_BOOKS, "peak_checked_out", "peak_waiting", "requesting")
    }
    values.update({name: getattr(books, name).freeze() for name in _HISTOGRAMS})
    values["uptime_seconds"] = now - books.started_at
    values["closes"] = dict(books.closes)
    return values


Part = tuple[Hashable, float, float, float]
"""A hold or wait in progress: its holder; seconds of use, of wait, and of wait caused so far."""


def read_rows(
    books: Books,
    parts: Iterable[Part],
    describe: Describe,
    *,
    has_callers: bool,
    has_rows: bool = True,
) -> dict[str, Any]:
    """Return ``labels`` and ``callers``: the holders' rows, and ``parts`` still in progress.

    :param has_rows: False leaves them out, of which there may be thousands.
    """
    if not has_rows:
        return {"labels": {}, "callers": None}
    causes = {
        "(connecting)": books.caused_by_connecting,
        "(checking)": books.caused_by_checking,
        "(closing)": books.caused_by_closing,
        "(pool)": books.caused_by_pool,
    }
    # plain numbers as long as anything is added: the lock is held, and thousands may wait
    sums = {
        holder: [row.checkouts, row.use_seconds, row.wait_seconds, row.wait_caused_seconds]
        for holder, row in books.rows.items()
    }
    for holder, used, waited, caused in parts:
        row = sums.get(holder)
        if row is None:
            row = sums[holder] = [0, 0.0, 0.0, 0.0]
        row[1] += used
        row[2] += waited
        row[3] += caused
    labels = {
        name: HolderTotals(wait_caused_seconds=seconds)
        for name, seconds in causes.items()
        if seconds
    }
    callers = dict(labels)
    for holder, row in sums.items():
        label, caller = describe(holder)
        totals = HolderTotals(int(row[0]), row[1], row[2], row[3])
        _add_to(labels, label or UNLABELLED, totals)
        _add_to(callers, caller or UNKNOWN_CALLER, totals)
    return {"labels": labels, "callers": callers if has_callers else None}


def _add_to(rows: dict[str, HolderTotals], name: str, totals: HolderTotals) -> None:
    before = rows.get(name)
    rows[name] = totals if before is None else before + totals


"""What a reading has in place of the holders' rows when it does without them."""


def read_machine(
    machine: Machine, now: float, describe: Describe, *, has_callers: bool, has_rows: bool = True
) -> dict[str, Any]:
    """Return the fields of a snapshot that the state machine knows; to be called under its lock.

    :param has_rows: False leaves out the rows of the holders, of which there may be thousands.
    """
    books = machine.books
    if machine.waiting:
        machine.advance(now)
    machine.note_peak()
    waits = [
        (request.holder, now - request.queued_at + request.waited) for request in machine.queue
    ]
    waits += [
        (slot.request.holder, slot.request.waited)
        for slot in machine.slots
        if slot.request is not None
    ]
    holds = [
        (slot.holder, now - slot.held_since, 0.0, books.caused - slot.mark)
        for slot in machine.slots
        if slot.state == "checked_out"
    ]
    queued = [(holder, 0.0, seconds, 0.0) for holder, seconds in waits]
    config = machine.config
    return {
        **read_books(books, now),
        **read_rows(books, holds + queued, describe, has_callers=has_callers, has_rows=has_rows),
        "observer_errors": machine.journal.errors,
        "settings": config.public(),
        "phase": machine.phase,
        "is_down": machine.is_down(now),
        "open": machine.open,
        "idle": machine.idle,
        "checked_out": machine.checked_out,
        "checking": machine.checking,
        "connecting": machine.connecting,
        "closing": machine.closing,
        "waiting": machine.waiting,
        "oldest_wait_seconds": max(
            (seconds for _, seconds in waits[: machine.waiting]), default=0.0
        ),
        "waiting_seconds": sum(seconds for _, seconds in waits),
        "min_size": config.min_size,
        "max_size": config.max_size,
        "is_unlimited": config.max_size is None,
        "slots": tuple(_read_slot(slot, now, describe) for slot in machine.slots),
    }


def _read_slot(slot: Slot, now: float, describe: Describe) -> SlotReading:
    state = slot.state
    has_holder = state in ("checked_out", "checking")
    label, caller = describe(slot.holder) if has_holder else (None, None)
    return SlotReading(
        state=state,
        age_seconds=now - (slot.started_at if state == "connecting" else slot.opened_at),
        idle_seconds=now - slot.idle_since if state == "idle" else None,
        uses=slot.uses_of_connection,
        label=label,
        caller=caller,
        held_seconds=now - slot.held_since if state == "checked_out" else None,
    )


# -- arithmetic where None means "not known" -------------------------------------------------


def _maybe(combine: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    return None if one is None or other is None else combine(one, other)


def _minus(later: Any, earlier: Any) -> Any:
    return later - earlier


def _total(combine: Callable[[list[Any]], Any], values: list[Any]) -> Any:
    return None if any(value is None for value in values) else combine(values)


def _sum_histograms(histograms: list[Histogram]) -> Histogram:
    total = Histogram()
    for histogram in histograms:
        total = total + histogram
    return total


def _merge_maps(maps: list[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for each in maps:
        for key, value in each.items():
            merged[key] = merged[key] + value if key in merged else value
    return merged


def _less(later: Mapping[str, int], earlier: Mapping[str, int]) -> dict[str, int]:
    return {key: value - earlier.get(key, 0) for key, value in later.items()}


_NOTHING = HolderTotals()


def _rows_less(
    later: Mapping[str, HolderTotals], earlier: Mapping[str, HolderTotals]
) -> dict[str, HolderTotals]:
    return {key: row - earlier.get(key, _NOTHING) for key, row in later.items()}


def _plain(value: Any) -> Any:
    """Return a value as JSON knows it."""
    if isinstance(value, Histogram):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)
