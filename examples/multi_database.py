"""Two databases with different needs: many connections for reading, few for writing.

The read engine leads to a replica in real life; here both lead to the same database unless a
second URL is given.

    python examples/multi_database.py
    python examples/multi_database.py postgresql+psycopg2://user:password@primary/db \
        postgresql+psycopg2://user:password@read-replica/db

Without a URL it runs on an SQLite file in a temporary folder.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from sqlalchemy import Engine, create_engine, text

from sqla_poolkit import ManagedPool, held_by, snapshot


@dataclass(frozen=True)
class Users:
    """The users, read from one database and written to another."""

    read_engine: Engine
    write_engine: Engine

    def get_user(self, name: str) -> str | None:
        """Read from the replica."""
        with held_by("get_user"), self.read_engine.connect() as connection:
            query = text("SELECT mail FROM poolkit_example_users WHERE name = :name")
            return connection.execute(query, {"name": name}).scalar()

    def create_user(self, name: str) -> None:
        """Write to the primary."""
        with held_by("create_user"), self.write_engine.connect() as connection:
            statement = text("INSERT INTO poolkit_example_users VALUES (:name, :mail)")
            connection.execute(statement, {"name": name, "mail": f"{name}@example.org"})
            connection.commit()


def make_users(primary: str, replica: str) -> Users:
    """Return the users with an engine for each purpose."""
    return Users(
        read_engine=create_engine(
            replica, poolclass=ManagedPool, pool_size=20, max_overflow=30, pool_name="read"
        ),
        write_engine=create_engine(
            primary, poolclass=ManagedPool, pool_size=5, max_overflow=10, pool_name="write"
        ),
    )


def show(engine: Engine) -> None:
    """Print what a pool allows and what was used of it."""
    reading = snapshot(engine)
    (label,) = (name for name in reading.labels if name.endswith("user"))
    print(
        f"{reading.name:5}  {label:11}  {reading.labels[label].checkouts:3} checkouts, "
        f"at most {reading.peak_checked_out} of {reading.max_size} connections at once, "
        f"longest wait {reading.wait_time.max_seconds * 1000:.0f} ms"
    )


def main(url: str | None = None, replica: str | None = None) -> None:
    """Create forty users and read each of them ten times, all at the same time."""
    with TemporaryDirectory() as folder:
        primary = url or f"sqlite:///{folder}/example.db"
        users = make_users(primary, replica or primary)
        names = [f"user{number}" for number in range(40)]
        try:
            with users.write_engine.begin() as connection:
                connection.execute(
                    text("CREATE TABLE poolkit_example_users (name VARCHAR(20), mail VARCHAR(40))")
                )
            with ThreadPoolExecutor(60) as threads:
                list(threads.map(users.create_user, names))
                mails = list(threads.map(users.get_user, names * 10))
            print(f"{users.get_user('user7')} and {len(set(mails)) - 1} others were found\n")
            show(users.read_engine)
            show(users.write_engine)
        finally:
            with users.write_engine.begin() as connection:
                connection.execute(text("DROP TABLE IF EXISTS poolkit_example_users"))
            users.read_engine.pool.close()
            users.write_engine.pool.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
