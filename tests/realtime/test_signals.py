"""Signal handlers that raise inside pool code lose nothing for good."""

from __future__ import annotations

import gc
import logging
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import base as engine_base

from sqla_poolkit import ManagedPool, PoolSnapshot
from tests.pool.stub import Database, StubDialect

ROUNDS = 2
INTERRUPTS = 50
SIZE = 4
SETTLE_SECONDS = 6.0
AGAIN_SECONDS = 0.2


class Alarm(BaseException):
    """As KeyboardInterrupt, and as the time limits of task queues."""


@pytest.fixture
def alarms() -> Iterator[Callable[[float], None]]:
    """Return what has SIGALRM raise an ``Alarm`` in so many seconds; 0 stops it.

    Again and again, for an exception is lost that comes while the garbage collector calls somebody.
    """

    def ring(*_: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    logging.disable()
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds, seconds and AGAIN_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    logging.disable(logging.NOTSET)


def interrupt_often(
    use: Callable[[], None], alarms: Callable[[float], None], chance: random.Random
) -> int:
    """Use the pool without end, and be interrupted at random points; count how often."""
    hits = 0
    for _ in range(INTERRUPTS):
        try:
            alarms(chance.uniform(2e-5, 6e-4))
            while True:
                use()
        except (Alarm, AssertionError) as error:
            alarms(0)
            if not _is_an_alarm(error):
                raise
            hits += 1
    return hits


def _is_an_alarm(error: BaseException) -> bool:
    """Tell whether it is an alarm, or SQLAlchemy's word on a transaction that one cut short."""
    if isinstance(error, Alarm):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error.__context__, Alarm) and last.filename == engine_base.__file__


def usable(pool: ManagedPool) -> int:
    """Return how many connections can be had at the same time."""
    held = [pool.connect() for _ in range(SIZE)]
    for proxy in held:
        proxy.close()
    return len(held)


def settled(pool: ManagedPool) -> PoolSnapshot:
    """Return a snapshot after the upkeep had time to look."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        gc.collect()
        reading = pool.snapshot()
        is_settled = reading.open == reading.idle and not (
            reading.connecting or reading.closing or reading.requesting
        )
        if is_settled or time.monotonic() > deadline:
            return reading
        time.sleep(0.05)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("settings", [{}, {"ping_after": 0}, {"max_uses": 3}, {"pre_ping": False}])
def test_no_slot_is_lost_to_signals_that_raise(
    settings: dict[str, Any], alarms: Callable[[float], None]
):
    chance = random.Random(1)
    database = Database()
    pool = ManagedPool(
        database.connect,
        max_size=SIZE,
        timeout=2.0,
        ping_timeout=1.0,
        dialect=StubDialect.of(database),
        **settings,
    )

    def use() -> None:
        pool.connect().close()

    for _ in range(ROUNDS):
        assert interrupt_often(use, alarms, chance) == INTERRUPTS
        reading = settled(pool)
        assert (reading.checked_out, reading.checking, reading.requesting) == (0, 0, 0), reading
        assert (reading.connecting, reading.closing) == (0, 0), reading
        assert usable(pool) == SIZE
        # durations that were being written down may be lost, sockets are not
        assert settled(pool).open == database.sockets
    pool.close()
    assert database.sockets == 0


@pytest.mark.timeout(120)
def test_no_slot_of_a_real_driver_is_lost_to_signals_that_raise(
    postgres: Any, alarms: Callable[[float], None]
):
    chance = random.Random(2)
    engine = sa.create_engine(
        postgres.url("psycopg2"), poolclass=ManagedPool, max_size=SIZE, ping_after=0
    )
    pool = engine.pool

    def use() -> None:
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))

    assert interrupt_often(use, alarms, chance) == INTERRUPTS
    reading = settled(pool)
    assert (reading.open - reading.idle, reading.requesting) == (0, 0), reading
    assert usable(pool) == SIZE
    pool.close()


def test_a_guard_that_a_signal_left_armed_spares_the_next_holder(postgres: Any):
    engine = sa.create_engine(postgres.url("psycopg2"), poolclass=ManagedPool, ping_timeout=0.3)
    pool = engine.pool
    proxy = engine.raw_connection()
    record = proxy._connection_record
    proxy.close()
    guard = pool._driver._arm(record, 0.3)  # and the signal comes where it would be disarmed
    with engine.connect() as connection:
        time.sleep(0.8)
        assert connection.scalar(sa.text("SELECT 1")) == 1
    assert guard is record.guard
    assert not guard.was_cut
    pool.close()
