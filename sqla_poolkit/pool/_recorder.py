"""Keeps the ledger of one of SQLAlchemy's own pools."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

from sqlalchemy import exc

from ..config import Track
from ..core.events import PoolEvent
from ..core.journal import Journal
from ..core.ledger import Ledger
from ..core.snapshot import PoolSnapshot
from . import _sync
from ._callers import describe_holder, holder_finder

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from sqlalchemy.pool import Pool

__all__ = ["Recorder"]


class Recorder:
    """Writes down what a pool does, in order, from any thread.

    What happens is noted first and entered into the ledger under the lock: the
    garbage collector may return a connection in the middle of an entry.
    """

    def __init__(self, track: Track, *, is_asyncio: bool) -> None:
        self.track = track
        self.find_holder = holder_finder(track, is_asyncio=is_asyncio)
        self._lock = _sync.RLock()
        self._is_writing = _sync.ownership_of(self._lock)
        self._clock = _sync.monotonic
        self._notes: deque[tuple[Callable[..., object], float, tuple[Any, ...]]] = deque()
        self._numbers = count()
        self._served: weakref.ref[Pool] | None = None
        self.journal = Journal(describe_holder)
        self.journal.clock_offset = _sync.wall_clock() - self._clock()
        self.ledger = Ledger(self._clock(), self.journal)

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.journal.pool

    @name.setter
    def name(self, name: str) -> None:
        self.journal.pool = name

    def serve(self, pool: Pool) -> None:
        """Keep the books of this pool from now on."""
        self._served = weakref.ref(pool)

    def served_pool(self) -> Pool | None:
        """Return the pool whose books these are now; None if it is gone."""
        return None if self._served is None else self._served()

    def note(self, entry: Callable[..., object], *details: Hashable) -> float:
        """Enter something into the ledger; return the time that was written down."""
        now = self._clock()
        self._notes.append((entry, now, details))
        self._write()
        return now

    def _write(self) -> None:
        notes = self._notes
        while notes and not self._is_writing():
            with self._lock:
                while notes:
                    entry, now, details = notes.popleft()
                    entry(now, *details)
            if self.journal.has_news:
                self.journal.wake_readers()

    @contextmanager
    def request(self) -> Iterator[int]:
        """Note a caller who asks, and that it failed if it did; serving it is noted by the pool."""
        request = next(self._numbers)
        self.note(self.ledger.asked, request, self.find_holder())
        try:
            yield request
        except BaseException as error:
            if isinstance(error, exc.TimeoutError):
                outcome = "timeout"
            else:
                outcome = "failed" if isinstance(error, Exception) else "cancelled"
            self.note(self.ledger.failed, request, outcome)
            raise

    @contextmanager
    def waiting(self, request: int | None) -> Iterator[None]:
        """Note that a caller waits while the block runs."""
        self.note(self.ledger.wait_began, request)
        try:
            yield
        finally:
            self.note(self.ledger.wait_ended, request)

    def is_over(self) -> bool:
        """Tell whether the pool was closed for good: SQLAlchemy's never are."""
        return False

    def tell(self, kind: type[PoolEvent], *details: Any) -> None:
        """Write an event down that happened just now, and have the readers see to it."""
        self.note(lambda now: self.journal.write(kind, now, *details))

    def events(self) -> tuple[PoolEvent, ...]:
        """Return the last events, the newest last."""
        self._write()
        with self._lock:
            return self.journal.last()

    def snapshot(
        self,
        pool: Pool,
        settings: dict[str, Any],
        max_size: int | None,
        *,
        has_rows: bool = True,
    ) -> PoolSnapshot:
        """Return one consistent reading; without ``has_rows`` its ``labels`` are left out."""
        self._write()
        with self._lock:
            values = self.ledger.read(
                self._clock(),
                describe_holder,
                has_callers=self.track != "label",
                max_size=max_size,
                has_rows=has_rows,
            )
        return PoolSnapshot(
            name=self.name,
            pool_class=type(pool).__name__,
            pid=os.getpid(),
            taken_at=_sync.wall_clock(),
            settings={"name": self.name, "track": self.track, **settings},
            min_size=0,
            **values,
        )

    def after_fork_in_child(self) -> None:
        """Start over with empty books; the parent's connections are not counted here."""
        self._lock = _sync.RLock()
        self._is_writing = _sync.ownership_of(self._lock)
        self._notes.clear()
        self.journal.start_over()
        self.ledger = Ledger(self._clock(), self.journal)
