"""``?plugin=poolkit`` in a database URL: watched, or given another pool, without a line of code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import CreateEnginePlugin, Engine

from ..errors import ArgumentError
from ..pool.managed import ManagedPool
from ..pool.managed_async import AsyncManagedPool
from ..pool.monitored import AsyncMonitoredQueuePool, MonitoredQueuePool
from .monitor import watch_new

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.pool import Pool

__all__ = ["Plugin"]

_PREFIX = "poolkit_"
_KNOWN = ("poolkit_pool", "poolkit_pool_name", "poolkit_track")
# for threads, for asyncio
_POOLS: dict[str, tuple[type[Pool], type[Pool]]] = {
    "managed": (ManagedPool, AsyncManagedPool),
    "monitored": (MonitoredQueuePool, AsyncMonitoredQueuePool),
}


class Plugin(CreateEnginePlugin):
    """Watches an engine whose URL asks for it: ``postgresql://host/database?plugin=poolkit``.

    ``&poolkit_pool=managed`` makes it a ``ManagedPool``, with asyncio an ``AsyncManagedPool``, and
    ``monitored`` a ``MonitoredQueuePool``; a ``poolclass`` given to ``create_engine`` comes before.
    ``poolkit_pool_name`` and ``poolkit_track`` are the arguments of ``monitor``.

    :raises sqlalchemy.exc.ArgumentError: for an argument that begins with ``poolkit_`` and is none
        of these, and for a value that cannot be.
    """

    def __init__(self, url: URL, kwargs: dict[str, Any]) -> None:
        super().__init__(url, kwargs)
        self._options = _options_of(url)
        pool = self._options.pop("pool", None)
        if pool is None:
            return
        if pool not in _POOLS:
            raise ArgumentError(
                f"poolkit_pool={pool!r} is not possible; it must be one of {', '.join(_POOLS)}"
            )
        for_threads, for_asyncio = _POOLS[pool]
        if kwargs.get("poolclass") is None and kwargs.get("pool") is None:
            kwargs["poolclass"] = for_asyncio if kwargs.get("_is_async") else for_threads

    def update_url(self, url: URL) -> URL:
        """Return the URL as the driver may see it."""
        return url.difference_update_query(_KNOWN)

    def handle_pool_kwargs(self, pool_cls: type[Pool], pool_args: dict[str, Any]) -> None:
        """Hand the arguments to a pool that keeps its books itself."""
        if hasattr(pool_cls, "snapshot"):
            for name, value in self._options.items():
                pool_args.setdefault(name, value)

    def engine_created(self, engine: Engine) -> None:
        """Watch the engine."""
        watch_new(engine, **self._options)


def _options_of(url: URL) -> dict[str, str]:
    """Return the arguments that are meant for us, without their prefix."""
    options: dict[str, str] = {}
    for name, value in url.query.items():
        if not name.startswith(_PREFIX):
            continue
        if name not in _KNOWN:
            raise ArgumentError(
                f"{name} is no argument of ?plugin=poolkit; there are {', '.join(_KNOWN)}"
            )
        if not isinstance(value, str):
            raise ArgumentError(f"{name} stands in the URL more than once; write it once")
        options[name.removeprefix(_PREFIX)] = value
    return options
