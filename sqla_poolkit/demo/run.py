"""The course of a demo: one pool, the other pool, the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import URL, create_engine, exc, make_url
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool, QueuePool

from ..pool.managed import Managed, ManagedPool
from ..pool.managed_async import AsyncManagedPool
from . import report
from ._threads import ThreadLoad
from .load import FAILURES, POOL_SETTINGS, SLEEP, Load, Plan
from .screens import Screen

__all__ = ["Refusal", "run_demo"]

_POOLS = {False: (QueuePool, ManagedPool), True: (AsyncAdaptedQueuePool, AsyncManagedPool)}
_EXTRAS = {"psycopg2": "postgres", "greenlet": "asyncio"}
"""What of this package's installs a module, where the names differ."""


class Refusal(Exception):
    """The demo cannot run, as the message says."""


def run_demo(plan: Plan, screen: Screen, url: str | None = None, *, is_async: bool = False) -> None:
    """Run the plan on both pools and show what came out.

    :param url: a database; None is an SQLite file that lasts as long as the demo.
    :param is_async: make the callers tasks and take the pools for asyncio.
    :raises Refusal: with a sentence for the user, if the database is unsuitable or unreachable.
    """
    with _database(url, is_async=is_async) as (database, place), ExitStack() as stack:
        loads = []
        for pool_class in _POOLS[is_async]:
            loads.append(_load(database, pool_class, plan, is_async=is_async))
            stack.callback(loads[-1].close)
        try:
            loads[0].begin()
            for line in report.about(
                place, loads, is_sqlite=database.get_backend_name() == "sqlite"
            ):
                screen.say(line)
            one, other = [_measure(load, screen) for load in loads]
        except FAILURES as error:
            said = _without_password(_in_short(error), database)
            raise Refusal(f"no connection to {place}: {said}") from None
    for load in loads:
        if load.last_error is not None:
            said = _without_password(_in_short(load.last_error), database)
            screen.say(f"{load.name} met errors of the database, the last one: {said}")
    for part in (report.figures(one, other), report.who_made_whom_wait(one, other)):
        screen.say()
        screen.table(part)
    for paragraph in report.conclusions(one, other):
        screen.say()
        screen.say(paragraph)


# -- the database ----------------------------------------------------------------------------


@contextmanager
def _database(given: str | None, *, is_async: bool) -> Iterator[tuple[URL, str]]:
    """Give the URL to run on, and in words what it leads to."""
    if given is not None:
        url = _checked(given, is_async=is_async)
        yield url, _place(url)
        return
    with TemporaryDirectory(prefix="poolkit-demo-") as folder:
        file = str(Path(folder) / "demo.db")
        url = URL.create("sqlite+aiosqlite" if is_async else "sqlite", database=file)
        yield url, "SQLite, a file in a temporary folder"


def _checked(given: str, *, is_async: bool) -> URL:
    """Return the URL if the demo can run on it.

    What was given is never repeated: a URL that cannot be read may have its password anywhere.
    """
    try:
        url = make_url(given)
        is_for_asyncio = url.get_dialect().is_async
    except (exc.ArgumentError, ValueError):
        raise Refusal(
            "--url is no URL of a database that SQLAlchemy knows; it should look like "
            "postgresql+psycopg2://user:password@host:5432/database"
        ) from None
    if "@" in (url.host or ""):
        raise Refusal("--url has two '@'; write the one that belongs to the password as %40")
    if url.get_backend_name() not in SLEEP:
        known = " and ".join(sorted(SLEEP))
        raise Refusal(f"the demo speaks to {known}, not to {url.get_backend_name()}")
    if is_async:
        return url if is_for_asyncio else _for_asyncio(url)
    if is_for_asyncio:
        raise Refusal(
            f"the driver {url.get_driver_name()} is for asyncio and the demo runs threads; "
            f"run it with --async, or give another, such as postgresql+psycopg2://... or "
            f"sqlite:///..."
        )
    return url


def _for_asyncio(url: URL) -> URL:
    """Return the URL with a driver for asyncio in place of one for threads."""
    if url.get_backend_name() == "sqlite":
        return url.set(drivername="sqlite+aiosqlite")
    if url.get_driver_name() == "psycopg":
        return url  # serves both
    if find_spec("asyncpg") is None:
        raise Refusal(
            f"the driver {url.get_driver_name()} is for threads and the demo runs tasks; write "
            "postgresql+asyncpg://... (pip install 'sqla_poolkit[asyncpg]') or "
            "postgresql+psycopg://... (pip install 'sqla_poolkit[psycopg]')"
        )
    query = {"ssl" if name == "sslmode" else name: value for name, value in url.query.items()}
    return url.set(drivername="postgresql+asyncpg", query=query)


def _place(url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return f"SQLite, {url.database or 'in memory'}"
    port = f":{url.port}" if url.port else ""
    return f"PostgreSQL, {url.host or 'local'}{port}/{url.database or ''}"


def _load(url: URL, pool_class: type[Pool], plan: Plan, *, is_async: bool) -> Load:
    """Return the load of an engine that has this kind of pool.

    :raises Refusal: if something is not installed, or the pool does not suit the database.
    """
    make: Callable[..., Load] = _task_load if is_async else _thread_load
    try:
        return make(url, plan, poolclass=pool_class, **POOL_SETTINGS)
    except ImportError as error:
        missing = error.name or url.get_driver_name()
        raise Refusal(
            f"the driver of this URL, {missing}, is not installed: "
            f"pip install 'sqla_poolkit[{_EXTRAS.get(missing, missing)}]'"
        ) from None
    except exc.ArgumentError as error:
        raise Refusal(_without_password(str(error), url)) from None


def _thread_load(url: URL, plan: Plan, **settings: Any) -> Load:
    return ThreadLoad(create_engine(url, **settings), plan)


def _task_load(url: URL, plan: Plan, **settings: Any) -> Load:
    import greenlet  # noqa: F401 - what SQLAlchemy says without it differs by version
    from sqlalchemy.ext.asyncio import create_async_engine

    from ._tasks import TaskLoad

    return TaskLoad(create_async_engine(url, **settings), plan)


def _without_password(said: str, url: URL) -> str:
    """Take out the password, which some drivers repeat, wherever in the URL it was."""
    in_query = url.query.get("password", ())
    for password in (url.password, *((in_query,) if isinstance(in_query, str) else in_query)):
        if password:
            said = said.replace(password, "***")
    return said


# -- one pool --------------------------------------------------------------------------------


def _measure(load: Load, screen: Screen) -> report.Result:
    """Run the load on its pool."""
    pool = load.pool
    load.begin()
    before = pool.snapshot() if isinstance(pool, Managed) else None
    with screen.running(load.name, load.plan.seconds) as show:
        load.run(show, screen.every)
    books = pool.snapshot() - before if before and isinstance(pool, Managed) else None
    # nothing of this pool may run beside the next one
    load.close()
    return report.Result(load.name, load.summary(), books)


def _in_short(error: Exception) -> str:
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return "; ".join(lines) or type(cause).__name__
