"""Tell in what state a pool is, for probes: from its counters alone, without a connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..core.snapshot import PoolSnapshot, SlotReading
from ..pool.reading import glance

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import Pool

__all__ = ["STATUSES", "Health", "Status", "health", "judge"]

Status = Literal["ok", "busy", "stuck", "down"]

STATUSES: tuple[Status, ...] = ("ok", "busy", "stuck", "down")

STUCK_AFTER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Health:
    """In what state a pool is, and why."""

    pool: str
    status: Status
    """``ok``; ``busy``: callers wait, or would have to; ``stuck``: they wait, and no connection
    has come back for a while; ``down``: nothing is handed out, as the database is known to be down
    or the pool was closed."""
    reasons: tuple[str, ...]
    """Sentences, at least one."""

    @property
    def is_live(self) -> bool:
        """Whether to leave the process alone: only a stuck pool is helped by a new process."""
        return self.status != "stuck"

    @property
    def is_ready(self) -> bool:
        """Whether to send requests here; a pool that is only busy serves them, in their turn."""
        return self.status in ("ok", "busy")

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {
            "pool": self.pool,
            "status": self.status,
            "is_live": self.is_live,
            "is_ready": self.is_ready,
            "reasons": list(self.reasons),
        }


def health(
    engine: Engine | AsyncEngine | Pool, *, stuck_after: float = STUCK_AFTER_SECONDS
) -> Health:
    """Return in what state the pool of an engine is, for a liveness or readiness probe.

    It reads counters and takes no connection, so it neither waits behind the callers nor makes
    them wait.

    :param engine: an ``Engine``, an ``AsyncEngine``, or a pool itself.
    :param stuck_after: a pool is stuck when callers wait and each of its connections has been held
        for so many seconds, the shortest hold too, so nothing has come back since.  Give more
        than your slowest use takes.
    :raises sqlalchemy.exc.ArgumentError: if the pool keeps no books.
    """
    return judge(glance(engine), stuck_after)


def judge(reading: PoolSnapshot, stuck_after: float = STUCK_AFTER_SECONDS) -> Health:
    """Return in what state a pool was when its snapshot was taken."""
    status, reason = _status(reading, stuck_after)
    return Health(reading.name, status, (reason, *_particulars(reading, status)))


def _status(reading: PoolSnapshot, stuck_after: float) -> tuple[Status, str]:
    if reading.phase == "closed":
        return "down", "The pool was closed; it hands out nothing any more."
    if reading.is_down:
        return "down", "The last attempts to connect failed, so the database counts as down."
    youngest = _youngest_hold(reading)
    if youngest is not None and youngest > stuck_after and reading.waiting:
        return "stuck", f"{_use(reading)[:-1]}, and none has come back for {youngest:.0f} s."
    if reading.phase == "paused":
        return "busy", "The pool is paused; callers wait until it is resumed."
    return ("busy" if reading.waiting or _is_full(reading) else "ok"), _use(reading)


def _use(reading: PoolSnapshot) -> str:
    limit = "" if reading.max_size is None else f" of {reading.max_size}"
    plural = "" if reading.checked_out == 1 and not limit else "s"
    return f"{reading.checked_out}{limit} connection{plural} in use."


def _particulars(reading: PoolSnapshot, status: Status) -> list[str]:
    """Return what else somebody would ask who hears that the pool is not ok."""
    particulars = []
    if reading.waiting:
        who = "1 caller waits" if reading.waiting == 1 else f"{reading.waiting} callers wait"
        particulars.append(f"{who}, the first for {reading.oldest_wait_seconds or 0.0:.2f} s.")
    if status == "stuck":
        longest = max(reading.slots, key=lambda slot: slot.held_seconds or 0.0)
        seconds = longest.held_seconds or 0.0
        particulars.append(f"Held longest: {_holder(longest)}, for {seconds:.0f} s.")
    return particulars


def _holder(slot: SlotReading) -> str:
    place = slot.caller and slot.caller.partition("\n")[0]
    known = [part for part in (slot.label, place) if part]
    return " at ".join(known) or "an unknown caller"


def _is_full(reading: PoolSnapshot) -> bool:
    taken = reading.open - reading.idle + (reading.connecting or 0) + reading.closing
    return reading.max_size is not None and taken >= reading.max_size


def _youngest_hold(reading: PoolSnapshot) -> float | None:
    """Return how long the youngest hold has lasted if every connection that may be is held."""
    if reading.max_size is None or reading.checked_out < reading.max_size:
        return None
    holds = [slot.held_seconds for slot in reading.slots if slot.held_seconds is not None]
    return min(holds, default=None)
