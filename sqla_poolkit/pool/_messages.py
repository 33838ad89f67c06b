"""The sentences of the pool's errors: what happened, the state, what to do next."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import PoolConfig
from ..core.snapshot import PoolSnapshot, SlotReading
from ..errors import PoolOverloaded, PoolTimeout

__all__ = ["overloaded_error", "timeout_error"]

_LONGEST_HOLDERS = 3


def timeout_error(
    snapshot: PoolSnapshot, waited: float, last_connect_error: str | None
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
    if held:
        shown = "; ".join(_holder(slot) for slot in held[:_LONGEST_HOLDERS])
        lines.append(f"Held longest: {shown}.")
    if last_connect_error is not None and snapshot.connect_failures:
        lines.append(f"The last connection attempt that failed: {last_connect_error}.")
    lines.append(_advice(snapshot))
    return PoolTimeout("\n".join(lines), snapshot)


def _state(snapshot: PoolSnapshot) -> str:
    limit = "no limit" if snapshot.is_unlimited else f"max_size={snapshot.max_size}"
    counts = [
        f"{snapshot.checked_out} checked out",
        f"{snapshot.idle} idle",
        f"{snapshot.connecting} connecting",
        f"{snapshot.waiting} still waiting",
    ]
    return f"{', '.join(counts)}, {limit}"


def _holder(slot: SlotReading) -> str:
    who = slot.label or slot.caller or "an unnamed caller"
    if slot.label and slot.caller:
        who = f"{slot.label} ({slot.caller})"
    return f"{who} for {slot.held_seconds:.2f} s"


def _advice(snapshot: PoolSnapshot) -> str:
    if not snapshot.open:
        return (
            "What to do: 1. see whether the database accepts connections and how long connecting "
            "takes; 2. if it is slow but sure, raise pool_timeout."
        )
    return (
        "What to do: 1. look at the holders: a connection kept over a slow call, or never given "
        "back, makes everybody wait; 2. if all of them are quick, more connections are used at "
        "once than there are: raise max_size (or pool_size and max_overflow) as far as the "
        "database bears; 3. see pool.snapshot() for who made whom wait."
    )


def overloaded_error(config: PoolConfig, gauges: Mapping[str, int]) -> PoolOverloaded:
    """Return the error of a caller who was turned away."""
    return PoolOverloaded(
        f"pool {config.name!r} turned this caller away at once: {gauges['waiting']} callers wait "
        f"already (max_waiting={config.max_waiting}), {gauges['checked_out']} connections are "
        f"checked out (max_size={config.max_size}). Shed or delay this request, or raise "
        "max_waiting if callers may wait longer",
        dict(gauges),
    )
