"""When a caller with `pool_timeout=0.25` hears that there is no connection for it."""

from __future__ import annotations

import statistics

from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ._harness import (
    MANAGED_POOL,
    PSYCOPG_POOL,
    Contender,
    Plan,
    StubServer,
    managed_pool,
    now,
    on_stub,
    psycopg_pool,
    queue_pool,
)
from ._report import Row, Table, at_most

TIMEOUT, CONNECT = 0.25, 2.0
TOLERANCE_MS = 20.0

Answer = tuple[float, bool]
"""Seconds until the caller got an answer, and whether that was a timeout."""


def run(plan: Plan) -> Table:
    """Measure the answer beside a slow connect, and in a pool that is full."""
    rounds = plan.pick(5, 1)
    builders = [
        queue_pool(1, timeout=TIMEOUT),
        *psycopg_pool(1, min_size=0, timeout=TIMEOUT),
        managed_pool(1, timeout=TIMEOUT),
    ]
    slow = on_stub(builders, rounds, _answer, lambda: StubServer(CONNECT))
    full = on_stub(builders, rounds, _answer_when_full)
    return Table(
        f"deadline: pool_timeout={TIMEOUT}, median of {rounds}",
        [
            *_rows("connect takes 2 s", slow),
            *_rows("pool is full", full),
        ],
        ["off by = the furthest of all rounds"],
    )


def _answer(contender: Contender, _server: StubServer) -> Answer:
    errors: tuple[type[Exception], ...] = (PoolTimeoutError,)
    if contender.name == PSYCOPG_POOL:
        from psycopg_pool import PoolTimeout

        errors = (PoolTimeout,)
    begin = now()
    try:
        connection = contender.checkout()
    except errors:
        return now() - begin, True
    answer = now() - begin, False
    contender.checkin(connection)
    return answer


def _answer_when_full(contender: Contender, server: StubServer) -> Answer:
    # psycopg_pool's first caller races its own timeout here too, but the stub connects at once.
    held = contender.checkout()
    try:
        return _answer(contender, server)
    finally:
        contender.checkin(held)


def _rows(what: str, answers: dict[str, list[Answer]]) -> list[Row]:
    def said(name: str) -> str:
        seconds = statistics.median(seconds for seconds, _ in answers[name])
        return f"{seconds:.2f} s, " + ("timeout" if answers[name][0][1] else "no error")

    return [
        Row(f"{what}: answer after", {name: said(name) for name in answers}),
        Row(
            f"{what}: off by, ms",
            measured=max(abs(seconds - TIMEOUT) for seconds, _ in answers[MANAGED_POOL]) * 1e3,
            measured_unit="{:.1f}",
            bar=at_most(TOLERANCE_MS),
        ),
    ]
