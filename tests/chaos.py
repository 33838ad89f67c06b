"""A mixed load of threads and tasks while network and server fail at random, and its judgement.

``python -m tests.chaos --seconds 180 --seed 1``; exit code 1 if anything was not as it must be.
The seed decides the faults and the work; how they meet is up to the machine.
"""
# ruff: noqa: T201 - it talks to a person at a terminal

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import itertools
import logging
import os
import random
import statistics
import sys
import threading
import time
import traceback
import tracemalloc
import warnings
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg
import psycopg2
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_poolkit import AsyncManagedPool, ManagedPool, PoolTimeout, PoolUnavailable, snapshot
from sqla_poolkit.testing import FaultProxy
from tests.pool.laws import broken_laws
from tests.servers import PostgresServer

THREADS, TASKS, MAX_SIZE = 16, 24, 6
POOL_TIMEOUT = 2.0
LATE_SECONDS = 0.25
HEAL_SECONDS = (0.3, 2.5)
THINK_SECONDS = (0.0, 0.15)
CALM_SECONDS = 5.0
RECOVERY_SECONDS = 1.5
DRAIN_SECONDS = 10.0
ALLOWED_SECONDS = 3.0
END_SECONDS = 15.0
"""The thread that writes the log says at the end of its ten seconds how much it left out."""
STALL_SECONDS = 0.1
GROWTH_BYTES = 1_000_000
GROWTH_DESCRIPTORS = 16
EXAMPLES = 3
SETTINGS = {
    "max_size": MAX_SIZE,
    "pool_timeout": POOL_TIMEOUT,
    "ping_timeout": 0.5,
    "connect_timeout": 2,
    "on_outage": "raise",
}
GAUGES = ("checked_out", "checking", "connecting", "waiting", "requesting")
KINDS = {
    "short": 40.0,
    "long": 30.0,
    "SQL error": 8.0,
    "carry on": 8.0,
    "invalidate": 4.0,
    "detach": 3.0,
    "drop": 2.0,
    "retire_all": 0.6,
    "dispose": 0.6,
}
CANCELLED_SHARE = 0.08
DIVISION_BY_ZERO = "22012"
# These are about the statement, and ours are sound: a connection came with somebody's leftovers.
STATEMENTS_OWN = (
    exc.ProgrammingError,
    exc.IntegrityError,
    exc.DataError,
    exc.InternalError,
    exc.NotSupportedError,
)
# asyncpg has read the server's last words, but not yet the end of the stream; any other number in
# the brackets would be a connection in two hands.
LAST_WORDS = "another operation (2) is in progress"
AFTER_A_DISCONNECT = (exc.ResourceClosedError, exc.PendingRollbackError)
DRIVERS = (psycopg2.OperationalError, psycopg2.InterfaceError, asyncpg.PostgresError)
NETWORK = (asyncpg.InterfaceError, OSError, asyncio.TimeoutError)

now = time.monotonic
numbers = itertools.count(1)


@dataclass
class Item:
    """One piece of work of one caller."""

    kind: str
    began_at: float
    phase: str = "checkout"
    was_cut_off: bool = False
    was_cancelled: bool = False
    when_served: Callable[[], object] | None = None

    def expects(self, error: BaseException) -> bool:
        """Tell whether it is what the caller asked for."""
        if self.kind == "SQL error":
            return code_of(error) == DIVISION_BY_ZERO
        return self.kind == "invalidate" and isinstance(error, AFTER_A_DISCONNECT)


def code_of(error: BaseException) -> str | None:
    """Return the SQLSTATE that the server gave to the error, if it was one of the server's."""
    return getattr(getattr(error, "orig", None), "pgcode", None)


class WrongAnswer(Exception):
    """An answer belongs to another question."""


class Record:
    """What happened; any thread may add to it."""

    def __init__(self) -> None:
        self.checkouts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.logged: Counter[str] = Counter()
        self.error_times: list[tuple[float, str]] = []
        self.success_times: deque[float] = deque(maxlen=100_000)
        self.longest: dict[str, float] = {}
        self.offences: dict[str, Counter[str]] = {}
        self.examples: list[str] = []
        self.stalls: list[tuple[float, float]] = []
        self.descriptors: list[tuple[float, int]] = []
        self._lock = threading.Lock()

    def blame(self, law: str, what: str, example: str = "") -> None:
        with self._lock:
            count = self.offences.setdefault(law, Counter())
            count[what] += 1
            if count[what] <= EXAMPLES:
                self.examples.append(f"{law}: {what}\n{example}")

    def checkout_ended(self, party: str, item: Item, error: BaseException | None) -> None:
        ended_at = now()
        took = ended_at - item.began_at
        with self._lock:
            self.longest[party] = max(self.longest.get(party, 0.0), took)
            if error is None:
                self.checkouts[f"{party}: {item.kind}"] += 1
        late = took - POOL_TIMEOUT - LATE_SECONDS
        if late > 0 and late > self._stalled(item.began_at, ended_at):
            self.blame("deadline", f"{party} {type(error).__name__}", f"{took:.3f} s: {error!r}")

    def _stalled(self, began_at: float, ended_at: float) -> float:
        """Return how many of these seconds nothing of this process ran."""
        recent = self.stalls[-200:]
        return sum(max(0.0, min(end, ended_at) - max(begin, began_at)) for begin, end in recent)

    def ended(self, party: str, item: Item, error: BaseException | None) -> None:
        if error is None:
            self.success_times.append(now())
            return
        if item.phase == "checkout":
            self.checkout_ended(party, item, error)
        cause = getattr(error, "orig", None)
        name = type(error).__name__ + (f" of {type(cause).__name__}" if cause is not None else "")
        with self._lock:
            self.errors[f"{party} {item.phase}: {name}"] += 1
            if not (item.was_cancelled or item.expects(error)):
                self.error_times.append((now(), f"{party} {item.phase} {item.kind}: {error!r}"))
        if not is_allowed(error, item):
            shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            self.blame("errors", f"{party} {item.phase} {item.kind}: {name}", shown)


def is_allowed(error: BaseException, item: Item) -> bool:
    """Tell whether the contract lets this error reach a caller."""
    if isinstance(error, asyncio.CancelledError):
        return item.was_cancelled
    if isinstance(error, PoolTimeout | PoolUnavailable):
        return item.phase == "checkout" or item.was_cut_off
    if isinstance(error, AFTER_A_DISCONNECT):
        return item.was_cut_off
    if type(error) is exc.StatementError:
        # SQLAlchemy checks out another connection inside the statement after a disconnect
        return item.was_cut_off and error.orig is not None and is_allowed(error.orig, item)
    if LAST_WORDS in str(error):
        return True
    if isinstance(error, exc.DBAPIError):
        return item.expects(error) or not isinstance(error, STATEMENTS_OWN)
    # Of a connect, be it in its holder's hands after a disconnect, and asyncpg's command_timeout.
    return isinstance(error, (*DRIVERS, *NETWORK))


def ask(connection: sa.Connection) -> None:
    number = next(numbers)
    answer = connection.execute(sa.text(f"SELECT {number}")).scalar()
    if answer != number:
        raise WrongAnswer(f"{answer} to {number}")


def pause(connection: sa.Connection, rng: random.Random) -> None:
    connection.execute(sa.text(f"SELECT pg_sleep({rng.uniform(0.005, 0.05)})"))


def work(connection: sa.Connection, item: Item, rng: random.Random) -> None:
    """Do what the kind of item says, on a connection of either engine."""
    if item.kind in PRELUDES:
        PRELUDES[item.kind](connection, item, rng)
    ask(connection)
    if item.kind == "long":
        for _ in range(rng.randrange(1, 4)):
            pause(connection, rng)
            ask(connection)
    if rng.random() < 0.5:
        connection.commit()


def err(connection: sa.Connection, item: Item, rng: random.Random) -> None:
    try:
        connection.execute(sa.text("SELECT 1 / 0"))
    except exc.DBAPIError as error:
        if code_of(error) != DIVISION_BY_ZERO or rng.random() < 0.5:
            raise  # at times the failed transaction is left to the pool
        connection.rollback()


def detach(connection: sa.Connection, item: Item, rng: random.Random) -> None:
    connection.detach()


def invalidate(connection: sa.Connection, item: Item, rng: random.Random) -> None:
    """End it in its holder's hands, who goes on with another, in time for a rollback or not."""
    if rng.random() < 0.5:
        ask(connection)
    connection.invalidate()
    item.was_cut_off = True
    if rng.random() < 0.5:
        connection.rollback()


def carry_on(connection: sa.Connection, item: Item, rng: random.Random) -> None:
    """Go on with the connection after whatever went wrong."""
    try:
        ask(connection)
        pause(connection, rng)
    except exc.DBAPIError as error:
        item.was_cut_off = error.connection_invalidated
        if rng.random() < 0.7:
            connection.rollback()


PRELUDES = {
    "SQL error": err,
    "detach": detach,
    "invalidate": invalidate,
    "carry on": carry_on,
}


class Load(ABC):
    """Callers of one engine, until they are told to stop."""

    party: str
    engine: Any

    def __init__(self, record: Record, seed: int) -> None:
        self.record = record
        self.seed = seed
        self.is_over = False

    def rng(self, number: int) -> random.Random:
        return random.Random(f"{self.seed} {self.party} {number}")

    def next_item(self, rng: random.Random) -> Item:
        return Item(*rng.choices([*KINDS], [*KINDS.values()]), now())

    def served(self, item: Item) -> None:
        self.record.checkout_ended(self.party, item, None)
        item.phase = "statement"
        if item.when_served:
            item.when_served()

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def join(self, seconds: float) -> int:
        """Wait for the callers to end; return how many did not."""

    @abstractmethod
    def hold(self, count: int) -> Callable[[], object]:
        """Have so many connections at once; return what gives them back."""

    @abstractmethod
    def close(self) -> None: ...


class ThreadLoad(Load):
    party = "threads"

    def __init__(self, record: Record, seed: int, through: FaultProxy, server: Any) -> None:
        super().__init__(record, seed)
        self.url = server.url("psycopg2", through)

    def start(self) -> None:
        url = self.url
        arguments = {"connect_timeout": 2, "application_name": self.party}
        self.engine = sa.create_engine(
            url, poolclass=ManagedPool, connect_args=arguments, **SETTINGS
        )
        self.hold(1)()
        self._callers = [
            threading.Thread(target=self._run, args=(self.rng(n),), name=f"caller-{n}", daemon=True)
            for n in range(THREADS)
        ]
        for caller in self._callers:
            caller.start()

    def _run(self, rng: random.Random) -> None:
        while not self.is_over:
            item = self.next_item(rng)
            error: BaseException | None = None
            try:
                self._do(item, rng)
            except BaseException as raised:
                error = raised
            self.record.ended(self.party, item, error)
            time.sleep(rng.uniform(*THINK_SECONDS))

    def _do(self, item: Item, rng: random.Random) -> None:
        if item.kind == "dispose":
            self.engine.dispose()
        elif item.kind == "retire_all":
            self.engine.pool.retire_all()
        item.began_at = now()
        if item.kind == "drop":
            dropped = self.engine.connect()
            self.served(item)
            ask(dropped)
            del dropped
            if rng.random() < 0.5:
                gc.collect()
            return
        with self.engine.connect() as connection:
            self.served(item)
            work(connection, item, rng)

    def join(self, seconds: float) -> int:
        self.is_over = True
        deadline = now() + seconds
        for caller in self._callers:
            caller.join(max(0.0, deadline - now()))
        return sum(caller.is_alive() for caller in self._callers)

    def hold(self, count: int) -> Callable[[], object]:
        held = [self.engine.connect() for _ in range(count)]
        for connection in held:
            ask(connection)
        return lambda: [connection.close() for connection in held]

    def close(self) -> None:
        self.engine.pool.close(timeout=5.0)


class TaskLoad(Load):
    party = "tasks"

    def __init__(self, record: Record, seed: int, through: FaultProxy, server: Any) -> None:
        super().__init__(record, seed)
        self.url = server.url("asyncpg", through)
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._complain)
        self._thread = threading.Thread(target=self._loop.run_forever, name="loop", daemon=True)

    def _complain(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.record.logged[f"loop: {context.get('message')} {context.get('exception')!r}"] += 1

    @staticmethod
    def _cancel(item: Item, task: asyncio.Task[None]) -> None:
        item.was_cancelled = task.cancel()

    def run(self, coroutine: Any, seconds: float = 60.0) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(seconds)

    def start(self) -> None:
        self._thread.start()
        arguments = {"command_timeout": 3, "server_settings": {"application_name": self.party}}
        self.engine = create_async_engine(
            self.url, poolclass=AsyncManagedPool, connect_args=arguments, **SETTINGS
        )
        self.hold(1)()
        self.run(self._start())

    async def _start(self) -> None:
        self._callers = [asyncio.create_task(self._run(self.rng(n))) for n in range(TASKS)]

    async def _run(self, rng: random.Random) -> None:
        while not self.is_over:
            item = self.next_item(rng)
            error: BaseException | None = None
            doing = asyncio.create_task(self._do(item, rng))
            if rng.random() < CANCELLED_SHARE:
                cancel = partial(
                    self._loop.call_later, rng.uniform(0.0, 0.05), self._cancel, item, doing
                )
                if rng.random() < 0.5:
                    cancel()
                else:
                    item.when_served = cancel
            try:
                await doing
            except BaseException as raised:
                error = raised
            self.record.ended(self.party, item, error)
            await asyncio.sleep(rng.uniform(*THINK_SECONDS))

    async def _do(self, item: Item, rng: random.Random) -> None:
        if item.kind == "dispose":
            await self.engine.dispose()
        elif item.kind == "retire_all":
            self.engine.pool.retire_all()
        item.began_at = now()
        if item.kind == "drop":
            dropped = await self.engine.connect()
            self.served(item)
            await dropped.run_sync(ask)
            del dropped
            if rng.random() < 0.5:
                gc.collect()
            return
        async with self.engine.connect() as connection:
            self.served(item)
            await connection.run_sync(work, item, rng)

    def join(self, seconds: float) -> int:
        self.is_over = True
        return self.run(self._join(seconds), seconds + 10)

    async def _join(self, seconds: float) -> int:
        _, pending = await asyncio.wait(self._callers, timeout=seconds)
        for task in pending:
            task.print_stack()
        return len(pending)

    def hold(self, count: int) -> Callable[[], object]:
        held: list[Any] = []

        async def connect() -> None:
            for _ in range(count):
                held.append(await self.engine.connect())
                await held[-1].run_sync(ask)

        async def close() -> None:
            for connection in held:
                await connection.close()

        self.run(connect())
        return lambda: self.run(close())

    def close(self) -> None:
        self.run(self.engine.pool.close(timeout=5.0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Faults:
    """What can go wrong, by name; each is begun, lasts a while and is healed."""

    def __init__(self, proxy: FaultProxy, server: PostgresServer, rng: random.Random) -> None:
        self._rng = rng
        self._server = server
        self._heal_proxy = proxy.heal
        hole, cut = proxy.black_hole, proxy.cut_after
        self.all: dict[str, Callable[[], object]] = {
            "black hole both": hole,
            "black hole up": lambda: hole("up"),
            "black hole down": lambda: hole("down"),
            "delay": lambda: proxy.delay(rng.uniform(0.01, 0.4)),
            "throttle": lambda: proxy.throttle(rng.uniform(200, 5000)),
            "reset": proxy.reset,
            "half close": proxy.half_close,
            "cut after, down": lambda: cut(rng.randrange(400)),
            "cut after, up": lambda: cut(rng.randrange(400), "up"),
            "refuse": proxy.refuse,
            "refuse and reset": lambda: (proxy.refuse(), proxy.reset()),
            "restart fast": lambda: server.restart("fast"),
            "restart immediate": lambda: server.restart("immediate"),
            "stop and start": lambda: server.stop(rng.choice(("fast", "immediate"))),
            "freeze and thaw": server.freeze,
            "terminate": self._terminate,
        }

    def _terminate(self) -> None:
        if clients := self._server.clients():
            self._server.terminate([self._rng.choice(clients)])

    def heal(self) -> None:
        self._server.mend()
        self._heal_proxy()


class Watch(threading.Thread):
    """Reads the books all the time, and notes when this process stood still."""

    def __init__(self, record: Record, loads: Sequence[Load]) -> None:
        super().__init__(name="watch", daemon=True)
        self._record = record
        self._loads = loads
        self._is_over = threading.Event()
        self._pulse = threading.Thread(target=self._feel, name="pulse", daemon=True)

    def start(self) -> None:
        super().start()
        self._pulse.start()

    def stop(self) -> None:
        self._is_over.set()
        self.join()
        self._pulse.join()

    def _feel(self) -> None:
        last = now()
        while not self._is_over.wait(0.01):
            last, before = now(), last
            if last - before > STALL_SECONDS:
                self._record.stalls.append((before, last))

    def run(self) -> None:
        for turn in itertools.count():
            if self._is_over.wait(0.05):
                return
            for load in self._loads:
                try:
                    reading = snapshot(load.engine)
                    broken = broken_laws(reading)
                except Exception as error:
                    self._record.blame("books", repr(error), traceback.format_exc())
                    continue
                for law in broken:
                    self._record.blame("books", f"{load.party}: {law}", str(reading))
            if turn % 20 == 0:
                self._record.descriptors.append((now(), descriptors()))
                gc.collect()


class Complaints(logging.Handler):
    """Hears what no caller does: logs, and errors of finalizers and of the pool's threads."""

    def __init__(self, record: Record) -> None:
        super().__init__(logging.WARNING)
        self._record = record
        for name in ("sqlalchemy.pool", "asyncio"):
            logging.getLogger(name).addHandler(self)
            logging.getLogger(name).propagate = False
        sys.unraisablehook = threading.excepthook = self._hook
        warnings.simplefilter("ignore")  # SQLAlchemy warns of each connection that was dropped

    def emit(self, record: logging.LogRecord) -> None:
        line = str(record.msg).partition("\n")[0][:90]
        self._record.logged[line] += 1
        if "upkeep of the pool failed" in line:
            self._blame(line, *(record.exc_info or sys.exc_info()))

    def _hook(self, caught: Any) -> None:
        what = f"{caught.exc_type.__name__} in a finalizer or a thread"
        self._blame(what, caught.exc_type, caught.exc_value, caught.exc_traceback)

    def _blame(self, what: str, *error: Any) -> None:
        self._record.blame("unheard", what, "".join(traceback.format_exception(*error)))


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def own_memory() -> int:
    """Return how many bytes there are that code of sqla_poolkit allocated."""
    gc.collect()
    taken = tracemalloc.take_snapshot()
    ours = taken.filter_traces([tracemalloc.Filter(True, "*sqla_poolkit*")])
    return sum(trace.size for trace in ours.traces)


def sessions(server: PostgresServer, party: str) -> int:
    sql = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{party}'"
    return int(server.query(sql)[0][0])


def until(is_so: Callable[[], object], seconds: float) -> bool:
    deadline = now() + seconds
    while not is_so():
        if now() > deadline:
            return False
        time.sleep(0.02)
    return True


class Run:
    """One run and its verdicts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.record = Record()
        self.verdicts: list[tuple[bool, str]] = []
        self.healed_at = now()
        self.memory: list[int] = []

    def say(self, line: str) -> None:
        if not self.options.quiet:
            print(line, flush=True)

    def judge(self, is_so: bool, sentence: str) -> None:
        self.verdicts.append((is_so, sentence))

    def execute(self) -> None:
        seed = self.options.seed
        with PostgresServer() as server, FaultProxy("127.0.0.1", server.port) as proxy:
            gc.collect()
            gc.freeze()  # the collections to come look at what the run made only
            before = threading.active_count(), descriptors(), server.sessions()
            loads = [ThreadLoad(self.record, seed, proxy, server)]
            loads.append(TaskLoad(self.record, seed, proxy, server))
            for load in loads:
                load.start()
            watch = Watch(self.record, loads)
            watch.start()
            began_at = now()
            rng = random.Random(f"{seed} faults")
            self.fail_at_random(Faults(proxy, server, rng), rng, began_at)
            ended_at = now()
            self.measure_memory(1.0)
            stuck = {load.party: load.join(DRAIN_SECONDS) for load in loads}
            watch.stop()
            self.judge_callers(stuck, ended_at)
            self.judge_growth(began_at, ended_at)
            for load in loads:
                self.judge_rest(load, server)
            for load in loads:
                load.close()
            self.judge_end(server, before)

    def fail_at_random(self, faults: Faults, rng: random.Random, began_at: float) -> None:
        last_at = began_at + self.options.seconds - CALM_SECONDS - HEAL_SECONDS[1]
        while True:
            pause = rng.uniform(0.5, 1.5) * self.options.every
            if now() + pause > last_at:
                break
            time.sleep(pause)
            name, begin = rng.choice([*faults.all.items()])
            seconds = rng.uniform(*HEAL_SECONDS)
            self.record.faults[name] += 1
            self.say(f"{now() - began_at:7.2f} s  {name} for {seconds:.2f} s")
            begin()
            time.sleep(seconds)
            faults.heal()
            self.healed_at = now()
            self.measure_memory((now() - began_at) / self.options.seconds)
        time.sleep(max(CALM_SECONDS, began_at + self.options.seconds - now()))

    def measure_memory(self, share: float) -> None:
        if tracemalloc.is_tracing() and share >= (0.3, 1.0, 9.0)[len(self.memory)]:
            self.memory.append(own_memory())

    def judge_callers(self, stuck: dict[str, int], ended_at: float) -> None:
        record = self.record
        self.judge(not any(stuck.values()), f"all callers ended when told to; stuck: {stuck}")
        if any(stuck.values()):
            faulthandler.dump_traceback()
        for law, sentence in (
            ("deadline", f"no checkout ended over {LATE_SECONDS} s after its deadline"),
            ("errors", "only allowed errors reached callers"),
            ("books", "every reading of the books obeyed the laws"),
            ("unheard", "nothing failed where no caller hears of it"),
        ):
            offences = record.offences.get(law, {})
            self.judge(not offences, f"{sentence}; offences: {dict(offences)}")
        since = self.healed_at + RECOVERY_SECONDS
        errors = [what for at, what in record.error_times if at > since]
        successes = sum(at > since for at in record.success_times)
        self.judge(
            not errors and successes > 0,
            f"from {RECOVERY_SECONDS} s after the last fault on all went well: {successes} "
            f"successes, {len(errors)} errors in {ended_at - since:.1f} s {errors[:EXAMPLES]}",
        )

    def judge_growth(self, began_at: float, ended_at: float) -> None:
        if len(self.memory) < 2:
            return
        first, last = self.memory
        self.judge(
            last - first < GROWTH_BYTES,
            f"the memory stayed flat: {first} bytes at 30 % of the time, {last} at its end",
        )
        tenth = (ended_at - began_at) / 10
        samples = self.record.descriptors
        early = [count for at, count in samples if 2 * tenth < at - began_at < 4 * tenth]
        late = [count for at, count in samples if at > ended_at - 2 * tenth]
        medians = statistics.median(early), statistics.median(late)
        self.judge(
            medians[1] - medians[0] < GROWTH_DESCRIPTORS,
            f"the file descriptors stayed flat: {medians[0]} early, {medians[1]} late (medians)",
        )

    def judge_rest(self, load: Load, server: PostgresServer) -> None:
        gc.collect()

        def left() -> dict[str, int]:
            reading = snapshot(load.engine)
            return {name: n for name in GAUGES if (n := getattr(reading, name))}

        until(lambda: not left(), DRAIN_SECONDS)
        self.judge(not left(), f"{load.party}: nothing is under way without callers: {left()}")
        try:
            give_back = load.hold(MAX_SIZE)
        except BaseException as error:
            self.judge(False, f"{load.party}: {MAX_SIZE} connections can be had: {error!r}")
            return

        def counts() -> tuple[int, int]:
            return snapshot(load.engine).open, sessions(server, load.party)

        until(lambda: counts() == (MAX_SIZE, MAX_SIZE), ALLOWED_SECONDS)
        is_so = counts() == (MAX_SIZE, MAX_SIZE)
        self.judge(
            is_so, f"{load.party}: {MAX_SIZE} connections are open: books, server {counts()}"
        )
        give_back()
        until(lambda: len(set(counts())) == 1, ALLOWED_SECONDS)
        is_so = len(set(counts())) == 1
        self.judge(is_so, f"{load.party}: the books count the server's sessions: {counts()}")

    def judge_end(self, server: PostgresServer, before: tuple[int, int, int]) -> None:
        def counts() -> tuple[int, int, int]:
            return threading.active_count(), descriptors(), server.sessions()

        def is_so() -> bool:
            return all(have <= had for have, had in zip(counts(), before, strict=True))

        gc.collect()
        until(is_so, END_SECONDS)
        names = sorted(thread.name for thread in threading.enumerate())
        self.judge(
            is_so(),
            "after close() threads, descriptors and sessions are back: "
            f"{before} before, {counts()} after; threads {names}",
        )

    def summary(self) -> None:
        record = self.record
        stalls = sum(end - begin for begin, end in record.stalls)
        longest = {party: round(seconds, 3) for party, seconds in record.longest.items()}
        for title, counts in (
            (f"{sum(record.checkouts.values())} checkouts", record.checkouts),
            (f"{sum(record.errors.values())} errors", record.errors),
            (f"{sum(record.faults.values())} faults", record.faults),
            ("logged", record.logged),
        ):
            print(f"\n{title}")
            for name, count in sorted(counts.items()):
                print(f"{count:8}  {name}")
        print(f"\nlongest checkouts {longest}; this process stood still for {stalls:.2f} s")
        for example in record.examples:
            print(f"\n-- {example}")
        print()
        for is_so, sentence in self.verdicts:
            print(f"{'ok' if is_so else 'FAILED':8}{sentence}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=180.0, help="at least 15")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--every", type=float, default=1.0, help="mean pause between faults")
    parser.add_argument("--memory", action="store_true", help="judge memory and descriptors too")
    parser.add_argument("--quiet", action="store_true", help="no line per fault")
    options = parser.parse_args(arguments)
    print(f"seed {options.seed}, Python {sys.version.split()[0]}, SQLAlchemy {sa.__version__}")
    faulthandler.dump_traceback_later(options.seconds + 120, exit=True)
    run = Run(options)
    Complaints(run.record)
    if options.memory:
        tracemalloc.start()
    try:
        run.execute()
    except Exception:
        run.judge(False, f"the run came to its end: {traceback.format_exc()}")
    run.summary()
    is_ok = bool(run.verdicts) and all(is_so for is_so, _ in run.verdicts)
    print(f"seed {options.seed}: {'all as it must be' if is_ok else 'FAILED'}")
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
