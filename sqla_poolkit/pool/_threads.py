"""The edge to threads: callers sleep on locks, the background work runs in daemon threads."""

from __future__ import annotations

from _thread import get_ident
from typing import Any

from ..config import PoolConfig
from ..core.lanes import Lane
from ..core.slots import Decision, Slot
from . import _liveness, _sqlalchemy, _sync
from ._callers import holder_finder
from ._driver import Driver, Job
from ._upkeep import Upkeep
from ._workers import Workers

__all__ = ["ThreadDriver"]


class ThreadDriver(Driver):
    """A pool for threads: one lane, workers that connect and close, one thread for the upkeep."""

    lane: Lane

    def __init__(self, config: PoolConfig) -> None:
        super().__init__(config, lanes=1)
        self.lane = self.machine.lanes[0]
        self.find_holder = holder_finder(config.track)
        self.caller = get_ident
        self._workers = Workers(config.name)
        self._upkeep = Upkeep(config.name, self)

    def new_parker(self, lane: Lane | None) -> _sync.Parker:  # noqa: ARG002 - threads share it
        """Return a lock to sleep on."""
        return _sync.Parker()

    def find_lane(self) -> Lane:
        """Return the lane of all threads."""
        return self.lane

    def _start(self, job: Job, slot: Slot) -> bool:
        try:
            self._workers.submit(lambda: self._work(job, slot))
        except RuntimeError:
            # no thread can be started: too many, or the interpreter is about to end
            return False
        return True

    def _defer(self, decisions: list[Decision]) -> None:
        # a return must not start threads
        self._backlog.extend(decisions)
        self._wake_upkeep()

    def _can_do_here(self, slot: Slot) -> bool:  # noqa: ARG002 - threads share all connections
        return True

    def _mind_growth(self) -> None:
        if self._is_inline:
            return
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
