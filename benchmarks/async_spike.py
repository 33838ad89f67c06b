"""Fifty tasks at once on a warm pool of five, where connecting is slow and queries are fast."""

from __future__ import annotations

import asyncio
import statistics

from ._async import (
    MANAGED_POOL,
    Contender,
    StubServer,
    in_tasks,
    managed_pool,
    on_stub,
    queue_pool,
)
from ._harness import Plan, medians, now
from ._report import Row, Table, at_most
from .spike import CALLERS, CONNECT, MAX_SIZE, QUERY, WARM, Spike


def run(plan: Plan) -> Table:
    """Compare how many connections a spike opens, and how long it takes."""
    rounds = plan.pick(11, 2)
    spikes = on_stub(
        [queue_pool(WARM, max_overflow=MAX_SIZE - WARM), managed_pool(MAX_SIZE, min_size=WARM)],
        rounds,
        _spike,
    )
    connections = {name: [float(s.connections) for s in runs] for name, runs in spikes.items()}
    seconds = {name: [s.seconds * 1e3 for s in runs] for name, runs in spikes.items()}
    waits = {name: [s.median_wait * 1e3 for s in runs] for name, runs in spikes.items()}
    bars = ((connections, "connections", 7, "{:.0f}"), (seconds, "all done, ms", 35, "{:.1f}"))
    rows = []
    for figures, what, limit, unit in bars:
        values, ours = medians(figures), figures[MANAGED_POOL]
        rows.append(Row(what, values, unit, values[MANAGED_POOL], unit, at_most(limit), ours))
    rows.append(Row("median wait, ms", medians(waits), "{:.1f}"))
    return Table(
        f"async_spike: {CALLERS} tasks, {WARM} of {MAX_SIZE} connections warm, 150 ms to connect, "
        f"2 ms to query, median of {rounds}",
        rows,
        ["connections = open at once at most, attempts that end after the spike included"],
    )


async def _spike(contender: Contender, server: StubServer) -> Spike:
    if contender.name == MANAGED_POOL:
        await contender.pool.wait_ready(timeout=10)
    await contender.warm(WARM)
    server.connect_seconds = CONNECT

    async def call(begin: float) -> tuple[float, float]:
        connection = await contender.checkout()
        had = now() - begin
        await asyncio.sleep(QUERY)
        await contender.checkin(connection)
        return had, now() - begin

    turns = await in_tasks(CALLERS, call)
    # What the pool has begun to open it will have: let attempts in flight come home.
    await asyncio.sleep(CONNECT * 1.5)
    return Spike(
        seconds=max(done for _, done in turns),
        connections=server.peak,
        median_wait=statistics.median(had for had, _ in turns),
    )
