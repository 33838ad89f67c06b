"""Observers hear what happens, in order, and never cost anybody a connection."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from sqla_poolkit import (
    ManagedPool,
    MonitoredQueuePool,
    PoolEvent,
    PoolTimeout,
    PoolUnavailable,
    held_by,
    snapshot,
    watch,
)
from sqla_poolkit.core import events as events_module
from sqla_poolkit.core.events import event_classes
from sqla_poolkit.errors import ArgumentError
from sqla_poolkit.watch import log_events, observe, recent_events
from sqla_poolkit.watch.logs import LEVELS
from tests.waiting import until

PATIENCE = 10.0
HERE = Path(__file__)

Engines = Callable[..., sa.Engine]


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Engines]:
    """Makes engines on one SQLite file."""
    made: list[sa.Engine] = []

    def make(poolclass: Any = ManagedPool, **settings: Any) -> sa.Engine:
        made.append(
            sa.create_engine(f"sqlite:///{tmp_path / 'shop.db'}", poolclass=poolclass, **settings)
        )
        return made[-1]

    yield make
    for engine in made:
        close = getattr(engine.pool, "close", None)
        close(timeout=0.0) if close else engine.dispose()


def names(events: Any) -> list[str]:
    return [event.name for event in events]


# -- what is told -----------------------------------------------------------------------------


def test_an_observer_hears_what_happens_in_order(engines: Engines):
    engine = engines(max_size=1, pool_timeout=0)
    heard: list[PoolEvent] = []
    with observe(heard.append, engine):
        with held_by("report"):
            held = engine.connect()
        with pytest.raises(PoolTimeout), held_by("GET /users"):
            engine.connect()
        held.close()
        engine.pool.retire_all()
        until(lambda: len(heard) == 3)
    assert names(heard) == ["connection_opened", "checkout_timed_out", "connection_closed"]
    opened, timed_out, closed = heard
    assert isinstance(timed_out, watch.CheckoutTimedOut)
    assert timed_out.to_dict() == {
        "event": "checkout_timed_out",
        "pool": "shop.db",
        "at": timed_out.at,
        "label": "GET /users",
        "caller": timed_out.caller,
        "waited_seconds": 0.0,
        "checked_out": 1,
        "waiting": 0,
    }
    assert re.fullmatch(
        rf"{re.escape(str(HERE))}:\d+ {timed_out.caller.split()[-1]}", timed_out.caller
    )
    assert isinstance(closed, watch.ConnectionClosed)
    assert (closed.reason, closed.uses) == ("retired", 1)
    assert abs(timed_out.at - time.time()) < PATIENCE
    assert opened.at <= timed_out.at <= closed.at


def test_an_observer_of_some_events_hears_of_no_others(engines: Engines):
    engine = engines()
    heard: list[PoolEvent] = []
    with observe(heard.append, engine, events=[watch.ConnectionClosed]):
        engine.connect().close()
        engine.dispose()
        until(lambda: heard)
    assert names(heard) == ["connection_closed"]


def test_an_observer_of_the_process_hears_of_every_pool_and_of_later_ones(engines: Engines):
    before = engines(pool_name="before")
    heard: list[PoolEvent] = []
    with observe(heard.append, events=[watch.ConnectionOpened]):
        after = engines(MonitoredQueuePool, pool_name="after")
        before.connect().close()
        after.connect().close()
        until(lambda: len(heard) == 2)
    assert [event.pool for event in heard] == ["before", "after"]
    engines(pool_name="too late").connect().close()
    assert len(heard) == 2


def test_an_observer_stays_when_the_engine_is_disposed(engines: Engines):
    engine = engines()
    heard: list[PoolEvent] = []
    with observe(heard.append, engine, events=[watch.ConnectionOpened]):
        for _ in range(2):
            engine.connect().close()
            engine.dispose()
        until(lambda: len(heard) == 2)


def test_after_stop_nothing_is_told(engines: Engines):
    engine = engines()
    heard: list[PoolEvent] = []
    observation = observe(heard.append, engine)
    observation.stop()
    observation.stop()
    engine.connect().close()
    assert (heard, engine.pool._driver.journal.readers) == ([], ())


def test_waits_are_told_to_those_who_ask_for_them(engines: Engines):
    engine = engines(max_size=1)
    heard: list[Any] = []
    engine.connect().close()
    before = snapshot(engine)
    with observe(heard.append, engine, events=[watch.CheckoutWaited]):
        held = engine.connect()
        waiter = threading.Thread(target=lambda: engine.connect().close())
        waiter.start()
        until(lambda: snapshot(engine).waiting)
        held.close()
        waiter.join()
        until(lambda: heard)
    assert sum(event.waited_seconds for event in heard) == pytest.approx(
        snapshot(engine).wait_time.sum_seconds - before.wait_time.sum_seconds
    )
    assert recent_events(engine)[-1] == heard[-1]


def test_a_pool_of_sqlalchemys_tells_the_same(engines: Engines):
    engine = engines(MonitoredQueuePool, pool_size=1, max_overflow=0, pool_timeout=0.05)
    heard: list[PoolEvent] = []
    with observe(heard.append, engine):
        held = engine.connect()
        with pytest.raises(sa.exc.TimeoutError):
            engine.connect()
        held.detach()
        held.close()
        engine.connect().close()
        engine.dispose()
        until(lambda: len(heard) == 5)
    assert names(heard) == [
        "connection_opened",
        "checkout_timed_out",
        "connection_lost",
        "connection_opened",
        "connection_closed",
    ]


def test_an_engine_that_keeps_no_books_cannot_be_observed():
    with pytest.raises(ArgumentError, match="keeps no books"):
        observe(print, sa.create_engine("sqlite://"))
    with pytest.raises(ArgumentError, match="no class of events"):
        observe(print, events=[int])  # type: ignore[list-item]


# -- observers that misbehave -------------------------------------------------------------------


def test_an_observer_that_raises_is_reported_once_and_counted(
    engines: Engines, caplog: pytest.LogCaptureFixture
):
    engine = engines(max_uses=1)

    def fail(event: PoolEvent) -> None:
        raise SystemExit("an observer's affair")

    with observe(fail, engine, events=[watch.ConnectionOpened]):
        for _ in range(5):
            engine.connect().close()
        until(lambda: snapshot(engine).observer_errors == snapshot(engine).connects >= 5)
    assert [record.getMessage().partition(" raised")[0] for record in caplog.records] == [
        "An observer of pool 'shop.db'"
    ]


def test_an_observer_that_never_comes_back_costs_nobody_a_connection(
    engines: Engines, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sqla_poolkit.watch.observers._MOST_LETTERS", 3)
    engine = engines(max_uses=1)
    gate = threading.Event()
    with observe(lambda _: gate.wait(PATIENCE), engine, events=[watch.ConnectionOpened]):
        begin = time.monotonic()
        for _ in range(20):
            engine.connect().close()
        assert time.monotonic() - begin < 2.0
        reading = snapshot(engine)
        # one is in its hands, three wait
        assert reading.connects - 4 <= reading.observer_errors <= reading.connects - 3
        until(lambda: "Events are lost" in caplog.text)
        gate.set()


def test_one_observer_does_not_hold_another_up(engines: Engines):
    engine = engines()
    gate = threading.Event()
    heard: list[PoolEvent] = []
    with observe(lambda _: gate.wait(PATIENCE), engine), observe(heard.append, engine):
        engine.connect().close()
        until(lambda: heard)
        gate.set()


def test_an_observer_may_use_the_pool_it_observes(engines: Engines):
    engine = engines(max_size=1)
    answers: list[Any] = []

    def ask(_: PoolEvent) -> None:
        with engine.connect() as connection:
            answers.append(connection.scalar(sa.text("SELECT 42")))

    with observe(ask, engine, events=[watch.ConnectionOpened]):
        engine.connect().close()
        until(lambda: answers)
    assert answers == [42]


# -- what is remembered --------------------------------------------------------------------------


def test_an_error_carries_what_happened_before(engines: Engines):
    engine = engines(max_size=1, pool_timeout=0)
    held = engine.connect()
    with pytest.raises(PoolTimeout) as caught:
        engine.connect()
    assert names(caught.value.events) == ["connection_opened", "checkout_timed_out"]
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.events == caught.value.events
    held.close()


def test_a_flood_of_one_event_leaves_the_others(engines: Engines):
    engine = engines(max_size=1, pool_timeout=0)
    held = engine.connect()
    for _ in range(100):
        with pytest.raises(PoolTimeout):
            engine.connect()
    held.close()
    told = Counter(names(recent_events(engine)))
    assert told == {"connection_opened": 1, "checkout_timed_out": 20}


def test_an_outage_is_told_at_both_ends(tmp_path: Path):
    file = tmp_path / "no folder yet" / "shop.db"
    engine = sa.create_engine(f"sqlite:///{file}", poolclass=ManagedPool)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            engine.connect()
        except PoolUnavailable as error:
            last = error
            break
        except sa.exc.OperationalError:
            time.sleep(0.05)
    assert names(last.events)[-2:] == ["database_lost", "checkout_unavailable"]
    lost = last.events[-2]
    assert isinstance(lost, watch.DatabaseLost)
    assert lost.error == "OperationalError: unable to open database file"
    file.parent.mkdir()
    until(lambda: "database_found" in names(recent_events(engine)))
    engine.connect().close()
    engine.pool.close()


# -- holds and exhaustion -------------------------------------------------------------------------


def test_a_long_hold_is_told_once_and_again_when_it_ends(engines: Engines):
    engine = engines(hold_warning=0.1)
    heard: list[Any] = []
    with observe(heard.append, engine, events=[watch.HoldExceeded, watch.HoldReturned]):
        with held_by("slow report"):
            held = engine.connect()
        until(lambda: heard)
        engine.connect().close()  # a short one
        time.sleep(0.3)
        held.close()
        until(lambda: len(heard) == 2)
    assert names(heard) == ["hold_exceeded", "hold_returned"]
    assert {event.label for event in heard} == {"slow report"}
    assert 0.1 <= heard[0].held_seconds < heard[1].held_seconds


def test_exhaustion_is_told_at_both_ends_and_not_in_between(engines: Engines):
    engine = engines(max_size=1)
    heard: list[Any] = []
    kinds = [watch.PoolExhausted, watch.PoolRecovered]
    with observe(heard.append, engine, events=kinds):
        held = engine.connect()
        waiters = [threading.Thread(target=lambda: engine.connect().close()) for _ in range(3)]
        for waiter in waiters:
            waiter.start()
        until(lambda: heard)
        held.close()
        for waiter in waiters:
            waiter.join()
        until(lambda: len(heard) == 2)
    exhausted, recovered = heard
    assert (exhausted.checked_out, exhausted.waiting) == (1, 3)
    assert exhausted.oldest_wait_seconds >= 1.0
    assert recovered.waits == 3
    assert recovered.exhausted_seconds >= 1.0


# -- logs -------------------------------------------------------------------------------------


def test_every_event_has_a_level_and_words():
    assert set(LEVELS) == set(event_classes())
    for kind in event_classes():
        assert kind.__doc__
        source = Path(events_module.__file__).read_text()
        own = source[source.index(f"class {kind.__name__}(") :].split("@dataclass", 1)[0]
        for field in vars(kind).get("__annotations__", {}):
            assert re.search(rf'    {field}: .*\n    """', own), f"{kind.__name__}.{field}"
        assert dataclasses.fields(kind)[0].name == "pool"


def test_a_line_has_the_name_and_the_values(engines: Engines, caplog: pytest.LogCaptureFixture):
    engine = engines(max_size=1, pool_timeout=0)
    with log_events(engine), caplog.at_level(logging.INFO, "sqla_poolkit"):
        held = engine.connect()
        with pytest.raises(PoolTimeout), held_by("GET /users"):
            engine.connect()
        held.close()
        until(lambda: caplog.records)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        "checkout_timed_out pool=shop.db label='GET /users' caller='"
    )
    assert record.getMessage().endswith("' waited_seconds=0.0 checked_out=1 waiting=0")
    assert (record.poolkit_event, record.poolkit_label) == ("checkout_timed_out", "GET /users")  # type: ignore[attr-defined]


def test_a_flood_is_twenty_lines_at_most_and_all_is_counted(
    engines: Engines, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sqla_poolkit.watch.logs._WINDOW_SECONDS", 1.0)
    engine = engines(max_size=1, pool_timeout=0)
    held = engine.connect()
    with log_events(engine), caplog.at_level(logging.INFO, "sqla_poolkit"):
        for _ in range(10_000):
            with pytest.raises(PoolTimeout):
                engine.connect()

        def counted() -> int:
            suppressed = sum(getattr(r, "poolkit_suppressed", 0) for r in caplog.records)
            own = sum(hasattr(r, "poolkit_waited_seconds") for r in caplog.records)
            return suppressed + own

        until(lambda: counted() == 10_000)
        assert len(caplog.records) <= 20
    assert snapshot(engine).timeouts == 10_000
    held.close()


def test_a_line_sums_up_the_state_from_time_to_time(
    engines: Engines, caplog: pytest.LogCaptureFixture
):
    engine = engines(max_size=3)
    engine.connect().close()
    with (
        log_events(engine, snapshot_every=0.05),
        caplog.at_level(logging.INFO, "sqla_poolkit"),
    ):
        until(lambda: len(caplog.records) >= 2)
    message = caplog.records[0].getMessage()
    assert message.startswith("snapshot_taken pool=shop.db open=1 idle=1 checked_out=0")
    assert "max_size=3 requests=1 timeouts=0" in message
    assert isinstance(recent_events(engine)[-1], watch.SnapshotTaken)


@pytest.mark.extra
def test_an_application_that_configured_structlog_gets_its_lines_there(engines: Engines):
    import structlog

    engine = engines(max_size=1, pool_timeout=0)
    structlog.configure(processors=structlog.get_config()["processors"])
    try:
        with structlog.testing.capture_logs() as lines, log_events(engine):
            held = engine.connect()
            with pytest.raises(PoolTimeout):
                engine.connect()
            held.close()
            until(lambda: lines)
    finally:
        structlog.reset_defaults()
    (line,) = lines
    assert (line["event"], line["log_level"], line["pool"].partition("#")[0]) == (
        "checkout_timed_out",
        "warning",
        "shop.db",
    )
    assert (line["waited_seconds"], line["checked_out"], line["waiting"]) == (0.0, 1, 0)


PROGRAM = """
import logging, sys
import sqlalchemy as sa
from sqla_poolkit import ManagedPool, PoolTimeout
{configure}
engine = sa.create_engine("sqlite:///shop.db", poolclass=ManagedPool, max_size=1, pool_timeout=0)
held = engine.connect()
for _ in range(1):
    try:
        engine.connect()
    except PoolTimeout:
        pass
held.close()
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


@pytest.mark.parametrize(
    ("configure", "lines"),
    [("", 0), ("logging.basicConfig()", 1), ("logging.basicConfig(level=logging.CRITICAL)", 0)],
)
def test_warnings_are_written_by_default_where_logging_is_configured(
    tmp_path: Path, configure: str, lines: int
):
    program = PROGRAM.format(configure=configure)
    ended = run(program, tmp_path)
    said = ended.stderr.splitlines()
    assert (len(said), ended.stdout) == (lines, ""), ended.stderr
    assert all(line.startswith("WARNING:sqla_poolkit:checkout_timed_out pool=") for line in said)


def test_the_plugin_of_a_url_alone_has_the_warnings_written(tmp_path: Path):
    program = """
import logging
import sqlalchemy as sa
logging.basicConfig()
url = "sqlite:///shop.db?plugin=poolkit&poolkit_pool=managed"
engine = sa.create_engine(url, max_size=1, pool_timeout=0)
with engine.connect():
    try:
        engine.connect()
    except sa.exc.TimeoutError:
        pass
"""
    said = run(program, tmp_path).stderr.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("WARNING:sqla_poolkit:checkout_timed_out pool=")


def test_a_log_of_ones_own_that_wants_no_warnings_leaves_them_to_the_default(tmp_path: Path):
    own = """
logging.basicConfig()
from sqla_poolkit.watch import log_events
log_events(level=logging.CRITICAL)
"""
    ended = run(PROGRAM.format(configure=own), tmp_path)
    assert ended.stderr.count("checkout_timed_out") == 1, ended.stderr


def test_what_was_suppressed_is_said_at_the_end_of_the_process(tmp_path: Path):
    program = PROGRAM.format(configure="logging.basicConfig()").replace("range(1)", "range(50)")
    said = run(program, tmp_path).stderr.splitlines()
    assert len(said) == 6, said
    assert said[-1].endswith(" suppressed=45")


def test_observers_that_never_come_back_hold_the_end_up_together(tmp_path: Path):
    program = """
import threading
import sqlalchemy as sa
from sqla_poolkit import ManagedPool
from sqla_poolkit.watch import observe
engine = sa.create_engine("sqlite:///shop.db", poolclass=ManagedPool)
for _ in range(4):
    observe(lambda _: threading.Event().wait(), engine)
engine.connect().close()
"""
    began = time.monotonic()
    run(program, tmp_path)
    assert time.monotonic() - began < 2 * 2.0 + 2.0  # not 4 * 2.0


@pytest.mark.parametrize("level", ["INFO", None, 1.5])
def test_a_level_that_is_no_number_is_refused(level: Any):
    with pytest.raises(ArgumentError, match="level="):
        log_events(level=level)


def test_a_log_of_ones_own_replaces_that_of_the_warnings(tmp_path: Path):
    own = "logging.basicConfig(); from sqla_poolkit.watch import log_events; log_events()"
    ended = run(PROGRAM.format(configure=own), tmp_path)
    assert ended.stderr.count("checkout_timed_out") == 1, ended.stderr
