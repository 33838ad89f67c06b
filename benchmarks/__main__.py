"""The command line: ``python -m benchmarks [names...]``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._harness import Plan
from ._postgres import server_for
from ._report import Table, header

NAMES = (
    "uncontended",
    "contended",
    "fairness",
    "spike",
    "cold",
    "deadline",
    "failed_connect",
    "books",
    "blame",
    "monitoring",
    "rollover",
    "memory",
    "waiters",
    "liveness",
    "terminated",
    "restart",
    "frozen",
    "dropped",
    "down",
    "turnover",
    "async_uncontended",
    "async_fairness",
    "async_spike",
    "async_postgresql",
    "async_cancellation",
    "async_loops",
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="a look in about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures as well")
    parser.add_argument(
        "--postgres",
        default="auto",
        metavar="URL",
        help="a server's URL; 'auto' starts one; 'none' leaves those figures out (not met)",
    )
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is not met")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; choose from {NAMES}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen benchmarks; return the exit code."""
    options = parse(arguments)
    plan = Plan(options.quick, server_for(options.postgres))
    about = header()
    for name, value in about.items():
        print(f"{name + ':':14}{value}")
    if plan.quick:
        print("a quick run: few repetitions, short loads; do not quote these figures")
    tables: dict[str, Table] = {}
    seconds: dict[str, float] = {}
    crashed: list[str] = []
    for name in [name for name in NAMES if not options.names or name in options.names]:
        begin = time.perf_counter()
        try:
            table = importlib.import_module(f"benchmarks.{name}").run(plan)
        except Exception:  # noqa: BLE001  # one crash must not hide the other benchmarks
            crashed.append(name)
            print(f"\n{name}: crashed\n{traceback.format_exc()}", flush=True)
            continue
        seconds[name] = time.perf_counter() - begin
        tables[name] = table
        print("\n" + "\n".join(table.lines()) + f"\n  [{name}: {seconds[name]:.1f} s]", flush=True)
    missed = [
        f"{name}: {row.figure}"
        for name, table in tables.items()
        for row in table.rows
        if row.verdict not in ("", "met")
    ]
    summarise(tables, missed, crashed)
    if options.json:
        options.json.write_text(json.dumps(report(about, plan, tables, seconds), indent=2) + "\n")
    if crashed:
        return 2
    return int(options.check and bool(missed))


def summarise(tables: dict[str, Table], missed: list[str], crashed: list[str]) -> None:
    """Print what was met and what was not."""
    barred = sum(row.bar is not None for table in tables.values() for row in table.rows)
    print(f"\n{barred - len(missed)} of {barred} bars met")
    for line in missed:
        print(f"  not met: {line}")
    for name in crashed:
        print(f"  crashed: {name}")


def report(
    about: dict[str, str], plan: Plan, tables: dict[str, Table], seconds: dict[str, float]
) -> dict[str, Any]:
    """Collect everything for JSON."""
    return {
        **about,
        "quick": plan.quick,
        "benchmarks": {
            name: {
                "title": table.title,
                "seconds": seconds[name],
                "rows": [row.to_dict() for row in table.rows],
                "notes": table.notes,
            }
            for name, table in tables.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
