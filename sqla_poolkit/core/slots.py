"""What the state machine moves about: slots, the requests that wait for them, and decisions."""

from __future__ import annotations

from collections.abc import Hashable
from math import inf
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from .books import Row
    from .lanes import Lane

__all__ = [
    "Close",
    "CloseReason",
    "Decision",
    "Open",
    "Request",
    "ReturnReason",
    "Slot",
    "State",
    "Wake",
]

State = Literal["idle", "checked_out", "connecting", "checking", "closing", "gone"]
IDLE: Final = "idle"
CHECKED_OUT: Final = "checked_out"
CONNECTING: Final = "connecting"
CHECKING: Final = "checking"
CLOSING: Final = "closing"
GONE: Final = "gone"

CloseReason = Literal[
    "age",
    "idle",
    "uses",
    "overflow",
    "probe",
    "ping",
    "invalidated",
    "reset",
    "generation",
    "retired",
    "resize",
    "disposed",
    "closed",
    "leaked",
    "setup",
    "loop",
]

_NOBODY: Final = object()

ReturnReason = CloseReason | Literal["detached", "lost", "forgotten"]
Purpose = Literal["demand", "replacement", "fill"]
Failure = Literal["timeout", "rejected", "cancelled", "failed", "unavailable", "closed"]


class Slot:
    """A place in the pool, with or without an open connection."""

    __slots__ = (
        "ages_at",
        "asked_at",
        "expires_at",
        "granted_to",
        "held_since",
        "holder",
        "idle_since",
        "is_detached",
        "is_own_connect",
        "is_replaced",
        "is_requested",
        "lane",
        "mark",
        "needs_ping",
        "next_stop",
        "opened_at",
        "overdue",
        "purpose",
        "reason",
        "replaces",
        "request",
        "resource",
        "returned_at",
        "review_at",
        "row",
        "started_at",
        "state",
        "uses",
    )

    def __init__(self, now: float, purpose: Purpose, lane: Lane) -> None:
        self.state: State = CONNECTING
        self.lane = lane
        self.resource: Any = None
        """What the driver keeps in this slot; the state machine never looks at it."""
        self.purpose: Purpose = purpose
        self.replaces: Slot | None = None
        self.is_replaced = False
        self.overdue = False
        """The attempt took longer than ``connect_timeout`` and gave up its turn."""
        self.started_at = now
        self.opened_at = now
        self.idle_since = now
        self.uses = 0
        self.next_stop = 0
        """At this number of uses something is due."""
        self.ages_at = inf
        """From here on a replacement is looked for."""
        self.expires_at = inf
        """From here on the connection is never handed out."""
        self.review_at = inf
        """A checkin at or after this moment asks whether the connection may stay."""
        self.reason: CloseReason | None = None
        """Why the connection has to go when it next can."""
        self.needs_ping = False
        self.is_own_connect = False
        self.request: Request | None = None
        """The request it was granted to, until that is served."""
        self.granted_to: Request | None = None
        """The last request it was granted to, whose caller may not have woken yet."""
        self.is_requested = False
        """Its holder's request is not settled yet, so it still counts as ``requesting``."""
        self.asked_at = now
        self.held_since = now
        self.returned_at = now
        """When the driver took it back; it may be dealt with a little later."""
        self.is_detached = False
        """The holder keeps the connection for itself."""
        self.mark = 0.0
        self.holder: Hashable = _NOBODY
        self.row: Row

    def __repr__(self) -> str:
        return f"<Slot {self.state}, {self.uses} uses>"


class Request:
    """A caller that waits; the driver parks it on ``parker`` until it is granted or has failed."""

    state: Final = "waiting"  # so that a driver can tell it from a slot by one attribute

    __slots__ = (
        "asked_at",
        "deadline",
        "error",
        "failure",
        "has_queued",
        "holder",
        "is_awake",
        "is_held_back",
        "lane",
        "parker",
        "queued_at",
        "slot",
        "ticket",
        "waited",
    )

    def __init__(
        self,
        ticket: int,
        asked_at: float,
        now: float,
        deadline: float | None,
        holder: Hashable,
        lane: Lane,
    ) -> None:
        self.ticket = ticket
        self.lane = lane
        self.asked_at = asked_at
        self.queued_at = now
        self.deadline = deadline
        self.holder = holder
        self.has_queued = False
        self.is_held_back = False
        """It counts as served only after ``confirm``."""
        self.is_awake = False
        """Its caller has seen what became of it."""
        self.waited = 0.0
        """Seconds in the queue so far, but for the present stay."""
        self.slot: Slot | None = None
        self.failure: Failure | None = None
        self.error: BaseException | None = None
        self.parker: Any = None

    def __repr__(self) -> str:
        state = "granted" if self.slot else self.failure or "waiting"
        return f"<Request {self.ticket} {state}>"


class Open:
    """Decision: start a connection attempt for this slot."""

    __slots__ = ("slot",)

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class Close:
    """Decision: close this slot's connection, then say so with ``Machine.closed``."""

    __slots__ = ("slot",)

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class Wake:
    """Decision: this request was granted a slot, or has failed; wake its caller."""

    __slots__ = ("request",)

    def __init__(self, request: Request) -> None:
        self.request = request


Decision = Open | Close | Wake
