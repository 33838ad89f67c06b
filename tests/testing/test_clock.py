"""FakeClock: pools grow old without anybody sleeping."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError

from sqla_poolkit import ManagedPool, MonitoredQueuePool, PoolTimeout, snapshot
from sqla_poolkit.pool import _sync
from sqla_poolkit.testing import FakeClock


@pytest.fixture
def clock() -> Iterator[FakeClock]:
    with FakeClock() as clock:
        yield clock


@pytest.fixture
def make(tmp_path: Path, clock: FakeClock) -> Iterator[Any]:
    """Makes engines that go by the clock."""
    engines = []

    def make(poolclass: type[sa.Pool] = ManagedPool, **settings: Any) -> sa.Engine:
        url = f"sqlite:///{tmp_path / 'app.db'}"
        engines.append(sa.create_engine(url, poolclass=poolclass, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()


def use(engine: sa.Engine, times: int = 1) -> None:
    held = [engine.connect() for _ in range(times)]
    for connection in held:
        connection.close()


def test_idle_connections_go_when_the_clock_is_moved(make: Any, clock: FakeClock):
    engine = make(idle_timeout=60)
    before = threading.active_count()
    use(engine, times=3)
    clock.move(59)
    assert (snapshot(engine).open, threading.active_count()) == (3, before)
    clock.move(2)
    reading = snapshot(engine)
    assert (reading.open, reading.closes["idle"], reading.uptime_seconds) == (0, 3, 61)
    assert reading.settings["upkeep"] == "inline"


def test_min_size_is_kept_and_lifetimes_end(make: Any, clock: FakeClock):
    engine = make(min_size=2, max_lifetime=1000, upkeep="thread")
    engine.pool.wait_ready()
    clock.move(1001)
    reading = snapshot(engine)
    assert (reading.open, reading.closes["age"], reading.connects) == (2, 2, 4)


def test_a_day_passes_at_once_and_time_stands_still_otherwise(make: Any, clock: FakeClock):
    engine = make()
    with engine.connect():
        clock.move(86400)
        (slot,) = snapshot(engine).slots
        assert (slot.held_seconds, slot.age_seconds) == (86400, 86400)
    assert snapshot(engine).use_time.sum_seconds == 86400
    with engine.connect():
        assert snapshot(engine).slots[0].held_seconds == 0
    assert snapshot(engine).invalidations == 0  # wall clock and monotonic clock agree


def test_a_caller_that_waits_in_another_thread_times_out_by_the_clock(make: Any, clock: FakeClock):
    engine = make(max_size=1, pool_timeout=30)
    began_at = time.monotonic()
    with ThreadPoolExecutor(1) as threads, engine.connect():
        waiter = threads.submit(engine.connect)
        while not snapshot(engine).waiting:
            time.sleep(0.001)  # until the other thread has come there
        clock.move(29)
        assert not waiter.done()
        clock.move(2)
        with pytest.raises(PoolTimeout, match=r"within 31\.00 s"):
            waiter.result(timeout=10)
    assert time.monotonic() - began_at < 5


def test_the_books_of_sqlalchemys_pools_go_by_it(make: Any, clock: FakeClock):
    engine = make(MonitoredQueuePool)
    with engine.connect():
        clock.move(7)
    assert snapshot(engine).use_time.sum_seconds == 7


def test_pools_made_before_and_after_the_block_keep_the_real_time(tmp_path: Path):
    before = ManagedPool(lambda: None)
    with FakeClock() as clock:
        inside = ManagedPool(lambda: None)
        with FakeClock() as second:
            assert ManagedPool(lambda: None)._driver.clock is second
        assert ManagedPool(lambda: None)._driver.clock is clock
    after = ManagedPool(lambda: None)
    assert before._driver.clock is after._driver.clock is _sync.monotonic is time.monotonic
    assert (_sync.wall_clock, _sync.is_steered) == (time.time, False)
    assert after.snapshot().settings["upkeep"] == "thread"
    stands_at = clock()
    time.sleep(0.01)
    assert inside._driver.clock() > stands_at  # or its close would wait for ever


def test_time_does_not_go_back(clock: FakeClock):
    with pytest.raises(ArgumentError, match="moves forward only, not by -1 seconds"):
        clock.move(-1)
    with pytest.raises(ArgumentError, match="installed already"):
        clock.__enter__()


@pytest.mark.extra
def test_a_pool_for_asyncio_grows_old_as_its_loop_turns(tmp_path: Path, clock: FakeClock):
    from sqlalchemy.ext.asyncio import create_async_engine  # which needs greenlet

    from sqla_poolkit import AsyncManagedPool

    async def main() -> None:
        engine = create_async_engine(
            f"sqlite+aiosqlite:///{tmp_path / 'app.db'}",
            poolclass=AsyncManagedPool,
            max_size=1,
            idle_timeout=60,
        )
        async with engine.connect():
            waiter = asyncio.create_task(engine.connect().__aenter__())
            await asyncio.sleep(0.01)
            assert snapshot(engine).waiting == 1
            clock.move(31)
            with pytest.raises(PoolTimeout):
                await waiter
        clock.move(61)
        await asyncio.sleep(0.1)
        assert snapshot(engine).closes["idle"] == 1
        await engine.pool.close()

    asyncio.run(main())
