"""The ``poolkit`` command."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, NoReturn

from sqlalchemy import URL, Engine, create_engine, exc, make_url
from sqlalchemy.pool import QueuePool

from . import demo
from .core.snapshot import PoolInterval
from .pool.managed import ManagedPool

__all__ = ["main"]

NO_RICH = (
    "The live table needs the package rich: pip install 'sqla_poolkit[cli]'. "
    "Without it, poolkit demo --plain prints lines."
)
LIVE_SECONDS, PLAIN_SECONDS = 0.25, 3.0
DATABASES = ("sqlite", "postgresql")


class Refusal(Exception):
    """The command cannot do what was asked, as the message says."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return _demo(options)
    except Refusal as refusal:
        print(f"poolkit: {refusal}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("poolkit: stopped", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Complain about the arguments, of which one may be a URL with a password in it."""
        super().error(re.sub(r"//[^@/]*@", "//***@", message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="poolkit", description="See what a connection pool does.")
    commands = parser.add_subparsers(dest="command", metavar="command", parser_class=_Parser)
    about = (
        "Run the same mixed load first on SQLAlchemy's QueuePool, then on ManagedPool with the "
        "same limits, and show both side by side: who waits how long, and who makes whom wait."
    )
    command = commands.add_parser(
        "demo", help="QueuePool and ManagedPool under the same load", description=about
    )
    plan = demo.Plan()
    command.add_argument(
        "--url",
        help="SQLite or PostgreSQL, for example postgresql+psycopg2://me@localhost/test; nothing "
        "is written to it (default: an SQLite file in a temporary folder)",
    )
    command.add_argument(
        "--seconds",
        type=_seconds,
        default=plan.seconds,
        help="how long the load lasts on each pool (default: %(default)g)",
    )
    command.add_argument(
        "--threads",
        type=_threads,
        default=plan.threads,
        help="web workers; twice as many more come at half time (default: %(default)d)",
    )
    command.add_argument("--plain", action="store_true", help="no live table, lines of text only")
    return parser


def _seconds(value: str) -> float:
    seconds = float(value)
    if not 0.5 <= seconds <= 600:
        raise argparse.ArgumentTypeError("give something between 0.5 and 600 seconds")
    return seconds


def _threads(value: str) -> int:
    threads = int(value)
    if not 1 <= threads <= 500:
        raise argparse.ArgumentTypeError("give something between 1 and 500 threads")
    return threads


# -- running it ------------------------------------------------------------------------------


class Result(NamedTuple):
    """What came out for one pool."""

    pool: str
    summary: demo.Summary
    books: PoolInterval | None
    """What the pool itself wrote down; QueuePool writes nothing down."""


def _demo(options: argparse.Namespace) -> int:
    if options.plain:
        screen: Screen = Plain()
    else:
        try:
            screen = _rich_screen()
        except ImportError:
            print(f"poolkit: {NO_RICH}", file=sys.stderr)
            return 2
    plan = demo.Plan(seconds=options.seconds, threads=options.threads)
    with _database(options.url) as url:
        for line in _about(url, plan, is_ours=options.url is None):
            screen.say(line)
        results = []
        for pool in (QueuePool, ManagedPool):
            with screen.running(pool.__name__, plan) as show:
                results.append(_measure(url, pool, plan, show, screen.every))
    queue_pool, managed_pool = results
    screen.say("")
    screen.table(*_figures(queue_pool, managed_pool))
    screen.say("")
    screen.table(*_labels(queue_pool, managed_pool))
    for paragraph in _conclusions(queue_pool, managed_pool):
        screen.say("")
        screen.say(paragraph)
    return 0


@contextmanager
def _database(given: str | None) -> Iterator[URL]:
    """Give the URL to run on: the user's, or that of a file which lasts as long."""
    if given is not None:
        yield _checked(given)
        return
    with tempfile.TemporaryDirectory(prefix="poolkit-demo-") as folder:
        yield URL.create("sqlite", database=str(Path(folder) / "demo.db"))


def _checked(given: str) -> URL:
    """Return the URL if the demo can run on it; never repeat it, there may be a password in it."""
    try:
        url = make_url(given)
        name = url.get_backend_name()
        dialect = url.get_dialect()
    except exc.ArgumentError as error:
        raise Refusal(
            "what was given as --url is no URL of a database that SQLAlchemy knows; it should "
            "look like postgresql+psycopg2://user:password@host:5432/database"
        ) from error
    if "@" in (url.host or ""):
        raise Refusal("the URL has two '@'; write one that belongs to the password as %40")
    if name not in DATABASES:
        raise Refusal(f"the demo speaks to {' and '.join(DATABASES)}, not to {name}")
    if dialect.is_async:
        raise Refusal(
            f"the driver {dialect.driver} is for asyncio, and the demo runs threads; "
            "give a driver such as psycopg2 (postgresql+psycopg2://...)"
        )
    return url


def _measure(
    url: URL,
    pool_class: type[QueuePool] | type[ManagedPool],
    plan: demo.Plan,
    show: Callable[[demo.Moment], None],
    every: float,
) -> Result:
    """Run the load on one pool."""
    with closing(_open(url, pool_class)) as opened:
        engine = opened.engine
        load = demo.Load(engine, plan)
        try:
            load.begin()
        except exc.DBAPIError as error:
            raise Refusal(_unreachable(url, error)) from error
        pool = engine.pool
        before = pool.snapshot() if isinstance(pool, ManagedPool) else None
        requests = load.run(show, every)
        books = None
        if before is not None and isinstance(pool, ManagedPool):
            books = pool.snapshot() - before
        summary = demo.summarise(load, requests)
        if summary.errors == len(requests):
            raise Refusal(_unreachable(url, load.last_error))
        return Result(pool_class.__name__, summary, books)


class _Opened(NamedTuple):
    engine: Engine

    def close(self) -> None:
        if isinstance(self.engine.pool, ManagedPool):
            self.engine.pool.close()
        else:
            self.engine.dispose()


def _open(url: URL, pool_class: type[QueuePool] | type[ManagedPool]) -> _Opened:
    try:
        engine = create_engine(url, poolclass=pool_class, **demo.POOL_SETTINGS)
    except ImportError as error:
        extra = "psycopg" if url.get_driver_name() == "psycopg" else "postgres"
        raise Refusal(
            f"the driver of this URL is not installed ({error.name}): "
            f"pip install 'sqla_poolkit[{extra}]'"
        ) from error
    except exc.ArgumentError as error:
        raise Refusal(_without_secrets(str(error), url)) from error
    if url.get_backend_name() == "sqlite":
        demo.teach_sleep(engine)
    return _Opened(engine)


def _unreachable(url: URL, error: exc.SQLAlchemyError | None) -> str:
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    said = " ".join(str(cause).split())
    return f"no connection to {_place(url)}: {_without_secrets(said, url)}"


def _place(url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return f"SQLite file {url.database}"
    port = f":{url.port}" if url.port else ""
    return f"PostgreSQL at {url.host or 'the local socket'}{port}/{url.database or ''}"


def _without_secrets(said: str, url: URL) -> str:
    """Take out what a driver repeats of the password, which may also stand behind the ``?``."""
    secrets = [url.password, url.query.get("password")]
    for secret in secrets:
        for text in (secret,) if isinstance(secret, str) else secret or ():
            said = said.replace(text, "***")
    return said


# -- what is said ----------------------------------------------------------------------------


def _about(url: URL, plan: demo.Plan, *, is_ours: bool) -> Iterator[str]:
    settings = demo.POOL_SETTINGS
    limit = settings["pool_size"] + settings["max_overflow"]
    yield "QueuePool and ManagedPool under the same load"
    yield ""
    if url.get_backend_name() == "sqlite":
        place = "SQLite, a file in a temporary folder" if is_ours else _place(url)
        milliseconds = demo.SIMULATED_CONNECT_SECONDS * 1000
        yield f"  database   {place}"
        yield "  simulated  the time that queries take (an SQL function sleep) and that opening"
        yield f"             a connection takes ({milliseconds:.0f} ms); all else is measured as is"
    else:
        yield f"  database   {_place(url)}"
        yield "  simulated  the time that queries take (pg_sleep); all else is measured as is"
    yield f"  pools      {', '.join(f'{name}={value}' for name, value in settings.items())}"
    yield f"             ({limit} connections at most)"
    yield f"  load       {plan.threads} web workers with short requests and time to think,"
    yield f"             {plan.jobs} batch jobs that take a connection per row without a pause,"
    yield f"             {plan.reports} writers of long reports; after {plan.burst_at:g} s"
    yield f"             {plan.threads * 2} more callers at once; {plan.seconds:g} s for each pool"
    yield ""


Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def _figures(one: Result, other: Result) -> Table:
    """Lay out the figures of both pools side by side."""
    rows: list[Sequence[str]] = []

    def row(name: str, read: Callable[[demo.Summary], str]) -> None:
        rows.append((name, read(one.summary), read(other.summary)))

    row("requests served", lambda s: f"{s.served:,}")
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("longest", 1.0)):
        row(f"wait, {name}", lambda s, share=share: _time(s.wait(share)))  # type: ignore[misc]
    row("all waits together", lambda s: _time(s.wait_seconds))
    row("average wait, luckiest caller", lambda s: _time(s.luckiest_wait))
    row("average wait, unluckiest caller", lambda s: _time(s.unluckiest_wait))
    row("least / most served web worker", lambda s: f"{s.least_served} / {s.most_served}")
    row("Jain's index of web workers", lambda s: f"{s.jain:.3f}")
    row("timeouts", lambda s: f"{s.timeouts:,}")
    if one.summary.errors or other.summary.errors:
        row("errors of the database", lambda s: f"{s.errors:,}")
    row("connections opened", lambda s: f"{s.opened:,}")
    title = "A wait is the time from asking for a connection to having it"
    return title, ("", one.pool, other.pool), rows


def _labels(one: Result, other: Result) -> Table:
    """Lay out who made whom wait."""
    mine, theirs = one.summary.labels, other.summary.labels
    names = [name for name in {**mine, **theirs} if name != demo.NOBODY]
    rows = []
    for name in names:
        left, right = (labels.get(name, demo.Share()) for labels in (mine, theirs))
        rows.append(
            (
                name,
                f"{left.served:,}",
                f"{right.served:,}",
                _time(left.wait_seconds),
                _time(right.wait_seconds),
                _time(left.wait_caused_seconds),
                _time(right.wait_caused_seconds),
            )
        )
    heads = [
        f"{what}\n{pool}"
        for what in ("served", "waited", "made wait")
        for pool in (one.pool, other.pool)
    ]
    return "Who made whom wait", ("", *heads), rows


def _conclusions(one: Result, other: Result) -> Iterator[str]:
    """Say in words what the tables show, whichever way it came out."""
    mine, theirs = one.summary, other.summary
    yield (
        f"The longest wait was {_time(mine.wait(1))} on {one.pool} and "
        f"{_compared(mine.wait(1), theirs.wait(1))} on {other.pool}; the p99 "
        f"{_time(mine.wait(0.99))} and {_compared(mine.wait(0.99), theirs.wait(0.99))}, the "
        f"median {_time(mine.wait(0.5))} and {_compared(mine.wait(0.5), theirs.wait(0.5))}. "
        f"{other.pool} served {_more_or_fewer(mine.served, theirs.served)} requests"
        f"{_whose_requests(mine, theirs)}."
    )
    if mine.wait_seconds and theirs.wait_seconds:
        yield f"{_most_to_blame(one)} {_most_to_blame(other)}"
    if other.books is not None:
        times = other.books.checkout_time
        yield (
            f"{other.pool} knows these figures by itself, pool.snapshot() says: "
            f"{other.books.checkouts:,} checkouts, p50 {_time(times.quantile(0.5))}, "
            f"p99 {_time(times.quantile(0.99))}, longest {_time(times.max_seconds)}."
        )


def _compared(before: float, after: float) -> str:
    if max(before, after) < 0.001 or abs(before - after) <= 0.05 * max(before, after):
        return f"{_time(after)} (about the same)"
    if after < before:
        return f"{_time(after)} ({before / max(after, 1e-6):.1f} times less)"
    return f"{_time(after)} ({after / max(before, 1e-6):.1f} times more)"


def _more_or_fewer(before: int, after: int) -> str:
    if abs(after - before) <= 0.01 * max(before, 1):
        return "as many"
    return f"{abs(after - before) / max(before, 1):.0%} {'more' if after > before else 'fewer'}"


def _whose_requests(mine: demo.Summary, theirs: demo.Summary) -> str:
    """Name the label whose share changed most, and what all others got."""
    changes = {
        name: theirs.labels.get(name, demo.Share()).served - share.served
        for name, share in mine.labels.items()
    }
    name, change = max(changes.items(), key=lambda item: abs(item[1]))
    others = sum(changes.values()) - change
    return f": {change:+,} of {name!r}, {others:+,} of all others" if change else ""


def _most_to_blame(result: Result) -> str:
    labels = result.summary.labels
    name = max(labels, key=lambda name: labels[name].wait_caused_seconds)
    share = labels[name]
    part = share.wait_caused_seconds / result.summary.wait_seconds
    return (
        f"On {result.pool} {name!r} made others wait most, {part:.0%} of all waiting, and waited "
        f"{_time(share.wait_seconds)} itself."
    )


def _time(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:,.1f} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


# -- where it is said ------------------------------------------------------------------------


class Plain:
    """Lines of text, for logs and pipes."""

    every = PLAIN_SECONDS

    def say(self, line: str) -> None:
        """Print a line or a paragraph."""
        print(_wrapped(line), flush=True)

    def table(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table."""
        print(title)
        lines = [heads, *rows]
        split = [[cell.split("\n") for cell in line] for line in lines]
        flat = [
            [part[level] if level < len(part) else "" for part in line]
            for line in split
            for level in range(max(len(part) for part in line))
        ]
        widths = [max(len(cell) for cell in column) for column in zip(*flat, strict=True)]
        for line in flat:
            first, *others = (
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            print("  " + "  ".join([first, *others]).rstrip())

    def running(
        self, pool: str, plan: demo.Plan
    ) -> AbstractContextManager[Callable[[demo.Moment], None]]:
        """Return what shows how a run goes."""
        self.say(f"{pool} runs for {plan.seconds:g} s ...")

        def show(now: demo.Moment) -> None:
            self.say(
                f"  {now.seconds:5.1f} s: {now.waiting} waiting, {now.checked_out} checked out, "
                f"{now.idle} idle, {now.open} open, p99 so far {_time(now.p99_seconds)}, "
                f"longest wait {_time(now.longest_seconds)}"
            )

        return nullcontext(show)


def _wrapped(line: str) -> str:
    import textwrap

    return line if len(line) <= 100 or line.startswith(" ") else textwrap.fill(line, 100)
