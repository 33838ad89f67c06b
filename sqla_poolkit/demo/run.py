"""The course of a demo: one pool, the other pool, the tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import URL, Engine, create_engine, exc, make_url
from sqlalchemy.pool import QueuePool

from ..pool.managed import ManagedPool
from . import report
from .load import POOL_SETTINGS, SLEEP, Load, Plan, teach_sleep
from .screens import Screen

__all__ = ["Refusal", "run_demo"]

PoolClass = type[QueuePool] | type[ManagedPool]


class Refusal(Exception):
    """The demo cannot run, as the message says."""


def run_demo(plan: Plan, screen: Screen, url: str | None = None) -> None:
    """Run the plan on both pools and show what came out.

    :param url: a database; None is an SQLite file that lasts as long as the demo.
    :raises Refusal: with a sentence for the user, if the database is unsuitable or unreachable.
    """
    with _database(url) as (database, place):
        is_sqlite = database.get_backend_name() == "sqlite"
        engines = [_engine(database, pool_class) for pool_class in (QueuePool, ManagedPool)]
        loads = [Load(engine, plan) for engine in engines]
        try:
            loads[0].begin()
            for line in report.about(place, plan, is_sqlite=is_sqlite):
                screen.say(line)
            one, other = [_measure(load, screen) for load in loads]
        except exc.SQLAlchemyError as error:
            said = _without_password(_in_short(error), database)
            raise Refusal(f"no connection to {place}: {said}") from None
        finally:
            for engine in engines:
                _close(engine)
    for load in loads:
        if load.last_error is not None:
            said = _without_password(_in_short(load.last_error), database)
            screen.say(f"{_name(load)} met errors of the database, the last one: {said}")
    for part in (report.figures(one, other), report.who_made_whom_wait(one, other)):
        screen.say()
        screen.table(part)
    for paragraph in report.conclusions(one, other):
        screen.say()
        screen.say(paragraph)


# -- the database ----------------------------------------------------------------------------


@contextmanager
def _database(given: str | None) -> Iterator[tuple[URL, str]]:
    """Give the URL to run on, and in words what it leads to."""
    if given is not None:
        url = _checked(given)
        yield url, _place(url)
        return
    with TemporaryDirectory(prefix="poolkit-demo-") as folder:
        file = str(Path(folder) / "demo.db")
        yield URL.create("sqlite", database=file), "SQLite, a file in a temporary folder"


def _checked(given: str) -> URL:
    """Return the URL if the demo can run on it.

    What was given is never repeated: a URL that cannot be read may have its password anywhere.
    """
    try:
        url = make_url(given)
        is_async = url.get_dialect().is_async
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
        raise Refusal(
            f"the driver {url.get_driver_name()} is for asyncio and the demo runs threads; "
            f"give another, such as postgresql+psycopg2://... or sqlite:///..."
        )
    return url


def _place(url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return f"SQLite, {url.database or 'in memory'}"
    port = f":{url.port}" if url.port else ""
    return f"PostgreSQL, {url.host or 'local'}{port}/{url.database or ''}"


def _engine(url: URL, pool_class: PoolClass) -> Engine:
    try:
        engine = create_engine(url, poolclass=pool_class, **POOL_SETTINGS)
    except ImportError as error:
        packages = {"psycopg2": "sqla_poolkit[postgres]", "psycopg": "sqla_poolkit[psycopg]"}
        missing = error.name or url.get_driver_name()
        raise Refusal(
            f"the driver of this URL, {missing}, is not installed: "
            f"pip install '{packages.get(missing, missing)}'"
        ) from None
    except exc.ArgumentError as error:
        raise Refusal(_without_password(str(error), url)) from None
    if url.get_backend_name() == "sqlite":
        teach_sleep(engine)
    return engine


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
    pool = load.engine.pool
    load.begin()
    before = pool.snapshot() if isinstance(pool, ManagedPool) else None
    with screen.running(_name(load), load.plan.seconds) as show:
        load.run(show, screen.every)
    books = pool.snapshot() - before if before and isinstance(pool, ManagedPool) else None
    # nothing of this pool may run beside the next one
    _close(load.engine)
    return report.Result(_name(load), load.summary(), books)


def _name(load: Load) -> str:
    return type(load.engine.pool).__name__


def _close(engine: Engine) -> None:
    pool = engine.pool
    if isinstance(pool, ManagedPool):
        pool.close()
    else:
        engine.dispose()


def _in_short(error: exc.SQLAlchemyError) -> str:
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    return "; ".join(line.strip() for line in str(cause).splitlines() if line.strip())
