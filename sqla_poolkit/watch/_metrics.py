"""What is exported, each metric once: its name, unit, kind, and how it is read from a snapshot.

The names that begin with ``db.client.connection`` are OpenTelemetry's semantic conventions for
pools (1.44, in development there); those that begin with ``sqlalchemy.pool`` are our own.  The
exporters translate them into the spelling of their own world, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import add
from typing import Literal, get_args

from ..core.histogram import Histogram
from ..core.slots import CloseReason
from ..core.snapshot import HolderTotals, PoolSnapshot
from .health import STATUSES, judge

__all__ = ["METRICS", "METRICS_BY_NAME", "OF_LABELS", "POOL", "STATE", "Attributes", "Metric"]

POOL = "db.client.connection.pool.name"
STATE = "db.client.connection.state"

Attributes = tuple[str, ...]
Points = Iterable[tuple[Attributes, float]]

# Seconds.  A pool's own timeout is put in where it is missing, so that waits in vain show.
WAITS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
CONNECTS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
USES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300)


@dataclass(frozen=True)
class Metric:
    """One metric; ``attributes`` are the names of what tells its points apart beside the pool."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    unit: str
    """As OpenTelemetry spells units (UCUM)."""
    help: str
    points: Callable[[PoolSnapshot], Points] | None = None
    """Reads a gauge or a counter; what a pool cannot know is left out."""
    times: Callable[[PoolSnapshot], Histogram | None] | None = None
    """Reads a histogram."""
    attributes: Attributes = ()
    boundaries: tuple[float, ...] = ()
    has_timeout: bool = False
    """Whether the pool's timeout is one of the boundaries."""
    merged_by: Callable[[float, float], float] = add
    """How the values of several processes become one; ``max`` where a sum would mean nothing."""


def _one(value: float | None) -> Points:
    return () if value is None else (((), value),)


def _field(name: str) -> Callable[[PoolSnapshot], Points]:
    return lambda reading: _one(getattr(reading, name))


def _each(**fields: str) -> Callable[[PoolSnapshot], Points]:
    """Read one point per field; the keyword is its attribute."""

    def points(reading: PoolSnapshot) -> Iterator[tuple[Attributes, float]]:
        for attribute, name in fields.items():
            value = getattr(reading, name)
            if value is not None:
                yield (attribute,), value

    return points


def _count(reading: PoolSnapshot) -> Points:
    if _keeps_idle(reading):
        yield ("idle",), reading.idle
    yield ("used",), reading.open - reading.idle


def _keeps_idle(reading: PoolSnapshot) -> bool:
    """Tell whether it is a pool at all: NullPool neither keeps nor limits anything."""
    return not reading.is_unlimited or "pool_size" in reading.settings


def _most_idle(reading: PoolSnapshot) -> Points:
    """Read how many may stay open unused: QueuePool closes those above ``pool_size``."""
    if "max_overflow" not in reading.settings:
        return _one(reading.max_size)
    return _one(reading.settings["pool_size"] or None)


def _least_idle(reading: PoolSnapshot) -> Points:
    return _one(reading.min_size) if _keeps_idle(reading) else ()


def _closes(reading: PoolSnapshot) -> Points:
    # a counter that is not there before its first event seems never to have grown
    never = dict.fromkeys(get_args(CloseReason), 0)
    return [((reason,), number) for reason, number in (never | dict(reading.closes)).items()]


def _oldest_checkout(reading: PoolSnapshot) -> Points:
    return _one(max((slot.held_seconds or 0.0 for slot in reading.slots), default=0.0))


def _health(reading: PoolSnapshot) -> Points:
    now = judge(reading).status
    return [((status,), float(status == now)) for status in STATUSES]


def _waits(reading: PoolSnapshot) -> Histogram | None:
    """Read all times from asking to having, those in vain among them."""
    known = [
        times for times in (reading.checkout_time, reading.failed_wait_time) if times is not None
    ]
    return sum(known[1:], known[0]) if known else None


def _queue_times(reading: PoolSnapshot) -> Histogram | None:
    if reading.wait_time is None or reading.failed_wait_time is None:
        return None
    return reading.wait_time + reading.failed_wait_time


def _of_labels(get: Callable[[HolderTotals], float | None]) -> Callable[[PoolSnapshot], Points]:
    def points(reading: PoolSnapshot) -> Points:
        for label, row in reading.labels.items():
            value = get(row)
            if value is not None:
                yield (label,), value

    return points


METRICS = (
    Metric(
        "db.client.connection.count",
        "gauge",
        "{connection}",
        "Connections that are open, by state.",
        _count,
        attributes=(STATE,),
    ),
    Metric(
        "db.client.connection.idle.max",
        "gauge",
        "{connection}",
        "Most connections that may be open and unused.",
        _most_idle,
    ),
    Metric(
        "db.client.connection.idle.min",
        "gauge",
        "{connection}",
        "Connections that are kept open.",
        _least_idle,
    ),
    Metric(
        "db.client.connection.max",
        "gauge",
        "{connection}",
        "Most connections that may be open; absent if there is no limit.",
        _field("max_size"),
    ),
    Metric(
        "db.client.connection.pending_requests",
        "gauge",
        "{request}",
        "Callers who wait for a connection at this moment.",
        _field("waiting"),
    ),
    Metric(
        "db.client.connection.timeouts",
        "counter",
        "{timeout}",
        "Requests that got no connection within the pool's timeout.",
        _field("timeouts"),
    ),
    Metric(
        "db.client.connection.create_time",
        "histogram",
        "s",
        "Time it took to open a connection.",
        times=lambda reading: reading.connect_time,
        boundaries=CONNECTS,
    ),
    Metric(
        "db.client.connection.wait_time",
        "histogram",
        "s",
        "Time from asking for a connection to having it, or to giving up in the queue.",
        times=_waits,
        boundaries=WAITS,
        has_timeout=True,
    ),
    Metric(
        "db.client.connection.use_time",
        "histogram",
        "s",
        "Time from taking a connection to giving it back.",
        times=lambda reading: reading.use_time,
        boundaries=USES,
    ),
    Metric(
        "sqlalchemy.pool.queue_time",
        "histogram",
        "s",
        "Time in the queue, of requests that had to queue.",
        times=_queue_times,
        boundaries=WAITS,
        has_timeout=True,
    ),
    Metric(
        "sqlalchemy.pool.slots",
        "gauge",
        "{slot}",
        "Places in the pool that are taken, by the state of their connection.",
        _each(
            idle="idle",
            checked_out="checked_out",
            checking="checking",
            connecting="connecting",
            closing="closing",
        ),
        attributes=("state",),
    ),
    Metric(
        "sqlalchemy.pool.requests",
        "counter",
        "{request}",
        "Requests for a connection that have ended, by outcome.",
        _each(
            ok="checkouts",
            timeout="timeouts",
            rejected="rejected",
            cancelled="cancelled",
            error="failed",
            unavailable="unavailable",
        ),
        attributes=("outcome",),
    ),
    Metric(
        "sqlalchemy.pool.connects",
        "counter",
        "{attempt}",
        "Attempts to connect, by outcome.",
        _each(ok="connects", error="connect_failures"),
        attributes=("outcome",),
    ),
    Metric(
        "sqlalchemy.pool.closed",
        "counter",
        "{connection}",
        "Connections that were closed, by reason.",
        _closes,
        attributes=("reason",),
    ),
    Metric(
        "sqlalchemy.pool.pings",
        "counter",
        "{ping}",
        "Pings of connections.",
        _field("pings"),
    ),
    Metric(
        "sqlalchemy.pool.ping_failures",
        "counter",
        "{connection}",
        "Connections that were found dead before they were handed out, by a look or by a ping.",
        _field("ping_failures"),
    ),
    Metric(
        "sqlalchemy.pool.reset_failures",
        "counter",
        "{connection}",
        "Connections whose reset on return failed.",
        _field("reset_failures"),
    ),
    Metric(
        "sqlalchemy.pool.invalidations",
        "counter",
        "{connection}",
        "Connections that were invalidated.",
        _field("invalidations"),
    ),
    Metric(
        "sqlalchemy.pool.detached",
        "counter",
        "{connection}",
        "Connections that their holders kept for themselves.",
        _field("detached"),
    ),
    Metric(
        "sqlalchemy.pool.forgotten",
        "counter",
        "{connection}",
        "Connections that were let go without closing, after a fork or with their event loop.",
        _field("forgotten"),
    ),
    Metric(
        "sqlalchemy.pool.observer_errors",
        "counter",
        "{error}",
        "Events whose observer raised.",
        _field("observer_errors"),
    ),
    Metric(
        "sqlalchemy.pool.oldest_wait",
        "gauge",
        "s",
        "How long the first caller in the queue has waited.",
        _field("oldest_wait_seconds"),
        merged_by=max,
    ),
    Metric(
        "sqlalchemy.pool.oldest_checkout",
        "gauge",
        "s",
        "How long the connection held longest has been held.",
        _oldest_checkout,
        merged_by=max,
    ),
    Metric(
        "sqlalchemy.pool.checked_out_peak",
        "gauge",
        "{connection}",
        "Most connections that one process had checked out at a time.",
        _field("peak_checked_out"),
        merged_by=max,
    ),
    Metric(
        "sqlalchemy.pool.waiting_peak",
        "gauge",
        "{request}",
        "Most callers of one process that waited at a time.",
        _field("peak_waiting"),
        merged_by=max,
    ),
    Metric(
        "sqlalchemy.pool.health",
        "gauge",
        "{process}",
        "Processes whose pool is in this state: ok, busy, stuck, down.",
        _health,
        attributes=("status",),
    ),
    Metric(
        "sqlalchemy.pool.info",
        "gauge",
        "{process}",
        "Processes that have this pool, with its class.",
        lambda reading: [((reading.pool_class,), 1)],
        attributes=("class",),
    ),
)

OF_LABELS = (
    Metric(
        "sqlalchemy.pool.label.checkouts",
        "counter",
        "{request}",
        "Checkouts, by held_by label.",
        _of_labels(lambda row: row.checkouts),
        attributes=("label",),
    ),
    Metric(
        "sqlalchemy.pool.label.use_time",
        "counter",
        "s",
        "Time for which connections were held, by held_by label.",
        _of_labels(lambda row: row.use_seconds),
        attributes=("label",),
    ),
    Metric(
        "sqlalchemy.pool.label.wait_time",
        "counter",
        "s",
        "Time in the queue, by held_by label.",
        _of_labels(lambda row: row.wait_seconds),
        attributes=("label",),
    ),
    Metric(
        "sqlalchemy.pool.label.wait_caused",
        "counter",
        "s",
        "Time that others waited because of the holders with this held_by label.",
        _of_labels(lambda row: row.wait_caused_seconds),
        attributes=("label",),
    ),
)
"""One series per label, of which a program may have many; exported where asked for."""

METRICS_BY_NAME = {metric.name: metric for metric in (*METRICS, *OF_LABELS)}
