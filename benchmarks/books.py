"""Whether a pool's own figures agree with what happened."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import pairwise
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from ._harness import (
    MANAGED_POOL,
    PSYCOPG_POOL,
    Contender,
    Plan,
    StubError,
    StubServer,
    in_parallel,
    managed_pool,
    now,
    psycopg_pool,
)
from ._report import Row, Table, at_most

USES, USE = 2_000, 0.0004
TIMEOUTS = 3
THREADS, SIZE = 64, 8
OUTCOMES = ("checkouts", "timeouts", "rejected", "cancelled", "failed", "unavailable")
SUMMARY = ("checkouts", "waits", "timeouts", "connects", "connect_failures")
COUNTERS = (*OUTCOMES, "requests", "waits", "checkins", "connects", "connect_failures")


def run(plan: Plan) -> Table:
    """Compare sums with a stopwatch, look at the queue after timeouts, try the laws under load."""
    off: dict[str, float] = {}
    waiting: dict[str, float] = {}
    for build in [*psycopg_pool(1, timeout=0.1), managed_pool(1, timeout=0.1)]:
        with closing(build(StubServer())) as contender:
            off[contender.name] = _uses_off_by(contender)
        with closing(build(StubServer())) as contender:
            waiting[contender.name] = _waiting_after_timeouts(contender)
    seconds = plan.pick(6.0, 2.0)
    snapshots = _under_load(seconds)
    broken = [law for snapshot in snapshots for law in _broken(snapshot)]
    broken += [law for earlier, later in pairwise(snapshots) for law in _went_back(earlier, later)]
    uses = f"{USES:,} uses of 0.4 ms: sum off by, %"
    return Table(
        "books: what a pool says against what happened",
        [
            Row(uses, off, measured=off[MANAGED_POOL], bar=at_most(5.0)),
            _count_row(f"waiting, after {TIMEOUTS} timeouts", waiting[MANAGED_POOL], waiting),
            _count_row(f"broken laws in {len(snapshots):,} snapshots", len(broken)),
        ],
        [
            "psycopg_pool adds up whole milliseconds, each use rounded down; QueuePool keeps none",
            f"laws: {THREADS} threads on {SIZE} connections for {seconds:g} s, which led to "
            + _summary(snapshots[-1]),
            *(f"broken: {law}" for law in dict.fromkeys(broken[:5])),
        ],
    )


def _count_row(what: str, ours: float, values: dict[str, float] | None = None) -> Row:
    return Row(what, values or {MANAGED_POOL: ours}, "{:.0f}", ours, "{:.0f}", at_most(0))


def _uses_off_by(contender: Contender) -> float:
    """Return how far the pool's sum of uses is from a stopwatch outside, in per cent."""
    contender.warm(1)
    before = _use_seconds(contender)
    outside = sum(_use(contender) for _ in range(USES))
    return abs(_use_seconds(contender) - before - outside) / outside * 100


def _use_seconds(contender: Contender) -> float:
    if contender.name == PSYCOPG_POOL:
        return float(contender.pool.get_stats().get("usage_ms", 0)) / 1e3
    return float(contender.pool.snapshot().use_time.sum_seconds)


def _use(contender: Contender) -> float:
    if contender.name == PSYCOPG_POOL:  # it books only the uses of this context manager
        with contender.pool.connection():
            return _slept()
    connection = contender.checkout()
    seconds = _slept()
    contender.checkin(connection)
    return seconds


def _slept() -> float:
    begin = now()
    time.sleep(USE)
    return now() - begin


def _waiting_after_timeouts(contender: Contender) -> float:
    held = contender.checkout()

    def call(_number: int, _begin: float) -> None:
        with suppress(Exception):  # each pool has its own timeout error
            contender.checkin(contender.checkout())

    in_parallel(TIMEOUTS, call)
    if contender.name == PSYCOPG_POOL:
        waiting = contender.pool.get_stats()["requests_waiting"]
    else:
        waiting = contender.pool.snapshot().waiting
    contender.checkin(held)
    return float(waiting)


def _under_load(seconds: float) -> list[Any]:
    """Take snapshots as fast as they come while threads do everything that moves a counter."""
    server = StubServer(0.002, failing=lambda number: number % 10 == 5)
    build = managed_pool(SIZE, timeout=0.03, max_lifetime=0.5)
    with closing(build(server)) as contender:
        over = threading.Event()

        def call(number: int, _begin: float) -> None:
            dice = random.Random(number)
            while not over.is_set():
                with suppress(SQLAlchemyError, StubError):
                    connection = contender.checkout()
                    time.sleep(dice.choice((0.0, 0.001, 0.008)))
                    if dice.random() < 0.01:
                        connection.invalidate()
                    contender.checkin(connection)

        load = threading.Thread(target=in_parallel, args=(THREADS, call))
        load.start()
        snapshots = []
        end = now() + seconds
        while now() < end:
            snapshots.append(contender.pool.snapshot())
            time.sleep(0.0005)
        over.set()
        load.join()
        return [*snapshots, contender.pool.snapshot()]


def _broken(s: Any) -> Iterator[str]:
    """Name the laws that one snapshot breaks."""
    closes = sum(s.closes.values())
    laws = {
        "open = idle + checked_out + checking": s.open == s.idle + s.checked_out + s.checking,
        "open + connecting + closing <= max_size": s.open + s.connecting + s.closing <= s.max_size,
        "connects - closes - detached - forgotten = open + closing": (
            s.connects - closes - s.detached - s.forgotten == s.open + s.closing
        ),
        "requests = outcomes + requesting": (
            s.requests == sum(getattr(s, outcome) for outcome in OUTCOMES) + s.requesting
        ),
        "waiting <= requesting": s.waiting <= s.requesting,
        "the waits caused = the waits had": _waits_add_up(s),
    }
    yield from (law for law, holds in laws.items() if not holds)


def _waits_add_up(s: Any) -> bool:
    """Compare who made wait with who waited.

    The waits in progress are known only between none and `waiting` times the oldest.
    """
    caused = sum(row.wait_caused_seconds for row in s.labels.values())
    ended = s.wait_time.sum_seconds + s.failed_wait_time.sum_seconds
    in_progress = s.waiting * (s.oldest_wait_seconds or 0.0)
    return bool(ended - 1e-6 <= caused <= ended + in_progress + 1e-6)


def _went_back(earlier: Any, later: Any) -> Iterator[str]:
    for counter in COUNTERS:
        if getattr(later, counter) < getattr(earlier, counter):
            yield f"{counter} went back"


def _summary(s: Any) -> str:
    counts = (f"{getattr(s, name):,} {name}" for name in SUMMARY)
    return ", ".join((*counts, f"{sum(s.closes.values()):,} closes"))
