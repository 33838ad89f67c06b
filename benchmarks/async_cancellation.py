"""Ten thousand tasks on ten connections of PostgreSQL, a third of them cancelled somewhere."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool

from ._async import (
    MANAGED_POOL,
    QUEUE_POOL,
    asyncpg_url,
    engine_for,
    engine_settings,
    why_no_asyncpg,
)
from ._harness import Plan, now
from ._report import Row, Table, at_most

SIZE, TASKS, QUICK_TASKS = 10, 10_000, 1_500
SEED = 20_240_229
BURST, BURST_PAUSE = 250, 0.05
"""Tasks arrive in bursts, so that some find a connection, some wait a little and some long."""
LATEST_WHILE_ASKING, LATEST_WHILE_HOLDING = 0.3, 0.006
SETTLE = 5.0
"""Seconds that the server has to notice sockets that were closed."""
NAMES = {QUEUE_POOL: "poolkit-bench-theirs", MANAGED_POOL: "poolkit-bench-ours"}
COUNT = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name")
PHASES = ("cancelled while asking", "... while querying", "... while committing, returning")
LEFT_OVER = (
    "checked out afterwards",
    "backends beyond the pool's open",
    "backends after dispose()",
)
OURS_ONLY = (
    "dropped unreturned",
    "broken laws",
    "requests booked, off by",
    "errors, no cancellation",
)


@dataclass(slots=True)
class Outcome:
    """What was left when all tasks had ended."""

    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: float = 0.0
    """The longest that a snapshot took."""
    last: Any = None
    """The snapshot at the end."""
    broken: set[str] = field(default_factory=set)


def run(plan: Plan) -> Table:
    """Cancel tasks of both pools at the same seeded moments; count what is left over."""
    tasks = plan.pick(TASKS, QUICK_TASKS)
    table = Table(
        f"async_cancellation: {tasks:,} tasks on {SIZE} connections, asyncpg, "
        "a third cancelled at random moments",
        notes=[
            (
                f"up to {LATEST_WHILE_ASKING * 1e3:g} ms after asking (half of those), or up to "
                f"{LATEST_WHILE_HOLDING * 1e3:g} ms after having; seeded with {SEED}"
            ),
            "each task: connect, select pg_sleep(0.001), commit or roll back, close",
            f"the server has {SETTLE:g} s to notice closed sockets before its backends count",
        ],
    )
    missing = why_no_asyncpg(plan)
    if missing is not None:
        table.rows += [Row(what, bar=at_most(0)) for what in (*LEFT_OVER, *OURS_ONLY)]
        table.notes.append(missing)
        return table
    with asyncpg_url(plan) as url:
        settings = engine_settings(SIZE, pool_timeout=60)
        outcomes = {
            name: asyncio.run(_cancel(url, name, settings[name], tasks))
            for name in (QUEUE_POOL, MANAGED_POOL)
        }
    table.rows += _rows(outcomes)
    table.notes += _stories(outcomes)
    return table


async def _cancel(url: str, name: str, settings: dict[str, Any], tasks: int) -> Outcome:
    called = {"server_settings": {"application_name": NAMES[name]}}
    engine = engine_for(url, {**settings, "connect_args": called})
    onlooker = engine_for(url, {"poolclass": NullPool})
    outcome = Outcome()
    watcher = asyncio.create_task(_watch(engine.pool, outcome))
    begin = now()
    await _all_tasks(engine, tasks, outcome)
    outcome.seconds = now() - begin
    watcher.cancel()
    await asyncio.wait([watcher])
    if not watcher.cancelled():
        watcher.result()  # it failed, or had nothing to watch
    await _count_left_over(engine, onlooker, NAMES[name], tasks, outcome)
    await onlooker.dispose()
    return outcome


async def _all_tasks(engine: AsyncEngine, number: int, outcome: Outcome) -> None:
    dice = random.Random(SEED)
    tasks: list[asyncio.Task[None]] = []
    for index in range(number):
        tasks.append(asyncio.create_task(_task(engine, dice.random(), dice.random(), outcome)))
        if index % BURST == BURST - 1:
            await asyncio.sleep(BURST_PAUSE)
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if result is None:
            outcome.counts["done"] += 1
        elif not isinstance(result, asyncio.CancelledError):
            outcome.errors[f"{type(result).__name__}: {str(result).partition(chr(10))[0]}"] += 1


async def _task(engine: AsyncEngine, fate: float, moment: float, outcome: Outcome) -> None:
    """Work as an application would; `fate` decides whether and from when on to be cancelled."""
    me = asyncio.current_task()
    loop = asyncio.get_running_loop()
    timer, doing = None, PHASES[0]
    if me is not None and fate < 1 / 6:
        timer = loop.call_later(moment * LATEST_WHILE_ASKING, me.cancel)
    try:
        async with engine.connect() as connection:
            outcome.counts["had"] += 1
            doing = PHASES[1]
            if me is not None and 1 / 6 <= fate < 1 / 3:
                timer = loop.call_later(moment * LATEST_WHILE_HOLDING, me.cancel)
            await connection.exec_driver_sql("select pg_sleep(0.001)")
            doing = PHASES[2]
            if moment < 0.5:
                await connection.commit()
    except asyncio.CancelledError:
        outcome.counts[doing] += 1
        raise
    finally:
        # what cancels a finished task would cancel nothing
        if timer is not None:
            timer.cancel()


async def _watch(pool: Any, outcome: Outcome) -> None:
    """Try the laws all the time, for about a twentieth of it."""
    from tests.pool.laws import broken_laws  # late: --help works without the tests

    while hasattr(pool, "snapshot"):
        begin = now()
        snapshot = pool.snapshot()
        outcome.slowest = max(outcome.slowest, now() - begin)
        outcome.counts["snapshots"] += 1
        outcome.broken.update(broken_laws(snapshot))
        await asyncio.sleep(max(0.01, 20 * (now() - begin)))


async def _count_left_over(
    engine: AsyncEngine, onlooker: AsyncEngine, name: str, tasks: int, outcome: Outcome
) -> None:
    from tests.pool.laws import broken_laws

    pool: Any = engine.pool
    # Connections that were opened for tasks that are gone may still be on their way.
    await asyncio.sleep(0.5)
    outcome.figures[LEFT_OVER[0]] = pool.checkedout()
    is_open = pool.checkedin() + pool.checkedout()
    if hasattr(pool, "snapshot"):
        last = pool.snapshot()
        is_open = last.open
        outcome.last = last
        outcome.broken.update(broken_laws(last))
        outcome.figures |= _books(last, outcome, tasks)
    outcome.figures[LEFT_OVER[1]] = await _backends(onlooker, name, is_open) - is_open
    await engine.dispose()
    outcome.figures[LEFT_OVER[2]] = await _backends(onlooker, name, 0)


def _books(last: Any, outcome: Outcome, tasks: int) -> dict[str, float]:
    return dict(
        zip(
            OURS_ONLY,
            (
                last.closes.get("leaked", 0),
                len(outcome.broken),
                abs(last.requests - tasks),
                sum(outcome.errors.values()),
            ),
            strict=True,
        )
    )


async def _backends(onlooker: AsyncEngine, name: str, expected: int) -> float:
    """Count the server's backends with this name, once there are no more than expected."""
    give_up = now() + SETTLE
    while True:
        async with onlooker.connect() as connection:
            count = (await connection.execute(COUNT, {"name": name})).scalar_one()
        if count <= expected or now() > give_up:
            return float(count)
        await asyncio.sleep(0.05)


def _rows(outcomes: dict[str, Outcome]) -> list[Row]:
    rows = []
    for what in (*LEFT_OVER, *OURS_ONLY):
        values = {name: o.figures[what] for name, o in outcomes.items() if what in o.figures}
        # fewer backends than open connections is no merit, but none too many either
        ours = max(0.0, values[MANAGED_POOL])
        rows.append(Row(what, values, "{:.0f}", ours, "{:.0f}", at_most(0)))
    rows += [
        Row(what, {name: o.counts[what] for name, o in outcomes.items()}, "{:,.0f}")
        for what in ("done", *PHASES, "had")
    ]
    rows.append(Row("seconds", {name: o.seconds for name, o in outcomes.items()}, "{:.1f}"))
    return rows


def _stories(outcomes: dict[str, Outcome]) -> list[str]:
    ours = outcomes[MANAGED_POOL]
    last = ours.last
    closes = ", ".join(f"{count:,} {reason}" for reason, count in last.closes.items() if count)
    return [
        (
            f"laws: tried on {ours.counts['snapshots']:,} snapshots during the load (the slowest "
            f"took {ours.slowest * 1e3:.1f} ms) and one after; {last.checkouts:,} checkouts, "
            f"{last.cancelled:,} cancelled while asking, {last.connects:,} connects; "
            f"closed: {closes}"
        ),
        *(f"broken: {law}" for law in sorted(ours.broken)),
        *(
            f"{name}: {count} x {error}"
            for name, outcome in outcomes.items()
            for error, count in outcome.errors.most_common(3)
        ),
    ]
