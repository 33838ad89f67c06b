"""The pools of this process, each under a name of its own as long as it lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from ..core.events import PoolEvent
from ..core.journal import Journal

__all__ = [
    "Keeper",
    "connecting",
    "keeper_of",
    "living_books",
    "living_keepers",
    "living_pools",
    "name_of",
    "newcomers",
    "register",
    "unregister",
    "when_connecting",
]


class Keeper(Protocol):
    """Keeps the books of a pool, and of those that take its place."""

    journal: Journal
    """What happens there."""

    def events(self) -> tuple[PoolEvent, ...]:
        """Return the last events, the newest last."""

    def tell(self, kind: type[PoolEvent], *details: Any) -> None:
        """Write an event down that happened just now, and have the readers see to it."""

    def served_pool(self) -> Any:
        """Return the pool whose books these are now; None if all are gone."""

    def is_over(self) -> bool:
        """Tell whether the pool was closed for good, so that another one may have its name."""


newcomers: list[Callable[[Keeper], None]] = []
"""Called with each keeper that registers."""
_keepers: weakref.WeakValueDictionary[str, Keeper] = weakref.WeakValueDictionary()
_nameless: weakref.WeakSet[Keeper] = weakref.WeakSet()
"""Those of closed pools whose names others have now."""


_told_of_connects: list[Callable[[], None]] = []


def when_connecting(act: Callable[[], None]) -> None:
    """Have ``act`` called before each attempt to connect, the sign that this process uses a pool.

    A process that only starts others has pools too, and should have no threads.
    """
    _told_of_connects.append(act)


def connecting() -> None:
    """Say that a pool is about to connect."""
    for act in _told_of_connects:
        act()


def register(wanted: str, keeper: Keeper) -> str:
    """Return the keeper's name: ``wanted``, or ``wanted#2`` and so on if that is taken.

    A pool that was closed leaves its name to the next one that wants it.
    """
    name, number = wanted, 1
    while (owner := _keepers.get(name)) is not None and not owner.is_over():
        number += 1
        name = f"{wanted}#{number}"
    if owner is not None:
        _nameless.add(owner)
    _keepers[name] = keeper
    for greet in newcomers:
        greet(keeper)
    return name


def unregister(name: str) -> None:
    """Give a name free."""
    _keepers.pop(name, None)


def living_keepers() -> list[Keeper]:
    """Return all who keep books in this process, sorted by name."""
    return [keeper for _, keeper in sorted(_keepers.items())]


def keeper_of(pool: Any) -> Keeper | None:
    """Return who keeps the books of a pool; None if nobody does."""
    keepers = (*living_keepers(), *_nameless)
    return next((each for each in keepers if each.served_pool() is pool), None)


def living_pools() -> list[Any]:
    """Return the pools of this process that keep books, sorted by name.

    For one that keeps none itself, whoever keeps them.
    """
    return [pool for _, pool in living_books()]


def living_books() -> list[tuple[Keeper, Any]]:
    """Return what can be asked for a snapshot, with who keeps its books, sorted by name.

    That is the pool itself if it keeps them, else its monitor.  The keeper stays when
    ``engine.dispose()`` replaces the pool.
    """
    pools = [(keeper, keeper.served_pool()) for keeper in living_keepers()]
    return [
        (keeper, pool if hasattr(pool, "snapshot") else keeper)
        for keeper, pool in pools
        if pool is not None
    ]


def name_of(pool: Any) -> str | None:
    """Return the name of a pool that keeps books; None if it keeps none, or has a successor."""
    keeper = keeper_of(pool)
    return None if keeper is None else keeper.journal.pool
