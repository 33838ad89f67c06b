"""Watch a pool: SQLAlchemy's events and numbers first, then the snapshot.

The events tell of each connection that is opened, taken and given back, `size()`, `checkedout()`
and `overflow()` how many there are.  Neither tells whether somebody waits, for how long, and for
whom; the snapshot does.

    python examples/pool_monitoring.py
    python examples/pool_monitoring.py postgresql+psycopg2://user:password@localhost/db

Without a URL it runs on an SQLite file in a temporary folder.
"""

from __future__ import annotations

import sys
import threading
from tempfile import TemporaryDirectory

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.pool import QueuePool

from sqla_poolkit import ManagedPool, PoolSnapshot, held_by, snapshot

LOOK_AFTER_SECONDS = 0.2


def listen(engine: Engine) -> None:
    """Print what happens to the connections of this engine.

    `event.listens_for(Pool, ...)` would listen to all pools of the program.
    """

    @event.listens_for(engine, "connect")
    def receive_connect(_dbapi_connection: object, _record: object) -> None:
        print(f"  Connection created     (thread: {threading.current_thread().name})")

    @event.listens_for(engine, "checkout")
    def receive_checkout(_dbapi_connection: object, _record: object, _proxy: object) -> None:
        print(f"  Connection checked out (thread: {threading.current_thread().name})")

    @event.listens_for(engine, "checkin")
    def receive_checkin(_dbapi_connection: object, _record: object) -> None:
        print(f"  Connection checked in  (thread: {threading.current_thread().name})")


class Crowd:
    """Three callers who want the two connections of a pool, so one of them waits."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_over = threading.Event()
        self._threads = [self._caller("report"), self._caller("GET /users")]
        self._threads.append(self._caller("POST /orders", seconds=LOOK_AFTER_SECONDS))

    def _caller(self, label: str, seconds: float = 10.0) -> threading.Thread:
        """Start a caller; return when it has a connection, or after so many seconds."""
        has_one = threading.Event()
        thread = threading.Thread(target=self._use, args=(label, has_one), name=label)
        thread.start()
        has_one.wait(seconds)
        return thread

    def _use(self, label: str, has_one: threading.Event) -> None:
        with held_by(label), self._engine.connect():
            has_one.set()
            self._is_over.wait()

    def end(self) -> None:
        """Let all of them finish."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()


def sqlalchemys_way(url: str) -> None:
    """Print what SQLAlchemy's own pool tells."""
    engine = create_engine(url, poolclass=QueuePool, pool_size=1, max_overflow=1)
    listen(engine)
    crowd = Crowd(engine)
    pool = engine.pool
    print(f"  Size: {pool.size()}")
    print(f"  Checked out: {pool.checkedout()}")
    print(f"  Overflow: {pool.overflow()}")
    crowd.end()
    engine.dispose()


def our_way(url: str) -> None:
    """Print the same of ManagedPool, and what its snapshot adds."""
    engine = create_engine(url, poolclass=ManagedPool, pool_size=1, max_overflow=1)
    listen(engine)
    crowd = Crowd(engine)
    pool = engine.pool
    print(f"  Size: {pool.size()}, checked out: {pool.checkedout()}, overflow: {pool.overflow()}")
    show_present(snapshot(engine))
    crowd.end()
    show_past(snapshot(engine))
    pool.close()


def show_present(reading: PoolSnapshot) -> None:
    """Print how things stand at the moment of the snapshot."""
    print(f"  Waiting: {reading.waiting}, for {reading.oldest_wait_seconds * 1000:.0f} ms so far")
    for slot in reading.slots:
        if slot.held_seconds is not None:
            print(f"  Held by {slot.label} for {slot.held_seconds * 1000:.0f} ms")


def show_past(reading: PoolSnapshot) -> None:
    """Print what the pool has counted since it was made."""
    longest = reading.wait_time.max_seconds
    print(f"  Checkouts: {reading.checkouts}, of which waited: {reading.waits}")
    print(f"  Longest wait: {longest * 1000:.0f} ms, timeouts: {reading.timeouts}")
    for label, row in reading.labels.items():
        print(
            f"  {label}: waited {row.wait_seconds * 1000:.0f} ms, "
            f"made others wait {row.wait_caused_seconds * 1000:.0f} ms"
        )


def main(url: str | None = None) -> None:
    """Run both."""
    with TemporaryDirectory() as folder:
        url = url or f"sqlite:///{folder}/example.db"
        print("SQLAlchemy's way (QueuePool):")
        sqlalchemys_way(url)
        print("\nWith the snapshot (ManagedPool; it connects in threads of its own):")
        our_way(url)


if __name__ == "__main__":
    main(*sys.argv[1:2])
