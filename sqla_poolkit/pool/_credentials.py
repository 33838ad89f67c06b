"""Connect arguments that change: passwords that are rotated, tokens that run out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from ..errors import ArgumentError
from ._sqlalchemy import await_only

__all__ = ["Credentials"]

# Attempts run side by side, each in a thread or task of its own.
_used: ContextVar[Mapping[str, Any] | None] = ContextVar("used", default=None)
_next: ContextVar[Mapping[str, Any] | None] = ContextVar("next", default=None)


class Credentials:
    """Asks for credentials at each connect, and once more when they were refused.

    They are used again after a refusal only if they have changed: the same ones would be refused
    again, and a server may lock an account that is refused too often.
    """

    def __init__(self, provider: Callable[[], Any]) -> None:
        self._provider = provider

    def __repr__(self) -> str:
        return "<Credentials>"

    def supply(self) -> Mapping[str, Any]:
        """Return the connect arguments of the next attempt."""
        used = _next.get() or self._ask()
        _used.set(used)
        _next.set(None)
        return used

    def have_changed(self) -> bool:
        """Ask again; tell whether there are others by now than those that were refused."""
        fresh = self._ask()
        has_changed = fresh != _used.get()
        _next.set(fresh if has_changed else None)
        return has_changed

    def _ask(self) -> Mapping[str, Any]:
        answer = self._provider()
        if inspect.isawaitable(answer):
            answer = await_only(answer)
        if isinstance(answer, str):
            return {"password": answer}
        if not isinstance(answer, Mapping):
            raise ArgumentError(
                "the function given as credentials= must return the password, or a mapping of "
                f"connect arguments, not {type(answer).__name__}"
            )
        return answer
