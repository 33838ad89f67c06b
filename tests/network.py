"""A network that really loses packets, between this process and a server's Unix socket.

Nothing on a single machine behaves like it: a stopped process still has its bytes acknowledged, and
a closed port answers.  Here packets vanish, those of a connect included, as behind a firewall that
drops them or a machine that lost its power.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PROGRAMS = {"ip": "iproute2", "nsenter": "util-linux", "unshare": "util-linux"}
# Kept for tests of network equipment (RFC 2544): no network that a machine uses is there.
NETWORK = "198.18.{}.{}"
MAC_NEAR, MAC_FAR, MAC_OF_NOBODY = (f"02:00:00:00:00:0{digit}" for digit in "abc")
FORWARDER = ("-m", "sqla_poolkit.testing", "--listen", "0.0.0.0")
TRIAL_SECONDS = 5.0


class NotPermitted(Exception):
    """No such network can be made here; the message says why."""


class LossyLink:
    """A TCP address, ``host`` and ``port``, that leads to a Unix socket and can lose packets.

    The address is at the other end of a virtual cable, in a network namespace of its own, where a
    forwarder listens; Unix sockets do not care about such namespaces.  ``device`` is this end of
    the cable.  It takes root's rights.  If this process dies, the forwarder ends, and with it the
    namespace and the cable.

    :param target: the path of the server's Unix socket.
    :raises NotPermitted: on entering, where the machine does not allow for it.
    """

    def __init__(self, target: Path) -> None:
        device, net, subnet = next(_free_subnets())
        self.host = NETWORK.format(net, subnet + 2)
        self.port = 0
        self.device = device
        self._target = target
        self._near = End(NETWORK.format(net, subnet + 1), device, MAC_NEAR)
        self._far = End(self.host, "poolkit", MAC_FAR)
        self._cleanup = ExitStack()

    def __enter__(self) -> LossyLink:
        with ExitStack() as stack:
            self._start_forwarder(stack)
            self._lay_cable(stack)
            self._try_out()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def drop(self) -> None:
        """Lose every packet from now on, both ways; nobody is told."""
        self._address_frames(MAC_OF_NOBODY, MAC_OF_NOBODY)

    def restore(self) -> None:
        """Lose none; what was lost arrives when TCP sends it again."""
        self._address_frames(self._near.mac, self._far.mac)

    def _start_forwarder(self, stack: ExitStack) -> None:
        if os.geteuid():
            raise NotPermitted("Only root may make a network namespace.")
        for program, package in PROGRAMS.items():
            if not shutil.which(program):
                raise NotPermitted(
                    f"There is no {program} here. Install it (Debian: apt-get install {package})."
                )
        forwarder = stack.enter_context(
            subprocess.Popen(
                ["unshare", "--net", sys.executable, *FORWARDER, self._target],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        # It ends when its input does.
        stack.callback(forwarder.communicate)
        port = forwarder.stdout.readline()
        if not port:
            raise NotPermitted(f"No network namespace can be made: {forwarder.communicate()[1]}")
        self.port = int(port)
        self._namespace = str(forwarder.pid)
        self._end_forwarder = forwarder.communicate

    def _lay_cable(self, stack: ExitStack) -> None:
        near, far = self._near, self._far
        peer = ("peer", "name", far.device, "address", far.mac, "netns", self._namespace)
        _ip("link", "add", near.device, "address", near.mac, "type", "veth", *peer)
        stack.callback(self._remove_cable)
        for end, run in ((near, _ip), (far, self._ip_inside)):
            run("address", "add", f"{end.host}/30", "dev", end.device)
            run("link", "set", end.device, "up")
        self.restore()

    def _remove_cable(self) -> None:
        # Whoever is still connected hears of the end: the forwarder goes first.
        with suppress(NotPermitted):
            self.restore()
        self._end_forwarder()
        # The end of the namespace, a little later, would remove it too.
        with suppress(NotPermitted):
            _ip("link", "delete", self._near.device)

    def _try_out(self) -> None:
        try:
            socket.create_connection((self.host, self.port), TRIAL_SECONDS).close()
        except ConnectionResetError:
            pass  # by a target that is not there yet; it came all the way
        except OSError as error:
            raise NotPermitted(f"Packets do not pass to a network namespace: {error}") from error

    def _address_frames(self, near_mac: str, far_mac: str) -> None:
        """Tell each end which address to write on its frames for the other.

        Frames for another address arrive, and are silently thrown away as none of the receiver's
        business.  The sender cannot tell, unlike with a link that is down or a route that is gone.
        """
        for run, device, other, mac in (
            (_ip, self._near.device, self._far.host, far_mac),
            (self._ip_inside, self._far.device, self._near.host, near_mac),
        ):
            run("neighbour", "replace", other, "dev", device, "lladdr", mac, "nud", "permanent")

    def _ip_inside(self, *arguments: str) -> None:
        _run("nsenter", "--target", self._namespace, "--net", "ip", *arguments)


class End(NamedTuple):
    """One end of the cable."""

    host: str
    device: str
    mac: str


def _free_subnets() -> Iterator[tuple[str, int, int]]:
    """Yield networks of four addresses that no link has, and the name of an interface for each."""
    while True:
        net, subnet = random.randrange(256), 4 * random.randrange(64)
        device = f"poolkit{net}-{subnet}"
        if device not in interfaces():
            yield device, net, subnet


def interfaces() -> set[str]:
    """Return the names of the network interfaces outside of any other namespace."""
    return {name for _, name in socket.if_nameindex()}


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotPermitted(f"{' '.join(command)}: {done.stderr.strip()}")
