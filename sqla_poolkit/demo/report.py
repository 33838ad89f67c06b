"""What a demo says: on what it runs, what came out, and what that means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ..core.snapshot import PoolInterval
from .figures import NOBODY, Share, Summary
from .load import POOL_SETTINGS, SIMULATED_CONNECT_SECONDS, Load
from .screens import Table, duration

__all__ = ["Result", "about", "conclusions", "figures", "who_made_whom_wait"]

# a difference as small as that is the machine's mood
_SAME = 0.05
_SAME_SECONDS = 0.001


class Result(NamedTuple):
    """What came out for one pool."""

    pool: str
    summary: Summary
    books: PoolInterval | None
    """What the pool itself wrote down; SQLAlchemy's pools write nothing down."""


def about(place: str, loads: Sequence[Load], *, is_sqlite: bool) -> Iterator[str]:
    """Say on what the load runs, and what of it is simulated."""
    plan = loads[0].plan
    limit = POOL_SETTINGS["pool_size"] + POOL_SETTINGS["max_overflow"]
    yield f"The same load on {' and on '.join(load.name for load in loads)}"
    yield ""
    yield f"  database   {place}"
    if is_sqlite:
        milliseconds = SIMULATED_CONNECT_SECONDS * 1000
        yield "  simulated  how long queries take (an SQL function sleep) and how long opening"
        yield f"             a connection takes ({milliseconds:.0f} ms more); the rest is as it is"
    else:
        yield "  simulated  how long queries take (pg_sleep); the rest is as it is"
    yield f"  pools      {', '.join(f'{name}={value}' for name, value in POOL_SETTINGS.items())}"
    yield f"             (at most {limit} connections)"
    yield f"  load       {plan.threads} web workers: short requests, time to think"
    yield f"             {plan.jobs} jobs: row after row without a pause, a checkout for each"
    yield f"             {plan.reports} reports: long queries"
    yield f"             {plan.burst} callers more, all at once, after {plan.burst_at:g} s"
    yield f"  callers    {loads[0].each_caller}"
    yield "  measured   by the callers; a wait is the time from asking for a connection"
    yield "             to having it"
    yield ""


def figures(one: Result, other: Result) -> Table:
    """Lay the figures of both pools side by side."""
    rows: list[Sequence[str]] = []

    def row(name: str, read: Callable[[Summary], str]) -> None:
        rows.append((name, read(one.summary), read(other.summary)))

    row("requests served", lambda run: f"{run.served:,}")
    row("wait p50", lambda run: duration(run.wait(0.5)))
    row("wait p95", lambda run: duration(run.wait(0.95)))
    row("wait p99", lambda run: duration(run.wait(0.99)))
    row("wait max", lambda run: duration(run.wait(1)))
    row("all waits together", lambda run: duration(run.wait_seconds))
    row("timeouts", lambda run: f"{run.timeouts:,}")
    if one.summary.errors or other.summary.errors:
        row("errors of the database", lambda run: f"{run.errors:,}")
    row("connections opened", lambda run: f"{run.opened:,}")
    row("fairness: least / most served web worker", lambda r: f"{r.least_served} / {r.most_served}")
    row("fairness: Jain's index of web workers", lambda run: f"{run.jain:.3f}")
    row("fairness: average wait, luckiest caller", lambda run: duration(run.luckiest_wait))
    row("fairness: average wait, unluckiest caller", lambda run: duration(run.unluckiest_wait))
    return Table("What the callers measured", ("", one.pool, other.pool), rows)


def who_made_whom_wait(one: Result, other: Result) -> Table:
    """Lay out per label who was served, who waited, and who made others wait."""
    both = [one.summary.labels, other.summary.labels]
    names = sorted(
        {name for labels in both for name in labels if name != NOBODY},
        key=lambda name: -sum(_share(labels, name).wait_caused_seconds for labels in both),
    )
    rows = []
    for name in names:
        pair = [_share(labels, name) for labels in both]
        served = [f"{share.served:,}" for share in pair]
        waited = [duration(share.wait_seconds) for share in pair]
        caused = [duration(share.wait_caused_seconds) for share in pair]
        rows.append((name, *served, *waited, *caused))
    heads = [
        f"{what}\n{pool}"
        for what in ("served", "waited", "made wait")
        for pool in _stacked([one.pool, other.pool])
    ]
    title = "Who made whom wait (at each instant the waiting is split over those who hold)"
    return Table(title, ("", *heads), rows)


def _stacked(pools: Sequence[str]) -> list[str]:
    """Break the long names of asyncio's pools into lines as short as the names of the others."""
    stacks = [re.sub(r"(?<=[a-z])(?=[A-Z])(?!Pool)", "\n", pool) for pool in pools]
    height = max(stack.count("\n") for stack in stacks)
    return ["\n" * (height - stack.count("\n")) + stack for stack in stacks]


def _share(labels: dict[str, Share], name: str) -> Share:
    return labels.get(name, Share())


def conclusions(one: Result, other: Result) -> Iterator[str]:
    """Say in words what the tables show, whichever way it came out."""
    mine, theirs = one.summary, other.summary
    yield (
        f"{other.pool} against {one.pool}: the longest wait {_compared(mine, theirs, 1)}, the p99 "
        f"{_compared(mine, theirs, 0.99)}, the median {_compared(mine, theirs, 0.5)}. "
        f"It served {_more_or_fewer(mine, theirs)}."
    )
    if mine.wait_seconds and theirs.wait_seconds:
        yield f"{_most_to_blame(one)} {_most_to_blame(other)}"
    times = None if other.books is None else other.books.checkout_time
    if other.books is not None and times is not None:
        yield (
            f"{other.pool} knows by itself what its callers measured, pool.snapshot() says: "
            f"{other.books.checkouts:,} checkouts, p50 {duration(times.quantile(0.5))}, "
            f"p99 {duration(times.quantile(0.99))}, max {duration(times.max_seconds)}."
        )


def _compared(before: Summary, after: Summary, q: float) -> str:
    old, new = before.wait(q), after.wait(q)
    pair = f"{duration(new)} instead of {duration(old)}"
    if abs(old - new) <= max(_SAME * max(old, new), _SAME_SECONDS):
        return f"{pair} (about the same)"
    if new < old:
        return f"{pair} ({old / new:.1f} times shorter)" if new > 0.0001 else f"{pair} (shorter)"
    return f"{pair} ({new / old:.1f} times longer)" if old > 0.0001 else f"{pair} (longer)"


def _more_or_fewer(before: Summary, after: Summary) -> str:
    """Compare the requests served, and name the label whose part changed most."""
    changes = {
        name: _share(after.labels, name).served - _share(before.labels, name).served
        for name in {**before.labels, **after.labels}
    }
    change = after.served - before.served
    if abs(change) <= _SAME / 5 * before.served:
        total = "about as many requests"
    else:
        word = "more" if change > 0 else "fewer"
        total = f"{abs(change) / max(1, before.served):.0%} {word} requests"
    name, most = max(changes.items(), key=lambda item: abs(item[1]))
    return f"{total} ({most:+,} of {name!r}, {change - most:+,} of all others)"


def _most_to_blame(result: Result) -> str:
    labels = result.summary.labels
    name = max(labels, key=lambda name: labels[name].wait_caused_seconds)
    part = labels[name].wait_caused_seconds / result.summary.wait_seconds
    return (
        f"On {result.pool} {name!r} made others wait most ({part:.0%} of all waiting) and waited "
        f"{duration(labels[name].wait_seconds)} itself."
    )
