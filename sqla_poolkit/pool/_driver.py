"""The driver: carries out what the state machine decides, whether for threads or for asyncio.

One driver serves a pool and all its successors (``engine.dispose()`` makes a new pool object), so
limit, queue, totals and name outlive any of them.  What differs between threads and event loops,
how a caller parks and where the background work runs, is in ``_threads`` and ``_loops``.
"""

from __future__ import annotations

import os
import random
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ..config import UNSET, PoolConfig
from ..core.events import PoolEvent
from ..core.journal import Journal
from ..core.machine import Machine
from ..core.slots import (
    CHECKED_OUT,
    CHECKING,
    CLOSING,
    CONNECTING,
    Check,
    Close,
    CloseReason,
    Locate,
    Open,
    Request,
    SeekDeadlock,
    Slot,
    Tell,
    Wake,
    slots_of,
)
from ..core.snapshot import PoolSnapshot, read_machine
from ..errors import PoolClosed, PoolMisuse
from . import _faults, _liveness, _sqlalchemy, _sync
from ._audit import Auditor
from ._callers import describe_holder
from ._collector import collect_garbage
from ._guards import Guard
from ._messages import (
    deadlock_error,
    describe_error,
    not_ready_error,
    overloaded_error,
    timeout_error,
    unavailable_error,
)
from ._searches import Searches
from ._sqlalchemy import ConnectionPoolEntry, assign_slot, slot_of

if TYPE_CHECKING:
    from ..core.lanes import Lane
    from ..core.slots import Decision
    from ._credentials import Credentials
    from ._sessions import SessionCleaner
    from .managed import Managed

__all__ = ["Done", "Driver", "Job"]

_RETRY_SECONDS = 1.0
_SHARE_SECONDS = 0.02
_CLOCK_JUMP_SECONDS = 1.0


_Got = TypeVar("_Got")
Done = tuple["list[Decision]", "BaseException | None"]
Job = Callable[[Slot], Done]
"""Does what takes long for a slot; returns what was decided then, and what interrupted it.

An interruption is no error of the database's: a cancelled task, KeyboardInterrupt.  The job has
dealt with its slot all the same; if a caller did it with his own hands, he has to hear of it.
"""


def _interruption(error: BaseException) -> BaseException | None:
    """Return an error that is none of the database's."""
    return None if isinstance(error, Exception) else error


def _record(slot: Any) -> ConnectionPoolEntry:
    record: ConnectionPoolEntry = slot.resource
    return record


class Driver(ABC):
    """The lock and the connections of one pool.

    The lock guards the state machine and the attributes below it.  While it is held there is no
    I/O, no user code and no logging.  It is re-entrant only so that a thread can tell that it
    holds it: the garbage collector may return a connection inside any allocation, so returns go
    through ``inbox``, and whoever holds the lock leaves it to be emptied after the release.
    """

    __slots__ = (
        "__weakref__",
        "_auditor",
        "_last_cause",
        "_next_upkeep",
        "_pools",
        "_reading",
        "_spares",
        "_watchers",
        "backlog",
        "caller",
        "clean_session",
        "clock",
        "confirming",
        "credentials",
        "find_holder",
        "holds_lock",
        "in_hand",
        "inbox",
        "is_inline",
        "journal",
        "lane",
        "lock",
        "machine",
        "owner",
        "searches",
    )

    lane: Lane | None
    """The one lane of all callers; None where each has to find its own."""
    find_holder: Callable[[], Hashable]
    """Returns who asks; to be called from ``_do_get`` itself."""
    sees_callers = True
    """Whether it can be seen that a caller is at work on a slot."""
    caller: Callable[[], Hashable]
    """Returns what tells callers apart who are in the middle of a checkout."""
    owner: Callable[[], Hashable]
    """Returns the present thread or task."""

    def __init__(self, config: PoolConfig, lanes: int) -> None:
        self.lane = None
        self.lock = _sync.RLock()
        self.holds_lock = _sync.ownership_of(self.lock)
        self.clock = _sync.monotonic
        self.journal = Journal(describe_holder)
        self.machine = Machine(
            config, self.clock(), random.random, self.new_parker, lanes, self.journal
        )
        self._spares: list[ConnectionPoolEntry] = []
        """Records without a connection, to be filled again; their ``record_info`` survives."""
        self._auditor = Auditor()
        self.searches = Searches()
        self.journal.clock_offset = _sync.wall_clock() - self.clock()

        self.inbox: deque[Slot] = deque()
        self.backlog: deque[Decision] = deque()
        """What a return decided, for the upkeep: a return must not start threads."""
        self._watchers: list[Any] = []
        self._next_upkeep = inf
        self.confirming: set[Hashable] = set()
        """Callers whose checkout counts only after the ``checkout`` listeners agreed."""
        self.in_hand: set[Slot] = set()
        """Slots whose background work was begun and has not ended yet."""
        self._last_cause: BaseException | None = None
        """What the last attempt ended in; None if it succeeded, or none has ended."""
        self._reading: tuple[float, PoolSnapshot, tuple[PoolEvent, ...]] | None = None
        self._pools: list[weakref.ref[Managed]] = []
        """The pool and its predecessors; the last one that is alive opens the connections."""
        self.is_inline = config.upkeep == "inline"
        self.credentials: Credentials | None = None
        """Where connect arguments come from that change; None if they do not."""
        self.clean_session: SessionCleaner | None = None
        """What is done to a returned connection beyond a rollback."""

    # -- what differs between threads and event loops ----------------------------------------

    @abstractmethod
    def new_parker(self, lane: Lane | None) -> Any:
        """Return a place where a caller of this lane, or the present one, can sleep."""

    @abstractmethod
    def find_lane(self) -> Lane:
        """Return the lane of the present caller."""

    @abstractmethod
    def _start(self, job: Job, slot: Slot) -> bool:
        """Do a job in the background; return False if that is not possible any more."""

    @abstractmethod
    def _defer(self, decisions: list[Decision]) -> None:
        """Have carried out what a return decided and what takes long."""

    @abstractmethod
    def _can_do_here(self, slot: Slot) -> bool:
        """Tell whether the present caller may open or close this slot's connection."""

    @abstractmethod
    def _mind_growth(self) -> None:
        """See to it that the upkeep comes in time for what is due next."""

    @abstractmethod
    def _wake_upkeep(self) -> None:
        """Have the upkeep look now."""

    @abstractmethod
    def is_being_handled(self, slot: Slot) -> bool:
        """Tell whether somebody is just now checking this slot's record out or in."""

    @abstractmethod
    def _arm(self, record: ConnectionPoolEntry, seconds: float) -> Guard:
        """Have a record's connection cut off unless the guard is disarmed within these seconds."""

    @abstractmethod
    def _cut_off(self, connection: Any) -> None:
        """End a connection under whoever uses it."""

    # -- the pools it serves -----------------------------------------------------------------

    @property
    def config(self) -> PoolConfig:
        """The present settings."""
        return self.machine.config

    def serve(self, pool: Managed) -> None:
        """Open connections for this pool from now on; those of its predecessors are retired."""
        has_predecessor = bool(self._pools)
        self._pools = [reference for reference in self._pools if reference() is not None]
        self._pools.append(weakref.ref(pool))

        def take_over(now: float) -> None:
            self._spares.clear()
            self.machine.retire_all(now, "disposed")

        if has_predecessor:
            self.step(take_over)

    # -- checkout ----------------------------------------------------------------------------

    def finish_checkout(self, got: Slot | Request) -> ConnectionPoolEntry:
        """Bring a checkout to its end that was not served at once, or that left work to do."""
        try:
            if self.machine.decisions:
                got = self.step(lambda _: got)
            if self.inbox:
                # a return that came in between found nobody waiting
                self.empty_inbox()
            while got.state is not CHECKED_OUT:
                got = self._go_on(got)
        except BaseException as error:
            # a name for the error here would be a cycle through its traceback, which holds the
            # frames of the caller and all that they have dropped
            self._abandon(got, error)
            raise
        return _record(got)

    def _go_on(self, got: Slot | Request) -> Slot | Request:
        """Wait, check or connect, as the state machine says."""
        if isinstance(got, Request):
            return self._wait(got)
        if got.state == CHECKING:
            return self._check(got)
        if got.state != CONNECTING:
            if self.machine.is_closed:
                self._refuse()
            raise PoolMisuse(
                f"the connection that a caller of pool {self.config.name!r} was about to get was "
                "reclaimed, because nobody seemed to wait for it; please try again"
            )
        return self._connect_here(got)

    def _abandon(self, got: Slot | Request, error: BaseException) -> None:
        """End a checkout whose caller leaves with an exception."""
        was_connecting = got.state == CONNECTING
        fault = _faults.connect_fault(error) if was_connecting else "other"
        self.step(partial(self.machine.abandon, got, error=error, fault=fault))
        if was_connecting:
            self._mind_growth()  # somebody has to see when the database is there again

    def refuse_nested(self) -> None:
        """Refuse what the garbage collector asks for while this thread holds the lock."""
        raise PoolMisuse(
            f"pool {self.config.name!r} was used by a finalizer that ran in the middle of the "
            "pool's own work; do not use the database, nor look at the pool, in __del__"
        )

    def _refuse(self) -> NoReturn:
        raise PoolClosed(self._closed_message())

    def listeners_decide(self) -> bool:
        """Tell whether listeners have yet to agree to the present caller's checkout."""
        return self.caller() in self.confirming

    def step(self, change: Callable[[float], _Got]) -> _Got:
        """Make one change under the lock, and carry out what it decides."""
        if self.holds_lock():
            self.refuse_nested()
        with self.lock:
            self.take_returns()
            got = change(self.clock())
            decisions = self.machine.take_decisions()
            served = got if decisions and isinstance(got, Slot) else None
            if served is not None:
                self.in_hand.add(served)  # its caller comes to it after what was decided with it
        try:
            self._carry_out(decisions)
        except BaseException as error:
            if isinstance(got, Slot | Request):
                self._abandon(got, error)
            raise
        finally:
            if served is not None:
                self.in_hand.discard(served)
        return got

    def hold_back(self, got: Slot | Request) -> None:
        """Have a checkout count only after the ``checkout`` listeners agreed to it."""
        if self.listeners_decide():
            if isinstance(got, Request):
                got.is_held_back = True
            elif got.state is CHECKED_OUT:
                self.machine.hold_back(got)

    def _wait(self, request: Request) -> Slot:
        """Sleep until the request is granted, has failed, or its deadline passes."""
        machine = self.machine
        slot: Slot | None = None
        request.owner = self.owner()
        if machine.config.on_deadlock == "raise":
            self.step(lambda now: machine.refuse_deadlock(request, now))
        # again if it was queued again, and an earlier grant's wake-up came after it had looked
        while slot is None and request.failure is None:
            if machine.may_grow or machine.is_hasty:
                self._mind_growth()
            if self._sleep(request):
                # granted or failed: whoever woke us has settled everything
                slot = request.slot
            else:
                slot = self.step(lambda now: machine.expire(request, now))
        request.is_awake = True
        request.owner = None
        if slot is None:
            raise self._failure(request)
        return slot

    def _sleep(self, request: Request) -> bool:
        """Sleep until woken; return False if the deadline passed before that."""
        deadline = request.deadline
        seconds = None if deadline is None else deadline - self.clock()
        was_woken: bool = request.parker.park(seconds)
        return was_woken

    def _failure(self, request: Request) -> BaseException:
        """Return what the caller of a failed request gets to see."""
        error, request.error = request.error, None
        if error is not None:
            return error
        if request.failure == "closed":
            return PoolClosed(self._closed_message())
        if request.failure == "unavailable":
            return self._unavailable()
        waited = self.clock() - request.asked_at
        if request.failure == "rejected":
            return overloaded_error(self.config, self.step(lambda _: self._gauges()))
        if request.failure == "deadlock" and request.deadlock is not None:
            return deadlock_error(self.snapshot(), self.events(), request.deadlock)
        snapshot, events = self._recent_reading()
        last_error = self.journal.last_connect_error
        return timeout_error(snapshot, events, waited, last_error, request.deadlock)

    def _unavailable(self) -> BaseException:
        """Return the error of a caller who is turned away because the database is down."""
        self._mind_growth()  # in a new event loop nobody looks for the database yet
        cause = self._last_cause
        return unavailable_error(
            self.config.name,
            None if cause is None else _faults.keepsake(cause),
            None if cause is None else self.journal.last_connect_error,
            self.clock() - self.machine.breaker.failed_at,
            self.events(),
        )

    def _recent_reading(self) -> tuple[PoolSnapshot, tuple[PoolEvent, ...]]:
        """Return state and past for an error: callers who give up together share one reading."""
        now = self.clock()
        if self._reading is None or now - self._reading[0] > _SHARE_SECONDS:
            self._reading = (now, self.snapshot(), self.events())
        return self._reading[1:]

    def tell(self, kind: type[PoolEvent], *details: Any) -> None:
        """Write an event down that happened just now, and have the readers see to it."""
        self.step(lambda now: self.journal.write(kind, now, *details))
        if self.journal.has_news:
            self.journal.wake_readers()

    def events(self) -> tuple[PoolEvent, ...]:
        """Return the last events, the newest last."""
        return self.step(lambda _: self.journal.last())

    def _closed_message(self) -> str:
        return (
            f"pool {self.config.name!r} is closed: pool.close() was called, which is final; "
            "create a new engine to connect again"
        )

    def _gauges(self) -> dict[str, int]:
        machine = self.machine
        return {
            "open": machine.open,
            "idle": machine.idle,
            "checked_out": machine.checked_out,
            "checking": machine.checking,
            "connecting": machine.connecting,
            "closing": machine.closing,
            "requesting": machine.books.requesting,
            "waiting": machine.waiting,
        }

    def _check(self, slot: Slot) -> Slot | Request:
        """See whether the connection of a ``checking`` slot is alive."""
        machine = self.machine
        record = slot.resource
        probe: _liveness.Probe | None = record.probe
        looks = "suspect" if probe is None else probe()
        stale: CloseReason | None = "probe" if looks == "dead" else None
        pinged = looks == "suspect" or (stale is None and slot.needs_ping)
        was_cut = False
        if pinged:
            seconds = self._seconds_left(slot)
            if seconds <= 0.0:
                return self.step(partial(machine.check_expired, slot))
            is_alive, was_cut = self._ping(record, seconds)
            stale = None if is_alive else "ping"
        probed = probe is not None

        def change(now: float) -> Slot | Request:
            got = machine.checked(
                slot, now, pinged=pinged, probed=probed, stale=stale, was_cut=was_cut
            )
            self.hold_back(got)
            return got

        return self.step(change)

    def _seconds_left(self, slot: Slot) -> float:
        """Return how long the ping of a slot may take that a caller waits for."""
        request = slot.request
        limit = self.config.ping_timeout
        if request is None or request.deadline is None or self.config.timeout == 0:
            return limit
        return min(limit, request.deadline - self.clock())

    def _ping(self, record: ConnectionPoolEntry, seconds: float) -> tuple[bool, bool]:
        """Ping a connection, for at most so long; return whether it is alive, and was cut off."""
        guard = self._arm(record, seconds)
        is_alive = False
        try:
            is_alive = _sqlalchemy.ping(self.current_pool(), record.dbapi_connection)
        except Exception:
            guard.disarm()
            if not guard.was_cut:
                raise
        finally:
            guard.disarm()
        return is_alive and not guard.was_cut, guard.was_cut

    def guard_reset(self, record: ConnectionPoolEntry, reset: Callable[[], object]) -> None:
        """Reset a returned connection, within the time that a ping may take; or have it closed."""
        slot = slot_of(record)
        if slot is not None and slot.reason == "reset":
            return  # its last ROLLBACK hung already, so it is closed
        is_busy = record.is_busy  # type: ignore[attr-defined]
        if is_busy is not None and is_busy():
            raise PoolMisuse(
                f"a connection came back to pool {self.config.name!r} in the middle of a COPY or "
                "while another thread used it; it is closed. Leave the 'with' block of the copy "
                "before you close the connection"
            )
        guard = self._arm(record, self.config.ping_timeout)
        try:
            reset()
        finally:
            guard.disarm()
            if guard.was_cut and slot is not None:
                self.machine.doom(slot, "reset")  # also if the reset did not notice

    def guard_last_rollback(self, record: ConnectionPoolEntry, reset: Callable[[], object]) -> None:
        """Do the ROLLBACK that ends the use of a connection, within the time of a ping.

        One that hangs is nothing that its holder could see to: he is done.  The connection is
        closed when it comes back, which is next.
        """
        is_busy = record.is_busy  # type: ignore[attr-defined]
        if is_busy is not None and is_busy():
            self._give_up_reset(record)
            return
        guard = self._arm(record, self.config.ping_timeout)
        try:
            reset()
        except Exception as error:
            guard.disarm()
            if not guard.was_cut:
                raise
            self._give_up_reset(record, error)
        finally:
            guard.disarm()

    def _give_up_reset(
        self, record: ConnectionPoolEntry, error: BaseException | None = None
    ) -> None:
        """Have a connection closed on its return, whose reset does not end."""
        slot, pool = slot_of(record), self.served_pool()
        if slot is not None:
            self.machine.doom(slot, "reset")
        if pool is not None:
            pool.logger.error(
                "A ROLLBACK at the end of the use of a connection of pool %r %s; it is closed",
                self.config.name,
                "would have waited for a COPY"
                if error is None
                else f"took longer than ping_timeout={self.config.ping_timeout:g} s",
                exc_info=error,
            )

    def confirm(self, record: ConnectionPoolEntry | None) -> None:
        """Count a checkout as served after its listeners agreed."""
        slot = None if record is None else slot_of(record)
        if slot is not None:
            self.step(lambda _: self.machine.confirm(slot))
        else:
            self.empty_inbox()

    # -- checkin -----------------------------------------------------------------------------
    #
    # A return is one append, and is dealt with by whoever holds the lock next; at once only if
    # somebody waits.  No return is stranded: a caller that queues looks into the inbox after it
    # has queued, and a return looks for waiters after it was put into the inbox.

    def take_returns(self) -> None:
        """Deal with the returns in the inbox; the lock must be held."""
        inbox = self.inbox
        checkin = self.machine.checkin
        while inbox:
            slot = inbox.popleft()
            record = slot.resource
            if record is not None and record.dbapi_connection is not None:
                checkin(slot, slot.returned_at)
            elif slot.state is CHECKED_OUT:
                self.let_go(slot)
                checkin(slot, slot.returned_at, "detached" if slot.is_detached else "lost")

    def tidier(self, connection: Any) -> Callable[[], bool] | None:
        """Return what makes a returned connection fit for the next holder; None if that is nothing.

        What it returns answers False if the connection must not be used again.
        """
        pool = self.served_pool()
        if pool is None or not (_sqlalchemy.resets_on_return(pool) or self.clean_session):
            return None
        is_at_rest = _liveness.rest_check_for(connection)
        clean = self.clean_session
        if clean is None:
            return is_at_rest

        def tidy() -> bool:
            clean(connection)
            return is_at_rest is None or is_at_rest()

        return tidy

    def take_back_tidy(self, record: ConnectionPoolEntry) -> None:
        """Take a record back after its connection was made fit for the next holder."""
        try:
            slot = slot_of(record)
            if record.dbapi_connection is not None and (slot is None or slot.reason is None):
                self._tidy_up(record)
        finally:
            self.take_back(record, is_detached=False)

    def _tidy_up(self, record: ConnectionPoolEntry) -> None:
        """Make a returned connection fit for the next holder, or have it closed."""
        slot = slot_of(record)
        tidy = record.tidy  # type: ignore[attr-defined]
        is_tidy = False
        try:
            if self.clean_session is None:
                is_tidy = tidy()
            else:
                is_tidy = self._tidy_within_limit(record, tidy)
        finally:
            if not is_tidy and slot is not None:
                self.machine.doom(slot, slot.reason or "reset")
        if not is_tidy:
            self._warn(
                "A connection came back to pool %r in the middle of a transaction, or its session "
                "could not be reset; it is closed. End transactions that you begin by hand, and "
                "read results to their end"
            )

    def _tidy_within_limit(self, record: ConnectionPoolEntry, tidy: Callable[[], bool]) -> bool:
        guard = self._arm(record, self.config.ping_timeout)
        is_tidy = False
        try:
            is_tidy = tidy()
        except Exception:
            pool = self.served_pool()
            if pool is not None:
                pool.logger.exception(
                    "The session of a connection that came back to pool %r could not be reset",
                    self.config.name,
                )
        finally:
            guard.disarm()
        return is_tidy and not guard.was_cut

    def _warn(self, message: str) -> None:
        pool = self.served_pool()
        if pool is not None:
            pool.logger.warning(message, self.config.name)

    def take_back(self, record: ConnectionPoolEntry, *, is_detached: bool) -> None:
        """Put a returned record's slot into the inbox; see to it at once if somebody waits."""
        slot = slot_of(record)
        if slot is None:
            # it was given up after a fork or by the auditor; its connection is not ours any more
            return
        if slot.state is not CHECKED_OUT:
            raise PoolMisuse(
                f"a connection of pool {self.config.name!r} was checked in twice; it may be in "
                "somebody else's hands by now. Close each connection once, in one place"
            )
        slot.returned_at = self.clock()
        slot.is_detached = is_detached
        self.inbox.append(slot)
        if is_detached or self.machine.is_pressed:
            self.empty_inbox()

    def empty_inbox(self) -> None:
        """Deal with the returns in the inbox unless this thread holds the lock already.

        It does if the garbage collector returned a connection in the middle of a change; then
        this is done after the change.
        """
        while self.inbox and not self.holds_lock():
            with self.lock:
                self.take_returns()
                decisions = self.machine.take_decisions()
            self._carry_out_later(decisions)

    def let_go(self, slot: Slot) -> None:
        """Keep the emptied record of a slot that is about to go, as far as QueuePool would."""
        record, slot.resource = slot.resource, None
        assign_slot(record, None)
        _sqlalchemy.set_adapters(record)  # the old ones keep what was closed in memory
        has_room = len(self._spares) + len(self.machine.slots) <= self.config.pool_size
        if has_room and record.home is self.served_pool():
            self._spares.append(record)

    # -- carrying out ------------------------------------------------------------------------

    def _carry_out(self, decisions: list[Decision]) -> None:
        """Do what was decided; the lock must not be held."""
        if decisions:
            self._do(deque(decisions))
        self._wake_watchers()
        if self.machine.is_pressed:
            self.empty_inbox()

    def _wake_watchers(self) -> None:
        if self._watchers:
            for parker in list(self._watchers):
                parker.unpark()

    def _do(self, todo: deque[Decision]) -> None:
        is_changed = False
        interruption: BaseException | None = None
        # the auditor leaves them: one after the other may take longer than its patience
        waiting = slots_of(todo)
        try:
            self.in_hand.update(waiting)  # in here, for a signal may raise right after it
            while todo:
                decision = todo.popleft()
                if isinstance(decision, Wake):
                    decision.request.parker.unpark()
                    continue
                if isinstance(decision, Tell):
                    self.journal.wake_readers()
                    continue
                if isinstance(decision, Locate | SeekDeadlock):
                    self.searches.begin(self, decision)
                    continue
                is_changed = True
                job = self._job_of(decision)
                may_be_here = interruption is None and self.is_inline
                interruption = self._run(job, decision.slot, todo, may_be_here) or interruption
                waiting.discard(decision.slot)  # last, or a signal would leave it in hand
        finally:
            self.in_hand.difference_update(waiting)
        if is_changed:
            self._mind_growth()
        if interruption is not None:
            raise interruption

    def _job_of(self, decision: Open | Close | Check) -> Job:
        if isinstance(decision, Open):
            return self._connect
        return self._close if isinstance(decision, Close) else self._keep

    def _carry_out_later(self, decisions: list[Decision]) -> None:
        """Wake who was served now; what takes long is not for who returns a connection."""
        self._wake_watchers()
        if not decisions:
            return
        if self.is_inline:
            self._carry_out(decisions)
            return
        later: list[Decision] = []
        for decision in decisions:
            if isinstance(decision, Wake):
                decision.request.parker.unpark()
            else:
                later.append(decision)
        if later:
            self._defer(later)

    def _run(
        self, job: Job, slot: Slot, todo: deque[Decision], may_be_here: bool
    ) -> BaseException | None:
        """Run a job here if it may be, or in the background, or here after all."""
        is_here = may_be_here and self._can_do_here(slot)
        try:
            self.in_hand.add(slot)
            if not is_here and self._start(job, slot):
                return None
        except BaseException:
            # if it was begun nevertheless, it finds that its slot was given up
            self.in_hand.discard(slot)
            raise
        decisions, interruption = self._do_job(job, slot)
        todo.extend(decisions)
        return interruption

    def _do_job(self, job: Job, slot: Slot) -> Done:
        try:
            return job(slot)
        finally:
            self.in_hand.discard(slot)

    def _work(self, job: Job, slot: Slot) -> None:
        """Do a job in the background; after a failed connect something is due soon again."""
        decisions, _ = self._do_job(job, slot)
        self._carry_out(decisions)
        self._mind_growth()

    # -- connecting and closing --------------------------------------------------------------

    def _connect(self, slot: Slot) -> Done:
        """Open a connection for a slot, in the background."""
        with self.lock:
            wanted = slot.state == CONNECTING and self.machine.starting(slot, self.clock())
            decisions = self.machine.take_decisions()
        if self.machine.is_pressed:
            self.empty_inbox()  # a return that came in meanwhile shall not wait for the connect
        if not wanted:
            return decisions, None
        try:
            record = self._open_record(self.current_pool())
        except BaseException as error:  # noqa: BLE001 - whatever it is, a caller waits for it
            return decisions + self._attempt_failed(slot, error), _interruption(error)
        with self.lock:
            is_wanted = slot.state == CONNECTING
            if is_wanted:
                self._fill(slot, record)
                self.machine.connected(slot, self.clock())
            decisions += self.machine.take_decisions()
        if not is_wanted:
            record.close()
        return decisions, None

    def _attempt_failed(self, slot: Slot, error: BaseException) -> list[Decision]:
        """Say that an attempt in the background has failed, or was itself cancelled."""
        is_cancelled = self._is_cancellation(error)
        if is_cancelled and slot.is_timed_out:
            is_cancelled = False
            error = TimeoutError(
                f"no connection within connect_timeout={self.config.connect_timeout:g} s"
            )
        if not is_cancelled:
            self._remember_error(error)
        fault = _faults.connect_fault(error)
        with self.lock:
            if slot.state == CONNECTING:
                if is_cancelled:
                    self.machine.attempt_cancelled(slot, self.clock())
                else:
                    self.machine.connect_failed(slot, self.clock(), error, fault)
            return self.machine.take_decisions()

    def _is_cancellation(self, error: BaseException) -> bool:  # noqa: ARG002 - of loops only
        """Tell whether this ended the background work itself, not what it was about."""
        return False

    def _connect_here(self, slot: Slot) -> Slot:
        """Open a connection in the caller's own thread."""
        machine = self.machine
        try:
            record = self._open_record(self.current_pool())
        except BaseException as error:
            self._remember_error(error)
            raise

        def change(now: float) -> Slot:
            self._fill(slot, record)
            machine.connected(slot, now)
            self.hold_back(slot)
            return slot

        got = self.step(change)
        self._mind_growth()  # from now on there is something to look after
        return got

    def note_owner(self, record: ConnectionPoolEntry) -> None:
        """Remember which thread or task has just been given a record."""
        slot = slot_of(record)
        if slot is not None:
            slot.owner = (slot.uses, self.owner())

    def lend_late(self, pool: Managed, record: ConnectionPoolEntry) -> None:
        """Have a connection closed on its return that a pool with a living successor handed out."""
        slot = slot_of(record)
        if slot is not None and self.served_pool() is not pool:
            self.step(lambda _: self.machine.doom(slot, "disposed"))
        if self.config.on_deadlock == "raise":
            self.note_owner(record)

    def served_pool(self) -> Managed | None:
        """Return the pool that opens connections now; None if all are gone."""
        alive = (reference() for reference in reversed(self._pools))
        return next((pool for pool in alive if pool is not None), None)

    def is_over(self) -> bool:
        """Tell whether the pool was closed for good."""
        return self.machine.is_closed

    def current_pool(self) -> Managed:
        """Return the pool that opens connections now."""
        pool = self.served_pool()
        if pool is None:
            raise PoolMisuse("the pool was dropped while a connection was opened or checked")
        return pool

    def _fill(self, slot: Slot, record: ConnectionPoolEntry) -> None:
        slot.resource = record
        assign_slot(record, slot)
        self._last_cause = None

    def _open_record(self, pool: Managed) -> ConnectionPoolEntry:
        """Connect, in a record that was emptied before or in a new one."""
        try:
            record = self._connect_record(pool)
        except Exception as error:
            is_denied = _faults.connect_fault(error) == "authentication"
            if not is_denied or self.credentials is None or not self.credentials.have_changed():
                raise
            record = self._connect_record(pool)
        if record.dbapi_connection is None:
            raise PoolMisuse(
                f"the creator of pool {self.config.name!r} returned None; "
                "it must return a DBAPI connection or raise"
            )
        return record

    def _connect_record(self, pool: Managed) -> ConnectionPoolEntry:
        record = self._take_spare()
        if record is None:
            return pool.new_record()
        try:
            _sqlalchemy.refill(record)
        except BaseException:
            self._spares.append(record)
            raise
        return record

    def _take_spare(self) -> ConnectionPoolEntry | None:
        try:
            return self._spares.pop()
        except IndexError:
            return None

    def _remember_error(self, error: BaseException) -> None:
        pool = self.served_pool()
        known = () if pool is None else _sqlalchemy.public_words(pool)
        is_of_driver = pool is not None and _sqlalchemy.is_of_driver(pool, error)
        self.journal.last_connect_error = describe_error(error, known, is_of_driver=is_of_driver)
        self._last_cause = _faults.keepsake(error)

    def _close(self, slot: Slot) -> Done:
        """Close the connection of a ``closing`` slot."""
        interruption = None
        record = slot.resource
        if record is None:
            # closed before, by somebody who was interrupted before he could say so
            with self.lock:
                if slot.state == CLOSING:
                    self.machine.closed(slot, self.clock())
                return self.machine.take_decisions(), None
        connection = record.dbapi_connection
        guard = self._arm(record, self.config.ping_timeout)
        try:
            record.close()
        except BaseException as error:  # noqa: BLE001 - a listener's error must not keep the place
            interruption = _interruption(error)
            self._close_failed(record, connection, error)
        finally:
            guard.disarm()
        with self.lock:
            if slot.state == CLOSING:
                self.let_go(slot)
                self.machine.closed(slot, self.clock())
            return self.machine.take_decisions(), interruption

    def _close_failed(
        self, record: ConnectionPoolEntry, connection: Any, error: BaseException
    ) -> None:
        """See to a connection whose close ended with an exception."""
        pool = self.served_pool()
        if pool is None:
            return
        pool.logger.error("Exception while a connection was closed", exc_info=error)
        if record.dbapi_connection is not None:
            # a listener raised before the connection was reached
            _sqlalchemy.forget_connection(record)
            try:
                pool.close_connection(connection)
            except BaseException:  # noqa: BLE001 - SQLAlchemy has logged it
                return

    # -- keeping idle connections alive ------------------------------------------------------

    def _keep(self, slot: Slot) -> Done:
        """Ping an idle connection in the background."""
        is_alive, was_cut, interruption = False, False, None
        record = slot.resource
        if record is not None:
            try:
                is_alive, was_cut = self._ping(record, self.config.ping_timeout)
            except BaseException as error:  # noqa: BLE001 - whatever it is, the connection goes
                interruption = _interruption(error)
        with self.lock:
            now = self.clock()
            if interruption is None:
                self.machine.kept(slot, now, is_alive=is_alive, was_cut=was_cut)
            elif slot.is_pinged_for_nobody:
                self.machine.check_interrupted(slot, now, "cancelled")  # says nothing of the server
            return self.machine.take_decisions(), interruption

    # -- SQLAlchemy reconnects in place ------------------------------------------------------

    def reconnected(self, record: ConnectionPoolEntry, seconds: float) -> None:
        """Note that a checked out record was given a new connection by SQLAlchemy."""
        slot = slot_of(record)
        if slot is not None:
            self.step(lambda now: self.machine.reconnected(slot, now, seconds))

    # -- upkeep ------------------------------------------------------------------------------

    def upkeep(self) -> float:
        """Do what is due; return in how many seconds to come again, infinity for never."""
        with self.lock:
            self.take_returns()
            now = self.clock()
            if self._was_suspended(now):
                self.machine.suspect_all()
            next_tick = self.machine.tick(now)
            decisions = self.machine.take_decisions()
            if self._auditor.is_due(now):
                self._auditor.look(self, now, slots_of(decisions))
                decisions += self.machine.take_decisions()
            self._next_upkeep = next_tick
            is_stuck = self._is_stuck(now)
        if is_stuck:
            self._collect_garbage(now)
        backlog = self.backlog
        while backlog:
            decisions.append(backlog.popleft())
        self._carry_out(decisions)
        return next_tick - now

    def _collect_garbage(self, now: float) -> None:
        collect_garbage(now)

    def _was_suspended(self, now: float) -> bool:
        """Tell whether the two clocks disagree: the machine slept, or somebody set its clock.

        The monotonic one may stand still meanwhile, so that connections look as fresh as ever.
        """
        journal = self.journal
        before, journal.clock_offset = journal.clock_offset, _sync.wall_clock() - now
        return abs(journal.clock_offset - before) > _CLOCK_JUMP_SECONDS

    def look_after(self) -> float:
        """Do the upkeep, whatever happens; return in how many seconds to come again."""
        try:
            return self.upkeep()
        except BaseException:
            # one bad round must not be the last
            pool = self.served_pool()
            if pool is not None:
                pool.logger.exception("The upkeep of the pool failed; it goes on")
            return _RETRY_SECONDS

    def _is_stuck(self, now: float) -> bool:
        """Tell whether callers wait although nothing came back for half of their time."""
        timeout = self.config.timeout
        if not self.config.collect_leaks or not timeout:
            return False
        return self.machine.standstill(now) >= timeout / 2

    def patience(self) -> float:
        """Return how long a slot has to be suspect before it is reclaimed."""
        return 0.0

    # -- from the owner of the pool ----------------------------------------------------------

    def _change(self, change: Callable[[float], object]) -> None:
        self.step(change)
        self._mind_growth()

    def dispose(self) -> None:
        """Close the idle connections, in the caller's thread."""
        with self.lock:
            self.take_returns()
            self._spares.clear()
            self.machine.dispose(self.clock())
            decisions = self.machine.take_decisions()
        others: deque[Decision] = deque()
        interruption: BaseException | None = None
        waiting = slots_of(decisions)
        try:
            self.in_hand.update(waiting)
            for decision in decisions:
                if isinstance(decision, Close):
                    may_be_here = interruption is None
                    ended = self._run(self._close, decision.slot, others, may_be_here)
                    interruption = ended or interruption
                    waiting.discard(decision.slot)
                else:
                    others.append(decision)
        finally:
            self.in_hand.difference_update(waiting)
        with self.lock:
            self._spares.clear()
        self._carry_out(list(others))
        if interruption is not None:
            raise interruption

    def retire_all(self, reason: CloseReason) -> None:
        """Retire every connection: idle ones now, the others when they come back."""
        self._change(lambda now: self.machine.retire_all(now, reason))

    def retire_gradually(self, seconds: float) -> None:
        """Replace every connection within so many seconds, one after the other."""
        self._change(lambda now: self.machine.retire_gradually(now, seconds))

    def disconnected(self, record: ConnectionPoolEntry | None, error: BaseException | None) -> None:
        """Note that a holder's connection is lost, and what that says of the others."""
        slot = None if record is None else slot_of(record)
        is_event = _sqlalchemy.asks_for_invalidation(error) or _faults.is_read_only(error)
        if not is_event and _faults.is_of_the_application(error, self.config.evict_on):
            return  # this connection goes; of the server that says nothing
        if slot is None or (is_event and slot.generation == self.machine.generation):
            self._change(self.machine.retire_generation)
        else:
            self._change(partial(self.machine.note_death, slot))

    def resize(self, min_size: Any = UNSET, max_size: Any = UNSET) -> None:
        """Change the limits of the live pool."""
        config = self.config.resized(min_size, max_size)
        self._change(lambda now: self.machine.resize(config, now))

    def reconfigure(self, config: PoolConfig) -> None:
        """Adopt other settings."""
        self._change(lambda now: self.machine.resize(config, now))

    def pause(self) -> None:
        """Hand nothing out until ``resume``."""
        self._change(lambda _: self.machine.pause())

    def resume(self) -> None:
        """Hand out again."""
        self._change(self.machine.resume)

    def wait_ready(self, seconds: float | None) -> None:
        """Wait until ``min_size`` connections are open."""
        machine = self.machine
        self._change(machine.warm)
        is_ready = self._watch(
            lambda: machine.is_closed or machine.open >= self.config.min_size, seconds
        )
        if machine.is_closed:
            self._refuse()
        if not is_ready:
            raise not_ready_error(self.snapshot(), seconds, self.journal.last_connect_error)

    def close(self, seconds: float | None) -> None:
        """Close for good: fail who waits, wait for the holders, then cut them off."""
        self._change(self.machine.close)
        if not self._watch(lambda: not self.machine.slots, seconds):
            with self.lock:
                held = [s.resource for s in self.machine.slots if s.state == CHECKED_OUT]
            for record in filter(None, held):
                connection = record.dbapi_connection
                if connection is not None:
                    self._cut_off(connection)
        if not self.is_inline:
            self._wake_upkeep()

    def _watch(self, is_done: Callable[[], bool], seconds: float | None) -> bool:
        """Wait until something is so; return whether it is."""
        parker = self.new_parker(None)
        self._watchers.append(parker)
        try:
            deadline = None if seconds is None else self.clock() + seconds
            while not is_done():
                left = None if deadline is None else deadline - self.clock()
                if left is not None and left <= 0:
                    return False
                parker.park(left)
            return True
        finally:
            self._watchers.remove(parker)

    def snapshot(self, *, has_rows: bool = True) -> PoolSnapshot:
        """Return one consistent reading; without ``has_rows`` its ``labels`` are left out."""
        pool = self.served_pool()
        has_callers = self.config.track != "label"
        values = self.step(
            lambda now: read_machine(
                self.machine, now, describe_holder, has_callers=has_callers, has_rows=has_rows
            )
        )
        return PoolSnapshot(
            name=self.config.name,
            pool_class=type(pool).__name__,
            pid=os.getpid(),
            taken_at=_sync.wall_clock(),
            **values,
        )

    def readings(self) -> tuple[int, int, int]:
        """Return the places that are (free, taken, empty) as one reading, for ``status()``."""
        machine = self.machine
        return self.step(
            lambda _: (
                machine.idle + machine.closing,
                machine.checked_out + machine.checking,
                len(self._spares),
            )
        )

    def idle_records(self) -> deque[ConnectionPoolEntry]:
        """Return the records that are not in use, the empty ones last."""
        machine = self.machine
        idle = self.step(lambda _: [s.resource for lane in machine.lanes for s in lane.idle])
        return deque(idle + self._spares)

    def keep_spares(self, records: Iterable[ConnectionPoolEntry]) -> None:
        """Keep only those of the empty records that are named."""
        named = list(records)
        self._spares = [record for record in self._spares if record in named]

    def name(self, name: str) -> None:
        """Give the pool its name."""
        self.machine.config = replace(self.config, name=name)
        self.journal.pool = name

    # -- fork --------------------------------------------------------------------------------

    def after_fork_in_child(self) -> None:
        """Start over with nothing: the connections belong to the parent."""
        for slot in list(self.machine.slots):
            record = slot.resource
            if record is None:
                continue
            assign_slot(record, None)
            if record.dbapi_connection is not None:
                _liveness.lay_dead(record.dbapi_connection)
                _graveyard.append(record.dbapi_connection)
        pools, phase = self._pools, self.machine.phase
        credentials, clean_session = self.credentials, self.clean_session
        readers = self.journal.readers
        type(self).__init__(self, self.config)  # type: ignore[call-arg]
        self.name(self.config.name)
        for reader in readers:
            self.journal.add(reader)
        self._pools = pools
        self.credentials, self.clean_session = credentials, clean_session
        if phase == "closed":
            self.machine.close(self.clock())
        elif phase == "paused":
            self.machine.pause()
        for pool in filter(None, (reference() for reference in pools)):
            _sqlalchemy.release_first_connect(pool)


_graveyard: list[Any] = []
"""The parent's connections in a forked child: to close or finalize them would be to talk."""
