"""Cost of a checkout and a checkin on an event loop while nobody else is there."""

from __future__ import annotations

import asyncio
import gc
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from sqlalchemy.engine import Engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from ._async import (
    MANAGED_POOL,
    QUEUE_POOL,
    Contender,
    StubConnection,
    StubServer,
    managed_pool,
    queue_pool,
)
from ._harness import Plan, interleave, now, pairwise_ratios
from ._report import Bar, Row, Table, at_most, ratio_row

LABEL = 'track="label"'
AGAIN = "AsyncAdaptedQueuePool again"
BARS = {LABEL: at_most(1.0), MANAGED_POOL: at_most(1.0)}
PER_ROUND = 5_000


@dataclass(frozen=True, slots=True)
class Runner:
    """A contender and the loop that is timed; `work(number)` gives the seconds it took."""

    name: str
    contender: Contender
    work: Callable[[int], Awaitable[float]]


def run(plan: Plan) -> Table:
    """Compare the pools on a stub, then through an AsyncEngine."""
    rounds = plan.pick(60, 12)
    return asyncio.run(_compare(rounds))


async def _compare(rounds: int) -> Table:
    table = Table(
        "async_uncontended: checkout + checkin, one task, microseconds",
        notes=[
            "pool: pool.connect().close(), a loop in one greenlet",
            "engine: async with engine.connect(), as an application does it; two greenlets a turn",
            f"{rounds} rounds of {PER_ROUND:,}, interleaved, collector off inside a round",
            "by round: the median of the rounds' ratios, and the range of the middle half",
            "a stub whose rollback is a plain no-op: nothing is awaited, only work is measured",
            f'{MANAGED_POOL} is the default, track="caller", without pings, as the others',
            f"{AGAIN}: the same pool once more, to show how much of a ratio is chance",
        ],
    )
    # Some ten times the work of the bare pool: a tenth of the repetitions.
    for what, way, number, bars in (
        ("pool", _bare, PER_ROUND, BARS),
        ("engine", _through_engine, PER_ROUND // 10, {}),
    ):
        runners = [way(contender) for contender in _contenders()]
        seconds = await _time(runners, rounds, number)
        table.rows += _rows(what, seconds, bars)
        table.rows += [_books_row(what, runners, rounds * number)]
        for runner in runners:
            await runner.contender.close()
    return table


def _contenders() -> list[Contender]:
    builders = [
        queue_pool(5),
        queue_pool(5, name=AGAIN),
        managed_pool(5, track="label", name=LABEL),
        managed_pool(5, track="caller"),
    ]
    return [build(StubServer(StubConnection)) for build in builders]


def _bare(contender: Contender) -> Runner:
    checkout = contender.pool.connect

    def connect_and_close(number: int) -> float:
        begin = now()
        for _ in repeat(None, number):
            checkout().close()
        return now() - begin

    return Runner(
        contender.name, contender, lambda number: greenlet_spawn(connect_and_close, number)
    )


def _through_engine(contender: Contender) -> Runner:
    """Go an application's way: `track="caller"` has to look behind the greenlet here."""
    pool = contender.pool
    engine = AsyncEngine(Engine(pool, pool._dialect, make_url("stub://")))  # noqa: SLF001

    async def connect_and_close(number: int) -> float:
        begin = now()
        for _ in repeat(None, number):
            async with engine.connect():
                pass
        return now() - begin

    return Runner(contender.name, contender, connect_and_close)


async def _time(runners: list[Runner], rounds: int, number: int) -> dict[str, list[float]]:
    """Let the runners take turns; return seconds per operation, by round."""
    seconds: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for runner in runners:
        await runner.work(1)
    for runner in interleave(runners, rounds):
        await asyncio.sleep(0)  # whatever a pool left to the loop is done before the next begins
        gc.collect()
        gc.disable()
        try:
            seconds[runner.name].append(await runner.work(number) / number)
        finally:
            gc.enable()
    return seconds


def _rows(what: str, seconds: dict[str, list[float]], bars: dict[str, Bar]) -> list[Row]:
    medians = {name: statistics.median(values) * 1e6 for name, values in seconds.items()}
    minimums = {name: min(values) * 1e6 for name, values in seconds.items()}
    rows = [Row(f"{what}: median", medians), Row(f"{what}: minimum", minimums)]
    for name, values in seconds.items():
        if name == QUEUE_POOL:
            continue
        quarter = len(values) // 4
        ratios = sorted(pairwise_ratios(values, seconds[QUEUE_POOL]))
        rows += [
            ratio_row(f"{what}: {name}, by round", ratios[quarter:-quarter], bars.get(name)),
            Row(f"{what}: {name}, minimums", measured=minimums[name] / minimums[QUEUE_POOL]),
        ]
    return rows


def _books_row(what: str, runners: list[Runner], turns: int) -> Row:
    """Show that everything was recorded: one checkout more, to warm up, than was timed."""
    books: dict[str, Any] = {
        runner.name: runner.contender.pool.snapshot().checkouts / (turns + 1)
        for runner in runners
        if runner.name in BARS
    }
    return Row(f"{what}: checkouts in the books / made", books)
