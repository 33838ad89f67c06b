"""Who is served, and how long the others wait: 64 looping tasks on few connections."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from ._async import (
    MANAGED_POOL,
    QUEUE_POOL,
    Contender,
    StubServer,
    hot_tasks,
    managed_pool,
    on_stub,
    queue_pool,
)
from ._harness import Load, Plan
from ._report import Bar, Row, Table, at_least
from .fairness import rows

TASKS, SIZE = 64, 8
HOLD, SHORT_HOLD = 0.005, 0.001
THROUGHPUT_BAR = at_least(0.98)


def run(plan: Plan) -> Table:
    """Measure 5 ms holds on the stub, and 1 ms holds without a bar."""
    pairs, seconds = plan.pick(5, 1), plan.pick(4.0, 2.0)
    table = Table(
        f"async_fairness: {TASKS} looping tasks on {SIZE} connections, stub, "
        f"medians of {pairs} interleaved runs of {seconds:g} s",
        notes=[
            "wait = from asking to having; ideal = tasks / measured throughput",
            f"measured = {MANAGED_POOL}'s median; for throughput its ratio to {QUEUE_POOL}, by run",
        ],
    )
    table.rows += _rows("5 ms: ", _loads(HOLD, pairs, seconds), THROUGHPUT_BAR)
    table.rows += _rows("1 ms: ", _loads(SHORT_HOLD, pairs, seconds / 2), None)
    return table


def _loads(hold: float, pairs: int, seconds: float) -> dict[str, list[Load]]:
    async def rest(_connection: Any) -> None:
        await asyncio.sleep(hold)

    async def measure(contender: Contender, _server: StubServer) -> Load:
        await contender.warm(SIZE)
        return await hot_tasks(contender, TASKS, seconds, rest)

    return on_stub([queue_pool(SIZE), managed_pool(SIZE)], pairs, measure)


def _rows(what: str, loads: dict[str, list[Load]], bar: Bar | None) -> Iterator[Row]:
    return rows(what, loads, MANAGED_POOL, QUEUE_POOL, bar)
