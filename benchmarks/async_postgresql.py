"""Two hundred tasks with short queries on ten connections of a real PostgreSQL, by asyncpg."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from ._async import (
    MANAGED_POOL,
    QUEUE_POOL,
    asyncpg_url,
    engine_for,
    engine_settings,
    hot_tasks,
    of_engine,
    why_no_asyncpg,
)
from ._harness import Load, Plan, interleave, jain, medians, pairwise_ratios, percentile
from ._report import Row, Table, at_least, at_most, ratio_row

TASKS, SIZE = 200, 10
AGAIN = "theirs again"
PINGED = "theirs, pre-ping"
DEFAULTS = "ours, defaults"
FIGURES = (
    ("queries a second", lambda load: load.throughput, "{:,.0f}"),
    ("median wait, ms", lambda load: percentile(load.waits, 0.5) * 1e3, "{:,.1f}"),
    ("p99 wait, ms", lambda load: percentile(load.waits, 0.99) * 1e3, "{:,.1f}"),
    ("worst wait, ms", lambda load: load.waits[-1] * 1e3, "{:,.1f}"),
    ("Jain's index", lambda load: jain(load.served), "{:.3f}"),
)
THROUGHPUT, WAIT = "throughput", "p99 wait"
BARS = {THROUGHPUT: at_least(1.0), WAIT: at_most(0.5)}


def run(plan: Plan) -> Table:
    """Compare throughput and waits, without pings on either side, then with."""
    rounds, seconds = plan.pick(7, 1), plan.pick(3.0, 1.0)
    table = Table(
        f"async_postgresql: {TASKS} tasks on {SIZE} connections, select 1, asyncpg, "
        f"medians of {rounds} interleaved runs of {seconds:g} s",
        notes=[
            "through create_async_engine; wait = from asking to having; ratios by run",
            f"the barred rows: pool_pre_ping=False for both, which is the default of {QUEUE_POOL}",
            f"{DEFAULTS}: only the size is set; what was used a moment ago is only looked at",
            f"{AGAIN}: the same pool once more, to show how much of a ratio is chance",
        ],
    )
    missing = why_no_asyncpg(plan)
    if missing is not None:
        table.rows += [
            Row(f"{what}: {MANAGED_POOL} / {QUEUE_POOL}", bar=bar) for what, bar in BARS.items()
        ]
        table.notes.append(missing)
        return table
    with asyncpg_url(plan) as url:
        table.rows += _rows(_measure(url, rounds, seconds))
    return table


def _settings() -> dict[str, dict[str, Any]]:
    fair = engine_settings(SIZE)
    defaults = {key: value for key, value in fair[MANAGED_POOL].items() if key != "pool_pre_ping"}
    return {
        **fair,
        AGAIN: fair[QUEUE_POOL],
        PINGED: {**fair[QUEUE_POOL], "pool_pre_ping": True},
        DEFAULTS: defaults,
    }


def _measure(url: str, rounds: int, seconds: float) -> dict[str, list[Load]]:
    settings = _settings()
    loads: dict[str, list[Load]] = {name: [] for name in settings}
    for name in interleave(list(settings), rounds):
        loads[name].append(asyncio.run(_load(url, name, settings[name], seconds)))
    return loads


async def _load(url: str, name: str, settings: dict[str, Any], seconds: float) -> Load:
    contender = of_engine(name, engine_for(url, settings))
    try:
        await contender.warm(SIZE)
        return await hot_tasks(contender, TASKS, seconds, _query)
    finally:
        await contender.close()


async def _query(connection: AsyncConnection) -> None:
    await connection.exec_driver_sql("select 1")


def _rows(loads: dict[str, list[Load]]) -> Iterator[Row]:
    for what, value, unit in FIGURES:
        by_run = {name: [value(load) for load in runs] for name, runs in loads.items()}
        yield Row(what, medians(by_run), unit)
    throughput = {name: [load.throughput for load in runs] for name, runs in loads.items()}
    waits = {name: [percentile(load.waits, 0.99) for load in runs] for name, runs in loads.items()}
    for what, figures in ((THROUGHPUT, throughput), (WAIT, waits)):
        for ours, theirs, bar in (
            (MANAGED_POOL, QUEUE_POOL, BARS[what]),
            (AGAIN, QUEUE_POOL, None),
            (DEFAULTS, PINGED, None),
            (DEFAULTS, QUEUE_POOL, None),
        ):
            ratios = pairwise_ratios(figures[ours], figures[theirs])
            yield ratio_row(f"{what}: {ours} / {theirs}", ratios, bar)
