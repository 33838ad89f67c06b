"""Whatever goes wrong, in whatever combination: when it is over, the pool has lost nothing.

Six sites (four of the database, two listeners) are each in order, raise, interrupt, are slow or
hang; here up to three of them are at fault at a time, in every combination there is.  Three
callers use a pool of two meanwhile.  Then all faults heal at once.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import sqlalchemy as sa

from sqla_poolkit import ManagedPool
from sqla_poolkit.pool import _upkeep, _workers
from tests.pool.laws import assert_lawful
from tests.pool.stub import Database, Disconnected, Error, Interrupt, StubDialect

# SQLAlchemy warns of a reset that failed.
pytestmark = pytest.mark.filterwarnings("ignore")

SITES = ("connect", "ping", "reset", "close", "checkout", "checkin")
FAULTS = ("raises", "interrupts", "is slow", "hangs")
CALLERS = 3
ROUNDS = 2
SIZE = 2
TIMEOUT_SECONDS = 0.01
TROUBLE_SECONDS = 0.015
SLOW_SECONDS = 0.002
PATIENCE_SECONDS = 10.0

Faults = Mapping[str, str]


class World:
    """A pool, its callers, and the faults of its surroundings."""

    def __init__(self, faults: Faults, error: type[Exception] = Error) -> None:
        self.faults = faults
        self.error = error
        self.healed = threading.Event()
        self.interrupted_closes = 0
        self.database = Database(self.act)
        self.pool = ManagedPool(
            self.database.connect,
            dialect=StubDialect.of(self.database),
            max_size=SIZE,
            timeout=TIMEOUT_SECONDS,
            ping_after=0,
        )
        for site in ("checkout", "checkin"):
            sa.event.listen(self.pool, site, lambda *_, site=site: self.act(site))
        self.callers = [threading.Thread(target=self.call, daemon=True) for _ in range(CALLERS)]

    def act(self, site: str) -> None:
        """Be at fault as long as this world is not healed."""
        fault = self.faults.get(site)
        if fault is None or self.healed.is_set():
            return
        if fault == "raises":
            raise self.error(site)
        if fault == "interrupts":
            self.interrupted_closes += site == "close"
            raise Interrupt(site)
        self.healed.wait(SLOW_SECONDS if fault == "is slow" else None)

    def call(self) -> None:
        for _ in range(ROUNDS):
            with suppress(Exception, Interrupt):
                self.pool.connect().close()

    def run(self) -> None:
        """Have the callers call while the faults last, then heal, then look what is left."""
        for caller in self.callers:
            caller.start()
        until = time.monotonic() + TROUBLE_SECONDS
        for caller in self.callers:
            caller.join(max(0.0, until - time.monotonic()))
        assert_lawful(self.pool.snapshot())
        self.healed.set()
        for caller in self.callers:
            caller.join(PATIENCE_SECONDS)
        assert not any(caller.is_alive() for caller in self.callers), "a caller is stuck"
        gc.collect()  # SQLAlchemy keeps the frames of a failed connect in a cycle
        self.audit_twice()
        self.assert_nothing_is_lost()

    def audit_twice(self) -> None:
        driver = self.pool._driver
        for _ in range(2):
            driver._auditor._next_look = 0.0
            driver.upkeep()

    def assert_nothing_is_lost(self) -> None:
        pool = self.pool
        self.wait_until(lambda s: not (s.connecting or s.closing))
        snapshot = pool.snapshot()
        assert_lawful(snapshot)
        assert (snapshot.checked_out, snapshot.checking, snapshot.requesting) == (0, 0, 0)
        assert snapshot.open == len(self.database.open)
        pool._driver.reconfigure(replace(pool._driver.config, timeout=PATIENCE_SECONDS))
        held = [pool.connect() for _ in range(SIZE)]
        assert pool.snapshot().checked_out == SIZE
        for connection in held:
            connection.close()
        del connection, held
        pool.close(PATIENCE_SECONDS)
        snapshot = pool.snapshot()
        assert_lawful(snapshot)
        assert snapshot.connects == len(self.database.connections) == sum(snapshot.closes.values())
        assert self.database.most_sockets <= SIZE
        assert self.database.open == []
        # one that was interrupted may be closed again, for nobody knows how far it got
        once = len(self.database.connections)
        assert once <= self.database.visits["close"] <= once + self.interrupted_closes
        assert not any(self.database.busy.values())

    def wait_until(self, is_so: Callable[[Any], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so(self.pool.snapshot()):
            assert time.monotonic() < deadline, self.pool
            threading.Event().wait(0.0005)


@pytest.fixture(autouse=True)
def quick_and_quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let threads go soon, logs go nowhere, and collections look at young objects only."""
    monkeypatch.setattr(_workers, "_LINGER_SECONDS", 0.02)
    monkeypatch.setattr(_upkeep, "_LINGER_SECONDS", 0.02)
    before = set(threading.enumerate())
    logging.disable()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    logging.disable(logging.NOTSET)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not before.issuperset(threading.enumerate()) and time.monotonic() < deadline:
        threading.Event().wait(0.005)


def in_words(faults: Faults) -> str:
    return ", ".join(f"{site} {fault}" for site, fault in faults.items()) or "no fault"


def run_all(sites: tuple[str, ...]) -> int:
    """Run the worlds in which exactly these sites are at fault; return how many there were."""
    worlds = [
        dict(zip(sites, faults, strict=True)) for faults in product(FAULTS, repeat=len(sites))
    ]
    for faults in worlds:
        try:
            World(faults).run()
        except AssertionError as broken:
            raise AssertionError(f"when {in_words(faults)}: {broken}") from broken
    return len(worlds)


def test_nothing_is_lost_when_nothing_is_at_fault():
    assert run_all(()) == 1


@pytest.mark.parametrize("site", SITES)
def test_nothing_is_lost_when_one_site_is_at_fault(site: str):
    assert run_all((site,)) == 4


@pytest.mark.parametrize("sites", list(combinations(SITES, 2)), ids="+".join)
def test_nothing_is_lost_when_two_sites_are_at_fault(sites: tuple[str, ...]):
    assert run_all(sites) == 16


@pytest.mark.parametrize("sites", list(combinations(SITES, 3)), ids="+".join)
def test_nothing_is_lost_when_three_sites_are_at_fault(sites: tuple[str, ...]):
    assert run_all(sites) == 64


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_when_all_sites_are_at_fault_in_the_same_way(fault: str):
    World(dict.fromkeys(SITES, fault)).run()


@pytest.mark.parametrize("sites", list(combinations(SITES, 2)), ids="+".join)
def test_nothing_is_lost_when_sites_say_that_the_server_is_gone(sites: tuple[str, ...]):
    World(dict.fromkeys(sites, "raises"), error=Disconnected).run()


def test_the_callers_reach_every_site():
    world = World({"reset": "raises"})
    reached = []
    world.act = lambda site, act=world.act: (reached.append(site), act(site))
    world.database.act = world.act
    for _ in range(2):
        world.pool.connect().close()
    world.healed.set()
    for _ in range(2):
        world.pool.connect().close()
    world.pool.close()
    assert set(reached) == set(SITES)


def test_a_slot_that_no_audit_looks_for_is_found_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(World, "audit_twice", lambda world: None)
    world = World({"checkin": "raises"})
    with pytest.raises(AssertionError):
        world.run()
    monkeypatch.undo()
    world.audit_twice()
    world.assert_nothing_is_lost()
