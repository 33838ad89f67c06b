"""Throughput of 32 threads on 16 connections."""

from __future__ import annotations

import time
from itertools import repeat

from ._harness import (
    MANAGED_POOL,
    QUEUE_POOL,
    Contender,
    Plan,
    StubServer,
    in_parallel,
    managed_pool,
    medians,
    now,
    on_stub,
    pairwise_ratios,
    psycopg_pool,
    queue_pool,
)
from ._report import Row, Table, at_least, ratio_row

THREADS, CONNECTIONS = 32, 16
TINY_HOLD = 0.0002
BATCH = 20
SECONDS = 0.2
"""Short: a run is fast or slow as a whole, by how its threads fell in step at the start."""

AGAIN = "QueuePool again"


def run(plan: Plan) -> Table:
    """Compare checkouts a second, without a hold and with a tiny one."""
    rounds = plan.pick(30, 5)
    table = Table(
        f"contended: {THREADS} threads on {CONNECTIONS} connections, stub, checkouts a second",
        notes=[
            f"{rounds} interleaved rounds of {SECONDS} s; ratio = the median of the rounds' ratios",
            f"{AGAIN}: the same pool once more, to show how much of a ratio is chance",
            "without a hold the threads fight for the interpreter, not for connections",
            "with a tiny one each connection is handed to a sleeper, which has to wake: no bar",
        ],
    )
    builders = [
        queue_pool(CONNECTIONS),
        queue_pool(CONNECTIONS, name=AGAIN),
        *psycopg_pool(CONNECTIONS),
        managed_pool(CONNECTIONS),
    ]
    for what, hold in (("no hold", 0.0), (f"hold {TINY_HOLD * 1e3:g} ms", TINY_HOLD)):

        def measure(contender: Contender, _server: StubServer, hold: float = hold) -> float:
            contender.warm(CONNECTIONS)
            return _throughput(contender, hold)

        results = on_stub(builders, rounds, measure)
        table.rows.append(Row(what, medians(results), "{:,.0f}"))
        # strict order has its price with a tiny hold: a connection rests while its holder wakes
        ours = None if hold else at_least(1.0)
        for name, bar in ((AGAIN, None), (MANAGED_POOL, ours)):
            ratios = pairwise_ratios(results[name], results[QUEUE_POOL])
            table.rows.append(ratio_row(f"{what}: {name} / {QUEUE_POOL}", ratios, bar))
    return table


def _throughput(contender: Contender, hold: float) -> float:
    """Return checkouts a second; the clock is asked only between batches."""
    checkout, checkin, sleep = contender.checkout, contender.checkin, time.sleep

    def work(_number: int, begin: float) -> tuple[int, float]:
        done = 0
        while now() < begin + SECONDS:
            if hold:
                for _ in repeat(None, BATCH):
                    connection = checkout()
                    sleep(hold)
                    checkin(connection)
            else:
                for _ in repeat(None, BATCH):
                    checkin(checkout())
            done += BATCH
        return done, now() - begin

    finished = in_parallel(THREADS, work)
    # Up to the end of the last batch, so that a starved thread's batch is paid for.
    return sum(done for done, _ in finished) / max(seconds for _, seconds in finished)
