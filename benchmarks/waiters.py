"""What one request in the queue costs, the more of them there are."""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import suppress
from typing import NamedTuple

from ._harness import (
    MANAGED_POOL,
    Builder,
    Contender,
    Plan,
    StubServer,
    in_parallel,
    managed_pool,
    medians,
    now,
    on_stub,
    psycopg_pool,
    queue_pool,
)
from ._report import Row, Table

ENOUGH = 60.0
STACK = 256 * 1024


class Served(NamedTuple):
    """Microseconds for each waiter of a queue that was served to its end."""

    hand_off: float
    cpu: float


def run(plan: Plan) -> Table:
    """Let queues of threads be served by one connection, then let them time out."""
    counts, rounds = plan.pick((10, 100, 1_000), (10, 100, 300)), plan.pick(5, 1)
    default = threading.stack_size(STACK)  # a thousand default stacks may not be granted
    try:
        served = {count: _served(count, rounds) for count in counts}
        gave_up = {count: _gave_up(count, rounds) for count in counts}
    finally:
        threading.stack_size(default)
    hand_off = {
        count: {name: result.hand_off for name, result in results.items()}
        for count, results in served.items()
    }
    cpu = {
        count: {name: result.cpu for name, result in results.items()}
        for count, results in served.items()
    }
    figures = {"hand-off": hand_off, "cpu, served": cpu, "cpu, timed out": gave_up}
    rows = [
        Row(f"{figure}, {count:,} waiting", values, "{:,.1f}")
        for figure, by_count in figures.items()
        for count, values in by_count.items()
    ]
    rows += [
        Row(
            f"{figure}: {counts[-1]:,} against {counts[0]}",
            {name: by_count[counts[-1]][name] / few for name, few in by_count[counts[0]].items()},
            measured=by_count[counts[-1]][MANAGED_POOL] / by_count[counts[0]][MANAGED_POOL],
        )
        for figure, by_count in figures.items()
    ]
    return Table(
        f"waiters: microseconds for each waiting thread, one connection, median of {rounds}",
        rows,
        [
            "hand-off = from one waiter's turn to the next one's, a thread switch included",
            "cpu = of the waiting thread alone, from asking to having returned or timed out",
        ],
    )


def _pools(timeout: float) -> list[Builder]:
    return [
        queue_pool(1, timeout=timeout),
        *psycopg_pool(1, timeout=timeout),
        managed_pool(1, timeout=timeout),
    ]


def _served(count: int, rounds: int) -> dict[str, Served]:
    def measure(contender: Contender, _server: StubServer) -> Served:
        held = contender.checkout()

        def call(number: int, _begin: float) -> tuple[float, float]:
            if number == count:  # the holder: lets them all queue up first
                time.sleep(0.1 + count * 0.0003)
                begin = now()
                contender.checkin(held)
                return begin, 0.0
            used = time.thread_time()
            contender.checkin(contender.checkout())
            return now(), time.thread_time() - used

        turns = in_parallel(count + 1, call)
        begin, _ = turns.pop()
        last = max(end for end, _ in turns)
        return Served((last - begin) / count * 1e6, sum(cpu for _, cpu in turns) / count * 1e6)

    results = on_stub(_pools(ENOUGH), rounds, measure)
    return {
        name: Served(*(statistics.median(values) for values in zip(*runs, strict=True)))
        for name, runs in results.items()
    }


def _gave_up(count: int, rounds: int) -> dict[str, float]:
    def measure(contender: Contender, _server: StubServer) -> float:
        held = contender.checkout()

        def call(_number: int, _begin: float) -> float:
            used = time.thread_time()
            with suppress(Exception):  # each pool has its own timeout error
                contender.checkin(contender.checkout())
            return time.thread_time() - used

        used = in_parallel(count, call)
        contender.checkin(held)
        return sum(used) / count * 1e6

    # The last has asked before the first gives up.
    return medians(on_stub(_pools(0.1 + count * 0.0003), rounds, measure))
