"""What callers feel when fifty connections that were opened together reach their age."""

from __future__ import annotations

import threading
import time
from typing import Any

from ._harness import (
    MANAGED_POOL,
    QUEUE_POOL,
    Contender,
    Plan,
    StubServer,
    hot_threads,
    managed_pool,
    now,
    on_stub,
    percentile,
    queue_pool,
)
from ._report import Row, Table, at_least, at_most

CONNECTIONS, PLACES, THREADS = 50, 60, 20
CONNECT, HOLD = 0.050, 0.010
MAX_CONNECTING = 3
TAIL, AT_A_TIME, SPREAD = "p99.9 checkout, ms", "replacements at a time", "the first wave takes, s"


class Server(StubServer):
    """Counts the attempts that are in flight at a time."""

    def __init__(self) -> None:
        super().__init__(CONNECT)
        self.in_flight = self.most_in_flight = 0
        self._count = threading.Lock()

    def connect(self) -> Any:
        """Open a connection."""
        with self._count:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return super().connect()
        finally:
            with self._count:
                self.in_flight -= 1


def run(plan: Plan) -> Table:
    """Let fifty connections age together under load."""
    lifetime, seconds = plan.pick(20, 4), plan.pick(60.0, 8.0)

    def measure(contender: Contender, server: StubServer) -> dict[str, float]:
        assert isinstance(server, Server)
        contender.warm(CONNECTIONS)
        server.most_in_flight = 0
        begin = now()
        load = hot_threads(contender, THREADS, seconds, lambda _: time.sleep(HOLD))
        wave = [moment for moment in server.attempts if begin < moment <= begin + lifetime]
        return {
            TAIL: percentile(load.waits, 0.999) * 1e3,
            AT_A_TIME: server.most_in_flight,
            SPREAD: wave[-1] - wave[0] if wave else 0.0,
        }

    found = on_stub(
        [
            queue_pool(CONNECTIONS, max_overflow=PLACES - CONNECTIONS, recycle=lifetime),
            managed_pool(PLACES, max_lifetime=lifetime),
        ],
        1,
        measure,
        Server,
    )
    figures = {
        what: {name: runs[0][what] for name, runs in found.items()}
        for what in (TAIL, AT_A_TIME, SPREAD)
    }
    bars = {
        TAIL: at_most(5.0),
        AT_A_TIME: at_most(MAX_CONNECTING),
        SPREAD: at_least(lifetime / 5),
    }
    return Table(
        f"turnover: {CONNECTIONS} connections opened together, max_lifetime={lifetime}, "
        f"{PLACES} places, {THREADS} threads, 50 ms to connect, {seconds:g} s",
        [
            Row(what, values, "{:.1f}", values[MANAGED_POOL], "{:.1f}", bars[what])
            for what, values in figures.items()
        ],
        [f"{QUEUE_POOL} has recycle={lifetime}; the bar of the wave is a fifth of max_lifetime"],
    )
