"""Those who are told what happens: ``observe`` calls a function with each event of a pool.

The function runs in a thread of its own, after the fact: whatever it does, raises or waits for,
no caller of the pool notices.
"""

from __future__ import annotations

import atexit
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from ..core.events import PoolEvent, event_classes
from ..core.journal import Journal
from ..errors import ArgumentError
from ..pool import _registry, _sync
from ..pool._fork import start_over_after_fork

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import Pool

__all__ = ["Mailbox", "Observation", "Observer", "observe", "recent_events"]

_MOST_LETTERS = 10_000
_LINGER_SECONDS = 1.0
_EXIT_SECONDS = 2.0
_logger = logging.getLogger("sqla_poolkit")


class Observer(Protocol):
    """Is told of each event."""

    def __call__(self, event: PoolEvent, /) -> object:
        """Take an event in; what is returned is ignored."""


class Mailbox:
    """Hands events to one observer, in order, in a thread that lives while there are any.

    ``put`` happens under a pool's lock, and ``wake`` may happen inside a garbage collection, so
    neither takes a lock or calls anybody.

    :param observer: who is told.
    :param kinds: of which events; None is all.
    :param look_after: called in the same thread when there is nothing to hand over, and told
        whether this is the last time; returns in how many seconds to come again, None for not until
        the next event.
    """

    def __init__(
        self,
        observer: Observer,
        kinds: Iterable[type[PoolEvent]] | None = None,
        look_after: Callable[[bool], float | None] = lambda _: None,
    ) -> None:
        self._observer = observer
        self._kinds = None if kinds is None else frozenset(kinds)
        self._look_after = look_after
        self._failed = False
        self._lost = 0
        self._told_of_loss = False
        self._start_over()
        start_over_after_fork(self)
        _mailboxes.add(self)

    def _start_over(self) -> None:
        self._letters: deque[tuple[PoolEvent, Journal]] = deque()
        self._parker = _sync.Parker()
        self._turns = [None]
        """Holds one thing to be popped by whoever starts the thread: a pop is atomic."""
        self._thread: Any = None
        self._is_stopped = False

    def after_fork_in_child(self) -> None:
        """Forget the letters of the parent."""
        self._start_over()

    def wants(self, kind: type[PoolEvent]) -> bool:
        """Tell whether events of this kind are of interest."""
        return self._kinds is None or kind in self._kinds

    def put(self, event: PoolEvent, journal: Journal) -> None:
        """Keep an event for the observer; beyond ten thousand it is lost, and counted."""
        if len(self._letters) >= _MOST_LETTERS:
            self._lost += 1
            journal.errors += 1
        else:
            self._letters.append((event, journal))

    def wake(self) -> None:
        """See to it that the observer gets what was put."""
        if self._lost and not self._told_of_loss:
            self._told_of_loss = True
            self._begin(self._tell_of_loss, "poolkit observer's loss")
        try:
            self._turns.pop()
        except IndexError:
            self._parker.unpark()
            return
        thread = self._begin(self._run, f"poolkit observer {_name_of(self._observer)}")
        if thread is None:
            self._deliver()
            self._turns.append(None)
        else:
            self._thread = thread

    def _begin(self, work: Callable[[], None], name: str) -> Any:
        """Start a thread and return it; None where that is not possible."""
        try:
            return None if self._is_stopped else _sync.start_thread(work, name)
        except RuntimeError:
            return None

    def stop(self, seconds: float) -> None:
        """Hand over what is there, for at most so long, and end the thread."""
        self._is_stopped = True
        self._parker.unpark()
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            self._deliver()
            is_last = self._is_stopped and not self._letters
            pause = self._look_after(is_last)
            if is_last:
                return
            seconds = _LINGER_SECONDS if pause is None else pause
            if self._parker.park(seconds) or pause is not None:
                continue
            self._turns.append(None)
            # who put something meanwhile may have seen this thread still at work
            if not self._letters:
                return
            try:
                self._turns.pop()
            except IndexError:
                return

    def _deliver(self) -> None:
        while self._letters:
            event, journal = self._letters.popleft()
            try:
                self._observer(event)
            except BaseException:  # whatever an observer raises is its own affair
                journal.errors += 1
                if not self._failed:
                    self._failed = True
                    _logger.exception(
                        "An observer of pool %r raised; further errors of %s are only counted, as "
                        "observer_errors of the snapshot",
                        journal.pool,
                        _name_of(self._observer),
                    )

    def _tell_of_loss(self) -> None:
        _logger.error(
            "Events are lost because %s is too slow, or never comes back: %d wait for it. They are "
            "counted as observer_errors of the snapshot; let the observer only pass events on",
            _name_of(self._observer),
            len(self._letters),
        )


def _name_of(observer: Any) -> str:
    return str(getattr(observer, "__qualname__", type(observer).__qualname__))


_mailboxes: weakref.WeakSet[Mailbox] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    deadline = _sync.monotonic() + _EXIT_SECONDS
    for mailbox in list(_mailboxes):
        mailbox.stop(max(0.0, deadline - _sync.monotonic()))


class Observation:
    """That somebody is told of events; until ``stop()``, or the end of a ``with`` block."""

    def __init__(self, mailbox: Mailbox, journals: Iterable[Journal], *, is_of_all: bool) -> None:
        self._mailbox = mailbox
        self._journals: weakref.WeakSet[Journal] = weakref.WeakSet()
        for journal in journals:
            self._add(journal)
        self._is_of_all = is_of_all
        self._to_stop: list[Callable[[], object]] = []
        if is_of_all:
            _registry.newcomers.append(self._greet)

    def _greet(self, keeper: _registry.Keeper) -> None:
        self._add(keeper.journal)

    def _add(self, journal: Journal) -> None:
        self._journals.add(journal)
        journal.add(self._mailbox)

    def stop(self) -> None:
        """Tell no more; what happened before is still told.  Twice is as good as once."""
        if self._is_of_all and self._greet in _registry.newcomers:
            _registry.newcomers.remove(self._greet)
        for journal in list(self._journals):
            journal.remove(self._mailbox)
        self._journals.clear()
        while self._to_stop:
            self._to_stop.pop()()

    def on_stop(self, end: Callable[[], object]) -> None:
        """Have something else ended by ``stop()`` as well."""
        self._to_stop.append(end)

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def observe(
    observer: Observer,
    engine: Engine | AsyncEngine | Pool | None = None,
    *,
    events: Iterable[type[PoolEvent]] | None = None,
) -> Observation:
    """Call a function with what happens in a pool, or in all pools of the process.

    It is called with one event after the other, in the order in which they happened, in a thread
    of its own that starts when there is something to tell; events that are older than ten
    thousand others it has not taken yet are lost.  What it raises is logged once and counted in
    ``observer_errors`` of the snapshot.  With ``upkeep="inline"`` and no threads it is called by
    whoever uses the pool.

    :param observer: the function.
    :param engine: an engine, or a pool; it and those that take its place are observed.  None is
        every pool of the process that keeps books, also those made later.
    :param events: the classes of events to be told of.  None is all of them.
    :return: what ends it: ``stop()``, or a ``with`` block.
    :raises sqlalchemy.exc.ArgumentError: for an engine whose pool keeps no books, and for classes
        that are no events.
    """
    mailbox = Mailbox(observer, None if events is None else _checked(events))
    return attach(mailbox, engine)


def attach(mailbox: Mailbox, engine: Any) -> Observation:
    """Have a mailbox filled with what happens in a pool, or in all of them."""
    if engine is not None:
        return Observation(mailbox, [keeper_of(engine).journal], is_of_all=False)
    journals = [keeper.journal for keeper in _registry.living_keepers()]
    return Observation(mailbox, journals, is_of_all=True)


def _checked(events: Iterable[type[PoolEvent]]) -> list[type[PoolEvent]]:
    kinds = list(events)
    for kind in kinds:
        if kind not in event_classes():
            raise ArgumentError(f"events={kind!r} is no class of events; see sqla_poolkit.watch")
    return kinds


def keeper_of(engine: Any) -> _registry.Keeper:
    """Return who keeps the books of an engine's pool.

    :raises sqlalchemy.exc.ArgumentError: if nobody does.
    """
    pool = getattr(engine, "pool", engine)
    keeper = _registry.keeper_of(pool)
    if keeper is None:
        raise ArgumentError(
            f"{type(pool).__name__} keeps no books, so there is nothing to observe; create the "
            "engine with poolclass=ManagedPool (asyncio: AsyncManagedPool), or call "
            "monitor(engine) first"
        )
    return keeper


def recent_events(engine: Engine | AsyncEngine | Pool) -> tuple[PoolEvent, ...]:
    """Return what happened in a pool of late: the last twenty events of each kind, newest last.

    They are remembered whether anybody observes or not; a ``PoolTimeout`` and a ``PoolUnavailable``
    carry them as ``events``.
    """
    return keeper_of(engine).events()
