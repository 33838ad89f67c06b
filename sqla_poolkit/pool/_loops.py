"""The edge to asyncio: callers sleep on futures, background work runs in tasks of their loop."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import weakref
from collections.abc import Callable, Coroutine
from contextvars import Context
from functools import partial
from math import inf
from typing import Any

from sqlalchemy.exc import MissingGreenlet

from ..config import PoolConfig
from ..core.lanes import Lane
from ..core.slots import CHECKED_OUT, CLOSING, CONNECTING, Decision, Request, Slot
from ..core.snapshot import PoolSnapshot
from ..errors import PoolMisuse
from . import _liveness, _sqlalchemy
from ._abandon import abandon
from ._callers import holder_finder
from ._driver import Driver, Job
from ._guards import UNGUARDED, Guard
from ._whereabouts import present_task

__all__ = ["LoopDriver"]


_LATE_SECONDS = 0.03  # so late a timer is when nothing blocks its loop
_CONNECT_GRACE_SECONDS = 0.5
"""So much longer than ``connect_timeout`` a driver may take to end a connect by itself."""
_LISTENER_SECONDS = 60.0
"""So long a ``checkin`` listener may wait for something before what it holds up counts as lost."""


class LoopDriver(Driver):
    """A pool for asyncio: a lane per event loop, tasks that connect and close, timers for upkeep.

    A connection belongs to the loop that opened it.  Loops may run in several threads at a time;
    all that they share is the lock, the limit and the books.
    """

    __slots__ = ("_cancellations", "_homes", "_lanes")

    sees_callers = False  # the frames of a task that waits cannot be found

    def __init__(self, config: PoolConfig) -> None:
        super().__init__(config, lanes=0)
        self.find_holder = holder_finder(config.track, is_asyncio=True)
        self.caller = _sqlalchemy.current_greenlet()
        self.owner = present_task
        self._cancellations = _sqlalchemy.cancellations()
        _drivers.add(self)
        self._homes: dict[asyncio.AbstractEventLoop, _Home] = {}
        self._lanes: dict[asyncio.AbstractEventLoop, Lane] = {}

    def find_lane(self) -> Lane:
        """Return the lane of the running loop.

        :raises PoolMisuse: if no loop is running.
        """
        try:
            return self._lanes[asyncio.get_running_loop()]
        except KeyError:
            return self._enter(asyncio.get_running_loop())
        except RuntimeError:
            raise PoolMisuse(
                f"pool {self.config.name!r} is for asyncio and was used where no event loop is "
                "running; use the engine inside a coroutine (async with engine.connect(), run by "
                "asyncio.run), or make a second engine for threads with create_engine and "
                "poolclass=ManagedPool"
            ) from None

    def _enter(self, loop: asyncio.AbstractEventLoop) -> Lane:
        self.forget_closed_loops()
        with self.lock:
            home = self._homes.get(loop)
            if home is None:
                home = self._homes[loop] = _Home(loop, self)
                home.lane = self._lanes[loop] = self.machine.add_lane(home)
        return home.lane

    def new_parker(self, lane: Lane | None) -> _LoopParker:
        """Return a future to sleep on."""
        return _LoopParker(asyncio.get_running_loop() if lane is None else lane.key.loop)

    def _check(self, slot: Slot) -> Slot | Request:
        if not _sqlalchemy.in_greenlet():
            raise _sqlalchemy.missing_greenlet(self.config.name)
        return super()._check(slot)

    def _connect_here(self, slot: Slot) -> Slot:
        if not _sqlalchemy.in_greenlet():
            raise _sqlalchemy.missing_greenlet(self.config.name)
        return super()._connect_here(slot)

    def _sleep(self, request: Request) -> bool:
        # a timer for each wait would cost more than the rest of it: there is one per loop
        if request.deadline is not None:
            request.lane.key.watch(request.deadline)
        try:
            request.parker.park(None)
        except MissingGreenlet:
            raise _sqlalchemy.missing_greenlet(self.config.name) from None
        return True

    def expire_overdue(self, lane: Lane) -> float:
        """Wake the callers of a lane whose deadlines have passed; return the next deadline."""
        return self.step(partial(self.machine.expire_overdue, lane))

    # -- in the background -------------------------------------------------------------------

    def _start(self, job: Job, slot: Slot) -> bool:
        home: _Home = slot.lane.key
        if home.loop.is_closed():
            self.forget_closed_loops()
        elif not home.loop.is_running():
            self._put_stopped_loops_to_sleep()
        else:
            limit = self.config.connect_timeout if slot.state == CONNECTING else None
            home.soon(home.begin, self._work_on_loop, job, slot, limit)
        return True

    def _put_stopped_loops_to_sleep(self) -> None:
        """Expect nothing of loops that are stopped, for they may never run again.

        What they were closing or pinging is cut off, what they were opening is given up.
        """
        for home in list(self._homes.values()):
            lane = home.lane
            has_rest = not lane.is_asleep or lane.connecting or lane.closing
            if home.loop.is_running() or home.loop.is_closed() or not has_rest:
                continue
            with self.lock:
                in_the_middle = [
                    slot.resource
                    for slot in self.machine.slots
                    if slot.lane is lane and (slot.state == CLOSING or slot.is_pinged_for_nobody)
                ]
            for record in filter(None, in_the_middle):
                connection = record.dbapi_connection
                if connection is not None:
                    _sqlalchemy.forget_connection(record)
                    abandon(connection)
            self.step(partial(self.machine.put_to_sleep, lane))

    async def _work_on_loop(self, job: Job, slot: Slot) -> None:
        await _sqlalchemy.greenlet_spawn(self._work, job, slot)

    def _can_do_here(self, slot: Slot) -> bool:
        home: _Home = slot.lane.key
        return home.is_running_here() and _sqlalchemy.in_greenlet()

    def _close_failed(self, record: Any, connection: Any, error: BaseException) -> None:
        if self._is_cancellation(error):
            abandon(connection)
        else:
            super()._close_failed(record, connection, error)

    def _abandon(self, got: Slot | Request, error: BaseException) -> None:
        is_connecting = got.state == CONNECTING and self._is_cancellation(error)
        if is_connecting or isinstance(error, MissingGreenlet):
            self.step(partial(self.machine.decline, got))
        elif self.holds_lock():
            # a task that was never finished is collected in the middle of a change
            got.lane.key.soon(self._abandon, got, error)
        else:
            super()._abandon(got, error)

    def _is_cancellation(self, error: BaseException) -> bool:
        return isinstance(error, self._cancellations)

    def _defer(self, decisions: list[Decision]) -> None:
        # a task can be started from anywhere, so nothing has to wait for the upkeep
        self._carry_out(decisions)

    def _arm(self, record: _sqlalchemy.ConnectionPoolEntry, seconds: float) -> Guard:
        loop = asyncio._get_running_loop()  # noqa: SLF001 - get_running_loop raises where none is
        return UNGUARDED if loop is None else _LoopGuard(loop, record.dbapi_connection, seconds)

    def _cut_off(self, connection: Any) -> None:
        if not _liveness.cut_off(connection):
            abandon(connection)

    # -- upkeep ------------------------------------------------------------------------------

    def _mind_growth(self) -> None:
        due_at = self.machine.next_tick(self.clock())
        here = asyncio._get_running_loop()  # noqa: SLF001 - get_running_loop raises where none is
        home = self._homes.get(here) if here is not None else None
        for each in [home] if home is not None else list(self._homes.values()):
            if due_at < each.due_at:
                each.wake_at(due_at)

    def _wake_upkeep(self) -> None:
        for home in list(self._homes.values()):
            home.wake_at(-inf)

    def upkeep(self) -> float:
        """Do what is due; return in how many seconds to come again, infinity for never."""
        self.forget_closed_loops()
        self._put_stopped_loops_to_sleep()
        return super().upkeep()

    def forget_closed_loops(self) -> None:
        """Let go of connections that nobody can use or close any more: their loop is closed."""
        if not any(loop.is_closed() for loop in list(self._homes)):
            return
        with self.lock:
            self.take_returns()
            closed = [home for loop, home in self._homes.items() if loop.is_closed()]
            for home in closed:
                del self._homes[home.loop], self._lanes[home.loop]
                home.call_off()
            lanes = [home.lane for home in closed]
            records = [slot.resource for slot in self.machine.slots if slot.lane in lanes]
        for record in filter(None, records):
            _sqlalchemy.assign_slot(record, None)
            connection = record.dbapi_connection
            if connection is not None:
                _sqlalchemy.forget_connection(record)
                abandon(connection)
        # only now, for the limit is one of sockets
        for lane in lanes:
            self.step(partial(self.machine.forget_lane, lane))

    def is_being_handled(self, slot: Slot) -> bool:
        # the frames of a task that waits cannot be found; but it has few places to wait at
        granted_to = slot.granted_to
        return granted_to is not None and not granted_to.is_awake

    def patience(self) -> float:
        pool = self.served_pool()
        return _LISTENER_SECONDS if pool is not None and pool.dispatch.checkin else 0.0

    def time_moved(self) -> None:
        """Have each loop do what is due by a clock that was moved."""
        for home in list(self._homes.values()):
            home.soon(home.time_moved)

    # -- connections that were dropped -------------------------------------------------------

    def take_back(self, record: Any, *, is_detached: bool) -> None:
        """Put a returned record's slot into the inbox; see to it at once if somebody waits."""
        slot = _sqlalchemy.slot_of(record)
        if is_detached and slot is not None and slot.state is CHECKED_OUT:
            dropped = _sqlalchemy.connection_being_collected()
            if dropped is not None:
                # SQLAlchemy would do the same after the place is free, which is a moment too late
                abandon(dropped)
                slot.reason = "leaked"
                is_detached = False
        super().take_back(record, is_detached=is_detached)

    # -- from the owner of the pool ----------------------------------------------------------

    def snapshot(self, *, has_rows: bool = True) -> PoolSnapshot:
        """Return one consistent reading; without ``has_rows`` its ``labels`` are left out."""
        self.forget_closed_loops()
        return super().snapshot(has_rows=has_rows)


_drivers: weakref.WeakSet[LoopDriver] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for driver in list(_drivers):
        driver.forget_closed_loops()  # or the connections' own finalizers would complain


def _end_connect(task: asyncio.Task[None], slot: Slot) -> None:
    if slot.state == CONNECTING:
        slot.is_timed_out = True
        task.cancel()


class _Home:
    """One event loop: its lane, its tasks, and the timer of its upkeep."""

    lane: Lane

    def __init__(self, loop: asyncio.AbstractEventLoop, driver: LoopDriver) -> None:
        self.loop = loop
        self.due_at = inf
        self._watched = inf
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._driver = weakref.ref(driver)
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def is_running_here(self) -> bool:
        """Tell whether this loop is the one that runs in the present thread."""
        return asyncio._get_running_loop() is self.loop  # noqa: SLF001 - as above

    def soon(self, work: Callable[..., None], *arguments: Any) -> None:
        """Call something from the loop itself, in an empty context; never, if the loop is closed.

        Also from the loop's own thread: there the collector may have called us, anywhere.
        """
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(partial(work, *arguments), context=Context())

    def begin(
        self,
        work: Callable[..., Coroutine[Any, Any, None]],
        job: Job,
        slot: Slot,
        seconds: float | None,
    ) -> None:
        """Do a job for a slot in a task, which is cancelled after so many seconds.

        Drivers end a connect by themselves; but some wait for a silent server without end.
        """
        task = self.loop.create_task(work(job, slot))
        if seconds is not None:
            limit = seconds + _CONNECT_GRACE_SECONDS
            timer = self.loop.call_later(limit, _end_connect, task, slot, context=Context())
            task.add_done_callback(lambda _: timer.cancel())
        # a loop may end before its tasks do; that is for the next loop to clear up, not to warn of
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001 - as gather does
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def call_off(self) -> None:
        """Call off what the closed loop has not begun, or Python would warn of it."""
        for coroutine in [task.get_coro() for task in self._tasks]:
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:  # type: ignore[arg-type]
                coroutine.close()

    def wake_at(self, moment: float) -> None:
        """Have the upkeep run at this moment of the pool's clock, or soon if that is past."""
        if self.is_running_here():
            self._set_timer(moment)
        else:
            self.soon(self._set_timer, moment)

    def watch(self, deadline: float) -> None:
        """See to it that who waits until this deadline is woken then; called on the loop."""
        if deadline < self._watched:
            self._watched = deadline
            if self._deadline_timer is not None:
                self._deadline_timer.cancel()
            driver = self._driver()
            pause = 0.0 if driver is None else max(0.0, deadline - driver.clock())
            context = Context()
            self._deadline_timer = self.loop.call_later(pause, self._expire, context=context)

    def _expire(self) -> None:
        self._watched = inf
        self._deadline_timer = None
        driver = self._driver()
        if driver is not None:
            self.watch(driver.expire_overdue(self.lane))

    def _set_timer(self, moment: float) -> None:
        driver = self._driver()
        if driver is None or self.loop.is_closed():
            return
        if self._timer is not None:
            self._timer.cancel()
        self.due_at = moment
        pause = max(0.0, moment - driver.clock())
        # the context of the task that happens to run now would stay alive as long as the timer
        self._timer = self.loop.call_later(pause, self._run, context=Context())

    def time_moved(self) -> None:
        """Have both timers run out: they were set by a clock that was moved."""
        for timer in (self._timer, self._deadline_timer):
            if timer is not None:
                timer.cancel()
        self._expire()
        self._run()

    def _run(self) -> None:
        self._timer = None
        self.due_at = inf
        driver = self._driver()
        if driver is None:
            return
        self.lane.is_asleep = False
        pause = driver.look_after()
        if pause != inf and self.due_at == inf:
            self._set_timer(driver.clock() + pause)


class _LoopGuard:
    """A guarded call in a task: a timer of its loop cuts the connection off."""

    __slots__ = ("_connection", "_due_at", "_loop", "_timer", "was_cut")

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: Any, seconds: float) -> None:
        self.was_cut = False
        self._connection = connection
        self._loop = loop
        self._due_at = loop.time() + seconds
        self._timer = loop.call_later(seconds, self._cut, context=Context())

    def _cut(self) -> None:
        if self._loop.time() > self._due_at + _LATE_SECONDS:
            # the loop was blocked, so the answer may be there: those who wait for it come first
            self._due_at = self._loop.time() + _LATE_SECONDS
            self._timer = self._loop.call_later(_LATE_SECONDS, self._cut, context=Context())
            return
        self.was_cut = True
        _liveness.cut_off(self._connection)

    def disarm(self) -> None:
        self._timer.cancel()


class _LoopParker:
    """A place where one task sleeps until another, or another thread, wakes it."""

    __slots__ = ("_future", "_is_woken", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[bool] | None = None
        self._is_woken = False

    def park(self, seconds: float | None) -> bool:
        """Sleep until woken, at most so long; return whether somebody woke us."""
        if self._is_woken:
            self._is_woken = False
            return True
        if seconds is not None and seconds <= 0:
            return False
        self._future = future = self._loop.create_future()
        timer = None
        if seconds is not None:
            timer = self._loop.call_later(seconds, _settle, future, False)
        try:
            was_woken: bool = _sqlalchemy.await_only(future)
        finally:
            self._future = None
            if timer is not None:
                timer.cancel()
        return was_woken

    def unpark(self) -> None:
        """Wake the sleeper, or the next one who would sleep; twice is as good as once."""
        if asyncio._get_running_loop() is self._loop:  # noqa: SLF001 - as above
            self._wake()
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed, and who slept on it is gone
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._future is None:
            self._is_woken = True
        else:
            _settle(self._future, True)


def _settle(future: asyncio.Future[bool], was_woken: bool) -> None:
    if not future.done():
        future.set_result(was_woken)
