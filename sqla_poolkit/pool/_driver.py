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
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import UNSET, PoolConfig
from ..core.machine import Machine
from ..core.slots import (
    CHECKED_OUT,
    CHECKING,
    CLOSING,
    CONNECTING,
    Close,
    CloseReason,
    Open,
    Request,
    Slot,
    Wake,
)
from ..core.snapshot import PoolSnapshot, read_machine
from ..errors import PoolClosed, PoolMisuse
from . import _liveness, _sqlalchemy, _sync
from ._callers import describe_holder
from ._collector import collect_garbage
from ._messages import describe_error, not_ready_error, overloaded_error, timeout_error
from ._sqlalchemy import ConnectionPoolEntry, assign_slot, slot_of

if TYPE_CHECKING:
    from ..core.lanes import Lane
    from ..core.slots import Decision
    from .managed import Managed

__all__ = ["Done", "Driver", "Job"]

_AUDIT_SECONDS = 1.0
_SHARE_SECONDS = 0.02


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

    lane: Lane | None = None
    """The one lane of all callers; None where each has to find its own."""
    find_holder: Callable[[], Hashable]
    """Returns who asks; to be called from ``_do_get`` itself."""
    caller: Callable[[], Hashable]
    """Returns what tells callers apart who are in the middle of a checkout."""

    def __init__(self, config: PoolConfig, lanes: int) -> None:
        self.lock = _sync.RLock()
        self.holds_lock = _sync.ownership_of(self.lock)
        self.clock = _sync.monotonic
        self.machine = Machine(config, self.clock(), random.random, self.new_parker, lanes)
        self._spares: list[ConnectionPoolEntry] = []
        """Records without a connection, to be filled again; their ``record_info`` survives."""
        self._suspects: dict[Slot, tuple[int, float]] = {}
        """At which use, and since when, nobody seems to hold it."""
        self._next_audit = 0.0
        self._returns_seen = -1
        self._stuck_since = inf

        self.inbox: deque[Slot] = deque()
        self._backlog: deque[Decision] = deque()
        """What a return decided, for the upkeep: a return must not start threads."""
        self._watchers: list[Any] = []
        self._next_upkeep = inf
        self.confirming: set[Hashable] = set()
        """Callers whose checkout counts only after the ``checkout`` listeners agreed."""
        self.last_connect_error: str | None = None
        self._reading: tuple[float, PoolSnapshot] | None = None
        self._pools: list[weakref.ref[Managed]] = []
        """The pool and its predecessors; the last one that is alive opens the connections."""
        self._is_inline = config.upkeep == "inline"

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
    def _is_being_handled(self, slot: Slot) -> bool:
        """Tell whether somebody is just now checking this slot's record out or in."""

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
        if has_predecessor:
            with self.lock:
                self.take_returns()
                self._spares.clear()
                self.machine.retire_all(self.clock(), "disposed")
                decisions = self.machine.take_decisions()
            self._carry_out(decisions)

    # -- checkout ----------------------------------------------------------------------------

    def finish_checkout(self, got: Slot | Request) -> ConnectionPoolEntry:
        """Bring a checkout to its end that was not served at once, or that left work to do."""
        if self.machine.decisions:
            got = self._step(lambda _: got)
        if self.inbox:
            # a return that came in between found nobody waiting
            self.empty_inbox()
        if got.state is CHECKED_OUT:
            return _record(got)
        return self._obtain(got)

    def _obtain(self, got: Slot | Request) -> ConnectionPoolEntry:
        """Wait, check and connect as the state machine says."""
        try:
            while got.state is not CHECKED_OUT:
                if isinstance(got, Request):
                    got = self._wait(got)
                elif got.state == CHECKING:
                    got = self._check(got)
                elif got.state == CONNECTING:
                    got = self._connect_here(got)
                else:
                    self._refuse()
        except BaseException as error:
            # a name for the error here would be a cycle through its traceback, which holds the
            # frames of the caller and all that they have dropped
            self._abandon(got, error)
            raise
        return _record(got)

    def _abandon(self, got: Slot | Request, error: BaseException) -> None:
        """End a checkout whose caller leaves with an exception."""
        self._step(partial(self.machine.abandon, got, error=error))

    def refuse_nested(self) -> None:
        """Refuse what the garbage collector asks for while this thread holds the lock."""
        raise PoolMisuse(
            f"pool {self.config.name!r} was used by a finalizer that ran in the middle of the "
            "pool's own work; do not use the database, nor look at the pool, in __del__"
        )

    def _refuse(self) -> None:
        raise PoolClosed(self._closed_message())

    def listeners_decide(self) -> bool:
        """Tell whether listeners have yet to agree to the present caller's checkout."""
        return self.caller() in self.confirming

    def _step(self, change: Callable[[float], _Got]) -> _Got:
        """Make one change under the lock, and carry out what it decides."""
        if self.holds_lock():
            self.refuse_nested()
        with self.lock:
            self.take_returns()
            got = change(self.clock())
            decisions = self.machine.take_decisions()
        try:
            self._carry_out(decisions)
        except BaseException as error:
            if isinstance(got, Slot | Request):
                self._abandon(got, error)
            raise
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
        # again if it was queued again, and an earlier grant's wake-up came after it had looked
        while slot is None and request.failure is None:
            if machine.may_grow or machine.config.collect_leaks:
                self._mind_growth()
            if self._sleep(request):
                # granted or failed: whoever woke us has settled everything
                slot = request.slot
            else:
                slot = self._step(lambda now: machine.expire(request, now))
        request.is_awake = True
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
        waited = self.clock() - request.asked_at
        if request.failure == "rejected":
            return overloaded_error(self.config, self._step(lambda _: self._gauges()))
        return timeout_error(self._recent_snapshot(), waited, self.last_connect_error)

    def _recent_snapshot(self) -> PoolSnapshot:
        """Return a snapshot for an error: callers who give up together share one reading."""
        now = self.clock()
        if self._reading is None or now - self._reading[0] > _SHARE_SECONDS:
            self._reading = (now, self.snapshot())
        return self._reading[1]

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
        stale: CloseReason | None = None
        pinged = False
        if probe is None or slot.needs_ping or not probe():
            pinged = True
            if not _sqlalchemy.ping(self.current_pool(), record.dbapi_connection):
                stale = "ping"
        probed = probe is not None

        def change(now: float) -> Slot | Request:
            got = machine.checked(slot, now, pinged=pinged, probed=probed, stale=stale)
            self.hold_back(got)
            return got

        return self._step(change)

    def confirm(self, record: ConnectionPoolEntry | None) -> None:
        """Count a checkout as served after its listeners agreed."""
        slot = None if record is None else slot_of(record)
        if slot is not None:
            self._step(lambda _: self.machine.confirm(slot))
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
                self._let_go(slot)
                checkin(slot, slot.returned_at, "detached" if slot.is_detached else "lost")

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

    def _let_go(self, slot: Slot) -> None:
        """Keep the emptied record of a slot that is about to go, as far as QueuePool would."""
        record, slot.resource = slot.resource, None
        assign_slot(record, None)
        has_room = len(self._spares) + len(self.machine.slots) <= self.config.pool_size
        if has_room and record.home is self._pool():
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
        while todo:
            decision = todo.popleft()
            if isinstance(decision, Wake):
                decision.request.parker.unpark()
                continue
            is_changed = True
            job = self._connect if isinstance(decision, Open) else self._close
            may_be_here = interruption is None and self._is_inline
            interruption = self._run(job, decision.slot, todo, may_be_here) or interruption
        if is_changed:
            self._mind_growth()
        if interruption is not None:
            raise interruption

    def _carry_out_later(self, decisions: list[Decision]) -> None:
        """Wake who was served now; what takes long is not for who returns a connection."""
        self._wake_watchers()
        if not decisions:
            return
        if self._is_inline:
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
        if not is_here and self._start(job, slot):
            return None
        decisions, interruption = job(slot)
        todo.extend(decisions)
        return interruption

    def _work(self, job: Job, slot: Slot) -> None:
        """Do a job in the background; after a failed connect something is due soon again."""
        decisions, _ = job(slot)
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
        if not is_cancelled:
            self._remember_error(error)
        with self.lock:
            if slot.state == CONNECTING:
                if is_cancelled:
                    self.machine.attempt_cancelled(slot, self.clock())
                else:
                    self.machine.connect_failed(slot, self.clock(), error)
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

        return self._step(change)

    def lend_late(self, pool: Managed, record: ConnectionPoolEntry) -> None:
        """Have a connection closed on its return that a pool with a living successor handed out."""
        slot = slot_of(record)
        if slot is not None and self._pool() is not pool:
            self._step(lambda _: self.machine.doom(slot, "disposed"))

    def _pool(self) -> Managed | None:
        alive = (reference() for reference in reversed(self._pools))
        return next((pool for pool in alive if pool is not None), None)

    def current_pool(self) -> Managed:
        """Return the pool that opens connections now."""
        pool = self._pool()
        if pool is None:
            raise PoolMisuse("the pool was dropped while a connection was opened or checked")
        return pool

    def _fill(self, slot: Slot, record: ConnectionPoolEntry) -> None:
        slot.resource = record
        assign_slot(record, slot)

    def _open_record(self, pool: Managed) -> ConnectionPoolEntry:
        """Connect, in a record that was emptied before or in a new one."""
        record: ConnectionPoolEntry
        spare = self._take_spare()
        if spare is None:
            record = pool.new_record()
        else:
            record = spare
            try:
                _sqlalchemy.refill(record)
            except BaseException:
                self._spares.append(record)
                raise
        if record.dbapi_connection is None:
            raise PoolMisuse(
                f"the creator of pool {self.config.name!r} returned None; "
                "it must return a DBAPI connection or raise"
            )
        return record

    def _take_spare(self) -> ConnectionPoolEntry | None:
        try:
            return self._spares.pop()
        except IndexError:
            return None

    def _remember_error(self, error: BaseException) -> None:
        pool = self._pool()
        known = () if pool is None else _sqlalchemy.public_words(pool)
        self.last_connect_error = describe_error(error, known)

    def _close(self, slot: Slot) -> Done:
        """Close the connection of a ``closing`` slot."""
        interruption = None
        record = slot.resource
        connection = record.dbapi_connection
        try:
            record.close()
        except BaseException as error:  # noqa: BLE001 - a listener's error must not keep the place
            interruption = _interruption(error)
            self._close_failed(record, connection, error)
        with self.lock:
            if slot.state == CLOSING:
                self._let_go(slot)
                self.machine.closed(slot, self.clock())
            return self.machine.take_decisions(), interruption

    def _close_failed(
        self, record: ConnectionPoolEntry, connection: Any, error: BaseException
    ) -> None:
        """See to a connection whose close ended with an exception."""
        pool = self._pool()
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

    # -- SQLAlchemy reconnects in place ------------------------------------------------------

    def reconnected(self, record: ConnectionPoolEntry, seconds: float) -> None:
        """Note that a checked out record was given a new connection by SQLAlchemy."""
        slot = slot_of(record)
        if slot is not None:
            self._step(lambda now: self.machine.reconnected(slot, now, seconds))

    # -- upkeep ------------------------------------------------------------------------------

    def upkeep(self) -> float:
        """Do what is due; return in how many seconds to come again, infinity for never."""
        with self.lock:
            self.take_returns()
            now = self.clock()
            next_tick = self.machine.tick(now)
            decisions = self.machine.take_decisions()
            if now >= self._next_audit:
                self._next_audit = now + _AUDIT_SECONDS
                self._audit(now)
                decisions += self.machine.take_decisions()
            self._next_upkeep = next_tick
            is_stuck = self._is_stuck(now)
        if is_stuck:
            collect_garbage(now)
        backlog = self._backlog
        while backlog:
            decisions.append(backlog.popleft())
        self._carry_out(decisions)
        return next_tick - now

    def look_after(self) -> float:
        """Do the upkeep, whatever happens; return in how many seconds to come again."""
        try:
            return self.upkeep()
        except BaseException:
            # one bad round must not be the last
            pool = self._pool()
            if pool is not None:
                pool.logger.exception("The upkeep of the pool failed; it goes on")
            return _AUDIT_SECONDS

    def _is_stuck(self, now: float) -> bool:
        """Tell whether callers wait although nothing came back for half of their time."""
        returns = self.machine.books.use_time.count
        if returns != self._returns_seen or not self.machine.waiting:
            self._returns_seen, self._stuck_since = returns, now
        timeout = self.config.timeout
        is_wanted = self.config.collect_leaks and timeout is not None
        return is_wanted and now - self._stuck_since >= (timeout or 0.0) / 2

    def _audit(self, now: float) -> None:
        """Reclaim what is checked out although nobody refers to it any more.

        A listener that raises on the way back, or a signal handler that raises inside pool code,
        loses the record.  A slot is suspect when no proxy refers to its record, and reclaimed when
        that is still so one round later and nobody is busy with it.
        """
        suspects: dict[Slot, tuple[int, float]] = {}
        patience = self._patience()
        for slot in list(self.machine.slots):
            if slot.state != CHECKED_OUT or slot.request is not None:
                continue
            record = slot.resource
            if record is not None and _sqlalchemy.is_referenced(record):
                continue
            before = self._suspects.get(slot)
            if before is None or before[0] != slot.uses:
                suspects[slot] = (slot.uses, now)
                continue
            suspects[slot] = before
            if now - before[1] >= patience and not self._is_being_handled(slot):
                if record is not None and record.dbapi_connection is not None:
                    self.machine.checkin(slot, now, "leaked")
                    continue
                if record is not None:
                    self._let_go(slot)
                self.machine.checkin(slot, now, "lost")
        self._suspects = suspects

    def _patience(self) -> float:
        """Return how long a slot has to be suspect before it is reclaimed."""
        return 0.0

    # -- from the owner of the pool ----------------------------------------------------------

    def _change(self, change: Callable[[float], object]) -> None:
        self._step(change)
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
        for decision in decisions:
            if isinstance(decision, Close):
                may_be_here = interruption is None
                ended = self._run(self._close, decision.slot, others, may_be_here)
                interruption = ended or interruption
            else:
                others.append(decision)
        with self.lock:
            self._spares.clear()
        self._carry_out(list(others))
        if interruption is not None:
            raise interruption

    def retire_all(self, reason: CloseReason) -> None:
        """Retire every connection: idle ones now, the others when they come back."""
        self._change(lambda now: self.machine.retire_all(now, reason))

    def invalidate_generation(self, record: ConnectionPoolEntry | None) -> None:
        """Retire all connections, unless this record is of a generation that already was."""
        slot = None if record is None else slot_of(record)
        if slot is not None and slot.reason is not None:
            return
        self.retire_all("generation")

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
            raise not_ready_error(self.snapshot(), seconds, self.last_connect_error)

    def close(self, seconds: float | None) -> None:
        """Close for good: fail who waits, wait for the holders, then cut them off."""
        self._change(self.machine.close)
        if not self._watch(lambda: not self.machine.slots, seconds):
            with self.lock:
                held = [s.resource for s in self.machine.slots if s.state == CHECKED_OUT]
            for record in held:
                connection = record.dbapi_connection
                if connection is not None:
                    self._cut_off(connection)
        if not self._is_inline:
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

    def snapshot(self) -> PoolSnapshot:
        """Return one consistent reading."""
        pool = self._pool()
        has_callers = self.config.track != "label"
        values = self._step(
            lambda now: read_machine(self.machine, now, describe_holder, has_callers=has_callers)
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
        return self._step(
            lambda _: (
                machine.idle + machine.closing,
                machine.checked_out + machine.checking,
                len(self._spares),
            )
        )

    def idle_records(self) -> deque[ConnectionPoolEntry]:
        """Return the records that are not in use, the empty ones last."""
        machine = self.machine
        idle = self._step(lambda _: [s.resource for lane in machine.lanes for s in lane.idle])
        return deque(idle + self._spares)

    def keep_spares(self, records: Iterable[ConnectionPoolEntry]) -> None:
        """Keep only those of the empty records that are named."""
        named = list(records)
        self._spares = [record for record in self._spares if record in named]

    def name(self, name: str) -> None:
        """Give the pool its name."""
        self.machine.config = replace(self.config, name=name)

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
        type(self).__init__(self, self.config)  # type: ignore[call-arg]
        self._pools = pools
        if phase == "closed":
            self.machine.close(self.clock())
        elif phase == "paused":
            self.machine.pause()
        for pool in filter(None, (reference() for reference in pools)):
            _sqlalchemy.release_first_connect(pool)


_graveyard: list[Any] = []
"""The parent's connections in a forked child: to close or finalize them would be to talk."""
