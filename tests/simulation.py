"""Threads without threads: pool code runs in greenlets, and dice say who is next.

Everything that can block or tell the time is replaced: locks, parkers, thread starts and the clock
of ``sqla_poolkit.pool._sync``, and what QueuePool takes from ``threading`` and ``time``.  Time
stands still while anybody can run, and jumps to the next deadline when nobody can.  So a schedule
is a sequence of choices, and the same choices give the same run.

A task may be overtaken at every lock operation, park, wake-up and return to the inbox; and with
``statement_by_statement`` before every statement of the modules given.  The code that runs is the
shipped one.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context
from random import Random
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import greenlet
import sqlalchemy.pool.base
import sqlalchemy.pool.impl
import sqlalchemy.util.queue

from sqla_poolkit.pool import _driver, _sqlalchemy, _sync, _threads

__all__ = ["Broken", "Dice", "Inbox", "Parker", "Simulation", "Task", "statement_by_statement"]

START = 1000.0
MOST_STEPS = 400_000


class Broken(AssertionError):
    """A law does not hold, or a task can not go on."""


class Dice:
    """Chooses who runs next: by a list of choices, then always the one who runs already."""

    def __init__(self, choices: Sequence[int] = ()) -> None:
        self._left = deque(choices)

    def choose(self, number: int) -> int:
        """Return one of ``number`` candidates; 0 is the one who runs already."""
        return self._left.popleft() % number if self._left else 0

    @classmethod
    def seeded(cls, seed: int) -> Dice:
        """Return dice for ever, the same for the same seed: restless ones and patient ones."""
        random = Random(seed)
        restlessness = random.choice((0.5, 0.1, 0.02))
        dice = cls()
        dice.choose = lambda number: (  # type: ignore[method-assign]
            random.randrange(number) if random.random() < restlessness else 0
        )
        return dice


class Task:
    """One simulated thread."""

    def __init__(self, name: str, glet: greenlet.greenlet) -> None:
        self.name = name
        self.greenlet = glet
        self.is_done = False
        self.is_parked = False
        self.deadline: float | None = None
        self.interruption: BaseException | None = None
        self._ready: Callable[[], bool] | None = None

    def __repr__(self) -> str:
        return f"<Task {self.name}>"

    def can_run(self) -> bool:
        """Tell whether it waits for nothing now."""
        if self.is_done:
            return False
        if self._ready is None or self.interruption is not None:
            return True
        return self._ready()

    def wait_for(self, ready: Callable[[], bool] | None, deadline: float | None) -> None:
        """Remember what it waits for."""
        self._ready = ready
        self.deadline = deadline

    def interrupt(self, error: BaseException) -> bool:
        """Have ``park`` raise, as a signal would; False if it is not parked."""
        if self.is_parked and not self.is_done:
            self.interruption = error
            return True
        return False

    def taken_interruption(self) -> BaseException:
        """Return what to raise, and forget it: kept here it would keep alive what it passed."""
        error, self.interruption = self.interruption, None
        assert error is not None
        return error

    def join(self, seconds: float | None = None) -> None:
        """Do nothing: only the end of an interpreter joins threads."""


class Simulation:
    """The scheduler and the clock.

    :param dice: chooses who runs next.
    :param after_each_step: looks for broken laws whenever the running task changes.
    :param when_quiet: looks for broken laws when nobody can run before time goes on.
    """

    def __init__(
        self,
        dice: Dice,
        after_each_step: Callable[[], None] = lambda: None,
        when_quiet: Callable[[], None] = lambda: None,
    ) -> None:
        self.now = START
        self.tasks: list[Task] = []
        self.trace: list[str] = []
        """Who ran, in order."""
        self.after_each_step = after_each_step
        self.when_quiet = when_quiet
        self._dice = dice
        self._main = greenlet.getcurrent()
        self.current: Task | None = None
        self._steps = 0
        self._is_over = False
        self._error: BaseException | None = None

    # -- for those who run -------------------------------------------------------------------

    def clock(self) -> float:
        """Return the simulated time."""
        return self.now

    def start(self, work: Callable[[], None], name: str) -> Task:
        """Start a task."""

        def body() -> None:
            try:
                work()
            except greenlet.GreenletExit:
                pass
            except BaseException as error:
                if self._error is None:
                    self._error = error
            finally:
                task.is_done = True

        task = Task(name, greenlet.greenlet(body, self._main))
        self.tasks.append(task)
        return task

    def point(self) -> None:
        """Be overtaken here, if the dice say so."""
        current = self.current
        if self._is_over or current is None or greenlet.getcurrent() is not current.greenlet:
            return
        self._count_step()
        others = [task for task in self.tasks if task is not current and task.can_run()]
        chosen = self._dice.choose(len(others) + 1)
        if chosen:
            self._main.switch(others[chosen - 1])

    def sleep(self, seconds: float) -> None:
        """Let so much time pass."""
        self.block(lambda: False, seconds)

    def block(
        self, ready: Callable[[], bool], seconds: float | None = None, *, is_park: bool = False
    ) -> bool:
        """Wait until something is so, at most so long; return whether it is."""
        if self._is_over:
            raise greenlet.GreenletExit
        task = self.current
        assert task is not None
        task.wait_for(ready, None if seconds is None else self.now + max(0.0, seconds))
        task.is_parked = is_park
        self._main.switch()
        task.is_parked = False
        if self._is_over:
            raise greenlet.GreenletExit
        if task.interruption is not None:
            raise task.taken_interruption()
        return ready()

    def _count_step(self) -> None:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise Broken(f"nobody comes to an end: {self.describe()}")

    # -- for who watches ---------------------------------------------------------------------

    def describe(self) -> str:
        """Return who does what."""
        left = [
            f"{task.name} {'can run' if task.can_run() else f'waits until {task.deadline}'}"
            for task in self.tasks
            if not task.is_done
        ]
        return f"at {self.now - START:.3f} s: {', '.join(left)}"

    def run(self) -> None:
        """Run until all tasks have ended."""
        chosen: Any = None
        try:
            while not self._is_over:
                task = chosen if isinstance(chosen, Task) else self._next()
                if task is None:
                    return
                self._count_step()
                task.wait_for(None, None)
                self.current = task
                self.trace.append(task.name)
                chosen = task.greenlet.switch()
                self.current = None
                if self._error is not None:
                    raise self._error
                self.after_each_step()
        finally:
            self._end()

    def _next(self) -> Task | None:
        while True:
            able = [task for task in self.tasks if task.can_run()]
            if able:
                return able[self._dice.choose(len(able))]
            self.tasks = [task for task in self.tasks if not task.is_done]
            if not self.tasks:
                return None
            self.when_quiet()
            self._let_time_pass()

    def _let_time_pass(self) -> None:
        deadlines = [task.deadline for task in self.tasks if task.deadline is not None]
        if not deadlines:
            raise Broken(f"everybody waits for ever: {self.describe()}")
        self.now = max(self.now, min(deadlines))
        for task in self.tasks:
            if task.deadline is not None and task.deadline <= self.now:
                task.wait_for(None, None)

    def _end(self) -> None:
        """Let go of the tasks that have not ended, as after a broken law."""
        self._is_over = True
        for task in self.tasks:
            if not task.is_done:
                task.greenlet.throw()

    # -- what is replaced --------------------------------------------------------------------

    @contextlib.contextmanager
    def installed(self, chance: Callable[[], float]) -> Iterator[None]:
        """Replace threads, locks and clocks; ``chance`` stands in for ``random.random``."""
        replaced = (
            mock.patch.multiple(
                _sync,
                RLock=lambda: _RLock(self),
                Parker=lambda: Parker(self),
                start_thread=self._start_thread,
                monotonic=self.clock,
                wall_clock=self.clock,
            ),
            mock.patch.object(_threads, "get_ident", _ident),
            mock.patch.object(_driver, "random", SimpleNamespace(random=chance)),
            mock.patch.object(_sqlalchemy, "sys", SimpleNamespace(_current_frames=self._frames)),
            mock.patch.object(sqlalchemy.util.queue, "threading", self._threading()),
            mock.patch.object(sqlalchemy.util.queue, "_time", self.clock),
            mock.patch.object(sqlalchemy.pool.impl, "threading", self._threading()),
            mock.patch.object(sqlalchemy.pool.base, "time", SimpleNamespace(time=self.clock)),
        )
        collects = gc.isenabled()
        gc.disable()  # a collection at another moment would be another run
        gc.freeze()  # what was there before costs no time in the collections of this run
        with contextlib.ExitStack() as stack:
            for each in replaced:
                stack.enter_context(each)
            try:
                yield
            finally:
                gc.unfreeze()
                if collects:
                    gc.enable()

    def _start_thread(self, work: Callable[[], None], name: str) -> Task:
        task = self.start(lambda: Context().run(work), name)
        self.point()
        return task

    def _threading(self) -> SimpleNamespace:
        return SimpleNamespace(
            Lock=lambda: _RLock(self),
            RLock=lambda: _RLock(self),
            Condition=lambda lock=None: _Condition(self, lock),
        )

    def _frames(self) -> dict[int, Any]:
        frames = {id(task): task.greenlet.gr_frame for task in self.tasks}
        frames[0] = sys._getframe(1)
        return {number: frame for number, frame in frames.items() if frame is not None}


def _ident() -> int:
    return id(greenlet.getcurrent())


class _RLock:
    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._owner: Any = None
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        self._simulation.point()
        me = greenlet.getcurrent()
        if self._owner is not me:
            if self._owner is not None:
                if not blocking:
                    return False
                self._simulation.block(lambda: self._owner is None)
            self._owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._simulation.point()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    def _is_owned(self) -> bool:
        return self._owner is greenlet.getcurrent()

    @property
    def is_free(self) -> bool:
        return self._owner is None


class Parker:
    """Where a task sleeps until another wakes it."""

    __slots__ = ("_is_woken", "_simulation")

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._is_woken = False

    def park(self, seconds: float | None) -> bool:
        self._simulation.point()
        if not self._is_woken and (seconds is None or seconds > 0):
            self._simulation.block(lambda: self._is_woken, seconds, is_park=True)
        was_woken, self._is_woken = self._is_woken, False
        return was_woken

    def unpark(self) -> None:
        self._simulation.point()
        self._is_woken = True
        self._simulation.point()


class _Condition:
    """As much of a condition as QueuePool's queue uses."""

    def __init__(self, simulation: Simulation, lock: _RLock | None) -> None:
        self._simulation = simulation
        self._lock = lock or _RLock(simulation)
        self._sleepers: list[list[bool]] = []

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        token = [False]
        self._sleepers.append(token)
        self._lock.release()
        try:
            self._simulation.block(lambda: token[0], timeout, is_park=True)
        finally:
            if token in self._sleepers:
                self._sleepers.remove(token)
            self._lock.acquire()
        return token[0]

    def notify(self, number: int = 1) -> None:
        for _ in range(min(number, len(self._sleepers))):
            self._sleepers.pop(0)[0] = True


class Inbox(deque[Any]):
    """A driver's inbox in which a return may be overtaken before and after it lies there."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation

    def append(self, item: Any) -> None:
        self._simulation.point()
        super().append(item)
        self._simulation.point()


# -- points between statements ---------------------------------------------------------------

_POINT = "_point_of_simulation"


class _AddPoints(ast.NodeTransformer):
    """Put a call before each statement of each function."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        for inner in ast.walk(node):
            for block in ("body", "orelse", "finalbody"):
                statements = getattr(inner, block, None)
                if isinstance(statements, list) and not isinstance(inner, ast.ClassDef):
                    setattr(inner, block, list(self._with_points(statements)))
        return node

    def _with_points(self, statements: list[ast.stmt]) -> Iterator[ast.stmt]:
        for statement in statements:
            if not _is_point(statement) and not getattr(statement, "has_point", False):
                statement.has_point = True  # type: ignore[attr-defined]
                call = ast.Expr(ast.Call(ast.Name(_POINT, ast.Load()), [], []))
                yield ast.fix_missing_locations(ast.copy_location(call, statement))
            yield statement


def _is_point(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Call)
        and isinstance(statement.value.func, ast.Name)
        and statement.value.func.id == _POINT
    )


def _codes(code: CodeType, path: str = "") -> Iterator[tuple[str, CodeType]]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            name = f"{path}{constant.co_name}"
            yield name, constant
            yield from _codes(constant, f"{name}.")


def _functions(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    for owner in (module, *vars(module).values()):
        if owner is not module and getattr(owner, "__module__", None) != module.__name__:
            continue
        for value in list(vars(owner).values()) if hasattr(owner, "__dict__") else ():
            function = value.fget if isinstance(value, property) else value
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                yield function.__qualname__, function


_with_points: dict[str, dict[str, CodeType]] = {}


@contextlib.contextmanager
def statement_by_statement(simulation: Simulation, modules: Sequence[ModuleType]) -> Iterator[None]:
    """Let tasks overtake each other before every statement of these modules."""
    before: list[tuple[FunctionType, CodeType]] = []
    try:
        for module in modules:
            name = module.__name__
            if name not in _with_points:
                tree = _AddPoints().visit(ast.parse(inspect.getsource(module)))
                compiled = compile(tree, str(module.__file__), "exec", dont_inherit=True)
                _with_points[name] = dict(_codes(compiled))
            setattr(module, _POINT, simulation.point)
            for path, function in _functions(module):
                code = _with_points[name].get(path)
                if code is not None:
                    before.append((function, function.__code__))
                    function.__code__ = code
        yield
    finally:
        for function, code in before:
            function.__code__ = code
        for module in modules:
            if hasattr(module, _POINT):
                delattr(module, _POINT)
