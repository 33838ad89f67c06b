"""The database goes away for a while: a web service says so at once, a worker waits.

A request has somebody who waits for its answer, so the web service keeps the default: while the
database is known to be down each request hears `PoolUnavailable` at once.  Nobody waits for the
jobs of a worker, so it says `on_outage="wait"`, and to it the outage is a pause.

On PostgreSQL a `FaultProxy` stands in front of the server, cuts all connections and refuses new
ones; on SQLite, which has no server, its folder is moved away.

    python examples/outage.py
    python examples/outage.py postgresql+psycopg2://user:password@localhost/db

Without a URL it runs on an SQLite file in a temporary folder.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import URL, Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from sqla_poolkit import ManagedPool, snapshot
from sqla_poolkit.testing import FaultProxy

OUTAGE_SECONDS = 1.5
JOBS = 10


def use(engine: Engine) -> None:
    """Do what a request or a job does."""
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))


def serve(engine: Engine, seconds: float) -> tuple[Counter[str], float]:
    """Answer requests; return how they ended, and how long the slowest answer took."""
    ends: Counter[str] = Counter()
    slowest = 0.0
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        try:
            use(engine)
        except DBAPIError as error:  # PoolUnavailable is one: the service answers 503
            ends[type(error).__name__] += 1
        else:
            ends["served"] += 1
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.02)
    return ends, slowest


def work(engine: Engine) -> int:
    """Do the jobs one after the other; return how many."""
    done = 0
    while done < JOBS:
        try:
            use(engine)
        except DBAPIError:  # the connection was lost in the middle of the job: do it again
            continue
        done += 1
        time.sleep(0.2)
    return done


def strike(database: URL, stack: ExitStack) -> tuple[URL, Callable[[], Any], Callable[[], Any]]:
    """Return where to connect to, what takes the database away, and what brings it back."""
    if database.get_backend_name() == "postgresql":
        proxy = stack.enter_context(FaultProxy(database.host or "localhost", database.port or 5432))

        def cut() -> None:
            proxy.refuse()
            proxy.reset()

        return database.set(host=proxy.host, port=proxy.port), cut, proxy.heal
    folder = Path(stack.enter_context(TemporaryDirectory()))
    (folder / "here").mkdir()
    return (
        database.set(database=f"{folder}/here/example.db"),
        lambda: (folder / "here").rename(folder / "away"),
        lambda: (folder / "away").rename(folder / "here"),
    )


def main(url: str | None = None) -> None:
    """Let both go on while the database is away."""
    with ExitStack() as stack:
        database, take_away, bring_back = strike(make_url(url or "sqlite://"), stack)
        web = create_engine(database, poolclass=ManagedPool, pool_name="web")
        worker = create_engine(
            database, poolclass=ManagedPool, pool_name="worker", on_outage="wait", pool_timeout=60
        )
        with ThreadPoolExecutor(2) as threads:
            served = threads.submit(serve, web, OUTAGE_SECONDS + 1.3)
            worked = threads.submit(work, worker)
            time.sleep(0.3)
            take_away()
            for engine in (web, worker):
                engine.pool.retire_all()  # SQLite's open files would outlive their folder
            time.sleep(OUTAGE_SECONDS)
            bring_back()
            ends, slowest = served.result()
            print("web service: " + ", ".join(f"{number} {end}" for end, number in ends.items()))
            print(f"  the slowest answer took {slowest * 1000:.0f} ms")
            print(f"worker: {worked.result()} of {JOBS} jobs done")
            waited = snapshot(worker).checkout_time.max_seconds
            print(f"  the longest wait for the database took {waited:.1f} s")
        for engine in (web, worker):
            engine.pool.close()


if __name__ == "__main__":
    main(*sys.argv[1:2])
