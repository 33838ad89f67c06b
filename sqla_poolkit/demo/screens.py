"""Where a demo shows itself: a live table in a terminal, or lines of text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, Protocol, TextIO

from .load import Moment

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = ["Plain", "Rich", "Screen", "Table", "duration"]

Show = Callable[[Moment], None]


class Table(NamedTuple):
    """A table of text; the first cell of each line stands left, the others right."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


class Screen(Protocol):
    """What a demo needs to show itself."""

    every: float
    """How often the state of a run is worth showing, in seconds."""

    def say(self, paragraph: str = "") -> None:
        """Show a line or a paragraph."""

    def table(self, table: Table) -> None:
        """Show a table."""

    def running(self, pool: str, seconds: float) -> AbstractContextManager[Show]:
        """Show, during a block, how a run on this pool goes."""


def duration(seconds: float) -> str:
    """Return a duration with as many digits as one cares for."""
    if seconds >= 10:
        return f"{seconds:,.1f} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


class Plain:
    """Lines of text, for logs, pipes and machines without rich."""

    every = 2.0
    _WIDTH = 90

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def say(self, paragraph: str = "") -> None:
        """Write a paragraph; what is indented stays as it is."""
        if not paragraph.startswith(" "):
            paragraph = textwrap.fill(paragraph, self._WIDTH)
        self._out.write(f"{paragraph}\n")
        self._out.flush()

    def table(self, table: Table) -> None:
        """Write a table."""
        self.say(table.title)
        lines = [flat for line in (table.heads, *table.rows) for flat in _flat(line)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for first, *others in lines:
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            self.say("  " + "  ".join([first.ljust(widths[0]), *cells]).rstrip())

    def running(self, pool: str, seconds: float) -> AbstractContextManager[Show]:
        """Write a line now and then."""
        self.say(f"{pool}, {seconds:g} s:")

        def show(now: Moment) -> None:
            self.say(
                f"  {now.seconds:4.1f} s  {now.waiting:3} waiting, {now.checked_out} checked out, "
                f"{now.idle} idle, {now.open} open; p99 so far {duration(now.p99_seconds)}, "
                f"longest wait {duration(now.longest_seconds)}"
            )

        return nullcontext(show)


def _flat(line: Sequence[str]) -> Iterator[list[str]]:
    """Split the cells of a line that have several lines."""
    cells = [cell.split("\n") for cell in line]
    height = max(map(len, cells))
    for level in range(height):
        # short cells stand on the last line
        yield [
            cell[level - height + len(cell)] if level >= height - len(cell) else ""
            for cell in cells
        ]


class Rich:
    """A live table in a terminal, with the package rich."""

    every = 0.25

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._moments: dict[str, Moment] = {}

    @property
    def is_terminal(self) -> bool:
        """Whether there is somebody who sees a table change."""
        return self._console.is_terminal

    def say(self, paragraph: str = "") -> None:
        """Print a line or a paragraph, as wide as the terminal."""
        self._console.print(paragraph, markup=False)

    def table(self, table: Table) -> None:
        """Print a table."""
        self._console.print(_rich_table(table))

    @contextmanager
    def running(self, pool: str, seconds: float) -> Iterator[Show]:
        """Keep a table up to date; what the first pool came to stays beside the second."""
        from rich.live import Live

        with Live(console=self._console, auto_refresh=False, transient=True) as live:

            def show(now: Moment) -> None:
                self._moments[pool] = now
                table = _live_table(pool, seconds, self._moments)
                live.update(_rich_table(table), refresh=True)

            yield show


def _live_table(pool: str, seconds: float, moments: dict[str, Moment]) -> Table:
    states = list(moments.values())

    def row(name: str, read: Callable[[Moment], str]) -> Sequence[str]:
        return (name, *map(read, states))

    return Table(
        f"{pool} runs: {states[-1].seconds:.0f} of {seconds:g} s",
        ("", *moments),
        [
            row("waiting", lambda now: str(now.waiting)),
            row("checked out", lambda now: str(now.checked_out)),
            row("idle", lambda now: str(now.idle)),
            row("open", lambda now: str(now.open)),
            row("served so far", lambda now: f"{now.served:,}"),
            row("p99 so far", lambda now: duration(now.p99_seconds)),
            row("longest wait", lambda now: duration(now.longest_seconds)),
        ],
    )


def _rich_table(table: Table) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable

    made = RichTable(
        title=table.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=0,  # so that the widest table fits into 80 columns
        show_edge=False,
        min_width=len(table.title),
    )
    for number, head in enumerate(table.heads):
        made.add_column(head, justify="right" if number else "left", no_wrap=not number)
    for cells in table.rows:
        made.add_row(*cells)
    return made
