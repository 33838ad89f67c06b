"""AsyncManagedPool: order, deadlines, cancellation, loops; on a stub and on real drivers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import json
import logging
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import event, exc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.util import greenlet_spawn

from sqla_poolkit import (
    AsyncManagedPool,
    ManagedPool,
    PoolClosed,
    PoolOverloaded,
    PoolSnapshot,
    PoolTimeout,
    PoolUnavailable,
    held_by,
    snapshot,
    watch,
)
from sqla_poolkit.errors import ArgumentError, PoolMisuse
from sqla_poolkit.pool import _searches
from tests.pool.async_stub import URL, AsyncDatabase, Gate
from tests.pool.laws import assert_lawful, broken_laws
from tests.pool.stub import Disconnected, Error
from tests.servers import PostgresServer

PATIENCE = 5.0
ROOT = Path(__file__).parents[2]
POOL_LOGGER = "sqlalchemy.pool.impl.AsyncManagedPool"

NewLoop = Callable[[], asyncio.AbstractEventLoop]
Scenario = Callable[[AsyncEngine], Coroutine[Any, Any, Any]]

LOOPS: dict[str, NewLoop] = {"asyncio": asyncio.new_event_loop}
if importlib.util.find_spec("uvloop"):
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop


def run(main: Coroutine[Any, Any, Any], new_loop: NewLoop | None = None) -> Any:
    """Run a coroutine as ``asyncio.run`` does, on a loop of the given kind."""
    if new_loop is None:
        return asyncio.run(main)
    with warnings.catch_warnings():
        # uvloop warns of sockets open at its end whosever they are, and hangs if that raises
        warnings.filterwarnings("ignore", "unclosed resource <TCPTransport", ResourceWarning)
        return _run_on(new_loop, main)


def _run_on(new_loop: NewLoop, main: Coroutine[Any, Any, Any]) -> Any:
    if sys.version_info >= (3, 11):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(main)
    loop = new_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        asyncio.runners._cancel_all_tasks(loop)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def until(is_so: Callable[[], bool]) -> None:
    """Come back when it is so; fail if it does not become so."""
    deadline = time.monotonic() + PATIENCE
    turns = 0
    while not is_so():
        turns += 1
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0 if turns < 200 else 0.002)


def driver_of(engine: AsyncEngine) -> Any:
    return engine.pool._driver  # type: ignore[attr-defined]


def read(engine: AsyncEngine) -> PoolSnapshot:
    return snapshot(engine)  # type: ignore[arg-type]


async def calm(engine: AsyncEngine) -> PoolSnapshot:
    """Wait until nothing goes on in the background, and return a lawful snapshot."""

    def is_calm() -> bool:
        reading = read(engine)
        assert_lawful(reading)
        return not (reading.connecting or reading.closing)

    await until(is_calm)
    return read(engine)


async def assert_whole(engine: AsyncEngine, cancelled: int | None = None) -> None:
    """Fail unless nothing is out, nobody asks, and all of the capacity can be used at once."""
    reading = await calm(engine)
    rest = (reading.checked_out, reading.requesting, reading.waiting, reading.checking)
    assert rest == (0, 0, 0, 0), engine.pool
    if cancelled is not None:
        assert reading.cancelled == cancelled
    assert reading.max_size is not None
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(reading.max_size):
            await asyncio.wait_for(stack.enter_async_context(engine.connect()), PATIENCE)
        assert read(engine).checked_out == reading.max_size
    assert_lawful(read(engine))


class Play:
    """Plays scenarios on engines of the stub, and sees that each leaves nothing behind."""

    def __init__(self) -> None:
        self.database = AsyncDatabase()

    def engine(self, **settings: Any) -> AsyncEngine:
        return create_async_engine(
            URL, poolclass=AsyncManagedPool, module=self.database.module, **settings
        )

    def __call__(
        self, scenario: Scenario, *, new_loop: NewLoop | None = None, **settings: Any
    ) -> Any:
        engine = self.engine(**settings)
        got = run(self.whole(engine, scenario), new_loop)
        assert_lawful(read(engine))
        assert self.database.open == []
        assert self.database.sockets == 0
        assert self.database.breaches == []
        return got

    async def whole(self, engine: AsyncEngine, scenario: Scenario) -> Any:
        """Play a scenario from its beginning to the end of the pool."""
        try:
            got = await asyncio.wait_for(scenario(engine), 3 * PATIENCE)
        finally:
            self.database.act = lambda site: None
            engine.pool.resume()
            await engine.pool.close(1.0)
        await until(lambda: not driver_of(engine).machine.slots)
        return got


# libuv opens two descriptors with its first loop, and keeps them
for _new_loop in LOOPS.values():
    run(asyncio.sleep(0), _new_loop)


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Keep what was there before out of the many garbage collections of these tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def play() -> Play:
    return Play()


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if asyncio or the pool complained of anything that the test did not expect.

    A test that expects something reads it from ``caplog``, then clears that.
    """
    yield
    gc.collect()
    said = [
        f"{record.name}: {record.getMessage()}"
        for record in caplog.get_records("call")
        if record.levelno >= logging.WARNING
    ]
    assert said == []


@pytest.fixture(params=list(LOOPS))
def new_loop(request: pytest.FixtureRequest) -> NewLoop:
    return LOOPS[request.param]


async def hold(engine: AsyncEngine, go_on: asyncio.Event, begun: Callable[[], None]) -> None:
    """Hold a connection until told to give it back."""
    async with engine.connect():
        begun()
        await go_on.wait()


@contextlib.asynccontextmanager
async def all_taken(engine: AsyncEngine) -> AsyncIterator[list[AsyncConnection]]:
    """Hold every connection that the pool may have."""
    async with contextlib.AsyncExitStack() as stack:
        size = read(engine).max_size
        assert size is not None
        yield [await stack.enter_async_context(engine.connect()) for _ in range(size)]


async def waits(engine: AsyncEngine, number: int = 1) -> None:
    """Wait until so many callers wait."""
    await until(lambda: driver_of(engine).machine.waiting == number)


async def outcome(work: Awaitable[Any]) -> Any:
    """Return what came of it, an exception included."""
    try:
        return await work
    except BaseException as error:
        return error


# -- order, deadlines, growth ----------------------------------------------------------------


def test_waiters_are_served_in_the_order_in_which_they_asked(play: Play, new_loop: NewLoop):
    async def scenario(engine: AsyncEngine) -> None:
        order: list[int] = []

        async def ask(number: int) -> None:
            async with engine.connect():
                order.append(number)

        async with all_taken(engine):
            tasks = []
            for number in range(6):
                tasks.append(asyncio.create_task(ask(number)))
                await waits(engine, number + 1)
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2, 3, 4, 5]

    play(scenario, max_size=1, new_loop=new_loop)


def test_a_newcomer_does_not_overtake_who_waits(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        order: list[str] = []

        async def ask(name: str) -> None:
            async with engine.connect():
                order.append(name)

        connection = await engine.connect()
        first = asyncio.create_task(ask("first"))
        await waits(engine)
        await connection.close()
        # the first has been granted the connection, but has not run yet
        await asyncio.gather(ask("newcomer"), first)
        assert order == ["first", "newcomer"]

    play(scenario, max_size=1)


def test_the_deadline_covers_a_connect_that_is_slow(play: Play, new_loop: NewLoop):
    async def scenario(engine: AsyncEngine) -> None:
        gate = play.database.act = Gate("connect")
        started_at = time.monotonic()
        with pytest.raises(PoolTimeout, match=r"within 0\.1\d s"):
            await engine.connect()
        assert 0.1 <= time.monotonic() - started_at <= 0.12
        gate.go_on.set()
        await assert_whole(engine)
        assert read(engine).timeouts == 1

    play(scenario, max_size=2, pool_timeout=0.1, new_loop=new_loop)


def test_the_deadline_is_accurate_to_20_ms_while_the_loop_is_busy_with_others(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        async def measure() -> float:
            started_at = time.monotonic()
            with pytest.raises(PoolTimeout):
                await engine.connect()
            return time.monotonic() - started_at

        async with all_taken(engine):
            seconds = await asyncio.gather(*(measure() for _ in range(20)))
        assert all(0.1 <= each <= 0.12 for each in seconds), seconds
        assert read(engine).timeouts == 20

    play(scenario, max_size=1, pool_timeout=0.1)


def test_a_timeout_of_0_never_queues(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        async with all_taken(engine):
            with pytest.raises(PoolTimeout):
                await engine.connect()
        assert read(engine).waits == 0
        await assert_whole(engine)

    play(scenario, max_size=2, pool_timeout=0)


def test_more_waiters_than_max_waiting_are_turned_away(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        async with all_taken(engine):
            waiting = [asyncio.create_task(engine.connect().start()) for _ in range(2)]
            await waits(engine, 2)
            with pytest.raises(PoolOverloaded, match="max_waiting=2"):
                await engine.connect()
        for task in waiting:
            await (await task).close()
        assert read(engine).rejected == 1
        await assert_whole(engine)

    play(scenario, max_size=2, max_waiting=2)


def test_who_waits_is_served_by_a_return_while_a_connect_is_under_way(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        gate = Gate("connect")
        first = await engine.connect()
        play.database.act = gate
        waiter = asyncio.create_task(engine.connect().start())
        await gate.begun.wait()
        await first.close()
        await (await waiter).close()
        assert read(engine).connecting == 1
        gate.go_on.set()
        await assert_whole(engine)

    play(scenario, max_size=2)


def test_attempts_in_flight_are_limited_by_max_connecting(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        gate = play.database.act = Gate("connect")
        tasks = [asyncio.create_task(engine.connect().start()) for _ in range(8)]
        await gate.begun.wait()
        await until(lambda: play.database.busy["connect"] == 3)
        for _ in range(50):
            await asyncio.sleep(0)
        assert read(engine).connecting == play.database.busy["connect"] == 3
        gate.go_on.set()
        for connection in await asyncio.gather(*tasks):
            await connection.close()
        await assert_whole(engine)

    play(scenario, max_size=8)


def test_no_more_sockets_than_max_size_are_ever_open(play: Play):
    play.database.limit = lambda: 3

    async def scenario(engine: AsyncEngine) -> None:
        async def use() -> None:
            for _ in range(10):
                async with engine.connect() as connection:
                    await connection.execute(sa.text("SELECT 1"))
                    await asyncio.sleep(0)

        await asyncio.gather(*(use() for _ in range(20)))
        assert read(engine).checkouts == 200
        assert play.database.most_sockets == 3

    play(scenario, max_size=3, max_uses=3)


def test_a_failed_connect_wakes_the_head_with_the_drivers_error(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        play.database.act = gate = Gate("connect", error=Error("no such host"))
        started_at = time.monotonic()
        first = asyncio.create_task(outcome(engine.connect().start()))
        await gate.begun.wait()
        gate.go_on.set()
        error = await first
        assert isinstance(error, exc.DBAPIError), error
        assert isinstance(error.orig, Error)
        assert time.monotonic() - started_at < 1.0
        play.database.act = lambda site: None
        reading = await calm(engine)
        assert (reading.failed, reading.connect_failures) == (1, 1)
        await assert_whole(engine)

    play(scenario, max_size=2)


def test_a_failed_connect_with_others_open_leaves_waiters_waiting_for_those(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        first = await engine.connect()
        play.database.act = gate = Gate("connect", error=Error("too many connections"))
        gate.go_on.set()
        waiter = asyncio.create_task(engine.connect().start())
        await until(lambda: read(engine).connect_failures > 0)
        assert read(engine).waiting == 1
        await first.close()
        await (await waiter).close()
        play.database.act = lambda site: None
        await assert_whole(engine)

    play(scenario, max_size=2)


def test_wait_ready_opens_min_size(play: Play, new_loop: NewLoop):
    async def scenario(engine: AsyncEngine) -> None:
        assert play.database.sockets == 0
        await engine.pool.wait_ready()
        reading = await calm(engine)
        assert (reading.open, reading.idle) == (4, 4)
        await assert_whole(engine)

    play(scenario, min_size=4, max_size=5, new_loop=new_loop)


def test_wait_ready_that_is_in_vain_says_what_the_last_attempt_ended_in(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        gate = play.database.act = Gate("connect", error=Error("no such host"))
        gate.go_on.set()
        with pytest.raises(PoolTimeout, match="no such host"):
            await engine.pool.wait_ready(0.05)
        play.database.act = lambda site: None
        await engine.pool.wait_ready(PATIENCE)
        await assert_whole(engine)

    play(scenario, min_size=2, max_size=2)


def test_min_size_is_kept_when_connections_are_invalidated(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            await connection.invalidate()
        await until(lambda: read(engine).open >= 2)
        await assert_whole(engine)

    play(scenario, min_size=2, max_size=3)


# -- what its owner asks of it ---------------------------------------------------------------


def test_close_fails_who_waits_and_waits_for_who_holds(play: Play, new_loop: NewLoop):
    async def scenario(engine: AsyncEngine) -> None:
        connection = await engine.connect()
        waiter = asyncio.create_task(outcome(engine.connect().start()))
        await waits(engine)
        closing = asyncio.create_task(engine.pool.close(None))
        assert isinstance(await waiter, PoolClosed)
        assert not closing.done()
        await connection.close()
        await closing
        assert play.database.sockets == 0
        with pytest.raises(PoolClosed):
            await engine.connect()
        assert dict(read(engine).closes) == {"closed": 1}

    play(scenario, max_size=1, new_loop=new_loop)


def test_close_cuts_off_who_does_not_give_back_in_time(
    play: Play, caplog: pytest.LogCaptureFixture
):
    async def scenario(engine: AsyncEngine) -> None:
        connection = await engine.connect()
        await engine.pool.close(0.01)
        assert len(play.database.abandoned) == 1
        assert play.database.sockets == 0
        await connection.close()
        assert "Exception during reset" in caplog.text
        caplog.clear()

    play(scenario, max_size=1)


def test_close_lets_a_connect_under_way_end(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        gate = play.database.act = Gate("connect")
        waiter = asyncio.create_task(outcome(engine.connect().start()))
        await gate.begun.wait()
        closing = asyncio.create_task(engine.pool.close(None))
        assert isinstance(await waiter, PoolClosed)
        gate.go_on.set()
        await closing
        assert play.database.sockets == 0

    play(scenario, max_size=1)


def test_resize_serves_who_waits_and_shrinks_as_connections_come_back(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        first = await engine.connect()
        waiter = asyncio.create_task(engine.connect().start())
        await waits(engine)
        engine.pool.resize(max_size=2)
        second = await waiter
        engine.pool.resize(max_size=1)
        await second.close()
        await until(lambda: read(engine).closes.get("resize") == 1)
        assert read(engine).open == 1
        await first.close()
        await assert_whole(engine)

    play(scenario, max_size=1)


def test_a_paused_pool_hands_nothing_out_until_it_is_resumed(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        await (await engine.connect()).close()
        engine.pool.pause()
        waiter = asyncio.create_task(engine.connect().start())
        await waits(engine)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiter.done()
        engine.pool.resume()
        await (await waiter).close()
        await assert_whole(engine)

    play(scenario, max_size=1)


def test_retire_all_replaces_idle_and_returned_connections(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        async with all_taken(engine):
            pass
        held = await engine.connect()
        engine.pool.retire_all()
        await until(lambda: read(engine).open == 1)
        await held.close()
        await until(lambda: read(engine).closes.get("retired") == 2)
        await assert_whole(engine)
        assert len(play.database.connections) == 4

    play(scenario, max_size=2)


def test_the_owner_may_change_the_pool_from_another_thread(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        async with all_taken(engine):
            pass
        await asyncio.to_thread(engine.pool.retire_all)
        await until(lambda: read(engine).closes.get("retired") == 2)
        await asyncio.to_thread(engine.pool.pause)
        waiter = asyncio.create_task(engine.connect().start())
        await waits(engine)
        await asyncio.to_thread(engine.pool.resume)
        await (await waiter).close()
        await asyncio.to_thread(engine.pool.resize, max_size=3)
        await assert_whole(engine)

    play(scenario, max_size=2)


def test_dispose_with_connections_out_closes_them_as_they_come_back(play: Play):
    play.database.limit = lambda: 2

    async def scenario(engine: AsyncEngine) -> None:
        before = engine.pool
        first = await engine.connect()
        await (await engine.connect()).close()
        await engine.dispose()
        assert engine.pool is not before
        waiters = [asyncio.create_task(engine.connect().start()) for _ in range(2)]
        await until(lambda: waiters[0].done() or waiters[1].done())
        await first.close()
        for waiter in waiters:
            await (await waiter).close()
        await assert_whole(engine)
        assert read(engine).closes["disposed"] >= 1
        assert play.database.connections[0].is_closed

    play(scenario, max_size=2)


def test_who_waits_on_a_disposed_pool_is_served_by_its_successor(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        first = await engine.connect()
        waiter = asyncio.create_task(engine.connect().start())
        await waits(engine)
        await engine.dispose()
        await first.close()
        await (await waiter).close()
        await assert_whole(engine)

    play(scenario, max_size=1)


def test_snapshot_reads_an_async_engine(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        async with engine.connect():
            reading = read(engine)
        assert (reading.pool_class, reading.name) == ("AsyncManagedPool", "db.example:5433/shop")
        assert (reading.open, reading.checked_out, reading.max_size) == (1, 1, 3)
        json.dumps(reading.to_dict())

    play(scenario, max_size=3)


def test_repr_shows_the_state(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        async with engine.connect():
            assert repr(engine.pool) == (
                "<AsyncManagedPool 'joe' 1 of 3 open: "
                "0 idle, 1 checked out, 0 connecting, 0 waiting>"
            )

    play(scenario, max_size=3, pool_name="joe")


def test_connections_go_when_they_are_idle(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        async with all_taken(engine):
            pass
        await until(lambda: dict(read(engine).closes) == {"idle": 1})
        assert read(engine).open == 1

    play(scenario, min_size=1, max_size=2, idle_timeout=0.05)


def test_connections_that_age_are_replaced(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        await engine.pool.wait_ready()
        await until(lambda: read(engine).closes.get("age", 0) >= 1)
        await assert_whole(engine)

    play(scenario, min_size=1, max_size=2, max_lifetime=0.1)


def test_a_session_works_as_with_any_pool(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await session.execute(sa.text("SELECT 1"))
            await session.commit()
        await assert_whole(engine)

    play(scenario, max_size=1)


# -- cancellation ----------------------------------------------------------------------------

Interrupt = Callable[[Coroutine[Any, Any, Any], Callable[[], Awaitable[Any]]], Awaitable[None]]


async def by_cancel(work: Coroutine[Any, Any, Any], begun: Callable[[], Awaitable[Any]]) -> None:
    task = asyncio.create_task(work)
    await begun()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_cancel_twice(
    work: Coroutine[Any, Any, Any], begun: Callable[[], Awaitable[Any]]
) -> None:
    task = asyncio.create_task(work)
    await begun()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_wait_for(work: Coroutine[Any, Any, Any], begun: Callable[[], Awaitable[Any]]) -> None:
    beginning = asyncio.create_task(begun())  # type: ignore[arg-type]
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(work, 0.02)
    assert beginning.done(), "it timed out before it came to the point"
    await beginning


async def by_timeout(work: Coroutine[Any, Any, Any], begun: Callable[[], Awaitable[Any]]) -> None:
    async def watch(timeout: Any) -> None:
        await begun()
        timeout.reschedule(asyncio.get_running_loop().time())

    with pytest.raises(TimeoutError):  # noqa: PT012 - the block is what is tested
        async with asyncio.timeout(None) as timeout:
            watcher = asyncio.create_task(watch(timeout))
            await work
    await watcher


async def by_task_group(
    work: Coroutine[Any, Any, Any], begun: Callable[[], Awaitable[Any]]
) -> None:
    with pytest.raises(ExceptionGroup) as raised:  # noqa: F821, PT012 - as TaskGroup, from 3.11 on
        async with asyncio.TaskGroup() as group:
            task = group.create_task(work)
            await begun()
            raise ZeroDivisionError
    assert task.cancelled()
    assert len(raised.value.exceptions) == 1


WAYS: dict[str, Interrupt] = {
    "cancel": by_cancel,
    "cancel twice": by_cancel_twice,
    "wait_for": by_wait_for,
}
if sys.version_info >= (3, 11):
    WAYS |= {"timeout": by_timeout, "TaskGroup": by_task_group}


@pytest.fixture(params=list(WAYS))
def interrupt(request: pytest.FixtureRequest) -> Interrupt:
    return WAYS[request.param]


async def use(engine: AsyncEngine) -> None:
    """Take a connection, use it, and give it back, without a context manager's protection."""
    connection = await engine.connect()
    await connection.execute(sa.text("SELECT 1"))
    await connection.close()


def test_a_waiting_caller_that_is_cancelled_is_gone_at_once(
    play: Play, interrupt: Interrupt, new_loop: NewLoop
):
    async def scenario(engine: AsyncEngine) -> None:
        async with all_taken(engine):
            await interrupt(use(engine), lambda: waits(engine))
            reading = read(engine)
            assert (reading.waiting, reading.requesting, reading.cancelled) == (0, 0, 1)
        await assert_whole(engine, cancelled=1)

    play(scenario, max_size=2, new_loop=new_loop)


def test_a_caller_cancelled_while_a_connect_is_under_way_leaves_it_to_the_pool(
    play: Play, interrupt: Interrupt
):
    async def scenario(engine: AsyncEngine) -> None:
        gate = play.database.act = Gate("connect")
        await interrupt(use(engine), gate.begun.wait)
        assert read(engine).connecting == 1
        gate.go_on.set()
        await assert_whole(engine, cancelled=1)
        assert len(play.database.connections) == 2

    play(scenario, max_size=2)


def test_a_caller_cancelled_in_its_own_connect_leaves_nothing(play: Play, interrupt: Interrupt):
    async def scenario(engine: AsyncEngine) -> None:
        play.database.act = gate = Gate("connect")
        await interrupt(use(engine), gate.begun.wait)
        assert play.database.sockets == 0
        gate.go_on.set()
        await assert_whole(engine, cancelled=1)

    play(scenario, max_size=2, upkeep="inline")


def test_a_caller_cancelled_in_its_own_connect_lets_the_next_one_connect(
    play: Play, interrupt: Interrupt
):
    async def scenario(engine: AsyncEngine) -> None:
        play.database.act = gate = Gate("connect")
        others: list[asyncio.Task[Any]] = []

        async def begun() -> None:
            await gate.begun.wait()
            others.append(asyncio.create_task(engine.connect().start()))
            await waits(engine)
            play.database.act = lambda site: None

        await interrupt(use(engine), begun)
        await (await asyncio.wait_for(others[0], PATIENCE)).close()
        await assert_whole(engine, cancelled=1)

    play(scenario, max_size=1, upkeep="inline")


@pytest.mark.parametrize("upkeep", ["thread", "inline"])
def test_a_caller_cancelled_in_a_ping_costs_that_connection_only(
    play: Play, interrupt: Interrupt, upkeep: str
):
    async def scenario(engine: AsyncEngine) -> None:
        async with all_taken(engine):
            pass
        gate = play.database.act = Gate("ping")
        await interrupt(use(engine), gate.begun.wait)
        gate.go_on.set()
        await assert_whole(engine, cancelled=1)
        assert dict(read(engine).closes) == {"ping": 1}

    play(scenario, max_size=2, upkeep=upkeep)


def test_a_caller_cancelled_in_a_ping_makes_room_for_who_waits(play: Play, interrupt: Interrupt):
    async def scenario(engine: AsyncEngine) -> None:
        await use(engine)
        gate = play.database.act = Gate("ping")
        others: list[asyncio.Task[Any]] = []

        async def begun() -> None:
            await gate.begun.wait()
            others.append(asyncio.create_task(engine.connect().start()))
            await waits(engine)

        await interrupt(use(engine), begun)
        await (await asyncio.wait_for(others[0], PATIENCE)).close()
        gate.go_on.set()
        await assert_whole(engine, cancelled=1)

    play(scenario, max_size=1)


@pytest.mark.parametrize("upkeep", ["thread", "inline"])
@pytest.mark.parametrize("site", ["execute", "reset"])
def test_a_holder_that_is_cancelled_frees_its_place(
    play: Play,
    interrupt: Interrupt,
    upkeep: str,
    site: str,
    caplog: pytest.LogCaptureFixture,
):
    async def scenario(engine: AsyncEngine) -> None:
        async with all_taken(engine):
            pass
        gate = play.database.act = Gate(site)

        async def work() -> None:
            connection = await engine.connect()
            try:
                await connection.execute(sa.text("SELECT 1"))
            finally:
                await connection.close()

        await interrupt(work(), gate.begun.wait)
        gate.go_on.set()
        await assert_whole(engine, cancelled=0)

    play(scenario, max_size=2, upkeep=upkeep)
    caplog.clear()  # SQLAlchemy reports the reset


@pytest.mark.parametrize("upkeep", ["thread", "inline"])
def test_a_reset_that_is_cancelled_makes_room_for_who_waits(
    play: Play, interrupt: Interrupt, upkeep: str, caplog: pytest.LogCaptureFixture
):
    async def scenario(engine: AsyncEngine) -> None:
        connection = await engine.connect()
        waiter = asyncio.create_task(engine.connect().start())
        await waits(engine)
        gate = play.database.act = Gate("reset", passing=0)
        await interrupt(connection.close(), gate.begun.wait)
        gate.go_on.set()
        await (await asyncio.wait_for(waiter, PATIENCE)).close()
        await assert_whole(engine, cancelled=0)

    play(scenario, max_size=1, upkeep=upkeep)
    caplog.clear()


def test_a_context_manager_that_is_cancelled_in_its_reset_ends_it_first(
    play: Play, caplog: pytest.LogCaptureFixture
):
    async def scenario(engine: AsyncEngine) -> None:
        gate = play.database.act = Gate("reset", passing=1)

        async def work() -> None:
            async with engine.connect():
                pass

        task = asyncio.create_task(work())
        await gate.begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        gate.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await assert_whole(engine, cancelled=0)
        assert dict(read(engine).closes) == {}

    play(scenario, max_size=1)


def test_a_close_that_is_cancelled_in_the_callers_hands_ends_the_connection(
    play: Play, interrupt: Interrupt, caplog: pytest.LogCaptureFixture
):
    async def scenario(engine: AsyncEngine) -> None:
        await use(engine)  # the next caller will see that this was the last use
        gate = play.database.act = Gate("close")
        await interrupt(use(engine), gate.begun.wait)
        assert play.database.connections[0].is_closed
        gate.go_on.set()
        await assert_whole(engine)

    play(scenario, max_size=1, max_uses=1, upkeep="inline")
    caplog.clear()


def test_an_invalidation_that_is_cancelled_in_its_close_ends_the_connection(
    play: Play, interrupt: Interrupt, caplog: pytest.LogCaptureFixture
):
    async def scenario(engine: AsyncEngine) -> None:
        gate = play.database.act = Gate("close")
        connection = await engine.connect()
        with contextlib.suppress(asyncio.CancelledError):
            await interrupt(connection.invalidate(), gate.begun.wait)
        gate.go_on.set()
        await connection.close()
        assert play.database.sockets == 0
        await assert_whole(engine)

    play(scenario, max_size=1)
    caplog.clear()


def test_a_reset_and_then_the_close_that_are_cancelled_end_the_connection(
    play: Play, caplog: pytest.LogCaptureFixture
):
    async def scenario(engine: AsyncEngine) -> None:
        connection = await engine.connect()
        reset, close = Gate("reset"), Gate("close")
        play.database.act = lambda site: reset(site) or close(site)
        task = asyncio.create_task(connection.close())
        await reset.begun.wait()
        task.cancel()
        await close.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        reset.go_on.set()
        close.go_on.set()
        await calm(engine)
        assert play.database.sockets == 0
        await assert_whole(engine)

    play(scenario, max_size=1)
    caplog.clear()


def test_a_reset_that_fails_and_then_a_close_that_is_cancelled_free_the_place(
    play: Play, caplog: pytest.LogCaptureFixture
):
    async def scenario(engine: AsyncEngine) -> None:
        connection = await engine.connect()
        reset, close = Gate("reset", error=Error("no")), Gate("close")
        reset.go_on.set()
        play.database.act = lambda site: reset(site) or close(site)
        task = asyncio.create_task(connection.close())
        await close.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # even as long as the program keeps the task, with the traceback of its end
        assert (await calm(engine)).checked_out == 0
        play.database.act = lambda site: None
        await assert_whole(engine)

    play(scenario, max_size=1)
    caplog.clear()


def test_a_connect_listener_that_is_cancelled_leaves_no_connection(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        gate = Gate("commit")

        @event.listens_for(engine.sync_engine, "connect")
        def prepare(connection: Any, record: Any) -> None:
            connection.commit()

        play.database.act = gate
        await by_cancel(use(engine), gate.begun.wait)
        await calm(engine)
        assert play.database.sockets == 0
        gate.go_on.set()
        await assert_whole(engine, cancelled=1)

    play(scenario, max_size=1, upkeep="inline")


def test_a_dispose_that_is_cancelled_ends_cancelled_and_closes_everything(
    play: Play, caplog: pytest.LogCaptureFixture
):
    async def scenario(engine: AsyncEngine) -> None:
        async with all_taken(engine):
            pass
        gate = play.database.act = Gate("close")

        async def begun() -> None:
            await gate.begun.wait()
            # what is closed after the cancellation is not held up for ever
            asyncio.get_running_loop().call_later(0.02, gate.go_on.set)

        await by_cancel(engine.dispose(), begun)
        await calm(engine)
        await assert_whole(engine)
        reading = await calm(engine)
        assert play.database.sockets == reading.open

    play(scenario, max_size=3)
    caplog.clear()


def test_close_and_wait_ready_can_be_cancelled(play: Play, interrupt: Interrupt):
    async def scenario(engine: AsyncEngine) -> None:
        gate = play.database.act = Gate("connect")
        await interrupt(engine.pool.wait_ready(), gate.begun.wait)
        gate.go_on.set()
        await assert_whole(engine)
        async with engine.connect():

            async def begun() -> None:
                await until(lambda: driver_of(engine).machine.is_closed)

            await interrupt(engine.pool.close(None), begun)
        await until(lambda: not driver_of(engine).machine.slots)
        assert driver_of(engine)._watchers == []

    play(scenario, min_size=1, max_size=1)


@pytest.mark.parametrize("pre_ping", [False, True])
@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_caller_cancelled_in_the_turn_in_which_it_was_granted_passes_the_connection_on(
    play: Play, pre_ping: bool, others: int
):
    async def scenario(engine: AsyncEngine) -> None:
        connection = await engine.connect()
        victim = asyncio.create_task(outcome(engine.connect().start()))
        await waits(engine)
        rest = [asyncio.create_task(use(engine)) for _ in range(others)]
        await waits(engine, 1 + others)
        machine = driver_of(engine).machine

        async def give_back() -> None:
            await connection.close()
            # this very turn granted it, and the waiter has not run since
            assert machine.waiting == others
            victim.cancel()

        await asyncio.create_task(give_back())
        assert isinstance(await victim, asyncio.CancelledError)
        await asyncio.wait_for(asyncio.gather(*rest), PATIENCE)
        await assert_whole(engine)
        reading = read(engine)
        assert reading.cancelled == (1 if pre_ping else 0)
        assert len(play.database.connections) == 1

    play(scenario, max_size=1, pool_pre_ping=pre_ping)


def test_a_caller_cancelled_and_then_granted_in_one_turn_passes_the_connection_on(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        connection = await engine.connect()
        victim = asyncio.create_task(outcome(engine.connect().start()))
        await waits(engine)
        other = asyncio.create_task(use(engine))
        await waits(engine, 2)
        record = connection.sync_connection.connection._connection_record  # type: ignore[union-attr]
        victim.cancel()
        # the cancelled task has not run yet, so its request still stands at the head
        driver_of(engine).take_back(record, is_detached=False)
        assert isinstance(await victim, asyncio.CancelledError)
        await asyncio.wait_for(other, PATIENCE)
        connection.sync_connection.connection._connection_record = None  # type: ignore[union-attr]
        record.fairy_ref = None
        finalizer = getattr(connection.sync_connection.connection, "_finalizer", None)
        if finalizer is not None:  # SQLAlchemy 2.1
            finalizer.detach()
        connection.sync_connection._dbapi_connection = None  # type: ignore[union-attr]
        await assert_whole(engine)

    play(scenario, max_size=1)


def test_a_caller_cancelled_at_its_deadline_is_counted_once(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        loop = asyncio.get_running_loop()
        async with all_taken(engine):
            for round_number in range(20):
                task = asyncio.create_task(outcome(engine.connect().start()))
                await waits(engine)
                # a little before, at, or a little after the deadline
                loop.call_later(0.008 + round_number * 0.0002, task.cancel)
                assert isinstance(await task, asyncio.CancelledError | PoolTimeout)
        reading = read(engine)
        assert reading.timeouts + reading.cancelled == 20
        await assert_whole(engine)

    play(scenario, max_size=1, pool_timeout=0.01)


# -- KeyboardInterrupt -----------------------------------------------------------------------


@pytest.mark.parametrize("upkeep", ["thread", "inline"])
@pytest.mark.parametrize("point", ["waiting", "connect", "ping", "execute", "reset", "close"])
def test_a_keyboard_interrupt_in_asyncio_run_leaves_nothing(
    play: Play, point: str, upkeep: str, caplog: pytest.LogCaptureFixture
):
    engine = play.engine(max_size=2, upkeep=upkeep, max_uses=2)

    def press() -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        async with all_taken(engine):
            pass
        gate = Gate(point)
        if point == "connect":
            await engine.dispose()
        play.database.act = gate
        async with contextlib.AsyncExitStack() as stack:
            if point == "waiting":
                await stack.enter_async_context(all_taken(engine))
            tasks = [asyncio.create_task(use_safely(engine)) for _ in range(3)]
            await (waits(engine, 3) if point == "waiting" else gate.begun.wait())
            asyncio.get_running_loop().call_soon(press)
            await asyncio.gather(*tasks)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    play.database.act = lambda site: None
    caplog.clear()

    async def again() -> None:
        await assert_whole(engine)
        await play.whole(engine, assert_whole)

    asyncio.run(again())
    assert play.database.sockets == 0


# -- sweeps ----------------------------------------------------------------------------------


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts its turns, and calls ``at_turn`` at the beginning of each."""

    turns = 0
    at_turn: Callable[[int], None] = staticmethod(lambda turn: None)

    def _run_once(self) -> None:
        self.turns += 1
        self.at_turn(self.turns)
        super()._run_once()


def sweep_once(cancel_at: int | None, victim: int, **settings: Any) -> int:
    """Let three tasks share two connections; cancel one in a turn of the loop; return the turns."""
    play = Play()
    play.database.limit = lambda: 2
    turns = [0]

    async def scenario(engine: AsyncEngine) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CountingLoop)

        async def work() -> None:
            async with engine.connect() as connection:
                await connection.execute(sa.text("SELECT 1"))
            await use_safely(engine)

        tasks = [asyncio.create_task(work()) for _ in range(3)]
        began_at = loop.turns

        def at_turn(turn: int) -> None:
            broken = broken_laws(read(engine))
            assert not broken, broken
            if cancel_at is not None and turn == began_at + cancel_at:
                tasks[victim].cancel()

        loop.at_turn = at_turn
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        turns[0] = loop.turns - began_at
        loop.at_turn = lambda turn: None
        for number, what in enumerate(outcomes):
            assert what is None or (number == victim and isinstance(what, asyncio.CancelledError))
        await assert_whole(engine)
        reading = await calm(engine)
        assert play.database.sockets == reading.open

    try:
        play(scenario, new_loop=CountingLoop, max_size=2, **settings)
    except BaseException as error:
        raise AssertionError(f"with task {victim} cancelled in turn {cancel_at}") from error
    return turns[0]


@pytest.mark.parametrize(
    "settings",
    [{}, {"upkeep": "inline"}, {"pool_pre_ping": False}, {"max_uses": 1}],
    ids=["background", "inline", "unpinged", "one use each"],
)
def test_no_turn_in_which_a_task_is_cancelled_breaks_anything(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    total = sweep_once(None, 0, **settings)
    assert total > 10
    for victim in range(3):
        for turn in range(1, total + 1):
            sweep_once(turn, victim, **settings)
    caplog.clear()


# -- any order of the callbacks --------------------------------------------------------------


class ShuffledLoop(asyncio.SelectorEventLoop):
    """Runs what is ready in an order drawn from a seed, on a clock that jumps when all sleep."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        self.at_turn: Callable[[], None] = lambda: None
        super().__init__()

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        self.at_turn()
        ready: deque[Any] = self._ready  # type: ignore[has-type]
        if not ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        shuffled = list(ready)
        self.random.shuffle(shuffled)
        self._ready = deque(shuffled)
        super()._run_once()


def shuffle_once(seed: int) -> None:  # noqa: C901 - many small choices, none inside another
    """Play a load of this seed: slow, failing and hanging calls, cancellations, timeouts."""
    loop = ShuffledLoop(seed)
    draw = loop.random
    size = draw.choice([1, 2, 3])
    play = Play()
    play.database.limit = lambda: size
    settings = {
        "max_size": size,
        "min_size": draw.choice([0, 0, 1]),
        "pool_timeout": draw.choice([0.05, 0.3, 5.0]),
        "max_uses": draw.choice([None, 2]),
        "max_waiting": draw.choice([None, 4]),
        "upkeep": draw.choice(["thread", "thread", "inline"]),
        "pool_pre_ping": draw.choice([True, False]),
        "ping_after": draw.choice([0, 1]),
        "max_lifetime": draw.choice([1800, 0.2]),
    }
    engine = play.engine(**settings)
    driver_of(engine).clock = loop.time
    driver_of(engine).machine._chance = draw.random

    def act(site: str) -> Awaitable[None] | None:
        luck = draw.random()
        if luck < 0.06:
            raise Error(f"{site} failed")
        if luck < 0.10 and site != "connect":
            raise Disconnected(f"{site} found the server gone")
        if luck < 0.4:
            return asyncio.sleep(draw.choice([0, 0.001, 0.01, 0.1]))
        return None

    async def work() -> None:
        for _ in range(draw.randint(1, 4)):
            with contextlib.suppress(exc.SQLAlchemyError, Error):
                if draw.random() < 0.5:
                    async with engine.connect() as connection:
                        await connection.execute(sa.text("SELECT 1"))
                        await asyncio.sleep(draw.choice([0, 0, 0.01]))
                        if draw.random() < 0.1:
                            await connection.invalidate()
                else:
                    await use_safely(engine)

    def meddle() -> None:
        draw.choice([engine.pool.retire_all, engine.pool.pause, engine.pool.resume])()

    async def main() -> None:
        play.database.act = act
        tasks = [asyncio.create_task(work()) for _ in range(8)]
        timers = [
            loop.call_later(draw.random() * 0.2, draw.choice(tasks).cancel)
            for _ in range(draw.randint(0, 8))
        ]
        if draw.random() < 0.3:
            loop.call_later(draw.random() * 0.2, meddle)
            loop.call_later(0.5, engine.pool.resume)
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled() and task.exception() is not None:
                raise task.exception()  # type: ignore[misc]
        for timer in timers:
            timer.cancel()
        del task
        tasks.clear()
        for _ in range(50):
            if not read(engine).checked_out:
                break
            gc.collect()  # the traceback of a cancellation may hold a connection
            await asyncio.sleep(0.01)
        play.database.act = lambda site: None
        engine.pool.resume()
        loop.now += 2.0  # a back-off is over
        await assert_whole(engine)
        assert (await calm(engine)).open == play.database.sockets
        await engine.pool.close(1.0)
        await until(lambda: not driver_of(engine).machine.slots)

    def at_turn() -> None:
        broken = broken_laws(read(engine))
        assert not broken, broken

    loop.at_turn = at_turn
    try:
        run(main(), lambda: loop)
        assert play.database.breaches == []
        assert play.database.sockets == 0, f"{play.database.open} are left"
    except BaseException as error:
        raise AssertionError(f"seed {seed} with {settings} went wrong: {error!r}") from error


async def use_safely(engine: AsyncEngine) -> None:
    """Use a connection and give it back, whatever happens, but without a task for that."""
    connection = await engine.connect()
    try:
        await connection.execute(sa.text("SELECT 1"))
    finally:
        await connection.close()


@pytest.fixture
def without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep searches out of a world in which time is only played."""
    monkeypatch.setattr(_searches._Searcher, "search_for", lambda *_: None)


@pytest.fixture
def mute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nobody report what is made to fail: reports keep tracebacks, those keep connections."""
    monkeypatch.setattr(logging.getLogger(POOL_LOGGER), "disabled", True)


# SQLAlchemy 2.0 drops a connection whose rollback fails in Connection.close(), 2.1 returns it.
@pytest.mark.filterwarnings("ignore:The garbage collector is trying:sqlalchemy.exc.SAWarning")
@pytest.mark.usefixtures("mute", "without_threads")
@pytest.mark.parametrize("chapter", range(4))
def test_no_order_of_callbacks_breaks_anything(chapter: int):
    for seed in range(chapter * 30, chapter * 30 + 30):
        shuffle_once(seed)


# -- any plan --------------------------------------------------------------------------------


class AsyncPoolMachine(RuleBasedStateMachine):
    """Asks, cancels, gives back and lets the loop turn, in any order, against a model queue."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.SelectorEventLoop()
        self.play = Play()
        self.play.database.limit = lambda: 2
        self.engine = self.play.engine(max_size=2, ping_after=0)
        # played, or a busy machine would draw something else the second time
        self.now = 1000.0
        self.loop.time = lambda: self.now  # type: ignore[method-assign]
        driver_of(self.engine).clock = lambda: self.loop.time()
        self.tasks: list[asyncio.Task[Any]] = []
        self.held: list[AsyncConnection] = []
        self.returning: list[asyncio.Task[Any]] = []
        self.asked = 0

    def turn(self, times: int = 1) -> None:
        async def turns() -> None:
            for _ in range(times):
                await asyncio.sleep(0)
                self.now += 0.002

        self.loop.run_until_complete(turns())
        for task in [task for task in self.tasks if task.done()]:
            self.tasks.remove(task)
            if not task.cancelled() and task.exception() is None:
                self.held.append(task.result())
        for task in [task for task in self.returning if task.done()]:
            self.returning.remove(task)
            task.cancelled() or task.exception()

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        async def begin() -> asyncio.Task[Any]:
            return asyncio.create_task(work)

        return self.loop.run_until_complete(begin())

    @rule()
    def ask(self) -> None:
        self.asked += 1
        self.tasks.append(self.start(self.engine.connect().start()))

    @rule(times=st.integers(1, 6))
    def let_time_pass(self, times: int) -> None:
        self.turn(times)

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def cancel_who_asks(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.tasks)).cancel()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        connection = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.returning.append(self.start(connection.close()))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def invalidate(self, data: st.DataObject) -> None:
        connection = data.draw(st.sampled_from(self.held))
        self.loop.run_until_complete(connection.invalidate())

    @precondition(lambda self: self.returning)
    @rule(data=st.data())
    def cancel_who_gives_back(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.returning)).cancel()

    @rule(site=st.sampled_from(["connect", "ping", "reset"]), gone=st.booleans())
    def have_one_call_fail(self, site: str, gone: bool) -> None:
        def act(visited: str) -> None:
            if visited == site:
                self.play.database.act = lambda site: None
                raise Disconnected("gone") if gone else Error("no")

        self.play.database.act = act

    @rule()
    def retire_all(self) -> None:
        self.engine.pool.retire_all()

    @invariant()
    def is_lawful(self) -> None:
        reading = read(self.engine)
        broken = broken_laws(reading)
        assert not broken, broken
        assert self.play.database.breaches == []
        assert reading.requests <= self.asked

    def teardown(self) -> None:
        async def end() -> None:
            self.play.database.act = lambda site: None
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, *self.returning, return_exceptions=True)
            for task in self.tasks:
                if not task.cancelled() and task.exception() is None:
                    self.held.append(task.result())
            for connection in self.held:
                with contextlib.suppress(Error):
                    await connection.close()
            await assert_whole(self.engine)
            await self.engine.pool.close(1.0)
            await until(lambda: not driver_of(self.engine).machine.slots)
            assert self.play.database.sockets == 0

        offset = self.now - time.monotonic()
        self.loop.time = lambda: time.monotonic() + offset  # type: ignore[method-assign]
        try:
            self.loop.run_until_complete(end())
        finally:
            self.loop.close()


@pytest.mark.usefixtures("mute", "without_threads")
def test_no_plan_of_asking_cancelling_and_giving_back_breaks_anything():
    hypothesis.stateful.run_state_machine_as_test(
        AsyncPoolMachine,
        settings=hypothesis.settings(max_examples=40, stateful_step_count=30, deadline=None),
    )


# -- loops, on the stub ----------------------------------------------------------------------


def test_one_engine_serves_three_loops_in_a_row(play: Play, new_loop: NewLoop):
    engine = play.engine(max_size=2)
    for number in range(3):
        run(assert_whole(engine), new_loop)
        reading = read(engine)
        assert reading.forgotten == 2 * (number + 1)
        assert reading.open == play.database.sockets == 0
    assert len(play.database.abandoned) == 6


@pytest.mark.parametrize("upkeep", ["thread", "inline"])
@pytest.mark.parametrize("moment", ["held", "waiting", "connect", "ping", "reset", "close"])
def test_a_loop_may_end_at_any_moment(
    play: Play, moment: str, upkeep: str, caplog: pytest.LogCaptureFixture
):
    play.database.limit = lambda: 2
    engine = play.engine(max_size=2, upkeep=upkeep, max_uses=2 if moment == "close" else None)
    held: list[Any] = []

    async def main() -> None:
        async with all_taken(engine):
            pass
        if moment == "connect":
            await engine.dispose()
        gate = play.database.act = Gate(moment)
        if moment in ("held", "waiting"):
            held.extend([await engine.connect() for _ in range(2)])
        held.extend(asyncio.ensure_future(use(engine)) for _ in range(3))
        await (waits(engine, 3) if moment in ("held", "waiting") else gate.begun.wait())

    # nobody cancels the tasks of this loop
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    play.database.act = lambda site: None
    play.database.limit = lambda: 2 + play.database.busy["connect"]
    reading = read(engine)
    assert_lawful(reading)
    assert (reading.open, reading.requesting, reading.checked_out) == (0, 0, 0)
    asyncio.run(assert_whole(engine))
    assert_lawful(read(engine))
    for task in held:
        if isinstance(task, asyncio.Future):
            task._log_destroy_pending = False  # it is the test's own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held.clear()
        del task
        gc.collect()
    assert_lawful(read(engine))
    # an attempt that nobody cancelled keeps its socket, for the stack of its greenlet stays
    left = play.database.busy["connect"]
    assert play.database.sockets - left == read(engine).open == 0
    play.database.limit = lambda: 2 + left
    asyncio.run(play.whole(engine, assert_whole))
    assert play.database.sockets == left
    assert left == 0 or moment == "connect"
    caplog.clear()


def test_a_full_pool_retires_the_connection_of_another_loop_that_idles_longest(play: Play):
    play.database.limit = lambda: 2
    engine = play.engine(max_size=2)
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:

        async def two() -> list[Any]:
            connections = [await engine.connect() for _ in range(2)]
            natives = [c.sync_connection.connection.dbapi_connection for c in connections]  # type: ignore[union-attr]
            for connection in connections:
                await connection.close()
            return natives

        async def one() -> None:
            async with engine.connect():
                pass

        natives = first.run_until_complete(two())
        second.run_until_complete(one())
        assert [native.is_closed for native in natives] == [True, False]
        reading = read(engine)
        assert dict(reading.closes) == {"loop": 1}
        assert_lawful(reading)
        second.run_until_complete(assert_whole(engine))
        assert dict(read(engine).closes) == {"loop": 2}
        first.run_until_complete(assert_whole(engine))
        first.run_until_complete(engine.pool.close(1.0))
    finally:
        first.close()
        second.close()
    assert_lawful(read(engine))
    assert play.database.sockets == 0
    assert play.database.breaches == []


def test_loops_in_several_threads_share_one_limit(play: Play):
    play.database.limit = lambda: 3
    engine = play.engine(max_size=3, pool_timeout=PATIENCE)
    outcomes: list[Any] = []

    async def work() -> None:
        for _ in range(25):
            async with engine.connect() as connection:
                await connection.execute(sa.text("SELECT 1"))

    async def main() -> None:
        await asyncio.gather(*(work() for _ in range(4)))

    def in_thread() -> None:
        try:
            outcomes.append(asyncio.run(main()))
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=in_thread) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert_lawful(read(engine))
        threads[0].join(0.01)
    for thread in threads:
        thread.join()
    assert outcomes == [None, None, None]
    reading = read(engine)
    assert_lawful(reading)
    assert reading.checkouts == 300
    assert (reading.open, play.database.sockets, play.database.breaches) == (0, 0, [])


def test_a_waiter_is_served_when_another_threads_loop_is_closed(play: Play):
    engine = play.engine(max_size=1, pool_timeout=PATIENCE)
    taken, let_go = threading.Event(), threading.Event()

    async def take() -> None:
        connection = await engine.connect()
        taken.set()
        await asyncio.to_thread(let_go.wait)
        await connection.close()

    thread = threading.Thread(target=lambda: asyncio.run(take()))
    thread.start()
    taken.wait()

    async def scenario(engine: AsyncEngine) -> None:
        waiter = asyncio.create_task(use(engine))
        await waits(engine)
        let_go.set()
        await asyncio.wait_for(waiter, PATIENCE)
        await assert_whole(engine)

    asyncio.run(play.whole(engine, scenario))
    thread.join()
    assert play.database.sockets == 0
    assert play.database.most_sockets == 1
    assert_lawful(read(engine))


def test_an_engine_without_any_loop_left_is_collected(play: Play):
    engine = play.engine(max_size=2)
    asyncio.run(assert_whole(engine))
    driver = weakref.ref(driver_of(engine))
    del engine
    gc.collect()
    assert driver() is None


# -- dropped connections ---------------------------------------------------------------------


async def drop(engine: AsyncEngine, held: list[Any]) -> None:
    """Drop the connections of a list unreturned."""
    with pytest.warns(sa.exc.SAWarning, match="non-checked-in connection"):  # noqa: PT031
        held.clear()
        gc.collect()  # a connection is part of a cycle


def test_a_dropped_connection_is_cut_off_and_reported(
    play: Play, new_loop: NewLoop, caplog: pytest.LogCaptureFixture
):
    async def scenario(engine: AsyncEngine) -> None:
        with held_by("the forgetful"):
            held = [await engine.connect()]
        await drop(engine, held)
        reading = read(engine)
        assert_lawful(reading)
        assert (reading.open, play.database.sockets) == (0, 0)
        assert dict(reading.closes) == {"leaked": 1}
        (report,) = [e for e in watch.recent_events(engine) if e.name == "connection_leaked"]
        assert report.label == "the forgetful"
        assert f"{Path(__file__).name}:" in str(report.caller)
        caplog.clear()
        await assert_whole(engine)

    play(scenario, max_size=1, new_loop=new_loop)


def test_a_dropped_connection_makes_room_for_who_waits(
    play: Play, caplog: pytest.LogCaptureFixture
):
    async def scenario(engine: AsyncEngine) -> None:
        held = [await engine.connect()]
        waiter = asyncio.create_task(use(engine))
        await waits(engine)
        await drop(engine, held)
        await asyncio.wait_for(waiter, PATIENCE)
        await until(lambda: "leaked" in read(engine).closes)
        await assert_whole(engine)

    play(scenario, max_size=1)
    caplog.clear()


def test_a_connection_may_be_dropped_in_another_thread(
    play: Play, caplog: pytest.LogCaptureFixture
):
    async def scenario(engine: AsyncEngine) -> None:
        held = [await engine.connect()]
        waiter = asyncio.create_task(use(engine))
        await waits(engine)
        with pytest.warns(sa.exc.SAWarning, match="non-checked-in connection"):
            await asyncio.to_thread(lambda: (held.clear(), gc.collect()))
        await asyncio.wait_for(waiter, PATIENCE)
        await until(lambda: "leaked" in read(engine).closes)
        assert read(engine).closes["leaked"] == 1
        await assert_whole(engine)

    play(scenario, max_size=1)
    caplog.clear()


def test_what_a_closed_loop_has_not_begun_is_called_off_in_silence(play: Play):
    engine = play.engine(max_size=1)

    async def main() -> None:
        async with engine.connect():
            pass
        engine.pool.retire_all()  # the close is a task, and this the last thing that the loop does
        home = next(iter(driver_of(engine)._homes.values()))
        home.begin(driver_of(engine)._work_on_loop, lambda _: ([], None), None, None)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(engine)
        gc.collect()
    assert read(engine).open == 0


@pytest.mark.parametrize("is_seen_first", [True, False])
def test_a_connection_may_be_dropped_after_its_loop_is_closed(
    play: Play, is_seen_first: bool, caplog: pytest.LogCaptureFixture
):
    engine = play.engine(max_size=1)
    held: list[Any] = []

    async def main() -> None:
        held.append(await engine.connect())

    asyncio.run(main())
    if is_seen_first:
        assert read(engine).forgotten == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sa.exc.SAWarning)
        held.clear()
        gc.collect()
    reading = read(engine)
    assert_lawful(reading)
    assert (reading.open, play.database.sockets) == (0, 0)
    assert reading.forgotten + reading.closes.get("leaked", 0) == 1
    asyncio.run(play.whole(engine, assert_whole))
    caplog.clear()


# -- errors ----------------------------------------------------------------------------------


def test_without_a_running_loop_the_error_says_what_to_write(play: Play):
    engine = play.engine()
    with pytest.raises(PoolMisuse, match=r"(?s)no event loop is running.*asyncio\.run"):
        engine.sync_engine.connect()
    with pytest.raises(PoolMisuse, match="no event loop is running"):
        engine.pool.connect()
    assert read(engine).requests == 0


def test_outside_of_sqlalchemys_greenlet_the_error_says_what_to_write(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        with pytest.raises(exc.MissingGreenlet, match=r"async with engine\.connect\(\)"):
            engine.sync_engine.connect()
        with pytest.raises(exc.MissingGreenlet, match="run_sync"):
            engine.pool.connect()
        assert (read(engine).requesting, read(engine).open) == (0, 0)
        await assert_whole(engine)

    play(scenario, max_size=1)


def test_a_pool_for_asyncio_refuses_a_driver_for_threads(tmp_path: Path):
    with pytest.raises(ArgumentError, match="ManagedPool"):
        sa.create_engine(f"sqlite:///{tmp_path}/db", poolclass=AsyncManagedPool)


def test_a_pool_for_threads_refuses_a_driver_for_asyncio(play: Play):
    with pytest.raises(ArgumentError, match="AsyncManagedPool"):
        create_async_engine(URL, poolclass=ManagedPool, module=play.database.module)


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [
        ("2.0.30", True),
        ("2.0.57", True),
        ("2.0.58", False),
        ("2.0.100", False),
        ("2.1.0b1", True),
        ("2.1.8", True),
        ("2.1.9", False),
        ("2.2.0", False),
    ],
)
def test_an_sqlalchemy_that_loses_connections_is_refused(
    play: Play, monkeypatch: pytest.MonkeyPatch, version: str, is_refused: bool
):
    monkeypatch.setattr(sa, "__version__", version)
    if is_refused:
        with pytest.raises(ArgumentError, match=r"2\.0\.58 or newer"):
            play.engine()
    else:
        play.engine()


# -- who holds -------------------------------------------------------------------------------


@pytest.mark.parametrize("track", ["caller", "stack"])
def test_the_caller_is_found_behind_the_greenlet(play: Play, track: str):
    async def scenario(engine: AsyncEngine) -> None:
        async with engine.connect():
            (slot,) = read(engine).slots
            assert slot.caller is not None
            assert slot.caller.startswith(f"{__file__}:")
            assert slot.caller.splitlines()[0].endswith(" scenario")
        callers = read(engine).callers
        assert callers is not None
        assert sum(row.checkouts for name, row in callers.items() if __file__ in name) == 1

    play(scenario, max_size=1, track=track)


def test_the_caller_of_a_session_and_of_run_sync_is_found(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        async def with_session() -> None:
            async with AsyncSession(engine) as session:
                await session.execute(sa.text("SELECT 1"))

        def in_greenlet() -> None:
            with engine.sync_engine.connect():
                pass

        await with_session()
        await greenlet_spawn(in_greenlet)
        callers = read(engine).callers
        assert callers is not None
        names = {name.rpartition(" ")[2] for name, row in callers.items() if row.checkouts}
        assert names == {"with_session", "in_greenlet"}

    play(scenario, max_size=1)


def test_labels_follow_their_tasks(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        async def work(label: str) -> None:
            with held_by(label):
                for _ in range(5):
                    async with engine.connect():
                        await asyncio.sleep(0)

        with held_by("outer"):
            inherited = asyncio.create_task(use(engine))
        await asyncio.gather(inherited, *(work(f"task {number}") for number in range(4)))
        labels = read(engine).labels
        counted = {name: row.checkouts for name, row in labels.items() if row.checkouts}
        assert counted == {"outer": 1, **{f"task {number}": 5 for number in range(4)}}
        assert_lawful(read(engine))

    play(scenario, max_size=2)


# -- listeners -------------------------------------------------------------------------------

request_of = ContextVar("request_of", default="nobody")


def test_connect_listeners_run_in_an_empty_context(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        seen = []

        @event.listens_for(engine.sync_engine, "connect")
        def look(connection: Any, record: Any) -> None:
            seen.append(request_of.get())
            connection.commit()

        request_of.set("joe")
        async with all_taken(engine):
            pass
        await assert_whole(engine)
        assert set(seen) == {"nobody"}
        assert play.database.visits["commit"] == len(seen)

    play(scenario, max_size=2)


def test_upkeep_does_not_keep_a_request_alive(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        class Big:
            pass

        async def ask() -> weakref.ref[Big]:
            big = Big()
            request_of.set(big)  # type: ignore[arg-type]
            async with all_taken(engine):
                waiter = asyncio.create_task(engine.connect().start())
                await waits(engine)
            await (await waiter).close()
            return weakref.ref(big)

        big = await asyncio.create_task(ask())
        await asyncio.sleep(0)  # the loop itself holds the task that it wakes
        gc.collect()
        assert big() is None

    play(scenario, max_size=2)


@pytest.mark.parametrize("point", ["free", "queued", "connect"])
def test_a_checkout_listener_that_raises_frees_the_place(play: Play, point: str):
    async def scenario(engine: AsyncEngine) -> None:
        if point != "connect":
            await use(engine)
        raising = [True]

        @event.listens_for(engine.sync_engine, "checkout")
        def refuse(*_: Any) -> None:
            if raising[0]:
                raise ZeroDivisionError

        if point == "queued":
            raising[0] = False
            connection = await engine.connect()
            task = asyncio.create_task(outcome(engine.connect().start()))
            await waits(engine)
            raising[0] = True
            await connection.close()
        else:
            task = asyncio.create_task(outcome(engine.connect().start()))
        assert isinstance(await task, ZeroDivisionError)
        raising[0] = False
        assert (await calm(engine)).failed == 1
        await assert_whole(engine)

    play(scenario, max_size=1)


def test_checkout_listeners_that_await_may_be_cancelled(
    play: Play, interrupt: Interrupt, caplog: pytest.LogCaptureFixture
):
    async def scenario(engine: AsyncEngine) -> None:
        @event.listens_for(engine.sync_engine, "checkout")
        def look(connection: Any, *_: Any) -> None:
            connection.commit()

        await use(engine)
        gate = play.database.act = Gate("commit")
        await interrupt(use(engine), gate.begun.wait)
        gate.go_on.set()
        await assert_whole(engine)

    play(scenario, max_size=1)
    caplog.clear()


def test_checkin_listeners_may_await(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        @event.listens_for(engine.sync_engine, "checkin")
        def look(connection: Any, record: Any) -> None:
            if connection is not None:
                connection.commit()

        gate = play.database.act = Gate("commit")
        connection = await engine.connect()
        returning = asyncio.create_task(connection.close())
        await gate.begun.wait()
        # the auditor must not take what is on its way back for lost
        driver = driver_of(engine)
        for _ in range(3):
            driver._auditor._next_look = 0.0
            driver.upkeep()
        assert read(engine).checked_out == 1
        gate.go_on.set()
        await returning
        await assert_whole(engine)
        assert dict(read(engine).closes) == {}

    play(scenario, max_size=1)


def test_a_checkin_listener_that_is_cancelled_loses_no_place(
    play: Play, caplog: pytest.LogCaptureFixture
):
    async def scenario(engine: AsyncEngine) -> None:
        @event.listens_for(engine.sync_engine, "checkin")
        def look(connection: Any, record: Any) -> None:
            if connection is not None:
                connection.commit()

        gate = play.database.act = Gate("commit")
        connection = await engine.connect()
        await by_cancel(connection.close(), gate.begun.wait)
        gate.go_on.set()
        del connection
        gc.collect()
        driver = driver_of(engine)
        for minutes in range(1, 4):  # the auditor is patient with what may still be on its way
            driver.clock = lambda ahead=minutes * 60: time.monotonic() + ahead
            driver.upkeep()
        await assert_whole(engine)

    play(scenario, max_size=1)
    caplog.clear()


def test_a_detached_connection_leaves_the_pool(play: Play):
    async def scenario(engine: AsyncEngine) -> None:
        connection = await engine.connect()
        raw = await connection.get_raw_connection()
        native = raw.dbapi_connection
        play.database.keep(native)  # type: ignore[arg-type]
        await connection.run_sync(lambda sync: sync.detach())
        assert (read(engine).detached, read(engine).open) == (1, 0)
        await connection.close()
        await assert_whole(engine)

    play(scenario, max_size=1)


# -- real drivers ----------------------------------------------------------------------------

DRIVERS = ["asyncpg", "psycopg", "aiosqlite"]
SELECT_1 = sa.text("SELECT 1")


class Served:
    """A database behind one of the real drivers."""

    def __init__(self, driver: str, server: PostgresServer, folder: Path) -> None:
        self.driver = driver
        self.server = server
        self.file = folder / "db.sqlite"
        is_file = driver == "aiosqlite"
        self.url = f"sqlite+aiosqlite:///{self.file}" if is_file else server.url(driver)
        self.engines: list[AsyncEngine] = []

    def engine(self, **settings: Any) -> AsyncEngine:
        return create_async_engine(self.url, poolclass=AsyncManagedPool, **settings)

    def sessions(self) -> int:
        """Count the open ends: the server's sessions, or the descriptors of the file."""
        if self.driver != "aiosqlite":
            return self.server.sessions()
        targets = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        links = [os.readlink(target) for target in targets if os.path.lexists(target)]
        return sum(link == str(self.file) for link in links)

    def wait_for_sessions(self, number: int) -> None:
        """Wait until so many are left; a server notices a little later than its client."""
        deadline = time.monotonic() + PATIENCE
        while self.sessions() != number:
            assert time.monotonic() < deadline, f"{self.sessions()} sessions, not {number}"
            threading.Event().wait(0.005)


@pytest.fixture(params=DRIVERS)
def served(request: pytest.FixtureRequest, postgres: PostgresServer, tmp_path: Path) -> Served:
    return Served(request.param, postgres, tmp_path)


@pytest.fixture(params=["asyncpg", "psycopg"])
def postgres_served(
    request: pytest.FixtureRequest, postgres: PostgresServer, tmp_path: Path
) -> Served:
    return Served(request.param, postgres, tmp_path)


async def query_all(engine: AsyncEngine) -> None:
    """Use all of the capacity at once."""
    async with all_taken(engine) as connections:
        for connection in connections:
            assert await connection.scalar(SELECT_1) == 1


def test_an_engine_of_a_real_driver_serves_three_loops_in_a_row(served: Served, new_loop: NewLoop):
    engine = served.engine(max_size=2)
    for number in range(3):
        run(query_all(engine), new_loop)
        reading = read(engine)
        assert reading.forgotten == 2 * (number + 1)
        served.wait_for_sessions(0)
    assert_lawful(read(engine))


def test_connections_of_a_closed_loop_go_in_silence(
    served: Served, new_loop: NewLoop, caplog: pytest.LogCaptureFixture
):
    complaints: list[Any] = []
    engine = served.engine(max_size=3)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, it: complaints.append(it))
        await query_all(engine)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(main(), new_loop)
        assert read(engine).forgotten == 3
        gc.collect()
        served.wait_for_sessions(0)
        gc.collect()
    assert complaints == []
    assert caplog.records == []


def test_connections_of_a_loop_that_closes_without_asyncio_run_go_in_silence(served: Served):
    engine = served.engine(max_size=2)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(query_all(engine))
    loop.close()
    assert read(engine).forgotten == 2
    served.wait_for_sessions(0)
    gc.collect()


@pytest.mark.parametrize("moment", ["held", "waiting", "connect"])
def test_a_loop_of_a_real_driver_may_end_at_any_moment(
    served: Served, moment: str, new_loop: NewLoop
):
    if moment == "connect" and served.driver == "aiosqlite":
        # its own thread trips over a loop that ended in the midst of its connect
        moment = "held"
    engine = served.engine(max_size=2)
    held: list[Any] = []

    async def main() -> None:
        if moment != "connect":
            held.extend([await engine.connect() for _ in range(2)])
        if moment != "held":
            tasks = [asyncio.create_task(engine.connect().start()) for _ in range(3)]
            await waits(engine, 3)
            if moment == "connect":
                await until(lambda: read(engine).connecting > 0)
            del tasks

    run(main(), new_loop)
    reading = read(engine)
    assert_lawful(reading)
    assert (reading.open, reading.connecting, reading.requesting) == (0, 0, 0)
    served.wait_for_sessions(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sa.exc.SAWarning)
        held.clear()
        gc.collect()
    run(query_all(engine), new_loop)
    assert_lawful(read(engine))
    served.wait_for_sessions(0)


def test_two_loops_in_two_threads_share_the_servers_sessions(postgres_served: Served):
    engine = postgres_served.engine(max_size=3, pool_timeout=PATIENCE)
    before = postgres_served.sessions()
    most = [0]
    outcomes: list[Any] = []

    async def work() -> None:
        for _ in range(15):
            async with engine.connect() as connection:
                await connection.scalar(SELECT_1)

    async def main() -> None:
        await asyncio.gather(*(work() for _ in range(4)))
        await asyncio.sleep(0)

    def in_thread() -> None:
        try:
            outcomes.append(asyncio.run(main()))
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=in_thread) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        reading = read(engine)
        assert_lawful(reading)
        most[0] = max(most[0], reading.open + reading.connecting + reading.closing)
    for thread in threads:
        thread.join()
    assert outcomes == [None, None]
    assert 1 <= most[0] <= 3
    assert read(engine).checkouts == 120
    assert_lawful(read(engine))
    gc.collect()  # a connect that a loop cancelled at its end may be part of a cycle
    postgres_served.wait_for_sessions(before)


def test_close_cuts_off_the_holders_of_a_real_driver(
    postgres_served: Served, new_loop: NewLoop, caplog: pytest.LogCaptureFixture
):
    engine = postgres_served.engine(max_size=1)

    async def main() -> None:
        connection = await engine.connect()
        waiter = asyncio.create_task(outcome(engine.connect().start()))
        await waits(engine)
        sleeping = asyncio.create_task(
            outcome(connection.execute(sa.text("SELECT pg_sleep(30)")))  # type: ignore[arg-type]
        )
        await until(lambda: _is_asleep(postgres_served.server))
        await engine.pool.close(0.05)
        assert isinstance(await waiter, PoolClosed)
        error = await asyncio.wait_for(sleeping, PATIENCE)
        assert isinstance(error, exc.DBAPIError), error
        await connection.close()
        await until(lambda: not driver_of(engine).machine.slots)

    run(main(), new_loop)
    # the server notices only when its query is over
    postgres_served.server.terminate_sessions()
    postgres_served.wait_for_sessions(0)
    assert_lawful(read(engine))
    caplog.clear()


def _is_asleep(server: PostgresServer) -> bool:
    found = server.query(
        "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%pg_sleep(30)%'"
        " AND state = 'active' AND pid <> pg_backend_pid()"
    )
    return bool(found)


def test_a_dropped_connection_of_a_real_driver_is_cut_off(
    served: Served, new_loop: NewLoop, caplog: pytest.LogCaptureFixture
):
    engine = served.engine(max_size=1)

    async def main() -> None:
        held = [await engine.connect()]
        assert await held[0].scalar(SELECT_1) == 1
        await drop(engine, held)
        assert dict(read(engine).closes) == {"leaked": 1}
        await asyncio.to_thread(served.wait_for_sessions, 0)
        await until(lambda: "leaked" in read(engine).closes)
        caplog.clear()
        await query_all(engine)
        await engine.pool.close(1.0)

    run(main(), new_loop)
    served.wait_for_sessions(0)
    assert_lawful(read(engine))


def test_a_connection_of_a_real_driver_may_be_dropped_in_another_thread(
    served: Served, new_loop: NewLoop, caplog: pytest.LogCaptureFixture
):
    engine = served.engine(max_size=1)

    async def main() -> None:
        held = [await engine.connect()]
        waiter = asyncio.create_task(outcome(engine.connect().start()))
        await waits(engine)
        with pytest.warns(sa.exc.SAWarning, match="non-checked-in connection"):
            await asyncio.to_thread(lambda: (held.clear(), gc.collect()))
        await (await asyncio.wait_for(waiter, PATIENCE)).close()
        await until(lambda: "leaked" in read(engine).closes)
        caplog.clear()
        await engine.pool.close(1.0)

    run(main(), new_loop)
    served.wait_for_sessions(0)
    assert read(engine).closes["leaked"] == 1
    assert_lawful(read(engine))


@pytest.mark.parametrize("is_seen_first", [True, False])
def test_a_connection_of_a_real_driver_may_be_dropped_after_its_loop_is_closed(
    served: Served, is_seen_first: bool, new_loop: NewLoop, caplog: pytest.LogCaptureFixture
):
    engine = served.engine(max_size=1)
    held: list[Any] = []

    async def main() -> None:
        held.append(await engine.connect())

    run(main(), new_loop)
    if is_seen_first:
        assert read(engine).forgotten == 1
        served.wait_for_sessions(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", sa.exc.SAWarning)
        held.clear()
        gc.collect()
    served.wait_for_sessions(0)
    reading = read(engine)
    assert_lawful(reading)
    assert (reading.open, reading.checked_out) == (0, 0)
    run(query_all(engine), new_loop)
    assert_lawful(read(engine))
    caplog.clear()


def test_a_session_killed_at_the_server_is_replaced_unnoticed(postgres_served: Served):
    engine = postgres_served.engine(max_size=2, ping_after=0)

    async def main() -> None:
        await query_all(engine)
        assert await asyncio.to_thread(postgres_served.server.terminate_sessions) == 2
        await asyncio.to_thread(postgres_served.wait_for_sessions, 0)
        await query_all(engine)
        reading = read(engine)
        assert reading.failed == 0
        assert reading.ping_failures >= 1
        await engine.pool.close(1.0)

    asyncio.run(main())
    assert_lawful(read(engine))


# -- SQLAlchemy's own sweep ------------------------------------------------------------------


# aiosqlite cancelled twice leaves a task of its own that never ends, for which the sweep waits
@pytest.mark.parametrize(
    ("driver", "upkeep", "variant"),
    [
        ("aiosqlite", "thread", "cold"),
        ("aiosqlite", "thread", "warm"),
        ("aiosqlite", "thread", "recycle"),
        ("aiosqlite", "inline", "cold"),
        ("aiosqlite", "inline", "recycle"),
        ("asyncpg", "thread", "cold"),
        ("asyncpg", "thread", "warm"),
        ("asyncpg", "thread", "recycle"),
        ("asyncpg", "thread", "warm twice"),
        ("asyncpg", "inline", "recycle"),
        ("psycopg", "thread", "warm twice"),
    ],
)
# aiosqlite leaves open what is cancelled in the middle of a connect, and Python 3.13 says so.
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
@pytest.mark.usefixtures("mute")
def test_sqlalchemys_sweep_finds_nothing(
    postgres: PostgresServer, tmp_path: Path, driver: str, upkeep: str, variant: str
):
    cancellation = pytest.importorskip("sqlalchemy.testing.cancellation")
    served = Served(driver, postgres, tmp_path)
    variants: dict[str, dict[str, Any]] = {
        "cold": {},
        "warm": {"warm": True},
        "recycle": {"warm": True, "recycle": True},
        "warm twice": {"warm": True, "cancels": 2},
    }
    made: list[AsyncEngine] = []

    def factory() -> AsyncEngine:
        made.append(served.engine(max_size=1, pool_timeout=PATIENCE, upkeep=upkeep))
        return made[-1]

    async def scenario(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            await connection.execute(SELECT_1)

    async def main() -> list[str]:
        found: list[str] = await cancellation.sweep(factory, scenario, **variants[variant])
        for engine in made:
            reading = read(engine)
            found += broken_laws(reading)
            assert (reading.checked_out, reading.requesting) == (0, 0)
            await engine.pool.close(1.0)
        return found

    assert asyncio.run(main()) == []
    assert len(made) > 2
    served.wait_for_sessions(0)


QUIETLY = (sys.executable, "-X", "faulthandler", "-W", "error", "-c")


# -- fork ------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_starts_empty_and_leaves_the_parents_connections_alone(
    postgres_served: Served,
):
    script = """
    import asyncio, os, signal, sys, traceback, warnings
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqla_poolkit import AsyncManagedPool, snapshot

    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
    engine = create_async_engine(sys.argv[1], poolclass=AsyncManagedPool, max_size=2)

    async def session_of(connection):
        return await connection.scalar(sa.text("SELECT pg_backend_pid()"))

    async def child(parents):
        reading = snapshot(engine)
        assert (reading.open, reading.requests, reading.pid) == (0, 0, os.getpid()), reading
        async with engine.connect() as one, engine.connect() as other:
            assert not parents & {await session_of(one), await session_of(other)}
        await engine.pool.close(1.0)

    def in_child(parents):
        signal.alarm(15)
        try:
            # the loop of the parent is none of the child's
            asyncio._set_running_loop(None)
            asyncio.run(child(parents))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    async def main():
        async with engine.connect() as held:
            async with engine.connect() as idle:
                parents = {await session_of(held), await session_of(idle)}
            pid = os.fork()
            if not pid:
                in_child(parents)
            status = await asyncio.to_thread(os.waitpid, pid, 0)
            assert status[1] == 0, status
            async with engine.connect() as idle:
                assert parents == {await session_of(held), await session_of(idle)}
        reading = snapshot(engine)
        assert (reading.open, dict(reading.closes)) == (2, {}), reading
        await engine.pool.close(1.0)

    asyncio.run(main())
    """
    done = subprocess.run(
        [*QUIETLY, textwrap.dedent(script), postgres_served.url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    postgres_served.wait_for_sessions(0)


def test_a_program_that_ends_with_connections_open_says_nothing(served: Served):
    script = """
    import asyncio, sys
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqla_poolkit import AsyncManagedPool

    engine = create_async_engine(sys.argv[1], poolclass=AsyncManagedPool, max_size=2)

    async def main():
        async with engine.connect() as connection:
            await connection.scalar(sa.text("SELECT 1"))

    asyncio.run(main())
    asyncio.run(main())
    """
    done = subprocess.run(
        [*QUIETLY, textwrap.dedent(script), served.url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    served.wait_for_sessions(0)


async def use_until(engine: AsyncEngine, outcome: type[BaseException] | None) -> None:
    """Ask again and again until that is what comes of it; None is a connection."""
    deadline = time.monotonic() + 5.0
    came: type[BaseException] | None = BaseException
    while came is not outcome:
        assert time.monotonic() < deadline, came
        try:
            await (await engine.connect()).close()
            came = None
        except Exception as error:
            came = type(error)
            await asyncio.sleep(0.05)


def test_an_outage_that_began_in_another_event_loop_is_noticed_to_be_over():
    database = AsyncDatabase()
    engine = create_async_engine(URL, poolclass=AsyncManagedPool, module=database.module)

    def refuse(site: str) -> None:
        if site == "connect":
            raise Error("down")

    async def recover() -> None:
        await use_until(engine, None)
        await engine.pool.close()

    database.act = refuse
    asyncio.run(use_until(engine, PoolUnavailable))
    database.act = lambda site: None
    asyncio.run(recover())
