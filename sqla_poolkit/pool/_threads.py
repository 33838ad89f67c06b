"""The edge to threads: callers sleep on locks, the background work runs in daemon threads."""

from __future__ import annotations

from _thread import get_ident
from collections import deque
from functools import partial
from math import inf
from typing import Any

from ..config import PoolConfig
from ..core.lanes import Lane
from ..core.slots import CLOSING, Decision, Request, Slot
from . import _liveness, _sqlalchemy, _sync
from ._callers import holder_finder
from ._driver import Driver, Job
from ._upkeep import Upkeep
from ._workers import Workers

__all__ = ["ThreadDriver"]

_MOST_CLOSERS = 8
_LOOK_SECONDS = 1.0
_LEAST_PAUSE_SECONDS = 0.01


class ThreadDriver(Driver):
    """A pool for threads: one lane, workers that connect and close, one thread for the upkeep."""

    def __init__(self, config: PoolConfig) -> None:
        super().__init__(config, lanes=1)
        if not self._is_inline:
            self.lane = self.machine.lanes[0]
        self._looked_at = self.clock()
        self._closers = 0
        self._closes: deque[tuple[Job, Slot]] = deque()
        """Closes that wait for a thread."""
        self.find_holder = holder_finder(config.track)
        self.caller = get_ident
        self._workers = Workers(config.name)
        self._upkeep = Upkeep(config.name, self)

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

    def _sleep(self, request: Request) -> bool:
        if not self._is_inline:
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
        if slot.state == CLOSING:
            with self.lock:
                if self._closers >= _MOST_CLOSERS:
                    self._closes.append((job, slot))
                    return True
                self._closers += 1
            work = partial(self._work_and_close_on, job, slot)
        try:
            self._workers.submit(work)
        except RuntimeError:
            # no thread can be started: too many, or the interpreter is about to end
            with self.lock:
                self._closers -= slot.state == CLOSING
            return False
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
        self._backlog.extend(decisions)
        self._wake_upkeep()

    def _can_do_here(self, slot: Slot) -> bool:  # noqa: ARG002 - threads share all connections
        return True

    def _mind_growth(self) -> None:
        if self._is_inline:
            return  # whoever waits or asks does what is due
        if self.machine.next_tick(self.clock()) < self._next_upkeep:
            self._wake_upkeep()

    def _wake_upkeep(self) -> None:
        try:
            self._upkeep.wake()
        except RuntimeError:
            # no thread can be started: too many, or the interpreter is about to end
            backlog = list(self._backlog)
            self._backlog.clear()
            self._carry_out(backlog)

    def _is_being_handled(self, slot: Slot) -> bool:
        return _sqlalchemy.is_being_handled(slot.resource, slot)

    def _cut_off(self, connection: Any) -> None:
        if not _liveness.cut_off(connection):
            self.current_pool().close_connection(connection)

    def name(self, name: str) -> None:
        """Give the pool and its threads their name."""
        super().name(name)
        self._workers.name = self._upkeep.name = name
