"""Threads that do what must not keep a caller: connecting and closing."""

from __future__ import annotations

from collections.abc import Callable

from . import _sync

__all__ = ["Workers"]

_LINGER_SECONDS = 1.0


class Workers:
    """Runs jobs at once, each in a thread of its own; idle threads are used again for a second.

    How many run at a time is decided by the state machine, which asks for the jobs.  Nothing here
    takes a lock, so jobs may be handed in from a garbage collection at any point.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._idle: list[_Worker] = []

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` in the background.

        :raises RuntimeError: if no thread can be started, as at the end of the interpreter.
        """
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = _Worker(self._idle, job)
            _sync.start_thread(worker.run, f"poolkit worker {self.name}")
        else:
            worker.job = job
            worker.parker.unpark()


class _Worker:
    """One thread and the job it was given."""

    def __init__(self, idle: list[_Worker], job: Callable[[], None]) -> None:
        self._idle = idle
        self.job: Callable[[], None] | None = job
        self.parker = _sync.Parker()

    def run(self) -> None:
        while True:
            job, self.job = self.job, None
            if job is not None:
                job()
            # a finished job must not keep its pool alive while this thread sleeps
            del job
            self._idle.append(self)
            if self.parker.park(_LINGER_SECONDS):
                continue
            try:
                self._idle.remove(self)
            except ValueError:
                # somebody has just taken this worker and is about to wake it, unless an exception
                # from a signal handler kept him from it
                if self.parker.park(_LINGER_SECONDS):
                    continue
            return
