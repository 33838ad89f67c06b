"""A snapshot from time to time, told as an event."""

from __future__ import annotations

import atexit
import logging
import weakref
from typing import Any

from ..core.events import SnapshotTaken
from ..pool import _registry, _sync
from ..pool._fork import start_over_after_fork
from ..pool.reading import snapshot

__all__ = ["SnapshotTaker"]

_EXIT_SECONDS = 2.0
_logger = logging.getLogger("sqla_poolkit")


class SnapshotTaker:
    """Takes a snapshot every so many seconds, in a thread, until it is stopped.

    :param keeper: whose; None is everybody's.
    """

    def __init__(self, keeper: _registry.Keeper | None, seconds: float) -> None:
        self._keeper = None if keeper is None else weakref.ref(keeper)
        self._seconds = seconds
        self._is_stopped = False
        self._begin()
        start_over_after_fork(self)
        _takers.add(self)

    def _begin(self) -> None:
        self._parker = _sync.Parker()
        self._thread: Any = _sync.start_thread(self._run, "poolkit snapshots")

    def after_fork_in_child(self) -> None:
        """Go on in the child."""
        if not self._is_stopped:
            self._begin()

    def stop(self) -> None:
        """Take no more."""
        self._is_stopped = True
        self._parker.unpark()

    def join(self, seconds: float) -> None:
        """Wait for the thread's end."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._parker.park(self._seconds) and not self._is_stopped:
            keepers = self._keepers()
            if keepers is None:
                return
            for keeper in keepers:
                _take(keeper)
            del keepers

    def _keepers(self) -> list[_registry.Keeper] | None:
        """Return whose snapshots are due; None if there will never be any more."""
        if self._keeper is None:
            return _registry.living_keepers()
        keeper = self._keeper()
        return None if keeper is None else [keeper]


def _take(keeper: _registry.Keeper) -> None:
    pool = keeper.served_pool()
    if pool is None:
        return
    try:
        keeper.tell(SnapshotTaken, snapshot(pool))
    except Exception:
        _logger.exception("A snapshot of pool %r could not be taken", keeper.journal.pool)


_takers: weakref.WeakSet[SnapshotTaker] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    takers = list(_takers)
    for taker in takers:
        taker.stop()
    for taker in takers:
        taker.join(_EXIT_SECONDS)
