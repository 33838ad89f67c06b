"""What callers notice when the server has ended all idle connections."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa

from ._harness import MANAGED_POOL, QUEUE_POOL, Plan, now, wait_until
from ._outages import SIZE, delaying_proxy, managed_engine, own_server, queue_engine, warm
from ._report import Row, Table, at_most
from .liveness import _At

ONE_WAY = 0.005
ROUND_TRIP = 2 * ONE_WAY
ERRORS, EXTRA = "errors that reach callers", "slowest checkout beyond a fresh connect, round trips"


def run(plan: Plan) -> Table:
    """Terminate ten idle connections, then check out; the server is 10 ms away."""
    title = f"terminated: {SIZE} idle connections ended by the server, 10 ms away, then {SIZE} uses"
    if plan.postgres is None:
        return Table(title, [Row(ERRORS, bar=at_most(0)), Row(EXTRA, bar=at_most(1.0))])
    errors: dict[str, float] = {}
    extra: dict[str, float] = {}
    with own_server() as server, delaying_proxy("127.0.0.1", server.port, ONE_WAY) as port:
        url = server.url("psycopg2", _At(port))
        for name, make in ((QUEUE_POOL, queue_engine), (MANAGED_POOL, managed_engine)):
            fresh = min(_fresh(make, url) for _ in range(5))
            worst, count = 0.0, 0
            for _ in range(plan.pick(10, 2)):
                with make(url) as engine:
                    slowest, failed = _measure(engine, server)
                worst, count = max(worst, slowest), count + failed
            errors[name] = count
            extra[name] = (worst - fresh) / ROUND_TRIP
    return Table(
        title,
        [
            Row(ERRORS, errors, "{:.0f}", errors[MANAGED_POOL], "{:.0f}", at_most(0)),
            Row(EXTRA, extra, "{:.2f}", extra[MANAGED_POOL], "{:.2f}", at_most(1.0)),
        ],
        ["QueuePool has pool_pre_ping=True"],
    )


def _fresh(make: Any, url: Any) -> float:
    """Return how long the first checkout of all takes, but for what an engine does once."""
    with make(url) as engine:
        engine.pool.connect().close()
        held = engine.pool.connect()
        begin = now()
        other = engine.pool.connect()
        seconds = now() - begin
        held.close()
        other.close()
    return seconds


def _measure(engine: sa.Engine, server: Any) -> tuple[float, int]:
    warm(engine)
    server.terminate_sessions()
    wait_until(lambda: server.sessions() == 0)
    time.sleep(10 * ONE_WAY)  # until the last of the ends has travelled here
    slowest, failed = 0.0, 0
    for _ in range(SIZE):
        begin = now()
        try:
            connection = engine.raw_connection()
            cursor = connection.cursor()
            slowest = max(slowest, now() - begin)
            cursor.execute("SELECT 1")
            connection.close()
        except Exception:  # noqa: BLE001  # the driver's own, from a dead connection
            failed += 1
    return slowest, failed
