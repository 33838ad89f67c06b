"""The last resort against connections that were dropped unclosed: a garbage collection."""

from __future__ import annotations

import gc

__all__ = ["collect_garbage"]

_PAUSE_SECONDS = 30.0

_last = [float("-inf")]
"""When the collector last ran for any pool of the process; it stops them all."""


def collect_garbage(now: float) -> bool:
    """Run the garbage collector, unless it ran for us within the last 30 seconds."""
    if now - _last[0] < _PAUSE_SECONDS:
        return False
    _last[0] = now
    gc.collect()
    return True
