"""The first pitfall: the pool is too small, so callers wait for connections.

Eight callers share two connections.  The snapshot tells how long they wait and who makes them
wait, the error of a caller who gave up tells it once more, and `resize` makes room without a
restart.

    python examples/too_small.py
    python examples/too_small.py postgresql+psycopg2://user:password@localhost/db

Without a URL it runs on an SQLite file in a temporary folder.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory

from sqlalchemy import Engine, create_engine

from sqla_poolkit import ManagedPool, PoolTimeout, held_by, snapshot

CALLERS = 8
REQUESTS = 6
HOLD_SECONDS = 0.02


def request(engine: Engine, label: str, seconds: float) -> None:
    """Hold a connection for a while, as a query would."""
    with held_by(label), engine.connect():
        time.sleep(seconds)


def rush(engine: Engine) -> None:
    """Let the callers make their requests, and print how long they waited."""
    before = snapshot(engine)
    with ThreadPoolExecutor(CALLERS) as threads:
        for _ in range(CALLERS * REQUESTS):
            threads.submit(request, engine, "GET /users", HOLD_SECONDS)
    interval = snapshot(engine) - before
    times = interval.checkout_time
    print(
        f"max_size={snapshot(engine).max_size}: {interval.checkouts} requests in "
        f"{interval.seconds:.2f} s, {interval.waits} of them had to wait; from asking to having: "
        f"p50 {times.quantile(0.5) * 1000:.1f} ms, max {times.max_seconds * 1000:.1f} ms"
    )


def give_up(engine: Engine) -> None:
    """Ask while reports hold all connections for longer than a caller waits."""
    with ThreadPoolExecutor(2) as threads:
        reports = [threads.submit(request, engine, "report", 1.0) for _ in range(2)]
        while snapshot(engine).checked_out < 2:
            time.sleep(0.01)
        try:
            request(engine, "GET /users", HOLD_SECONDS)
        except PoolTimeout as error:
            print(f"\n{type(error).__name__}: {error}\n")
        for report in reports:
            report.result()


def main(url: str | None = None) -> None:
    """Show the waits, the error and the remedy."""
    with TemporaryDirectory() as folder:
        engine = create_engine(
            url or f"sqlite:///{folder}/example.db",
            poolclass=ManagedPool,
            max_size=2,
            pool_timeout=0.5,
        )
        rush(engine)
        give_up(engine)
        engine.pool.resize(max_size=CALLERS)
        rush(engine)
        engine.pool.close()


if __name__ == "__main__":
    main(*sys.argv[1:2])
