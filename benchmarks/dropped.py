"""What callers get while the network loses every packet, connects included."""

from __future__ import annotations

import threading
import time
from typing import Any

import sqlalchemy as sa

from ._harness import MANAGED_POOL, QUEUE_POOL, Plan, now
from ._outages import managed_engine, own_server, queue_engine
from ._report import Row, Table, at_most
from .frozen import HUNG, LATE, LATE_MS, LEAKED, OURS, RECOVERY, SETTINGS, THREADS, TIMEOUT, measure

CONNECT_TIMEOUT = 2.0
PLACE = "a place is taken by an attempt or a close for at most, s"


def run(plan: Plan) -> Table:
    """Drop all packets between two network namespaces."""
    seconds = plan.pick(20.0, 4.0)
    title = f"dropped: {seconds:g} s of lost packets, {THREADS} threads, pool_timeout={TIMEOUT:g}"
    bars = {LATE: LATE_MS, PLACE: CONNECT_TIMEOUT + 1.0}
    if plan.postgres is None:
        return Table(title, [Row(what, bar=at_most(bar)) for what, bar in bars.items()])
    from tests.network import LossyLink, NotPermitted  # late: the others need no tests

    figures: dict[str, dict[str, float]] = {}
    try:
        with own_server() as server, LossyLink(server.socket) as link:
            for name, make, settings in (
                (QUEUE_POOL, queue_engine, SETTINGS),
                (MANAGED_POOL, managed_engine, OURS),
            ):
                with make(server.url("psycopg2", link), **settings) as engine:
                    longest = _Places(engine)
                    found = measure(engine, server, link.drop, link.restore, seconds)
                    found[PLACE] = longest.stop()
                    for what, value in found.items():
                        figures.setdefault(what, {})[name] = value
    except NotPermitted as refused:
        rows = [Row(what, bar=at_most(bar)) for what, bar in bars.items()]
        return Table(title, rows, [str(refused)])
    bars |= {HUNG: 0.0, RECOVERY: 5.0, LEAKED: 0.0}
    rows = [
        Row(what, values, "{:.1f}", values[MANAGED_POOL], "{:.1f}", at_most(bars[what]))
        for what, values in figures.items()
    ]
    return Table(title, rows, ["libpq's connect_timeout is 2 s, the least that it knows"])


class _Places:
    """Looks all the time how long slots of our pool are neither open nor free."""

    def __init__(self, engine: sa.Engine) -> None:
        self._pool: Any = engine.pool
        self._since: dict[Any, float] = {}
        self._longest = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        machine = getattr(getattr(self._pool, "_driver", None), "machine", None)
        while machine is not None and not self._stop.wait(0.02):
            moment = now()
            taken = [s for s in list(machine.slots) if s.state in ("connecting", "closing")]
            self._since = {slot: self._since.get(slot, moment) for slot in taken}
            longest = max((moment - since for since in self._since.values()), default=0.0)
            self._longest = max(self._longest, longest)

    def stop(self) -> float:
        """Return the longest time in seconds; 0 where the pool does not tell."""
        self._stop.set()
        self._thread.join()
        time.sleep(0)
        return self._longest
