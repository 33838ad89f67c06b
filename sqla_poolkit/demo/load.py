"""The load: who asks for connections, measured from the outside by those who ask.

Nothing here asks a pool for its numbers.  Each caller writes down when it asked, when it had its
connection and when it gave it back; all that is shown follows from that, for both pools in the
same way.  Connections are counted by SQLAlchemy's ``connect`` and ``close`` events.

A caller is a description, step by step; threads (``_threads.py``) or tasks (``_tasks.py``) do it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, NamedTuple

from sqlalchemy import Engine, event, exc, text
from sqlalchemy.pool import Pool

from ..core.holders import held_by
from .figures import Request, Summary, jain, percentile, shares

__all__ = [
    "FAILURES",
    "POOL_SETTINGS",
    "SIMULATED_CONNECT_SECONDS",
    "SLEEP",
    "Caller",
    "Load",
    "Moment",
    "Plan",
    "Step",
    "clock",
]

POOL_SETTINGS: dict[str, Any] = {
    "pool_size": 5,
    "max_overflow": 5,
    "pool_timeout": 5,
    "pool_pre_ping": True,
}
"""The same for both pools."""

SLEEP = {"sqlite": "sleep", "postgresql": "pg_sleep"}
"""The SQL function that takes its time, per database; SQLite's is ours."""

SIMULATED_CONNECT_SECONDS = 0.02

# Drivers for asyncio pass on what the network raises; before Python 3.11 its timeout is no OSError.
FAILURES = (exc.SQLAlchemyError, OSError, asyncio.TimeoutError)
"""What a request can meet when the database is not well."""

clock = time.monotonic


class Kind(NamedTuple):
    """A kind of request: how long it keeps its connection, and what part of the mix it is."""

    label: str
    shortest: float
    longest: float
    part: int = 1
    commits: bool = False


WEB = (
    Kind("GET /users", 0.005, 0.015, 6),
    Kind("GET /orders", 0.010, 0.030, 3),
    Kind("POST /orders", 0.020, 0.040, 2, commits=True),
)
JOB = (Kind("sync job", 0.008, 0.012, commits=True),)
REPORT = (Kind("report", 0.4, 0.8),)
BURST = (Kind("GET /offers", 0.005, 0.015),)


@dataclass(frozen=True)
class Plan:
    """Who asks for connections, how often and for how long; the same plan for each pool."""

    seconds: float = 12.0
    threads: int = 40
    seed: int = 1
    think_seconds: float = 0.06
    jobs: int = 3
    reports: int = 2
    burst_requests: int = 3

    @property
    def burst(self) -> int:
        """How many callers come at once."""
        return self.threads * 2

    @property
    def burst_at(self) -> float:
        """When they come, counted from the start."""
        return self.seconds / 2

    def callers(self) -> Iterator[Caller]:
        """Make all callers."""
        for number in range(self.threads):
            yield self._caller("web", number, WEB, self.think_seconds)
        for number in range(self.jobs):
            yield self._caller("job", number, JOB, 0.0)
        for number in range(self.reports):
            yield self._caller("report", number, REPORT, 1.0)
        for number in range(self.burst):
            caller = self._caller("burst", number, BURST, self.think_seconds)
            caller.starts_at = self.burst_at
            caller.most = self.burst_requests
            yield caller

    def _caller(self, group: Group, number: int, kinds: Sequence[Kind], think: float) -> Caller:
        # what a caller asks for depends on nothing but the seed, its group and its number
        return Caller(group, kinds, think, Random(f"{self.seed} {group} {number}"))


Group = Literal["web", "job", "report", "burst"]


class Step(NamedTuple):
    """What a caller does next: wait until a moment, then keep a connection busy for a while."""

    at: float
    kind: Kind
    seconds: float


@dataclass(eq=False)
class Caller:
    """One thread or task of the load."""

    group: Group
    kinds: Sequence[Kind]
    think_seconds: float
    random: Random
    starts_at: float = 0.0
    most: int | None = None
    requests: list[Request] = field(default_factory=list)
    present: Request | None = None
    """The request it is busy with."""

    @property
    def served(self) -> int:
        """How many of its requests got a connection."""
        return sum(request.had_at is not None for request in self.requests)

    @property
    def average_wait(self) -> float:
        """The average of its waits, 0 if it never asked."""
        waits = [request.wait_seconds for request in self.requests]
        return sum(waits) / len(waits) if waits else 0.0

    def steps(self, began_at: float) -> Iterator[Step]:
        """Give what it does, one step after the other; who carries them out ends it."""
        random = self.random
        parts = [kind.part for kind in self.kinds]
        at = began_at + self.starts_at
        while self.most is None or len(self.requests) < self.most:
            (kind,) = random.choices(self.kinds, parts)
            yield Step(at, kind, random.uniform(kind.shortest, kind.longest))
            at = clock() + random.expovariate(1.0) * self.think_seconds

    @contextmanager
    def asking(self, kind: Kind, load: Load) -> Iterator[Request]:
        """Write down a request; whoever makes it in the block says when it had its connection."""
        request = self.present = Request(kind.label, clock())
        try:
            with held_by(kind.label):
                yield request
        except exc.TimeoutError:
            request.failure = "timeout"
        except FAILURES as error:
            request.failure = "error"
            load.last_error = error
        request.ended_at = clock()
        self.present = None
        self.requests.append(request)


class Moment(NamedTuple):
    """How things stand while a load runs."""

    seconds: float
    waiting: int
    checked_out: int
    idle: int
    open: int
    served: int
    p99_seconds: float
    longest_seconds: float


class Load(ABC):
    """One run of a plan on one engine; the subclasses make callers of threads or of tasks."""

    each_caller: str
    """What a caller is, in words."""

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self.plan = plan
        self.callers = list(plan.callers())
        self.began_at = 0.0
        self.opened = 0
        self.closed = 0
        self.last_error: Exception | None = None
        self.sleep = text(f"SELECT {SLEEP[engine.dialect.name]}(:seconds)")
        """Keeps the database busy for so long."""
        self._counting = threading.Lock()
        event.listen(engine, "connect", self._count_opened)
        event.listen(engine, "close", self._count_closed)
        if engine.dialect.name == "sqlite":
            self._teach_sleep(engine)

    @property
    @abstractmethod
    def pool(self) -> Pool:
        """The pool that is measured."""

    @property
    def name(self) -> str:
        """The kind of pool."""
        return type(self.pool).__name__

    def _count_opened(self, *_: object) -> None:
        with self._counting:
            self.opened += 1

    def _count_closed(self, *_: object) -> None:
        with self._counting:
            self.closed += 1

    def _teach_sleep(self, engine: Engine) -> None:
        """Give SQLite what a database server has: queries and connecting that take time."""

        @event.listens_for(engine, "connect")
        def add_function(dbapi_connection: Any, _record: object) -> None:
            dbapi_connection.create_function("sleep", 1, time.sleep)

    @abstractmethod
    def begin(self) -> None:
        """Open the first connection, by which the database is known to be there.

        :raises sqlalchemy.exc.SQLAlchemyError: if it is not, or OSError.
        """

    def run(self, show: Callable[[Moment], None], every: float) -> None:
        """Run the load, and call ``show`` every so many seconds.

        Who still waits when the time is over is waited for: its wait belongs to the result.
        """
        self.began_at = clock()
        over_at = self.began_at + self.plan.seconds
        try:
            self._start()
            while (left := over_at - clock()) > 0:
                time.sleep(min(every, left))
                show(self.moment())
        finally:
            self._finish()

    @abstractmethod
    def _start(self) -> None:
        """Set all callers going."""

    @abstractmethod
    def _finish(self) -> None:
        """Tell the callers that the time is over, and wait for them."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections; nothing is left running.  Twice is as good as once."""

    def moment(self) -> Moment:
        """Return how things stand now, as far as one sees without stopping the callers."""
        now = clock()
        busy = [present for caller in self.callers if (present := caller.present) is not None]
        asking = [request for request in busy if request.had_at is None]
        ended = [request for caller in self.callers for request in tuple(caller.requests)]
        waits = sorted(request.wait_seconds for request in ended)
        longest_present = max((now - request.asked_at for request in asking), default=0.0)
        is_open = self.opened - self.closed
        # what one caller has given back, the next may have before the first has written it down
        held = min(len(busy) - len(asking), is_open)
        return Moment(
            seconds=now - self.began_at,
            waiting=len(asking),
            checked_out=held,
            idle=is_open - held,
            open=is_open,
            served=sum(request.had_at is not None for request in ended),
            p99_seconds=percentile(waits, 0.99),
            longest_seconds=max(longest_present, waits[-1] if waits else 0.0),
        )

    def summary(self) -> Summary:
        """Return the figures of the run, which has ended."""
        requests = [request for caller in self.callers for request in caller.requests]
        web = [caller.served for caller in self.callers if caller.group == "web"]
        averages = [
            caller.average_wait for caller in self.callers if caller.group in ("web", "job")
        ]
        return Summary(
            served=sum(request.had_at is not None for request in requests),
            timeouts=sum(request.failure == "timeout" for request in requests),
            errors=sum(request.failure == "error" for request in requests),
            waits=sorted(request.wait_seconds for request in requests),
            least_served=min(web),
            most_served=max(web),
            jain=jain(web),
            luckiest_wait=min(averages),
            unluckiest_wait=max(averages),
            opened=self.opened,
            labels=shares(requests),
        )
