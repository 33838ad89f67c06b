"""The thread that looks after a pool as time goes by."""

from __future__ import annotations

import atexit
import weakref
from _thread import get_ident
from math import inf
from typing import Any, Protocol

from . import _sync

__all__ = ["Upkeep"]

_LINGER_SECONDS = 1.0
_EXIT_SECONDS = 2.0


class _Kept(Protocol):
    """What is kept up."""

    def look_after(self) -> float:
        """Do what is due, whatever happens; return in how many seconds to come again."""


class Upkeep:
    """Calls ``look_after()`` of a driver when it is due, from a daemon thread.

    The thread runs only while something can become due, refers to the driver weakly, and is
    stopped and joined before the interpreter ends: a daemon thread that is frozen while it holds
    a lock would hang whoever needs that lock last.
    """

    def __init__(self, name: str, kept: _Kept) -> None:
        self.name = name
        self._parker = parker = _sync.Parker()
        self._kept = weakref.ref(kept, lambda _: parker.unpark())
        self._thread: Any = None
        self._ident = 0
        self._is_running = False
        self._is_stopped = False
        _running.add(self)

    def wake(self) -> None:
        """Have the upkeep look again soon; starts the thread if it sleeps for good.

        :raises RuntimeError: if no thread can be started, as at the end of the interpreter.
        """
        if self._is_stopped:
            raise RuntimeError("the interpreter is about to end")
        if self._is_running:
            self._parker.unpark()
            return
        self._is_running = True
        try:
            self._thread = _sync.start_thread(self._run, f"poolkit upkeep {self.name}")
        except BaseException:
            self._is_running = False
            raise

    def nudge(self) -> None:
        """Have the upkeep look again soon if its thread runs; starts none."""
        if self._is_running:
            self._parker.unpark()

    def is_here(self) -> bool:
        """Tell whether the present thread is that of the upkeep."""
        return get_ident() == self._ident

    def stop(self, seconds: float) -> None:
        """End the thread; wait for it at most so long."""
        self._is_stopped = True
        self._parker.unpark()
        if self._thread is not None:
            # also when it is about to go by itself: it must not be caught on its last steps
            self._thread.join(seconds)

    def _run(self) -> None:
        ident = self._ident = get_ident()
        seconds = 0.0
        while True:
            was_woken = self._parker.park(
                min(seconds, _LINGER_SECONDS) if seconds == inf else seconds
            )
            if self._ident != ident:
                # a signal kept whoever started this thread from noting so, and it was started anew;
                # what woke it was meant for the other
                self._parker.unpark()
                return
            kept = self._kept()
            if kept is None or self._is_stopped:
                self._is_running = False
                return
            if seconds == inf and not was_woken:
                # whoever wants the upkeep from here on starts it anew
                self._is_running = False
                if not self._parker.park(0):
                    return
                self._is_running = True
            seconds = kept.look_after()
            del kept


_running: weakref.WeakSet[Upkeep] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for upkeep in list(_running):
        upkeep.stop(_EXIT_SECONDS)
