"""A ``FaultProxy`` in a process of its own, which shares no interpreter lock with its clients.

``python -m sqla_poolkit.testing HOST PORT``, or the path of a Unix socket in place of both, prints
the port that it listens on.  Then each line of its input is a method with its arguments, such as
``delay 0.05``, ``black_hole up`` or ``reset``.  When that is done it answers with a line: the
state, or ``error:`` and what is wrong.  It ends with its input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from .proxy import FaultProxy

ARGUMENTS: dict[str, tuple[type, ...]] = {
    "black_hole": (str,),
    "cut_after": (int, str),
    "delay": (float,),
    "half_close": (),
    "heal": (),
    "refuse": (),
    "reset": (),
    "retarget": (str, int),
    "throttle": (float,),
}


def obey(proxy: FaultProxy, lines: Iterable[str]) -> Iterator[str]:
    """Do what each line says; yield the answers."""
    for line in lines:
        name, *words = line.split() or [""]
        try:
            arguments = _arguments(name, words)
            getattr(proxy, name)(*arguments)
        except (OSError, TypeError, ValueError) as error:
            yield f"error: {error}"
        else:
            yield repr(proxy)


def _arguments(name: str, words: Sequence[str]) -> list[object]:
    if name not in ARGUMENTS:
        raise ValueError(f"{name!r} is none of {', '.join(ARGUMENTS)}")
    kinds = ARGUMENTS[name]
    if len(words) > len(kinds):
        raise ValueError(f"{name} takes at most {len(kinds)} arguments")
    return [kind(word) for kind, word in zip(kinds, words, strict=False)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one proxy until the input ends."""
    parser = argparse.ArgumentParser("python -m sqla_poolkit.testing", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("host", help="of the server, or the path of its Unix socket")
    parser.add_argument("port", type=int, nargs="?", help="of the server")
    parser.add_argument("--listen", default="127.0.0.1", metavar="ADDRESS")
    told = parser.parse_args(arguments)
    with FaultProxy(told.host, told.port, listen=told.listen) as proxy:
        for answer in chain([proxy.port], obey(proxy, sys.stdin)):
            sys.stdout.write(f"{answer}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
