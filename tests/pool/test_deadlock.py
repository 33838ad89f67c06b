"""Callers who hold every connection and wait for another one: found, named, never suspected."""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session

from sqla_poolkit import AsyncManagedPool, ManagedPool, PoolDeadlock, PoolTimeout, held_by, watch
from sqla_poolkit.pool import _searches, _sqlalchemy, _whereabouts
from sqla_poolkit.watch import recent_events
from tests.servers import PostgresServer
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("idle_threads_leave_soon")

Engines = Callable[..., sa.Engine]
ONE = sa.text("SELECT 1")
TIMEOUT = 1.0
PATIENT = {"pool_timeout": 3.0}
"""Where a deadlock has to be found before the end, on a busy machine too."""
PATIENCE_SECONDS = 5.0


@pytest.fixture(autouse=True)
def _rested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no search wait because one for another test took long."""
    monkeypatch.setattr(_searches._searcher, "_rests_until", 0.0)


@pytest.fixture
def engines(postgres: PostgresServer) -> Iterator[Engines]:
    with ExitStack() as stack:

        def make(size: int, **settings: Any) -> sa.Engine:
            settings = {"pool_timeout": TIMEOUT, "max_size": size} | settings
            engine = sa.create_engine(postgres.url("psycopg2"), poolclass=ManagedPool, **settings)
            stack.callback(engine.pool.close)
            return engine

        yield make


def deadlocks(engine: sa.Engine | AsyncEngine) -> list[watch.DeadlockFound]:
    return [e for e in recent_events(engine) if isinstance(e, watch.DeadlockFound)]


def take_two(engine: sa.Engine, together: threading.Barrier) -> BaseException | None:
    """Hold a connection and ask for another one; return what came of it."""
    try:
        with held_by("outer"), engine.connect() as outer:
            together.wait()
            with held_by("inner"), engine.connect():
                outer.execute(ONE)
                return None
    except PoolTimeout as error:
        return error.with_traceback(None)


def in_threads(work: Callable[[], Any], number: int) -> list[Any]:
    with ThreadPoolExecutor(number) as threads:
        return [job.result() for job in [threads.submit(work) for _ in range(number)]]


# -- found -------------------------------------------------------------------------------------


def test_two_threads_that_wait_for_each_other_are_told_so(engines: Engines):
    engine = engines(2, **PATIENT)
    together = threading.Barrier(2)
    errors = in_threads(lambda: take_two(engine, together), 2)
    (found,) = deadlocks(engine)
    assert (found.checked_out, found.waiting, len(found.holds)) == (2, 2, 2)
    told = [str(error) for error in errors if error is not None]
    assert told
    for hold in found.holds:
        # where it was taken, and where its holder waits
        assert hold.startswith("outer (")
        assert hold.count("test_deadlock.py:") == 2
        assert "take_two, waiting in thread" not in hold.partition("(")[0]
        assert all(f"* taken by {hold}\n" in text for text in told)
    assert all("It looks like a deadlock" in text for text in told)


def test_one_caller_with_everything_waits_for_himself(engines: Engines):
    engine = engines(2, **PATIENT)
    with engine.connect() as connection, Session(engine) as session:
        session.execute(ONE)
        connection.execute(ONE)
        with pytest.raises(PoolTimeout, match="It looks like a deadlock"):
            engine.connect()
    assert len(deadlocks(engine)) == 1


def test_a_chain_of_a_session_in_an_object_is_followed(engines: Engines):
    class Request:
        def __init__(self) -> None:
            self.state = {"database": [Session(engine)]}

    engine = engines(1, **PATIENT)
    request = Request()
    request.state["database"][0].execute(ONE)
    with pytest.raises(PoolTimeout, match="It looks like a deadlock"):
        engine.connect()
    request.state["database"][0].close()


def test_the_deadlock_is_over_for_who_asks_later(engines: Engines):
    engine = engines(1, **PATIENT)
    with engine.connect() as own:
        own.execute(ONE)
        with pytest.raises(PoolTimeout, match="It looks like a deadlock"):
            engine.connect()
    held = queue.SimpleQueue[sa.Connection]()
    with ThreadPoolExecutor(1) as other:
        other.submit(hold_for_long, engine, held, 4.0)
        connection = held.get()
        with pytest.raises(PoolTimeout) as caught:
            engine.connect()
        del connection
    assert "It looks like a deadlock" not in str(caught.value)


def hold_for_long(engine: sa.Engine, held: queue.SimpleQueue[Any], seconds: float) -> None:
    with engine.connect() as connection:
        held.put(connection)
        time.sleep(seconds)


# -- not suspected -----------------------------------------------------------------------------


def test_slow_holders_are_no_deadlock(engines: Engines):
    engine = engines(2)
    held = queue.SimpleQueue[Any]()
    with ThreadPoolExecutor(2) as others:
        for _ in range(2):
            others.submit(hold_for_long, engine, held, 2 * TIMEOUT)
        held.get()
        held.get()
        with pytest.raises(PoolTimeout) as caught:
            engine.connect()
    assert deadlocks(engine) == []
    assert "It looks like a deadlock" not in str(caught.value)


def test_one_holder_who_can_go_on_is_enough(engines: Engines):
    engine = engines(2)
    held = queue.SimpleQueue[Any]()
    with ThreadPoolExecutor(1) as other:
        other.submit(hold_for_long, engine, held, 2 * TIMEOUT)
        held.get()
        with engine.connect() as own:
            own.execute(ONE)
            with pytest.raises(PoolTimeout):
                engine.connect()
    assert deadlocks(engine) == []


def test_a_connection_taken_here_and_used_elsewhere_is_no_deadlock(engines: Engines):
    """As FastAPI does it: a dependency is entered in one thread, used and left in others."""
    engine = engines(1)

    @contextmanager
    def dependency() -> Iterator[sa.Connection]:
        with engine.connect() as connection:
            yield connection

    def enter_and_forget(given: queue.SimpleQueue[Any]) -> None:
        context = dependency()
        context.__enter__()
        given.put(context)

    def use(given: queue.SimpleQueue[Any]) -> None:
        context = given.get()
        time.sleep(1.5 * TIMEOUT)
        context.__exit__(None, None, None)

    given = queue.SimpleQueue[Any]()
    enter_and_forget(given)
    with ThreadPoolExecutor(1) as other:
        job = other.submit(use, given)
        # the thread that took the only connection asks for another one
        with pytest.raises(PoolTimeout):
            engine.connect()
        job.result()
    assert deadlocks(engine) == []


def test_what_others_can_reach_is_no_deadlock(engines: Engines):
    """A registry of sessions, as Flask-SQLAlchemy has one, leads from everybody to all of them."""
    engine = engines(1)
    registry = sa.orm.scoped_session(sa.orm.sessionmaker(engine), scopefunc=lambda: "one")
    registry.execute(ONE)
    knows = threading.Event()

    def look_on(registry: Any) -> None:
        knows.wait(PATIENCE_SECONDS)

    with ThreadPoolExecutor(1) as other:
        other.submit(look_on, registry)
        with pytest.raises(PoolTimeout):
            engine.connect()
        assert deadlocks(engine) == []
        knows.set()
    registry.remove()


class Returner(threading.Thread):
    """Returns a connection later, which it has in an attribute."""

    connection: sa.Connection

    def run(self) -> None:
        time.sleep(1.5 * TIMEOUT)
        self.connection.close()


class Shared:
    connection: sa.Connection | None = None


def return_later() -> None:
    time.sleep(1.5 * TIMEOUT)
    assert Shared.connection is not None
    Shared.connection.close()


@pytest.mark.parametrize("way", ["timer", "thread", "class"])
def test_who_returns_it_later_need_not_have_it_in_a_variable(way: str, engines: Engines):
    engine = engines(1)
    own = engine.connect()
    if way == "timer":
        other: threading.Thread = threading.Timer(1.5 * TIMEOUT, own.close)
    elif way == "thread":
        other = Returner()
        other.connection = own
    else:
        Shared.connection = own
        other = threading.Thread(target=return_later)
    other.start()
    with pytest.raises(PoolTimeout):
        engine.connect()
    other.join()
    assert own.closed
    assert deadlocks(engine) == []


def test_nobody_is_suspected_if_there_is_too_much_to_look_through(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_whereabouts, "_MOST_OBJECTS", 10)
    engine = engines(1)
    with engine.connect() as own:
        own.execute(ONE)
        with pytest.raises(PoolTimeout):
            engine.connect()
    assert deadlocks(engine) == []


# -- refused at once ---------------------------------------------------------------------------


def test_on_request_the_circle_is_not_closed(engines: Engines):
    engine = engines(3, on_deadlock="raise", pool_timeout=30.0)
    together = threading.Barrier(3)
    began_at = time.monotonic()
    errors = in_threads(lambda: take_two(engine, together), 3)
    assert time.monotonic() - began_at < 5.0
    (refused,) = [error for error in errors if error is not None]  # that freed the others
    assert isinstance(refused, PoolDeadlock)
    assert refused.snapshot.checked_out == 3
    (found,) = [e for e in refused.events if isinstance(e, watch.DeadlockFound)]
    assert [hold.count("test_deadlock.py:") for hold in found.holds] == [2, 2, 2]
    assert engine.pool.snapshot().failed == 1


def test_on_request_who_waits_for_somebody_else_may_wait(engines: Engines):
    engine = engines(2, on_deadlock="raise", pool_timeout=30.0)
    held = queue.SimpleQueue[Any]()
    with ThreadPoolExecutor(1) as other:
        other.submit(hold_for_long, engine, held, 0.3)
        held.get()
        with engine.connect(), engine.connect():
            pass
    assert deadlocks(engine) == []


def test_on_request_it_also_works_after_dispose(engines: Engines):
    engine = engines(1, on_deadlock="raise", pool_timeout=30.0)
    engine.dispose()
    with engine.connect(), pytest.raises(PoolDeadlock):
        engine.connect()
    with engine.connect():
        pass


# -- asyncio -----------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("on_deadlock", ["warn", "raise"])
def test_two_tasks_that_wait_for_each_other(
    on_deadlock: str, driver: str, postgres: PostgresServer
):
    async def take_two(engine: AsyncEngine, barrier: list[asyncio.Event]) -> BaseException | None:
        mine = barrier.pop()
        barrier.insert(0, mine)
        try:
            async with engine.connect() as own:
                mine.set()
                for other in barrier:
                    await other.wait()
                async with engine.connect():
                    await own.execute(ONE)
                    return None
        except PoolTimeout as error:
            return error.with_traceback(None)

    async def main() -> None:
        engine = create_async_engine(
            postgres.url(driver),
            poolclass=AsyncManagedPool,
            max_size=2,
            pool_timeout=3.0 if on_deadlock == "warn" else 30.0,
            on_deadlock=on_deadlock,
        )
        barrier = [asyncio.Event(), asyncio.Event()]
        errors = await asyncio.gather(*(take_two(engine, barrier) for _ in range(2)))
        told = [error for error in errors if error is not None]
        assert told
        assert all("It looks like a deadlock" in str(error) for error in told)
        (found,) = deadlocks(engine)
        assert [hold.count("test_deadlock.py:") for hold in found.holds] == [2, 2]
        if on_deadlock == "warn":
            assert all("waiting in task Task-" in hold for hold in found.holds)
        else:
            assert [type(error) for error in told] == [PoolDeadlock]
        await engine.dispose()

    asyncio.run(main())


def test_a_deadlock_inside_run_sync_is_found(postgres: PostgresServer):
    async def main() -> None:
        engine = create_async_engine(
            postgres.url("asyncpg"), poolclass=AsyncManagedPool, max_size=2, pool_timeout=3.0
        )

        def work(connection: sa.Connection) -> None:
            with engine.sync_engine.connect() as other:
                assert connection.scalar(ONE) == other.scalar(ONE)
                with pytest.raises(PoolTimeout, match="It looks like a deadlock"):
                    engine.sync_engine.connect()

        async with engine.connect() as connection:
            await connection.run_sync(work)
        await engine.dispose()

    asyncio.run(main())


def test_a_callback_of_a_task_may_return_it(postgres: PostgresServer):
    async def main() -> None:
        engine = create_async_engine(
            postgres.url("asyncpg"), poolclass=AsyncManagedPool, max_size=1, pool_timeout=1.0
        )
        connection = await engine.connect()
        closing: list[asyncio.Task[None]] = []
        job = asyncio.create_task(asyncio.sleep(1.5))
        job.add_done_callback(lambda _: closing.append(asyncio.ensure_future(connection.close())))
        with pytest.raises(PoolTimeout):
            await engine.connect()
        assert deadlocks(engine) == []
        await job
        await asyncio.sleep(0)
        await closing[0]
        await engine.dispose()

    asyncio.run(main())


def test_a_task_that_was_handed_a_connection_is_no_deadlock(postgres: PostgresServer):
    async def main() -> None:
        engine = create_async_engine(
            postgres.url("asyncpg"), poolclass=AsyncManagedPool, max_size=1, pool_timeout=1.0
        )

        async def use(connection: Any) -> None:
            await asyncio.sleep(1.5)
            await connection.close()

        connection = await engine.connect()
        job = asyncio.create_task(use(connection))
        del connection
        with pytest.raises(PoolTimeout):
            await engine.connect()
        assert deadlocks(engine) == []
        await job
        await engine.dispose()

    asyncio.run(main())


def test_a_call_that_blocks_the_loop_is_a_deadlock_of_all_its_tasks(engines: Engines):
    engine = engines(1, **PATIENT)

    async def hold(is_held: asyncio.Event) -> None:
        with engine.connect() as connection:
            is_held.set()
            await asyncio.sleep(0)
            connection.execute(ONE)

    async def main() -> None:
        is_held = asyncio.Event()
        job = asyncio.create_task(hold(is_held))
        await is_held.wait()
        with pytest.raises(PoolTimeout, match="It looks like a deadlock"):
            engine.connect()
        await job

    asyncio.run(main())


# -- what the search leaves behind -------------------------------------------------------------


def no_search_goes_on() -> bool:
    return all(thread.name != "poolkit search" for thread in threading.enumerate())


def use_and_let_go(engine: sa.Engine) -> tuple[Any, Any]:
    """Let go of a variable after the search has looked at it; tell what became of its value."""

    class Thing:
        pass

    thing: Thing | None = Thing()
    gone = weakref.ref(thing)
    with engine.connect() as own:
        own.execute(ONE)
        with suppress(PoolTimeout):
            engine.connect()
    until(no_search_goes_on)
    gc.collect()
    before = gone()
    thing = before = None if before is thing else before
    return before, gone()


def test_the_search_keeps_nothing_alive(engines: Engines):
    engine = engines(1, **PATIENT)
    assert use_and_let_go(engine) == (None, None)
    assert deadlocks(engine)


class Thing:
    """Something whose end can be seen."""


@pytest.mark.parametrize("upkeep", ["thread", "inline"])
def test_the_search_keeps_no_frame_alive(engines: Engines, upkeep: str):
    """What a function had is gone when it has returned, without the garbage collector."""
    engine = engines(1, upkeep=upkeep, **PATIENT)
    gone: list[weakref.ref[Thing]] = []

    def wait_in_vain() -> None:
        thing = Thing()
        gone.append(weakref.ref(thing))
        with engine.connect() as own:
            own.execute(ONE)
            with suppress(PoolTimeout):
                engine.connect()

    gc.collect()
    gc.disable()
    try:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(wait_in_vain).result()
        wait_in_vain()
        assert len(deadlocks(engine)) == 2
        until(no_search_goes_on)
        assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_child_that_was_forked_during_a_search_can_search():
    searcher = _searches._searcher
    with searcher._turn, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are other threads
        child = os.fork()
        if not child:
            os._exit(0 if searcher._turn.acquire(timeout=1.0) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_search_leaves_the_variables_of_who_is_debugged(engines: Engines):
    """A debugger writes back what it has read."""
    engine = engines(1, hold_warning=0.1)

    def traced() -> str:
        with engine.connect() as own:
            user = "ann"
            own.execute(ONE)
            return user

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code is not traced.__code__:
            return None
        if event == "line" and "user" in frame.f_locals:
            until(lambda: [e for e in recent_events(engine) if isinstance(e, watch.HoldExceeded)])
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        assert traced() == "ann"
    finally:
        sys.settrace(before)


def test_the_search_leaves_the_arguments_of_who_is_traced(engines: Engines):
    """A trace function of the whole thread gets each call, and what it has seen is written back."""
    engine = engines(1, hold_warning=0.1)

    def told() -> list[watch.PoolEvent]:
        return [e for e in recent_events(engine) if isinstance(e, watch.HoldExceeded)]

    def traced(user: str) -> str:
        return user

    def trace(frame: Any, _event: str, _: Any) -> None:
        if frame.f_code is traced.__code__:
            until(told)

    before = sys.gettrace()
    with engine.connect() as own:
        own.execute(ONE)
        sys.settrace(trace)
        try:
            assert traced("ann") == "ann"
        finally:
            sys.settrace(before)


def test_searches_come_one_at_a_time_and_every_long_hold_is_told(engines: Engines):
    engine = engines(4, hold_warning=0.1)
    most = 0

    def hold() -> None:
        for _ in range(4):
            with engine.connect():  # without a name, so that nobody finds it soon
                time.sleep(0.25)

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        searching = [t for t in threading.enumerate() if t.name.startswith("poolkit search")]
        most = max(most, len(searching))
        time.sleep(0.002)
    told = [e.name for e in recent_events(engine) if e.name.startswith("hold_")]
    assert told.count("hold_exceeded") == told.count("hold_returned") == 16
    assert most == 1


def test_the_search_leaves_locals_alone(engines: Engines):
    engine = engines(1)
    variables = locals()
    assert variables["engine"] is engine
    with engine.connect(), pytest.raises(PoolTimeout):
        engine.connect()
    assert variables["engine"] is engine


class Bystander:
    """As werkzeug's proxies: whoever asks what it is runs code of the application's."""

    asked = 0

    @property
    def __class__(self) -> type:  # type: ignore[override]
        Bystander.asked += 1
        raise RuntimeError("working outside of the request")


def test_the_search_runs_no_code_of_what_it_finds(engines: Engines):
    engine = engines(1, **PATIENT)
    bystander = Bystander()
    Bystander.asked = 0
    with engine.connect() as own:
        own.execute(ONE)
        with pytest.raises(PoolTimeout, match="It looks like a deadlock"):
            engine.connect()
    assert Bystander.asked == 0
    del bystander


def test_what_goes_wrong_in_a_search_is_logged(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(_whereabouts, "find_entangled", fail)
    engine = engines(1, **PATIENT)
    with engine.connect() as own:
        own.execute(ONE)
        with pytest.raises(PoolTimeout):
            engine.connect()
    assert "could not be searched for" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_search_ends_early_once_nobody_waits_any_more(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
):
    looked_at: list[None] = []
    look = _sqlalchemy.slot_behind
    engine = engines(1, **PATIENT)
    held = engine.connect()

    def give_back_and_look(value: object) -> Any:
        looked_at.append(None)
        if len(looked_at) == 1:
            held.close()
            until(lambda: not engine.pool.snapshot().waiting)
        return look(value)

    monkeypatch.setattr(_sqlalchemy, "slot_behind", give_back_and_look)

    def wait() -> int:
        within_reach = [[number] for number in range(50_000)]
        engine.connect().close()
        return len(within_reach)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(wait).result() == 50_000
    until(no_search_goes_on)
    assert 1 <= len(looked_at) <= _whereabouts._ASK_EACH


# -- where a holder is now ---------------------------------------------------------------------


def test_a_long_hold_says_where_its_holder_is(engines: Engines):
    engine = engines(2, hold_warning=0.1)

    def report(connection: sa.Connection) -> None:
        connection.execute(sa.text("SELECT pg_sleep(0.6)"))

    def work() -> None:
        with engine.connect() as connection:
            report(connection)

    thread = threading.Thread(target=work, name="reporter")
    thread.start()
    thread.join()
    (told,) = [e for e in recent_events(engine) if isinstance(e, watch.HoldExceeded)]
    assert told.now_at is not None
    assert told.now_at.startswith("thread reporter at ")
    assert told.now_at.endswith(" report")


def test_a_long_hold_of_a_task_says_where_it_is(postgres: PostgresServer):
    async def think() -> None:
        await asyncio.sleep(0.6)

    async def main() -> None:
        engine = create_async_engine(
            postgres.url("asyncpg"), poolclass=AsyncManagedPool, hold_warning=0.1
        )
        async with engine.connect() as connection:
            await asyncio.create_task(think(), name="thinker")
            await connection.execute(ONE)
        (told,) = [e for e in recent_events(engine) if isinstance(e, watch.HoldExceeded)]
        assert told.now_at is not None
        assert told.now_at.startswith("task Task-")
        assert told.now_at.endswith(" main")
        await engine.dispose()

    asyncio.run(main())


def test_a_connection_that_nobody_has_on_his_stack_is_told_without_a_place(engines: Engines):
    engine = engines(2, hold_warning=0.1)
    sys.modules[__name__].__dict__["_kept"] = [engine.connect()]
    until(lambda: [e for e in recent_events(engine) if isinstance(e, watch.HoldExceeded)])
    (told,) = [e for e in recent_events(engine) if isinstance(e, watch.HoldExceeded)]
    assert told.now_at is None
    sys.modules[__name__].__dict__.pop("_kept").pop().close()


def test_a_function_leads_to_what_it_closes_over_but_not_to_all_globals():
    kept = [object()]

    def inner() -> object:
        return kept

    (cell, *_) = _whereabouts._referents(inner, crosses_borders=True)
    assert cell.cell_contents is kept
    assert not any(
        each is globals() for each in _whereabouts._referents(inner, crosses_borders=True)
    )
