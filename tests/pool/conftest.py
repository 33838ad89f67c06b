"""What the tests of pools share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sqla_poolkit.pool import _upkeep, _workers


@pytest.fixture(scope="module")
def idle_threads_leave_soon() -> Iterator[None]:
    """Spare each test the second for which a pool's idle threads stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_workers, "_LINGER_SECONDS", 0.01)
        patch.setattr(_upkeep, "_LINGER_SECONDS", 0.01)
        yield
