"""Who makes whom wait: one slow endpoint among twenty, named by `wait_caused_seconds`."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

from sqlalchemy import Engine, create_engine, text

from sqla_poolkit import ManagedPool, PoolSnapshot, held_by

from ._harness import MANAGED_POOL, Plan, in_parallel, now
from ._report import Row, Table, at_least, at_most

ENDPOINTS, THREADS, SIZE = 20, 24, 4
HOLD, SLOW_HOLD = 0.001, 0.04
SLOW = "GET /report"
DISAGREEMENT_BAR = at_most(0.01)
BY_HAND = "callers' own clocks"


class Request(NamedTuple):
    """One request as its caller saw it."""

    endpoint: str
    asked_at: float
    had_at: float
    returned_at: float


def run(plan: Plan) -> Table:
    """Let threads call the endpoints at random; compare the pool's books with the callers' own."""
    seconds = plan.pick(10.0, 3.0)
    table = Table(
        f"blame: 1 slow endpoint among {ENDPOINTS}, {THREADS} threads, {SIZE} connections",
        notes=[
            f"{seconds:g} s on PostgreSQL; holds of {HOLD * 1e3:g} ms, {SLOW}: {SLOW_HOLD * 1e3:g}",
            f"{BY_HAND}: each second somebody waits is divided among those who hold a connection",
            "wait for the wake-up is in the callers' clocks, not in the pool's",
        ],
    )
    if plan.postgres is None:
        table.rows += [
            Row("rank of the slow endpoint in wait_caused", bar=at_most(1)),
            Row("sum of wait_caused against all waits, off by", bar=DISAGREEMENT_BAR),
        ]
        return table
    with ExitStack() as stack:
        url = stack.enter_context(plan.postgres())
        engine = create_engine(url, poolclass=ManagedPool, max_size=SIZE, track="label")
        stack.callback(engine.pool.close)
        requests, reading = _load(engine, seconds)
    table.rows += _rows(requests, reading)
    return table


def _load(engine: Engine, seconds: float) -> tuple[list[Request], PoolSnapshot]:
    endpoints = [SLOW, *(f"GET /endpoint{number}" for number in range(1, ENDPOINTS))]

    def work(number: int, begin: float) -> list[Request]:
        chance = random.Random(number)
        done = []
        while now() < begin + seconds:
            endpoint = chance.choice(endpoints)
            asked_at = now()
            with held_by(endpoint), engine.connect() as connection:
                had_at = now()
                connection.execute(text("SELECT 1"))
                time.sleep(SLOW_HOLD if endpoint == SLOW else HOLD)
            done.append(Request(endpoint, asked_at, had_at, now()))
        return done

    with engine.connect():
        pass
    done = in_parallel(THREADS, work)
    pool = engine.pool
    assert isinstance(pool, ManagedPool)
    return [request for each in done for request in each], pool.snapshot()


def _rows(requests: list[Request], reading: PoolSnapshot) -> Iterator[Row]:
    caused = {label: row.wait_caused_seconds for label, row in reading.labels.items()}
    waits = reading.wait_time.sum_seconds + reading.failed_wait_time.sum_seconds
    worst = sorted(caused, key=lambda label: -caused[label])
    by_hand = _blame(requests)
    yield Row("requests", {MANAGED_POOL: reading.checkouts, BY_HAND: len(requests)}, "{:,.0f}")
    rank = worst.index(SLOW) + 1
    yield Row(
        "rank of the slow endpoint in wait_caused",
        {MANAGED_POOL: rank, BY_HAND: 1 + [name for name, _ in by_hand.most_common()].index(SLOW)},
        "{:.0f}",
        rank,
        "{:.0f}",
        at_most(1),
    )
    share = caused[SLOW] / sum(caused.values())
    share_by_hand = by_hand[SLOW] / sum(by_hand.values())
    yield Row("its share of all waiting", {MANAGED_POOL: share, BY_HAND: share_by_hand}, "{:.3f}")
    second = caused[SLOW] / caused[worst[1 if rank == 1 else 0]]
    yield Row("it and the next, ratio", {MANAGED_POOL: second}, "{:.1f}", bar=None)
    off = abs(sum(caused.values()) / waits - 1)
    yield Row(
        "sum of wait_caused against all waits, off by",
        measured=off,
        measured_unit="{:.6f}",
        bar=DISAGREEMENT_BAR,
    )
    own = sum(request.had_at - request.asked_at for request in requests)
    yield Row("seconds waited", {MANAGED_POOL: waits, BY_HAND: own}, "{:,.2f}")
    yield Row("share of checkouts that waited", {MANAGED_POOL: reading.waits / reading.checkouts})
    endpoints = {request.endpoint for request in requests}
    yield Row(
        "share of waiting that endpoints answer for",
        measured=sum(caused[endpoint] for endpoint in endpoints) / waits,
        measured_unit="{:.4f}",
        bar=at_least(0.9),
    )


def _blame(requests: list[Request]) -> Counter[str]:
    """Divide each second of waiting among those who held a connection, from what callers saw."""
    changes = sorted(
        [(request.asked_at, 1, 0, request.endpoint) for request in requests]
        + [(request.had_at, -1, 1, request.endpoint) for request in requests]
        + [(request.returned_at, 0, -1, request.endpoint) for request in requests]
    )
    blame: Counter[str] = Counter()
    holders: Counter[str] = Counter()
    waiting, before = 0, changes[0][0]
    for moment, waits, holds, endpoint in changes:
        held = sum(holders.values())
        if waiting and held:
            each = waiting * (moment - before) / held
            for name, number in holders.items():
                blame[name] += number * each
        before = moment
        waiting += waits
        holders[endpoint] += holds
    return blame
