"""Fifty callers at once on a warm pool of five, where connecting is slow and queries are fast."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from ._harness import (
    MANAGED_POOL,
    Contender,
    Plan,
    StubServer,
    in_parallel,
    managed_pool,
    medians,
    now,
    on_stub,
    psycopg_pool,
    queue_pool,
)
from ._report import Row, Table, at_most

CALLERS, WARM, MAX_SIZE = 50, 5, 50
CONNECT, QUERY = 0.150, 0.002


@dataclass(frozen=True, slots=True)
class Spike:
    """What one spike led to."""

    seconds: float
    connections: int
    median_wait: float


def run(plan: Plan) -> Table:
    """Compare how many connections a spike opens, and how long it takes."""
    rounds = plan.pick(7, 2)
    spikes = on_stub(
        [
            queue_pool(WARM, max_overflow=MAX_SIZE - WARM),
            *psycopg_pool(MAX_SIZE, min_size=WARM),
            managed_pool(MAX_SIZE, min_size=WARM),
        ],
        rounds,
        _spike,
    )
    connections = {name: [float(s.connections) for s in runs] for name, runs in spikes.items()}
    seconds = {name: [s.seconds * 1e3 for s in runs] for name, runs in spikes.items()}
    waits = {name: [s.median_wait * 1e3 for s in runs] for name, runs in spikes.items()}
    bars = ((connections, "connections", 7), (seconds, "all done, ms", 35))
    rows = []
    for figures, what, limit in bars:
        values, ours = medians(figures), figures[MANAGED_POOL]
        rows.append(
            Row(what, values, "{:.0f}", values[MANAGED_POOL], "{:.0f}", at_most(limit), ours)
        )
    rows.append(Row("median wait, ms", medians(waits), "{:.0f}"))
    return Table(
        f"spike: {CALLERS} callers, {WARM} of {MAX_SIZE} connections warm, 150 ms to connect, "
        f"2 ms to query, median of {rounds}",
        rows,
        ["connections = open at once at most, attempts that end after the spike included"],
    )


def _spike(contender: Contender, server: StubServer) -> Spike:
    if contender.name == MANAGED_POOL:
        contender.pool.wait_ready(timeout=10)
    contender.warm(WARM)
    server.connect_seconds = CONNECT

    def call(_number: int, begin: float) -> tuple[float, float]:
        connection = contender.checkout()
        had = now() - begin
        time.sleep(QUERY)
        contender.checkin(connection)
        return had, now() - begin

    turns = in_parallel(CALLERS, call)
    # What the pool has begun to open it will have: let attempts in flight come home.
    time.sleep(CONNECT * 1.5)
    return Spike(
        seconds=max(done for _, done in turns),
        connections=server.peak,
        median_wait=statistics.median(had for had, _ in turns),
    )
