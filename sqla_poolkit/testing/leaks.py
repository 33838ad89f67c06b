"""Connections that were taken and not returned: found at the end of a block, or of a test."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..pool._sqlalchemy import is_same_pool
from ._checkouts import Checkout, Checkouts

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import Pool

__all__ = ["LeakedConnections", "assert_no_leaks", "checkouts", "describe_leaks", "wait_for_tasks"]

checkouts = Checkouts()
"""Those of this process, while a test looks for leaks."""

_GRACE_SECONDS = 0.25
_LOOK_SECONDS = 0.005

_STDLIB = os.path.dirname(os.__file__) + os.sep
_OF_TEST_RUNNERS = {"_pytest", "pluggy", "pytest_asyncio", "anyio", "xdist", "execnet"}


class LeakedConnections(AssertionError):
    """Connections were not returned; the message says who took them."""


class assert_no_leaks:  # noqa: N801 - used like a function, as contextlib.suppress is
    """Fail if connections that are taken inside the block are still out at its end.

    For example::

        with assert_no_leaks(engine):
            handle(request)

    Use it where the pytest plugin is not wanted, or where a test has to hold connections of its
    own.  Any pool will do, SQLAlchemy's as well as ours.  The garbage collector is not asked
    before: what only it would return is a leak.  With ``async with`` tasks that are about to
    return a connection get a quarter of a second to do so.

    :param target: an ``Engine``, an ``AsyncEngine`` or a pool; without it all of the process.
    :raises LeakedConnections: an ``AssertionError`` that says who took what, since when.
    """

    def __init__(self, target: Engine | AsyncEngine | Pool | None = None) -> None:
        self._engine = getattr(target, "sync_engine", target)
        if target is not None and not hasattr(self._pool(), "recreate"):
            raise ArgumentError(
                f"assert_no_leaks() takes an engine or a pool, or nothing for all pools of the "
                f"process, not {type(target).__name__}"
            )
        self._began_at = 0
        self._first_pool = self._pool()

    def _pool(self) -> Any:
        return getattr(self._engine, "pool", self._engine)

    def __enter__(self) -> assert_no_leaks:
        checkouts.start()
        self._began_at = checkouts.mark()
        self._first_pool = self._pool()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                _refuse(wait_for_tasks(self._leaks))
        finally:
            checkouts.stop()

    async def __aenter__(self) -> assert_no_leaks:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        deadline = monotonic() + _GRACE_SECONDS
        while kind is None and monotonic() < deadline:
            if not any(leak.loop is not None for leak in self._leaks()):
                break
            await asyncio.sleep(_LOOK_SECONDS)
        self.__exit__(kind, error, traceback)

    def _leaks(self) -> list[Checkout]:
        return [
            checkout
            for checkout in checkouts.unreturned()
            if checkout.number > self._began_at and self._is_asked_about(checkout.pool)
        ]

    def _is_asked_about(self, pool: Pool) -> bool:
        if self._first_pool is None:
            return True
        return is_same_pool(pool, self._first_pool) or is_same_pool(pool, self._pool())


def _refuse(leaks: list[Checkout]) -> None:
    if leaks:
        raise LeakedConnections(describe_leaks(leaks))


def wait_for_tasks(find: Callable[[], list[Checkout]]) -> list[Checkout]:
    """Return the leaks found, after tasks had a moment to return them.

    A connection that a thread holds gets no grace; of a task it cannot be told whether it is
    returning.  A loop of this thread that is stopped between two tests is run for that moment.
    """
    deadline = monotonic() + _GRACE_SECONDS
    while leaks := find():
        loops = {leak.loop for leak in leaks if leak.is_on_stopped_loop}
        may_return = loops or any(leak.is_on_running_loop for leak in leaks)
        if not may_return or monotonic() > deadline:
            return leaks
        for loop in filter(None, loops):
            loop.run_until_complete(asyncio.sleep(_LOOK_SECONDS))
        if not loops:
            sleep(_LOOK_SECONDS)
    return []


def describe_leaks(leaks: list[Checkout]) -> str:
    """Say of each connection who took it, since when, and what to do."""
    were = "connection was" if len(leaks) == 1 else "connections were"
    return "\n".join(
        [
            f"{len(leaks)} {were} taken and not returned:",
            *(line for leak in leaks for line in _describe(leak)),
            "Return each: use it in a 'with' block, or close it; a Session as well.",
        ]
    )


def _describe(leak: Checkout) -> Iterable[str]:
    label, stack = leak.label_and_stack()
    holder = f"{label} in {leak.taken_by}" if label else leak.taken_by
    kind = type(leak.pool).__name__
    seconds = monotonic() - leak.taken_at
    end = "" if leak.is_out else ", and dropped without being closed"
    yield f"* pool {leak.pool_name()!r} ({kind}), taken {seconds:.2f} s ago by {holder}{end}:"
    yield from (f"    {_shown(line)}" for line in _of_the_application(stack) or stack)


def _of_the_application(stack: list[str]) -> list[str]:
    """Return the lines of a stack without those of the test runner and the standard library."""
    return [line for line in stack if not _is_of_a_runner(line)]


def _is_of_a_runner(line: str) -> bool:
    parts = set(Path(line.rpartition(":")[0]).parts)
    is_of_stdlib = line.startswith(_STDLIB) and "site-packages" not in parts
    return is_of_stdlib or line.startswith("<frozen") or bool(parts & _OF_TEST_RUNNERS)


def _shown(line: str) -> str:
    """Return a line with its path relative to the present folder, if it lies in there."""
    return line.removeprefix(os.getcwd() + os.sep)
