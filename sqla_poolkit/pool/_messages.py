"""The sentences of the pool's errors: what happened, the state, what to do next."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

from ..config import PoolConfig
from ..core.events import DeadlockFound, PoolEvent
from ..core.snapshot import PoolSnapshot, SlotReading
from ..errors import PoolDeadlock, PoolOverloaded, PoolTimeout, PoolUnavailable

__all__ = [
    "deadlock_error",
    "describe_error",
    "not_ready_error",
    "overloaded_error",
    "timeout_error",
    "unavailable_error",
]

_LONGEST_HOLDERS = 3
# a quote inside of a word is an apostrophe, or part of what is quoted
_QUOTED = re.compile(r"(?<!\w)([\"'`])(.*?)(?:\1(?!\w)|$)")


def describe_error(
    error: BaseException, known: Container[str], *, is_of_driver: bool = True
) -> str:
    """Return an error of a connect in a line that may be shown to anybody.

    What a driver quotes may be a part of a password, so only words that are ``known`` stay.  What
    an application says, whose token could not be fetched, may be anything, and is left out.
    """
    name = type(error).__name__
    if not is_of_driver:
        return f"{name} (raised by the application; its text is not shown, as it may hold a secret)"
    text = str(error)
    if len(error.args) == 2 and isinstance(error.args[0], int) and text.startswith("("):
        text = "{1} ({0})".format(*error.args)  # MySQL's drivers have a number and a sentence
    text = text.strip().partition("\n")[0]

    def shown(match: re.Match[str]) -> str:
        quote, word = match.groups()
        return f"{quote}{word if word in known else '...'}{quote}"

    text = _QUOTED.sub(shown, text)
    return f"{name}: {text}" if text else name


def timeout_error(
    snapshot: PoolSnapshot,
    events: tuple[PoolEvent, ...],
    waited: float,
    last_connect_error: str | None,
    deadlock: DeadlockFound | None = None,
) -> PoolTimeout:
    """Return the error of a caller who waited in vain."""
    timeout = snapshot.settings["timeout"]
    lines = [
        f"no connection from pool {snapshot.name!r} within {waited:.2f} s "  # noqa: ISC004
        f"(pool_timeout={timeout}): {_state(snapshot)}."
    ]
    held = sorted(
        (slot for slot in snapshot.slots if slot.held_seconds is not None),
        key=lambda slot: slot.held_seconds or 0.0,
        reverse=True,
    )
    if deadlock is not None:
        lines += _deadlock(deadlock)
    elif held:
        shown = "; ".join(_holder(slot) for slot in held[:_LONGEST_HOLDERS])
        lines.append(f"Held longest: {shown}.")
    if last_connect_error is not None and snapshot.connect_failures:
        lines.append(f"The last connection attempt that failed: {last_connect_error}.")
    lines.append(_advice(snapshot) if deadlock is None else _DEADLOCK_ADVICE)
    return PoolTimeout("\n".join(lines), snapshot, events)


def deadlock_error(
    snapshot: PoolSnapshot, events: tuple[PoolEvent, ...], deadlock: DeadlockFound
) -> PoolDeadlock:
    """Return the error of a caller who is turned away because he would wait for himself."""
    what = (
        f"pool {snapshot.name!r} turned this caller away at once: he would have waited for himself "
        f'(on_deadlock="raise"): {_state(snapshot)}.'
    )
    lines = [what, *_deadlock(deadlock), _DEADLOCK_ADVICE]
    return PoolDeadlock("\n".join(lines), snapshot, events)


def _deadlock(found: DeadlockFound) -> list[str]:
    more = found.checked_out - len(found.holds)
    return [
        "It looks like a deadlock: each connection is held by a caller who waits for another one.",
        *(f"* taken by {hold}" for hold in found.holds),
        *([f"* and {more} more"] if more > 0 else []),
    ]


_DEADLOCK_ADVICE = (
    "What to do: let each caller do with one connection: hand it on to what he calls, or return it "
    "before he asks for the next. Where he needs two at once, max_size has to be larger than the "
    "number of callers who do so at the same time."
)


def _state(snapshot: PoolSnapshot) -> str:
    limit = "no limit" if snapshot.is_unlimited else f"max_size={snapshot.max_size}"
    counts = [
        f"{snapshot.checked_out} checked out",
        f"{snapshot.idle} idle",
        f"{snapshot.connecting} connecting",
    ]
    if snapshot.checking:
        counts.append(f"{snapshot.checking} being pinged")
    if snapshot.closing:
        counts.append(f"{snapshot.closing} closing")
    counts.append(f"{snapshot.waiting} still waiting")
    phase = "" if snapshot.phase == "open" else f"the pool is {snapshot.phase}, "
    return f"{phase}{', '.join(counts)}, {limit}"


def _holder(slot: SlotReading) -> str:
    place = slot.caller and slot.caller.partition("\n")[0]
    who = slot.label or place or "an unnamed caller"
    if slot.label and place:
        who = f"{slot.label} ({place})"
    return f"{who} for {slot.held_seconds:.2f} s"


def _advice(snapshot: PoolSnapshot) -> str:
    if snapshot.phase == "paused":
        return "What to do: call pool.resume(), or pause for less than pool_timeout."
    if not snapshot.open:
        return (
            "What to do: 1. see whether the database accepts connections and how long connecting "
            "takes; 2. if it is slow but sure, raise pool_timeout."
        )
    if not snapshot.checked_out:
        return (
            "What to do: see whether the database answers: nobody holds a connection, but those "
            "that are open do not answer a ping, or are not closed yet."
        )
    return (
        "What to do: 1. look at the holders: a connection kept over a slow call, or never given "
        "back, makes everybody wait; 2. if all of them are quick, more connections are used at "
        "once than there are: raise max_size (or pool_size and max_overflow) as far as the "
        "database bears; 3. see pool.snapshot() for who made whom wait."
    )


def not_ready_error(
    snapshot: PoolSnapshot, waited: float | None, last_connect_error: str | None
) -> PoolTimeout:
    """Return the error of somebody who waited in vain for ``min_size`` connections."""
    failure = f"; the last attempt ended in {last_connect_error}" if last_connect_error else ""
    todo = "Check that the database accepts connections, or allow more time"
    if snapshot.phase == "paused":
        todo = "The pool is paused: call pool.resume() first"
    return PoolTimeout(
        f"pool {snapshot.name!r} is not ready after {waited or 0.0:.2f} s: {snapshot.open} of "
        f"min_size={snapshot.min_size} connections are open{failure}. {todo}",
        snapshot,
    )


def overloaded_error(config: PoolConfig, gauges: Mapping[str, int]) -> PoolOverloaded:
    """Return the error of a caller who was turned away."""
    return PoolOverloaded(
        f"pool {config.name!r} turned this caller away at once: {gauges['checked_out']} checked "
        f"out (max_size={config.max_size}), {gauges['waiting']} waiting already "
        f"(max_waiting={config.max_waiting}). Shed or delay this request, or raise "
        "max_waiting if callers may wait longer",
        dict(gauges),
    )


def unavailable_error(
    name: str,
    cause: BaseException | None,
    described: str | None,
    seconds_ago: float,
    events: tuple[PoolEvent, ...],
) -> PoolUnavailable:
    """Return the error of a caller who is turned away because the database is known to be down.

    :param cause: what the driver said last, without its traceback.
    :param described: the same in a line that may be shown to anybody.
    :param seconds_ago: how long ago that was.
    :param events: what happened in the pool before.
    """
    said = f": {described}" if described else ": it did not end in time"
    return PoolUnavailable(
        f"pool {name!r} cannot reach its database; the last attempt failed {seconds_ago:.1f} s "
        f"ago{said}. The pool tries again in the background and serves callers as soon as it gets "
        "through. What to do: see whether the database runs and accepts connections from here; "
        'if callers should rather wait for it, up to pool_timeout, set on_outage="wait"',
        cause,
        events,
    )
