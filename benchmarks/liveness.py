"""What it costs to hand out no dead connection, in a busy pool on PostgreSQL."""

from __future__ import annotations

from contextlib import ExitStack

import sqlalchemy as sa

from ._harness import MANAGED_POOL, QUEUE_POOL, Plan, interleave, now, pairwise_ratios
from ._outages import delaying_proxy, managed_engine, own_server, queue_engine, warm
from ._report import Row, Table, at_most, ratio_row

WHERES = (("loopback", None, 0.35), ("1 ms away", 0.0005, 0.05))


def run(plan: Plan) -> Table:
    """Compare raw checkouts and checkins on loopback and with 1 ms of latency."""
    rows: list[Row] = []
    if plan.postgres is None:
        return Table("liveness", [Row(where, bar=at_most(bar)) for where, _, bar in WHERES])
    with own_server() as server:
        for where, delay, bar in WHERES:
            with ExitStack() as stack:
                through = None
                if delay is not None:
                    port = stack.enter_context(delaying_proxy("127.0.0.1", server.port, delay))
                    through = _At(port)
                url = server.url("psycopg2", through)
                theirs = stack.enter_context(queue_engine(url))
                ours = stack.enter_context(managed_engine(url))
                times = plan.pick(1000, 100) if delay is None else plan.pick(100, 20)
                rows += _compare(where, theirs, ours, plan.pick(15, 3), times, bar)
    return Table(
        "liveness: pool.connect().close(), one busy thread, psycopg2, microseconds",
        rows,
        ["QueuePool has pool_pre_ping=True; ManagedPool is the default"],
    )


class _At:
    """An address on this machine."""

    host = "127.0.0.1"

    def __init__(self, port: int) -> None:
        self.port = port


def _compare(
    where: str, theirs: sa.Engine, ours: sa.Engine, rounds: int, times: int, bar: float
) -> list[Row]:
    found: dict[str, list[float]] = {QUEUE_POOL: [], MANAGED_POOL: []}
    engines = [(QUEUE_POOL, theirs), (MANAGED_POOL, ours)]
    for _, engine in engines:
        warm(engine, 2)
    for name, engine in interleave(engines, 2 * rounds):
        connect = engine.pool.connect
        begin = now()
        for _ in range(times):
            connect().close()
        found[name].append((now() - begin) / times * 1e6)
    middle = {name: sorted(values)[len(values) // 2] for name, values in found.items()}
    ratios = pairwise_ratios(found[MANAGED_POOL], found[QUEUE_POOL])
    return [
        Row(f"{where}: median", middle, "{:.1f}"),
        ratio_row(f"{where}: {MANAGED_POOL} / {QUEUE_POOL}", ratios, at_most(bar)),
    ]
