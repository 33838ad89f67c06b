"""The pool as a pure state machine: who gets which slot, who waits, what to open and close.

Nothing here does I/O, holds a thread or reads a clock.  Each call takes the time, changes the
state and leaves what has to be done in ``decisions``; the driver calls under its lock, takes the
decisions, and carries them out after releasing it:

* ``Open(slot)``: connect, then ``connected`` or ``connect_failed`` (after asking ``starting``);
* ``Close(slot)``: close the connection, then ``closed``;
* ``Check(slot)``: ping an idle connection, then ``kept``;
* ``Wake(request)``: wake that caller, whose ``slot`` or ``failure`` is set;
* ``Tell()``: have the readers of the journal look into it;
* ``Locate(slots)``: find out where those are who hold them, then ``long_held`` for each;
* ``SeekDeadlock()``: find out who of those that wait holds what, then ``entangled``.

A slot is always in one of these states::

               _open                connected             checkout / grant
      (gone) --------> connecting ------------> idle -----------------------> checking
        ^                  |                     ^  | (or to be kept alive)    |    |
        |   connect_failed |       checkin       |  | checkout     checked ok  |    | not alive
        +------------------+   +-----------------+  v  <-----------------------+    |
        ^                      |             checked_out                            |
        |                      +----------------- | checkin of a stale one          |
        |   closed                                v                                 |
        +--------------------------------------closing <----------------------------+

Callers and connections belong to lanes: threads share one, each event loop of asyncio has its own.
While somebody waits nothing of his lane is idle (unless the pool is paused), and no slot stays free
without an attempt in flight (outside back-off).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from math import inf
from typing import Any, Literal, TypeVar

from ..config import PoolConfig
from .books import Books
from .events import (
    CheckoutCancelled,
    CheckoutFailed,
    CheckoutRejected,
    CheckoutTimedOut,
    CheckoutUnavailable,
    CheckoutWaited,
    ConnectFailed,
    ConnectionClosed,
    ConnectionLeaked,
    ConnectionLost,
    ConnectionOpened,
    DatabaseFound,
    DatabaseLost,
    DeadlockFound,
    GenerationRetired,
    HoldExceeded,
    HoldReturned,
    PoolEvent,
    PoolExhausted,
    PoolRecovered,
)
from .journal import LONG_WAIT_SECONDS, Journal
from .lanes import Lane
from .policies import Breaker, spread
from .slots import (
    CHECKED_OUT,
    CHECKING,
    CLOSING,
    CONNECTING,
    GONE,
    IDLE,
    Check,
    Close,
    CloseReason,
    ConnectFault,
    Decision,
    Failure,
    Locate,
    Open,
    Purpose,
    Request,
    ReturnReason,
    SeekDeadlock,
    Slot,
    Tell,
    Wake,
)

__all__ = ["Machine"]

Phase = Literal["open", "paused", "closed"]

_Event = TypeVar("_Event", bound=PoolEvent)

_REVIEW = -inf
_MANY = 1 << 62
_REPEAT_GROWTH = 0.01  # how often a queue that was thought short-lived is looked at again
_SORT_EACH = 512  # uses of one slot
_GRACE_SECONDS = 1.0  # so late a caller comes who is merely slow
_TELLING_SECONDS = 0.5  # a server that did not answer for so long is in trouble
_DEATHS_OF_AN_EVENT = 2
_EVENT_SECONDS = 1.0
_INTEREST_SECONDS = 30.0  # so long after the last caller asked a lost database is looked for
_TRIAL_SECONDS = 1.0
_HASTY_SECONDS = 10.0  # who waits no longer has the upkeep come earlier than it would
_MOST_HOLDS = 10  # are named of those that make a deadlock
_CALM_SECONDS = 1.0  # without anybody waiting, until an exhausted pool has recovered
_TELL = Tell()


class Machine:
    """All state of one pool, and the only code that changes it.

    :param config: the settings; ``resize`` replaces them.
    :param now: the present time, seconds of a monotonic clock, as in every other call.
    :param chance: returns random numbers between 0 and 1; spreads ages and back-off.
    :param new_parker: makes what a driver parks a waiting caller on.
    :param lanes: how many lanes there are from the beginning; ``add_lane`` adds others.
    :param journal: where what happens is written down.
    """

    # attributes in slots stay fast however many there are
    __slots__ = (
        "_asked_at",
        "_asked_lane",
        "_callers_connect",
        "_chance",
        "_deadlines_vary",
        "_deaths",
        "_entangled",
        "_exhausted_at",
        "_fewest_idle",
        "_first_seek",
        "_gradual_step",
        "_gradual_until",
        "_is_quick",
        "_last_use",
        "_limit",
        "_long_hold",
        "_lost_at",
        "_new_parker",
        "_offset",
        "_opened",
        "_seeks_after",
        "_still_at",
        "_still_since",
        "_tickets",
        "_vacating",
        "_waited_at",
        "_waits_before",
        "_waits_seen",
        "books",
        "breaker",
        "checking",
        "closing",
        "config",
        "connecting",
        "decisions",
        "generation",
        "is_closed",
        "is_hasty",
        "is_warm",
        "journal",
        "lanes",
        "overdue",
        "phase",
        "slots",
        "waiting",
    )

    def __init__(
        self,
        config: PoolConfig,
        now: float,
        chance: Callable[[], float],
        new_parker: Callable[[Lane], Any] = lambda _: None,
        lanes: int = 1,
        journal: Journal | None = None,
    ) -> None:
        self.books = Books(now)
        self.journal = journal or Journal()
        self.phase: Phase = "open"
        self.is_closed = False
        self.slots: dict[Slot, None] = {}
        """Every slot in use; their number is what ``max_size`` limits."""
        self.lanes: list[Lane] = []
        self.waiting = 0
        """How many callers wait."""
        self.decisions: list[Decision] = []
        self.connecting = 0
        self.checking = 0
        self.closing = 0
        self.overdue = 0
        """Attempts that gave up their turn but keep their place."""
        self.is_hasty = False
        """Who waits has the upkeep come in time for what is due while he does."""
        self.is_warm = False
        """Somebody asked for a connection, so ``min_size`` is kept from now on."""
        self._chance = chance
        self._new_parker = new_parker
        self._offset = chance()
        self._opened = 0
        self._tickets = 0
        self._deadlines_vary = False
        """Whoever asked later may have the earlier deadline: ``timeout`` was changed."""
        self._vacating = 0
        """Connections that are closed to make room in another lane."""
        self._fewest_idle = _MANY
        self.breaker = Breaker()
        self.generation = 0
        """How many server-wide events there were; connections opened before the last are stale."""
        self._deaths: list[float] = []
        """When connections of this generation were found dead, of late."""
        self._gradual_until = -inf
        self._gradual_step = inf
        """Until when connections are retired gradually, and how long after each other."""
        self._asked_at = now
        self._asked_lane: Lane | None = None
        """Where somebody last asked who did not get an idle connection at once."""
        self._exhausted_at: float | None = None
        """Since when somebody has had to wait because all connections are held."""
        self._waits_before = 0
        """How many had waited when that began."""
        self._waits_seen = 0
        self._waited_at = now
        """When somebody was last seen to wait."""
        self._still_at = 0
        self._still_since = now
        """How many had come back when last something did, and when that was."""
        self._first_seek = self._seeks_after = LONG_WAIT_SECONDS
        """When nothing has come back for so long, a deadlock is looked for."""
        self._entangled: set[Request] = set()
        """Who waits in a deadlock that was found and has not ended."""
        self._lost_at: float | None = None
        """Since when the database counts as down, until a connection is opened again."""
        self._adopt(config)
        for _ in range(lanes):
            self.add_lane()

    def _adopt(self, config: PoolConfig) -> None:
        self.config = config
        self._limit = inf if config.max_size is None else config.max_size
        self._last_use = config.max_uses or _MANY
        self._long_hold = config.hold_warning or inf
        patience = inf if not config.timeout else config.timeout
        self._first_seek = min(LONG_WAIT_SECONDS, patience / 2)
        self.is_hasty = config.collect_leaks or patience <= _HASTY_SECONDS
        self._callers_connect = config.upkeep == "inline" or config.timeout == 0
        for lane in self.lanes:
            lane.use_lifo(config.use_lifo)
        self._look_for_short_cut()

    def _look_for_short_cut(self) -> None:
        """See whether an idle connection may be handed out without further ado."""
        self._is_quick = self.phase == "open" and not self.config.pre_ping and len(self.lanes) <= 1

    def __repr__(self) -> str:
        return (
            f"<Machine {self.phase}: {self.idle} idle, {self.checked_out} checked out, "
            f"{self.connecting} connecting, {self.checking} checking, {self.closing} closing, "
            f"{self.waiting} waiting, limit {self._limit}>"
        )

    @property
    def is_pressed(self) -> bool:
        """Tell whether a return should be dealt with at once, not with the next checkout."""
        return self.waiting > 0 or self.is_closed

    @property
    def may_grow(self) -> bool:
        """Tell whether a connection may be opened, perhaps in another lane's place."""
        return len(self.slots) < self._limit or len(self.lanes) > 1

    @property
    def open(self) -> int:
        """How many connections are open: idle, checked out or being checked."""
        return len(self.slots) - self.connecting - self.closing

    @property
    def idle(self) -> int:
        """How many connections are open and not in use."""
        if len(self.lanes) == 1:
            return len(self.lanes[0].idle)
        return sum(len(lane.idle) for lane in self.lanes)

    @property
    def checked_out(self) -> int:
        """How many connections are held."""
        return self.open - self.idle - self.checking

    @property
    def queue(self) -> list[Request]:
        """Who waits, in the order in which they asked."""
        waiting = [request for lane in self.lanes for request in lane.queue]
        return sorted(waiting, key=lambda request: request.ticket)

    def _tell(self, kind: type[_Event], now: float, *details: Any) -> _Event:
        """Write an event down."""
        event = self.journal.write(kind, now, *details)
        if self.journal.has_news:
            self.decisions.append(_TELL)
        return event

    def _tell_of(self, kind: type[PoolEvent], now: float, holder: Hashable, *details: Any) -> None:
        """Write an event down that is of somebody."""
        self.journal.write_of(kind, now, holder, *details)
        if self.journal.has_news:
            self.decisions.append(_TELL)

    def take_decisions(self) -> list[Decision]:
        """Return what has to be done, once."""
        decisions, self.decisions = self.decisions, []
        return decisions

    # -- lanes -------------------------------------------------------------------------------

    def add_lane(self, key: Any = None) -> Lane:
        """Open another lane, for callers who cannot use the connections of the others.

        :param key: what the driver knows the lane by.
        """
        lane = Lane(key)
        lane.use_lifo(self.config.use_lifo)
        self.lanes.append(lane)
        self._look_for_short_cut()
        return lane

    def forget_lane(self, lane: Lane, now: float) -> None:
        """Give up a lane whose callers are gone for good and whose connections nobody can use."""
        if self.waiting:
            self.advance(now)
        self.note_peak()
        self.lanes.remove(lane)  # first, or it would grow while it is given up
        self._look_for_short_cut()
        for request in list(lane.queue):
            self._leave_queue(request, now)
            self._fail(request, now, "cancelled")
        for slot in [slot for slot in self.slots if slot.lane is lane]:
            self._forget(slot, now)
        self._grow(now)

    def put_to_sleep(self, lane: Lane, now: float) -> None:
        """Start nothing more in a lane that nobody drives at present, nor wait for it.

        The attempts under way there are given up, and so are the connections that are closing or
        pinged; the driver has cut those off.  The next checkout wakes the lane.
        """
        if self.waiting:
            self.advance(now)
        lane.is_asleep = True
        lane.owed = 0
        for slot in [slot for slot in self.slots if slot.lane is lane]:
            if slot.state == CONNECTING and not slot.is_own_connect:
                self._forget_attempt(slot)
            elif slot.state == CLOSING:
                self.closed(slot, now)
            elif slot.is_pinged_for_nobody:
                self._forget(slot, now)
        self._grow(now)

    def _forget(self, slot: Slot, now: float) -> None:
        """Free a place without closing its connection."""
        if self.waiting:
            self.advance(now)
        if slot.state == CHECKED_OUT:
            self.checkin(slot, now, "forgotten")
            return
        if slot.is_own_connect or slot.request is not None:
            self._fail_own(slot, now, "cancelled")
        if slot.state == CONNECTING:
            self._forget_attempt(slot)
            return
        self.books.forgotten += 1
        self._tell(ConnectionLost, now, None, None, False)
        self.note_peak()
        if slot.state == CHECKING:
            self.checking -= 1
        elif slot.state == CLOSING:
            self._close_ended(slot)
        else:
            slot.lane.idle.remove(slot)
        self._drop(slot)

    # -- asking ------------------------------------------------------------------------------

    def checkout(self, asked_at: float, now: float, holder: Hashable, lane: Lane) -> Slot | Request:
        """Ask for a connection.

        :param asked_at: when the caller began to ask; the deadline counts from here.
        :param holder: who asks, as the driver tells holders apart; a row of the books each.
        :param lane: whose connections the caller can use.
        :return: a slot that is ``checked_out`` (take it), ``checking`` (see whether it is alive,
            then call ``checked``) or ``connecting`` (connect it yourself, then ``connected``);
            or a request, to be parked until woken or until its deadline.  A request that can
            not be granted in time has its ``failure`` set already.
        """
        idle = lane.idle
        if idle and self._is_quick:
            slot = lane.take()
            if now < slot.expires_at:
                # what _serve does for who need not wait: this is the path whose cost counts
                books = self.books
                slot.state = CHECKED_OUT
                slot.held_since = now
                slot.mark = books.caused
                if holder is not slot.holder:
                    slot.holder = holder
                    slot.row = books.rows[holder]
                slot.row.checkouts += 1
                slot.uses += 1
                if slot.uses >= slot.next_stop:
                    self._stop_at_use(slot)
                books.checkout_time.record(now - asked_at)
                if len(idle) < self._fewest_idle:
                    self._fewest_idle = len(idle)
                return slot
            lane.put_back(slot)
        return self._checkout_slowly(asked_at, now, holder, lane)

    def _serve(self, slot: Slot, request: Request | None, holder: Hashable, now: float) -> None:
        """Make the caller the slot's holder, and count its request as served."""
        books = self.books
        row = books.rows[holder]
        slot.state = CHECKED_OUT
        slot.held_since = now
        slot.mark = books.caused
        slot.holder = holder
        slot.row = row
        slot.uses += 1
        if slot.uses >= slot.next_stop:
            self._stop_at_use(slot)
        row.checkouts += 1
        books.requesting -= 1
        books.checkout_time.record(now - slot.asked_at)
        if request is not None and request.has_queued:
            waited = request.waited
            books.wait_time.record(waited)
            row.wait_seconds += waited
            if waited >= self.journal.longest_untold_wait:
                self._tell_of(CheckoutWaited, now, holder, waited)
        lanes = self.lanes
        idle = len(lanes[0].idle) if len(lanes) == 1 else self.idle
        if idle < self._fewest_idle:
            self._fewest_idle = idle

    def _stop_at_use(self, slot: Slot) -> None:
        """Do what is due after some uses: sort the durations, or retire after the last one."""
        last_use = slot.used_before + self._last_use
        if slot.uses >= last_use:
            slot.review_at = _REVIEW
        self.books.sort_records()
        slot.next_stop = min(slot.uses + _SORT_EACH, max(last_use, slot.uses + 1))

    def note_peak(self) -> None:
        """Bring the peak of ``checked_out`` up to date.

        Who hands out only notes how few were idle; the peak follows from that as long as the
        other numbers stay the same, so this is called before they change.
        """
        most = self.open - self.checking - self._fewest_idle
        if most > self.books.peak_checked_out:
            self.books.peak_checked_out = most
        self._fewest_idle = _MANY

    def _check(self, slot: Slot, request: Request, now: float) -> Slot:
        """Reserve an idle connection for a caller who sees first whether it is alive."""
        slot.asked_at = request.asked_at
        if self._is_known_alive(slot, now):
            self._serve(slot, request, request.holder, now)
        else:
            slot.request = request
            slot.holder = request.holder
            self._begin_check(slot, now)
        return slot

    def _is_known_alive(self, slot: Slot, now: float) -> bool:
        """Tell whether there is no need to look: it was just opened, or nobody wants to know."""
        if not self.config.pre_ping:
            return True
        is_new = not slot.uses and not slot.is_suspect
        return is_new and now - slot.opened_at <= self.config.ping_after

    def _begin_check(self, slot: Slot, now: float) -> None:
        slot.state = CHECKING
        slot.checking_since = now
        quiet = now - max(slot.idle_since, slot.checked_at)
        slot.needs_ping = slot.is_suspect or quiet >= self.config.ping_after
        self.note_peak()
        self.checking += 1

    def _end_check(self) -> None:
        self.note_peak()
        self.checking -= 1

    def _checkout_slowly(
        self, asked_at: float, now: float, holder: Hashable, lane: Lane
    ) -> Slot | Request:
        """Find a slot that is no longer the first in line, or queue."""
        self.books.requesting += 1
        self.is_warm = True
        self._asked_at = now
        self._asked_lane = lane
        lane.is_asleep = False
        timeout = self.config.timeout
        deadline = None if timeout is None else asked_at + timeout
        self._tickets += 1
        request = Request(self._tickets, asked_at, now, deadline, holder, lane)
        if self.phase == "closed":
            self._fail(request, now, "closed")
            return request
        if self.phase == "open" and not lane.queue:
            slot = self._freshest_idle(lane, now)
            if slot is not None:
                return self._check(slot, request, now)
            if self._may_connect_itself(now):
                return self._connect_itself(request, now)
        if self._is_turned_away(now):
            self._fail(request, now, "unavailable")
        elif timeout == 0:
            self._fail(request, now, "timeout")
        elif self._is_overloaded():
            self._fail(request, now, "rejected")
        else:
            self._enqueue(request, now)
            if len(self.slots) < self._limit or len(self.lanes) > 1:
                self._grow(now)
        return request

    def _freshest_idle(self, lane: Lane, now: float) -> Slot | None:
        """Take the next idle connection that may still be handed out; the others are retired."""
        if self.waiting:
            self.advance(now)
        while lane.idle:
            slot = lane.take()
            if now < slot.expires_at:
                return slot
            self._retire(slot, now, slot.reason or slot.age_reason)
        return None

    def _may_connect_itself(self, now: float) -> bool:
        if not self._callers_connect or self.phase != "open" or len(self.slots) >= self._limit:
            return False
        if self.breaker.is_open:
            return now >= self.breaker.until and not self._in_turn
        return self.config.timeout == 0 or self._in_turn < self.config.max_connecting

    def _is_turned_away(self, now: float) -> bool:
        """Tell whether who asks now is turned away because the database is known to be down.

        Not if a trial is due that nobody makes yet: it is made for him, and he waits for its end.
        Where each job runs an event loop of its own there is nobody else to wait for it.
        """
        is_tried = self._in_turn or now < self.breaker.until or len(self.slots) >= self._limit
        return self._is_hopeless() and bool(is_tried or self.config.timeout == 0)

    def _is_overloaded(self) -> bool:
        """Tell whether as many wait as may for a connection that somebody has to give back.

        Those do not count for whom there are places where connections can be opened.
        """
        limit = self.config.max_waiting
        if limit is None:
            return False
        places = self._limit - self.open if self.phase == "open" else 0
        return self.waiting >= limit + max(0, places)

    def is_down(self, now: float) -> bool:
        """Tell whether the database is known to be down.

        Where only callers find out what has become of it, that is forgotten with the last caller.
        """
        is_stale = self.config.upkeep == "inline" and now - self._asked_at > _INTEREST_SECONDS
        return self.breaker.is_open and not is_stale

    def _is_hopeless(self) -> bool:
        """Tell whether callers do not wait for a database that is known to be down."""
        is_out = self.breaker.is_open and self.phase == "open"
        return is_out and self.config.on_outage == "raise"

    def _connect_itself(self, request: Request, now: float) -> Slot:
        """Give the caller a slot to connect in its own thread."""
        slot = self._new_slot(request.lane, now, "trial" if self.breaker.is_open else "demand")
        slot.is_own_connect = True
        slot.asked_at = request.asked_at
        slot.holder = request.holder
        return slot

    # -- waiting -----------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Charge the waiting since the last call to those who caused it.

        To be called before the queue or the state of a slot changes while somebody waits, and
        when somebody starts to.
        """
        books = self.books
        seconds = now - books.integrated_until
        if seconds:
            books.integrated_until = now
            if self.waiting:
                lanes = self.lanes
                busy = len(self.slots) - (len(lanes[0].idle) if len(lanes) == 1 else self.idle)
                if busy and not (self.connecting or self.checking or self.closing):
                    # what charge comes to when all are held
                    books.caused += seconds * self.waiting / busy
                else:
                    waited = seconds * self.waiting
                    books.charge(waited, busy, self.connecting, self.checking, self.closing)

    def _enqueue(self, request: Request, now: float) -> None:
        books = self.books
        lane = request.lane
        self.advance(now)
        if not lane.queue:
            lane.pace.queue_formed(now, books.use_time)
        if not self.waiting:
            self._begin_standstill(books.use_time.count, now)
        if not request.has_queued:
            request.has_queued = True
            request.parker = self._new_parker(lane)
            books.waits += 1
        request.queued_at = now
        lane.queue[request] = None
        self.waiting += 1
        if self.waiting > books.peak_waiting:
            books.peak_waiting = self.waiting

    def _enqueue_again(self, request: Request, now: float) -> None:
        """Queue a request whose connection was found dead where its age puts it: at the front."""
        self._enqueue(request, now)
        queue = request.lane.queue
        older = []
        for other in queue:
            if other.ticket > request.ticket:
                break
            older.append(other)
        for other in (request, *reversed(older)):
            queue.move_to_end(other, last=False)

    def _leave_queue(self, request: Request, now: float) -> None:
        """Take a request out of the queue, whatever ended its wait."""
        self.advance(now)
        del request.lane.queue[request]
        self.waiting -= 1
        request.waited += now - request.queued_at

    def _grant(self, slot: Slot, now: float) -> None:
        """Give a free connection to the caller who waits longest.

        The caller is served from here on: it wakes, or finds its slot at the deadline, and takes
        it without another look at the books; if it leaves instead, ``cancel`` takes it back.
        """
        books = self.books
        if now != books.integrated_until:
            self.advance(now)
        request, _ = slot.lane.queue.popitem(last=False)
        self.waiting -= 1
        request.waited += now - request.queued_at
        request.slot = slot
        slot.granted_to = request
        slot.asked_at = request.asked_at
        if self._entangled:
            self._end_deadlock()
        if self._is_known_alive(slot, now):
            self._serve(slot, request, request.holder, now)
            if request.is_held_back:
                self.hold_back(slot)
        else:
            slot.request = request
            slot.holder = request.holder
            self._begin_check(slot, now)
        self.decisions.append(Wake(request))

    def _fail(self, request: Request, now: float, failure: Failure) -> None:
        """End a request that is no longer in the queue without a connection."""
        request.failure = failure
        self._count_failure(request.holder, request.waited, now, failure)
        if request.has_queued:
            self.books.wait_ended(request.waited, request.holder, served=False)

    def _fail_own(self, slot: Slot, now: float, failure: Failure) -> None:
        """End the request of a slot whose caller checks or connects it himself."""
        request, slot.request = slot.request, None
        if request is None:
            self._count_failure(slot.holder, 0.0, now, failure)
        else:
            self._fail(request, now, failure)

    def _count_failure(self, holder: Hashable, waited: float, now: float, failure: Failure) -> None:
        books = self.books
        books.requesting -= 1
        if failure == "timeout":
            books.timeouts += 1
            others = self.checked_out, self.waiting
            self._tell_of(CheckoutTimedOut, now, holder, waited, *others)
        elif failure == "rejected":
            books.rejected += 1
            self._tell_of(CheckoutRejected, now, holder, self.waiting)
        elif failure == "cancelled":
            books.cancelled += 1
            self._tell_of(CheckoutCancelled, now, holder, waited)
        elif failure == "unavailable":
            books.unavailable += 1
            self._tell_of(CheckoutUnavailable, now, holder, waited)
        else:
            books.failed += 1
            self._tell_of(CheckoutFailed, now, holder, waited)

    def _fail_waiting(self, request: Request, now: float, failure: Failure) -> None:
        """End a request that stands in the queue, and wake its caller."""
        self._leave_queue(request, now)
        self._fail(request, now, failure)
        self.decisions.append(Wake(request))

    def expire(self, request: Request, now: float) -> Slot | None:
        """End a request whose deadline has passed, unless it was granted at the last moment.

        :return: its slot if it was; None if it has failed.
        """
        if request.slot is None and request.failure is None:
            if request in request.lane.queue:  # or an exception in mid-change has lost it
                self._leave_queue(request, now)
            self._fail(request, now, "timeout")
            self._grow(now)
        return request.slot

    def expire_overdue(self, lane: Lane, now: float) -> float:
        """End the requests of a lane whose deadlines have passed.

        :return: the next deadline in the lane; infinity if there is none.
        """
        next_deadline = self._end_overdue(lane, now)
        self._grow(now)
        return next_deadline

    def _end_overdue(self, lane: Lane, now: float, grace: float = 0.0) -> float:
        """End the requests of a lane so many seconds after their deadlines; return the next one."""
        next_deadline = inf
        overdue = []
        for request in lane.queue:
            deadline = inf if request.deadline is None else request.deadline
            if deadline + grace <= now:
                overdue.append(request)
                continue
            next_deadline = min(next_deadline, deadline)
            if not self._deadlines_vary:
                break
        for request in overdue:
            self._fail_waiting(request, now, "timeout")
        self._deadlines_vary = self._deadlines_vary and bool(self.waiting)
        return next_deadline

    def cancel(self, request: Request, now: float) -> None:
        """End a request whose caller is gone; what it was granted goes to the next."""
        slot = request.slot
        if slot is not None:
            request.slot = None
            if slot.state is CHECKED_OUT:
                self.checkin(slot, now)
            elif slot.request is request:
                slot.request = None
                self._fail(request, now, "cancelled")
                self._take_back(slot, now)
        elif request in request.lane.queue:
            self._leave_queue(request, now)
            self._fail(request, now, "cancelled")
            self._grow(now)

    def abandon(
        self,
        got: Slot | Request,
        now: float,
        error: BaseException,
        fault: ConnectFault = "other",
    ) -> None:
        """End a checkout whose caller leaves with an exception, wherever it stands.

        What has come to its end already stays as it is.
        """
        if isinstance(got, Request):
            self.cancel(got, now)
        elif got.state == CHECKING:
            failure: Failure = "failed" if isinstance(error, Exception) else "cancelled"
            self.check_interrupted(got, now, failure)
        elif got.state == CONNECTING and got.is_own_connect:
            self.connect_failed(got, now, error, fault)
        elif got.state == CHECKED_OUT:
            self.checkin(got, now)

    def decline(self, got: Slot | Request, now: float) -> None:
        """Take back what a caller was given who can neither wait, look nor connect; all is well."""
        request = got if isinstance(got, Request) else got.request
        if request is None:
            assert isinstance(got, Slot)
            self.attempt_cancelled(got, now)
            return
        if isinstance(got, Slot):
            request.slot = got
        self.cancel(request, now)

    def _take_back(self, slot: Slot, now: float) -> None:
        """Free a slot that was granted to be checked or connected, but was not yet."""
        if self.waiting:
            self.advance(now)
        if slot.state == CONNECTING:
            self._forget_attempt(slot)
            self._grow(now)
        else:
            self._end_check()
            self._offer(slot, now)

    # -- seeing whether it is alive ----------------------------------------------------------

    def checked(
        self,
        slot: Slot,
        now: float,
        *,
        pinged: bool,
        probed: bool,
        stale: CloseReason | None,
        was_cut: bool = False,
    ) -> Slot | Request:
        """Say whether a ``checking`` slot's connection is alive.

        :param stale: why it must not be handed out (``probe``, ``ping``), None if it is alive.
        :param was_cut: the ping did not end in time.
        :return: the slot, now ``checked_out``; or, since it was stale, what ``checkout`` would
            have returned to this caller, who stays in front of everybody that came later.
        """
        books = self.books
        books.pings += pinged
        books.probes += probed
        if self.waiting:
            self.advance(now)
        self._end_check()
        if stale is None and pinged:
            slot.checked_at = now
            slot.is_suspect = False
        if stale is None and slot.reason is None:
            request, slot.request = slot.request, None
            self._serve(slot, request, slot.holder, now)
            return slot
        request, slot.request = slot.request, None
        assert request is not None
        if stale is None:
            self._retire(slot, now, slot.reason or "retired")
        else:
            self._retire_dead(slot, now, stale, was_cut=was_cut)
        return self._ask_again(slot, request, now)

    def _retire_dead(self, slot: Slot, now: float, reason: CloseReason, *, was_cut: bool) -> None:
        """Retire a connection that was found dead."""
        self.books.ping_failures += 1
        self._retire(slot, now, reason)
        if not was_cut:
            self.note_death(slot, now)
        elif now - slot.checking_since >= min(self.config.ping_timeout, _TELLING_SECONDS):
            self.note_death(slot, now, was_slow=True)

    def check_expired(self, slot: Slot, now: float) -> Request:
        """End a check whose caller's deadline has passed before it began."""
        request, slot.request = slot.request, None
        assert request is not None
        request.slot = None
        self._fail(request, now, "timeout")
        self._take_back(slot, now)
        return request

    def _ask_again(self, slot: Slot, request: Request, now: float) -> Slot | Request:
        """Find another connection for a caller whose first one was stale before he had it."""
        request.lane.is_asleep = False  # who asks is awake
        self._asked_at, self._asked_lane = now, request.lane
        other = self._freshest_idle(slot.lane, now) if self.phase == "open" else None
        if other is not None:
            return self._check(other, request, now)
        request.slot = None
        if self.phase == "closed":
            self._fail(request, now, "closed")
        elif self._may_connect_itself(now) and not self._is_behind_others(request):
            own = self._connect_itself(request, now)
            own.request = request
            return own
        elif self._is_turned_away(now):
            self._fail(request, now, "unavailable")
        elif self.config.timeout == 0:
            self._fail(request, now, "timeout")
        else:
            self._enqueue_again(request, now)
            self._grow(now)
        return request

    def _is_behind_others(self, request: Request) -> bool:
        first = next(iter(request.lane.queue), None)
        return first is not None and first.ticket < request.ticket

    def check_interrupted(self, slot: Slot, now: float, failure: Failure) -> None:
        """End a check that neither passed nor failed: its caller is gone with an exception.

        Nobody knows in which state the connection is, so it is closed.
        """
        if self.waiting:
            self.advance(now)
        self._end_check()
        request, slot.request = slot.request, None
        if request is not None:
            self._fail(request, now, failure)
        self._retire(slot, now, "ping")

    def kept(self, slot: Slot, now: float, *, is_alive: bool, was_cut: bool = False) -> None:
        """Say how the ping of an idle connection ended.

        :param was_cut: it did not end in time.
        """
        if not slot.is_pinged_for_nobody:
            return  # given up meanwhile
        books = self.books
        books.pings += 1
        if self.waiting:
            self.advance(now)
        self._end_check()
        if is_alive:
            slot.checked_at = now
            slot.is_suspect = False
            self._offer(slot, now)
        else:
            self._retire_dead(slot, now, "ping", was_cut=was_cut)
        self._grow(now)

    # -- what one dead connection says of the others ------------------------------------------

    def note_death(self, slot: Slot, now: float, *, was_slow: bool = False) -> None:
        """Note that the server ended a connection, or does not answer on it.

        One such connection makes the others of its generation suspect: each is pinged before it
        is used again.  A second one soon after is an event of the server's, and all go.

        :param was_slow: it took ``ping_timeout`` to find that out.
        """
        if slot.generation != self.generation:
            return  # of an event that is known
        if not self.config.pre_ping:
            self.retire_generation(now)  # nobody would look at the others
            return
        window = _EVENT_SECONDS + (self.config.ping_timeout if was_slow else 0.0)
        self._deaths = [moment for moment in self._deaths if now - moment <= window]
        self._deaths.append(now)
        if len(self._deaths) >= _DEATHS_OF_AN_EVENT:
            self.retire_generation(now)
        else:
            self.suspect_all()

    def suspect_all(self) -> None:
        """Have every connection pinged before it is used again."""
        for slot in self.slots:
            slot.is_suspect = slot.state != CONNECTING

    def retire_generation(self, now: float, reason: CloseReason = "generation") -> None:
        """Retire all connections opened before now: idle ones at once, others on their return."""
        self.generation += 1
        self._deaths.clear()
        self._tell(GenerationRetired, now, self.open)
        self._retire_all_idle(now, reason)
        for slot in self.slots:
            if slot.state == CHECKED_OUT or slot.state == CHECKING:
                self.doom(slot, slot.reason or reason)

    # -- giving back -------------------------------------------------------------------------

    def checkin(self, slot: Slot, now: float, reason: ReturnReason | None = None) -> bool:
        """Take a slot back from its holder.

        :param reason: why its connection must not be used again; or ``detached`` or ``lost`` if
            there is none any more, because the holder keeps it or has closed it.
        :return: False if the slot was not checked out; nothing has changed then.
        """
        if slot.state is not CHECKED_OUT:
            return False
        books = self.books
        if self.waiting:
            # it may have come back a moment before the last change, and time never runs backwards
            now = max(now, books.integrated_until)
            self.advance(now)
        used = now - slot.held_since
        if used >= self._long_hold and slot.sought_at_use != slot.uses:
            self._note_late_return(slot, now)  # before anybody looked
        books.use_time.record(used)
        row = slot.row
        row.use_seconds += used
        caused = books.caused - slot.mark
        if caused:
            row.wait_caused_seconds += caused
        slot.idle_since = now
        if slot.is_requested:
            self._refuse_held_back(slot, now)
        if reason is not None:
            self._take_unusable(slot, now, reason)
        elif slot.review_at <= now:
            self._review(slot, now)
        elif self.waiting:
            self._offer(slot, now)
        else:
            slot.state = IDLE
            slot.lane.idle.append(slot)
        return True

    def _take_unusable(self, slot: Slot, now: float, reason: ReturnReason) -> None:
        """Take a slot back whose connection is gone, or has to go."""
        self._note_end_of_use(slot, now)
        if reason != "detached" and reason != "lost" and reason != "forgotten":
            self._retire(slot, now, reason)
            return
        if reason == "detached":
            self.books.detached += 1
            self._tell_of(ConnectionLost, now, slot.holder, True)
        elif reason == "forgotten":
            self.books.forgotten += 1
            self._tell_of(ConnectionLost, now, slot.holder, False)
        else:
            self.books.invalidations += slot.reason not in ("leaked", "reset")
            self.books.reset_failures += slot.reason == "reset"
            self._count_close(slot, now, slot.reason or "invalidated")
        self.note_peak()
        self._drop(slot)
        self._grow(now)

    def _offer(self, slot: Slot, now: float) -> None:
        """Give a connection that came free to the head of the queue, or keep it idle."""
        if slot.review_at <= now:
            self._review(slot, now)
        elif slot.lane.queue and self.phase == "open":
            if len(self.lanes) > 1 and self._is_due_elsewhere(slot):
                self._vacating += 1
                self._retire(slot, now, "loop")
            else:
                self._grant(slot, now)
        else:
            slot.state = IDLE
            slot.lane.shelve(slot)
            if self.waiting:
                self._grow(now)  # who waits in another lane may get this place

    def _is_due_elsewhere(self, slot: Slot) -> bool:
        """Tell whether a full pool has nothing for a lane whose head has waited longer."""
        if len(self.slots) < self._limit or self._vacating:
            return False
        own = next(iter(slot.lane.queue)).ticket
        return any(
            next(iter(lane.queue)).ticket < own
            for lane in self.lanes
            if lane.queue and not lane.size and not lane.is_asleep
        )

    def _review(self, slot: Slot, now: float) -> None:
        """Decide whether a connection that came free may stay."""
        self._note_end_of_use(slot, now)
        reason = slot.reason or self._reason_to_retire(slot, now)
        if reason is not None:
            self.books.invalidations += reason == "invalidated"
            self.books.reset_failures += reason == "reset"
            self._retire(slot, now, reason)
            return
        self._postpone_review(slot, now)
        self._offer(slot, now)

    def _note_end_of_use(self, slot: Slot, now: float) -> None:
        """Tell what there is to tell of the use that has just ended."""
        if slot.sought_at_use == slot.uses:
            self._note_late_return(slot, now)
        if slot.is_dropped:
            slot.is_dropped = False
            self._tell_of(ConnectionLeaked, now, slot.holder, slot.idle_since - slot.held_since)

    def _postpone_review(self, slot: Slot, now: float) -> None:
        if now < slot.ages_at:
            slot.review_at = slot.ages_at
        elif slot.is_replaced:
            slot.review_at = slot.expires_at
        else:
            # there was no room for its replacement; the time until it expires is for trying again
            again_at = now + (slot.expires_at - slot.ages_at) / 8
            slot.review_at = min(slot.expires_at, again_at)

    def _reason_to_retire(self, slot: Slot, now: float) -> CloseReason | None:
        if self.phase == "closed":
            return "closed"
        if len(self.slots) - self.closing > self._limit:
            return "resize"
        if slot.uses_of_connection >= self._last_use:
            return "uses"
        if now >= slot.expires_at:
            return slot.age_reason
        if now >= slot.ages_at and not slot.is_replaced:
            if len(self.slots) < self._limit:
                self._replace(slot, now)
            elif self._in_turn + self.closing < self.config.max_connecting:
                return slot.age_reason
        return None

    def _replace(self, slot: Slot, now: float) -> None:
        """Open a replacement before the aged connection goes."""
        is_free = now >= self.breaker.until and not self.breaker.is_open
        is_free = is_free and not slot.lane.is_asleep
        if self._in_turn < self.config.max_connecting and is_free:
            replacement = self._open(slot.lane, now, "replacement")
            replacement.replaces = slot
            slot.is_replaced = True

    def reconnected(self, slot: Slot, now: float, seconds: float) -> None:
        """Note that SQLAlchemy replaced a holder's connection in place."""
        books = self.books
        books.invalidations += 1
        self._count_close(slot, now, "invalidated")
        books.connects += 1
        books.connect_time.record(seconds)
        self._tell(ConnectionOpened, now, seconds)
        if slot.reason != "disposed":
            slot.reason = None
        slot.is_replaced = False
        slot.generation = self.generation
        slot.is_suspect = False
        slot.used_before = slot.uses - 1
        slot.next_stop = slot.used_before + min(self._last_use, _SORT_EACH)
        slot.opened_at = slot.checked_at = now
        self._set_age(slot, now)
        slot.review_at = _REVIEW  # uses, a lower limit or the end of the pool may ask for it still

    # -- a holder that is not served yet -----------------------------------------------------

    def hold_back(self, slot: Slot) -> None:
        """Count the holder as still asking until ``confirm``: listeners have to agree first.

        To be called under the same lock as the call that served it, so that no snapshot ever
        sees a checkout that is taken back.
        """
        slot.is_requested = True
        slot.row.checkouts -= 1
        self.books.requesting += 1

    def confirm(self, slot: Slot) -> None:
        """Count the holder as served after all."""
        if slot.is_requested:
            slot.is_requested = False
            slot.row.checkouts += 1
            self.books.requesting -= 1

    def _refuse_held_back(self, slot: Slot, now: float) -> None:
        """Count a holder whose listeners did not agree as failed."""
        slot.is_requested = False
        self._count_failure(slot.holder, 0.0, now, "failed")

    # -- opening -----------------------------------------------------------------------------

    @property
    def _in_turn(self) -> int:
        """Attempts that count towards ``max_connecting``."""
        return self.connecting - self.overdue

    def _new_slot(self, lane: Lane, now: float, purpose: Purpose) -> Slot:
        if self.waiting:
            self.advance(now)
        slot = Slot(now, purpose, lane)
        slot.generation = self.generation
        slot.next_stop = min(self._last_use, _SORT_EACH)
        self.slots[slot] = None
        self.connecting += 1
        lane.size += 1
        lane.connecting += 1
        lane.in_flight[purpose] += 1
        return slot

    def _open(self, lane: Lane, now: float, purpose: Purpose) -> Slot:
        slot = self._new_slot(lane, now, purpose)
        self.decisions.append(Open(slot))
        return slot

    def _grow(self, now: float) -> None:
        """Start as many connection attempts as are worth their cost.

        Nobody waits beside a free place without an attempt in flight: estimates and
        ``max_connecting`` hold back further attempts, never the first one.
        """
        if self.phase != "open":
            return
        if self.breaker.is_open:
            self._try_again(now)
        elif len(self.lanes) > 1:
            for lane in self._lanes_by_their_turn():
                self._grow_lane(lane, now)
        elif len(self.slots) < self._limit and self.lanes:
            self._grow_lane(self.lanes[0], now)

    def _try_again(self, now: float) -> None:
        """While the database is down, see from time to time whether it is there again."""
        if self._in_turn or now < self.breaker.until or len(self.slots) >= self._limit:
            return
        keeps_some_open = self.is_warm and self.config.min_size
        is_over = now - self._asked_at > _INTEREST_SECONDS
        if is_over and not self.waiting and not keeps_some_open:
            self.breaker.forget()
            return
        if self.config.upkeep == "inline":
            for lane in self._lanes_by_their_turn():
                self._let_waiters_connect(lane, now)
            return
        asked: Lane | None = self._asked_lane
        if asked is None or asked.is_asleep or asked not in self.lanes:
            asked = self._newest_lane()
        if asked is not None:
            self._open(asked, now, "trial")

    def _lanes_by_their_turn(self) -> Sequence[Lane]:
        """Return the lanes, first the one whose head of the queue has waited longest."""
        return sorted(self.lanes, key=lambda lane: next((r.ticket for r in lane.queue), _MANY))

    def _grow_lane(self, lane: Lane, now: float) -> None:
        if lane.is_asleep:
            return
        if now < self.breaker.until and (
            lane.open or not lane.queue or self.breaker.is_congested or not self._fails_waiters
        ):
            return
        if lane.queue and self._callers_connect:
            self._let_waiters_connect(lane, now)
            return
        wanted = self._wanted(lane, now)
        while lane.in_turn < wanted and self._in_turn < self.config.max_connecting:
            if len(self.slots) >= self._limit:
                self._make_room(lane, wanted - lane.in_turn, now)
                return
            if lane.owed:
                lane.owed -= 1
                self._open(lane, now, "replacement")
            else:
                is_for_waiter = lane.in_flight["demand"] < len(lane.queue)
                self._open(lane, now, "demand" if is_for_waiter else "fill")

    def _wanted(self, lane: Lane, now: float) -> int:
        """Return how many attempts should be in flight in a lane."""
        demand = 0
        if lane.queue:
            books = self.books
            demand = lane.pace.attempts_worth(
                now,
                len(lane.queue),
                lane.open - len(lane.idle),
                books.use_time.count,
                books.connect_time.sum_seconds / books.connects if books.connects else 0.1,
            )
        fill = 0
        if self.is_warm and lane is self._newest_lane():
            elsewhere = self._in_turn - lane.in_turn
            fill = self.config.min_size - self.open - elsewhere
        return max(demand, fill, lane.owed + lane.in_flight["replacement"])

    def _newest_lane(self) -> Lane | None:
        """Return the lane that gets what is opened for nobody in particular."""
        return next((lane for lane in reversed(self.lanes) if not lane.is_asleep), None)

    def _make_room(self, lane: Lane, places: int, now: float) -> None:
        """Have idle connections of other lanes closed for those who wait in this one."""
        if not lane.queue:
            return
        for _ in range(min(places, len(lane.queue)) - self._vacating):
            others = [other for other in self.lanes if other.idle and other is not lane]
            if not others:
                return
            longest_idle = min(others, key=lambda other: other.idle[0].idle_since)
            self._vacating += 1
            self._retire(longest_idle.idle.popleft(), now, "loop")

    def _let_waiters_connect(self, lane: Lane, now: float) -> None:
        """Let the callers who wait longest connect themselves (``upkeep="inline"``)."""
        while lane.queue and self._may_connect_itself(now):
            request = next(iter(lane.queue))
            self._leave_queue(request, now)
            slot = self._connect_itself(request, now)
            slot.request = request
            request.slot = slot
            self.decisions.append(Wake(request))
        if lane.queue and len(self.slots) >= self._limit:
            self._make_room(lane, 1, now)

    def starting(self, slot: Slot, now: float) -> bool:
        """Ask, at the moment an attempt would begin, whether anybody still wants it.

        :return: False if the demand is gone; the slot is gone with it.
        """
        if self.phase == "closed" or slot.reason is not None:
            needed = False
        elif len(self.slots) > self._limit:
            # the limit was lowered after this attempt was decided
            needed = False
            self._replace_later(slot)
        elif self.breaker.is_open != (slot.purpose == "trial"):
            # since this was decided the database was found to be down, or to be there again
            needed = False
            self._replace_later(slot)
        elif slot.purpose == "demand":
            needed = slot.lane.in_flight["demand"] + slot.overdue <= len(slot.lane.queue)
        else:
            needed = True
        if needed:
            slot.started_at = now
            return True
        if self.waiting:
            self.advance(now)
        self._forget_attempt(slot)
        self._grow(now)
        return False

    def _replace_later(self, slot: Slot) -> None:
        """Remember what a replacement that comes to nothing was made for."""
        if slot.replaces is not None:
            slot.replaces.is_replaced = False
            slot.replaces.review_at = _REVIEW
        elif slot.purpose == "replacement":
            slot.lane.owed += 1

    def connected(self, slot: Slot, now: float) -> None:
        """Say that a connection was opened; ``slot.resource`` is set."""
        books = self.books
        if self.waiting:
            self.advance(now)
        self._attempt_ended(slot)
        if self._lost_at is not None:
            self._tell(DatabaseFound, now, now - self._lost_at)
            self._lost_at = None
        self.breaker.succeeded()
        books.connects += 1
        books.connect_time.record(now - slot.started_at)
        self._tell(ConnectionOpened, now, now - slot.started_at)
        slot.opened_at = slot.idle_since = slot.checked_at = now
        slot.generation = self.generation
        if slot.reason is None:
            self._set_age(slot, now)
        if slot.replaces is not None:
            self._retire_replaced(slot, now)
        if slot.is_own_connect:
            self._serve_own_connect(slot, now)
        elif slot.reason is not None:
            self._retire(slot, now, slot.reason)
        elif len(self.slots) - self.closing > self._limit:
            self._retire(slot, now, "resize")
        elif slot.lane.queue and self.phase == "open":
            # once at least it is used, however short its life
            self._grant(slot, now)
        else:
            self._offer(slot, now)
        self._grow(now)

    def _serve_own_connect(self, slot: Slot, now: float) -> None:
        slot.is_own_connect = False
        if self.phase == "closed":
            self._fail_own(slot, now, "closed")
            self._retire(slot, now, "closed")
        else:
            request, slot.request = slot.request, None
            if len(self.slots) - self.closing > self._limit:
                slot.review_at = _REVIEW
            self._serve(slot, request, slot.holder, now)

    def _retire_replaced(self, slot: Slot, now: float) -> None:
        """Let the aged connection go that this one replaces."""
        aged, slot.replaces = slot.replaces, None
        if aged is None or not aged.is_replaced or aged.state == GONE or aged.state == CLOSING:
            return
        # the replacement must not look busier than what it replaces, or nothing ever shrinks
        slot.idle_since = aged.idle_since
        if aged.state == IDLE:
            aged.lane.idle.remove(aged)
            self._retire(aged, now, aged.age_reason)
        else:
            aged.reason = aged.age_reason
            aged.review_at = _REVIEW

    def _set_age(self, slot: Slot, now: float) -> None:
        """Set when this connection ages and when it expires."""
        self._opened += 1
        slot.spread = spread(self._offset, self._opened)
        slot.age_reason = "age"
        lifetime = self.config.max_lifetime
        if lifetime is None:
            slot.ages_at = slot.expires_at = slot.review_at = inf
            return
        slot.expires_at = now + lifetime
        slot.ages_at = now + lifetime * (0.75 + 0.25 * slot.spread)
        slot.review_at = slot.ages_at

    def connect_failed(
        self, slot: Slot, now: float, error: BaseException, fault: ConnectFault = "other"
    ) -> None:
        """Say that an attempt has failed.

        With no connection open the caller who waits longest gets the error, unless the attempts
        still in flight are enough for all who wait; otherwise everybody waits on for those that
        are open, and growth backs off.  So it does when the server has too many connections, and
        with ``on_outage="wait"``, except for a refused password.
        """
        books = self.books
        lane = slot.lane
        if self.waiting:
            self.advance(now)
        self._attempt_ended(slot)
        self._drop(slot)
        books.connect_failures += 1
        self._tell(ConnectFailed, now, self.journal.last_connect_error)
        self._replace_later(slot)
        if fault == "refused":
            self.retire_generation(now)
        if not slot.overdue and isinstance(error, Exception):
            self._note_failure(slot, now, fault)
        if slot.is_own_connect:
            self._fail_own(slot, now, "failed")
        elif not lane.open and lane.in_turn < len(lane.queue) and self._is_final(fault):
            request = next(iter(lane.queue))
            request.error = error
            self._fail_waiting(request, now, "failed")
        self._grow(now)

    def _is_final(self, fault: ConnectFault) -> bool:
        """Tell whether a caller with nothing else to wait for gets to see this failure."""
        if fault == "authentication":
            return True
        return fault != "congestion" and self._fails_waiters

    @property
    def _fails_waiters(self) -> bool:
        return self.config.on_outage == "raise"

    def _note_failure(self, slot: Slot, now: float, fault: ConnectFault) -> None:
        """Take a failed attempt into account, or one that takes too long."""
        opens = self.breaker.failed(
            slot.started_at, now, self._chance(), fault, is_bare=not self.open
        )
        if opens:
            if self._lost_at is None:
                self._lost_at = now
                self._tell(DatabaseLost, now, self.journal.last_connect_error)
            self._asked_at = now  # who got an idle connection at once did not leave a trace
            self._turn_waiters_away(now)

    def _turn_waiters_away(self, now: float) -> None:
        """Fail all who wait if the database is known to be down."""
        if self._is_hopeless():
            for request in self.queue:
                self._fail_waiting(request, now, "unavailable")

    def attempt_cancelled(self, slot: Slot, now: float) -> None:
        """Say that an attempt was given up that says nothing about the database."""
        if self.waiting:
            self.advance(now)
        self._forget_attempt(slot)
        self._replace_later(slot)
        if slot.is_own_connect:
            self._fail_own(slot, now, "cancelled")
        self._grow(now)

    def _attempt_ended(self, slot: Slot) -> None:
        self.note_peak()
        self.connecting -= 1
        slot.lane.connecting -= 1
        if slot.overdue:
            self.overdue -= 1
        else:
            slot.lane.in_flight[slot.purpose] -= 1

    def _forget_attempt(self, slot: Slot) -> None:
        self._attempt_ended(slot)
        self._drop(slot)

    def _drop(self, slot: Slot) -> None:
        """Free the place."""
        slot.state = GONE
        slot.lane.size -= 1
        del self.slots[slot]

    # -- closing -----------------------------------------------------------------------------

    def _retire(self, slot: Slot, now: float, reason: CloseReason) -> None:
        """Have a connection closed that nobody holds and that is not in ``idle``."""
        if self.waiting:
            self.advance(now)
        self.note_peak()
        slot.state = CLOSING
        slot.reason = reason
        self.closing += 1
        slot.lane.closing += 1
        is_due = reason in ("age", "uses") or (reason == slot.age_reason and now >= slot.ages_at)
        if is_due and not slot.is_replaced and not slot.lane.is_asleep:
            slot.lane.owed += 1
        self.decisions.append(Close(slot))

    def closed(self, slot: Slot, now: float) -> None:
        """Say that a ``closing`` connection is closed; its place is free now."""
        if self.waiting:
            self.advance(now)
        self._close_ended(slot)
        assert slot.reason is not None
        self._count_close(slot, now, slot.reason)
        self._drop(slot)
        self._grow(now)

    def _count_close(self, slot: Slot, now: float, reason: CloseReason) -> None:
        self.books.count_close(reason)
        if reason == "leaked":
            self._tell_of(ConnectionLeaked, now, slot.holder, now - slot.held_since)
        self._tell(ConnectionClosed, now, reason, now - slot.opened_at, slot.uses_of_connection)

    def _close_ended(self, slot: Slot) -> None:
        self.closing -= 1
        slot.lane.closing -= 1
        self._vacating -= slot.reason == "loop"

    # -- as time goes by ---------------------------------------------------------------------

    def tick(self, now: float) -> float:
        """Do what is due: idleness, ages, overdue attempts, ``min_size``, growth.

        :return: when to call again, at the latest.
        """
        if self.waiting:
            self.advance(now)
        self.books.sort_records()
        for lane in self.lanes:
            self._end_overdue(lane, now, _GRACE_SECONDS)  # whoever asked is gone without a word
        self._note_exhaustion(now)
        self._note_standstill(now)
        self._note_long_holds(now)
        if self.phase != "closed":
            self._retire_idle(now)
            self._retire_aged(now)
            self._give_up_turns(now)
            self._grow(now)
            self._keep_alive(now)
        return self.next_tick(now)

    def _note_exhaustion(self, now: float) -> None:
        """Tell once that all connections are held and somebody has waited for long; and its end."""
        waits = self.books.waits
        if self._exhausted_at is None:
            heads = [next(iter(lane.queue)).queued_at for lane in self.lanes if lane.queue]
            is_long = bool(heads) and now - min(heads) >= LONG_WAIT_SECONDS
            if is_long and self.checked_out >= self._limit:
                self._exhausted_at = self._waited_at = min(heads)
                self._waits_before = waits - self.waiting
                self._tell(PoolExhausted, now, self.checked_out, self.waiting, now - min(heads))
        elif self.waiting or waits != self._waits_seen:
            self._waits_seen = waits
            self._waited_at = now
        elif now - self._waited_at >= _CALM_SECONDS:
            seconds = self._waited_at - self._exhausted_at
            self._exhausted_at = None
            self._tell(PoolRecovered, now, seconds, waits - self._waits_before)

    def _note_standstill(self, now: float) -> None:
        """Have a deadlock looked for when callers wait and nothing comes back; ever more rarely."""
        returns = self.books.use_time.count
        if returns != self._still_at:
            self._begin_standstill(returns, now)
        elif self._is_held_up and self.standstill(now) >= self._seeks_after:
            self._seeks_after *= 2
            self.decisions.append(SeekDeadlock())

    def standstill(self, now: float) -> float:
        """Return for how long callers have waited while nothing came back, as of the last tick."""
        return now - self._still_since if self.waiting else 0.0

    def _begin_standstill(self, returns: int, now: float) -> None:
        """Note that something has just come back, or that callers begin to wait."""
        self._still_at = returns
        self._still_since = now
        self._seeks_after = self._first_seek

    @property
    def _is_held_up(self) -> bool:
        """Whether callers wait who can only be served by who holds a connection."""
        return bool(self.waiting) and self.checked_out >= self._limit

    def entangled(self, now: float, holders: Mapping[Slot, tuple[int, Request, str]]) -> None:
        """Tell that all who hold a connection wait for another one, if that is still so.

        :param holders: for each slot at which use it was, whose caller has it, and where he is.
        """
        # a lowered max_size can leave places beside them, closing ones, that will serve nobody
        is_so = self._is_held_up and len(holders) == self.checked_out
        for slot, (use, request, _) in holders.items():
            is_waiting = request.slot is None and request.failure is None
            is_so = is_so and is_waiting and slot.state is CHECKED_OUT and slot.uses == use
        requests = {request for _, request, _ in holders.values()}
        if is_so and any(request.deadlock is None for request in requests):
            holds = [f"{self._name(s)}, waiting in {at}" for s, (_, _, at) in holders.items()]
            found = self._tell_deadlock(now, holds)
            for request in requests:
                request.deadlock = found
            self._entangled = requests

    def _end_deadlock(self) -> None:
        """Note that somebody was served, so that whoever still waits has other reasons."""
        for request in self._entangled:
            request.deadlock = None
        self._entangled = set()

    def _tell_deadlock(self, now: float, holds: list[str]) -> DeadlockFound:
        shown = tuple(holds[:_MOST_HOLDS])
        return self._tell(DeadlockFound, now, self.checked_out, self.waiting, shown)

    def _name(self, of: Slot | Request) -> str:
        """Return who holds a connection or waits for one, in words."""
        label, caller = self.journal.describe(of.holder)
        where = caller and caller.partition("\n")[0]
        if label and where:
            return f"{label} ({where})"
        return label or where or "an unnamed caller"

    def refuse_deadlock(self, request: Request, now: float) -> None:
        """Fail a request at once if its caller and all other holders wait for each other.

        Only where each slot's ``owner`` is noted, and each has what he took himself.
        """
        if request.slot is not None or request.failure is not None or not self._is_held_up:
            return
        waiting = {each.owner: each for lane in self.lanes for each in lane.queue}
        holds = []
        owners = set()
        for slot in self.slots:
            if slot.state is not CHECKED_OUT:
                continue
            use, owner = slot.owner
            if use != slot.uses or owner not in waiting:
                return
            owners.add(owner)
            holds.append(f"{self._name(slot)}, waiting as {self._name(waiting[owner])}")
        if request.owner not in owners:
            return  # to refuse him would free nobody
        request.deadlock = self._tell_deadlock(now, holds)
        self._leave_queue(request, now)
        self._fail(request, now, "deadlock")

    def _note_long_holds(self, now: float) -> None:
        """Have it looked, once for each connection that is held for long, where its holder is."""
        limit = self.config.hold_warning
        if not limit or self.open == self.idle:
            return
        held_long = [
            slot
            for slot in self.slots
            if slot.state is CHECKED_OUT
            and now - slot.held_since >= limit
            and slot.sought_at_use != slot.uses
        ]
        for slot in held_long:
            slot.sought_at_use = slot.uses
            slot.review_at = _REVIEW  # so that its return is noticed
        if held_long:
            self.decisions.append(Locate(held_long))

    def long_held(self, slot: Slot, use: int, now: float, now_at: str | None) -> None:
        """Tell of a connection that is held for long, if it still is."""
        if slot.state is CHECKED_OUT and slot.uses == use and not slot.is_reported:
            slot.is_reported = True
            self._tell_of(HoldExceeded, now, slot.holder, now - slot.held_since, now_at)

    def _note_late_return(self, slot: Slot, now: float) -> None:
        if not slot.is_reported:
            # it comes back before it was found out where its holder is
            self._tell_of(HoldExceeded, now, slot.holder, now - slot.held_since, None)
        slot.is_reported = False
        slot.sought_at_use = -1
        self._tell_of(HoldReturned, now, slot.holder, now - slot.held_since)

    def next_tick(self, now: float) -> float:
        """Return when ``tick`` should be called, at the latest; infinity if nothing can be due."""
        config = self.config
        if self.breaker.is_open and self.phase == "open":
            return max(now + _REPEAT_GROWTH, self._next_trial(now))
        if self.waiting and self.may_grow and self.phase == "open":
            return now + _REPEAT_GROWTH
        is_wanted = any(lane.owed for lane in self.lanes) or (self.is_warm and config.min_size)
        if not self.slots and (self.phase == "closed" or not is_wanted):
            return inf
        # what is held may get lost, which only a look from time to time finds out
        pause = 1.0 if self.open > self.idle else 5.0
        for period, parts in (
            (config.idle_timeout, 8),
            (config.max_lifetime, 32),
            (config.keepalive or None if config.pre_ping else None, 32),
            (config.connect_timeout if self.connecting else None, 8),
            (config.timeout if self.waiting and config.collect_leaks else None, 8),
            (config.hold_warning or None, 8),  # as a checkout wakes nobody
            (_CALM_SECONDS if self.waiting or self._exhausted_at is not None else None, 2),
        ):
            if period is not None:
                pause = min(pause, max(0.02, period / parts))
        if self._is_held_up:
            pause = min(pause, max(0.02, self._still_since + self._seeks_after - now))
        if self.breaker.until > now:
            pause = min(pause, self.breaker.until - now)
        if now < self._gradual_until:
            pause = min(pause, max(0.02, self._gradual_step))
        return now + pause

    def _next_trial(self, now: float) -> float:
        """Return when something may be due while the database is down."""
        if len(self.slots) >= self._limit:
            return now + _TRIAL_SECONDS
        due = self.breaker.until
        # past due is what only somebody who asks can start
        return now + _TRIAL_SECONDS / 4 if self._in_turn or due <= now else due

    def _retire_idle(self, now: float) -> None:
        timeout = self.config.idle_timeout
        if timeout is None:
            return
        min_size = self.config.min_size
        for lane in self.lanes:
            idle = lane.idle
            while idle and self.open > min_size and now - idle[0].idle_since >= timeout:
                self._retire(idle.popleft(), now, "idle")

    def _retire_aged(self, now: float) -> None:
        """Replace the idle connections that reached their age."""
        for slot in [s for lane in self.lanes for s in lane.idle if s.review_at <= now]:
            reason = slot.reason or self._reason_to_retire(slot, now)
            if reason is None:
                self._postpone_review(slot, now)
            else:
                slot.lane.idle.remove(slot)
                self._retire(slot, now, reason)

    def _give_up_turns(self, now: float) -> None:
        if not self.connecting:
            return
        limit = self.config.connect_timeout
        for slot in [slot for slot in self.slots if slot.state == CONNECTING and not slot.overdue]:
            took = now - slot.started_at
            is_slow_trial = slot.purpose == "trial" and took >= _TRIAL_SECONDS
            if took >= limit:
                self._give_up_turn(slot)
                self._note_failure(slot, now, "other")
            elif is_slow_trial and 2 * (self.overdue + 1) <= self._limit:
                # it may be lost while the next one would find the database there again
                self._give_up_turn(slot)

    def _give_up_turn(self, slot: Slot) -> None:
        if not slot.overdue:
            slot.overdue = True
            self.overdue += 1
            slot.lane.in_flight[slot.purpose] -= 1

    def _keep_alive(self, now: float) -> None:
        """Have connections pinged that were idle for long, a few at a time."""
        keepalive = self.config.keepalive
        if not keepalive or not self.config.pre_ping or self.phase != "open":
            return
        for lane in self.lanes:
            due = [slot for slot in lane.idle if self._is_quiet(slot, now, keepalive)]
            for slot in due if not lane.is_asleep else ():
                if self.checking >= self.config.max_connecting:
                    return
                lane.idle.remove(slot)
                self._begin_check(slot, now)
                self.decisions.append(Check(slot))

    def _is_quiet(self, slot: Slot, now: float, seconds: float) -> bool:
        """Tell whether nothing was heard of a connection for so long, or up to a tenth less."""
        heard_at = max(slot.idle_since, slot.checked_at)
        return now - heard_at >= seconds * (0.9 + 0.1 * slot.spread)

    # -- after an accident -------------------------------------------------------------------

    def set_right(self) -> None:
        """Derive anew what follows from the states of the slots and from the queues.

        An exception that a signal handler raises in the middle of a change leaves gauges wrong, or
        an idle connection on no shelf.  After anything else there is nothing to set right.
        """
        for lane in self.lanes:
            lane.size = lane.connecting = lane.closing = 0
            lane.in_flight = dict.fromkeys(lane.in_flight, 0)
            shelved = [s for s in dict.fromkeys(lane.idle) if s.state == IDLE and s in self.slots]
            if len(shelved) != len(lane.idle):
                lane.idle.clear()
                lane.idle.extend(shelved)
            for request in [r for r in lane.queue if r.slot is not None or r.failure is not None]:
                del lane.queue[request]
        self.waiting = sum(len(lane.queue) for lane in self.lanes)
        self.connecting = self.checking = self.closing = self.overdue = self._vacating = 0
        requesting = self.waiting
        shelves = {slot for lane in self.lanes for slot in lane.idle}
        for slot in list(self.slots):
            if slot.state == GONE:
                del self.slots[slot]
                continue
            self._recount(slot)
            if slot.state in (CHECKING, CONNECTING):
                requesting += slot.request is not None or slot.is_own_connect
            elif slot.state == CHECKED_OUT:
                requesting += slot.is_requested
            elif slot.state == IDLE and slot not in shelves:
                slot.request = None
                slot.is_requested = slot.is_own_connect = False
                slot.lane.shelve(slot)
        self.books.requesting = requesting

    def _recount(self, slot: Slot) -> None:
        lane = slot.lane
        lane.size += 1
        if slot.state == CONNECTING:
            self.connecting += 1
            lane.connecting += 1
            self.overdue += slot.overdue
            lane.in_flight[slot.purpose] += not slot.overdue
        elif slot.state == CLOSING:
            self.closing += 1
            lane.closing += 1
            self._vacating += slot.reason == "loop"
        elif slot.state == CHECKING:
            self.checking += 1

    # -- from the owner of the pool ----------------------------------------------------------

    def warm(self, now: float) -> None:
        """Start to keep ``min_size`` connections open."""
        self.is_warm = True
        self._grow(now)

    def retire_all(self, now: float, reason: CloseReason = "retired") -> None:
        """Retire every connection: idle ones now, the others when they come back."""
        self._retire_all_idle(now, reason)
        for slot in self.slots:
            if slot.state != CLOSING and slot.reason is None:
                self.doom(slot, reason)
                if slot.state == CONNECTING and not slot.is_own_connect:
                    # what it opens is unwanted, so it must not keep a wanted attempt from its turn
                    self._give_up_turn(slot)
        self._grow(now)

    def retire_gradually(self, now: float, seconds: float) -> None:
        """Have every open connection replaced within so many seconds, one after the other."""
        there = [slot for slot in self.slots if slot.state not in (CONNECTING, CLOSING)]
        if there:
            self._gradual_step = seconds / len(there)
            self._gradual_until = now + seconds + self._gradual_step
        for number, slot in enumerate(there, 1):
            due = now + seconds * number / len(there)
            if due < slot.ages_at:
                slot.ages_at = due
                slot.age_reason = "retired"
                slot.expires_at = min(slot.expires_at, now + seconds * (number + 1) / len(there))
                slot.review_at = min(slot.review_at, due)

    def doom(self, slot: Slot, reason: CloseReason) -> None:
        """Have a connection retired when it next comes back."""
        slot.reason = reason
        slot.review_at = slot.expires_at = _REVIEW

    def dispose(self, now: float) -> None:
        """Retire the idle connections; the pool goes on."""
        self._retire_all_idle(now, "disposed")
        for slot in self.slots:
            if slot.is_pinged_for_nobody:
                self.doom(slot, "disposed")  # idle to its owner, whatever the upkeep does with it
        self.is_warm = False
        self._owe_nothing()

    def _owe_nothing(self) -> None:
        for lane in self.lanes:
            lane.owed = 0

    def _retire_all_idle(self, now: float, reason: CloseReason) -> None:
        if self.waiting:
            self.advance(now)
        for lane in self.lanes:
            while lane.idle:
                self._retire(lane.idle.popleft(), now, reason)

    def resize(self, config: PoolConfig, now: float) -> None:
        """Adopt other limits: grow for those who wait, or shrink, idle connections first."""
        if self.waiting:
            self.advance(now)
        self._deadlines_vary |= config.timeout != self.config.timeout
        self._adopt(config)
        for slot in self.slots:
            slot.review_at = _REVIEW
        for lane in self.lanes:
            while lane.idle and len(self.slots) - self.closing > self._limit:
                self._retire(lane.idle.popleft(), now, "resize")
        self._grow(now)

    def pause(self) -> None:
        """Hand nothing out until ``resume``; callers queue."""
        if self.phase == "open":
            self.phase = "paused"
            self._look_for_short_cut()

    def resume(self, now: float) -> None:
        """Hand out again, to those who waited first."""
        if self.phase == "paused":
            self.phase = "open"
            self._look_for_short_cut()
            for lane in self.lanes:
                while lane.queue and (slot := self._freshest_idle(lane, now)) is not None:
                    self._grant(slot, now)
            self._turn_waiters_away(now)
            self._grow(now)

    def close(self, now: float) -> None:
        """Hand nothing out any more: fail those who wait, retire what is idle or comes back."""
        self.phase = "closed"
        self.is_closed = True
        self._look_for_short_cut()
        self._owe_nothing()
        for request in self.queue:
            self._fail_waiting(request, now, "closed")
        self.retire_all(now, "closed")
