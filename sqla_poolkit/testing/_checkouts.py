"""Who has taken what, from whichever pool of the process: for tests that look for leaks."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from _thread import get_ident
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import Any

from sqlalchemy import event
from sqlalchemy.pool import Pool

from ..pool import _sqlalchemy
from ..pool._callers import Holder, describe_holder, stack_behind
from ..pool._registry import name_of
from ..pool._sqlalchemy import ConnectionPoolEntry, PoolProxiedConnection

__all__ = ["Checkout", "Checkouts"]

_caller = sys._getframe  # noqa: SLF001 - inspect.currentframe would have to climb frame by frame
_running_loop = asyncio._get_running_loop  # noqa: SLF001 - get_running_loop raises where none is


@dataclass(frozen=True, slots=True, eq=False)
class Checkout:
    """One connection that somebody took."""

    number: int
    pool: Pool
    holder: Holder
    taken_by: str
    """The thread, or the task."""
    taken_at: float
    thread: int
    loop: asyncio.AbstractEventLoop | None
    proxy: weakref.ref[PoolProxiedConnection]

    @property
    def is_out(self) -> bool:
        """Whether it has neither come back nor been detached."""
        proxy = self.proxy()
        return proxy is not None and not proxy.is_detached

    @property
    def is_on_running_loop(self) -> bool:
        """Whether a task may be about to return it while the present thread waits."""
        loop = self.loop
        return loop is not None and loop.is_running() and _running_loop() is not loop

    @property
    def is_on_stopped_loop(self) -> bool:
        """Whether a task may be about to return it as soon as the present thread runs its loop."""
        loop = self.loop
        if loop is None or loop.is_closed() or loop.is_running():
            return False
        return self.thread == get_ident() and _running_loop() is None

    def pool_name(self) -> str:
        """Return the name of the pool, or of its database; it holds no secrets."""
        given = getattr(self.pool, "logging_name", None)
        return str(given or name_of(self.pool) or _sqlalchemy.database_name(self.pool))

    def label_and_stack(self) -> tuple[str | None, list[str]]:
        """Return what ``held_by`` said, and ``file:line function`` from the inside outwards."""
        label, stack = describe_holder(self.holder)
        return label, (stack or "").splitlines()


class Checkouts:
    """Remembers who made each checkout, of every pool, while somebody wants to know.

    Only ``checkout`` is listened to.  Whether a connection is still out can be seen from its
    proxy, so nothing is counted up and down.
    """

    def __init__(self) -> None:
        self._known: dict[int, Checkout] = {}
        self._dropped: list[Checkout] = []
        self._numbers = count()
        self._users = 0
        self._lock = threading.Lock()
        self._collector: int | None = None
        """The thread in which the garbage collector runs at present."""

    def start(self) -> None:
        """Listen, until each who called this has called :meth:`stop`."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                gc.callbacks.append(self._collects)
                event.listen(Pool, "checkout", self._note)

    def stop(self) -> None:
        """Listen no longer, and forget everything, if this was the last who wanted to know."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                event.remove(Pool, "checkout", self._note)
                gc.callbacks.remove(self._collects)
                self._known.clear()
                self._dropped.clear()

    def mark(self) -> int:
        """Return a number: later checkouts have this one or a higher one."""
        return next(self._numbers)

    def unreturned(self) -> list[Checkout]:
        """Return the checkouts that are still out, and those that nobody returned.

        The latter were found by the garbage collector, or could not be returned by it: those of
        asyncio.  What is dropped otherwise goes back to its pool at that moment.
        """
        out = [checkout for checkout in list(self._known.values()) if checkout.is_out]
        return [*self._dropped, *out]

    def forget_dropped(self) -> None:
        """Tell no more of those that nobody returned."""
        self._dropped.clear()

    def _collects(self, phase: str, _: Any) -> None:
        self._collector = get_ident() if phase == "start" else None

    def _note(
        self, _connection: Any, record: ConnectionPoolEntry, proxy: PoolProxiedConnection
    ) -> None:
        number = next(self._numbers)
        pool = _sqlalchemy.pool_of(proxy)
        taken_by, loop = _present_thread_or_task()
        self._known[number] = Checkout(
            number=number,
            pool=pool,
            holder=stack_behind(_caller(1)),
            taken_by=taken_by,
            taken_at=monotonic(),
            thread=get_ident(),
            loop=loop,
            proxy=weakref.ref(proxy, self._farewell(number, record)),
        )

    def _farewell(self, number: int, record: ConnectionPoolEntry) -> Callable[[object], None]:
        """Return what is called when a proxy is gone: before SQLAlchemy hears of it."""
        reference = _sqlalchemy.proxy_reference(record)

        def gone(_: object) -> None:
            checkout = self._known.pop(number, None)
            if checkout is None or _sqlalchemy.proxy_reference(record) is not reference:
                return
            if self._collector == get_ident() or _sqlalchemy.is_asyncio(checkout.pool):
                self._dropped.append(checkout)

        return gone


def _present_thread_or_task() -> tuple[str, asyncio.AbstractEventLoop | None]:
    loop = _running_loop()
    task = None if loop is None else asyncio.current_task(loop)
    if task is not None:
        return f"task {task.get_name()}", loop
    return f"thread {threading.current_thread().name}", loop
