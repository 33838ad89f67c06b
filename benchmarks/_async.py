"""What the asyncio benchmarks share: a stub driver, the two pools, tasks, the way to asyncpg."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.engine import make_url
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.util import await_only, greenlet_spawn

from ._harness import Load, Plan, interleave, now

T = TypeVar("T")

QUEUE_POOL = "AsyncAdaptedQueuePool"
MANAGED_POOL = "AsyncManagedPool"
DRIVER = "postgresql+asyncpg"


# --- the stub driver ---------------------------------------------------------------------------


class StubDialect(DefaultDialect):
    """SQLAlchemy's way to the stub; each pool gets an instance of its own."""

    name = driver = "stub"
    is_async = True
    supports_statement_cache = True


class StubConnection:
    """An asyncio DBAPI connection with no server behind it, on which nothing was executed.

    Its rollback awaits nothing, as asyncpg's does where no transaction was begun.
    """

    def __init__(self, server: StubServer) -> None:
        self._server = server

    def rollback(self) -> None:
        """Do nothing: no round trip, so that only the pool's own work is measured."""

    commit = rollback

    def close(self) -> None:
        """Say goodbye and tell the server."""
        await_only(asyncio.sleep(0))
        self._server.open -= 1


class UsedStubConnection(StubConnection):
    """One on which something was executed: to roll back is to hand over to the loop once."""

    def rollback(self) -> None:
        """Wait for an answer that is there at once."""
        await_only(asyncio.sleep(0))

    commit = rollback


class StubServer:
    """A database server that costs nothing but the connect time it is given."""

    def __init__(self, connection_class: type[StubConnection] = UsedStubConnection) -> None:
        self.connect_seconds = 0.0
        self.open = self.peak = 0
        self._connection_class = connection_class

    def connect(self) -> Any:  # a DBAPI connection as far as a pool looks at it
        """Open a connection after the connect time."""
        await_only(asyncio.sleep(self.connect_seconds))
        self.open += 1
        self.peak = max(self.peak, self.open)
        return self._connection_class(self)


# --- the pools under test ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contender:
    """A pool under test, reduced to what both pools can do."""

    name: str
    pool: Any
    checkout: Callable[[], Awaitable[Any]]
    checkin: Callable[[Any], Awaitable[object]]
    close: Callable[[], Awaitable[object]]

    async def warm(self, connections: int) -> None:
        """Open `connections` by holding them all at once, whatever the pool's own warm-up is."""
        held = await asyncio.gather(*(self.checkout() for _ in range(connections)))
        for connection in held:
            await self.checkin(connection)


Builder = Callable[[StubServer], Contender]


def queue_pool(
    size: int, *, max_overflow: int = 0, name: str = QUEUE_POOL, **settings: Any
) -> Builder:
    """Build SQLAlchemy's own pool."""

    def build(server: StubServer) -> Contender:
        pool = AsyncAdaptedQueuePool(
            server.connect,
            pool_size=size,
            max_overflow=max_overflow,
            dialect=StubDialect(),
            **settings,
        )
        return _on_greenlets(name, pool, lambda: greenlet_spawn(pool.dispose))

    return build


def managed_pool(size: int, *, name: str = MANAGED_POOL, **settings: Any) -> Builder:
    """Build ours; without pings, which the stub could not answer, and which theirs does not do."""
    from sqla_poolkit import AsyncManagedPool  # late: --help works without it

    def build(server: StubServer) -> Contender:
        pool = AsyncManagedPool(
            server.connect, max_size=size, pre_ping=False, dialect=StubDialect(), **settings
        )
        return _on_greenlets(name, pool, lambda: pool.close(timeout=1))

    return build


def _on_greenlets(name: str, pool: Any, close: Callable[[], Awaitable[object]]) -> Contender:
    """Call a pool as AsyncEngine does: each operation in a greenlet of its own."""
    return Contender(
        name,
        pool,
        lambda: greenlet_spawn(pool.connect),
        lambda connection: greenlet_spawn(connection.close),
        close,
    )


def of_engine(name: str, engine: AsyncEngine) -> Contender:
    """Go an application's way."""
    # Only ours has a final close, which also ends its upkeep before the next run.
    close = getattr(engine.pool, "close", engine.dispose)
    return Contender(name, engine.pool, engine.connect, AsyncConnection.close, close)


def on_stub(
    builders: Sequence[Builder],
    rounds: int,
    measure: Callable[[Contender, StubServer], Awaitable[T]],
) -> dict[str, list[T]]:
    """Measure each pool `rounds` times, interleaved, each time fresh on a fresh loop and server."""
    results: dict[str, list[T]] = {}

    async def once(build: Builder) -> None:
        server = StubServer()
        contender = build(server)
        try:
            results.setdefault(contender.name, []).append(await measure(contender, server))
        finally:
            await contender.close()

    for build in interleave(builders, rounds):
        asyncio.run(once(build))
    return results


# --- tasks -------------------------------------------------------------------------------------


async def in_tasks(tasks: int, work: Callable[[float], Awaitable[T]]) -> list[T]:
    """Await `work(begin)` in so many tasks that start together; give the results."""
    begin = now()
    return await asyncio.gather(*(work(begin) for _ in range(tasks)))


async def hot_tasks(
    contender: Contender, tasks: int, seconds: float, hold: Callable[[Any], Awaitable[object]]
) -> Load:
    """Let tasks check out, hold, return and ask again at once, for `seconds`."""
    checkout, checkin = contender.checkout, contender.checkin

    async def work(begin: float) -> tuple[int, list[float]]:
        stop = begin + seconds
        turns: list[tuple[float, float]] = []
        asked = now()
        while asked < stop:
            connection = await checkout()
            turns.append((asked, now()))
            await hold(connection)
            await checkin(connection)
            asked = now()
        # A turn that was asked for in time but came after the end is a wait, not throughput.
        return sum(had <= stop for _, had in turns), [had - asked for asked, had in turns]

    served, waits = zip(*await in_tasks(tasks, work), strict=True)
    return Load(list(served), sorted(itertools.chain.from_iterable(waits)), seconds)


# --- a real server -----------------------------------------------------------------------------


def why_no_asyncpg(plan: Plan) -> str | None:
    """Say what is missing for figures on PostgreSQL, None if nothing is."""
    if importlib.util.find_spec("asyncpg") is None:
        return "not measured: asyncpg is not installed (pip install asyncpg)"
    return "not measured: --postgres none" if plan.postgres is None else None


@contextmanager
def asyncpg_url(plan: Plan) -> Iterator[str]:
    """Open the server for a while; give its URL for asyncpg."""
    if plan.postgres is None:
        raise ValueError("there is no PostgreSQL; ask why_no_asyncpg first")
    with plan.postgres() as url:
        yield make_url(url).set(drivername=DRIVER).render_as_string(hide_password=False)


def engine_settings(size: int, **settings: Any) -> dict[str, dict[str, Any]]:
    """Return arguments of `create_async_engine` for both pools, the same limit and no pre-ping."""
    from sqla_poolkit import AsyncManagedPool

    both = {"pool_pre_ping": False, **settings}
    return {
        QUEUE_POOL: {
            "poolclass": AsyncAdaptedQueuePool,
            "pool_size": size,
            "max_overflow": 0,
            **both,
        },
        MANAGED_POOL: {"poolclass": AsyncManagedPool, "max_size": size, **both},
    }


def engine_for(url: str, settings: dict[str, Any]) -> AsyncEngine:
    """Make an engine; here so that every asyncio benchmark makes it the same way."""
    return create_async_engine(url, **settings)
