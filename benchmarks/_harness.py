"""What the benchmarks share: a stub driver, the pools under test, threads and statistics."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import operator
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

from sqlalchemy.pool import QueuePool

T = TypeVar("T")

QUEUE_POOL = "QueuePool"
MANAGED_POOL = "ManagedPool"
PSYCOPG_POOL = "psycopg_pool"

now = time.perf_counter


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure, and which PostgreSQL to measure on."""

    quick: bool
    postgres: Callable[[], AbstractContextManager[str]] | None

    def pick(self, full: T, quick: T) -> T:
        """Choose between the value for a full run and the one for a quick look."""
        return quick if self.quick else full


# --- the stub driver ---------------------------------------------------------------------------


class StubError(Exception):
    """A connect that the stub server was told to refuse."""


class StubConnection:
    """A DBAPI connection with no server behind it.

    The same class serves every pool: ``rollback`` is what SQLAlchemy calls on return,
    ``pgconn.transaction_status`` (0 is idle) is what psycopg_pool looks at instead.
    """

    pgconn = SimpleNamespace(transaction_status=0)

    def __init__(self, server: StubServer) -> None:
        self._server = server

    def rollback(self) -> None:
        """Do nothing: no round trip, so that only the pool's own work is measured."""

    commit = rollback

    def close(self) -> None:
        """Tell the server."""
        self._server.closed()

    def __enter__(self) -> StubConnection:
        """Begin a block, as psycopg_pool's `connection()` does."""
        return self

    def __exit__(self, *_error: object) -> None:
        """End a block; the pool that made it takes the connection back."""


class StubServer:
    """A database server that costs nothing but the connect time it is given.

    `failing(n)` is asked with the running number of each attempt, from 1; true makes it fail.
    """

    def __init__(
        self, connect_seconds: float = 0.0, failing: Callable[[int], bool] | None = None
    ) -> None:
        self.connect_seconds = connect_seconds
        self.attempts: list[float] = []
        self.failures: list[float] = []
        self.opened = self.open = self.peak = 0
        self._failing = failing
        self._lock = threading.Lock()
        self._released = threading.Event()

    def connect(self) -> Any:  # a DBAPI connection as far as a pool looks at it
        """Open a connection after the connect time, or raise `StubError`."""
        with self._lock:
            self.attempts.append(now())
            number = len(self.attempts)
        if self.connect_seconds:
            self._released.wait(self.connect_seconds)
        if self._failing is not None and self._failing(number):
            self.failures.append(now())
            raise StubError(f"attempt {number} refused")
        with self._lock:
            self.opened += 1
            self.open += 1
            self.peak = max(self.peak, self.open)
        return StubConnection(self)

    def closed(self) -> None:
        """Count a connection that was closed."""
        with self._lock:
            self.open -= 1

    def release(self) -> None:
        """End connects in flight at once, so that a pool under a slow connect closes quickly."""
        self._released.set()


# --- the pools under test ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contender:
    """A pool under test, reduced to what every pool can do."""

    name: str
    pool: Any
    checkout: Callable[[], Any]
    checkin: Callable[[Any], object]
    close: Callable[[], object]

    def warm(self, connections: int) -> None:
        """Open `connections` by holding them all at once, whatever the pool's own warm-up is."""
        for connection in [self.checkout() for _ in range(connections)]:
            self.checkin(connection)


Builder = Callable[[StubServer], Contender]
_close = operator.methodcaller("close")


def of_sqlalchemy(name: str, pool: Any, close: Callable[[], object]) -> Contender:
    """Wrap a pool that speaks SQLAlchemy's interface."""
    return Contender(name, pool, pool.connect, _close, close)


def queue_pool(
    size: int, *, max_overflow: int = 0, name: str = QUEUE_POOL, **settings: Any
) -> Builder:
    """Build SQLAlchemy's own QueuePool."""

    def build(server: StubServer) -> Contender:
        pool = QueuePool(server.connect, pool_size=size, max_overflow=max_overflow, **settings)
        return of_sqlalchemy(name, pool, pool.dispose)

    return build


def managed_pool(size: int, *, name: str = MANAGED_POOL, **settings: Any) -> Builder:
    """Build ours."""
    from sqla_poolkit import ManagedPool  # late: --help and peers work without it

    def build(server: StubServer) -> Contender:
        pool = ManagedPool(server.connect, max_size=size, **settings)
        return of_sqlalchemy(name, pool, lambda: pool.close(timeout=1))

    return build


def psycopg_pool(size: int, *, min_size: int | None = None, **settings: Any) -> list[Builder]:
    """Build psycopg_pool over the stub; an empty list where it is not installed.

    It is here for orientation. It hands out bare connections, so it does less per checkout than a
    SQLAlchemy pool, which wraps each one and rolls it back on return.
    """
    if importlib.util.find_spec("psycopg_pool") is None:
        return []
    from psycopg_pool import ConnectionPool

    # Refused connects are what a benchmark is about; its warnings would fall between the tables.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)

    def build(server: StubServer) -> Contender:
        def connect(_conninfo: str, **_kwargs: object) -> Any:
            return server.connect()

        driver: Any = SimpleNamespace(connect=connect)
        pool: Any = ConnectionPool(
            connection_class=driver,
            min_size=size if min_size is None else min_size,
            max_size=size,
            open=True,
            **settings,
        )
        return Contender(PSYCOPG_POOL, pool, pool.getconn, pool.putconn, pool.close)

    return [build]


def interleave(items: Sequence[T], rounds: int) -> Iterator[T]:
    """Yield every item once a round, in changing order.

    Each round starts with another item, and after a full turn the direction changes: nobody
    always runs first, and nobody always runs after the same neighbour.
    """
    for number in range(rounds):
        turn, shift = divmod(number, len(items))
        order = [*items[shift:], *items[:shift]]
        yield from reversed(order) if turn % 2 else order


def on_stub(
    builders: Sequence[Builder],
    rounds: int,
    measure: Callable[[Contender, StubServer], T],
    make_server: Callable[[], StubServer] = StubServer,
) -> dict[str, list[T]]:
    """Measure each pool `rounds` times, interleaved, each time fresh on a fresh stub server."""
    results: dict[str, list[T]] = {}
    for build in interleave(builders, rounds):
        server = make_server()
        with closing(build(server)) as contender:
            results.setdefault(contender.name, []).append(measure(contender, server))
            server.release()
    return results


# --- threads -----------------------------------------------------------------------------------


def in_parallel(threads: int, work: Callable[[int, float], T], limit: float = 90.0) -> list[T]:
    """Call `work(number, begin)` in so many threads released by one barrier; give the results.

    `begin` is the moment when all of them stood ready. The first exception is raised here. A
    thread that is not back after `limit` seconds fails the benchmark instead of hanging it.
    """
    begin = 0.0

    def start() -> None:
        nonlocal begin
        begin = now()

    results: dict[int, T] = {}
    errors: list[BaseException] = []
    barrier = threading.Barrier(threads, action=start)

    def run(number: int) -> None:
        try:
            barrier.wait()
            results[number] = work(number, begin)
        except BaseException as error:  # noqa: BLE001  # raised in the caller's thread below
            errors.append(error)

    workers = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(threads)]
    for worker in workers:
        worker.start()
    give_up = now() + limit
    for worker in workers:
        worker.join(max(0.0, give_up - now()))
    if errors:
        raise errors[0]
    if len(results) < threads:
        raise TimeoutError(f"{threads - len(results)} of {threads} threads did not come back")
    return [results[number] for number in range(threads)]


@dataclass(frozen=True, slots=True)
class Load:
    """What hot threads got: `waits` are checkout times, sorted; `served` counts per thread."""

    served: list[int]
    waits: list[float]
    seconds: float

    @property
    def throughput(self) -> float:
        """Checkouts a second."""
        return sum(self.served) / self.seconds

    @property
    def ideal(self) -> float:
        """The time from one turn to the next if all threads take turns at this throughput."""
        return len(self.served) / self.throughput


def hot_threads(
    contender: Contender, threads: int, seconds: float, hold: Callable[[Any], object]
) -> Load:
    """Let threads check out, hold, return and ask again at once, for `seconds`."""
    checkout, checkin = contender.checkout, contender.checkin

    def work(_number: int, begin: float) -> tuple[int, list[float]]:
        stop = begin + seconds
        turns: list[tuple[float, float]] = []
        asked = now()
        while asked < stop:
            connection = checkout()
            turns.append((asked, now()))
            hold(connection)
            checkin(connection)
            asked = now()
        # A turn that was asked for in time but came after the end is a wait, not throughput.
        return sum(had <= stop for _, had in turns), [had - asked for asked, had in turns]

    served, waits = zip(*in_parallel(threads, work), strict=True)
    return Load(list(served), sorted(itertools.chain.from_iterable(waits)), seconds)


def sleeping(seconds: float) -> Callable[[Any], None]:
    """Hold a stub connection for `seconds`."""
    return lambda _connection: time.sleep(seconds)


# --- statistics --------------------------------------------------------------------------------


def percentile(values: Sequence[float], q: float) -> float:
    """Return the smallest of the sorted `values` that at least a fraction `q` does not exceed."""
    return values[max(0, math.ceil(q * len(values)) - 1)]


def jain(counts: Sequence[float]) -> float:
    """Return Jain's fairness index: 1 is equal shares, 1/n is one who gets everything.

    Jain, Chiu, Hawe: A Quantitative Measure of Fairness, DEC-TR-301, 1984.
    """
    squares = sum(count * count for count in counts)
    return sum(counts) ** 2 / (len(counts) * squares) if squares else 0.0


def pairwise_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Divide round by round, because the machine's mood changes between rounds, not within one."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def medians(results: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return each pool's median."""
    return {name: statistics.median(values) for name, values in results.items()}


def wait_until(condition: Callable[[], bool], limit: float = 10.0) -> None:
    """Poll until `condition` holds; for set-up, never inside what is measured."""
    give_up = now() + limit
    for pause in itertools.repeat(0.002):
        if condition():
            return
        if now() > give_up:
            raise TimeoutError("the set-up of a benchmark did not get ready")
        time.sleep(pause)
