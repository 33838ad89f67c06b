"""A clock that stands still until it is moved: a test of an hour is over at once."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from ..errors import ArgumentError
from ..pool import _sync
from ..pool._loops import LoopDriver
from ..pool._registry import living_keepers
from ..pool._threads import ThreadDriver

__all__ = ["FakeClock"]


class FakeClock:
    """The clock of the pools that are made inside its block; it only moves forward, by hand.

    Use it to see connections age, without sleeping::

        with FakeClock() as clock:
            engine = create_engine(url, poolclass=ManagedPool, idle_timeout=60)
            with engine.connect():
                pass
            clock.move(61)
            assert snapshot(engine).open == 0

    A ``ManagedPool`` made meanwhile has ``upkeep="inline"``, whatever it is told: it starts no
    threads, and what became due is done before :meth:`move` returns.  A caller that waits does so
    until another thread moves the clock.  An ``AsyncManagedPool`` does what became due as its loop
    turns: ``await asyncio.sleep(0.01)``.  Pools made before the block keep the real time.  After
    it the clock goes on from where it stands, as fast as the real one.
    """

    def __init__(self) -> None:
        self._real_clocks = (_sync.monotonic, _sync.wall_clock)
        self._now = _sync.monotonic()
        self._wall_offset = _sync.wall_clock() - self._now
        self._before: tuple[Any, Any, bool] | None = None
        """What this one stands in for; None until it is installed."""
        self._released_at: float | None = None

    def __call__(self) -> float:
        """Return the time in seconds, as ``time.monotonic`` does."""
        if self._released_at is None:
            return self._now
        return self._now + self._real_clocks[0]() - self._released_at

    def move(self, seconds: float) -> None:
        """Let so many seconds pass, in one step, and have done what became due.

        :raises sqlalchemy.exc.ArgumentError: for a negative number; time does not go back.
        """
        if not seconds >= 0:
            raise ArgumentError(f"a clock moves forward only, not by {seconds!r} seconds")
        self._now += seconds
        for keeper in living_keepers():
            if isinstance(keeper, ThreadDriver | LoopDriver) and keeper.clock is self:
                keeper.time_moved()

    def wall_clock(self) -> float:
        """Return the time of day that goes with it, as ``time.time`` does."""
        return self() + self._wall_offset

    def __enter__(self) -> FakeClock:
        if self._before is not None:
            raise ArgumentError("this FakeClock is installed already; a second one can be as well")
        self._before = (_sync.monotonic, _sync.wall_clock, _sync.is_steered)
        _sync.monotonic, _sync.wall_clock, _sync.is_steered = self, self.wall_clock, True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._before is not None:
            _sync.monotonic, _sync.wall_clock, _sync.is_steered = self._before
        self._released_at = self._real_clocks[0]()
