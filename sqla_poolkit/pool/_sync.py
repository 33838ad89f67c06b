"""Threads, locks and the clock, in one place that tests replace.

The pool takes everything that can block or tell the time from here, so the shipped code runs
under a simulated scheduler and a simulated clock as it is.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from contextvars import Context
from time import monotonic as _monotonic
from time import time as _wall_clock
from typing import Any

__all__ = [
    "Parker",
    "RLock",
    "is_steered",
    "monotonic",
    "ownership_of",
    "start_thread",
    "wall_clock",
]

RLock: Callable[[], Any] = threading.RLock
monotonic: Callable[[], float] = _monotonic
wall_clock: Callable[[], float] = _wall_clock
is_steered = False
"""A test moves the time: pools that are made meanwhile start no threads."""


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
    with _starts.lock:
        if _starts.are_over:
            raise RuntimeError("the interpreter is about to end")
        thread.start()
    return thread


class _Starts:
    """Threads that are being started, which the interpreter's end has to wait for.

    A thread that has not come to its first step yet when the interpreter goes makes it crash
    (seen with Python 3.10).  The lock is re-entrant, for the garbage collector may want a thread
    in the middle of a start.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.are_over = False

    def end(self) -> None:
        """Wait for those under way, and start no more."""
        with self.lock:
            self.are_over = True

    def begin_anew(self) -> None:
        """Forget who held the lock, in a child that was forked meanwhile."""
        self.lock = threading.RLock()


_starts = _Starts()
atexit.register(_starts.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_starts.begin_anew)
