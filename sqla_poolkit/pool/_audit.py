"""Find what got lost, and bring it back: slots that nobody holds and nobody is at work on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.slots import CHECKED_OUT, CHECKING, CLOSING, CONNECTING, Close, Slot, slots_of
from . import _sqlalchemy

if TYPE_CHECKING:
    from ._driver import Driver

__all__ = ["Auditor"]

_AUDIT_SECONDS = 1.0


class Auditor:
    """Looks at every slot from time to time, under the pool's lock.

    A listener that raises on the way back, or a signal handler that raises inside pool code, loses
    a record, a decision or a caller.  A slot is suspect when no proxy refers to its record, or
    nobody does what its state promises; it is reclaimed when that is still so one round later and
    nobody is busy with it.
    """

    def __init__(self) -> None:
        self._next_look = 0.0
        self._suspects: dict[Slot, tuple[int, str, float]] = {}
        """At which use, in which state and since when nobody seems to be at work on it."""

    def is_due(self, now: float) -> bool:
        """Tell whether it is time to look."""
        return now >= self._next_look

    def look(self, driver: Driver, now: float, decided: set[Slot]) -> None:
        """Reclaim what was lost; the driver's lock must be held.

        :param decided: slots that something is about to be done for.
        """
        self._next_look = now + _AUDIT_SECONDS
        machine = driver.machine
        machine.set_right()
        driver.in_hand.intersection_update(machine.slots)
        attended = driver.in_hand | decided | slots_of(driver.backlog)
        suspects: dict[Slot, tuple[int, str, float]] = {}
        patience = driver.patience()
        for slot in list(machine.slots):
            _wake_again(slot)
            if not _looks_lost(slot, driver, attended):
                continue
            before = self._suspects.get(slot)
            if before is None or before[:2] != (slot.uses, slot.state):
                suspects[slot] = (slot.uses, slot.state, now)
                continue
            suspects[slot] = before
            if now - before[2] >= patience and not driver.is_being_handled(slot):
                _reclaim(slot, driver, now)
        self._suspects = suspects


def _wake_again(slot: Slot) -> None:
    """Wake a caller who has not noticed that he was granted this slot: his call may be lost."""
    request = slot.granted_to
    if request is not None and not request.is_awake and request.slot is slot:
        request.parker.unpark()


def _looks_lost(slot: Slot, driver: Driver, attended: set[Slot]) -> bool:
    if slot in attended:
        return False
    if slot.state == CHECKED_OUT:
        record = slot.resource
        is_held = record is not None and _sqlalchemy.is_referenced(record)
        return slot.request is None and not is_held
    if slot.is_own_connect or slot.request is not None:
        return driver.sees_callers
    return slot.state in (CONNECTING, CHECKING, CLOSING)


def _reclaim(slot: Slot, driver: Driver, now: float) -> None:
    """Bring a slot back into the round of things."""
    machine = driver.machine
    record = slot.resource
    if slot.state == CONNECTING:
        machine.attempt_cancelled(slot, now)
    elif slot.state == CHECKING:
        machine.check_interrupted(slot, now, "cancelled")
    elif slot.state == CLOSING:
        machine.decisions.append(Close(slot))
    elif record is not None and record.dbapi_connection is not None:
        machine.checkin(slot, now, "leaked")
    else:
        if record is not None:
            driver.let_go(slot)
        machine.checkin(slot, now, "lost")
