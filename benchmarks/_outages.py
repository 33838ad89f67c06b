"""What the benchmarks of outages share: engines on a real server, callers, and how they fared."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from ._harness import now, percentile

SIZE = 10


@contextmanager
def queue_engine(url: Any, *, size: int = SIZE, **settings: Any) -> Iterator[sa.Engine]:
    """Make an engine on SQLAlchemy's own pool, which pings at every checkout."""
    engine = sa.create_engine(url, pool_size=size, max_overflow=0, pool_pre_ping=True, **settings)
    yield engine
    engine.dispose()


@contextmanager
def managed_engine(url: Any, *, size: int = SIZE, **settings: Any) -> Iterator[sa.Engine]:
    """Make an engine on our pool."""
    from sqla_poolkit import ManagedPool

    engine = sa.create_engine(url, poolclass=ManagedPool, max_size=size, **settings)
    yield engine
    engine.pool.close(timeout=2.0)


def warm(engine: sa.Engine, connections: int = SIZE) -> None:
    """Have so many connections open and idle."""
    for connection in [engine.pool.connect() for _ in range(connections)]:
        connection.close()


@contextmanager
def delaying_proxy(host: str, port: int, seconds: float) -> Iterator[int]:
    """Start a proxy in a process of its own that adds a delay each way; yield its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sqla_poolkit.testing", host, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        own_port = int(process.stdout.readline().split()[-1].rpartition(":")[2])
        process.stdin.write(f"delay {seconds}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if answer.startswith("error"):
            raise RuntimeError(answer)
        yield own_port
    finally:
        process.stdin.close()
        process.wait(10)


@dataclass(frozen=True, slots=True)
class Turn:
    """One attempt of a caller: when it asked, when it had its answer, and what that was."""

    asked: float
    answered: float
    error: BaseException | None = None
    in_flight: bool = False
    """It had a connection when the error came."""

    @property
    def seconds(self) -> float:
        """Return how long the answer took."""
        return self.answered - self.asked


@dataclass
class Callers:
    """Threads that use an engine again and again until told to stop."""

    engine: sa.Engine
    threads: int
    use: Callable[[Any], object]
    pause: float = 0.0
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self.asking: dict[int, float] = {}
        """Since when each thread waits for an answer."""
        self._workers = [
            threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(self.threads)
        ]
        for worker in self._workers:
            worker.start()

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            self.turns.append(self._turn(number))
            if self.pause:
                time.sleep(self.pause)

    def _turn(self, number: int) -> Turn:
        asked = self.asking[number] = now()
        try:
            connection = self.engine.raw_connection()
        except Exception as error:  # noqa: BLE001  # those of a connect are the driver's own
            return Turn(asked, now(), error)
        finally:
            del self.asking[number]
        had = now()
        try:
            self.use(connection)
        except Exception as error:  # noqa: BLE001
            return Turn(asked, now(), error, in_flight=True)
        finally:
            connection.close()
        return Turn(asked, had)

    def stop(self, limit: float) -> int:
        """Stop; return how many threads are not back after so long."""
        self._stop.set()
        give_up = now() + limit
        for worker in self._workers:
            worker.join(max(0.0, give_up - now()))
        return sum(worker.is_alive() for worker in self._workers)


def first_success(turns: list[Turn], moment: float) -> float:
    """Return how long after ``moment`` the first caller that was served then had a connection."""
    served = [t.answered for t in turns if t.error is None and t.answered >= moment]
    return min(served, default=float("inf")) - moment


def select_one(connection: Any) -> None:
    """Run the shortest transaction there is."""
    cursor = connection.cursor()
    cursor.execute("SELECT 1")
    cursor.fetchall()
    cursor.close()
    connection.rollback()


def nothing(_connection: Any) -> None:
    """Hold for a millisecond, and ask the server for nothing."""
    time.sleep(0.001)


def quantile(turns: list[Turn], q: float) -> float:
    """Return a quantile of the seconds until the answer."""
    return percentile(sorted(turn.seconds for turn in turns), q) if turns else float("nan")


@contextmanager
def own_server() -> Iterator[Any]:
    """Start a PostgreSQL of the benchmark's own, to be stopped and frozen."""
    from tests.servers import PostgresServer  # late: the other benchmarks need no tests

    # what is expected to fail would be told between the tables
    logger = logging.getLogger("sqlalchemy.pool")
    before, logger.level = logger.level, logging.CRITICAL
    try:
        with PostgresServer() as server:
            yield server
            server.mend()
    finally:
        logger.level = before
