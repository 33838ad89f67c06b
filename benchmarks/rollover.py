"""What callers feel when connections reach the end of their lives under load."""

from __future__ import annotations

from ._harness import (
    MANAGED_POOL,
    QUEUE_POOL,
    Contender,
    Load,
    Plan,
    StubServer,
    hot_threads,
    managed_pool,
    medians,
    on_stub,
    pairwise_ratios,
    percentile,
    psycopg_pool,
    queue_pool,
    sleeping,
)
from ._report import Row, Table, at_most, ratio_row

THREADS, CONNECTIONS = 16, 10
LIFETIME, CONNECT, HOLD = 1, 0.050, 0.002


def run(plan: Plan) -> Table:
    """Compare checkout times while every connection is replaced about once a second."""
    rounds, seconds = plan.pick(3, 1), plan.pick(5.0, 2.0)

    def measure(contender: Contender, server: StubServer) -> tuple[Load, int]:
        contender.warm(CONNECTIONS)
        load = hot_threads(contender, THREADS, seconds, sleeping(HOLD))
        return load, server.opened - CONNECTIONS

    results = on_stub(
        [
            queue_pool(CONNECTIONS, recycle=LIFETIME),
            *psycopg_pool(CONNECTIONS, max_lifetime=LIFETIME),
            managed_pool(CONNECTIONS, max_lifetime=LIFETIME),
        ],
        rounds,
        measure,
        lambda: StubServer(CONNECT),
    )
    tails = _quantiles(results, 0.999)
    figures: dict[str, dict[str, float]] = {
        "p50 checkout, ms": medians(_quantiles(results, 0.5)),
        "p99 checkout, ms": medians(_quantiles(results, 0.99)),
        "p99.9 checkout, ms": medians(tails),
        "worst checkout, ms": medians(_quantiles(results, 1.0)),
        "checkouts a second": medians(
            {name: [load.throughput for load, _ in runs] for name, runs in results.items()}
        ),
        "connections replaced": medians(
            {name: [replaced for _, replaced in runs] for name, runs in results.items()}
        ),
    }
    ratios = pairwise_ratios(tails[MANAGED_POOL], tails[QUEUE_POOL])
    return Table(
        f"rollover: {THREADS} hot threads on {CONNECTIONS} connections that live 1 s, "
        f"50 ms to connect, 2 ms hold, medians of {rounds} runs of {seconds:g} s",
        [
            *(Row(figure, values, "{:,.1f}") for figure, values in figures.items()),
            ratio_row(f"p99.9, {MANAGED_POOL} / {QUEUE_POOL}", ratios, at_most(0.2)),
        ],
    )


def _quantiles(results: dict[str, list[tuple[Load, int]]], q: float) -> dict[str, list[float]]:
    return {
        name: [percentile(load.waits, q) * 1e3 for load, _ in runs]
        for name, runs in results.items()
    }
