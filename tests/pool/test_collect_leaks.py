"""Connections that were dropped unclosed come back by a garbage collection, if that is wanted."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from sqla_poolkit import ManagedPool, PoolTimeout
from sqla_poolkit.pool import _collector


class Connection:
    def rollback(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def manual_collector() -> Iterator[None]:
    """Let nothing but the pool collect garbage."""
    gc.collect()
    gc.disable()
    _collector._last[0] = float("-inf")
    yield
    gc.enable()


def leak(pool: ManagedPool) -> None:
    """Take a connection and lose it in a reference cycle."""
    cycle: list[object] = [pool.connect()]
    cycle.append(cycle)


@pytest.mark.usefixtures("manual_collector")
def test_a_waiter_gets_a_leaked_connection_when_collect_leaks_is_set() -> None:
    pool = ManagedPool(Connection, max_size=1, timeout=2, collect_leaks=True)
    leak(pool)
    pool.connect().close()
    assert pool.snapshot().timeouts == 0
    pool.close()


@pytest.mark.usefixtures("manual_collector")
def test_a_leaked_connection_is_not_looked_for_by_default() -> None:
    pool = ManagedPool(Connection, max_size=1, timeout=0.5)
    leak(pool)
    with pytest.raises(PoolTimeout):
        pool.connect()
    gc.collect()
    pool.connect().close()
    pool.close()


def test_the_collector_runs_at_most_every_thirty_seconds() -> None:
    _collector._last[0] = float("-inf")
    assert [_collector.collect_garbage(now) for now in (100.0, 129.0, 130.0)] == [True, False, True]
    _collector._last[0] = float("-inf")
