"""What callers get while the server, or what stands before it, does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from sqla_poolkit.testing import FaultProxy

from ._harness import MANAGED_POOL, QUEUE_POOL, Plan, now, wait_until
from ._outages import (
    SIZE,
    Callers,
    Turn,
    first_success,
    managed_engine,
    nothing,
    own_server,
    queue_engine,
    warm,
)
from ._report import Row, Table, at_most

THREADS = 20
TIMEOUT = 1.0
LATE_MS = 50.0
SETTINGS: dict[str, Any] = {"pool_timeout": TIMEOUT, "connect_args": {"connect_timeout": 2}}
OURS: dict[str, Any] = {**SETTINGS, "ping_timeout": 0.5, "ping_after": 0, "connect_timeout": 2}
LATE = "answer later than the deadline by, ms"
HUNG = "callers without any answer for 5 s and more"
RECOVERY = "first success after it answers again, s"
LEAKED = "connections lost, or out of step with the server"


def run(plan: Plan) -> Table:
    """Freeze the server, then put a black hole before it."""
    seconds = plan.pick(20.0, 3.0)
    title = f"frozen: {seconds:g} s without an answer, {THREADS} threads, pool_timeout={TIMEOUT:g}"
    rows: list[Row] = []
    if plan.postgres is None:
        return Table(title, [Row(LATE, bar=at_most(LATE_MS))])
    with own_server() as server:
        rows += _compare("SIGSTOP", server, server, server.freeze, server.thaw, seconds)
        with FaultProxy("127.0.0.1", server.port) as proxy:
            rows += _compare("black hole", server, proxy, proxy.black_hole, proxy.heal, seconds)
    return Table(
        title,
        rows,
        [
            "ping_timeout=0.5, ping_after=0; QueuePool has pool_pre_ping=True: each checkout pings",
            "hung: the longest of them is given up after the freeze; QueuePool has no limit there",
        ],
    )


def _compare(
    how: str,
    server: Any,
    address: Any,
    strike: Callable[[], object],
    mend: Callable[[], object],
    seconds: float,
) -> list[Row]:
    url = server.url("psycopg2", None if address is server else address)
    figures: dict[str, dict[str, float]] = {}
    for name, make, settings in (
        (QUEUE_POOL, queue_engine, SETTINGS),
        (MANAGED_POOL, managed_engine, OURS),
    ):
        with make(url, **settings) as engine:
            for what, value in measure(engine, server, strike, mend, seconds).items():
                figures.setdefault(what, {})[name] = value
    bars = {LATE: LATE_MS, HUNG: 0.0, RECOVERY: 1.0, LEAKED: 0.0}
    return [
        Row(f"{how}: {what}", values, "{:.1f}", values[MANAGED_POOL], "{:.1f}", at_most(bars[what]))
        for what, values in figures.items()
    ]


def measure(
    engine: sa.Engine,
    server: Any,
    strike: Callable[[], object],
    mend: Callable[[], object],
    seconds: float,
) -> dict[str, float]:
    """Let callers ask while the fault lasts and after it."""
    warm(engine)
    callers = Callers(engine, THREADS, nothing, pause=0.02)
    time.sleep(0.5)
    strike()
    time.sleep(seconds)
    hung = sum(now() - asked >= 5.0 for asked in list(callers.asking.values()))
    still = [Turn(asked, now()) for asked in list(callers.asking.values())]
    mended = now()
    mend()
    time.sleep(3.0)
    callers.stop(30.0)
    turns = callers.turns
    return {
        LATE: (max(turn.seconds for turn in [*turns, *still]) - TIMEOUT) * 1e3,
        HUNG: hung,
        RECOVERY: max(0.0, first_success(turns, mended)),
        LEAKED: _lost(engine, server),
    }


def _lost(engine: sa.Engine, server: Any) -> float:
    """Return how many places cannot be had any more, or how far the server counts otherwise."""
    held = []
    try:
        held = [engine.raw_connection() for _ in range(SIZE)]
    finally:
        for connection in held:
            connection.close()
    pool: Any = engine.pool
    try:
        wait_until(lambda: server.sessions() == pool.checkedin(), 5.0)
    except TimeoutError:
        return SIZE - len(held) + abs(server.sessions() - pool.checkedin())
    return SIZE - len(held)
