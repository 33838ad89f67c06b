"""The load of ``poolkit demo``: run on one pool, measured from the outside by the callers.

Nothing here asks a pool for its numbers.  Each caller writes down when it asked, when it had its
connection and when it gave it back; everything that is shown follows from that, for both pools in
the same way.  Connections are counted by SQLAlchemy's ``connect`` and ``close`` events.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from random import Random
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, Engine, event, exc, text

from .core.holders import held_by

__all__ = ["Kind", "Load", "Moment", "Plan", "Request", "Summary", "summarise", "teach_sleep"]

POOL_SETTINGS: dict[str, Any] = {
    "pool_size": 5,
    "max_overflow": 5,
    "pool_timeout": 5,
    "pool_pre_ping": True,
}
"""The same for both pools."""

SIMULATED_CONNECT_SECONDS = 0.02

Group = Literal["web", "job", "report", "burst"]

clock = time.monotonic


class Kind(NamedTuple):
    """A kind of request: how long it keeps its connection, and what part of the mix it is."""

    label: str
    shortest: float
    longest: float
    part: int = 1
    writes: bool = False


WEB = (
    Kind("GET /users", 0.005, 0.015, 6),
    Kind("GET /orders", 0.010, 0.030, 3),
    Kind("POST /orders", 0.020, 0.040, 2, writes=True),
)
JOB = (Kind("sync job", 0.008, 0.012, writes=True),)
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
    def burst_at(self) -> float:
        """When the burst comes, counted from the start."""
        return self.seconds / 2

    def callers(self) -> Iterator[Caller]:
        """Make all callers; what each will ask for depends on the seed and its name alone."""
        for number in range(self.threads):
            yield Caller(f"web {number}", "web", WEB, self.seed, self.think_seconds)
        for number in range(self.jobs):
            # one row after the other, each in a transaction of its own, as batch jobs are written
            yield Caller(f"job {number}", "job", JOB, self.seed, 0.0)
        for number in range(self.reports):
            yield Caller(f"report {number}", "report", REPORT, self.seed, 1.0)
        for number in range(self.threads * 2):
            yield Caller(
                f"burst {number}",
                "burst",
                BURST,
                self.seed,
                self.think_seconds,
                starts_at=self.burst_at,
                most=self.burst_requests,
            )


@dataclass(slots=True)
class Request:
    """One request as its caller saw it; times in seconds of one monotonic clock."""

    label: str
    asked_at: float
    had_at: float | None = None
    ended_at: float = 0.0
    failure: Literal["", "timeout", "error"] = ""

    @property
    def wait_seconds(self) -> float:
        """From asking to having, or to giving up."""
        return (self.ended_at if self.had_at is None else self.had_at) - self.asked_at


@dataclass(eq=False)
class Caller:
    """One thread of the load."""

    name: str
    group: Group
    kinds: Sequence[Kind]
    seed: int
    think_seconds: float
    starts_at: float = 0.0
    most: int | None = None
    requests: list[Request] = field(default_factory=list)
    present: Request | None = None
    """The request it is busy with."""

    @property
    def served(self) -> int:
        """How many of its requests got a connection."""
        return sum(request.had_at is not None for request in self.requests)

    def run(self, load: Load) -> None:
        """Ask, use, give back and think, until the time is over."""
        random = Random(f"{self.seed} {self.name}")
        parts = [kind.part for kind in self.kinds]
        if load.sleep_until(load.began_at + self.starts_at):
            return
        while self.most is None or len(self.requests) < self.most:
            (kind,) = random.choices(self.kinds, parts)
            self._request(load, kind, random.uniform(kind.shortest, kind.longest))
            # drawn also where it is zero, so that all callers of a plan draw alike
            think = random.expovariate(1.0) * self.think_seconds
            if load.sleep_until(clock() + think):
                return

    def _request(self, load: Load, kind: Kind, seconds: float) -> None:
        request = self.present = Request(kind.label, clock())
        try:
            with held_by(kind.label), load.engine.connect() as connection:
                request.had_at = clock()
                load.query(connection, seconds)
                if kind.writes:
                    connection.commit()
        except exc.TimeoutError:
            request.failure = "timeout"
        except exc.SQLAlchemyError as error:
            request.failure = "error"
            load.last_error = error
        request.ended_at = clock()
        self.present = None
        self.requests.append(request)


class Moment(NamedTuple):
    """What the live table shows."""

    seconds: float
    waiting: int
    checked_out: int
    idle: int
    open: int
    opened: int
    served: int
    p99_seconds: float
    longest_seconds: float


class Load:
    """One run of a plan on one engine."""

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self.engine = engine
        self.plan = plan
        self.callers = list(plan.callers())
        self.began_at = 0.0
        self.opened = 0
        self.closed = 0
        self.last_error: exc.SQLAlchemyError | None = None
        self._counting = threading.Lock()
        self._is_over = threading.Event()
        self._statement = _sleep_statement(engine)
        event.listen(engine, "connect", self._count_opened)
        event.listen(engine, "close", self._count_closed)

    def _count_opened(self, *_: object) -> None:
        with self._counting:
            self.opened += 1

    def _count_closed(self, *_: object) -> None:
        with self._counting:
            self.closed += 1

    def query(self, connection: Connection, seconds: float) -> None:
        """Keep the database busy for so long."""
        connection.execute(self._statement, {"seconds": seconds})

    def sleep_until(self, moment: float) -> bool:
        """Sleep until then or until the load is over; return whether it is."""
        return self._is_over.wait(max(0.0, moment - clock()))

    def begin(self) -> None:
        """Open the first connection, by which the database is known to be there.

        :raises sqlalchemy.exc.SQLAlchemyError: if it is not.
        """
        with self.engine.connect() as connection:
            self.query(connection, 0.0)

    def run(self, show: Callable[[Moment], None], every: float) -> list[Request]:
        """Run the load; call ``show`` every so many seconds; return all requests.

        Who waits when the time is over is waited for: its wait belongs to the result.

        """
        threads = [
            threading.Thread(target=caller.run, args=(self,), name=caller.name, daemon=True)
            for caller in self.callers
        ]
        self.began_at = clock()
        over_at = self.began_at + self.plan.seconds
        try:
            for thread in threads:
                thread.start()
            while (left := over_at - clock()) > 0:
                time.sleep(min(every, left))
                show(self.moment())
        finally:
            self._is_over.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        return [request for caller in self.callers for request in caller.requests]

    def moment(self) -> Moment:
        """Return how things stand now, as far as one can see without stopping the callers."""
        now = clock()
        busy = [request for caller in self.callers if (request := caller.present) is not None]
        asking = [request for request in busy if request.had_at is None]
        waits = sorted(
            request.wait_seconds for caller in self.callers for request in tuple(caller.requests)
        )
        present = max((now - request.asked_at for request in asking), default=0.0)
        held = len(busy) - len(asking)
        is_open = self.opened - self.closed
        return Moment(
            seconds=now - self.began_at,
            waiting=len(asking),
            checked_out=held,
            idle=max(0, is_open - held),
            open=is_open,
            opened=self.opened,
            served=sum(caller.served for caller in self.callers),
            p99_seconds=percentile(waits, 0.99),
            longest_seconds=max(present, waits[-1] if waits else 0.0),
        )


def _sleep_statement(engine: Engine) -> Any:
    function = {"sqlite": "sleep", "postgresql": "pg_sleep"}[engine.dialect.name]
    return text(f"SELECT {function}(:seconds)")


def teach_sleep(engine: Engine) -> None:
    """Give SQLite what a database server has: time that queries and connecting take."""

    @event.listens_for(engine, "connect")
    def add_function(dbapi_connection: Any, _record: object) -> None:
        dbapi_connection.create_function("sleep", 1, time.sleep)

    @event.listens_for(engine, "do_connect")
    def take_time(*_: object) -> None:
        time.sleep(SIMULATED_CONNECT_SECONDS)


# -- what follows from the requests ----------------------------------------------------------


@dataclass(slots=True)
class Share:
    """What the callers with one label got, waited and made others wait."""

    served: int = 0
    wait_seconds: float = 0.0
    wait_caused_seconds: float = 0.0


@dataclass(frozen=True)
class Summary:
    """The figures of one run."""

    served: int
    timeouts: int
    errors: int
    waits: Sequence[float]
    """From asking to having or to giving up, of every request, in order of length."""
    least_served: int
    most_served: int
    jain: float
    """Jain's index over the web workers: 1 is equal shares, 1/n one who gets everything."""
    luckiest_wait: float
    """The shortest of the callers' average waits; web workers and jobs, who ask all the time."""
    unluckiest_wait: float
    opened: int
    labels: dict[str, Share]

    def wait(self, q: float) -> float:
        """Return the wait in seconds that a share ``q`` of all requests did not exceed."""
        return percentile(self.waits, q)

    @property
    def wait_seconds(self) -> float:
        """All waits added up."""
        return sum(self.waits)


def summarise(load: Load, requests: Sequence[Request]) -> Summary:
    """Return the figures of a run that has ended."""
    served = [caller.served for caller in load.callers if caller.group == "web"]
    averages = [
        sum(request.wait_seconds for request in caller.requests) / len(caller.requests)
        for caller in load.callers
        if caller.group in ("web", "job") and caller.requests
    ]
    return Summary(
        served=sum(request.had_at is not None for request in requests),
        timeouts=sum(request.failure == "timeout" for request in requests),
        errors=sum(request.failure == "error" for request in requests),
        waits=sorted(request.wait_seconds for request in requests),
        least_served=min(served),
        most_served=max(served),
        jain=jain(served),
        luckiest_wait=min(averages, default=0.0),
        unluckiest_wait=max(averages, default=0.0),
        opened=load.opened,
        labels=shares(requests),
    )


def percentile(ordered: Sequence[float], q: float) -> float:
    """Return the smallest of the sorted values that a share ``q`` of them does not exceed."""
    return ordered[max(0, ceil(q * len(ordered)) - 1)] if ordered else 0.0


def jain(counts: Sequence[int]) -> float:
    """Return Jain's fairness index (Jain, Chiu, Hawe: DEC-TR-301, 1984)."""
    squares = sum(count * count for count in counts)
    return sum(counts) ** 2 / (len(counts) * squares) if squares else 0.0


NOBODY = "(nobody)"


def shares(requests: Sequence[Request]) -> dict[str, Share]:
    """Return per label who was served, who waited, and who made the others wait.

    At each instant the waiting is split equally over those who hold a connection: one second in
    which six callers wait for two holders is three seconds caused by each.
    """
    labels: dict[str, Share] = {}
    changes: list[tuple[float, int, int, str]] = []
    for request in requests:
        share = labels.setdefault(request.label, Share())
        share.wait_seconds += request.wait_seconds
        changes.append((request.asked_at, 1, 0, request.label))
        if request.had_at is None:
            changes.append((request.ended_at, -1, 0, request.label))
            continue
        share.served += 1
        changes.append((request.had_at, -1, 1, request.label))
        changes.append((request.ended_at, 0, -1, request.label))
    changes.sort()
    waiting = held = 0
    holders = dict.fromkeys(labels, 0)
    before = 0.0
    for moment, more_waiting, more_held, label in changes:
        waited = (moment - before) * waiting
        if waited:
            for name, number in holders.items() if held else [(NOBODY, 1)]:
                part = waited * number / (held or 1)
                labels.setdefault(name, Share()).wait_caused_seconds += part
        before = moment
        waiting += more_waiting
        held += more_held
        holders[label] += more_held
    by_blame = sorted(labels.items(), key=lambda item: -item[1].wait_caused_seconds)
    return dict(by_blame)
