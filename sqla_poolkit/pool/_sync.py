"""Threads, locks and the clock, in one place that tests replace.

The pool takes everything that can block or tell the time from here, so the shipped code runs
under a simulated scheduler and a simulated clock as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import Context
from time import monotonic, time
from typing import Any

__all__ = ["Parker", "RLock", "monotonic", "ownership_of", "start_thread", "wall_clock"]

RLock: Callable[[], Any] = threading.RLock
wall_clock = time


def ownership_of(lock: Any) -> Callable[[], bool]:
    """Return the function that tells whether the present thread holds this lock."""
    is_owned: Callable[[], bool] = lock._is_owned  # noqa: SLF001 - as threading.Condition does
    return is_owned


class Parker:
    """A place where one thread sleeps until another wakes it.

    A raw lock does it: Event and Condition hold a second lock inside, on which a connection that
    the garbage collector returns in the middle of ``set`` would deadlock.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def park(self, seconds: float | None) -> bool:
        """Sleep until woken, at most so long; return whether somebody woke us."""
        if seconds is None:
            return self._lock.acquire()
        return self._lock.acquire(timeout=min(max(0.0, seconds), threading.TIMEOUT_MAX))

    def unpark(self) -> None:
        """Wake the sleeper, or the next one who would sleep; twice is as good as once."""
        try:
            self._lock.release()
        except RuntimeError:
            return


def start_thread(work: Callable[[], None], name: str) -> threading.Thread:
    """Run ``work`` in a daemon thread, in an empty context.

    A connection is shared, so what prepares it must not see one request's context variables.

    :raises RuntimeError: if no thread can be started, as at the end of the interpreter.
    """
    thread = threading.Thread(target=Context().run, args=(work,), name=name, daemon=True)
    thread.start()
    return thread
