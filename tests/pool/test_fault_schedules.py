"""Everything that the pool calls goes wrong in every way, in all combinations, in simulated time.

What is slow takes simulated seconds here, so all five things that can go wrong (the listeners for
one) are tried in all five ways, and what hangs is waited for without anybody waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from sqlalchemy import event

from tests.pool.stub import Disconnected, Error, Interrupt
from tests.pool.test_schedules import HANGS, Plan, Use, World
from tests.simulation import Broken, Dice

SITES = ("connect", "ping", "reset", "close", "checkout", "checkin")
MODES = ("is well", "raises", "interrupts", "is slow", "hangs")
Faults = dict[str, str]


class FaultyWorld(World):
    """A run in which each site has its fault, until all are healed."""

    def __init__(self, faults: Faults) -> None:
        callers = (Use(hold=0.05), Use(hold=0.05)), (Use(), Use(hold=0.3)), (Use(ending="drop"),)
        settings = (("pre_ping", True), ("ping_after", 0), ("connect_timeout", 2.0))
        super().__init__(Plan(max_size=2, timeout=1.0, callers=callers, settings=settings), Dice())
        self.faults = faults

    def act(self, site: str) -> None:
        fault = "is well" if self.is_healed else self.faults[site]
        if fault == "raises":
            raise Disconnected(site) if site == "ping" else Error(site)
        if fault == "interrupts":
            raise Interrupt(site)
        if fault == "is slow":
            self.simulation.sleep(0.1)
        elif fault == "hangs":
            self.simulation.block(lambda: self.is_healed, HANGS)

    def make_pool(self) -> Any:
        pool = super().make_pool()
        for site in ("checkout", "checkin"):
            event.listen(pool, site, lambda *_, site=site: self.database.visit(site))
        return pool

    def give_back(self, proxy: Any, ending: str) -> None:
        try:
            super().give_back(proxy, ending)
        except Error:
            self.outcomes["failed returns"] += 1

    def look_for_lost_wakeup(self) -> None:
        """Leave that to the state machine's laws: a record lost on its way back holds its place."""


def combinations(connect: str, ping: str) -> Iterator[Faults]:
    for reset, close, listeners in product(MODES, repeat=3):
        yield dict(zip(SITES, (connect, ping, reset, close, listeners, listeners), strict=True))


def in_words(faults: Faults) -> str:
    return ", ".join(f"{site} {fault}" for site, fault in faults.items() if fault != "is well")


@pytest.mark.parametrize("ping", MODES)
@pytest.mark.parametrize("connect", MODES)
def test_nothing_is_lost_whatever_goes_wrong_together(connect: str, ping: str):
    for faults in combinations(connect, ping):
        try:
            FaultyWorld(faults).run()
        except BaseException as error:
            raise Broken(f"when {in_words(faults)}: {error}") from error
