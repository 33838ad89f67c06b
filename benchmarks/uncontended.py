"""Cost of a checkout and a checkin while nobody else is there."""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, event
from sqlalchemy.pool import QueuePool

from ._harness import (
    MANAGED_POOL,
    QUEUE_POOL,
    Contender,
    Plan,
    StubServer,
    interleave,
    managed_pool,
    now,
    pairwise_ratios,
    psycopg_pool,
    queue_pool,
)
from ._report import Bar, Row, Table, at_most, ratio_row

LISTENERS = "QueuePool+listeners"
LABEL = 'track="label"'
STACK = 'track="stack"'
BARS = {LABEL: at_most(1.0), MANAGED_POOL: at_most(1.15)}
PER_ROUND = 5_000


@dataclass(frozen=True, slots=True)
class Runner:
    """A contender in the shortest loop its interface allows."""

    name: str
    work: Callable[[int], object]
    close: Callable[[], object]


def run(plan: Plan) -> Table:
    """Compare the pools on a stub, then through an engine on SQLite."""
    rounds = plan.pick(40, 12)
    builders = [
        queue_pool(5),
        _queue_pool_with_listeners,
        *psycopg_pool(5),
        managed_pool(5, track="label", name=LABEL),
        managed_pool(5, track="caller"),
        managed_pool(5, track="stack", name=STACK),
    ]
    table = Table(
        "uncontended: checkout + checkin, one thread, microseconds",
        notes=[
            "stub: pool.connect().close(); engine: engine.connect().close() on an SQLite file",
            f"{rounds} rounds of {PER_ROUND:,}, interleaved, collector off inside a round",
            "by round: the median of the rounds' ratios, and the range of the middle half",
            f'{MANAGED_POOL} is the default, track="caller"',
            f"{STACK}: the more frames an application has, the more it costs; here they are few",
            f"{LISTENERS}: a count and a time in use, kept by hand in two event listeners",
            "psycopg_pool hands out the bare connection and resets nothing: less work, orientation",
        ],
    )
    stub = _time([_on_stub(build(StubServer())) for build in builders], rounds, PER_ROUND)
    table.rows += _rows("stub", stub, BARS)
    with tempfile.TemporaryDirectory() as folder:
        engines = _through_engine(f"sqlite:///{Path(folder, 'bench.db')}")
        # Some five times the work of the bare pool: a fifth of the repetitions.
        through = _time(engines, rounds, PER_ROUND // 5)
    table.rows += _rows("engine", through, {})
    return table


def _queue_pool_with_listeners(server: StubServer) -> Contender:
    """Build what people write by hand to see into their pool."""
    contender = queue_pool(5, name=LISTENERS)(server)
    books = {"checkouts": 0, "checkins": 0, "use_seconds": 0.0}

    def on_checkout(_connection: Any, record: Any, _proxy: Any) -> None:
        books["checkouts"] += 1
        record.info["since"] = now()

    def on_checkin(_connection: Any, record: Any) -> None:
        books["checkins"] += 1
        books["use_seconds"] += now() - record.info["since"]

    event.listen(contender.pool, "checkout", on_checkout)
    event.listen(contender.pool, "checkin", on_checkin)
    return contender


def _on_stub(contender: Contender) -> Runner:
    contender.warm(1)
    checkout, checkin = contender.checkout, contender.checkin

    def connect_and_close(number: int) -> None:
        for _ in repeat(None, number):
            checkout().close()

    def get_and_put(number: int) -> None:
        for _ in repeat(None, number):
            checkin(checkout())

    speaks_sqlalchemy = hasattr(contender.pool, "connect")
    work = connect_and_close if speaks_sqlalchemy else get_and_put
    return Runner(contender.name, work, contender.close)


def _through_engine(url: str) -> list[Runner]:
    """Go an application's way: `track="caller"` has more frames to look through here."""
    from sqla_poolkit import ManagedPool

    settings: dict[str, dict[str, Any]] = {
        QUEUE_POOL: {"poolclass": QueuePool},
        LABEL: {"poolclass": ManagedPool, "track": "label"},
        MANAGED_POOL: {"poolclass": ManagedPool, "track": "caller"},
        STACK: {"poolclass": ManagedPool, "track": "stack"},
    }

    def runner(name: str, keywords: dict[str, Any]) -> Runner:
        # No pre-ping on either side: the subject is the pool, not a round trip.
        engine = create_engine(url, pool_pre_ping=False, **keywords)

        def work(number: int) -> None:
            for _ in repeat(None, number):
                engine.connect().close()

        work(1)
        return Runner(name, work, engine.dispose)

    return [runner(name, keywords) for name, keywords in settings.items()]


def _time(runners: list[Runner], rounds: int, number: int) -> dict[str, list[float]]:
    """Let the runners take turns; return seconds per operation, by round."""
    seconds: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for runner in interleave(runners, rounds):
        gc.collect()
        gc.disable()
        try:
            begin = now()
            runner.work(number)
            seconds[runner.name].append((now() - begin) / number)
        finally:
            gc.enable()
    for runner in runners:
        runner.close()
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
        rows.append(
            ratio_row(
                f"{what}: {name} / {QUEUE_POOL}, by round", ratios[quarter:-quarter], bars.get(name)
            )
        )
        least = minimums[name] / minimums[QUEUE_POOL]
        rows.append(
            Row(f"{what}: {name} / {QUEUE_POOL}, minimums", measured=least, bar=bars.get(name))
        )
    return rows
