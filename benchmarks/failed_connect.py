"""How soon a waiter gets its own attempt when the connect before it fails."""

from __future__ import annotations

from contextlib import suppress

from ._harness import (
    MANAGED_POOL,
    Contender,
    Plan,
    StubServer,
    in_parallel,
    managed_pool,
    medians,
    on_stub,
    psycopg_pool,
    queue_pool,
    wait_until,
)
from ._report import Row, Table, at_most

CONNECT, TIMEOUT = 0.3, 1.5
"""The timeout is short only to keep QueuePool's waiter, who sleeps all of it, from taking 30 s."""


def run(plan: Plan) -> Table:
    """Let the first connect of a pool of one fail while a second caller waits behind it."""
    rounds = plan.pick(5, 1)
    gaps = on_stub(
        [
            queue_pool(1, timeout=TIMEOUT),
            *psycopg_pool(1, min_size=0, timeout=TIMEOUT),
            managed_pool(1, timeout=TIMEOUT),
        ],
        rounds,
        _gap,
        lambda: StubServer(CONNECT, failing=lambda number: number == 1),
    )
    values = medians(gaps)
    return Table(
        "failed connect: the first attempt fails after 0.3 s, a waiter behind it, max_size 1, "
        f"median of {rounds}",
        [
            Row(
                "next attempt starts after, ms",
                values,
                "{:,.1f}",
                measured=values[MANAGED_POOL],
                measured_unit="{:.1f}",
                bar=at_most(10.0),
                samples=gaps[MANAGED_POOL],
            )
        ],
        [
            f"pool_timeout {TIMEOUT:g} s, of which QueuePool's waiter sleeps the rest",
            "psycopg_pool tells no caller of a failed connect; it backs off for a second",
        ],
    )


def _gap(contender: Contender, server: StubServer) -> float:
    def call(number: int, _begin: float) -> None:
        if number == 1:
            # Strictly behind: the first attempt is under way before the second caller asks.
            wait_until(lambda: bool(server.attempts))
        with suppress(Exception):  # each pool has its own error; the gap is what counts
            contender.checkin(contender.checkout())

    in_parallel(2, call)
    return (server.attempts[1] - server.failures[0]) * 1e3
