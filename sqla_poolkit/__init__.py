"""A fair connection pool for SQLAlchemy that keeps honest books, and a monitor of pools.

The public names are loaded at the first use of any: pytest imports this package in every run, for
its plugin, and a suite without a database must not pay for SQLAlchemy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._public import *  # noqa: F403 - the names are listed there, once
    from ._public import __all__ as __all__


def __getattr__(name: str) -> Any:
    if name != "__all__" and name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import _public

    globals().update({each: getattr(_public, each) for each in _public.__all__})
    globals()["__all__"] = _public.__all__
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
