"""What the state machine moves about: slots, the requests that wait for them, and decisions."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from math import inf
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from .books import Row
    from .events import DeadlockFound
    from .lanes import Lane

__all__ = [
    "Check",
    "Close",
    "CloseReason",
    "ConnectFault",
    "Decision",
    "Locate",
    "Open",
    "Request",
    "ReturnReason",
    "SeekDeadlock",
    "Slot",
    "State",
    "Tell",
    "Wake",
    "slots_of",
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
Purpose = Literal["demand", "replacement", "fill", "trial"]
"""What an attempt is made for; a trial finds out whether the database is there again."""
ConnectFault = Literal["refused", "authentication", "congestion", "other"]
"""What a failed attempt says: nobody listens, who are you, too many are here, something else."""
Failure = Literal["timeout", "rejected", "cancelled", "failed", "unavailable", "deadlock", "closed"]


class Slot:
    """A place in the pool, with or without an open connection."""

    __slots__ = (
        "age_reason",
        "ages_at",
        "asked_at",
        "checked_at",
        "checking_since",
        "expires_at",
        "generation",
        "granted_to",
        "held_since",
        "holder",
        "idle_since",
        "is_detached",
        "is_dropped",
        "is_own_connect",
        "is_replaced",
        "is_reported",
        "is_requested",
        "is_suspect",
        "is_timed_out",
        "lane",
        "mark",
        "needs_ping",
        "next_stop",
        "opened_at",
        "overdue",
        "owner",
        "purpose",
        "reason",
        "replaces",
        "request",
        "resource",
        "returned_at",
        "review_at",
        "row",
        "sought_at_use",
        "spread",
        "started_at",
        "state",
        "used_before",
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
        self.is_timed_out = False
        """The attempt was ended because it took too long."""
        self.started_at = now
        self.opened_at = now
        self.idle_since = now
        self.checked_at = now
        """When the server last answered a ping, or the connection was opened."""
        self.checking_since = now
        self.generation = 0
        """How many events the server had seen when this connection was opened."""
        self.is_suspect = False
        """Another connection of its generation was found dead: ping it before it is used."""
        self.uses = 0
        """How often it was handed out."""
        self.used_before = 0
        """How often of these with a connection that was replaced in its holder's hands."""
        self.next_stop = 0
        """At this number of uses something is due."""
        self.ages_at = inf
        """From here on a replacement is looked for."""
        self.age_reason: CloseReason = "age"
        """Why it goes when it reaches its age."""
        self.spread = 0.0
        """A number between 0 and 1 of its own, so that not all are due at once."""
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
        self.is_dropped = False
        """The garbage collector gives it back, because its holder did not."""
        self.is_reported = False
        """It was told that the holder keeps it for long."""
        self.sought_at_use = -1
        """At which use it was last looked where the holder is."""
        self.owner: tuple[int, Hashable] = (0, None)
        """At which use which thread or task took it; noted only with ``on_deadlock="raise"``."""
        self.mark = 0.0
        self.holder: Hashable = _NOBODY
        self.row: Row

    @property
    def is_pinged_for_nobody(self) -> bool:
        """It is pinged in the background, to keep it alive."""
        return self.state == CHECKING and self.request is None

    @property
    def uses_of_connection(self) -> int:
        """How often its present connection was handed out."""
        return self.uses - self.used_before

    def __repr__(self) -> str:
        return f"<Slot {self.state}, {self.uses} uses>"


class Request:
    """A caller that waits; the driver parks it on ``parker`` until it is granted or has failed."""

    state: Final = "waiting"  # so that a driver can tell it from a slot by one attribute

    __slots__ = (
        "asked_at",
        "deadline",
        "deadlock",
        "error",
        "failure",
        "has_queued",
        "holder",
        "is_awake",
        "is_held_back",
        "lane",
        "owner",
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
        self.owner: Hashable = None
        """The thread or task that waits."""
        self.deadlock: DeadlockFound | None = None
        """Its caller holds a connection himself, as do all others."""
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


class Check:
    """Decision: ping this slot's connection in the background, then say ``Machine.kept``."""

    __slots__ = ("slot",)

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class Wake:
    """Decision: this request was granted a slot, or has failed; wake its caller."""

    __slots__ = ("request",)

    def __init__(self, request: Request) -> None:
        self.request = request


class Tell:
    """Decision: have the readers of the journal look into it."""

    __slots__ = ()


class Locate:
    """Decision: find out where those are who hold connections for long, then say ``long_held``."""

    __slots__ = ("slots",)

    def __init__(self, slots: list[Slot]) -> None:
        self.slots = slots


class SeekDeadlock:
    """Decision: find out whether all holders wait for another connection; then ``entangled``."""

    __slots__ = ()


Decision = Open | Close | Check | Wake | Tell | Locate | SeekDeadlock


def slots_of(decisions: Iterable[Decision]) -> set[Slot]:
    """Return the slots that something has to be done for."""
    return {d.slot for d in decisions if isinstance(d, (Open, Close, Check))}
