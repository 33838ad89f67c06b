"""What callers get while the database is down, and how soon they notice that it is back."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sqlalchemy as sa

from ._harness import MANAGED_POOL, QUEUE_POOL, Plan, now
from ._outages import Turn, first_success, managed_engine, own_server, queue_engine, warm
from ._report import Row, Table, at_most

RATE = 100
ERROR = "median time to the error once it is known to be down, ms"
ATTEMPTS = "connect attempts a second"
FIRST = "first success after it is back, s"
BARS = {ERROR: 1.0, ATTEMPTS: 2.0, FIRST: 1.0}


def run(plan: Plan) -> Table:
    """Stop the server while a hundred callers a second ask."""
    seconds = plan.pick(30.0, 4.0)
    title = f"down: {seconds:g} s without a database, {RATE} callers a second, 10 connections"
    if plan.postgres is None:
        return Table(title, [Row(what, bar=at_most(bar)) for what, bar in BARS.items()])
    figures: dict[str, dict[str, float]] = {}
    with own_server() as server:
        for name, make in ((QUEUE_POOL, queue_engine), (MANAGED_POOL, managed_engine)):
            with make(server.url("psycopg2"), pool_timeout=5.0) as engine:
                for what, value in _measure(engine, server, seconds).items():
                    figures.setdefault(what, {})[name] = value
    rows = [
        Row(what, values, "{:.2f}", values[MANAGED_POOL], "{:.2f}", at_most(BARS[what]))
        for what, values in figures.items()
    ]
    return Table(
        title,
        rows,
        ["known to be down: from one second after the stop on; QueuePool has pool_pre_ping=True"],
    )


def _measure(engine: sa.Engine, server: Any, seconds: float) -> dict[str, float]:
    warm(engine)
    attempts: list[float] = []
    sa.event.listen(engine, "do_connect", lambda *_: attempts.append(now()))
    turns: list[Turn] = []

    def call() -> None:
        asked = now()
        try:
            connection = engine.raw_connection()
        except Exception as error:  # noqa: BLE001  # those of a connect are the driver's own
            turns.append(Turn(asked, now(), error))
        else:
            turns.append(Turn(asked, now()))
            connection.close()

    stop = threading.Event()
    with ThreadPoolExecutor(40) as executor:
        driver = threading.Thread(target=_open_loop, args=(executor, call, stop))
        driver.start()
        time.sleep(0.5)
        server.stop("immediate")
        known = now() + 1.0
        time.sleep(seconds)
        back = now()
        server.start()
        answers = now()
        time.sleep(2.0)
        stop.set()
        driver.join()
    errors = [t.seconds for t in turns if t.error is not None and known <= t.asked < back]
    return {
        ERROR: statistics.median(errors) * 1e3,
        ATTEMPTS: sum(known <= moment < back for moment in attempts) / (back - known),
        FIRST: max(0.0, first_success(turns, back) - (answers - back)),
    }


def _open_loop(executor: ThreadPoolExecutor, call: Any, stop: threading.Event) -> None:
    """Ask so many times a second, whatever becomes of those who asked before."""
    due = now()
    while not stop.is_set():
        executor.submit(call)
        due += 1 / RATE
        time.sleep(max(0.0, due - now()))
