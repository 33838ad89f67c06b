"""Fifty callers on a pool with nothing open, each holding its connection for a second."""

from __future__ import annotations

import time

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

CALLERS, CONNECT, HOLD = 50, 0.150, 1.0
DEFAULT = "default max_connecting"


def run(plan: Plan) -> Table:
    """Compare when the last caller is served."""
    rounds = plan.pick(3, 1)
    last = on_stub(
        [
            queue_pool(CALLERS),
            *psycopg_pool(CALLERS, min_size=0),
            managed_pool(CALLERS, max_connecting=CALLERS),
            managed_pool(CALLERS, name=DEFAULT),
        ],
        rounds,
        _last_served,
        lambda: StubServer(CONNECT),
    )
    values = medians(last)
    return Table(
        f"cold: {CALLERS} callers hold for 1 s, nothing open, 150 ms to connect, "
        f"max_size {CALLERS}, median of {rounds}",
        [
            Row(
                "last caller served, in connect times",
                values,
                measured=values[MANAGED_POOL],
                bar=at_most(2.0),
                samples=last[MANAGED_POOL],
            )
        ],
        [f"{MANAGED_POOL} has max_connecting={CALLERS}; psycopg_pool grows one at a time"],
    )


def _last_served(contender: Contender, _server: StubServer) -> float:
    def call(_number: int, begin: float) -> float:
        connection = contender.checkout()
        waited = now() - begin
        time.sleep(HOLD)
        contender.checkin(connection)
        return waited

    return max(in_parallel(CALLERS, call)) / CONNECT
