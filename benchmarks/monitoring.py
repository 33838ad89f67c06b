"""What `monitor()` adds to a checkout and a checkin of QueuePool, and what a duration costs."""

from __future__ import annotations

import gc
import importlib.util
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import repeat
from time import thread_time
from typing import Any

from sqlalchemy.engine import Engine, make_url
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.pool import QueuePool

from sqla_poolkit import monitor
from sqla_poolkit.core.histogram import Recorder

from ._harness import QUEUE_POOL, Plan, StubServer, interleave
from ._report import Row, Table, at_most, ratio_row

AGAIN = "QueuePool again"
LABEL = 'monitor, track="label"'
CALLER = 'monitor, track="caller"'
OPENTELEMETRY = "OpenTelemetry SDK"
ADDED_BAR = 2.0
"""Microseconds, where OpenTelemetry's instrumentation adds so many:"""
OPENTELEMETRY_ADDS = 35.0
RECORDING_BAR = 0.25
PER_ROUND = 5_000
BATCH = 512


def run(plan: Plan) -> Table:
    """Compare a bare pool with monitored ones."""
    rounds = plan.pick(60, 15)
    ways = [QUEUE_POOL, AGAIN, LABEL, CALLER]
    notes = [
        "pool.connect().close() on a stub, one thread, behind an engine",
        f"{rounds} rounds of {PER_ROUND:,}, interleaved, collector off inside a round",
        "time on the processor, so that what else runs on the machine counts less",
        "added: less the bare pool in the same round; the median, and the range of the middle half",
        f"{AGAIN}: the same pool once more, to show how much of a difference is chance",
    ]
    if importlib.util.find_spec("opentelemetry.instrumentation.sqlalchemy") is None:
        notes.append(f"{OPENTELEMETRY}: opentelemetry-instrumentation-sqlalchemy is not installed")
    else:
        ways.append(OPENTELEMETRY)
        notes.append(f"{OPENTELEMETRY}: its instrumentation and SDK, read from memory")
    with ExitStack() as stack:
        engines = {way: stack.enter_context(_engine(way)) for way in ways}
        seconds = _time(engines, rounds)
        books = _books_row(engines, rounds)
    table = Table("monitoring: checkout + checkin of QueuePool, microseconds", notes=notes)
    table.rows += [*_rows(seconds), books, _recording(plan)]
    return table


@contextmanager
def _engine(way: str) -> Iterator[Engine]:
    """Make an engine on a stub, watched in one of the ways."""
    dialect = DefaultDialect()
    pool = QueuePool(StubServer().connect, pool_size=5, dialect=dialect)
    engine = Engine(pool, dialect, make_url("stub://host:5432/database"))
    if way in (LABEL, CALLER):
        with monitor(engine, track="label" if way == LABEL else "caller"):
            yield engine
    elif way == OPENTELEMETRY:
        with _instrumented(engine):
            yield engine
    else:
        yield engine
    engine.dispose()


@contextmanager
def _instrumented(engine: Engine) -> Iterator[None]:
    from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    provider = MeterProvider(metric_readers=[InMemoryMetricReader()])
    instrumentor = SQLAlchemyInstrumentor()
    # it knows no SQLAlchemy 2.1, but works with it as far as this goes
    instrumentor.instrument(engine=engine, meter_provider=provider, skip_dep_check=True)
    yield
    instrumentor.uninstrument()
    provider.shutdown()


def _time(engines: dict[str, Engine], rounds: int) -> dict[str, list[float]]:
    """Let the engines take turns; return microseconds per checkout and checkin, by round."""
    micros: dict[str, list[float]] = {way: [] for way in engines}
    for engine in engines.values():
        engine.pool.connect().close()
    for way in interleave(list(engines), rounds):
        connect = engines[way].pool.connect
        gc.collect()
        gc.disable()
        try:
            begin = thread_time()
            for _ in repeat(None, PER_ROUND):
                connect().close()
            micros[way].append((thread_time() - begin) / PER_ROUND * 1e6)
        finally:
            gc.enable()
    return micros


def _rows(micros: dict[str, list[float]]) -> Iterator[Row]:
    yield Row("median", {way: statistics.median(values) for way, values in micros.items()})
    yield Row("minimum", {way: min(values) for way, values in micros.items()})
    bare = micros[QUEUE_POOL]
    added = {
        way: [value - plain for value, plain in zip(values, bare, strict=True)]
        for way, values in micros.items()
        if way != QUEUE_POOL
    }
    for way, values in added.items():
        is_barred = way == LABEL and OPENTELEMETRY not in added
        yield ratio_row(
            f"{way}: added, by round", _middle(values), at_most(ADDED_BAR) if is_barred else None
        )
    if OPENTELEMETRY in added:
        ratios = [
            ours / theirs for ours, theirs in zip(added[LABEL], added[OPENTELEMETRY], strict=True)
        ]
        yield _share(f"{LABEL}: added / {OPENTELEMETRY} adds, by round", _middle(ratios))
        least = min(micros[LABEL]) - min(bare), min(micros[OPENTELEMETRY]) - min(bare)
        yield _share("the same of the minimums", [least[0] / least[1]])


def _share(figure: str, ratios: list[float]) -> Row:
    return Row(
        figure,
        measured=statistics.median(ratios),
        measured_unit="{:.3f}",
        bar=at_most(ADDED_BAR / OPENTELEMETRY_ADDS),
        samples=ratios,
    )


def _middle(values: list[float]) -> list[float]:
    quarter = len(values) // 4
    return sorted(values)[quarter:-quarter]


def _books_row(engines: dict[str, Engine], rounds: int) -> Row:
    """Show that everything was recorded: one checkout more, to warm up, than was timed."""
    made = rounds * PER_ROUND + 1
    values: dict[str, Any] = {
        way: monitor(engines[way]).snapshot().use_time.count / made for way in (LABEL, CALLER)
    }
    return Row("uses in the books / made", values)


def _recording(plan: Plan) -> Row:
    """Time what it costs to count a duration, the sorting into buckets included.

    90 % of them are about 20 microseconds, 9 % 5 ms and 1 % half a second.
    """
    draw = random.Random(5)
    scales = draw.choices((20e-6, 5e-3, 0.5), (90, 9, 1), k=BATCH)
    times = [scale * draw.uniform(0.5, 1.5) for scale in scales]

    def record_batch() -> float:
        recorder = Recorder()
        record: Callable[[float], None] = recorder.record
        begin = thread_time()
        for seconds in times:
            record(seconds)
        recorder.sort()
        return (thread_time() - begin) / BATCH * 1e6

    samples = [record_batch() for _ in repeat(None, plan.pick(2000, 300))]
    return ratio_row("recording a duration", _middle(samples), at_most(RECORDING_BAR))
