"""QueuePool's methods and the few of its attributes that programs and tools look at."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._driver import Driver

__all__ = ["QueuePoolNames"]


class QueuePoolNames:
    """Answers as QueuePool does, from one consistent reading each."""

    _driver: Driver
    _is_asyncio = False

    def size(self) -> int:
        """Return ``pool_size``; 0 if there is no limit."""
        return self._driver.config.pool_size

    def checkedin(self) -> int:
        """Return the places that are not in use, as QueuePool with or without a connection."""
        free, _, empty = self._driver.readings()
        return free + empty

    def checkedout(self) -> int:
        """Return the connections in use."""
        return self._driver.readings()[1]

    def overflow(self) -> int:
        """Return the connections above ``pool_size``; negative while there are fewer."""
        size = self.size()
        return sum(self._driver.readings()) - size if size else 0

    def timeout(self) -> float | None:
        """Return ``pool_timeout`` in seconds."""
        return self._driver.config.timeout

    def status(self) -> str:
        """Return a line about the state, in QueuePool's words."""
        free, held, empty = self._driver.readings()
        size = self.size()
        overflow = free + held + empty - size if size else 0
        return (
            f"Pool size: {size}  Connections in pool: {free + empty} "
            f"Current Overflow: {overflow} Current Checked out connections: {held}"
        )

    @property
    def _timeout(self) -> float | None:
        return self.timeout()

    @_timeout.setter
    def _timeout(self, seconds: float | None) -> None:
        self._driver.reconfigure(replace(self._driver.config, timeout=seconds))

    @property
    def _overflow(self) -> int:
        return sum(self._driver.readings()) - self.size()

    @property
    def _max_overflow(self) -> int:
        config = self._driver.config
        return -1 if config.max_size is None else config.max_size - config.pool_size

    @_max_overflow.setter
    def _max_overflow(self, number: int) -> None:
        config = self._driver.config
        limit = None if number < 0 else config.pool_size + number
        self._driver.reconfigure(replace(config, max_size=limit))

    @property
    def _pool(self) -> _QueueView:
        return _QueueView(self._driver)


class _QueueView:
    """QueuePool's queue, to be looked at."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    @property
    def maxsize(self) -> int:
        return self._driver.config.pool_size

    @property
    def use_lifo(self) -> bool:
        return self._driver.config.use_lifo

    @property
    def queue(self) -> deque[Any]:
        return self._driver.idle_records()

    @queue.setter
    def queue(self, records: Any) -> None:
        self._driver.keep_spares(records)

    def qsize(self) -> int:
        return len(self.queue)

    def empty(self) -> bool:
        return not self.queue
