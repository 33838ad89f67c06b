"""``monitor(engine)``: watch an engine as it is, through SQLAlchemy's own listeners."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Engine, event
from sqlalchemy.pool import StaticPool

from ..config import UNSET, PoolConfig
from ..core.events import PoolEvent
from ..core.journal import Journal
from ..core.snapshot import PoolSnapshot
from ..errors import ArgumentError, PoolMisuse
from ..pool import _sqlalchemy, _sync
from ..pool._callers import describe_holder, holder_finder
from ..pool._fork import start_over_after_fork
from ..pool._messages import describe_error
from ..pool._registry import connecting, register, unregister
from ..pool.reading import glance, snapshot
from ._sightings import Note, Seat, Sightings

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import Pool

__all__ = ["Monitor", "monitor", "watch_new"]

_MOST_NOTES = 500

_monitors: weakref.WeakKeyDictionary[Engine, Monitor] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def monitor(
    engine: Engine | AsyncEngine, *, track: str = UNSET, pool_name: str | None = None
) -> Monitor:
    """Watch an engine's pool, of whatever class, until ``stop()``.

    All is done by SQLAlchemy's listeners, so neither the pool nor how it is used changes, and it
    may be in use already.  SQLAlchemy tells nothing of who asks or waits; what follows from that is
    ``None`` in the snapshots.  A pool that keeps books of its own (``ManagedPool`` and its like)
    needs no listeners: its monitor reads those.

    :param engine: an ``Engine`` or an ``AsyncEngine``; a second call returns the same monitor.
    :param track: what is remembered of a holder: ``"label"`` (what ``held_by`` says),
        ``"caller"`` (also the place in the program; default) or ``"stack"``.
    :param pool_name: the name in snapshots, unique in the process.  Default
        ``host:port/database``.
    :raises sqlalchemy.exc.ArgumentError: for anything but an engine, and for a bad ``track``.
    """
    given = getattr(engine, "sync_engine", engine)
    if not isinstance(given, Engine):
        raise ArgumentError(
            f"monitor() watches an Engine or an AsyncEngine, not {type(engine).__name__}; what "
            "create_engine() or create_async_engine() returned is right"
        )
    return _watch(_sqlalchemy.root_engine(given), track, pool_name, is_new=False)


def watch_new(engine: Engine, *, track: str = UNSET, pool_name: str | None = None) -> Monitor:
    """Watch an engine that was just created."""
    return _watch(engine, track, pool_name, is_new=True)


def _watch(engine: Engine, track: str, pool_name: str | None, *, is_new: bool) -> Monitor:
    config = PoolConfig.from_arguments({} if track is UNSET else {"track": track})
    with _lock:
        found = _monitors.get(engine)
        if found is None:
            if hasattr(engine.pool, "snapshot"):
                found = Monitor(engine)
            else:
                found = _Listener(engine, config, pool_name)
                if not is_new:
                    found.adopt_all()
            _monitors[engine] = found
        return found


class Monitor:
    """Watches one engine; ``monitor(engine)`` returns it.

    Also a context manager, which stops at its end.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._last: PoolSnapshot | None = None

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.snapshot().name

    def snapshot(self) -> PoolSnapshot:
        """Return one consistent reading; after ``stop()`` the last one."""
        if self._last is not None:
            return self._last
        engine = self._engine()
        if engine is None:
            raise ArgumentError("the engine of this monitor is gone, so there is nothing to read")
        return self._read(engine.pool)

    def glance(self) -> PoolSnapshot:
        """Return a reading without ``labels`` and ``callers``, cheap however many there are."""
        engine = self._engine()
        if self._last is not None or engine is None:
            return self.snapshot()
        return self._read(engine.pool, has_rows=False)

    def _read(self, pool: Any, *, has_rows: bool = True) -> PoolSnapshot:
        return snapshot(pool) if has_rows else glance(pool)

    def stop(self) -> None:
        """Watch no more, and leave no listener behind; again is as good as once."""
        engine = self._engine()
        with _lock:
            if engine is None or _monitors.get(engine) is not self:
                return
            del _monitors[engine]
        with suppress(ArgumentError):  # the pool was replaced by one that keeps no books
            self._last = self._read(engine.pool)
        self._let_go(engine)

    def _let_go(self, engine: Engine) -> None:
        """Undo what was done to the engine: nothing, if its pool keeps its books itself."""

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        try:
            reading = self.snapshot()
        except ArgumentError:
            return "<Monitor of an engine that is gone, or has a pool without books>"
        return (
            f"<Monitor of {reading.pool_class} {reading.name!r}: "
            f"{reading.open} open, {reading.idle} idle, {reading.checked_out} checked out>"
        )


class _Listener(Monitor):
    """Keeps the books of a pool that keeps none.

    Listeners only append to a list, for the garbage collector may call them in the middle of
    anything.  What they noted is entered under the lock, by whoever finds it free: a listener never
    waits.
    """

    def __init__(self, engine: Engine, config: PoolConfig, pool_name: str | None) -> None:
        super().__init__(engine)
        pool: Any = engine.pool
        self._track = config.track
        self._clock = _sync.monotonic
        self._has_attempts = _sqlalchemy.keeps_connect_arguments(pool)
        self._words = _sqlalchemy.public_words(pool)
        self._recycle: float = _sqlalchemy.settings_of(pool)["recycle"]
        self.journal = Journal(describe_holder)
        self._notes: list[Note] = []
        self._begin()
        self.journal.pool = register(pool_name or _name_of(engine), self)
        is_asyncio = engine.dialect.is_async
        self._caller = _caller_of_asyncio() if is_asyncio else threading.get_ident
        self._listeners = self._make_listeners(
            holder_finder(config.track, is_asyncio=is_asyncio),
            is_shared=isinstance(pool, StaticPool),
        )
        for name, listener in self._listeners.items():
            # first, so that what other listeners do does not count as a part of the connect
            event.listen(engine, name, listener, insert=name == "connect")
        if self._has_attempts:
            _sqlalchemy.hear_of_connects_first(engine)
        start_over_after_fork(self)

    def adopt_all(self) -> None:
        """Take note of the connections that are there already, those in use too."""
        for record in _sqlalchemy.records_of(cast(Any, self.served_pool())):
            self._adopt(record)

    def _begin(self) -> None:
        self._lock = _sync.RLock()
        self._holds_lock = _sync.ownership_of(self._lock)
        self.journal.clock_offset = _sync.wall_clock() - self._clock()
        self._sightings = Sightings(self._clock(), self.journal, self._notes)

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.journal.pool

    def served_pool(self) -> Pool | None:
        """Return the pool that is watched; None if its engine is gone."""
        engine = self._engine()
        return None if engine is None else engine.pool

    def events(self) -> tuple[PoolEvent, ...]:
        """Return the last events, the newest last."""
        self._settle()
        with self._lock:
            return self.journal.last()

    def is_over(self) -> bool:
        """Tell whether the pool was closed for good: SQLAlchemy's never are."""
        return False

    def tell(self, kind: type[PoolEvent], *details: Any) -> None:
        """Write an event down that happened just now, and have the readers see to it."""
        self._note(lambda now: self.journal.write(kind, now, *details))

    # -- what SQLAlchemy calls ---------------------------------------------------------------

    def _make_listeners(
        self, find_holder: Callable[[], Any], *, is_shared: bool
    ) -> dict[str, Callable[..., None]]:
        clock = self._clock
        notes = self._notes
        note = notes.append

        def checkout(_connection: Any, record: Any, _proxy: Any) -> None:
            try:
                seat = record.poolkit_seat
            except AttributeError:
                seat = self._adopt(record)
            seat.holder = find_holder()
            seat.since = clock()

        def checkout_shared(connection: Any, record: Any, proxy: Any) -> None:
            # StaticPool gives its only connection to several; the time of the one before ends here
            checkin(connection, record)
            checkout(connection, record, proxy)

        def checkin(connection: Any, record: Any) -> None:
            try:
                seat = record.poolkit_seat
            except AttributeError:
                seat = self._adopt(record)
            note((seat, seat.since, seat.holder, clock()))
            if connection is None:
                self._note(partial(self._sightings.attempt_failed, id(record)))
            elif len(notes) > _MOST_NOTES:
                self._settle()

        listeners: dict[str, Callable[..., None]] = {
            "checkout": checkout_shared if is_shared else checkout,
            "checkin": checkin,
            "connect": self._connected,
            "detach": self._detached,
            "close": self._closing,
            "handle_error": self._failed,
        }
        if self._has_attempts:
            listeners["do_connect"] = self._connecting
        return listeners

    def _connecting(self, _dialect: Any, record: Any, _args: Any, _named: Any) -> None:
        if record is not None:
            attempted = self._sightings.attempted
            self._note(partial(attempted, id(record), weakref.ref(record), self._caller()))

    def _connected(self, connection: Any, record: Any) -> None:
        connecting()
        seconds = _sqlalchemy.seconds_since_connect(record, _sync.wall_clock())
        seat = getattr(record, "poolkit_seat", None)
        if seat is None:
            seat = record.poolkit_seat = Seat(record)
        elif not record.in_use:
            # who had its last connection is done with it, even if the news of that is not here yet
            self._notes.append((seat, seat.since, seat.holder, self._clock()))
        seat.latest = id(connection)
        self._note(partial(self._sightings.opened, seat, id(connection), seconds))

    def _detached(self, connection: Any, record: Any) -> None:
        seat = getattr(record, "poolkit_seat", None) or self._adopt(record)
        since, holder, now = seat.since, seat.holder, self._clock()
        held = 0.0 if since is None else now - since
        if seat.latest == id(connection):
            # nobody else has it yet; the record was given back before this is heard
            self._notes.append((seat, since, holder, now))
        is_leak = _sqlalchemy.connection_being_collected() is not None
        detached = self._sightings.detached
        self._note(partial(detached, seat, id(connection), holder, held, is_leak=is_leak))

    def _closing(self, _connection: Any, record: Any) -> None:
        reason = _sqlalchemy.reason_to_close(record, self._recycle, _sync.wall_clock())
        seat = getattr(record, "poolkit_seat", None) or self._adopt(record)
        self._note(partial(self._sightings.closing, seat, reason))

    def _failed(self, context: Any) -> None:
        if context.connection is not None:
            return
        if context.is_pre_ping:
            self._note(self._sightings.ping_failed)
        else:
            error, pool = context.original_exception, self.served_pool()
            is_of_driver = pool is not None and _sqlalchemy.is_of_driver(pool, error)
            self.journal.last_connect_error = describe_error(
                error, self._words, is_of_driver=is_of_driver
            )
            self._note(partial(self._sightings.caller_failed, self._caller()))

    def _adopt(self, record: Any) -> Seat:
        """Take note of a record that was there before."""
        seat = record.poolkit_seat = Seat(record)
        connection = record.dbapi_connection
        seat.was_out = record.in_use
        age = _sqlalchemy.seconds_since_connect(record, _sync.wall_clock())
        identity = seat.latest = 0 if connection is None else id(connection)
        self._note(partial(self._sightings.adopted, seat, identity, age))
        return seat

    # -- entering ----------------------------------------------------------------------------

    def _note(self, entry: Callable[[float], object]) -> None:
        """Note something that is rare, and enter it if possible."""
        self._notes.append((None, entry, None, self._clock()))
        self._settle()

    def _settle(self) -> None:
        """Enter what was noted; if somebody is at that already, leave it to him."""
        if self._holds_lock() or not self._lock.acquire(blocking=False):
            return
        try:
            self._sightings.review(self._clock())
        finally:
            self._lock.release()
        if self.journal.has_news:
            self.journal.wake_readers()

    def _read(self, pool: Any, *, has_rows: bool = True) -> PoolSnapshot:
        if self._holds_lock():
            raise PoolMisuse(
                f"the monitor of pool {self.name!r} was read by a finalizer that ran in the middle "
                "of its own work; do not look at the pool in __del__"
            )
        with self._lock:
            values = self._sightings.read(
                self._clock(),
                describe_holder,
                has_callers=self._track != "label",
                has_queue=_sqlalchemy.has_queue(pool),
                has_rows=has_rows,
            )
        if self.journal.has_news:
            self.journal.wake_readers()
        limit = _sqlalchemy.limit_of(pool)
        settings = _sqlalchemy.settings_of(pool)
        values.update(
            settings={"name": self.name, "track": self._track, **settings},
            min_size=0,
            max_size=limit,
            is_unlimited=limit is None,
        )
        if not self._has_attempts:
            values["connect_failures"] = None  # a creator of one's own fails unheard
        if not settings["pre_ping"]:
            values.update(pings=0, ping_failures=0)
        return PoolSnapshot(
            name=self.name,
            pool_class=type(pool).__name__,
            pid=os.getpid(),
            taken_at=_sync.wall_clock(),
            **values,
        )

    # -- the end -----------------------------------------------------------------------------

    def _let_go(self, engine: Engine) -> None:
        for name, listener in self._listeners.items():
            event.remove(engine, name, listener)
        unregister(self.name)
        self._forget_seats()

    def _forget_seats(self) -> None:
        for record, _ in self._sightings.seats():
            vars(record).pop("poolkit_seat", None)

    def after_fork_in_child(self) -> None:
        """Start over with empty books; the parent's connections count once they are used here."""
        self._forget_seats()
        self._notes.clear()
        self.journal.start_over()
        self._begin()


def _caller_of_asyncio() -> Callable[[], int]:
    current = _sqlalchemy.current_greenlet()
    return lambda: id(current())


def _name_of(engine: Engine) -> str:
    """Return ``host:port/database``, from the URL if the connect arguments do not tell."""
    pool: Any = engine.pool
    url = engine.url
    if _sqlalchemy.keeps_connect_arguments(pool) or not url.host:
        return _sqlalchemy.database_name(pool)
    address = f"{url.host}:{url.port}" if url.port else url.host
    return f"{address}/{url.database}" if url.database else address
