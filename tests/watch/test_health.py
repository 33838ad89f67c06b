"""Health tells busy from stuck and from down, without a connection."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, exc

from sqla_poolkit import MonitoredNullPool, MonitoredQueuePool, held_by, snapshot
from sqla_poolkit.errors import ArgumentError
from sqla_poolkit.watch.health import Health, health, judge
from tests.waiting import until


def test_a_pool_with_room_is_ok(make):
    engine = make(max_size=2)
    with engine.connect():
        now = health(engine)
    assert now == Health("app", "ok", ("1 of 2 connections in use.",))
    assert (now.is_live, now.is_ready) == (True, True)


def test_a_full_pool_is_busy_ready_and_live(make, wait):
    engine = make(max_size=1)
    with engine.connect():
        assert health(engine) == Health("app", "busy", ("1 of 1 connections in use.",))
        wait(engine)
        now = health(engine)
    assert now.status == "busy"
    assert now.reasons[1].startswith("1 caller waits, the first for 0.")
    assert (now.is_live, now.is_ready) == (True, True)


def test_it_is_stuck_when_callers_wait_and_nothing_comes_back(make, wait):
    engine = make(max_size=1)
    with held_by("report"), engine.connect():
        assert health(engine, stuck_after=0).status == "busy"  # nobody minds
        wait(engine)
        now = health(engine, stuck_after=0)
    assert now.status == "stuck"
    assert now.reasons[0] == "1 of 1 connections in use, and none has come back for 0 s."
    assert now.reasons[2].startswith("Held longest: report at ")
    assert (now.is_live, now.is_ready) == (False, False)


def test_one_quick_holder_is_enough_not_to_be_stuck(make, wait):
    """All others may hold theirs for as long as they like."""
    engine = make(max_size=2)
    with engine.connect():
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 0.01)
        with engine.connect():
            wait(engine)
            reading = snapshot(engine)
            youngest, oldest = sorted(slot.held_seconds for slot in reading.slots)
            assert judge(reading, stuck_after=(youngest + oldest) / 2).status == "busy"
            assert judge(reading, stuck_after=youngest / 2).status == "stuck"


def test_it_is_down_as_long_as_the_pool_knows_that_the_database_is(make, tmp_path: Path):
    engine = make()
    folder = tmp_path / "here"
    folder.rename(tmp_path / "away")
    while not snapshot(engine).is_down:
        with pytest.raises(exc.OperationalError):
            engine.connect()
    now = health(engine)
    assert now.status == "down"
    assert now.reasons == ("The last attempts to connect failed, so the database counts as down.",)
    assert (now.is_live, now.is_ready) == (True, False)
    (tmp_path / "away").rename(folder)
    until(lambda: snapshot(engine).is_down is False)
    assert health(engine).status == "ok"


def test_a_closed_pool_is_down_and_a_paused_one_busy(make):
    engine = make()
    engine.pool.pause()
    assert health(engine).status == "busy"
    engine.pool.close()
    now = health(engine)
    assert now.status == "down"
    assert now.reasons == ("The pool was closed; it hands out nothing any more.",)


@pytest.mark.parametrize("pool_class", [MonitoredQueuePool, MonitoredNullPool])
def test_the_monitored_pools_do_not_know_whether_the_database_is_down(make, pool_class):
    engine = make(poolclass=pool_class)
    with engine.connect():
        assert snapshot(engine).is_down is None
        assert health(engine).status == "ok"


def test_the_queue_pool_can_be_seen_to_be_stuck(make, wait):
    engine = make(poolclass=MonitoredQueuePool, pool_size=1, max_overflow=0)
    with engine.connect():
        wait(engine)
        assert health(engine, stuck_after=0).status == "stuck"


def test_it_takes_no_connection_and_says_all_as_json(make):
    engine = make(max_size=1)
    with closing(engine.connect()):
        before = snapshot(engine).requests
        assert health(engine.pool).to_dict() == {
            "pool": "app",
            "status": "busy",
            "is_live": True,
            "is_ready": True,
            "reasons": ["1 of 1 connections in use."],
        }
        assert snapshot(engine).requests == before


def test_it_takes_less_than_a_millisecond_however_many_labels_there_are(make):
    engine = make(max_size=20)
    for number in range(2000):
        with held_by(f"GET /{number}"), engine.connect():
            pass
    seconds = []
    for _ in range(30):
        began = time.perf_counter()
        health(engine)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.001


def test_a_pool_without_books_is_refused(tmp_path: Path):
    engine = create_engine(f"sqlite:///{tmp_path}/app.db")
    with pytest.raises(ArgumentError, match="keeps no books"):
        health(engine)
