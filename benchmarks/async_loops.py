"""One engine on several event loops: one after the other, then two in two threads at once."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.ext.asyncio import AsyncEngine

from ._async import (
    MANAGED_POOL,
    QUEUE_POOL,
    asyncpg_url,
    engine_for,
    engine_settings,
    why_no_asyncpg,
)
from ._harness import Plan
from ._report import Row, Table, at_most

SIZE, TASKS, PAIRS = 4, 12, 5
LOGGERS = ("asyncio", "sqlalchemy", "sqla_poolkit")
LIMIT = 20.0
ADDRESS = re.compile(r"0x\w+|Task-\d+|fd=\d+")
WAYS = ("three in a row", "two at once", "a last one, dispose(), del")
FIGURES = ("warnings", "errors", "queries missing")


def run(plan: Plan) -> Table:
    """Count what goes wrong."""
    turns = plan.pick(200, 20)
    table = Table(
        f"async_loops: one engine, {TASKS} tasks of {turns} queries a loop, {SIZE} connections, "
        "asyncpg",
        notes=[
            f"two at once: two threads with a loop each, {PAIRS} times; their ends are part of it",
            "warnings: Python's, all shown, the garbage collector run at the end of each part",
            "errors: raised by tasks, unraisable, or logged as WARNING and above by anybody here",
            f"{QUEUE_POOL} is documented to be for one loop at a time: orientation",
        ],
    )
    missing = why_no_asyncpg(plan)
    if missing is not None:
        table.rows += [Row(f"{way}: {what}", bar=at_most(0)) for way in WAYS for what in FIGURES]
        table.notes.append(missing)
        return table
    with asyncpg_url(plan) as url:
        troubles = {
            name: _on_all_loops(engine_for(url, settings), turns)
            for name, settings in engine_settings(SIZE, pool_timeout=5).items()
        }
    for way in WAYS:
        for what in FIGURES:
            values = {name: ways[way].count(what) for name, ways in troubles.items()}
            ours = values[MANAGED_POOL]
            row = Row(f"{way}: {what}", values, "{:.0f}", ours, "{:.0f}", at_most(0))
            table.rows.append(row)
    for name, ways in troubles.items():
        table.notes += [f"{name}, {way}: {story}" for way in WAYS for story in ways[way].stories(2)]
    return table


class Trouble:
    """What went wrong in one part."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {what: [] for what in FIGURES}
        self.missing = 0

    def add(self, what: str, story: object) -> None:
        """Note a warning or an error; called from any thread."""
        plain = ADDRESS.sub("...", str(story).strip().partition("\n")[0])
        self.found[what].append(plain if len(plain) <= 150 else plain[:150] + " ...")

    def count(self, what: str) -> float:
        """Return how many there were."""
        return float(self.missing if what == "queries missing" else len(self.found[what]))

    def stories(self, number: int) -> list[str]:
        """Return the first few different ones of each kind."""
        return [s for all_ in self.found.values() for s in list(dict.fromkeys(all_))[:number]]


def _on_all_loops(engine: AsyncEngine, turns: int) -> dict[str, Trouble]:
    troubles: dict[str, Trouble] = {}
    for way, work in (
        (WAYS[0], _in_a_row),
        (WAYS[1], _at_once),
        (WAYS[2], _dispose),
    ):
        with _watched() as troubles[way]:
            work(engine, turns, troubles[way])
            gc.collect()
    # what is only found when the engine is gone belongs to the whole
    with _watched() as last:
        del engine
        gc.collect()
    for what, stories in last.found.items():
        troubles[WAYS[2]].found[what] += stories
    return troubles


def _in_a_row(engine: AsyncEngine, turns: int, trouble: Trouble) -> None:
    for _ in range(3):
        _one_loop(engine, turns, trouble)
        gc.collect()


def _at_once(engine: AsyncEngine, turns: int, trouble: Trouble) -> None:
    for _ in range(PAIRS):
        _two_threads(engine, turns, trouble)
        gc.collect()


def _two_threads(engine: AsyncEngine, turns: int, trouble: Trouble) -> None:
    threads = [
        threading.Thread(target=_one_loop, args=(engine, turns, trouble), daemon=True)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT * 2)
        if thread.is_alive():
            trouble.add("errors", "a loop did not end")


def _dispose(engine: AsyncEngine, turns: int, trouble: Trouble) -> None:
    """Use the engine on a last loop and dispose of it there, as it should be."""
    _one_loop(engine, turns, trouble, dispose=True)


def _one_loop(engine: AsyncEngine, turns: int, trouble: Trouble, *, dispose: bool = False) -> None:
    done = 0

    async def work() -> None:
        nonlocal done
        for _ in range(turns):
            async with engine.connect() as connection:
                await connection.exec_driver_sql("select 1")
                done += 1

    async def everything() -> None:
        results = await asyncio.gather(*(work() for _ in range(TASKS)), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                trouble.add("errors", f"{type(result).__name__}: {result}")
        if dispose:
            await engine.dispose()

    async def within_the_limit() -> None:
        await asyncio.wait_for(everything(), LIMIT)

    try:
        asyncio.run(within_the_limit())
    except Exception:  # noqa: BLE001  # the error is the figure
        trouble.add("errors", traceback.format_exc().strip().rpartition("\n")[2])
    trouble.missing += TASKS * turns - done


@contextmanager
def _watched() -> Iterator[Trouble]:
    """Catch every warning, and every error that Python or a library only reports."""
    trouble = Trouble()
    log = _Log(trouble)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    hook, propagated = sys.unraisablehook, [logger.propagate for logger in loggers]
    sys.unraisablehook = lambda found: trouble.add(
        "errors", f"unraisable {type(found.exc_value).__name__}: {found.exc_value}"
    )
    for logger in loggers:
        logger.addHandler(log)
        logger.propagate = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield trouble
        for warning in caught:
            trouble.add("warnings", f"{warning.category.__name__}: {warning.message}")
    finally:
        sys.unraisablehook = hook
        for logger, propagate in zip(loggers, propagated, strict=True):
            logger.removeHandler(log)
            logger.propagate = propagate


class _Log(logging.Handler):
    """Notes what is logged as a warning or worse."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(logging.WARNING)
        self._trouble = trouble

    def emit(self, record: logging.LogRecord) -> None:
        """Note a record."""
        error = record.exc_info[0] if record.exc_info else None
        cause = "" if error is None else f" ({error.__name__})"
        self._trouble.add("errors", f"logged by {record.name}: {record.getMessage()}{cause}")
