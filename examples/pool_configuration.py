"""The four settings of every pool, each seen to happen: sizes, idle timeout and lifetime.

The times are much shorter than in production, where `idle_timeout` is 600 s and `max_lifetime`
1800 s by default.

    python examples/pool_configuration.py
    python examples/pool_configuration.py postgresql+psycopg2://user:password@localhost/db

Without a URL it runs on an SQLite file in a temporary folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory
from threading import Barrier

from sqlalchemy import Engine, create_engine

from sqla_poolkit import ManagedPool, PoolSnapshot, snapshot

CALLERS = 8


def show(when: str, engine: Engine) -> None:
    """Print how many connections there are and why others were closed."""
    reading = snapshot(engine)
    closes = ", ".join(f"{number} for {reason}" for reason, number in reading.closes.items())
    print(
        f"{when:28} open {reading.open} (idle {reading.idle}, checked out {reading.checked_out}), "
        f"waiting {reading.waiting}, opened so far {reading.connects}, "
        f"closed so far: {closes or 'none'}"
    )


def wait_for(engine: Engine, is_so: Callable[[PoolSnapshot], bool], seconds: float = 10.0) -> None:
    """Wait until the pool looks as expected."""
    deadline = time.monotonic() + seconds
    while not is_so(snapshot(engine)) and time.monotonic() < deadline:
        time.sleep(0.01)


def hold(engine: Engine, enough: Barrier) -> None:
    """Take a connection; let the first ones go once there are as many as may be."""
    with engine.connect():
        enough.wait()


def main(url: str | None = None) -> None:
    """Make a pool and watch it grow, stop, shrink and renew itself."""
    with TemporaryDirectory() as folder:
        engine = create_engine(
            url or f"sqlite:///{folder}/example.db",
            poolclass=ManagedPool,
            min_size=2,  # kept open
            max_size=4,  # never more, not even for a moment
            idle_timeout=0.5,  # connections above min_size go after this
            max_lifetime=3.0,  # no connection gets older; each goes at 75 to 100 % of it
        )
        show("nobody has asked yet", engine)
        engine.pool.wait_ready()
        show("min_size: ready", engine)

        # four of eight callers hold the four connections until they were seen
        enough = Barrier(5, timeout=10)
        with ThreadPoolExecutor(CALLERS) as threads:
            asked = [threads.submit(hold, engine, enough) for _ in range(CALLERS)]
            wait_for(engine, lambda now: now.checked_out == 4 and now.waiting == CALLERS - 4)
            show("max_size: eight callers", engine)
            enough.wait()
            wait_for(engine, lambda now: now.checked_out == 4 and now.waiting == 0)
            enough.wait()
            for each in asked:
                each.result()
        show("all served", engine)

        wait_for(engine, lambda now: now.open == 2)
        show("idle_timeout: back to two", engine)
        wait_for(engine, lambda now: now.closes.get("age", 0) >= 2 and now.idle == 2)
        show("max_lifetime: both replaced", engine)
        engine.pool.close()


if __name__ == "__main__":
    main(*sys.argv[1:2])
