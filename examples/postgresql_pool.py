"""A pool for PostgreSQL: SQLAlchemy's usual arguments, with ManagedPool in QueuePool's place.

Shows that `pool_size`, `max_overflow`, `pool_pre_ping` and `pool_recycle` go on working, what they
come to, and what the pool knows after 200 requests.

    python examples/postgresql_pool.py
    python examples/postgresql_pool.py postgresql+psycopg2://user:password@localhost/db

Without a URL it runs on an SQLite file in a temporary folder.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory

from sqlalchemy import Engine, create_engine, text

from sqla_poolkit import ManagedPool, held_by, snapshot


def make_engine(url: str) -> Engine:
    """Return an engine as a web application would make it, once, when it starts."""
    return create_engine(
        url,
        poolclass=ManagedPool,
        pool_size=10,  # with max_overflow: at most 30 connections, at every instant
        max_overflow=20,
        pool_pre_ping=True,  # see that a connection is alive before it is handed out
        pool_recycle=3600,  # replace connections before they are an hour old
        echo=False,
    )


def count_users(engine: Engine) -> int:
    """Do what a request does: take a connection, use it, give it back."""
    with held_by("GET /users"), engine.connect() as connection:
        return len(connection.execute(text("SELECT * FROM poolkit_example_users")).all())


def show(engine: Engine) -> None:
    """Print what the settings came to and what the pool has seen."""
    reading = snapshot(engine)
    settings = reading.settings
    print(f"pool_size + max_overflow  -> max_size={reading.max_size}")
    print(f"pool_recycle              -> max_lifetime={settings['max_lifetime']:g} s")
    print(f"pool_pre_ping             -> pre_ping={settings['pre_ping']}")
    print()
    print(f"checkouts                 {reading.checkouts}")
    print(f"connections opened        {reading.connects} (of at most {reading.max_size})")
    print(f"checkout time, p99        {reading.checkout_time.quantile(0.99) * 1000:.1f} ms")
    print(f"as QueuePool puts it      {engine.pool.status()}")
    print(f"as ManagedPool puts it    {engine.pool!r}")


def main(url: str | None = None) -> None:
    """Serve 200 requests with 40 threads."""
    with TemporaryDirectory() as folder:
        engine = make_engine(url or f"sqlite:///{folder}/example.db")
        try:
            with engine.begin() as connection:
                connection.execute(text("CREATE TABLE poolkit_example_users (name VARCHAR(20))"))
                connection.execute(text("INSERT INTO poolkit_example_users VALUES ('Ada')"))
            with ThreadPoolExecutor(40) as threads:
                counts = set(threads.map(count_users, [engine] * 200))
            print(f"each of 200 requests found {counts} user\n")
            show(engine)
        finally:
            with engine.begin() as connection:
                connection.execute(text("DROP TABLE IF EXISTS poolkit_example_users"))
            engine.pool.close()


if __name__ == "__main__":
    main(*sys.argv[1:2])
