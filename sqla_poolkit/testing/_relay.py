"""The part of a ``FaultProxy`` that listens, and has the links; it runs in the loop's thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import weakref
from collections.abc import Callable

from ._links import UP, Address, Faults, Link

__all__ = ["Relay", "resolve"]

BACKLOG = 512


class Relay:
    """Connect clients of one port to a server, with the faults of the moment.

    Once it was made, no other thread than that of the loop may touch it.
    """

    def __init__(
        self, listen: Address, addresses: list[Address], loop: asyncio.AbstractEventLoop
    ) -> None:
        self.addresses = addresses
        self.faults = Faults()
        self.links: set[Link] = set()
        self.accepted = 0
        self.listener: socket.socket | None = None
        self._loop = loop
        # Bound and silent, it keeps the port from everybody else while connects are refused.
        self._reserved = socket.socket(listen[0])
        try:
            self._reserved.bind(listen[1])
        except BaseException:
            self._reserved.close()
            raise
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.port: int = self._reserved.getsockname()[1]
        _relays.add(self)

    @property
    def sockets(self) -> list[socket.socket]:
        """All that is open."""
        listening = [self._reserved] + ([self.listener] if self.listener else [])
        return listening + [end for link in self.links for end in link.sockets]

    def listen(self) -> None:
        """Accept connections, also again."""
        if self.listener is None:
            self.listener = socket.socket(self._reserved.family)
            self.listener.setblocking(False)
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.listener.bind(self._reserved.getsockname())
            self.listener.listen(BACKLOG)
            self._loop.add_reader(self.listener, self.accept)

    def stop_listening(self) -> None:
        """Refuse connections."""
        if self.listener is not None:
            self._loop.remove_reader(self.listener)
            self.listener.close()
            self.listener = None

    def accept(self) -> None:
        """Take in every client whose connect is done."""
        with contextlib.suppress(OSError):  # BlockingIOError: there is no other
            while self.listener is not None:
                client, _ = self.listener.accept()
                self.accepted += 1
                self.links.add(Link(client, self.faults, self._loop, self.links.discard))
        self._connect()

    def heal(self) -> None:
        """End every fault."""
        for name, value in vars(Faults()).items():
            setattr(self.faults, name, value)
        self.listen()
        for link in list(self.links):
            link.up.flush()
            link.down.flush()
        self._connect()

    def set_fault(self, **changes: float | str) -> None:
        """Change what is wrong from now on."""
        for name, value in changes.items():
            setattr(self.faults, name, value)
        for link in list(self.links):
            for flow in (link.up, link.down):
                if "cut" in changes:
                    flow.renew_allowance()
                flow.push()
        self._connect()

    def strike(self, act: Callable[[Link], object]) -> int:
        """Do this to each connection; return how many there were."""
        links = list(self.links)
        for link in links:
            act(link)
        return len(links)

    def close(self) -> int:
        """Close everything; return how many connections there have been."""
        self.stop_listening()
        self.strike(Link.close)
        self._reserved.close()
        return self.accepted

    def _connect(self) -> None:
        if not self.faults.holds(UP):
            for link in list(self.links):
                link.connect(self.addresses)


def resolve(host: str, port: int | None) -> list[Address]:
    """Look up where to connect to; without a port it is the path of a Unix socket."""
    if port is None:
        return [(socket.AF_UNIX, host)]
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in found]


_relays: weakref.WeakSet[Relay] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """Close a forked child's copies, without which the parent cannot end a connection."""
    for relay in _relays:
        for one in relay.sockets:
            one.close()


os.register_at_fork(after_in_child=_leave_to_the_parent)
