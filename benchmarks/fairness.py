"""Who is served, and how long the others wait: 64 hot threads on few connections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import QueuePool

from ._harness import (
    MANAGED_POOL,
    QUEUE_POOL,
    Builder,
    Contender,
    Load,
    Plan,
    StubServer,
    hot_threads,
    interleave,
    jain,
    managed_pool,
    medians,
    on_stub,
    pairwise_ratios,
    percentile,
    psycopg_pool,
    queue_pool,
    sleeping,
)
from ._report import Bar, Row, Table, at_least, at_most, ratio_row

THREADS, SIZES = 64, (4, 8)
HOLD, SHORT_HOLD = 0.005, 0.001


class Figure(NamedTuple):
    """One number of a run, and what ours has to reach."""

    name: str
    value: Callable[[Load], float]
    unit: str
    bar: Bar | None


FIGURES = (
    Figure(
        "least / most served",
        lambda run: min(run.served) / max(run.served),
        "{:.3f}",
        at_least(0.9),
    ),
    Figure("Jain's index", lambda run: jain(run.served), "{:.2f}", None),
    Figure(
        "p99.9 wait / ideal",
        lambda run: percentile(run.waits, 0.999) / run.ideal,
        "{:.2f}",
        at_most(1.5),
    ),
    Figure("worst wait / ideal", lambda run: run.waits[-1] / run.ideal, "{:.2f}", at_most(2.0)),
    Figure("worst wait, ms", lambda run: run.waits[-1] * 1e3, "{:,.0f}", None),
    Figure("checkouts a second", lambda run: run.throughput, "{:,.0f}", None),
)
THROUGHPUT = "throughput, ratio"
THROUGHPUT_BAR = at_least(0.97)


def run(plan: Plan) -> Table:
    """Measure 5 ms holds on the stub and on PostgreSQL, and 1 ms holds without a bar."""
    pairs, seconds = plan.pick(5, 1), plan.pick(2.5, 2.0)
    table = Table(
        f"fairness: {THREADS} hot threads, medians of {pairs} interleaved runs of {seconds:g} s",
        notes=[
            "wait = from asking to having; ideal = threads / measured throughput",
            f"measured = {MANAGED_POOL}'s median; for throughput its ratio to {QUEUE_POOL}, by run",
            "psycopg_pool hands out bare connections: orientation",
        ],
    )
    for size in SIZES:
        loads = _stub(
            [queue_pool(size), *psycopg_pool(size), managed_pool(size)], size, HOLD, pairs, seconds
        )
        table.rows += _rows(f"{size} on the stub, 5 ms: ", loads)
    if plan.postgres is None:
        for size in SIZES:
            table.rows += _unmeasured(f"{size} on PostgreSQL, 5 ms: ")
    else:
        with plan.postgres() as url:
            for size in SIZES:
                loads = _postgres(url, size, pairs, seconds)
                table.rows += _rows(f"{size} on PostgreSQL, 5 ms: ", loads)
    for size in SIZES:
        loads = _stub(
            [queue_pool(size), managed_pool(size)],
            size,
            SHORT_HOLD,
            plan.pick(3, 1),
            plan.pick(1.5, 0.5),
        )
        table.rows += _rows(f"{size} on the stub, 1 ms: ", loads, barred=False)
    return table


def _stub(
    builders: list[Builder], size: int, hold: float, rounds: int, seconds: float
) -> dict[str, list[Load]]:
    def measure(contender: Contender, _server: StubServer) -> Load:
        contender.warm(size)
        return hot_threads(contender, THREADS, seconds, sleeping(hold))

    return on_stub(builders, rounds, measure)


def _postgres(url: str, size: int, rounds: int, seconds: float) -> dict[str, list[Load]]:
    from sqla_poolkit import ManagedPool

    settings: dict[str, dict[str, Any]] = {
        QUEUE_POOL: {"poolclass": QueuePool, "pool_size": size, "max_overflow": 0},
        MANAGED_POOL: {"poolclass": ManagedPool, "max_size": size},
    }
    loads: dict[str, list[Load]] = {name: [] for name in settings}
    for name in interleave(list(settings), rounds):
        # The same round trips for both: no pre-ping, the usual rollback on return.
        engine = create_engine(url, pool_pre_ping=False, **settings[name])
        # Only ours has a final close, which also ends its upkeep before the next run.
        close = getattr(engine.pool, "close", engine.dispose)
        contender = Contender(name, engine.pool, engine.connect, Connection.close, close)
        with closing(contender):
            contender.warm(size)
            loads[name].append(hot_threads(contender, THREADS, seconds, _pg_sleep))
    return loads


def _pg_sleep(connection: Connection) -> None:
    connection.exec_driver_sql(f"select pg_sleep({HOLD})")


def rows(
    what: str, loads: dict[str, list[Load]], ours: str, theirs: str, throughput_bar: Bar | None
) -> Iterator[Row]:
    """Say how evenly a load was served; without a bar on the throughput nothing is barred."""
    for name, value, unit, bar in FIGURES:
        by_run = {pool: [value(load) for load in runs] for pool, runs in loads.items()}
        values = medians(by_run)
        if bar is None or throughput_bar is None:
            yield Row(what + name, values, unit)
        else:
            yield Row(what + name, values, unit, values[ours], unit, bar, by_run[ours])
    throughput = {pool: [load.throughput for load in runs] for pool, runs in loads.items()}
    ratios = pairwise_ratios(throughput[ours], throughput[theirs])
    yield ratio_row(what + THROUGHPUT, ratios, throughput_bar)


def _rows(what: str, loads: dict[str, list[Load]], *, barred: bool = True) -> Iterator[Row]:
    return rows(what, loads, MANAGED_POOL, QUEUE_POOL, THROUGHPUT_BAR if barred else None)


def _unmeasured(what: str) -> Iterator[Row]:
    yield from (Row(what + figure.name, bar=figure.bar) for figure in FIGURES if figure.bar)
    yield Row(what + THROUGHPUT, bar=THROUGHPUT_BAR)
