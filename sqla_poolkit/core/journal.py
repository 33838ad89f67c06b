"""The journal of a pool: the last events, and those who want to hear of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from itertools import chain
from operator import itemgetter
from typing import Any, Protocol, TypeVar

from .events import CheckoutWaited, PoolEvent

__all__ = ["LONG_WAIT_SECONDS", "Journal", "Reader"]

LONG_WAIT_SECONDS = 1.0
"""A wait that is worth remembering."""
_REMEMBERED = 20  # of each kind

_Event = TypeVar("_Event", bound=PoolEvent)
Describe = Callable[[Hashable], tuple[str | None, str | None]]
"""Returns label and caller of a holder."""


class Reader(Protocol):
    """Somebody who wants to hear what happens."""

    def wants(self, kind: type[PoolEvent]) -> bool:
        """Tell whether events of this kind are of interest."""

    def put(self, event: PoolEvent, journal: Journal) -> None:
        """Take an event; called under the pool's lock, so only to put it somewhere."""

    def wake(self) -> None:
        """See to what was put; called after the lock was released."""


class Journal:
    """Events in the order in which they happened; guarded by the lock of the pool they are of.

    The last twenty of each kind are remembered, whether anybody reads or not: they explain an error
    after the fact, and a flood of one kind does not wash the others away.  To write one takes about
    three microseconds, so what happens at every checkout is not written at all, and waits only for
    those who want to hear of them.

    :param describe: tells label and caller of a holder.
    """

    def __init__(self, describe: Describe = lambda _: (None, None)) -> None:
        self.pool = "pool"
        """The name of the pool."""
        self.clock_offset = 0.0
        """What to add to the pool's clock for seconds since the epoch."""
        self.errors = 0
        """How many events did not reach a reader, or made one raise."""
        self.last_connect_error: str | None = None
        """What a driver said when connecting last failed, in a line that anybody may see."""
        self.readers: tuple[Reader, ...] = ()
        self.has_news = False
        """A reader was given something since they were last woken."""
        self.longest_untold_wait = LONG_WAIT_SECONDS
        """Shorter waits are not written."""
        self.describe = describe
        self._last: dict[type[PoolEvent], deque[tuple[int, PoolEvent]]] = {}
        """By kind, with a number for the order."""
        self._number = 0

    def write(self, kind: Callable[..., _Event], now: float, *details: Any) -> _Event:
        """Write an event down, and return it; ``details`` are its fields but the first two."""
        event = kind(self.pool, now + self.clock_offset, *details)
        kind_of = type(event)
        if kind_of not in self._last:
            self._last[kind_of] = deque(maxlen=_REMEMBERED)
        self._number += 1
        self._last[kind_of].append((self._number, event))
        for reader in self.readers:
            if reader.wants(kind_of):
                reader.put(event, self)
                self.has_news = True
        return event

    def write_of(
        self, kind: Callable[..., PoolEvent], now: float, holder: Hashable, *details: Any
    ) -> None:
        """Write an event down that is of somebody."""
        self.write(kind, now, *self.describe(holder), *details)

    def last(self) -> tuple[PoolEvent, ...]:
        """Return the last events of each kind, the newest last; under the pool's lock."""
        numbered = sorted(chain.from_iterable(self._last.values()), key=itemgetter(0))
        return tuple(event for _, event in numbered)

    def add(self, reader: Reader) -> None:
        """Have somebody told from now on."""
        self.readers = (*self.readers, reader)
        self._settle()

    def remove(self, reader: Reader) -> None:
        """Have somebody told no more."""
        self.readers = tuple(other for other in self.readers if other is not reader)
        self._settle()

    def _settle(self) -> None:
        is_wanted = any(reader.wants(CheckoutWaited) for reader in self.readers)
        self.longest_untold_wait = 0.0 if is_wanted else LONG_WAIT_SECONDS

    def wake_readers(self) -> None:
        """Have the readers see to what they were given; the pool's lock must not be held."""
        self.has_news = False  # first, for what is written meanwhile is news again
        for reader in self.readers:
            reader.wake()

    def start_over(self) -> None:
        """Forget what happened; in a forked child that was somebody else's."""
        self._last.clear()
        self.errors = 0
        self.last_connect_error = None
