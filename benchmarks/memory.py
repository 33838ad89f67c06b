"""Bytes that a pool keeps for an idle connection, for a waiter and for itself."""

from __future__ import annotations

import gc
import statistics
import threading
import time
import tracemalloc
from collections.abc import Callable

from ._harness import (
    Builder,
    Contender,
    Plan,
    StubServer,
    managed_pool,
    medians,
    on_stub,
    psycopg_pool,
    queue_pool,
)
from ._report import Row, Table

REPEATS = 3


def run(plan: Plan) -> Table:
    """Compare what Python's allocator has given out, less what the stub and the threads take."""
    connections, waiters = plan.pick(2_000, 400), plan.pick(400, 100)
    tracemalloc.start()
    try:
        per_pool = _per_pool()
        per_connection = _per_connection(connections)
        per_waiter = _waiting(waiters)
    finally:
        tracemalloc.stop()
    return Table(
        "memory: bytes on Python's heap",
        [
            Row("an idle connection", per_connection, "{:,.0f}"),
            Row("a waiter", per_waiter, "{:,.0f}"),
            Row("a pool with one connection", per_pool, "{:,.0f}"),
        ],
        [
            f"connections: slope between {connections:,} and {2 * connections:,}, less the stub's",
            f"waiters: {waiters} of them, less the same threads on a bare lock",
            "each thread's stack comes on top, the same for all",
        ],
    )


def _pools(size: int) -> list[Builder]:
    return [queue_pool(size), *psycopg_pool(size), managed_pool(size)]


def _grown(action: Callable[[], object]) -> tuple[int, object]:
    """Return by how many bytes `action` grew the heap, and its result, which keeps them alive."""
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    result = action()
    gc.collect()
    return tracemalloc.get_traced_memory()[0] - before, result


def _per_pool() -> dict[str, int]:
    """Return the bytes of a pool with one connection; the first of its kind fills caches."""
    _open_pools(1)
    return _open_pools(1)


def _per_connection(count: int) -> dict[str, float]:
    """Return bytes per idle connection: the slope between two sizes."""
    few, many = _open_pools(count), _open_pools(2 * count)
    return {name: (many[name] - few[name]) / count for name in few}


def _open_pools(size: int) -> dict[str, int]:
    """Return each pool's bytes with `size` connections open, less what the stub takes."""
    server = StubServer()
    stub, _kept = _grown(lambda: [server.connect() for _ in range(size)])
    totals = {}
    for build in _pools(size):

        def fill(build: Builder = build) -> Contender:
            contender = build(StubServer())
            contender.warm(size)
            return contender

        grown, contender = _grown(fill)
        assert isinstance(contender, Contender)
        totals[contender.name] = grown - stub
        contender.close()
    return totals


def _waiting(count: int) -> dict[str, float]:
    """Return bytes per waiter."""
    lock = threading.Lock()
    nothing = Contender("a bare lock", None, lock.acquire, lambda _: lock.release(), lambda: None)
    _grown_by_waiters(nothing, count)  # what the first threads of a process leave behind
    threads = statistics.median(_grown_by_waiters(nothing, count) for _ in range(REPEATS))

    def measure(contender: Contender, _server: StubServer) -> float:
        return (_grown_by_waiters(contender, count) - threads) / count

    results = on_stub(_pools(1), REPEATS, measure)
    return medians(results)


def _grown_by_waiters(contender: Contender, count: int) -> int:
    held = contender.checkout()

    def call() -> None:
        contender.checkin(contender.checkout())

    def start() -> list[threading.Thread]:
        callers = [threading.Thread(target=call, daemon=True) for _ in range(count)]
        for caller in callers:
            caller.start()
        time.sleep(0.3)  # no pool but ours can say that all of them wait
        return callers

    grown, callers = _grown(start)
    contender.checkin(held)
    assert isinstance(callers, list)
    for caller in callers:
        caller.join()
    return grown
