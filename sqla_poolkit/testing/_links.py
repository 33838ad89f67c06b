"""What carries the bytes of a ``FaultProxy``; all of it runs in the thread of its loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["BOTH", "DOWN", "UP", "Address", "Faults", "Link"]

UP = "up"  # from the client to the server
DOWN = "down"
BOTH = "both"

Address = tuple[int, Any]
"""A family of sockets, and what their ``connect`` takes."""

READ_BYTES = 1 << 16
# More than any link has under way; a black hole must not eat all memory of the machine.
QUEUE_BYTES = 1 << 26
# A throttled link sends a hundredth of a second's worth at a time, and makes up for a late timer.
STEP_SECONDS = 0.01
CATCH_UP_SECONDS = 0.05
# A Unix socket does not queue a client that finds no room, nor does it tell when there is some.
RETRY_SECONDS = 0.01
NO_LINGER = struct.pack("ii", 1, 0)


@dataclass
class Faults:
    """What is wrong with the network until it is healed."""

    delay: float = 0.0
    rate: float | None = None
    held: str | None = None
    cut: int | None = None
    cut_direction: str = DOWN

    def holds(self, direction: str) -> bool:
        """Tell whether bytes of this direction vanish in a black hole."""
        return self.held in (direction, BOTH)

    def allowance(self, direction: str) -> int | None:
        """Return after how many bytes of this direction a connection is cut."""
        return self.cut if direction == self.cut_direction else None

    def words(self) -> Iterator[str]:
        """Yield what is wrong, for people."""
        if self.delay:
            yield f"delay {self.delay:g} s"
        if self.rate is not None:
            yield f"throttle {self.rate:g} bytes/s"
        if self.held:
            yield f"black hole {self.held}"
        if self.cut is not None:
            yield f"cut after {self.cut} bytes {self.cut_direction}"


class Link:
    """The connection of one client and, once it is made, the one to the server behind it."""

    def __init__(
        self,
        client: socket.socket,
        faults: Faults,
        loop: asyncio.AbstractEventLoop,
        on_close: Callable[[Link], object],
    ) -> None:
        self.client = client
        self.server: socket.socket | None = None
        self.up = Flow(self, UP, faults, loop)
        self.down = Flow(self, DOWN, faults, loop)
        self._loop = loop
        self._on_close = on_close
        self._untried: deque[Address] | None = None
        self._is_closed = False
        _prepare(client)
        self.down.sink = client
        self.up.read_from(client)

    @property
    def sockets(self) -> list[socket.socket]:
        """Both ends, as far as there are two."""
        return [self.client] if self.server is None else [self.client, self.server]

    def connect(self, addresses: list[Address]) -> None:
        """Start to connect to the first of these that answers, unless that was done before."""
        if self._untried is None:
            self._untried = deque(addresses)
            self._try_next()

    def _try_next(self) -> None:
        while self._untried and not self._is_closed:
            family, address = self._untried[0]
            self.server = socket.socket(family)
            _prepare(self.server)
            outcome = self.server.connect_ex(address)
            if outcome in (0, errno.EINPROGRESS):
                self._loop.add_writer(self.server, self._connected)
                return
            self._discard_server()
            if outcome == errno.EAGAIN:
                self._loop.call_later(RETRY_SECONDS, self._try_next)
                return
            self._untried.popleft()
        if not self._is_closed:
            # The news of it travels like anything else from the server.
            self.down.take(None)

    def _connected(self) -> None:
        assert self.server is not None
        assert self._untried is not None
        self._loop.remove_writer(self.server)
        if self.server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._discard_server()
            self._untried.popleft()
            self._try_next()
        else:
            self.down.read_from(self.server)
            self.up.sink = self.server
            self.up.push()

    def _discard_server(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None

    def half_close(self) -> None:
        """End the stream to the client; what the server sends from now on is dropped."""
        with contextlib.suppress(OSError):
            self.client.shutdown(socket.SHUT_WR)
        self.down.drop()

    def close_if_done(self) -> None:
        """Close both ends once both directions came to their end."""
        if self.up.is_done and self.down.is_done:
            self.close()

    def reset(self) -> None:
        """Close both ends without a farewell: the peers get a reset."""
        for end in self.sockets:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.close()

    def close(self) -> None:
        """Close both ends."""
        self._is_closed = True
        self.up.detach()
        self.down.detach()
        for end in self.sockets:
            self._loop.remove_writer(end)
            end.close()
        self._on_close(self)


def _prepare(end: socket.socket) -> None:
    end.setblocking(False)
    if end.family in (socket.AF_INET, socket.AF_INET6):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Flow:
    """One direction of a link: bytes that arrived, in order, and are not passed on yet.

    In the queue an empty string stands for the end of the stream, ``None`` for a reset.
    """

    def __init__(
        self, link: Link, direction: str, faults: Faults, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.sink: socket.socket | None = None
        self.is_done = False
        self._source: socket.socket | None = None
        self._link = link
        self._direction = direction
        self._faults = faults
        self._loop = loop
        self._queue: deque[tuple[float, bytes | memoryview | None]] = deque()
        self._queued_bytes = 0
        self._left = faults.allowance(direction)
        self._free_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._has_ended = False
        self._is_congested = False
        self._is_dropping = False
        self._is_reading = False
        self._is_writing = False

    def read_from(self, source: socket.socket) -> None:
        """Take what this socket receives."""
        self._source = source
        self._update_reading()

    def take(self, data: bytes | None) -> None:
        """Accept what the source sent, or the news that it ended."""
        if self._has_ended:
            return
        self._has_ended = not data
        if not self._is_dropping:
            self._queue.append((self._loop.time() + self._faults.delay, data))
            self._queued_bytes += len(data or b"")
            self.push()
        elif self._has_ended:
            self._finish()
        self._update_reading()

    def push(self) -> None:
        """Pass on what is due."""
        self._stop_waiting()
        self._is_congested = False
        while self._queue and self.sink and not self._faults.holds(self._direction):
            due, data = self._queue[0]
            now = self._loop.time()
            if now < max(due, self._free_at):
                self._is_congested = due <= now
                self._timer = self._loop.call_at(max(due, self._free_at), self.push)
                break
            if not data:
                self._pass_end(self.sink, is_reset=data is None)
            elif not self._send(self.sink, memoryview(data)):
                break
        self._update_reading()

    def flush(self) -> None:
        """Pass on everything now: nothing is wrong any more."""
        self._left = None
        self._free_at = 0.0
        self._queue = deque((0.0, data) for _, data in self._queue)
        self.push()

    def renew_allowance(self) -> None:
        """Count anew the bytes until the cut."""
        self._left = self._faults.allowance(self._direction)

    def drop(self) -> None:
        """Forget what is not passed on yet, and all that follows."""
        self._is_dropping = True
        self._clear()
        if self._has_ended:
            self._finish()
        self._update_reading()

    def detach(self) -> None:
        """Leave the loop."""
        self.is_done = True
        self._clear()
        self._update_reading()

    def _read(self) -> None:
        assert self._source is not None
        try:
            data: bytes | None = self._source.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = None
        self.take(data)

    def _update_reading(self) -> None:
        """Read while the link has room; what is not read pushes back on the sender."""
        is_full = self._is_congested or self._queued_bytes >= QUEUE_BYTES
        wanted = not (self._has_ended or self.is_done or is_full)
        if self._source is not None and wanted != self._is_reading:
            self._is_reading = wanted
            if wanted:
                self._loop.add_reader(self._source, self._read)
            else:
                self._loop.remove_reader(self._source)

    def _send(self, sink: socket.socket, data: memoryview) -> bool:
        """Send some of the data; return whether more may be sent at once."""
        try:
            sent = sink.send(data[: self._allowed(len(data))])
        except BlockingIOError:
            self._is_congested = self._is_writing = True
            self._loop.add_writer(sink, self.push)
            return False
        except OSError:
            # The sender learns from the other direction that its peer is gone.
            self.drop()
            self._other.take(None)
            return False
        self._account(sent, data)
        if self._left == 0:
            self._link.reset()
        return True

    def _allowed(self, count: int) -> int:
        if self._faults.rate is not None:
            count = min(count, max(1, int(self._faults.rate * STEP_SECONDS)))
        return count if self._left is None else min(count, self._left)

    def _account(self, sent: int, data: memoryview) -> None:
        due, _ = self._queue.popleft()
        self._queued_bytes -= sent
        if sent < len(data):
            self._queue.appendleft((due, data[sent:]))
        if self._left is not None:
            self._left -= sent
        if self._faults.rate is not None:
            begin = max(self._free_at, self._loop.time() - CATCH_UP_SECONDS)
            self._free_at = begin + sent / self._faults.rate

    def _pass_end(self, sink: socket.socket, *, is_reset: bool) -> None:
        self._clear()
        if is_reset:
            self._link.reset()
        else:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
            self._finish()

    def _finish(self) -> None:
        self.is_done = True
        self._link.close_if_done()

    def _clear(self) -> None:
        self._stop_waiting()
        self._queue.clear()
        self._queued_bytes = 0
        self._is_congested = False

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_writing and self.sink is not None:
            self._is_writing = False
            self._loop.remove_writer(self.sink)

    @property
    def _other(self) -> Flow:
        return self._link.down if self._direction == UP else self._link.up
