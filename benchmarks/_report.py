"""Figures with their bars, as plain text tables and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("sqla_poolkit", "SQLAlchemy", "psycopg2-binary", "psycopg", "psycopg_pool", "asyncpg")


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure has to reach."""

    limit: float
    at_least: bool = False

    def is_met_by(self, measured: float) -> bool:
        """Say whether the unrounded figure reaches the bar."""
        return measured >= self.limit if self.at_least else measured <= self.limit


def at_most(limit: float) -> Bar:
    """Make a bar that a figure must not exceed."""
    return Bar(limit)


def at_least(limit: float) -> Bar:
    """Make a bar that a figure must not fall below."""
    return Bar(limit, at_least=True)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: a value per pool, and if there is a bar, what is held against it.

    `samples` are the repetitions behind `measured`; the table shows their range. A bar without a
    measured figure counts as not met: nothing is passed by not being run.
    """

    figure: str
    values: Mapping[str, float | str] = field(default_factory=dict)
    unit: str = "{:.2f}"
    measured: float | None = None
    measured_unit: str = "{:.2f}"
    bar: Bar | None = None
    samples: Sequence[float] = ()

    @property
    def verdict(self) -> str:
        """Say ``met``, ``NOT MET``, ``not measured``, or nothing where there is no bar."""
        if self.bar is None:
            return ""
        if self.measured is None:
            return "not measured"
        return "met" if self.bar.is_met_by(self.measured) else "NOT MET"

    def cells(self, columns: Sequence[str]) -> list[str]:
        """Format the row for a table with these pools as columns."""
        values = [self.values.get(name, "") for name in columns]
        shown = [v if isinstance(v, str) else self.unit.format(v) for v in values]
        measured = "" if self.measured is None else self.measured_unit.format(self.measured)
        if len(self.samples) > 1:
            ends = (self.measured_unit.format(end(self.samples)) for end in (min, max))
            measured += " ({}..{})".format(*ends)
        bar = ""
        if self.bar is not None:
            sign = ">=" if self.bar.at_least else "<="
            bar = f"{sign} {self.measured_unit.format(self.bar.limit)}"
        return [self.figure, *shown, measured, bar, self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """Return the row for JSON, unrounded."""
        return {
            "figure": self.figure,
            "values": dict(self.values),
            "measured": self.measured,
            "samples": list(self.samples),
            "bar": None if self.bar is None else self.bar.limit,
            "verdict": self.verdict,
        }


def ratio_row(figure: str, ratios: Sequence[float], bar: Bar | None = None) -> Row:
    """Make a row of the median of ratios taken round by round."""
    return Row(figure, measured=statistics.median(ratios), bar=bar, samples=ratios)


@dataclass(slots=True)
class Table:
    """The result of one benchmark."""

    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Lay the table out."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row.values))
        head = ["", *columns, "measured", "bar", ""]
        cells = [head, *(row.cells(columns) for row in self.rows)]
        widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
        yield self.title
        for number, row in enumerate(cells):
            first, *rest = [
                c.ljust(w) if i in (0, len(row) - 1) else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            yield "  ".join((first, *rest)).rstrip()
            if number == 0:
                yield "  ".join("-" * width for width in widths).rstrip()
        yield from (f"  {note}" for note in self.notes)


def header() -> dict[str, str]:
    """Describe the machine and the versions, without which a figure means nothing."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    found = {"Python": f"{platform.python_implementation()} {platform.python_version()}"}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "from the source tree" if library == LIBRARIES[0] else "not installed"
    return {
        "machine": f"{_cpu_model()}, {cores} cores, {platform.system()} {platform.machine()}",
        "load average": load,
        "versions": ", ".join(f"{name} {version}" for name, version in found.items()),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown cpu"
