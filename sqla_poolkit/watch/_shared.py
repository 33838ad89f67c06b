"""What the pools of several processes say, shared through files in one folder.

The workers of a web server are processes, and whoever asks reaches one of them.  So each process
writes what its pools say into a file of its own, a whole new file each time, and who is asked adds
up all files.  A process holds a lock on a second file as long as it lives; when that is free the
process is gone, and what stays true of it (counters and durations, not gauges) is added to a file
that all share.  So there are never more files than processes, and one pair for the past.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.snapshot import PoolSnapshot
from ..pool._registry import Keeper, living_books, when_connecting
from ..pool.reading import glance
from ._readings import Reading, merge, readings_of_this_process

__all__ = ["Share", "close_share", "share_in"]

logger = logging.getLogger("sqla_poolkit")

_VERSION = 1
_PREFIX = "sqla_poolkit-"
_PAST = "sqla_poolkit-ended.json"
_LOCK = "sqla_poolkit.lock"
_PATIENCE_SECONDS = 1.0

Readings = dict[str, Reading]
"""By the names of the pools."""


def _add(readings: Readings, name: str, more: Reading) -> None:
    known = readings.get(name)
    readings[name] = more if known is None else merge(known, more)


class Share:
    """This process's part in a folder, and the way to the others'.

    :param folder: one for all processes of a service, and for nobody else.
    :param every: seconds between two looks at the pools; so much may be missing of a process that
        is killed, and so old may be what it said last.
    """

    def __init__(self, folder: Path, every: float) -> None:
        self.folder = folder
        self.every = every
        self.has_labels = False
        self._start_over()

    def _start_over(self) -> None:
        # POSIX locks tell processes apart, not threads
        self._turn = threading.Lock()
        self._token = ""
        self._held: int | None = None
        self._written = ""
        self._complaint = ""
        self._last: list[tuple[weakref.ref[Keeper], str, Reading]] = []
        self._ended: Readings = {}
        self._starting = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- writing -----------------------------------------------------------------------------

    def save(self) -> None:
        """Write what the pools of this process say, if that has changed.

        A pool that nobody has used yet says nothing: the process that only starts the others, as
        gunicorn's does with ``preload_app``, has one too.
        """
        with self._turn:
            self._save(self._read())

    def _save(self, readings: Readings) -> None:
        if not readings and not self._token:
            return
        if not self._is_registered():
            self._register()
        text = _to_text({"pools": _plain(readings)})
        if text != self._written:
            self._replace(self._path("json"), text)
            self._written = text

    def _read(self) -> Readings:
        """Return what the pools say, those that are gone by now among them."""
        now = [
            (weakref.ref(keeper), reading.name, said)
            for keeper, reading, said in readings_of_this_process(has_labels=self.has_labels)
            if _is_used(reading)
        ]
        living = {id(keeper()) for keeper, _, _ in now}
        for keeper, name, said in self._last:
            if keeper() is None or id(keeper()) not in living:
                _add(self._ended, name, said.history())
        self._last = now
        readings = dict(self._ended)
        for _, name, said in now:
            _add(readings, name, said)
        return readings

    def _path(self, ending: str, token: str = "") -> Path:
        return self.folder / f"{_PREFIX}{token or self._token}.{ending}"

    def _is_registered(self) -> bool:
        return bool(self._token) and self._path("lock").exists()

    def _register(self) -> None:
        """Take a name and its lock, and clear up after those that are gone."""
        self._let_go()
        self._path("json").unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone() as is_alone:
            self._token = f"{os.getpid()}-{secrets.token_hex(4)}"
            self._held = os.open(self._path("lock"), os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._written = ""
            self._gather_others(may_clear_up=is_alone)

    def _let_go(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _replace(self, path: Path, text: str) -> None:
        fresh = self._path("tmp")
        fresh.write_text(text)
        fresh.replace(path)

    # -- reading -----------------------------------------------------------------------------

    def gather(self) -> Readings:
        """Return what the pools of all processes say, those that have ended included."""
        with self._turn:
            own = self._read()
            try:
                self._save(own)
            except OSError as error:
                self._complain(error)
            readings: Readings = {}
            if self.folder.exists():
                with self._alone() as is_alone:
                    readings = self._gather_others(may_clear_up=is_alone)
            for name, said in own.items():
                _add(readings, name, said)
            return readings

    def _gather_others(self, *, may_clear_up: bool) -> Readings:
        """Return what all other processes say; who has ended goes into the file of the past."""
        past = _from_text(self.folder / _PAST)
        readings = _parsed(past.get("pools", {}))
        counted: list[str] = past.get("counted", [])
        others = self._others()
        gone = [token for token in others if _is_free(self._path("lock", token))]
        for token in gone:
            if token not in counted:
                for name, said in self._said_by(token).items():
                    _add(readings, name, said.history())
        if gone and may_clear_up:
            self._write_past(readings, gone)
        for token in others:
            if token not in gone:
                for name, said in self._said_by(token).items():
                    _add(readings, name, said)
        return readings

    def _others(self) -> list[str]:
        locks = sorted(self.folder.glob(f"{_PREFIX}*-*.lock"))
        tokens = [lock.stem.removeprefix(_PREFIX) for lock in locks]
        return [token for token in tokens if token != self._token]

    def _said_by(self, token: str) -> Readings:
        return _parsed(_from_text(self._path("json", token)).get("pools", {}))

    def _write_past(self, readings: Readings, gone: list[str]) -> None:
        # if this is broken off, the next one knows whose files were counted and only have to go
        content = {"pools": _plain(readings), "counted": gone}
        self._replace(self.folder / _PAST, _to_text(content))
        for token in gone:
            for ending in ("json", "tmp", "lock"):
                self._path(ending, token).unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Keep other processes from reading or clearing up meanwhile; yield whether that worked.

        A process that was stopped in here must not keep the others for ever.
        """
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not (is_alone := _lock(descriptor)) and time.monotonic() < deadline:
                time.sleep(0.005)
            yield is_alone
        finally:
            os.close(descriptor)

    # -- from time to time -------------------------------------------------------------------

    def start(self) -> None:
        """Write from time to time, in a thread."""
        if self._thread is not None:
            return
        with self._starting:
            if self._thread is None:
                self._stop = threading.Event()
                arguments = (self._stop, self.every)
                thread = threading.Thread(
                    target=self._run, args=arguments, name="poolkit share", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as error:
                    # at the end of the interpreter, which writes once more by itself
                    logger.debug("no thread to share metrics could be started: %s", error)
                else:
                    self._thread = thread

    def _run(self, stop: threading.Event, every: float) -> None:
        while not stop.wait(every):
            try:
                self.save()
            except OSError as error:
                self._complain(error)

    def _complain(self, error: OSError) -> None:
        """Say once what keeps this process from writing."""
        if str(error) != self._complaint:
            logger.warning("the metrics of this process could not be shared: %s", error)
        self._complaint = str(error)

    def start_if_used(self) -> None:
        """Do so if a pool of this process was used already; else its first connect will."""
        if any(_is_used(glance(pool)) for _, pool in living_books()):
            self.start()

    def stop(self) -> None:
        """End the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            thread.join()

    def close(self) -> None:
        """Write for the last time."""
        self.stop()
        self.save()
        self._let_go()

    def after_fork_in_child(self) -> None:
        """Begin again under a name of its own; the parent's file is the parent's."""
        self._let_go()
        self._start_over()


def _is_used(reading: PoolSnapshot) -> bool:
    return bool(reading.requests or reading.connects or reading.connect_failures or reading.open)


def _plain(readings: Readings) -> dict[str, Any]:
    return {name: reading.to_dict() for name, reading in readings.items()}


def _parsed(pools: dict[str, Any]) -> Readings:
    return {name: Reading.from_dict(known) for name, known in pools.items()}


def _to_text(content: dict[str, Any]) -> str:
    return json.dumps({"version": _VERSION, **content})


def _from_text(path: Path) -> dict[str, Any]:
    """Return a file's content; nothing if it is not there, or of another version."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if content.get("version") == _VERSION else {}


def _is_free(lock: Path) -> bool:
    """Tell whether nobody holds a lock; never to be asked about one's own, which that loses."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


# -- one per folder --------------------------------------------------------------------------

_shares: dict[Path, Share] = {}


def share_in(folder: Path, every: float) -> Share:
    """Return this process's part in a folder, writing from now on."""
    share = _shares.get(folder)
    if share is None:
        folder.mkdir(parents=True, exist_ok=True)
        share = _shares[folder] = Share(folder, every)
    share.every = every
    share.start_if_used()
    return share


def close_share(share: Share) -> None:
    """Write for the last time and end."""
    if _shares.get(share.folder) is share:
        del _shares[share.folder]
        share.close()


def _for_each(act: Callable[[Share], None]) -> None:
    for share in list(_shares.values()):
        act(share)


def _at_exit() -> None:
    for folder in list(_shares):
        share = _shares.pop(folder)
        try:
            share.close()
        except OSError as error:
            logger.warning("the last metrics of this process could not be shared: %s", error)


when_connecting(lambda: _for_each(Share.start))
atexit.register(_at_exit)
os.register_at_fork(
    before=lambda: _for_each(Share.stop),
    after_in_parent=lambda: _for_each(Share.start_if_used),
    after_in_child=lambda: _for_each(Share.after_fork_in_child),
)
