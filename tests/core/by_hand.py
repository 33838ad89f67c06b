"""A pool whose connections are opened, checked and closed by the test, step by step."""

from __future__ import annotations

from typing import Any

from sqla_poolkit.config import PoolConfig
from sqla_poolkit.core.machine import Machine
from sqla_poolkit.core.slots import Check, Close, ConnectFault, Locate, Open, Request, Slot, Wake
from sqla_poolkit.core.snapshot import PoolSnapshot, read_machine

REFUSED = ConnectionError("refused")


class Pool:
    """A state machine with a driver that does nothing by itself.

    Connections to open, to close and to keep alive gather in ``opening``, ``closing`` and
    ``keeping``, the names of woken callers in ``woken``, those of holders to be looked for in
    ``sought``.
    """

    def __init__(
        self, *, opened: int = 0, chance: float = 0.5, lanes: int = 1, **settings: Any
    ) -> None:
        self.now = 0.0
        self.config = PoolConfig(**settings)
        self.machine = Machine(self.config, self.now, lambda: chance, lanes=lanes)
        self.opening: list[Slot] = []
        self.closing: list[Slot] = []
        self.keeping: list[Slot] = []
        self.woken: list[str] = []
        self.sought: list[Any] = []
        for _ in range(opened):
            # holders of timeout 0 connect themselves; this one is opened for nobody
            self.machine._open(self.machine.lanes[0], self.now, "fill")
            self.open_next()

    def step(self, result: Any = None) -> Any:
        """Sort what was decided."""
        for decision in self.machine.take_decisions():
            if isinstance(decision, Open):
                self.opening.append(decision.slot)
            elif isinstance(decision, Close):
                self.closing.append(decision.slot)
            elif isinstance(decision, Check):
                self.keeping.append(decision.slot)
            elif isinstance(decision, Wake):
                self.woken.append(decision.request.holder)
            elif isinstance(decision, Locate):
                self.sought.extend(slot.holder for slot in decision.slots)
        return result

    def ask(
        self, who: str = "somebody", since: float | None = None, lane: int = 0
    ) -> Slot | Request:
        asked_at = self.now if since is None else since
        return self.step(self.machine.checkout(asked_at, self.now, who, self.machine.lanes[lane]))

    def ask_each(self, names: str) -> list[Any]:
        return [self.ask(name) for name in names]

    def give_back(self, slot: Slot, reason: Any = None) -> bool:
        return self.step(self.machine.checkin(slot, self.now, reason))

    def start_next(self) -> Slot | None:
        """Begin the attempt ordered first; return its slot unless nobody wants it any more."""
        self.step()
        slot = self.opening.pop(0)
        return slot if self.step(self.machine.starting(slot, self.now)) else None

    def connect(self, slot: Slot) -> Slot:
        self.machine.connected(slot, self.now)
        return self.step(slot)

    def fail(self, slot: Slot, fault: ConnectFault = "other") -> None:
        self.step(self.machine.connect_failed(slot, self.now, REFUSED, fault))

    def open_next(self) -> Slot:
        slot = self.start_next()
        assert slot is not None
        return self.connect(slot)

    def fail_next(self, fault: ConnectFault = "other") -> None:
        slot = self.start_next()
        assert slot is not None
        self.fail(slot, fault)

    def close_next(self) -> None:
        slot = self.closing.pop(0)
        self.step(self.machine.closed(slot, self.now))

    def found(self, slot: Slot, stale: Any = None, *, was_cut: bool = False) -> Slot | Request:
        """Say what a check found out."""
        return self.step(
            self.machine.checked(
                slot, self.now, pinged=True, probed=False, stale=stale, was_cut=was_cut
            )
        )

    def keep(self, slot: Slot, *, is_alive: bool = True, was_cut: bool = False) -> None:
        """Say how the ping of an idle connection ended."""
        if slot in self.keeping:
            self.keeping.remove(slot)
        self.step(self.machine.kept(slot, self.now, is_alive=is_alive, was_cut=was_cut))

    def lose(self, slot: Slot) -> None:
        """Let the server end a connection in its holder's hands."""
        self.step(self.machine.note_death(slot, self.now))
        self.give_back(slot, "lost")

    def tick(self, now: float | None = None) -> float:
        self.now = self.now if now is None else now
        return self.step(self.machine.tick(self.now))

    def call(self, method: str, *arguments: Any) -> None:
        self.step(getattr(self.machine, method)(*arguments, self.now))

    def resize(self, min_size: int, max_size: int | None) -> None:
        self.config = self.config.resized(min_size, max_size)
        self.call("resize", self.config)

    @property
    def gauges(self) -> dict[str, int]:
        """The gauges that are not zero."""
        machine = self.machine
        gauges = {
            "idle": machine.idle,
            "checked_out": machine.checked_out,
            "checking": machine.checking,
            "connecting": machine.connecting,
            "closing": machine.closing,
            "waiting": machine.waiting,
        }
        return {name: number for name, number in gauges.items() if number}

    @property
    def held(self) -> list[Slot]:
        return [slot for slot in self.machine.slots if slot.state == "checked_out"]

    @property
    def queue(self) -> list[Any]:
        return [request.holder for request in self.machine.queue]

    def read(self) -> PoolSnapshot:
        values = read_machine(self.machine, self.now, lambda h: (h, None), has_callers=False)
        return PoolSnapshot("pool", "Machine", None, self.now, **values)

    def counters(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self.machine.books, name) for name in names}


def answer(got: Slot | Request) -> str | None:
    """Return the state of a slot, or why a request failed at once."""
    return got.state if isinstance(got, Slot) else got.failure
