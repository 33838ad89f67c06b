"""Searches for those who hold connections, outside of the callers' time."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from ..core.slots import CHECKED_OUT, Locate, SeekDeadlock, Slot
from . import _sync, _whereabouts
from ._fork import start_over_after_fork

if TYPE_CHECKING:
    from ._driver import Driver

__all__ = ["Searches"]

_SHARE = 0.1  # of the time, as a search keeps the other threads from running
_LONGEST_REST = 1.0


class Searches:
    """What one pool wants to know about its connections."""

    def __init__(self) -> None:
        self._held_long: deque[tuple[Slot, int]] = deque()
        """Connections whose holders are sought, and at which use they were."""
        self._seeks_deadlock = False

    def begin(self, driver: Driver, decision: Locate | SeekDeadlock) -> None:
        """Search, in the background if there may be threads."""
        if isinstance(decision, Locate):
            self._held_long.extend((slot, slot.uses) for slot in decision.slots)
        else:
            self._seeks_deadlock = True
        if driver.is_inline:
            self.search(driver)
        else:
            _searcher.search_for(driver)

    def search(self, driver: Driver) -> None:
        """Find out what is wanted, and say so."""
        if self._seeks_deadlock:
            self._seeks_deadlock = False
            self._seek_deadlock(driver)
        if self._held_long:
            self._locate(driver)

    def _locate(self, driver: Driver) -> None:
        """Tell of connections that are held for long, and where their holders are."""
        sought = [self._held_long.popleft() for _ in range(len(self._held_long))]
        places: dict[Slot, str] = {}

        def is_moot() -> bool:
            return not any(slot.state is CHECKED_OUT and slot.uses == use for slot, use in sought)

        with _logged(driver):
            places = _whereabouts.find_holders({slot for slot, _ in sought}, is_moot)

        def tell(now: float) -> None:
            for slot, use in sought:
                driver.machine.long_held(slot, use, now, places.get(slot))

        driver.step(tell)

    def _seek_deadlock(self, driver: Driver) -> None:
        """See whether all who hold a connection wait for another one."""
        machine = driver.machine
        with driver.lock:
            uses = {slot: slot.uses for slot in machine.slots if slot.state is CHECKED_OUT}
            waiting = {request.owner: request for request in machine.queue}
            returns = machine.books.use_time.count

        def is_moot() -> bool:
            return not machine.waiting or machine.books.use_time.count != returns

        with _logged(driver):
            found = _whereabouts.find_entangled(waiting, uses, is_moot)
            holders = {
                slot: (uses[slot], waiting[owner], place) for slot, (owner, place) in found.items()
            }
            if holders:
                driver.step(lambda now: machine.entangled(now, holders))


class _Searcher:
    """Searches for all pools of the process, in a thread that is there while something is wanted.

    Each search keeps the other threads from running now and then, so it rests in between.
    """

    def __init__(self) -> None:
        self.after_fork_in_child()
        start_over_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Start over: in a child there is no such thread."""
        self._wanted: deque[weakref.ref[Driver]] = deque()
        self._turn = threading.Lock()
        self._rests_until = 0.0

    def search_for(self, driver: Driver) -> None:
        """Do the searches of a pool soon; now and here, if no thread can be started."""
        self._wanted.append(weakref.ref(driver))
        if not self._turn.acquire(blocking=False):
            return  # whoever has it goes on
        try:
            _sync.start_thread(self._go_on, "poolkit search")
        except BaseException as error:
            self._turn.release()
            if not isinstance(error, RuntimeError):
                raise
            self._search_next()

    def _go_on(self) -> None:
        is_ours = True
        while is_ours:
            try:
                while self._wanted:
                    self._search_next()
            finally:
                self._turn.release()
            # what was wanted meanwhile found the turn taken
            is_ours = bool(self._wanted) and self._turn.acquire(blocking=False)

    def _search_next(self) -> None:
        if self._wanted[0]() is not None:
            pause = self._rests_until - monotonic()
            if pause > 0:
                _sync.Parker().park(pause)
        driver = self._wanted.popleft()()
        if driver is None:
            return
        began_at = monotonic()
        driver.searches.search(driver)
        ended_at = monotonic()
        rest = min(_LONGEST_REST, (ended_at - began_at) * (1 / _SHARE - 1))
        self._rests_until = ended_at + rest


_searcher = _Searcher()


@contextmanager
def _logged(driver: Driver) -> Iterator[None]:
    """Log what goes wrong among all those objects, and that there may be too many."""
    try:
        yield
    except Exception as error:
        pool = driver.served_pool()
        if pool is None:
            return
        if isinstance(error, _whereabouts.TooMuch):
            pool.logger.info("Pool %r: %s", driver.config.name, error)
        else:
            pool.logger.exception("The holders of connections could not be searched for")
