"""Who asks for a connection: the first frame outside SQLAlchemy and this package."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable
from types import CodeType, FrameType

import sqlalchemy

__all__ = ["caller_finder", "describe_caller", "describe_stack"]

_OWN_FOLDERS = tuple(
    os.path.dirname(os.path.abspath(path)) + os.sep
    for path in (sqlalchemy.__file__, os.path.dirname(os.path.abspath(__file__)))
)
_MOST_FRAMES = 20

Place = tuple[CodeType, int]
"""A code object and the instruction it has reached; the line is worked out when it is read."""

_is_own: dict[CodeType, bool] = {}


def caller_finder(track: str) -> Callable[[], Hashable]:
    """Return the function that remembers a caller the way ``track`` asks for."""
    return {"label": _nobody, "caller": _first_frame, "stack": _whole_stack}[track]


def _nobody() -> Hashable:
    return None


def _belongs_to_us(code: CodeType) -> bool:
    own = _is_own[code] = code.co_filename.startswith(_OWN_FOLDERS) or code.co_filename in (
        "<string>",
        "<frozen importlib._bootstrap>",
    )
    return own


def _application_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(3)
    is_own = _is_own
    while frame is not None:
        code = frame.f_code
        own = is_own.get(code)
        if own is None:
            own = _belongs_to_us(code)
        if not own:
            return frame
        frame = frame.f_back
    return None


def _first_frame() -> Hashable:
    frame: FrameType | None = sys._getframe(2)
    is_own = _is_own
    while frame is not None:
        code = frame.f_code
        own = is_own.get(code)
        if own is None:
            own = _belongs_to_us(code)
        if not own:
            return (code, frame.f_lasti)
        frame = frame.f_back
    return None


def _whole_stack() -> Hashable:
    frame = _application_frame()
    places: list[Place] = []
    while frame is not None and len(places) < _MOST_FRAMES:
        places.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(places) or None


def _describe_place(place: Place) -> str:
    code, instruction = place
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= instruction < end and number is not None:
            line = number
    return f"{code.co_filename}:{line} {code.co_name}"


def describe_caller(caller: Hashable) -> str:
    """Return ``file:line function`` of what a finder returned; of a stack, its innermost frame."""
    if not isinstance(caller, tuple) or not caller:
        return str(caller)
    return _describe_place(caller if isinstance(caller[0], CodeType) else caller[0])


def describe_stack(caller: Hashable) -> list[str]:
    """Return every remembered frame as ``file:line function``, innermost first."""
    if not isinstance(caller, tuple) or not caller:
        return []
    places = (caller,) if isinstance(caller[0], CodeType) else caller
    return [_describe_place(place) for place in places]
