"""What holds in every snapshot, whatever happened."""

from __future__ import annotations

from collections import Counter

from sqla_poolkit import PoolSnapshot

__all__ = ["assert_lawful", "broken_laws"]


def broken_laws(snapshot: PoolSnapshot, *, was_shrunk: bool = False) -> list[str]:
    """Return the laws that this snapshot breaks, in words.

    :param was_shrunk: the limit was lowered while more connections were held.
    """
    s = snapshot
    rows = Counter(slot.state for slot in s.slots)
    ended = s.checkouts + s.timeouts + s.rejected + s.cancelled + s.failed + s.unavailable
    gone = sum(s.closes.values()) + s.detached + s.forgotten
    waited = s.wait_time.sum_seconds + s.failed_wait_time.sum_seconds + s.waiting_seconds
    caused = sum(row.wait_caused_seconds for row in s.labels.values())
    held = sum(slot.held_seconds or 0.0 for slot in s.slots)
    used = sum(row.use_seconds for row in s.labels.values())
    laws = {
        "open = idle + checked_out + checking": s.open == s.idle + s.checked_out + s.checking,
        "open + connecting + closing <= max_size": was_shrunk
        or s.max_size is None
        or s.open + s.connecting + s.closing <= s.max_size,
        "connects - closes - detached - forgotten = open + closing": s.connects - gone
        == s.open + s.closing,
        "requests = ended + requesting": s.requests == ended + s.requesting,
        "waiting <= requesting": s.waiting <= s.requesting,
        "the slots are those of the gauges": all(
            rows[state] == getattr(s, state)
            for state in ("idle", "checked_out", "checking", "connecting", "closing")
        ),
        "a wait ends at most once": 0
        <= s.waits - s.wait_time.count - s.failed_wait_time.count - s.waiting
        <= s.requesting,
        "all waiting is caused by somebody": _about(waited, caused),
        "the labels' waits are all waits": _about(
            waited, sum(row.wait_seconds for row in s.labels.values())
        ),
        "the labels' checkouts are all checkouts": s.checkouts
        == sum(row.checkouts for row in s.labels.values()),
        "each checkout has its time": s.checkouts <= s.checkout_time.count,
        "the labels' use is all use": _about(s.use_time.sum_seconds + held, used),
        "peaks are not below the present": s.peak_checked_out >= s.checked_out
        and s.peak_waiting >= s.waiting,
        "nothing is negative": min(
            *(getattr(s, name) for name in ("open", "idle", "checked_out", "checking")),
            *(getattr(s, name) for name in ("connecting", "closing", "requesting", "waiting")),
            *(getattr(s, name) for name in ("checkouts", "failed", "connects", "invalidations")),
        )
        >= 0,
    }
    return [law for law, holds in laws.items() if not holds]


def _about(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * max(1.0, abs(one))


def assert_lawful(snapshot: PoolSnapshot, *, was_shrunk: bool = False) -> None:
    """Fail if the snapshot breaks a law."""
    broken = broken_laws(snapshot, was_shrunk=was_shrunk)
    assert not broken, f"{broken} in {snapshot}"
