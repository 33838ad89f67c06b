"""Keeps the ledger of one of SQLAlchemy's own pools."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

from sqlalchemy import exc

from ..config import Track
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

    What happens is put into a journal first and entered into the ledger under the lock: the
    garbage collector may return a connection in the middle of an entry.
    """

    def __init__(self, track: Track, *, is_asyncio: bool) -> None:
        self.name = "pool"
        self.track = track
        self.find_holder = holder_finder(track, is_asyncio=is_asyncio)
        self._lock = _sync.RLock()
        self._is_writing = _sync.ownership_of(self._lock)
        self._clock = _sync.monotonic
        self._journal: deque[tuple[Callable[..., None], float, tuple[Any, ...]]] = deque()
        self._numbers = count()
        self.ledger = Ledger(self._clock())

    def note(self, entry: Callable[..., None], *details: Hashable) -> float:
        """Enter something into the ledger; return the time that was written down."""
        now = self._clock()
        self._journal.append((entry, now, details))
        self._write()
        return now

    def _write(self) -> None:
        journal = self._journal
        while journal and not self._is_writing():
            with self._lock:
                while journal:
                    entry, now, details = journal.popleft()
                    entry(now, *details)

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

    def snapshot(self, pool: Pool, settings: dict[str, Any], max_size: int | None) -> PoolSnapshot:
        """Return one consistent reading."""
        self._write()
        with self._lock:
            values = self.ledger.read(
                self._clock(),
                describe_holder,
                has_callers=self.track != "label",
                max_size=max_size,
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
        self._journal.clear()
        self.ledger = Ledger(self._clock())
