"""Every setting of a pool once: its default, its unit and its check."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from .errors import ArgumentError

__all__ = [
    "CONNECTION_STATES",
    "OnDeadlock",
    "OnOutage",
    "PoolConfig",
    "SessionReset",
    "Track",
    "Upkeep",
]

Upkeep = Literal["thread", "inline"]
OnDeadlock = Literal["warn", "raise"]
OnOutage = Literal["raise", "wait"]
SessionReset = Literal["rollback", "clean", "discard_all", "custom"]
Track = Literal["label", "caller", "stack"]

CONNECTION_STATES = ("08", "57P01", "57P02", "57P03", "57P05", "25P03")
"""SQLSTATEs after which a connection is gone or about to go; two characters are a whole class."""
_READ_ONLY = "25006"

_TRUE = {"1", "true", "yes", "on", "y", "t"}
_FALSE = {"0", "false", "no", "off", "n", "f"}
_NONE = {"none", "null", ""}


@dataclass(frozen=True)
class PoolConfig:
    """The settings of one pool.  Seconds everywhere; ``None`` means "no limit"."""

    name: str = "pool"
    min_size: int = 0
    max_size: int | None = 15
    """Most connections open, being opened and being closed at any instant; None is unlimited."""
    pool_size: int = 5
    """What ``size()`` answers, for tools that know QueuePool; it limits nothing."""
    timeout: float | None = 30.0
    idle_timeout: float | None = 600.0
    max_lifetime: float | None = 1800.0
    max_uses: int | None = None
    connect_timeout: float = 10.0
    max_waiting: int | None = None
    max_connecting: int = 3
    use_lifo: bool = True
    pre_ping: bool = False
    ping_after: float = 1.0
    ping_timeout: float = 5.0
    keepalive: float = 120.0
    on_outage: OnOutage = "raise"
    evict_on: tuple[str, ...] = CONNECTION_STATES
    """SQLSTATEs of errors after which a connection is not used again."""
    session_reset: SessionReset = "rollback"
    hold_warning: float = 60.0
    on_deadlock: OnDeadlock = "warn"
    upkeep: Upkeep = "thread"
    track: Track = "caller"
    collect_leaks: bool = False

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> PoolConfig:
        """Return the settings that ``create_engine`` arguments mean.

        :param arguments: the arguments that were given; those that are ``UNSET`` were not.
        :raises sqlalchemy.exc.ArgumentError: naming setting, value and what is allowed.
        """
        given = {name: value for name, value in arguments.items() if value is not UNSET}
        _reconcile_sizes(given)
        _reconcile_lifetime(given)
        _reconcile_states(given)
        known = {field.name for field in fields(cls)}
        checked = {
            name: _CHECKS[name](name, value) if name in _CHECKS else value
            for name, value in given.items()
            if name in known
        }
        config = cls(**checked)
        config.check_sizes()
        return config

    def resized(self, min_size: Any, max_size: Any) -> PoolConfig:
        """Return these settings with other limits; ``UNSET`` keeps the present one."""
        new_min = self.min_size if min_size is UNSET else _count("min_size", min_size)
        new_max = self.max_size if max_size is UNSET else _max_size("max_size", max_size)
        pool_size = self.pool_size if new_max is None else min(self.pool_size, new_max)
        config = replace(self, min_size=new_min, max_size=new_max, pool_size=pool_size)
        config.check_sizes()
        return config

    def check_sizes(self) -> None:
        """Refuse a ``min_size`` that the limit could never hold."""
        if self.max_size is not None and self.min_size > self.max_size:
            raise ArgumentError(
                f"min_size={self.min_size} is more than the limit of {self.max_size} connections "
                "(max_size, or pool_size + max_overflow); lower min_size or raise the limit"
            )
        if self.min_size and self.max_lifetime == 0:
            raise ArgumentError(
                f"min_size={self.min_size} cannot be kept open with max_lifetime=0 "
                "(pool_recycle=0), which is one use for each connection; leave min_size out, or "
                "give max_uses=1 and a lifetime"
            )

    def public(self) -> dict[str, Any]:
        """Return the settings as a snapshot shows them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class _Unset:
    """The value of an argument that was not given, where ``None`` has a meaning of its own."""

    def __repr__(self) -> str:
        return "UNSET"

    def __bool__(self) -> bool:
        return False


UNSET: Any = _Unset()


def _reconcile_sizes(given: dict[str, Any]) -> None:
    """Turn QueuePool's ``pool_size`` and ``max_overflow`` into the one limit ``max_size``."""
    pool_size = given.get("pool_size")
    max_overflow = given.pop("max_overflow", None)
    if "max_size" in given:
        if pool_size is not None or max_overflow is not None:
            raise ArgumentError(
                f"max_size={given['max_size']!r} was given together with "
                f"pool_size={pool_size!r}, max_overflow={max_overflow!r}; "
                "give either max_size, or pool_size and max_overflow"
            )
        limit = _max_size("max_size", given["max_size"])
        given["pool_size"] = limit or 0
        return
    size = 5 if pool_size is None else _count("pool_size", pool_size)
    overflow = 10 if max_overflow is None else _integer("max_overflow", max_overflow)
    if overflow < -1 and size:
        raise _wrong("max_overflow", max_overflow, "an integer of at least 0, or -1 for no limit")
    given["pool_size"] = size
    given["max_size"] = None if size == 0 or overflow == -1 else size + overflow


def _reconcile_lifetime(given: dict[str, Any]) -> None:
    """Turn SQLAlchemy's ``pool_recycle`` into ``max_lifetime``; -1 means no limit there."""
    recycle = given.pop("recycle", None)
    if recycle is None:
        return
    seconds = _number("pool_recycle", recycle)
    if seconds < 0 and seconds != -1:
        raise _wrong("pool_recycle", recycle, "seconds, or -1 for no limit")
    lifetime = None if seconds == -1 else seconds
    if "max_lifetime" not in given:
        given["max_lifetime"] = lifetime
    elif _seconds_or_none("max_lifetime", given["max_lifetime"]) != lifetime:
        raise ArgumentError(
            f"max_lifetime={given['max_lifetime']!r} and pool_recycle={recycle!r} contradict each "
            "other; they are two names of one setting, give one of them"
        )


def _reconcile_states(given: dict[str, Any]) -> None:
    """Turn ``writable`` into one more SQLSTATE of ``evict_on``."""
    is_writable = _flag("writable", given.pop("writable", False))
    states = given.pop("evict_on", None)
    if states is None:
        states = CONNECTION_STATES
    elif isinstance(states, str):
        states = tuple(filter(None, (part.strip() for part in states.split(","))))
    allowed = "SQLSTATEs of five characters, or classes of two"
    if not isinstance(states, Iterable):
        raise _wrong("evict_on", states, allowed)
    chosen = tuple(dict.fromkeys(states))
    for state in chosen:
        if not isinstance(state, str) or len(state) not in (2, 5) or not state.isalnum():
            raise _wrong("evict_on", states, allowed)
    if is_writable and _READ_ONLY not in chosen:
        chosen += (_READ_ONLY,)
    given["evict_on"] = tuple(state.upper() for state in chosen)


def _session_reset(name: str, value: Any) -> SessionReset:
    if callable(value):
        return "custom"
    chosen: SessionReset = _one_of(name, value, ("rollback", "clean", "discard_all"))
    return chosen


def _wrong(name: str, value: object, allowed: str) -> ArgumentError:
    return ArgumentError(f"{name}={value!r} is not possible; it must be {allowed}")


def _is_none(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in _NONE)


def _number(name: str, value: Any) -> float:
    # engine_from_config hands over strings; True is a number to Python but not to a reader
    if isinstance(value, bool):
        raise _wrong(name, value, "a number of seconds")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _wrong(name, value, "a number of seconds") from None
    if math.isnan(number) or math.isinf(number):
        raise _wrong(name, value, "a finite number of seconds")
    return number


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise _wrong(name, value, "an integer")
    try:
        return int(value)
    except (TypeError, ValueError):
        raise _wrong(name, value, "an integer") from None


def _count(name: str, value: Any) -> int:
    number = _integer(name, value)
    if number < 0:
        raise _wrong(name, value, "an integer of at least 0")
    return number


def _positive(name: str, value: Any) -> int:
    number = _integer(name, value)
    if number < 1:
        raise _wrong(name, value, "an integer of at least 1")
    return number


def _positive_or_none(name: str, value: Any) -> int | None:
    return None if _is_none(value) else _positive(name, value)


def _count_or_none(name: str, value: Any) -> int | None:
    return None if _is_none(value) else _count(name, value)


def _max_size(name: str, value: Any) -> int | None:
    return None if _is_none(value) else _positive(name, value)


def _seconds(name: str, value: Any) -> float:
    number = _number(name, value)
    if number < 0:
        raise _wrong(name, value, "seconds of at least 0")
    return number


def _seconds_or_none(name: str, value: Any) -> float | None:
    return None if _is_none(value) else _seconds(name, value)


def _positive_seconds(name: str, value: Any) -> float:
    number = _number(name, value)
    if number <= 0:
        raise _wrong(name, value, "seconds above 0")
    return number


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _TRUE | _FALSE:
            return text in _TRUE
        raise _wrong(name, value, "true or false")
    return bool(value)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise _wrong(name, value, "one of " + ", ".join(repr(item) for item in allowed))
    return value


_CHECKS: dict[str, Any] = {
    "min_size": _count,
    "max_size": _max_size,
    "timeout": lambda _, value: _seconds_or_none("pool_timeout", value),
    "idle_timeout": _seconds_or_none,
    "max_lifetime": _seconds_or_none,
    "max_uses": _positive_or_none,
    "connect_timeout": _positive_seconds,
    "max_waiting": _count_or_none,
    "max_connecting": _positive,
    "use_lifo": lambda _, value: _flag("pool_use_lifo", value),
    "pre_ping": lambda _, value: _flag("pool_pre_ping", value),
    "ping_after": _seconds,
    "ping_timeout": _positive_seconds,
    "keepalive": _seconds,
    "session_reset": _session_reset,
    "hold_warning": _seconds,
    "on_outage": lambda name, value: _one_of(name, value, get_args(OnOutage)),
    "on_deadlock": lambda name, value: _one_of(name, value, get_args(OnDeadlock)),
    "collect_leaks": _flag,
    "upkeep": lambda name, value: _one_of(name, value, get_args(Upkeep)),
    "track": lambda name, value: _one_of(name, value, get_args(Track)),
}
