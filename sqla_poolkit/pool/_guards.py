"""Limits in time for what the pool itself asks of a connection: pings, resets, closes."""

from __future__ import annotations

import heapq
import threading
from collections import deque
from itertools import count
from math import inf
from typing import Any, Protocol

from ..core.slots import Slot
from ._liveness import cut_off

__all__ = ["UNGUARDED", "Guard", "Guards", "ThreadGuard"]


_LATE_SECONDS = 1.0  # so late the upkeep may be on a busy machine


class Guard(Protocol):
    """A limit in time for one call on one connection."""

    @property
    def was_cut(self) -> bool:
        """The connection was cut off, because the call did not end in time."""

    def disarm(self) -> None:
        """Leave the guarded call; the connection is not cut off after this, come what may."""


class _Unguarded:
    """Where nothing can be cut off."""

    was_cut = False

    def disarm(self) -> None:
        """Do nothing."""


UNGUARDED = _Unguarded()


class ThreadGuard:
    """The guard of one connection at a time, armed for one call after the other.

    Arming, disarming and cutting exclude each other, and a connection leaves its guarded call only
    disarmed: its descriptor may be another connection's a moment later.  If a signal handler raises
    where it would have been disarmed, the next holder is spared: the slot counts another use then.
    """

    __slots__ = ("_connection", "_lock", "_slot", "_use", "_watched_until", "deadline", "was_cut")

    def __init__(self) -> None:
        self.deadline = inf
        self.was_cut = False
        self._connection: Any = None
        self._slot: Slot | None = None
        self._use = 0
        self._watched_until = inf
        """When the upkeep will look at this guard; infinity if it does not know of it."""
        self._lock = threading.Lock()

    def arm(self, connection: Any, slot: Slot | None, now: float, deadline: float) -> bool:
        """Enter a guarded call; return whether the upkeep has to be told."""
        with self._lock:
            self._connection = connection
            self._slot = slot
            self._use = 0 if slot is None else slot.uses
            self.was_cut = False
            self.deadline = deadline
            # a moment that is past was never looked at: an exception kept somebody from telling
            is_news = deadline < self._watched_until or self._watched_until < now - _LATE_SECONDS
            if is_news:
                self._watched_until = deadline
            return is_news

    def disarm(self) -> None:
        """Leave the guarded call."""
        with self._lock:
            self.deadline = inf
            self._connection = None

    def forget(self) -> None:
        """Leave the guarded call without having told the upkeep, perhaps: it is told next time."""
        self.disarm()
        self._watched_until = inf

    def look(self, now: float) -> float:
        """Cut the connection off if its call is overdue; return when to look again."""
        with self._lock:
            if now >= self.deadline:
                self.deadline = inf
                if self._slot is None or self._slot.uses == self._use:
                    self.was_cut = True
                    cut_off(self._connection)
            self._watched_until = self.deadline
            return self.deadline


class Guards:
    """The guarded calls of a pool for threads, looked at by its upkeep.

    Arming takes no lock but the guard's own and starts no thread, for it may happen in a garbage
    collection at any point: guards go into an inbox, and the upkeep alone keeps the order of their
    deadlines.  A guard that is armed again and again is told once, and then looked at once in
    ``ping_timeout``.
    """

    def __init__(self) -> None:
        self._news: deque[tuple[float, ThreadGuard]] = deque()
        self._heap: list[tuple[float, int, ThreadGuard]] = []
        self._numbers = count()

    def arm(
        self,
        guard: ThreadGuard,
        connection: Any,
        slot: Slot | None,
        now: float,
        deadline: float,
    ) -> bool:
        """Have a connection cut off unless its guard is disarmed before the deadline.

        :return: whether the upkeep has to look by then.
        """
        is_news = guard.arm(connection, slot, now, deadline)
        if is_news:
            self._news.append((deadline, guard))
        return is_news

    def look(self, now: float) -> float:
        """Cut off what is overdue; return when to look again, infinity for no need to."""
        heap = self._heap
        self._take_news()
        while heap and heap[0][0] <= now:
            guard = heapq.heappop(heap)[2]
            deadline = guard.look(now)
            if deadline != inf:
                heapq.heappush(heap, (deadline, next(self._numbers), guard))
        return heap[0][0] if heap else inf

    def look_last(self, now: float) -> float:
        """Look at all before the upkeep goes to sleep for good; return when to look again."""
        self._take_news()
        heap, self._heap = self._heap, []
        for _, _, guard in heap:
            deadline = guard.look(now)
            if deadline != inf:
                self._news.append((deadline, guard))
        return min((deadline for deadline, _ in self._news), default=inf)

    def _take_news(self) -> None:
        while self._news:
            deadline, guard = self._news.popleft()
            heapq.heappush(self._heap, (deadline, next(self._numbers), guard))
