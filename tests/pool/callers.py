"""Callers of a pool, as threads or as tasks, behind one face: what they run is written once.

SQLAlchemy's asyncio runs plain code in greenlets, so the same function can be a thread's work or a
task's.  Only where it has to wait for something does it ask its callers how that is done.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from sqlalchemy.util import await_only, greenlet_spawn

__all__ = ["Callers", "Tasks", "Threads", "in_thread"]

PATIENCE_SECONDS = 10.0


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Run ``work`` in a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Callers(ABC):
    """Starts callers, and waits the way they can."""

    @abstractmethod
    def start(self, work: Callable[[], Any]) -> Future[Any]:
        """Run ``work`` as a caller of its own."""

    @abstractmethod
    def sleep(self, seconds: float) -> None:
        """Let the present caller sleep."""

    @abstractmethod
    def finish(self, answer: Any) -> Any:
        """Bring to its end what a method of the pool returned that threads call and tasks await."""

    @abstractmethod
    def stop(self) -> None:
        """Let go of everything."""

    def call(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` as a caller and return what it returned."""
        return self.start(work).result(PATIENCE_SECONDS)

    def wait_for(self, event: threading.Event) -> None:
        """Let the present caller wait for an event of the test's."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not event.is_set():
            assert time.monotonic() < deadline, "the event never came"
            self.sleep(0.001)


class Threads(Callers):
    """Each caller is a thread."""

    def start(self, work: Callable[[], Any]) -> Future[Any]:
        return in_thread(partial(contextvars.copy_context().run, work))

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def finish(self, answer: Any) -> Any:
        return answer

    def stop(self) -> None:
        pass


class Tasks(Callers):
    """Each caller is a task, in a greenlet of SQLAlchemy's, on one loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.complaints: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def start(self, work: Callable[[], Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(greenlet_spawn(work), self.loop)

    def sleep(self, seconds: float) -> None:
        await_only(asyncio.sleep(seconds))

    def finish(self, answer: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(answer, self.loop).result(PATIENCE_SECONDS)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE_SECONDS)
        self.loop.close()
        assert self.complaints == []
