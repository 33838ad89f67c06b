"""The pool as a pure state machine: who gets which slot, who waits, what to open and close.

Nothing here does I/O, holds a thread or reads a clock.  Each call takes the time, changes the
state and leaves what has to be done in ``decisions``; the driver calls under its lock, takes the
decisions, and carries them out after releasing it:

* ``Open(slot)``: connect, then ``connected`` or ``connect_failed`` (after asking ``starting``);
* ``Close(slot)``: close the connection, then ``closed``;
* ``Wake(request)``: wake that caller, whose ``slot`` or ``failure`` is set.

A slot is always in one of these states::

               _open                connected             checkout / grant
      (gone) --------> connecting ------------> idle -----------------------> checking
        ^                  |                     ^  |                          |    |
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

from collections.abc import Callable, Hashable, Sequence
from math import inf
from typing import Any, Literal

from ..config import PoolConfig
from .books import Books
from .lanes import Lane
from .policies import Backoff, spread_age
from .slots import (
    CHECKED_OUT,
    CHECKING,
    CLOSING,
    CONNECTING,
    GONE,
    IDLE,
    Close,
    CloseReason,
    Decision,
    Failure,
    Open,
    Purpose,
    Request,
    ReturnReason,
    Slot,
    Wake,
)

__all__ = ["Machine"]

Phase = Literal["open", "paused", "closed"]

_REVIEW = -inf
_MANY = 1 << 62
_REPEAT_GROWTH = 0.01  # how often a queue that was thought short-lived is looked at again
_SORT_EACH = 512  # uses of one slot
_GRACE_SECONDS = 1.0  # so late a caller comes who is merely slow


class Machine:
    """All state of one pool, and the only code that changes it.

    :param config: the settings; ``resize`` replaces them.
    :param now: the present time, seconds of a monotonic clock, as in every other call.
    :param chance: returns random numbers between 0 and 1; spreads ages and back-off.
    :param new_parker: makes what a driver parks a waiting caller on.
    :param lanes: how many lanes there are from the beginning; ``add_lane`` adds others.
    """

    def __init__(
        self,
        config: PoolConfig,
        now: float,
        chance: Callable[[], float],
        new_parker: Callable[[Lane], Any] = lambda _: None,
        lanes: int = 1,
    ) -> None:
        self.books = Books(now)
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
        self._backoff = Backoff()
        self._adopt(config)
        for _ in range(lanes):
            self.add_lane()

    def _adopt(self, config: PoolConfig) -> None:
        self.config = config
        self._limit = inf if config.max_size is None else config.max_size
        self._last_use = config.max_uses or _MANY
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
            self._fail(request, "cancelled")
        for slot in [slot for slot in self.slots if slot.lane is lane]:
            self._forget(slot, now)
        self._grow(now)

    def put_to_sleep(self, lane: Lane, now: float) -> None:
        """Start nothing more in a lane that nobody drives at present, nor wait for it.

        The attempts under way there are given up, and the connections that are closing count as
        closed; the driver has seen to them.  The next checkout wakes the lane.
        """
        lane.is_asleep = True
        lane.owed = 0
        for slot in [slot for slot in self.slots if slot.lane is lane]:
            if slot.state == CONNECTING and not slot.is_own_connect:
                self._forget_attempt(slot)
            elif slot.state == CLOSING:
                self.closed(slot, now)
        self._grow(now)

    def _forget(self, slot: Slot, now: float) -> None:
        """Free a place without closing its connection."""
        if self.waiting:
            self.advance(now)
        if slot.state == CHECKED_OUT:
            self.checkin(slot, now, "forgotten")
            return
        if slot.is_own_connect or slot.request is not None:
            self._cancel_granted(slot)
        if slot.state == CONNECTING:
            self._forget_attempt(slot)
            return
        self.books.forgotten += 1
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
            books.wait_time.record(request.waited)
            row.wait_seconds += request.waited
        lanes = self.lanes
        idle = len(lanes[0].idle) if len(lanes) == 1 else self.idle
        if idle < self._fewest_idle:
            self._fewest_idle = idle

    def _stop_at_use(self, slot: Slot) -> None:
        """Do what is due after some uses: sort the durations, or retire after the last one."""
        if slot.uses >= self._last_use:
            slot.review_at = _REVIEW
        self.books.sort_records()
        slot.next_stop = min(slot.uses + _SORT_EACH, max(self._last_use, slot.uses + 1))

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
        return not slot.uses and now - slot.opened_at <= self.config.ping_after

    def _begin_check(self, slot: Slot, now: float) -> None:
        slot.state = CHECKING
        slot.needs_ping = now - slot.idle_since >= self.config.ping_after
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
        lane.is_asleep = False
        timeout = self.config.timeout
        deadline = None if timeout is None else asked_at + timeout
        self._tickets += 1
        request = Request(self._tickets, asked_at, now, deadline, holder, lane)
        if self.phase == "closed":
            self._fail(request, "closed")
            return request
        if self.phase == "open" and not lane.queue:
            slot = self._freshest_idle(lane, now)
            if slot is not None:
                return self._check(slot, request, now)
            if self._callers_connect and self._may_connect_itself():
                return self._connect_itself(request, now)
        if timeout == 0:
            self._fail(request, "timeout")
        elif (limit := self.config.max_waiting) is not None and self.waiting >= limit:
            self._fail(request, "rejected")
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
            self._retire(slot, now, slot.reason or "age")
        return None

    def _may_connect_itself(self) -> bool:
        if not self._callers_connect or self.phase != "open" or len(self.slots) >= self._limit:
            return False
        return self.config.timeout == 0 or self._in_turn < self.config.max_connecting

    def _connect_itself(self, request: Request, now: float) -> Slot:
        """Give the caller a slot to connect in its own thread."""
        slot = self._new_slot(request.lane, now, "demand")
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
        if self._is_known_alive(slot, now):
            self._serve(slot, request, request.holder, now)
            if request.is_held_back:
                self.hold_back(slot)
        else:
            slot.request = request
            slot.holder = request.holder
            self._begin_check(slot, now)
        self.decisions.append(Wake(request))

    def _fail(self, request: Request, failure: Failure) -> None:
        """End a request that is no longer in the queue without a connection."""
        books = self.books
        books.requesting -= 1
        request.failure = failure
        if failure == "timeout":
            books.timeouts += 1
        elif failure == "rejected":
            books.rejected += 1
        elif failure == "cancelled":
            books.cancelled += 1
        elif failure == "unavailable":
            books.unavailable += 1
        else:
            books.failed += 1
        self._record_failed_wait(request)

    def _record_failed_wait(self, request: Request | None) -> None:
        if request is not None and request.has_queued:
            self.books.wait_ended(request.waited, request.holder, served=False)

    def _fail_waiting(self, request: Request, now: float, failure: Failure) -> None:
        """End a request that stands in the queue, and wake its caller."""
        self._leave_queue(request, now)
        self._fail(request, failure)
        self.decisions.append(Wake(request))

    def expire(self, request: Request, now: float) -> Slot | None:
        """End a request whose deadline has passed, unless it was granted at the last moment.

        :return: its slot if it was; None if it has failed.
        """
        if request.slot is None and request.failure is None:
            self._leave_queue(request, now)
            self._fail(request, "timeout")
            self._grow(now)
        return request.slot

    def expire_overdue(self, lane: Lane, now: float) -> float:
        """End the requests of a lane whose deadlines have passed.

        :return: the next deadline in the lane; infinity if there is none.
        """
        next_deadline = inf
        for request in list(lane.queue):
            deadline = inf if request.deadline is None else request.deadline
            if deadline <= now:
                self._fail_waiting(request, now, "timeout")
                continue
            next_deadline = min(next_deadline, deadline)
            if not self._deadlines_vary:
                break
        else:
            self._deadlines_vary = False
        self._grow(now)
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
                self._fail(request, "cancelled")
                self._take_back(slot, now)
        elif request in request.lane.queue:
            self._leave_queue(request, now)
            self._fail(request, "cancelled")
            self._grow(now)

    def abandon(self, got: Slot | Request, now: float, error: BaseException) -> None:
        """End a checkout whose caller leaves with an exception, wherever it stands.

        What has come to its end already stays as it is.
        """
        if isinstance(got, Request):
            self.cancel(got, now)
        elif got.state == CHECKING:
            failure: Failure = "failed" if isinstance(error, Exception) else "cancelled"
            self.check_interrupted(got, now, failure)
        elif got.state == CONNECTING and got.is_own_connect:
            self.connect_failed(got, now, error)
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
        self, slot: Slot, now: float, *, pinged: bool, probed: bool, stale: CloseReason | None
    ) -> Slot | Request:
        """Say whether a ``checking`` slot's connection is alive.

        :param stale: why it must not be handed out (``probe``, ``ping``), None if it is alive.
        :return: the slot, now ``checked_out``; or, since it was stale, what ``checkout`` would
            have returned to this caller, who stays in front of everybody that came later.
        """
        books = self.books
        books.pings += pinged
        books.probes += probed
        if self.waiting:
            self.advance(now)
        self._end_check()
        if stale is None and slot.reason is not None:
            stale = slot.reason
        if stale is None:
            request, slot.request = slot.request, None
            self._serve(slot, request, slot.holder, now)
            return slot
        return self._ask_again(slot, now, stale)

    def _ask_again(self, slot: Slot, now: float, stale: CloseReason) -> Slot | Request:
        """Replace a connection that was found stale before its caller had it."""
        books = self.books
        if stale in ("probe", "ping"):
            books.ping_failures += 1
        request, slot.request = slot.request, None
        assert request is not None
        self._retire(slot, now, stale)
        other = self._freshest_idle(slot.lane, now) if self.phase == "open" else None
        if other is not None:
            return self._check(other, request, now)
        request.slot = None
        if self.phase == "closed":
            self._fail(request, "closed")
        elif self._may_connect_itself() and not self._is_behind_others(request):
            own = self._connect_itself(request, now)
            own.request = request
            return own
        elif self.config.timeout == 0:
            self._fail(request, "timeout")
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
        assert request is not None
        self._fail(request, failure)
        self._retire(slot, now, "ping")

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
        books.use_time.record(used)
        row = slot.row
        row.use_seconds += used
        caused = books.caused - slot.mark
        if caused:
            row.wait_caused_seconds += caused
        slot.idle_since = now
        if slot.is_requested:
            self._refuse_held_back(slot)
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
        if reason != "detached" and reason != "lost" and reason != "forgotten":
            self._retire(slot, now, reason)
            return
        if reason == "detached":
            self.books.detached += 1
        elif reason == "forgotten":
            self.books.forgotten += 1
        else:
            self.books.invalidations += slot.reason != "leaked"
            self.books.count_close(slot.reason or "invalidated")
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
            slot.lane.idle.append(slot)
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
        reason = slot.reason or self._reason_to_retire(slot, now)
        if reason is not None:
            self.books.invalidations += reason == "invalidated"
            self._retire(slot, now, reason)
            return
        self._postpone_review(slot, now)
        self._offer(slot, now)

    def _postpone_review(self, slot: Slot, now: float) -> None:
        if now < slot.ages_at:
            slot.review_at = slot.ages_at
        elif slot.is_replaced:
            slot.review_at = slot.expires_at
        else:
            # there was no room for its replacement; the time until it expires is for trying again
            slot.review_at = now + (slot.expires_at - slot.ages_at) / 8

    def _reason_to_retire(self, slot: Slot, now: float) -> CloseReason | None:
        if self.phase == "closed":
            return "closed"
        if len(self.slots) - self.closing > self._limit:
            return "resize"
        if slot.uses >= self._last_use:
            return "uses"
        if now >= slot.expires_at:
            return "age"
        if now >= slot.ages_at and not slot.is_replaced:
            if len(self.slots) < self._limit:
                self._replace(slot, now)
            elif self._in_turn + self.closing < self.config.max_connecting:
                return "age"
        return None

    def _replace(self, slot: Slot, now: float) -> None:
        """Open a replacement before the aged connection goes."""
        if self._in_turn < self.config.max_connecting and now >= self._backoff.until:
            replacement = self._open(slot.lane, now, "replacement")
            replacement.replaces = slot
            slot.is_replaced = True

    def reconnected(self, slot: Slot, now: float, seconds: float) -> None:
        """Note that SQLAlchemy replaced a holder's connection in place."""
        books = self.books
        books.invalidations += 1
        books.count_close("invalidated")
        books.connects += 1
        books.connect_time.record(seconds)
        if slot.reason != "disposed":
            slot.reason = None
        slot.is_replaced = False
        slot.uses = 1
        slot.next_stop = min(self._last_use, _SORT_EACH)
        slot.opened_at = now
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

    def _refuse_held_back(self, slot: Slot) -> None:
        """Count a holder whose listeners did not agree as failed."""
        slot.is_requested = False
        self.books.requesting -= 1
        self.books.failed += 1

    # -- opening -----------------------------------------------------------------------------

    @property
    def _in_turn(self) -> int:
        """Attempts that count towards ``max_connecting``."""
        return self.connecting - self.overdue

    def _new_slot(self, lane: Lane, now: float, purpose: Purpose) -> Slot:
        if self.waiting:
            self.advance(now)
        slot = Slot(now, purpose, lane)
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
        if len(self.lanes) > 1:
            for lane in self._lanes_by_their_turn():
                self._grow_lane(lane, now)
        elif len(self.slots) < self._limit and self.lanes:
            self._grow_lane(self.lanes[0], now)

    def _lanes_by_their_turn(self) -> Sequence[Lane]:
        """Return the lanes, first the one whose head of the queue has waited longest."""
        return sorted(self.lanes, key=lambda lane: next((r.ticket for r in lane.queue), _MANY))

    def _grow_lane(self, lane: Lane, now: float) -> None:
        if lane.is_asleep:
            return
        if now < self._backoff.until and (lane.open or not lane.queue):
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
        while lane.queue and self._may_connect_itself():
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
        self._backoff.succeeded()
        books.connects += 1
        books.connect_time.record(now - slot.started_at)
        slot.opened_at = slot.idle_since = now
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
        request, slot.request = slot.request, None
        if self.phase == "closed":
            self.books.requesting -= 1
            self.books.failed += 1
            self._record_failed_wait(request)
            self._retire(slot, now, "closed")
        else:
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
            self._retire(aged, now, "age")
        else:
            aged.reason = "age"
            aged.review_at = _REVIEW

    def _set_age(self, slot: Slot, now: float) -> None:
        """Set when this connection ages and when it expires."""
        lifetime = self.config.max_lifetime
        if lifetime is None:
            slot.ages_at = slot.expires_at = slot.review_at = inf
            return
        self._opened += 1
        slot.expires_at = now + lifetime
        slot.ages_at = now + lifetime * spread_age(self._offset, self._opened)
        slot.review_at = slot.ages_at

    def connect_failed(self, slot: Slot, now: float, error: BaseException) -> None:
        """Say that an attempt has failed.

        With no connection open the caller who waits longest gets the error, unless the attempts
        still in flight are enough for all who wait; otherwise everybody waits on for those that
        are open, and growth backs off.
        """
        books = self.books
        lane = slot.lane
        if self.waiting:
            self.advance(now)
        self._attempt_ended(slot)
        self._drop(slot)
        books.connect_failures += 1
        self._replace_later(slot)
        self._backoff.failed(now, self._chance())
        if slot.is_own_connect:
            request, slot.request = slot.request, None
            books.requesting -= 1
            books.failed += 1
            self._record_failed_wait(request)
        elif not lane.open and lane.in_turn < len(lane.queue):
            request = next(iter(lane.queue))
            request.error = error
            self._fail_waiting(request, now, "failed")
        self._grow(now)

    def attempt_cancelled(self, slot: Slot, now: float) -> None:
        """Say that an attempt was given up that says nothing about the database."""
        if self.waiting:
            self.advance(now)
        self._forget_attempt(slot)
        self._replace_later(slot)
        if slot.is_own_connect:
            self._cancel_granted(slot)
        self._grow(now)

    def _cancel_granted(self, slot: Slot) -> None:
        """End the request of a slot that is being checked or connected."""
        request, slot.request = slot.request, None
        self.books.requesting -= 1
        self.books.cancelled += 1
        self._record_failed_wait(request)

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
        if reason in ("age", "uses") and not slot.is_replaced and not slot.lane.is_asleep:
            slot.lane.owed += 1
        self.decisions.append(Close(slot))

    def closed(self, slot: Slot, now: float) -> None:
        """Say that a ``closing`` connection is closed; its place is free now."""
        if self.waiting:
            self.advance(now)
        self._close_ended(slot)
        assert slot.reason is not None
        self.books.count_close(slot.reason)
        self._drop(slot)
        self._grow(now)

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
        self._end_overdue(now)
        if self.phase != "closed":
            self._retire_idle(now)
            self._retire_aged(now)
            self._give_up_turns(now)
            self._grow(now)
        return self.next_tick(now)

    def _end_overdue(self, now: float) -> None:
        """End requests long past their deadline: whoever asked is gone without a word."""
        for lane in self.lanes:
            while lane.queue:
                request = next(iter(lane.queue))
                if request.deadline is None or now < request.deadline + _GRACE_SECONDS:
                    break
                self._fail_waiting(request, now, "timeout")

    def next_tick(self, now: float) -> float:
        """Return when ``tick`` should be called, at the latest; infinity if nothing can be due."""
        config = self.config
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
            (config.connect_timeout if self.connecting else None, 8),
            (config.timeout if self.waiting and config.collect_leaks else None, 8),
        ):
            if period is not None:
                pause = min(pause, max(0.02, period / parts))
        if self._backoff.until > now:
            pause = min(pause, self._backoff.until - now)
        return now + pause

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
        for slot in self.slots:
            if slot.state == CONNECTING and now - slot.started_at >= self.config.connect_timeout:
                self._give_up_turn(slot)

    def _give_up_turn(self, slot: Slot) -> None:
        if not slot.overdue:
            slot.overdue = True
            self.overdue += 1
            slot.lane.in_flight[slot.purpose] -= 1

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

    def doom(self, slot: Slot, reason: CloseReason) -> None:
        """Have a connection retired when it next comes back."""
        slot.reason = reason
        slot.review_at = slot.expires_at = _REVIEW

    def dispose(self, now: float) -> None:
        """Retire the idle connections; the pool goes on."""
        self._retire_all_idle(now, "disposed")
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
