"""Who can use the same connections: a queue, and the idle connections beside it."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, get_args

from .policies import Pace
from .slots import Purpose, Request, Slot

__all__ = ["Lane"]


class Lane:
    """The callers who can use the same connections, and those connections.

    Threads share one lane.  A connection of asyncio belongs to the event loop that opened it, so
    each loop has a lane of its own.  Order, hand-off and growth are per lane; the limit, the books
    and ``max_connecting`` are the pool's.
    """

    __slots__ = (
        "closing",
        "connecting",
        "idle",
        "in_flight",
        "is_asleep",
        "key",
        "owed",
        "pace",
        "put_back",
        "queue",
        "size",
        "take",
    )

    take: Callable[[], Slot]
    """Takes the idle connection to be used next."""
    put_back: Callable[[Slot], None]
    """Undoes ``take``."""

    def __init__(self, key: Any = None) -> None:
        self.key = key
        """What the driver knows it by."""
        self.queue: OrderedDict[Request, None] = OrderedDict()
        """Who waits, in the order in which they asked."""
        self.idle: deque[Slot] = deque()
        """Ordered by the time of return: the oldest stands first."""
        self.is_asleep = False
        """Nobody drives it at present: its event loop is stopped."""
        self.size = 0
        """Places in use, whatever their state."""
        self.connecting = 0
        self.closing = 0
        self.owed = 0
        """Connections that were retired and are to be replaced."""
        self.in_flight: dict[Purpose, int] = dict.fromkeys(get_args(Purpose), 0)
        """Attempts that count towards ``max_connecting``, by what they are made for."""
        self.pace = Pace()
        self.use_lifo(True)

    def use_lifo(self, is_lifo: bool) -> None:
        """Use the connection again that came back last, or the one that came back first."""
        idle = self.idle
        self.take = idle.pop if is_lifo else idle.popleft
        self.put_back = idle.append if is_lifo else idle.appendleft

    def shelve(self, slot: Slot) -> None:
        """Put a connection among the idle ones, where the time of its return belongs."""
        idle = self.idle
        if not idle or idle[-1].idle_since <= slot.idle_since:
            idle.append(slot)
            return
        place = next(n for n, other in enumerate(idle) if other.idle_since > slot.idle_since)
        idle.insert(place, slot)

    @property
    def open(self) -> int:
        """How many connections are open: idle, checked out or being checked."""
        return self.size - self.connecting - self.closing

    @property
    def in_turn(self) -> int:
        """How many attempts count towards ``max_connecting``."""
        return sum(self.in_flight.values())

    def __repr__(self) -> str:
        return f"<Lane {self.open} open, {len(self.idle)} idle, {len(self.queue)} waiting>"
