"""In whose hands connections are: what can be reached from the stacks of threads and tasks.

Who took a connection says little of who has it now: it may have been handed on, and a thread that
took one for another thread may well wait for the next (FastAPI's dependencies do so).  So this
looks into the local variables of every stack, and on from there as the garbage collector does.  It
takes milliseconds, so it is for a thread of its own and for rare moments; nothing is noted at a
checkout.  What has no name on the stack of a thread, as in a ``with`` without ``as``, is not found.
"""

from __future__ import annotations

import asyncio
import dis
import gc
import inspect
import sys
import sysconfig
import threading
import weakref
from _thread import get_ident
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import dropwhile
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from sqlalchemy.pool import Pool

from ..core.slots import Slot
from . import _sqlalchemy
from ._callers import OWN_FOLDER, is_of_application

__all__ = ["TooMuch", "find_entangled", "find_holders", "present_task"]

_MOST_OBJECTS = 300_000  # more would take a second, and would keep other threads from running
_MOST_NEAR = 100_000  # a holder has its connection at hand
_ASK_EACH = 1_000  # objects, whether the search is still wanted
_FRAME = 4  # so many references farther away is what the frame outside of another one has
_LIBRARIES = tuple(
    path for name, path in sysconfig.get_paths().items() if name in ("stdlib", "purelib", "platlib")
)
_READS_LOCALS = {"locals", "vars", "eval", "exec", "dir", "f_locals"}
_CONTAINERS = (dict, list, set, frozenset, tuple)

# They lead to all that there is, not to what somebody holds.
_ENDS = (CodeType, Pool, weakref.ReferenceType)
# They lead to what others hold: only they would count as holders on these ways.
_BORDERS = (type, threading.Thread, asyncio.Future, asyncio.AbstractEventLoop)
_END_MODULES = (
    *("sqlalchemy.sql.", "sqlalchemy.event.", "sqlalchemy.dialects.", "sqlalchemy.engine.url"),
    *("sqlalchemy.orm.mapper", "sqlalchemy.orm.decl_api", "sqlalchemy.orm.instrumentation"),
)


@dataclass(frozen=True, slots=True)
class _Stack:
    """A thread or a task, and what its local variables refer to."""

    owner: Hashable
    """The number of the thread, or what stands for the task, or the loop of what it will call."""
    name: str
    frames: tuple[FrameType, ...]
    """The innermost first."""
    values: tuple[tuple[int, object], ...]
    """How far away each is, and what it is."""
    coroutine: object = None
    """What the task runs."""

    def place(self) -> str:
        """Return who this is and where it is: the innermost place outside of libraries."""
        known = [frame for frame in self.frames if is_of_application(frame.f_code)]
        own = [frame for frame in known if _is_no_library(frame.f_code.co_filename)]
        for frame in own or known:
            return (
                f"{self.name} at {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
            )
        return self.name


class TooMuch(Exception):
    """There are too many objects to look through."""


def find_holders(wanted: Collection[Slot], is_moot: Callable[[], bool]) -> dict[Slot, str]:
    """Return where those are just now who have these connections, as far as they are found.

    :param is_moot: asked now and then whether nobody wants to know any more.
    """
    stacks = {stack.owner: stack for stack in _all_stacks(lambda owner, _: owner)}
    found: dict[Slot, Hashable] = {}
    with suppress(TooMuch):
        _reach(found, stacks.values(), stacks.values(), wanted, len(wanted), _MOST_NEAR, is_moot)
    return {slot: stacks[owner].place() for slot, owner in found.items()}


def find_entangled(
    waiting: Collection[Hashable], wanted: Collection[Slot], is_moot: Callable[[], bool]
) -> dict[Slot, tuple[Hashable, str]]:
    """Return who of those that wait has which connection, and where he is; nothing if not all have.

    A connection that somebody else can reach as well may be returned by him, so then nobody is
    entangled.

    :param waiting: the threads and tasks that cannot go on.
    :param wanted: every connection there is.
    :param is_moot: asked now and then whether nobody wants to know any more.
    :raises TooMuch: if it cannot be found out.
    """

    def waits_as(owner: Hashable, thread: int | None) -> Hashable:
        # a task cannot go on either while a call in the thread of its loop waits
        return thread if thread in waiting else owner

    stacks = list(_all_stacks(waits_as))
    those = [stack for stack in stacks if stack.owner in waiting]
    found: dict[Slot, Hashable] = {}
    # most searches end here: others hold something, and wait for nothing but their database
    _reach(found, those, stacks, wanted, len(wanted), _MOST_NEAR, is_moot)
    if len(found) < len(wanted):
        return {}
    others = [stack for stack in stacks if stack.owner not in waiting]
    reached: dict[Slot, Hashable] = {}
    _reach(reached, others, stacks, wanted, 1, _MOST_OBJECTS, is_moot, crosses_borders=True)
    if reached or is_moot():
        return {}
    # of a loop that is kept from going on the thread comes first, where the call is that waits
    places = {stack.owner: stack.place() for stack in reversed(those)}
    return {slot: (owner, places[owner]) for slot, owner in found.items()}


def present_task() -> Hashable:
    """Return what stands for the present task, without keeping it alive."""
    return _name_for(asyncio.current_task())


def _name_for(task: object) -> Hashable:
    return ("task", id(task))


# -- stacks ------------------------------------------------------------------------------------


def _all_stacks(owner_of: Callable[[Hashable, int | None], Hashable]) -> Iterator[_Stack]:
    """Return the stacks of all threads, then of the tasks of their loops.

    :param owner_of: whom to name as owner of a task, or of a loop, that belongs to a thread.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    loops: dict[asyncio.AbstractEventLoop, int] = {}
    for ident, frames in _frames_by_thread().items():
        values: tuple[tuple[int, Any], ...] = tuple(
            (_FRAME * distance, value)
            for distance, frame in enumerate(frames)
            for value in _variables(frame)
        )
        for _, value in values:
            if issubclass(type(value), asyncio.Future):
                loops.setdefault(value.get_loop(), ident)
            elif issubclass(type(value), asyncio.AbstractEventLoop):
                loops.setdefault(value, ident)
        yield _Stack(ident, f"thread {names.get(ident, ident)}", frames, values)
    for loop, ident in loops.items():
        about_to = tuple((0, each) for each in gc.get_referents(loop) if _leads_on(each))
        yield _Stack(owner_of(loop, ident), "an event loop", (), about_to)
        for task in asyncio.all_tasks(loop):
            coroutine = task.get_coro()
            frames = tuple(reversed(list(_frames_of_coroutine(coroutine))))
            own = [each for each in gc.get_referents(coroutine) if _leads_on(each)]
            if sys.version_info < (3, 11):
                # there a coroutine leads only to its frame, and that not to what it awaits
                own = [value for frame in frames for value in _variables(frame)]
            if sys.version_info >= (3, 12):
                own += task.get_context().values()
            name = f"task {task.get_name()}"
            owner = owner_of(_name_for(task), ident)
            yield _Stack(owner, name, frames, tuple((0, each) for each in own), coroutine)


def _frames_by_thread() -> dict[int, tuple[FrameType, ...]]:
    """Return the frames of each thread, the innermost first; but none of this search.

    Those would keep themselves alive, and so all that is found, until the next garbage collection.
    """
    innermost = sys._current_frames()  # noqa: SLF001 - as documented
    here = get_ident()
    del innermost[here]
    frames = {ident: tuple(_frames(frame)) for ident, frame in innermost.items()}
    frames[here] = tuple(dropwhile(_is_own, _frames(sys._getframe())))  # noqa: SLF001
    return frames


def _is_own(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(OWN_FOLDER)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _frames_of_coroutine(coroutine: Any) -> Iterator[FrameType]:
    """Return the frames of what a task runs, from the outside inwards."""
    while coroutine is not None:
        for frame_name, next_name in (
            ("cr_frame", "cr_await"),
            ("gi_frame", "gi_yieldfrom"),
            ("ag_frame", "ag_await"),
        ):
            if hasattr(type(coroutine), frame_name):
                frame = getattr(coroutine, frame_name)
                coroutine = getattr(coroutine, next_name)
                break
        else:
            return
        if frame is not None:
            yield frame


def _variables(frame: FrameType) -> list[object]:
    """Return what a frame's own variables refer to, and the global ones that it names."""
    code = frame.f_code
    if _is_own(frame):
        return []  # that of the pool itself, which knows all connections
    outer = frame.f_globals
    values = [outer[name] for name in code.co_names if name in outer]
    variables = frame.f_locals
    values += variables.values()
    is_a_copy = sys.version_info < (3, 13) and code.co_flags & inspect.CO_OPTIMIZED
    is_ours = _READS_LOCALS.isdisjoint(code.co_names) and not _may_be_traced(frame)
    if is_a_copy and is_ours:
        # the frame keeps the copy, and so would keep alive what the variables let go; where the
        # program or a debugger has asked for it as well that is so anyway, and it is theirs
        variables.clear()
    return values


def _may_be_traced(frame: FrameType) -> bool:
    """Tell whether a trace function may look at a frame now; its copy is written back then."""
    if frame.f_trace is not None or frame.f_lasti < 0:
        return True
    name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    return name == "RESUME" or name.startswith("YIELD")


# -- what they refer to ------------------------------------------------------------------------


def _reach(
    found: dict[Slot, Hashable],
    stacks: Collection[_Stack],
    known: Iterable[_Stack],
    wanted: Collection[Slot],
    most: int,
    most_objects: int,
    is_moot: Callable[[], bool],
    *,
    crosses_borders: bool = False,
) -> None:
    """Look for connections, the nearest first, until so many are found, or nobody cares any more.

    :param found: gets whose stack each was reached from first.
    :param stacks: where to look from.
    :param known: all there are: what a task runs is its own, whoever refers to it.
    :param crosses_borders: also look at what is not held by a stack but within its reach.
    :raises TooMuch: if there are more objects than that.
    """
    todo = _Todo()
    for stack in stacks:
        for distance, value in stack.values:
            todo.add(distance, (value,), stack.owner)
        if crosses_borders:
            todo.add(0, _globals_of(stack), stack.owner)
    seen = {id(stack.coroutine) for stack in known if stack.coroutine is not None}
    for distance, value, owner in todo.nearest_first(is_moot):
        if id(value) in seen:
            continue
        seen.add(id(value))
        slot = _sqlalchemy.slot_behind(value)
        if slot is not None:
            if slot in wanted:
                found.setdefault(slot, owner)
            if len(found) >= most:
                return
            continue
        size = len(value) if type(value) in _CONTAINERS else 0
        if len(seen) + todo.size + size > most_objects:
            raise TooMuch(
                "whether callers wait for each other cannot be found out: there are more than "
                f"{most_objects:,} objects within reach of the threads and tasks"
            )
        referents = _referents(value, crosses_borders=crosses_borders)
        todo.add(distance + 1, filter(_leads_on, referents), owner)


class _Todo:
    """What is still to be looked at, by its distance."""

    def __init__(self) -> None:
        self.size = 0
        self._at: defaultdict[int, deque[tuple[Any, Hashable]]] = defaultdict(deque)

    def add(self, distance: int, values: Iterable[object], owner: Hashable) -> None:
        """Look at these later."""
        there = self._at[distance]
        before = len(there)
        there.extend((value, owner) for value in values)
        self.size += len(there) - before

    def nearest_first(self, is_moot: Callable[[], bool]) -> Iterator[tuple[int, Any, Hashable]]:
        """Yield what was added, and is added meanwhile farther away, until nothing is left."""
        distance = looked_at = 0
        while self.size:
            there = self._at.pop(distance, deque())
            while there:
                looked_at += 1
                if looked_at % _ASK_EACH == 0 and is_moot():
                    return
                value, owner = there.popleft()
                self.size -= 1
                yield distance, value, owner
            distance += 1


def _globals_of(stack: _Stack) -> Iterator[object]:
    """Return what the modules of a stack's functions have, but those of libraries."""
    for frame in stack.frames:
        if is_of_application(frame.f_code) and _is_no_library(frame.f_code.co_filename):
            yield frame.f_globals


def _is_no_library(path: object) -> bool:
    return isinstance(path, str) and not path.startswith((*_LIBRARIES, "<frozen"))


def _referents(value: Any, *, crosses_borders: bool) -> Iterable[object]:
    """Return what an object refers to that is its own."""
    # by its type: isinstance would ask the object, and so run code of the application's proxies
    kind = type(value)
    if kind is FunctionType:
        # but not to the global variables, which are everybody's
        return (*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__)
    if kind is FrameType:
        return _variables(value)
    if issubclass(kind, ModuleType):
        names = object.__getattribute__(value, "__dict__")
        is_near = crosses_borders and _is_no_library(names.get("__file__"))
        return (names,) if is_near else ()
    if issubclass(kind, _ENDS) or str(kind.__module__).startswith(_END_MODULES):
        return ()
    if issubclass(kind, _BORDERS) and not crosses_borders:
        return ()
    if issubclass(kind, type) and not _is_class_of_application(value):
        return ()
    if issubclass(kind, _greenlet_type()):
        return [each for frame in _frames(value.gr_frame) for each in _variables(frame)]
    return gc.get_referents(value)


def _is_class_of_application(kind: type) -> bool:
    module = sys.modules.get(str(type.__getattribute__(kind, "__module__")))
    return module is not None and _is_no_library(getattr(module, "__file__", None))


def _leads_on(value: object) -> bool:
    """Tell whether something refers to others, as far as the garbage collector knows."""
    # which leaves greenlets alone that are under way
    return gc.is_tracked(value) or issubclass(type(value), _greenlet_type())


def _greenlet_type() -> type | tuple[()]:
    greenlet: Any = sys.modules.get("greenlet")
    return () if greenlet is None else greenlet.greenlet
