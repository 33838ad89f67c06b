"""Tools for tests of programs that use a database.

Each is loaded at its first use: pytest imports this package in every run, for the plugin.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .clock import FakeClock
    from .fake import FakeDBAPI
    from .leaks import LeakedConnections, assert_no_leaks
    from .proxy import FaultProxy

__all__ = ["FakeClock", "FakeDBAPI", "FaultProxy", "LeakedConnections", "assert_no_leaks"]

_HOMES = {
    "FakeClock": "clock",
    "FakeDBAPI": "fake",
    "FaultProxy": "proxy",
    "LeakedConnections": "leaks",
    "assert_no_leaks": "leaks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
