"""The ``poolkit`` command."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from .demo.load import Plan
from .demo.run import Refusal, run_demo
from .demo.screens import Plain, Rich, Screen

__all__ = ["main"]

DONE, FAILED, NOT_POSSIBLE, STOPPED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    1 says that the database could not be used, 2 that the arguments are wrong or something is
    not installed.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return DONE
    try:
        return _demo(options)
    except Refusal as refusal:
        print(f"poolkit: {refusal}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("poolkit: stopped", file=sys.stderr)
        return STOPPED


def _demo(options: argparse.Namespace) -> int:
    screen: Screen = Plain(sys.stdout)
    if not options.plain:
        try:
            rich = Rich()
        except ImportError:
            print(
                "poolkit: the live table needs the package rich: pip install 'sqla_poolkit[cli]' "
                "(or run poolkit demo --plain, which does without)",
                file=sys.stderr,
            )
            return NOT_POSSIBLE
        if rich.is_terminal:
            screen = rich
    plan = Plan(seconds=options.seconds, threads=options.threads)
    run_demo(plan, screen, options.url, is_async=options.is_async)
    return DONE


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Complain about the arguments; one of them may be a URL with a password in it."""
        super().error(re.sub(r"//\S*@", "//***@", message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="poolkit", description="See what a connection pool does.")
    commands = parser.add_subparsers(
        dest="command", metavar="command", title="commands", parser_class=_Parser
    )
    demo = commands.add_parser(
        "demo",
        help="QueuePool and ManagedPool under the same load, side by side",
        description="Run the same mixed load first on SQLAlchemy's QueuePool, then on ManagedPool "
        "with the same limits; show who waits how long, and who makes whom wait.",
    )
    demo.add_argument(
        "--url",
        help="an SQLite or PostgreSQL database, such as postgresql+psycopg2://me@localhost/test; "
        "nothing is written to it (default: an SQLite file in a temporary folder)",
    )
    demo.add_argument(
        "--async",
        dest="is_async",
        action="store_true",
        help="tasks instead of threads, on AsyncAdaptedQueuePool and AsyncManagedPool (default "
        "with it: SQLite through aiosqlite; a driver for threads is replaced by asyncpg)",
    )
    demo.add_argument(
        "--seconds",
        type=_between(0.5, 600, float),
        default=Plan.seconds,
        help="how long the load lasts on each pool (default: %(default)g)",
    )
    demo.add_argument(
        "--threads",
        type=_between(1, 500, int),
        default=Plan.threads,
        help="web workers; twice as many callers more come at half time (default: %(default)d)",
    )
    demo.add_argument("--plain", action="store_true", help="lines of text instead of a live table")
    return parser


def _between(low: float, high: float, number: Callable[[str], float]) -> Callable[[str], float]:
    def check(value: str) -> float:
        try:
            given = number(value)
        except ValueError:
            given = math.nan
        if not low <= given <= high:
            raise argparse.ArgumentTypeError(f"{value!r} is not a number from {low} to {high}")
        return given

    return check
