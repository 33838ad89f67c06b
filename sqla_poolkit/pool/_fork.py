"""After a fork the child starts with empty pools."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["start_over_after_fork"]


class _Forked(Protocol):
    def after_fork_in_child(self) -> None:
        """Start over with nothing."""


_drivers: weakref.WeakSet[_Forked] = weakref.WeakSet()


def start_over_after_fork(driver: _Forked) -> None:
    """Have ``driver`` start over in every child that this process forks."""
    _drivers.add(driver)


def _in_child() -> None:
    for driver in list(_drivers):
        driver.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
