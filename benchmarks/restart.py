"""What a restart of the server costs fifty busy threads."""

from __future__ import annotations

import threading
import time
from typing import Any

import sqlalchemy as sa

from ._harness import MANAGED_POOL, QUEUE_POOL, Plan, now
from ._outages import (
    Callers,
    first_success,
    managed_engine,
    own_server,
    queue_engine,
    select_one,
    warm,
)
from ._report import Row, Table, at_most

THREADS = 50
NOT_IN_FLIGHT = "errors of callers without a connection"
IN_FLIGHT = "errors of work in flight"
FIRST = "first success after the server answers, s"
AFTER = "errors more than 1 s after that"


def run(plan: Plan) -> Table:
    """Restart the server under load; errors are for who had a connection at that moment."""
    title = f"restart: pg_ctl restart -m immediate under {THREADS} threads, 10 connections"
    bars = {NOT_IN_FLIGHT: 0.0, FIRST: 1.0, AFTER: 0.0}
    figures: dict[str, dict[str, float]] = {}
    if plan.postgres is None:
        return Table(title, [Row(what, bar=at_most(bar)) for what, bar in bars.items()])
    with own_server() as server:
        for name, make, settings in (
            (QUEUE_POOL, queue_engine, {}),
            ('on_outage="raise"', managed_engine, {}),
            (MANAGED_POOL, managed_engine, {"on_outage": "wait"}),
        ):
            with make(server.url("psycopg2"), **settings) as engine:
                for what, value in _measure(engine, server, plan).items():
                    figures.setdefault(what, {})[name] = value
    rows = [
        Row(
            what,
            values,
            "{:.2f}" if what == FIRST else "{:.0f}",
            values[MANAGED_POOL] if what in bars else None,
            "{:.2f}" if what == FIRST else "{:.0f}",
            at_most(bars[what]) if what in bars else None,
        )
        for what, values in figures.items()
    ]
    return Table(
        title,
        rows,
        [
            'ManagedPool has on_outage="wait": who has no connection yet waits for the server',
            "QueuePool has pool_pre_ping=True",
        ],
    )


def _measure(engine: sa.Engine, server: Any, plan: Plan) -> dict[str, float]:
    warm(engine)
    callers = Callers(engine, THREADS, select_one)
    time.sleep(plan.pick(2.0, 0.5))
    answers_at: list[float] = []
    probe = threading.Thread(target=_note_when_it_answers, args=(server, answers_at))
    server.stop("immediate")
    probe.start()
    server.start()
    probe.join()
    time.sleep(plan.pick(5.0, 2.0))
    callers.stop(10.0)
    turns = callers.turns
    failed = [turn for turn in turns if turn.error is not None]
    return {
        IN_FLIGHT: sum(turn.in_flight for turn in failed),
        NOT_IN_FLIGHT: sum(not turn.in_flight for turn in failed),
        FIRST: max(0.0, first_success(turns, answers_at[0])),
        AFTER: sum(turn.answered > answers_at[0] + 1.0 for turn in failed),
    }


def _note_when_it_answers(server: Any, moments: list[float]) -> None:
    import psycopg2  # late: where it is not installed the other benchmarks run

    parameters = sa.make_url(server.url("psycopg2")).translate_connect_args(username="user")
    while not moments:
        try:
            psycopg2.connect(**parameters).close()
        except psycopg2.OperationalError:
            time.sleep(0.005)
        else:
            moments.append(now())
