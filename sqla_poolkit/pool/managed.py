"""SQLAlchemy's face of the pool: what threads and asyncio share, and ManagedPool for threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import inf
from typing import Any, ClassVar

from ..config import UNSET, PoolConfig
from ..core.slots import CHECKED_OUT
from ..core.snapshot import PoolSnapshot
from ..errors import ArgumentError
from . import _sqlalchemy, _sync
from ._compatibility import QueuePoolNames
from ._credentials import Credentials
from ._driver import Driver
from ._faults import evicts
from ._fork import start_over_after_fork
from ._liveness import busy_check_for, probe_for
from ._registry import connecting, register
from ._sessions import session_cleaner
from ._sqlalchemy import (
    BasePool,
    ConnectionPoolEntry,
    Creator,
    PoolProxiedConnection,
)
from ._threads import ThreadDriver

__all__ = ["Managed", "ManagedPool"]


class Managed(QueuePoolNames, BasePool):
    """A fair connection pool that keeps honest books; see its two classes for threads and asyncio.

    QueuePool's arguments and methods keep working; what differs is listed in the README.  All
    times are in seconds.

    :param creator: returns a new DBAPI connection; ``create_engine`` supplies it.
    :param pool_size: with ``max_overflow`` another way to give ``max_size``.  Default 5.
    :param max_overflow: see ``pool_size``; -1, or a ``pool_size`` of 0, is no limit.  Default 10.
    :param timeout: ``pool_timeout`` of ``create_engine``: the one deadline from asking for a
        connection to having it.  0 never queues, None waits for ever.  Default 30.
    :param use_lifo: ``pool_use_lifo``: hand out the connection used last (default), so that the
        others can go when idle; False uses all in turn.
    :param recycle: ``pool_recycle``: another name of ``max_lifetime``; -1 is no limit.
    :param pre_ping: ``pool_pre_ping``: see whether a connection is alive before it is handed out.
        Default True, without a dialect False.
    :param min_size: connections kept open, warmed in the background from the first checkout on
        or by :meth:`wait_ready`.  Default 0.
    :param max_size: the limit of connections open, being opened and being closed, at every
        instant.  Default ``pool_size + max_overflow``; None is no limit.
    :param idle_timeout: an idle connection above ``min_size`` is closed after this.  Default 600;
        None keeps it.
    :param max_lifetime: no connection older than this is handed out; each is replaced at an age
        of its own between 75 and 100 % of it.  Default 1800; None is no limit.
    :param max_uses: a connection is replaced after so many checkouts.  Default None: no limit.
    :param connect_timeout: passed to drivers that know it, unless you set theirs; an attempt that
        takes longer no longer counts towards ``max_connecting``.  Default 10.
    :param max_waiting: of those who wait for a connection to be given back, more than this are
        turned away with ``PoolOverloaded``; for whom one can be opened does not count.  Default
        None: no limit.
    :param max_connecting: connection attempts in flight at a time.  Default 3.
    :param ping_after: a connection idle for longer is pinged before it is handed out, if its
        driver's socket can be looked at meanwhile (psycopg2, psycopg, asyncpg); other drivers are
        pinged at every checkout.  Default 1; 0 pings always.
    :param ping_timeout: a ping that takes longer is cut off and counts as failed; so is the reset
        of a returned connection, and its close.  Default 5.
    :param keepalive: an idle connection is pinged in the background this often.  Default 120; 0
        never pings.
    :param on_outage: what happens to callers while the database is known to be down: ``"raise"``
        (default) turns them away at once with ``PoolUnavailable``, ``"wait"`` lets them wait for it
        until their deadline.
    :param evict_on: SQLSTATEs, or classes of two characters, of errors after which a connection is
        not used again.  Default ``08``, ``57P01``, ``57P02``, ``57P03``, ``57P05``, ``25P03``.
    :param writable: True if the pool is useless on a server that takes no writes: the first error
        ``25006`` then replaces all connections, as a failover behind a name asks for.  Default
        False.
    :param session_reset: what is done to a returned connection beyond a rollback: ``"rollback"``
        (default) nothing, ``"clean"`` resets the session of PostgreSQL but keeps its plans,
        ``"discard_all"`` throws those away too; or a function of the DBAPI connection.  If it fails
        the connection is closed.
    :param credentials: a function that returns the password, or a mapping of connect arguments, for
        each connect; called once more if they were refused.
    :param hold_warning: a connection held for longer is reported with its holder, once, and again
        when it comes back.  Default 60; 0 never reports.
    :param on_deadlock: what happens when all connections are held by callers who themselves wait
        for another one: ``"warn"`` (default) reports it, and the ``PoolTimeout`` of each says so;
        ``"raise"`` turns away who completes the circle, at once, with ``PoolDeadlock``.  The
        latter is for programs that never hand a connection from one thread or task to another.
    :param upkeep: ``"thread"`` (default), or ``"inline"`` where no background threads can run:
        callers then connect and close by themselves, so their deadline does not cover their own
        connect, and nothing is replaced or closed while nobody calls.
    :param track: what is remembered of a holder: ``"label"`` (what ``held_by`` says),
        ``"caller"`` (also the place in the program; default) or ``"stack"``.
    :param collect_leaks: run the garbage collector when callers wait and nothing came back for half
        of ``pool_timeout``, at most every 30 seconds in a process: a ``Connection`` that was
        dropped unclosed is often part of a reference cycle, and holds its place until then.
        The collector stops the world while it runs.  Default False.
    :param pool_name: the name in snapshots and messages, unique in the process.  Default
        ``host:port/database``.
    :param kw: arguments of SQLAlchemy's ``Pool``.
    :raises sqlalchemy.exc.ArgumentError: for a value that cannot be, naming setting and value,
        and for drivers whose connections cannot be shared by threads.
    """

    _driver: Driver
    _driver_class: ClassVar[type[Driver]]

    def __init__(
        self,
        creator: Creator,
        pool_size: int = UNSET,
        max_overflow: int = UNSET,
        timeout: float | None = UNSET,
        use_lifo: bool = UNSET,
        recycle: int = UNSET,
        pre_ping: bool = UNSET,
        min_size: int = UNSET,
        max_size: int | None = UNSET,
        idle_timeout: float | None = UNSET,
        max_lifetime: float | None = UNSET,
        max_uses: int | None = UNSET,
        connect_timeout: float = UNSET,
        max_waiting: int | None = UNSET,
        max_connecting: int = UNSET,
        ping_after: float = UNSET,
        ping_timeout: float = UNSET,
        keepalive: float = UNSET,
        on_outage: str = UNSET,
        evict_on: Iterable[str] | str | None = UNSET,
        writable: bool = UNSET,
        hold_warning: float = UNSET,
        on_deadlock: str = UNSET,
        session_reset: str | Callable[[Any], object] = UNSET,
        credentials: Callable[[], Any] | None = None,
        upkeep: str = UNSET,
        track: str = UNSET,
        collect_leaks: bool = UNSET,
        pool_name: str | None = UNSET,
        _driver: Driver | None = None,
        **kw: Any,
    ) -> None:
        if _driver is not None:
            # made by recreate(): the settings live on in the driver
            self._driver = _driver
            super().__init__(creator, recycle, **kw)
            self._begin_to_serve()
            return
        arguments = {
            "pool_size": pool_size,
            "max_overflow": max_overflow,
            "timeout": timeout,
            "use_lifo": use_lifo,
            "recycle": recycle,
            "pre_ping": pre_ping,
            "min_size": min_size,
            "max_size": max_size,
            "idle_timeout": idle_timeout,
            "max_lifetime": max_lifetime,
            "max_uses": max_uses,
            "connect_timeout": connect_timeout,
            "max_waiting": max_waiting,
            "max_connecting": max_connecting,
            "ping_after": ping_after,
            "ping_timeout": ping_timeout,
            "keepalive": keepalive,
            "on_outage": on_outage,
            "evict_on": evict_on,
            "writable": writable,
            "session_reset": session_reset,
            "hold_warning": hold_warning,
            "on_deadlock": on_deadlock,
            "upkeep": "inline" if _sync.is_steered and not self._is_asyncio else upkeep,
            "track": track,
            "collect_leaks": collect_leaks,
        }
        if pre_ping is UNSET:
            arguments["pre_ping"] = kw.get("dialect") is not None
        make_driver: Callable[[PoolConfig], Driver] = self._driver_class
        self._driver = make_driver(PoolConfig.from_arguments(arguments))
        lifetime = self._driver.config.max_lifetime
        # SQLAlchemy has its recycle as an integer, but never looks at it here
        super().__init__(creator, -1 if lifetime is None else lifetime, **kw)  # type: ignore[arg-type]
        self._refuse_what_cannot_work()
        if pool_name and not isinstance(pool_name, str):
            raise ArgumentError(f"pool_name={pool_name!r} is not possible; it must be a string")
        name = register(pool_name or _sqlalchemy.database_name(self), self._driver)
        self._driver.name(name)
        if _sqlalchemy.has_engine(self):
            self._plug_into_engine(session_reset, credentials)
        elif credentials is not None or session_reset not in (UNSET, "rollback"):
            raise ArgumentError(
                "credentials= and session_reset= need an engine: give them to create_engine, "
                "together with poolclass"
            )
        start_over_after_fork(self._driver)
        self._begin_to_serve()

    def _begin_to_serve(self) -> None:
        if self._driver.config.on_deadlock == "raise":
            self._do_get = self._do_get_noted  # type: ignore[method-assign]
        self._driver.serve(self)

    def _plug_into_engine(self, session_reset: Any, credentials: Callable[[], Any] | None) -> None:
        """Have the engine's dialect do what the settings say about connects, resets and errors."""
        driver, config = self._driver, self._driver.config
        _sqlalchemy.pass_connect_timeout(self, config.connect_timeout)
        if config.session_reset != "rollback":
            driver.clean_session = session_cleaner(session_reset, self._dialect)
        if credentials is not None:
            if not callable(credentials):
                raise ArgumentError(
                    "credentials= must be a function that returns the password, or a mapping of "
                    "connect arguments"
                )
            driver.credentials = Credentials(credentials)
            _sqlalchemy.pass_credentials(self, driver.credentials.supply)
        _sqlalchemy.guard_resets(self, driver.guard_reset, driver.guard_last_rollback)
        _sqlalchemy.judge_errors(self, partial(evicts, states=config.evict_on))

    def _refuse_what_cannot_work(self) -> None:
        self._refuse_the_wrong_kind_of_driver()
        if self._driver.config.pre_ping and not _sqlalchemy.can_ping(self):
            raise ArgumentError(
                "pool_pre_ping=True needs a dialect that can ping; give the pool to create_engine "
                "as poolclass, or leave pool_pre_ping out"
            )
        reason = _sqlalchemy.why_unsuitable(self)
        if reason is not None:
            raise ArgumentError(f"{type(self).__name__} cannot serve this database: {reason}")

    def _refuse_the_wrong_kind_of_driver(self) -> None:
        """Refuse a driver for asyncio in a pool for threads, and the reverse."""
        raise NotImplementedError

    # -- what SQLAlchemy calls ---------------------------------------------------------------

    def _connect_heard(self) -> PoolProxiedConnection:
        # the caller counts as served only after the listeners agreed
        caller = self._driver.caller()
        self._driver.confirming.add(caller)
        try:
            proxy = super()._connect_heard()
        finally:
            self._driver.confirming.discard(caller)
        self._driver.confirm(_sqlalchemy.record_of(proxy))
        return proxy

    def _do_get(self) -> ConnectionPoolEntry:
        # the common case, an idle connection is there, ends here; all others in the driver
        driver = self._driver
        clock = driver.clock
        asked_at = clock()
        holder = driver.find_holder()
        machine = driver.machine
        inbox = driver.inbox
        if driver.holds_lock():
            driver.refuse_nested()
        lane = driver.lane or driver.find_lane()
        with driver.lock:
            if inbox:
                driver.take_returns()
            got: Any = machine.checkout(asked_at, clock(), holder, lane)
            if driver.confirming:
                driver.hold_back(got)
        if got.state is CHECKED_OUT and not machine.decisions and not inbox:
            record: ConnectionPoolEntry = got.resource
            return record
        return driver.finish_checkout(got)

    def _create_connection(self) -> ConnectionPoolEntry:
        return self.new_record()

    def _return_conn(self, record: ConnectionPoolEntry) -> None:
        driver = self._driver
        slot = record.slot  # type: ignore[attr-defined]
        if slot is None or slot.state is not CHECKED_OUT:
            driver.take_back(record, is_detached=False)
            return
        if record.tidy is not None:  # type: ignore[attr-defined]
            driver.take_back_tidy(record)
            return
        slot.returned_at = driver.clock()
        driver.inbox.append(slot)
        machine = driver.machine
        if machine.waiting or machine.is_closed:
            driver.empty_inbox()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        # checkins come through _return_conn; only a proxy that detaches itself calls this one
        self._driver.take_back(record, is_detached=record.dbapi_connection is None)

    def _should_wrap_creator(self, creator: Creator) -> Callable[[ConnectionPoolEntry], Any]:
        """See each connection once; notice when SQLAlchemy reconnects in its holder's hands."""
        connect: Any = super()._should_wrap_creator(creator)
        driver = self._driver

        def invoke(record: ConnectionPoolEntry) -> Any:
            connecting()
            started_at = _sync.monotonic()
            connection = connect(record)
            _sqlalchemy.set_adapters(
                record, probe_for(connection), driver.tidier(connection), busy_check_for(connection)
            )
            if _sqlalchemy.slot_of(record) is not None:
                driver.reconnected(record, _sync.monotonic() - started_at)
            return connection

        return invoke

    def _invalidate(
        self, connection: Any, exception: BaseException | None = None, _checkin: bool = True
    ) -> None:
        """Note that a connection is lost; what that says of the others is the driver's to judge."""
        self._driver.disconnected(getattr(connection, "_connection_record", None), exception)
        self._invalidate_time = _sync.wall_clock()
        if _checkin and getattr(connection, "is_valid", False):
            connection.invalidate(exception)

    def _do_get_noted(self) -> ConnectionPoolEntry:
        """Serve a caller, and remember which thread or task that is."""
        record = Managed._do_get(self)
        self._driver.note_owner(record)
        return record

    def _do_get_late(self) -> ConnectionPoolEntry:
        """Serve a caller who still has this pool although it has a successor."""
        record = Managed._do_get(self)
        self._driver.lend_late(self, record)
        return record

    def recreate(self) -> Managed:
        """Return the pool that takes this one's place: same settings, name, totals and limit.

        Who waits here is served by it; connections of this one are closed as they come back.
        """
        self.logger.info("Pool recreating")
        successor = self.__class__(
            self._creator,
            recycle=self._recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            _dispatch=self.dispatch,
            dialect=self._dialect,
            _driver=self._driver,
        )
        # whoever still asks this pool is served, but nothing it hands out stays
        self._do_get = self._do_get_late  # type: ignore[method-assign]
        return successor

    def dispose(self) -> None:
        """Close the idle connections; the pool goes on, and others come back to it."""
        self._driver.dispose()
        self.logger.info("Pool disposed. %s", self.status())

    # -- what its owner calls ----------------------------------------------------------------

    def snapshot(self) -> PoolSnapshot:
        """Return one consistent reading of the pool."""
        return self._driver.snapshot()

    def glance(self) -> PoolSnapshot:
        """Return a reading without ``labels`` and ``callers``, cheap however many there are."""
        return self._driver.snapshot(has_rows=False)

    def resize(self, min_size: int = UNSET, max_size: int | None = UNSET) -> None:
        """Change the limits of the live pool.

        What is too many is closed, idle connections first, the others when they come back.

        :raises sqlalchemy.exc.ArgumentError: if the limits cannot be.
        """
        self._driver.resize(min_size, max_size)

    def pause(self) -> None:
        """Hand nothing out until :meth:`resume`; callers queue, their deadlines go on."""
        self._driver.pause()

    def resume(self) -> None:
        """Hand out again, to those who waited first."""
        self._driver.resume()

    def retire_all(self, over: float = 0.0) -> None:
        """Replace every connection: idle ones now, the others when they come back.

        :param over: spread this over so many seconds, for a database that should not be asked for
            all at once.
        :raises sqlalchemy.exc.ArgumentError: if that is not a number of seconds.
        """
        if not 0.0 <= over < inf:
            raise ArgumentError(f"over={over!r} is not possible; it must be a number of seconds")
        if over > 0.0:
            self._driver.retire_gradually(over)
        else:
            self._driver.retire_all("retired")

    def __repr__(self) -> str:
        self._driver.empty_inbox()
        machine = self._driver.machine
        config = machine.config
        limit = "unlimited" if config.max_size is None else f"of {config.max_size}"
        phase = "" if machine.phase == "open" else f"{machine.phase}, "
        return (
            f"<{type(self).__name__} {config.name!r} {phase}{machine.open} {limit} open: "
            f"{machine.idle} idle, {machine.checked_out} checked out, "
            f"{machine.connecting} connecting, {machine.waiting} waiting>"
        )


class ManagedPool(Managed):
    """A fair connection pool for threads that keeps honest books.

    Use it as ``create_engine(url, poolclass=ManagedPool)``.  QueuePool's arguments and methods
    keep working; what differs is listed in the README.  All times are in seconds.
    """

    # below SQLAlchemy's own pools, so that logging set up for "sqlalchemy.pool" shows this one
    _sqla_logger_namespace = "sqlalchemy.pool.impl.ManagedPool"
    _driver_class = ThreadDriver

    def _refuse_the_wrong_kind_of_driver(self) -> None:
        if getattr(self._dialect, "is_async", False) is True:
            raise ArgumentError(
                f"{type(self).__name__} serves threads, but the driver "
                f"{getattr(self._dialect, 'driver', '')!r} is for asyncio; with "
                "create_async_engine use poolclass=AsyncManagedPool"
            )

    def wait_ready(self, timeout: float | None = 30.0) -> None:
        """Open ``min_size`` connections and wait until they are.

        :raises PoolTimeout: if they are not within ``timeout`` seconds; the pool goes on trying.
        """
        self._driver.wait_ready(timeout)

    def close(self, timeout: float | None = 5.0) -> None:
        """Close for good: nothing is handed out any more, and callers who wait get ``PoolClosed``.

        Waits for the holders, at most ``timeout`` seconds (None: until they are done), then cuts
        their connections off.  Unlike ``dispose()`` this is final.
        """
        self._driver.close(timeout)
