"""A TCP proxy whose network fails on command."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Literal, TypeVar

from ._links import BOTH, DOWN, UP, Link
from ._relay import Relay, resolve

__all__ = ["FaultProxy"]

Result = TypeVar("Result")


class FaultProxy:
    """Stand between clients and a server, and fail as networks, balancers and servers do.

    Use it to see how a program behaves when its database is slow, silent or gone::

        with FaultProxy("127.0.0.1", 5432) as proxy:
            engine = create_engine(f"postgresql+psycopg2://user@{proxy.host}:{proxy.port}/app")
            proxy.black_hole()  # connections stay, answers do not come
            ...
            proxy.heal()

    Every method may be called from any thread, takes effect before it returns and waits neither for
    a client nor for the server.  ``delay``, ``throttle``, ``black_hole``, ``cut_after`` and
    ``refuse`` last until ``heal`` and may be combined; ``reset`` and ``half_close`` strike the
    connections of the moment.  "Up" is from client to server, "down" from server to client.

    One daemon thread carries all bytes.  It shares the interpreter's lock with the program that it
    serves: for load, run ``python -m sqla_poolkit.testing`` as a process of its own.

    :param host: name or address of the server, or the path of its Unix socket (for PostgreSQL
        ``/var/run/postgresql/.s.PGSQL.5432``).  A name is looked up now and in ``retarget``.
    :param port: TCP port of the server; ``None`` for a Unix socket.
    :param listen: the address for clients to connect to; the port is a free one.
    :raises OSError: if a name is unknown.
    """

    host: str
    """The address that clients connect to."""

    port: int
    """The port that clients connect to, 0 before the start; it stays the same until ``close``."""

    def __init__(self, host: str, port: int | None = None, *, listen: str = "127.0.0.1") -> None:
        self.host = listen
        self.port = 0
        self._target = _address(host, port)
        self._listen = resolve(listen, 0)[0]
        self._addresses = resolve(host, port)
        self._relay: Relay | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._process = 0
        self._accepted = 0
        self._calls = threading.Lock()  # one call at a time, and none while it closes

    def __enter__(self) -> FaultProxy:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Listen, and pass everything; ``with`` does this.

        :raises RuntimeError: if it was started before.
        :raises OSError: if the address to listen on is none of this machine.
        """
        if self.port:
            raise RuntimeError(f"{self!r} was started before")
        loop = asyncio.SelectorEventLoop()
        try:
            self._relay = Relay(self._listen, self._addresses, loop)
        except BaseException:
            loop.close()
            raise
        self._loop = loop
        self.port = self._relay.port
        self._process = os.getpid()
        self._thread = threading.Thread(target=_run, args=(loop,), name="FaultProxy", daemon=True)
        self._thread.start()
        self._call(Relay.listen)

    def close(self) -> None:
        """Close every connection, stop listening and end the thread; again does nothing."""
        if not self._is_running:
            return
        with self._calls:
            if self._loop and self._thread:
                self._accepted = self._ask(Relay.close)
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop = self._relay = self._thread = None

    def heal(self) -> None:
        """End every fault: pass all bytes, listen, deliver at once what was held back.

        The target stays what ``retarget`` made it.
        """
        self._call(Relay.heal)

    def delay(self, seconds: float) -> None:
        """Add so many seconds to the way of every byte, in each direction.

        A round trip takes longer by twice that.  The order stays, and the throughput: any number of
        bytes may be under way at a time.  The TCP handshake of a client is not slower.  What is
        under way already keeps the delay it has.

        :raises ValueError: if it is negative.
        """
        if not seconds >= 0:
            raise ValueError(f"a delay is 0 or more seconds, not {seconds!r}")
        self._call(lambda relay: relay.set_fault(delay=float(seconds)))

    def throttle(self, bytes_per_second: float) -> None:
        """Let no more bytes a second pass, of each connection and in each direction.

        Who sends more is held up by TCP itself, once the buffers between are full.

        :raises ValueError: if it is not above 0; ``black_hole`` lets nothing pass.
        """
        if not bytes_per_second > 0:
            raise ValueError(f"a throttle is above 0 bytes a second, not {bytes_per_second!r}")
        self._call(lambda relay: relay.set_fault(rate=float(bytes_per_second)))

    def black_hole(self, direction: Literal["both", "up", "down"] = "both") -> None:
        """Acknowledge all bytes and forward none, as a server that hangs behind a sound network.

        Connections look healthy: keepalives and ``tcp_user_timeout`` notice nothing.  New ones are
        accepted, and hang.  Resets and ends of streams are held back too.  With ``down`` requests
        still reach the server and only its answers are lost, so that a commit may have happened;
        with ``up`` it is the requests.  A second call replaces the direction.

        :raises ValueError: if there is no such direction.
        """
        if direction not in (BOTH, UP, DOWN):
            raise ValueError(f"a direction is 'both', 'up' or 'down', not {direction!r}")
        self._call(lambda relay: relay.set_fault(held=direction))

    def cut_after(self, count: int, direction: Literal["up", "down"] = "down") -> None:
        """Reset each connection, present and new, after so many more bytes of one direction.

        It breaks off in the middle of a message, where drivers are least prepared.  With 0 the
        reset comes in place of the first byte.

        :raises ValueError: if the count is negative, or there is no such direction.
        """
        if not count >= 0:
            raise ValueError(f"a cut is after 0 or more bytes, not {count!r}")
        if direction not in (UP, DOWN):
            raise ValueError(f"the direction of a cut is 'up' or 'down', not {direction!r}")
        self._call(lambda relay: relay.set_fault(cut=count, cut_direction=direction))

    def refuse(self) -> None:
        """Stop listening: new connects are refused, present connections go on.

        The port stays reserved for ``heal``, which listens again.
        """
        self._call(Relay.stop_listening)

    def reset(self) -> int:
        """Reset (RST) all present connections at both ends; return how many.

        So does a firewall that forgot them, or a server that died.  New ones are not affected.
        """
        return self._call(lambda relay: relay.strike(Link.reset))

    def half_close(self) -> int:
        """End the stream to the client of all present connections; return how many.

        What clients send still reaches the server.  Its answers are dropped, until the client
        closes too.
        """
        return self._call(lambda relay: relay.strike(Link.half_close))

    def retarget(self, host: str, port: int | None = None) -> None:
        """Lead new connections to another server: a failover behind a name.

        Present connections stay with theirs.  The arguments are those of the class.

        :raises OSError: if the name is unknown.
        """
        addresses = resolve(host, port)

        def act(relay: Relay) -> None:
            relay.addresses = addresses
            self._target = _address(host, port)

        self._call(act)

    @property
    def connections(self) -> int:
        """Present connections of clients: those that one side at least did not end yet."""
        return self._call(lambda relay: len(relay.links)) if self._is_running else 0

    @property
    def accepted(self) -> int:
        """All connections accepted since the start."""
        return self._call(lambda relay: relay.accepted) if self._is_running else self._accepted

    def __repr__(self) -> str:
        if self._is_running:
            state = self._call(_describe)
        else:
            state = "closed" if self.port else "not started"
        return f"<FaultProxy {_address(self.host, self.port)} -> {self._target}, {state}>"

    def _call(self, act: Callable[[Relay], Result]) -> Result:
        if self._is_running:
            with self._calls:
                if self._is_running:
                    return self._ask(act)
        raise RuntimeError(f"{self!r} does not run")

    def _ask(self, act: Callable[[Relay], Result]) -> Result:
        """Have the loop's thread do it, once all clients whose connect is done are taken in."""
        relay, loop = self._relay, self._loop
        assert relay is not None
        assert loop is not None
        done: Future[Result] = Future()

        def run() -> None:
            try:
                relay.accept()
                done.set_result(act(relay))
            except BaseException as error:  # noqa: BLE001 - it belongs to the caller
                done.set_exception(error)

        loop.call_soon_threadsafe(run)
        return done.result()

    @property
    def _is_running(self) -> bool:
        # A child made by fork has no such thread, and perhaps a lock that nobody will release.
        return self._loop is not None and self._process == os.getpid()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _describe(relay: Relay) -> str:
    count = len(relay.links)
    faults = [*relay.faults.words(), *([] if relay.listener else ["refusing"])]
    return f"{count} connection{'' if count == 1 else 's'}, {', '.join(faults) or 'passing'}"


def _address(host: str, port: int | None) -> str:
    if port is None:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
