"""What happens in a pool as lines of a log, through structlog where the application uses it.

Without any call the warnings of all pools go to the logger ``sqla_poolkit`` of the standard
library, which is silent until the application configures logging.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..core import events
from ..core.events import PoolEvent, event_classes
from ..core.journal import Journal
from ..core.snapshot import PoolSnapshot
from ..errors import ArgumentError
from ..pool import _sync
from ._snapshots import SnapshotTaker
from .observers import Mailbox, Observation, attach, keeper_of

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import Pool

__all__ = ["log_events"]

_LOGGER = "sqla_poolkit"
_LINES = 5
_WINDOW_SECONDS = 10.0

LEVELS: Mapping[type[PoolEvent], int] = {
    events.CheckoutWaited: logging.DEBUG,
    events.CheckoutTimedOut: logging.WARNING,
    events.CheckoutRejected: logging.WARNING,
    events.CheckoutCancelled: logging.DEBUG,
    events.CheckoutFailed: logging.DEBUG,
    events.CheckoutUnavailable: logging.INFO,
    events.PoolExhausted: logging.WARNING,
    events.PoolRecovered: logging.INFO,
    events.DeadlockFound: logging.ERROR,
    events.DatabaseLost: logging.ERROR,
    events.DatabaseFound: logging.INFO,
    events.GenerationRetired: logging.INFO,
    events.ConnectionOpened: logging.DEBUG,
    events.ConnectionClosed: logging.DEBUG,
    events.ConnectionLost: logging.DEBUG,
    events.ConnectionLeaked: logging.WARNING,
    events.ConnectFailed: logging.WARNING,
    events.HoldExceeded: logging.WARNING,
    events.HoldReturned: logging.INFO,
    events.SnapshotTaken: logging.INFO,
}
"""How important each event is."""

_NEVER_LIMITED = (events.SnapshotTaken,)

Line = tuple[int, str, dict[str, Any]]
Write = Callable[[int, str, dict[str, Any]], None]


class LogMailbox(Mailbox):
    """Writes events as lines, of each kind and pool five in ten seconds and then how many more.

    What is too much is counted where it happens, so that a flood costs next to nothing.
    """

    def __init__(self, level: int, logger: Any = None) -> None:
        self._logger = logger
        self._windows: dict[tuple[str, type[PoolEvent]], _Window] = {}
        kinds = [kind for kind in event_classes() if LEVELS[kind] >= level]
        super().__init__(self._write, kinds, self._close_windows)

    def put(self, event: PoolEvent, journal: Journal) -> None:
        """Keep an event to be written, or count it."""
        if self is _default:
            others = (reader for reader in journal.readers if reader is not self)
            if any(isinstance(log, LogMailbox) and log.wants(type(event)) for log in others):
                return  # somebody asked for a log of his own
        if isinstance(event, _NEVER_LIMITED):
            super().put(event, journal)
            return
        key = event.pool, type(event)
        window = self._windows.get(key)
        now = _sync.monotonic()
        if window is None or now >= window.ends_at:
            suppressed = 0 if window is None else window.suppressed
            self._windows[key] = window = _Window(now + _WINDOW_SECONDS, suppressed)
        if window.lines < _LINES:
            window.lines += 1
            super().put(event, journal)
        else:
            window.suppressed += 1

    def _write(self, event: PoolEvent) -> None:
        fields = _fields(event)
        window = self._windows.get((event.pool, type(event)))
        if window is not None and window.lines == 1 and window.suppressed:
            # of the window before; what is put meanwhile is not lost, for it is taken, not set to 0
            suppressed, window.suppressed = window.suppressed, 0
            fields["suppressed"] = suppressed
        self._emit(LEVELS[type(event)], event.name, fields)

    def _close_windows(self, is_last: bool) -> float | None:
        """Say how many were suppressed in windows that are over; return when the next one is."""
        now = _sync.monotonic()
        pause = None
        for (pool, kind), window in list(self._windows.items()):
            left = 0.0 if is_last else window.ends_at - now
            if left > 0:
                if window.suppressed:
                    pause = left if pause is None else min(pause, left)
            elif self._windows.pop((pool, kind), None) is window and window.suppressed:
                fields = {"pool": pool, "suppressed": window.suppressed}
                self._emit(LEVELS[kind], kind.name, fields)
        return pause

    def _emit(self, level: int, name: str, fields: dict[str, Any]) -> None:
        writer_to(self._logger)(level, name, fields)


class _Window:
    """Ten seconds of one kind of event in one pool."""

    __slots__ = ("ends_at", "lines", "suppressed")

    def __init__(self, ends_at: float, suppressed: int) -> None:
        self.ends_at = ends_at
        self.lines = 0
        self.suppressed = suppressed


def writer_to(logger: Any) -> Write:
    """Return what writes a line: to this logger, or to structlog if the application uses it."""
    if logger is None:
        structlog = sys.modules.get("structlog")
        if structlog is not None and structlog.is_configured():
            logger = structlog.get_logger(_LOGGER)
        else:
            logger = logging.getLogger(_LOGGER)
    if isinstance(logger, logging.Logger | logging.LoggerAdapter):
        return _StandardWriter(logger)
    return _StructlogWriter(logger)


class _StandardWriter:
    """Writes to the standard library's logging: ``name key=value ...``, and the values as extra."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def __call__(self, level: int, name: str, fields: dict[str, Any]) -> None:
        if not self._logger.isEnabledFor(level):
            return
        pairs = " ".join(f"{key}={_value(value)}" for key, value in fields.items())
        extra = {f"poolkit_{key}": value for key, value in fields.items()}
        self._logger.log(level, "%s %s", name, pairs, extra={"poolkit_event": name, **extra})


class _StructlogWriter:
    """Writes to a logger of structlog's, as flat keys."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def __call__(self, level: int, name: str, fields: dict[str, Any]) -> None:
        self._logger.log(level, name, **fields)


def _value(value: Any) -> str:
    text = "; ".join(value) if isinstance(value, tuple) else str(value)
    return repr(text) if not text or any(mark in text for mark in " ='\"\n") else text


def _fields(event: PoolEvent) -> dict[str, Any]:
    """Return what a line says of an event: what is known, seconds to the microsecond."""
    if isinstance(event, events.SnapshotTaken):
        return {"pool": event.pool, **_summary(event.snapshot)}
    values = event.to_dict()
    del values["event"], values["at"]
    return {key: _rounded(value) for key, value in values.items() if value is not None}


def _summary(snapshot: PoolSnapshot) -> dict[str, Any]:
    """Return a snapshot as a line: the gauges, the totals that tell of trouble, three quantiles."""
    names = (
        *("open", "idle", "checked_out", "connecting", "waiting", "oldest_wait_seconds"),
        *("max_size", "requests", "timeouts", "rejected", "unavailable", "connect_failures"),
    )
    values = {name: getattr(snapshot, name) for name in names}
    for name in ("checkout_time", "use_time"):
        histogram = getattr(snapshot, name)
        if histogram is not None and histogram.count:
            values[f"{name}_p50_seconds"] = histogram.quantile(0.5)
            values[f"{name}_p99_seconds"] = histogram.quantile(0.99)
    return {key: _rounded(value) for key, value in values.items() if value is not None}


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def log_events(
    engine: Engine | AsyncEngine | Pool | None = None,
    *,
    level: int = logging.INFO,
    logger: Any = None,
    snapshot_every: float | None = None,
) -> Observation:
    """Write what happens in a pool into a log.

    Of each kind of event and pool at most five lines are written in ten seconds, then one that
    says how many were ``suppressed``; the numbers of the snapshot count them all.  Lines of the
    standard library read ``checkout_timed_out pool=shop waited_seconds=30.0 ...`` and carry the
    same values as attributes (``record.poolkit_waited_seconds``); structlog gets them as keys.

    Events that are written here are no longer written by default.

    :param engine: an engine, or a pool; None is every pool of the process that keeps books.
    :param level: only events at least as important; ``logging.DEBUG`` tells of each connection.
    :param logger: where to; a logger of the standard library or of structlog.  Default: structlog
        if the application has configured it when a line is written, else the standard library's
        logger ``sqla_poolkit``.
    :param snapshot_every: seconds between lines that sum up the state of the pool.  Default: none.
    :return: what ends it: ``stop()``, or a ``with`` block.
    :raises sqlalchemy.exc.ArgumentError: for an engine whose pool keeps no books.
    """
    if not isinstance(level, int):
        raise ArgumentError(f"level={level!r} is not possible; it must be a number as logging.INFO")
    if snapshot_every is not None and snapshot_every <= 0:
        raise ArgumentError(
            f"snapshot_every={snapshot_every!r} is not possible; it must be above 0"
        )
    observation = attach(LogMailbox(level, logger), engine)
    if snapshot_every is not None:
        keeper = None if engine is None else keeper_of(engine)
        observation.on_stop(SnapshotTaker(keeper, snapshot_every).stop)
    return observation


def log_warnings() -> None:
    """Write the warnings of all pools, until somebody asks for a log of his own."""
    logging.getLogger(_LOGGER).addHandler(logging.NullHandler())
    attach(_default, None)


_default = LogMailbox(logging.WARNING)
