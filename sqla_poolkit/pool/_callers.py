"""Who asks for a connection: the first frame outside SQLAlchemy and this package."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable
from functools import lru_cache
from types import CodeType, FrameType

import sqlalchemy

from ..core.holders import current_label

__all__ = ["OWN_FOLDER", "describe_holder", "holder_finder", "is_of_application", "stack_behind"]

_SQLALCHEMY, OWN_FOLDER = (
    os.path.dirname(os.path.abspath(path)) + os.sep
    for path in (sqlalchemy.__file__, os.path.dirname(os.path.abspath(__file__)))
)
_MOST_FRAMES = 20
_MOST_CODES = 20_000  # a notebook or a rule engine makes ever new ones

# connect -> _ConnectionRecord.checkout -> _do_get -> finder
_FRAMES_OF_A_CHECKOUT = 4
_FRAMES_IN_A_GREENLET = 3  # which may begin with connect
_caller = sys._getframe  # noqa: SLF001 - inspect.currentframe would have to climb frame by frame

Holder = Hashable
"""The label alone; or (label, id of a code object, instruction) of the caller; or (label, (id,
instruction) of each frame).  Lines are worked out when a snapshot is read."""

# keyed by id: to hash a code object takes longer than to walk the whole stack
_application: dict[int, bool] = {}
"""Whether a code object, by id, is of the application; False for SQLAlchemy's and ours."""
_codes: dict[int, CodeType] = {}
"""Keeps them alive, so that their ids stay their own."""


def holder_finder(track: str, *, is_asyncio: bool = False) -> Callable[[], Holder]:
    """Return the function that remembers who asks the way ``track`` says.

    It is to be called from ``_do_get``; with ``is_asyncio`` inside a greenlet of SQLAlchemy's.
    """
    if track == "label":
        return current_label.get
    if is_asyncio:
        return _asyncio_stack if track == "stack" else _asyncio_place
    return _whole_stack if track == "stack" else _first_place


def is_of_application(code: CodeType) -> bool:
    """Tell whether code is neither SQLAlchemy's nor this package's."""
    own = (_SQLALCHEMY, OWN_FOLDER, "<string>", "<sqlalchemy generated")
    return not code.co_filename.startswith(own)


def _learn(code: CodeType) -> bool:
    is_ours = is_of_application(code)
    if len(_codes) < _MOST_CODES:
        # of those beyond the place is not told: none may be kept alive for it
        key = id(code)
        _codes[key] = code
        _application[key] = is_ours
    return is_ours


def _application_frame(frame: FrameType | None) -> FrameType | None:
    """Return the first frame of the application, from this one outwards."""
    application = _application
    while frame is not None:
        code = frame.f_code
        key = id(code)
        if application[key] if key in application else _learn(code):
            return frame
        frame = frame.f_back
    return None


def _first_frame(depth: int) -> FrameType:
    try:
        return _caller(depth + 1)
    except ValueError:
        # the thread or greenlet begins with the pool's own method
        return _caller(1)


def _first_place() -> Holder:
    return _place(_application_frame(_first_frame(_FRAMES_OF_A_CHECKOUT)))


def _asyncio_place() -> Holder:
    return _place(
        _application_frame(_first_frame(_FRAMES_IN_A_GREENLET)) or _frame_behind_greenlet()
    )


def _whole_stack() -> Holder:
    return _stack(_application_frame(_first_frame(_FRAMES_OF_A_CHECKOUT)))


def _asyncio_stack() -> Holder:
    return _stack(
        _application_frame(_first_frame(_FRAMES_IN_A_GREENLET)) or _frame_behind_greenlet()
    )


def _frame_behind_greenlet() -> FrameType | None:
    """Return the first frame of the application among those that wait for this greenlet."""
    greenlet = sys.modules.get("greenlet")
    parent = None if greenlet is None else greenlet.getcurrent().parent
    while parent is not None:
        frame = _application_frame(parent.gr_frame)
        if frame is not None:
            return frame
        parent = parent.parent
    return None


def _place(frame: FrameType | None) -> Holder:
    if frame is None:
        return (current_label.get(), 0, 0)
    return (current_label.get(), id(frame.f_code), frame.f_lasti)


def _stack(frame: FrameType | None) -> Holder:
    places: list[tuple[int, int]] = []
    while frame is not None and len(places) < _MOST_FRAMES:
        code = frame.f_code
        if id(code) not in _application:
            _learn(code)
        places.append((id(code), frame.f_lasti))
        frame = frame.f_back
    return (current_label.get(), tuple(places))


def stack_behind(frame: FrameType | None) -> Holder:
    """Return who called from this frame, for listeners, whose depth is SQLAlchemy's to choose."""
    return _stack(_application_frame(frame) or _frame_behind_greenlet())


def describe_holder(holder: Holder) -> tuple[str | None, str | None]:
    """Return a holder's label, and its caller as ``file:line function`` (a stack: one per line)."""
    if not isinstance(holder, tuple):
        return (None if holder is None else str(holder)), None
    if len(holder) == 3:
        label, key, instruction = holder
        return label, _describe_place(key, instruction)
    label, places = holder
    return label, "\n".join(_describe_place(*place) or "" for place in places) or None


@lru_cache(maxsize=4096)
def _describe_place(key: int, instruction: int) -> str | None:
    code = _codes.get(key)
    if code is None:
        return None
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= instruction < end and number is not None:
            line = number
    return f"{code.co_filename}:{line} {code.co_name}"
