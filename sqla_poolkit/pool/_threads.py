"""The edge to threads: callers sleep on locks, the background work runs in daemon threads."""

from __future__ import annotations

import contextlib
from _thread import get_ident
from collections import deque
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

from ..config import PoolConfig
from ..core.lanes import Lane
from ..core.slots import CLOSING, Decision, Request, Slot
from . import _liveness, _sqlalchemy, _sync
from ._callers import holder_finder
from ._driver import Driver, Job
from ._guards import UNGUARDED, Guard, Guards, ThreadGuard
from ._sqlalchemy import ConnectionPoolEntry
from ._upkeep import Upkeep
from ._workers import Workers

__all__ = ["ThreadDriver"]

_MOST_CLOSERS = 8
_LOOK_SECONDS = 1.0
_LEAST_PAUSE_SECONDS = 0.01
_MOST_ROUNDS = 10


class ThreadDriver(Driver):
    """A pool for threads: one lane, workers that connect and close, one thread for the upkeep."""

    __slots__ = (
        "_closers",
        "_closes",
        "_guards",
        "_looked_at",
        "_looks_again_at",
        "_upkeep",
        "_workers",
    )

    def __init__(self, config: PoolConfig) -> None:
        super().__init__(config, lanes=1)
        if not self.is_inline:
            self.lane = self.machine.lanes[0]
        self._looked_at = self.clock()
        self._closers = 0
        self._closes: deque[tuple[Job, Slot]] = deque()
        """Closes that wait for a thread."""
        self.find_holder = holder_finder(config.track)
        self.caller = self.owner = get_ident
        self._workers = Workers(config.name)
        self._upkeep = Upkeep(config.name, self)
        self._guards = Guards()
        self._looks_again_at = inf
        """When the upkeep will look at the guards."""

    def new_parker(self, lane: Lane | None) -> _sync.Parker:  # noqa: ARG002 - threads share it
        """Return a lock to sleep on."""
        return _sync.Parker()

    def find_lane(self) -> Lane:
        """Return the lane of all threads; without a thread for the upkeep, first do what is due."""
        if self.clock() - self._looked_at >= _LOOK_SECONDS:
            self._look_after_inline()
        return self.machine.lanes[0]

    def _look_after_inline(self) -> None:
        self._looked_at = self.clock()
        self.look_after()

    def time_moved(self) -> None:
        """Do what is due by a clock that was moved, and have those who wait look at it."""
        for _ in range(_MOST_ROUNDS):
            self._looked_at = self.clock()
            if self.look_after() > 0:
                break
        with self.lock:
            sleepers = [request.parker for request in self.machine.lanes[0].queue]
        for parker in [*sleepers, *self._watchers]:
            parker.unpark()

    def _sleep(self, request: Request) -> bool:
        if not self.is_inline:
            return super()._sleep(request)
        while True:
            now = self.clock()
            left = inf if request.deadline is None else request.deadline - now
            pause = min(_LOOK_SECONDS, max(_LEAST_PAUSE_SECONDS, self.machine.next_tick(now) - now))
            if request.parker.park(min(left, pause)):
                return True
            if left <= pause:
                return False
            self._look_after_inline()

    def _start(self, job: Job, slot: Slot) -> bool:
        work = partial(self._work, job, slot)
        closes_on = partial(self._work_and_close_on, job, slot)
        is_counted = is_started = False
        try:
            if slot.state == CLOSING:
                with self.lock:
                    if self._closers >= _MOST_CLOSERS:
                        self._closes.append((job, slot))
                        return True
                    self._closers += 1
                    is_counted = True
                work = closes_on
            self._workers.submit(work)
            is_started = True
        except RuntimeError:
            # no thread can be started: too many, or the interpreter is about to end
            return False
        finally:
            if is_counted and not is_started:
                with self.lock:
                    self._closers -= 1
        return True

    def _work_and_close_on(self, job: Job, slot: Slot) -> None:
        """Close one connection, then those that found no thread."""
        while True:
            self._work(job, slot)
            with self.lock:
                if not self._closes:
                    self._closers -= 1
                    return
                job, slot = self._closes.popleft()

    def _defer(self, decisions: list[Decision]) -> None:
        # a return must not start threads
        self.backlog.extend(decisions)
        self._wake_upkeep()

    def _can_do_here(self, slot: Slot) -> bool:  # noqa: ARG002 - threads share all connections
        return True

    def _mind_growth(self) -> None:
        if self.is_inline:
            return  # whoever waits or asks does what is due
        if self.machine.next_tick(self.clock()) < self._next_upkeep:
            self._wake_upkeep()
        elif self.machine.is_closed and not self.machine.slots:
            self._upkeep.nudge()  # so that its thread ends soon

    def _wake_upkeep(self) -> None:
        try:
            self._upkeep.wake()
        except RuntimeError:
            # no thread can be started: too many, or the interpreter is about to end
            backlog = list(self.backlog)
            self.backlog.clear()
            self._carry_out(backlog)

    def is_being_handled(self, slot: Slot) -> bool:
        return _sqlalchemy.is_being_handled(slot.resource, slot)

    def _arm(self, record: ConnectionPoolEntry, seconds: float) -> Guard:
        if self.is_inline:
            return UNGUARDED
        guard = _sqlalchemy.guard_of(record, ThreadGuard)
        try:
            now = self.clock()
            deadline = now + seconds
            slot = _sqlalchemy.slot_of(record)
            is_news = self._guards.arm(guard, record.dbapi_connection, slot, now, deadline)
            if is_news and deadline < self._looks_again_at:
                # it runs as long as there are connections; a return must not start threads
                self._upkeep.nudge()
        except BaseException:
            guard.forget()  # a signal's: nobody else would, and a holder would be cut off later
            raise
        return guard

    def guard_reset(self, record: ConnectionPoolEntry, reset: Callable[[], object]) -> None:
        """Reset a returned connection, within the time that a ping may take."""
        if self._upkeep.is_here():
            # a dropped connection was collected by chance in the one thread that cuts others off
            _liveness.cut_off(record.dbapi_connection)
        super().guard_reset(record, reset)

    def look_after(self) -> float:
        """Cut off what is overdue, then do the upkeep; return in how many seconds to come again."""
        self._looks_again_at = inf  # whoever arms a guard meanwhile has to nudge
        next_look = self._guards.look(self.clock())
        seconds = super().look_after()
        if seconds == inf:
            next_look = self._guards.look_last(self.clock())
        seconds = min(seconds, next_look - self.clock())
        self._looks_again_at = self.clock() + seconds
        return seconds

    def _collect_garbage(self, now: float) -> None:
        # what is collected is reset, and only the upkeep could cut that off: so it is not for it
        with contextlib.suppress(RuntimeError):  # no thread can be started
            self._workers.submit(lambda: super(ThreadDriver, self)._collect_garbage(now))

    def _cut_off(self, connection: Any) -> None:
        if not _liveness.cut_off(connection):
            self.current_pool().close_connection(connection)

    def name(self, name: str) -> None:
        """Give the pool and its threads their name."""
        super().name(name)
        self._workers.name = self._upkeep.name = name
