"""Tests wait until something is so, and not for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_SECONDS = 10.0


def until(
    is_so: Callable[[], object],
    what: str = "it did not come to pass",
    seconds: float = PATIENCE_SECONDS,
) -> float:
    """Come back when it is so and return how long that took; fail if it does not become so."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < seconds, what
        time.sleep(0.002)
    return time.monotonic() - began
