"""Whatever callers, database and clock do, in whatever order: the pool keeps its laws.

The test plays the driver of the state machine in virtual time.  It carries decisions out late and
in any order, lets attempts fail or hang, claims grants late, cancels, expires, interrupts.  Beside
it keeps its own simple books of the same pool, and after every step compares the two.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sqla_poolkit.config import PoolConfig
from sqla_poolkit.core.lanes import Lane
from sqla_poolkit.core.machine import Machine
from sqla_poolkit.core.slots import Close, Open, Request, Slot
from sqla_poolkit.core.snapshot import PoolSnapshot, read_machine

# All times are multiples of a power of two, so that sums of them are exact.
MOMENT = 1 / 64
SECONDS = st.sampled_from([0.0, MOMENT, 0.125, 0.5, 1.0, 2.0, 8.0, 64.0])
PICK = st.integers(0, 5)
LABELS = st.sampled_from(["web", "job", None])
CONNECT_TIMEOUT = 1.0
GRACE_SECONDS = 1.0
OUTCOMES = ("checkouts", "timeouts", "rejected", "cancelled", "failed", "unavailable")
COUNTERS = (
    *("requests", "waits", "connects", "connect_failures", "pings", "probes", "ping_failures"),
    *("reset_failures", "invalidations", "detached", "forgotten", "observer_errors"),
    *OUTCOMES,
)
ENDS = st.sampled_from([None, ValueError(), KeyboardInterrupt()])


@st.composite
def configs(draw: st.DrawFn) -> PoolConfig:
    max_size = draw(st.one_of(st.integers(1, 4), st.none()))
    return PoolConfig(
        min_size=draw(st.integers(0, 3 if max_size is None else max_size)),
        max_size=max_size,
        timeout=draw(st.sampled_from([8.0, None, 0.5, 0.0])),
        idle_timeout=draw(st.sampled_from([None, 2.0, 0.0])),
        max_lifetime=draw(st.sampled_from([None, 8.0, 1.0])),
        max_uses=draw(st.sampled_from([None, 1, 2])),
        connect_timeout=CONNECT_TIMEOUT,
        max_waiting=draw(st.sampled_from([None, 0, 1, 3])),
        max_connecting=draw(st.integers(1, 3)),
        use_lifo=draw(st.booleans()),
        pre_ping=draw(st.booleans()),
        ping_after=draw(st.sampled_from([1.0, 0.0])),
        upkeep=draw(st.sampled_from(["thread", "inline"])),
    )


@dataclass(eq=False)
class Connection:
    """What the driver keeps in a slot."""

    opened_at: float
    used_at: float
    uses: int = 0
    has_been_used: bool = False
    closes: int = 0


@dataclass(eq=False)
class Attempt:
    """An attempt to connect, ordered or under way."""

    began_at: float
    own_of: Caller | None = None
    is_started: bool = False
    is_in_turn: bool = True


@dataclass(eq=False)
class Caller:
    """Somebody who asked for a connection."""

    number: int
    label: str | None
    asked_at: float
    deadline: float
    has_listeners: bool
    lane: Lane
    request: Request | None = None
    slot: Slot | None = None
    stage: str = "asking"
    is_served: bool = False
    queued_at: float = 0.0
    has_queued: bool = False
    waited: float = 0.0
    held_since: float = 0.0


@dataclass
class Row:
    """What a label did, by the test's own books."""

    checkouts: int = 0
    use_seconds: float = 0.0
    wait_seconds: float = 0.0
    wait_caused_seconds: float = 0.0


@dataclass
class Expected:
    """The test's own counters and sums of durations."""

    counters: Counter[str] = field(default_factory=Counter)
    closes: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    records: Counter[str] = field(default_factory=Counter)
    rows: dict[str | None, Row] = field(default_factory=dict)

    def row(self, label: str | None) -> Row:
        return self.rows.setdefault(label, Row())

    def record(self, histogram: str, seconds: float) -> None:
        self.seconds[histogram] += seconds
        self.records[histogram] += 1


def describe(holder: object) -> tuple[str | None, None]:
    return holder, None


def assert_it_adds_up(snapshot: PoolSnapshot) -> None:
    """Hold a snapshot, or several merged ones, against the laws that a reader relies on."""
    s = snapshot
    assert s.open == s.idle + s.checked_out + s.checking
    assert s.connects - sum(s.closes.values()) - s.detached - s.forgotten == s.open + s.closing
    assert s.requests == sum(getattr(s, outcome) for outcome in OUTCOMES) + s.requesting
    assert s.waiting <= s.requesting
    waits = s.wait_time.sum_seconds + s.failed_wait_time.sum_seconds + s.waiting_seconds
    assert sum(row.wait_caused_seconds for row in s.labels.values()) == pytest.approx(waits)
    assert sum(row.wait_seconds for row in s.labels.values()) == pytest.approx(waits)
    assert sum(row.checkouts for row in s.labels.values()) == s.checkouts


class PoolLaws(RuleBasedStateMachine):
    @initialize(
        config=configs(),
        chance=st.sampled_from([0.0, 0.5, 0.9]),
        rushed=st.booleans(),
        lanes=st.sampled_from([1, 1, 2, 3]),
    )
    def set_up(self, config: PoolConfig, chance: float, rushed: bool, lanes: int) -> None:
        self.now = 1024.0
        self.chance = chance
        self.config = config
        self.machine = Machine(config, self.now, lambda: chance, lanes=lanes)
        self.lanes = list(self.machine.lanes)
        self.phase = "open"
        self.is_rushed = rushed
        self.numbers = count(1)
        self.expected = Expected()
        # where every slot is, by the driver's own knowledge
        self.attempts: dict[Slot, Attempt] = {}
        self.connections: dict[Slot, Connection] = {}
        self.closing: dict[Slot, str] = {}
        self.users: dict[Slot, Caller] = {}
        self.checking: set[Slot] = set()
        self.queue: list[Caller] = []
        self.callers: list[Caller] = []
        self.asking: dict[Request, Caller] = {}
        self.ever_opened: list[Connection] = []
        self.failing_with: tuple[str, BaseException | None] | None = None
        self.peaks = Counter[str]()
        self.failures_in_a_row = 0
        self.backs_off_until = -inf
        self.ticked_at = self.now
        self.places_before = 0
        self.counters_before = Counter[str]()
        self.snapshot_before: PoolSnapshot | None = None

    # -- what the driver knows ---------------------------------------------------------------

    @property
    def limit(self) -> float:
        return inf if self.config.max_size is None else self.config.max_size

    @property
    def idle(self) -> list[Slot]:
        return [
            slot for slot in self.connections if slot not in self.users and slot not in self.closing
        ]

    def queue_of(self, lane: Lane) -> list[Caller]:
        return [caller for caller in self.queue if caller.lane is lane]

    def states(self) -> dict[Slot, str]:
        """Return where every slot is."""
        states = dict.fromkeys(self.attempts, "connecting")
        for slot in self.connections:
            if slot in self.closing:
                states[slot] = "closing"
            elif slot in self.checking:
                states[slot] = "checking"
            else:
                states[slot] = "checked_out" if slot in self.users else "idle"
        return states

    def at(self, *stages: str) -> list[Caller]:
        return [caller for caller in self.callers if caller.stage in stages]

    @property
    def in_turn(self) -> int:
        return sum(attempt.is_in_turn for attempt in self.attempts.values())

    def note_peaks(self) -> None:
        held = Counter(self.states().values())["checked_out"]
        self.peaks["checked_out"] = max(self.peaks["checked_out"], held)
        self.peaks["waiting"] = max(self.peaks["waiting"], len(self.queue))

    # -- decisions ---------------------------------------------------------------------------

    def carry_on(self) -> None:
        """Take the decisions in, and hold each against the laws."""
        self.note_peaks()
        for decision in self.machine.take_decisions():
            if isinstance(decision, Open):
                assert self.phase != "closed"
                assert decision.slot not in self.states()
                self.attempts[decision.slot] = Attempt(self.now)
            elif isinstance(decision, Close):
                self.begin_to_close(decision.slot)
            else:
                self.wake(decision.request)
        self.failing_with = None
        self.note_peaks()

    def begin_to_close(self, slot: Slot) -> None:
        assert slot in self.connections
        assert slot not in self.users, "a connection is closed in its holder's hands"
        assert slot not in self.closing, "a connection is closed twice"
        self.closing[slot] = slot.reason
        assert self.is_justified(self.connections[slot], slot.reason)
        if slot.reason == "loop":
            assert len(self.attempts) + len(self.connections) >= self.limit
            assert any(caller.lane is not slot.lane for caller in self.queue)

    def is_justified(self, connection: Connection, reason: str) -> bool:
        """Tell whether a policy really asked for what was closed because of it."""
        config = self.config
        if reason == "age":
            return self.now - connection.opened_at >= 0.75 * config.max_lifetime
        if reason == "uses":
            return connection.uses == config.max_uses
        if reason == "resize":
            # this one is among those that close by now
            return len(self.attempts) + len(self.connections) - len(self.closing) >= self.limit
        if reason == "idle":
            still_open = len(self.connections) - len(self.closing)
            return config.idle_timeout is not None and still_open >= config.min_size
        return True

    def wake(self, request: Request) -> None:
        caller = self.asking[request]
        assert caller.stage == "waiting", "a caller is woken who does not wait"
        first = self.queue_of(caller.lane)[0]
        assert caller is first, "a caller is served before somebody who came first"
        self.leave_queue(caller)
        if request.slot is not None:
            assert request.failure is None
            caller.stage = "granted"
            self.hand_out(request.slot, caller)
            if request.slot.state == "checked_out":
                self.serve(caller, is_granted=True)
        elif request.failure == "timeout":
            assert self.now >= caller.deadline + GRACE_SECONDS, "given up before its time"
            self.end(caller, "timeouts")
        else:
            failure = ("closed", None) if self.phase == "closed" else self.failing_with
            assert (request.failure, request.error) == failure
            self.failing_with = None
            self.end(caller, "failed")

    def hand_out(self, slot: Slot, caller: Caller) -> None:
        """Note who has a slot from now on, and hold that against the laws."""
        assert slot not in self.users, "a slot has two holders"
        assert slot.lane is caller.lane, "a connection is used in another lane than its own"
        assert slot not in self.closing
        caller.slot = slot
        self.users[slot] = caller
        if slot not in self.connections:
            self.attempts[slot] = Attempt(self.now, own_of=caller)
            return
        assert self.phase == "open"
        connection = self.connections[slot]
        if self.config.max_lifetime is not None:
            assert self.now - connection.opened_at < self.config.max_lifetime
        just_opened = self.now - connection.opened_at <= self.config.ping_after
        if self.config.pre_ping and (connection.has_been_used or not just_opened):
            self.checking.add(slot)
            assert slot.needs_ping == (self.now - connection.used_at >= self.config.ping_after)
        else:
            self.begin_use(slot, caller)

    def begin_use(self, slot: Slot, caller: Caller) -> None:
        connection = self.connections[slot]
        connection.uses += 1
        assert connection.uses <= (self.config.max_uses or inf)
        caller.held_since = self.now

    def serve(self, caller: Caller, *, is_granted: bool = False) -> None:
        """Note that a caller has its connection; with listeners it counts when they agree."""
        self.expected.record("checkout_time", self.now - caller.asked_at)
        self.record_wait(caller, "wait_time")
        if not is_granted:
            caller.stage = "holding"
        if not caller.has_listeners:
            self.confirm_service(caller)
        elif not is_granted:
            self.machine.hold_back(caller.slot)

    def confirm_service(self, caller: Caller) -> None:
        caller.is_served = True
        self.expected.counters["checkouts"] += 1
        self.expected.row(caller.label).checkouts += 1

    def record_wait(self, caller: Caller, histogram: str) -> None:
        if caller.has_queued:
            self.expected.record(histogram, caller.waited)
            self.expected.row(caller.label).wait_seconds += caller.waited
        caller.waited = 0.0

    def end(self, caller: Caller, outcome: str) -> None:
        assert caller.stage != "over", "a request ends twice"
        assert not caller.is_served, "a request ends twice"
        caller.stage = "over"
        self.callers.remove(caller)
        self.users.pop(caller.slot, None)
        self.expected.counters[outcome] += 1
        if outcome != "rejected":
            self.record_wait(caller, "failed_wait_time")

    def join_queue(self, caller: Caller) -> None:
        caller.stage = "waiting"
        caller.slot = None
        caller.queued_at = self.now
        self.expected.counters["waits"] += not caller.has_queued
        caller.has_queued = True
        self.queue.append(caller)
        self.queue.sort(key=lambda each: each.number)

    def leave_queue(self, caller: Caller) -> None:
        self.queue.remove(caller)
        caller.waited += self.now - caller.queued_at

    # -- callers ask -------------------------------------------------------------------------

    @rule(
        late=st.sampled_from([0.0, 0.0, MOMENT]),
        label=LABELS,
        has_listeners=st.booleans(),
        lane=PICK,
    )
    def ask(self, late: float, label: str | None, has_listeners: bool, lane: int) -> None:
        self.make_caller(self.now - late, label, has_listeners, chosen(self.lanes, lane))

    def make_caller(
        self, asked_at: float, label: str | None, has_listeners: bool, lane: Lane
    ) -> Caller:
        timeout = self.config.timeout
        deadline = inf if timeout is None else asked_at + timeout
        caller = Caller(next(self.numbers), label, asked_at, deadline, has_listeners, lane)
        self.callers.append(caller)
        self.expected.counters["requests"] += 1
        answer = self.expected_answer(caller)
        got = self.machine.checkout(asked_at, self.now, label, lane)
        self.receive(caller, got, answer)
        return caller

    def expected_answer(self, caller: Caller) -> str:
        """Return what the machine should do with somebody who asks now."""
        if self.phase == "closed":
            return "closed"
        config = self.config
        is_first = self.phase == "open"
        rivals = self.queue_of(caller.lane)
        is_first = is_first and all(other.number > caller.number for other in rivals)
        lifetime = config.max_lifetime or inf
        if is_first and any(
            self.now - self.connections[slot].opened_at < lifetime
            for slot in self.idle
            if slot.lane is caller.lane
        ):
            return "idle"
        has_room = len(self.attempts) + len(self.connections) < self.limit
        if is_first and has_room and config.timeout == 0:
            return "own connect"
        is_turn = self.in_turn < config.max_connecting
        if is_first and has_room and is_turn and config.upkeep == "inline":
            return "own connect"
        if config.timeout == 0:
            return "timeout"
        if caller.stage == "asking" and len(self.queue) >= (
            inf if config.max_waiting is None else config.max_waiting
        ):
            return "rejected"
        return "wait"

    def receive(self, caller: Caller, got: Slot | Request, answer: str) -> None:
        """Note what the machine answered, and hold it against what it should have been."""
        if isinstance(got, Slot):
            assert answer == ("own connect" if got.state == "connecting" else "idle")
            self.carry_on()
            caller.stage = "claimed"
            self.hand_out(got, caller)
            if got.state == "checked_out":
                self.serve(caller)
            self.note_peaks()
            return
        caller.request = got
        got.is_held_back = caller.has_listeners
        self.asking[got] = caller
        if answer == "wait":
            self.join_queue(caller)
        else:
            assert got.failure == answer
            outcomes = {"closed": "failed", "timeout": "timeouts", "rejected": "rejected"}
            self.end(caller, outcomes[answer])
        self.carry_on()

    @precondition(lambda self: self.at("granted"))
    @rule(pick=PICK)
    def wake_up(self, pick: int) -> None:
        """Let a caller find what it was granted."""
        self.take_grant(chosen(self.at("granted"), pick))

    def take_grant(self, caller: Caller) -> None:
        assert caller.request.slot is caller.slot
        caller.stage = "holding" if caller.slot.state == "checked_out" else "claimed"

    @precondition(lambda self: any(c.deadline < inf for c in self.at("waiting", "granted")))
    @rule(pick=PICK)
    def expire(self, pick: int) -> None:
        """Let a deadline pass; who was granted a connection at the last moment uses it."""
        waiting = [c for c in self.at("waiting", "granted") if c.deadline < inf]
        caller = chosen(waiting, pick)
        self.pass_time(max(0.0, caller.deadline - self.now))
        was_granted = caller.stage == "granted"
        if not was_granted:
            self.leave_queue(caller)
            self.end(caller, "timeouts")
        slot = self.machine.expire(caller.request, self.now)
        if was_granted:
            assert slot is caller.slot
            self.take_grant(caller)
        else:
            assert (slot, caller.request.failure) == (None, "timeout")
        self.carry_on()

    @precondition(lambda self: self.at("waiting", "granted"))
    @rule(pick=PICK, error=ENDS)
    def cancel(self, pick: int, error: BaseException | None) -> None:
        """Let a caller go away, before or after it was granted a connection."""
        caller = chosen(self.at("waiting", "granted"), pick)
        slot = caller.slot
        if slot in self.connections and slot not in self.checking:
            self.note_return(caller, self.now)
        else:
            if caller.stage == "waiting":
                self.leave_queue(caller)
            self.attempts.pop(slot, None)
            self.checking.discard(slot)
            self.end(caller, "cancelled")
        if error is None:
            self.machine.cancel(caller.request, self.now)
        else:
            self.machine.abandon(caller.request, self.now, error)
        self.carry_on()

    @precondition(lambda self: self.checking_callers())
    @rule(pick=PICK, pinged=st.booleans(), probed=st.booleans())
    def check_passes(self, pick: int, pinged: bool, probed: bool) -> None:
        caller = chosen(self.checking_callers(), pick)
        self.finish_check(caller, pinged, probed, None)

    @precondition(lambda self: self.checking_callers())
    @rule(pick=PICK, pinged=st.booleans(), stale=st.sampled_from(["ping", "probe"]))
    def check_fails(self, pick: int, pinged: bool, stale: str) -> None:
        caller = chosen(self.checking_callers(), pick)
        self.finish_check(caller, pinged, True, stale)

    def checking_callers(self) -> list[Caller]:
        return [caller for caller in self.at("claimed") if caller.slot in self.checking]

    def finish_check(self, caller: Caller, pinged: bool, probed: bool, stale: str | None) -> None:
        slot = caller.slot
        is_unwanted = slot.reason is not None
        self.expected.counters["pings"] += pinged
        self.expected.counters["probes"] += probed
        self.expected.counters["ping_failures"] += stale is not None
        self.checking.remove(slot)
        answer = "wait"
        if stale or is_unwanted:
            del self.users[slot]
            # it goes before anything else is looked for
            self.closing[slot] = stale or slot.reason
            answer = self.expected_answer(caller)
            del self.closing[slot]
        got = self.machine.checked(slot, self.now, pinged=pinged, probed=probed, stale=stale)
        if not (stale or is_unwanted):
            assert got is slot
            self.begin_use(slot, caller)
            self.serve(caller)
            self.carry_on()
        else:
            self.receive(caller, got, answer)

    @precondition(lambda self: self.checking_callers())
    @rule(pick=PICK, error=ENDS.filter(bool))
    def check_is_interrupted(self, pick: int, error: BaseException) -> None:
        caller = chosen(self.checking_callers(), pick)
        self.checking.remove(caller.slot)
        self.end(caller, "failed" if isinstance(error, Exception) else "cancelled")
        self.machine.abandon(caller.slot, self.now, error)
        self.carry_on()
        assert caller.slot in self.closing

    # -- holders -----------------------------------------------------------------------------

    def held_back(self) -> list[Caller]:
        return [caller for caller in self.at("holding") if not caller.is_served]

    @precondition(lambda self: self.held_back())
    @rule(pick=PICK)
    def listeners_agree(self, pick: int) -> None:
        caller = chosen(self.held_back(), pick)
        self.machine.confirm(caller.slot)
        self.confirm_service(caller)

    @precondition(lambda self: self.at("holding"))
    @rule(pick=PICK, reason=st.sampled_from([None, None, None, "reset", "lost", "detached"]))
    def give_back(self, pick: int, reason: str | None) -> None:
        self.return_slot(chosen(self.at("holding"), pick), self.now, reason)

    def return_slot(self, caller: Caller, returned_at: float, reason: str | None = None) -> None:
        slot = caller.slot
        is_unwanted = slot.reason is not None or reason == "reset"
        self.note_return(caller, self.now if self.queue else returned_at, reason)
        assert self.machine.checkin(slot, returned_at, reason)
        self.carry_on()
        if is_unwanted:
            assert slot in self.closing or slot not in self.connections

    def note_return(self, caller: Caller, ends_at: float, reason: str | None = None) -> None:
        """Note that a hold ends, confirmed or not."""
        slot = caller.slot
        counters = self.expected.counters
        connection = self.connections[slot]
        used = ends_at - caller.held_since
        self.expected.record("use_time", used)
        self.expected.row(caller.label).use_seconds += used
        counters["failed"] += not caller.is_served
        counters["detached"] += reason == "detached"
        counters["forgotten"] += reason == "forgotten"
        if reason == "lost":
            counters["invalidations"] += 1
            self.expected.closes[slot.reason or "invalidated"] += 1
            connection.closes += 1
        if reason in ("lost", "detached", "forgotten"):
            del self.connections[slot]
        connection.used_at = ends_at
        connection.has_been_used = True
        caller.stage = "over"
        self.callers.remove(caller)
        del self.users[slot]

    @precondition(lambda self: self.at("holding") and self.phase != "closed")
    @rule(pick=PICK, label=LABELS)
    def give_back_while_somebody_asks(self, pick: int, label: str | None) -> None:
        """Let a return be dealt with a moment after it happened, behind a newcomer."""
        caller = chosen(self.at("holding"), pick)
        returned_at = self.now
        self.pass_time(MOMENT)
        newcomer = self.make_caller(self.now, label, False, caller.lane)
        is_noted = newcomer.stage == "waiting" or not self.queue
        self.return_slot(caller, returned_at if is_noted else self.now)

    @precondition(lambda self: self.at("holding"))
    @rule(pick=PICK, seconds=SECONDS)
    def reconnect_in_place(self, pick: int, seconds: float) -> None:
        slot = chosen(self.at("holding"), pick).slot
        self.connections[slot].closes += 1
        self.open_connection(slot, seconds)
        self.connections[slot].uses = 1
        self.connections[slot].has_been_used = True
        self.expected.counters["invalidations"] += 1
        self.expected.closes["invalidated"] += 1
        self.machine.reconnected(slot, self.now, seconds)
        self.carry_on()

    # -- the database ------------------------------------------------------------------------

    def ordered(self) -> list[Slot]:
        return [slot for slot, a in self.attempts.items() if not a.is_started and not a.own_of]

    def under_way(self) -> list[Slot]:
        return [
            slot
            for slot, attempt in self.attempts.items()
            if attempt.is_started or (attempt.own_of and attempt.own_of.stage == "claimed")
        ]

    @precondition(lambda self: self.ordered())
    @rule(pick=PICK)
    def start_attempt(self, pick: int) -> None:
        slot = chosen(self.ordered(), pick)
        is_unwanted = slot.reason is not None
        is_for_nobody = slot.purpose == "demand" and not self.queue_of(slot.lane)
        if self.machine.starting(slot, self.now):
            assert not is_unwanted, "an attempt begins that nobody wants"
            assert not is_for_nobody, "an attempt begins whose demand is gone"
            self.attempts[slot].began_at = self.now
            self.attempts[slot].is_started = True
        else:
            del self.attempts[slot]
        self.carry_on()

    def open_connection(self, slot: Slot, seconds: float) -> None:
        slot.resource = self.connections[slot] = Connection(self.now, self.now)
        self.ever_opened.append(slot.resource)
        self.expected.counters["connects"] += 1
        self.expected.record("connect_time", seconds)

    @precondition(lambda self: self.under_way())
    @rule(pick=PICK)
    def attempt_succeeds(self, pick: int) -> None:
        slot = chosen(self.under_way(), pick)
        attempt = self.attempts.pop(slot)
        self.open_connection(slot, self.now - attempt.began_at)
        self.failures_in_a_row = 0
        self.backs_off_until = -inf
        self.machine.connected(slot, self.now)
        caller = attempt.own_of
        if caller is None:
            self.carry_on()
        elif self.phase == "closed":
            self.end(caller, "failed")
            self.carry_on()
            assert slot in self.closing
        else:
            assert slot.state == "checked_out"
            self.begin_use(slot, caller)
            self.serve(caller)
            self.carry_on()

    @precondition(lambda self: self.under_way())
    @rule(pick=PICK)
    def attempt_fails(self, pick: int) -> None:
        slot = chosen(self.under_way(), pick)
        attempt = self.attempts.pop(slot)
        error = ConnectionError("refused")
        self.expected.counters["connect_failures"] += 1
        pause = min(1.0, 0.1 * 2**self.failures_in_a_row) * (1 + self.chance / 2)
        self.failures_in_a_row += 1
        self.backs_off_until = self.now + pause
        head = None
        if attempt.own_of:
            self.end(attempt.own_of, "failed")
            self.machine.abandon(slot, self.now, error)
            self.carry_on()
            return
        is_empty = not any(s.lane is slot.lane for s in self.connections if s not in self.closing)
        queue = self.queue_of(slot.lane)
        in_turn = sum(a.is_in_turn for s, a in self.attempts.items() if s.lane is slot.lane)
        if queue and is_empty and in_turn < len(queue):
            head = queue[0]
            self.failing_with = ("failed", error)
        self.machine.connect_failed(slot, self.now, error)
        self.carry_on()
        assert head is None or head.stage == "over", "nobody hears of a failed attempt"

    @precondition(lambda self: self.closing)
    @rule(pick=PICK)
    def finish_close(self, pick: int) -> None:
        slot = chosen(list(self.closing), pick)
        self.expected.closes[self.closing.pop(slot)] += 1
        self.connections.pop(slot).closes += 1
        self.machine.closed(slot, self.now)
        self.carry_on()

    # -- time --------------------------------------------------------------------------------

    @rule(seconds=SECONDS)
    def pass_time(self, seconds: float) -> None:
        """Charge the waiting to those who could end it, as the books promise."""
        rows = []
        for slot, state in self.states().items():
            if state == "checked_out":
                rows.append(self.users[slot].label)
            elif state != "idle":
                rows.append(f"({state})")
        waited = seconds * len(self.queue)
        for label in rows or ["(pool)"]:
            self.expected.row(label).wait_caused_seconds += waited / max(1, len(rows))
        self.now += seconds

    @rule()
    def tick(self) -> None:
        self.ticked_at = self.now
        for attempt in self.attempts.values():
            if self.now - attempt.began_at >= CONNECT_TIMEOUT and self.phase != "closed":
                attempt.is_in_turn = False
        assert self.machine.tick(self.now) > self.now
        self.carry_on()
        assert all(self.now < caller.deadline + GRACE_SECONDS for caller in self.queue)

    # -- the owner of the pool ---------------------------------------------------------------

    @rule()
    def warm(self) -> None:
        self.machine.warm(self.now)
        self.carry_on()

    @precondition(lambda self: self.phase == "open")
    @rule()
    def pause(self) -> None:
        self.machine.pause()
        self.phase = "paused"

    @precondition(lambda self: self.phase == "paused")
    @rule()
    def resume(self) -> None:
        self.phase = "open"
        self.machine.resume(self.now)
        self.carry_on()

    @rule(max_size=st.one_of(st.integers(1, 4), st.none()), min_size=st.integers(0, 3))
    def resize(self, max_size: int | None, min_size: int) -> None:
        min_size = min_size if max_size is None else min(min_size, max_size)
        self.config = self.config.resized(min_size, max_size)
        self.machine.resize(self.config, self.now)
        self.carry_on()

    @rule()
    def retire_all(self) -> None:
        self.retire_everything("retired")
        self.machine.retire_all(self.now)
        self.carry_on()
        assert self.idle == []

    def retire_everything(self, reason: str) -> None:
        for attempt in self.attempts.values():
            if attempt.own_of is None:
                attempt.is_in_turn = False

    @rule()
    def dispose(self) -> None:
        self.machine.dispose(self.now)
        self.carry_on()
        assert self.idle == []

    @precondition(lambda self: self.expected.counters["requests"] > 4)
    @rule()
    def close(self) -> None:
        self.phase = "closed"
        self.retire_everything("closed")
        self.machine.close(self.now)
        self.carry_on()

    # -- event loops -------------------------------------------------------------------------

    @precondition(lambda self: len(self.lanes) < 3)
    @rule()
    def add_lane(self) -> None:
        self.lanes.append(self.machine.add_lane())

    @precondition(lambda self: len(self.lanes) > 1)
    @rule(pick=PICK)
    def forget_lane(self, pick: int) -> None:
        """Let an event loop be closed, with all who are on it."""
        lane = chosen(self.lanes, pick)
        self.lanes.remove(lane)
        for caller in [caller for caller in self.callers if caller.lane is lane]:
            slot = caller.slot
            if slot in self.connections and slot not in self.checking:
                self.note_return(caller, self.now, "forgotten")
            else:
                if caller.stage == "waiting":
                    self.leave_queue(caller)
                self.checking.discard(slot)
                self.end(caller, "cancelled")
        slots = [slot for slot in self.machine.slots if slot.lane is lane]
        for slot in slots:
            self.attempts.pop(slot, None)
            self.closing.pop(slot, None)
            self.expected.counters["forgotten"] += self.connections.pop(slot, None) is not None
        self.machine.forget_lane(lane, self.now)
        assert {slot.state for slot in slots} <= {"gone"}
        self.carry_on()

    @precondition(lambda self: len(self.lanes) > 1)
    @rule(pick=PICK)
    def put_to_sleep(self, pick: int) -> None:
        """Let an event loop be stopped that nobody waits on; the next who asks there wakes it."""
        lane = chosen(self.lanes, pick)
        if self.queue_of(lane):
            return
        for slot in [slot for slot in self.states() if slot.lane is lane]:
            if slot in self.attempts and self.attempts[slot].own_of is None:
                del self.attempts[slot]
            elif slot in self.closing:
                self.expected.closes[self.closing.pop(slot)] += 1
                self.connections.pop(slot).closes += 1
        self.machine.put_to_sleep(lane, self.now)
        self.carry_on()

    # -- the laws ----------------------------------------------------------------------------

    @invariant()
    def slots_are_where_the_driver_knows_them(self) -> None:
        states = self.states()
        assert {slot: slot.state for slot in self.machine.slots} == states
        assert {slot.lane for slot in states} <= set(self.machine.lanes)
        assert sorted(id(slot) for lane in self.machine.lanes for slot in lane.idle) == sorted(
            map(id, self.idle)
        )

    @invariant()
    def gauges_are_right(self) -> None:
        machine = self.machine
        states = Counter(self.states().values())
        assert {
            "open": machine.open,
            "idle": machine.idle,
            "checked_out": machine.checked_out,
            "checking": machine.checking,
            "connecting": machine.connecting,
            "closing": machine.closing,
            "requesting": machine.books.requesting,
            "waiting": [self.asking[request] for request in machine.queue],
        } == {
            "open": states["idle"] + states["checked_out"] + states["checking"],
            "idle": states["idle"],
            "checked_out": states["checked_out"],
            "checking": states["checking"],
            "connecting": states["connecting"],
            "closing": states["closing"],
            "requesting": sum(not caller.is_served for caller in self.callers),
            "waiting": self.queue,
        }

    @invariant()
    def counters_are_right_and_never_fall(self) -> None:
        books = self.machine.books
        counters = Counter({name: getattr(books, name) for name in COUNTERS})
        assert counters == self.expected.counters
        assert dict(books.closes) == dict(self.expected.closes)
        assert counters >= self.counters_before
        self.counters_before = counters

    @invariant()
    def limit_is_a_limit(self) -> None:
        """Never more than ``max_size``; after it was lowered, never more than there were."""
        places = len(self.machine.slots)
        assert places <= max(self.limit, self.places_before)
        self.places_before = places
        if places - self.machine.closing > self.limit:
            assert self.idle == []
        if self.config.timeout != 0:
            assert self.in_turn <= self.config.max_connecting

    @invariant()
    def nobody_waits_beside_an_idle_connection(self) -> None:
        for lane in self.lanes:
            is_idle = any(slot.lane is lane for slot in self.idle)
            assert not (self.queue_of(lane) and is_idle) or self.phase == "paused"
        if self.phase == "closed":
            assert (self.queue, self.idle) == ([], [])

    @invariant()
    def nobody_waits_beside_a_free_place(self) -> None:
        """While somebody waits and there is room, an attempt is on its way."""
        has_room = len(self.machine.slots) < self.limit
        holds_back = self.backs_off_until > self.ticked_at
        if self.queue and has_room and self.phase == "open" and not holds_back:
            assert self.attempts
            assert self.in_turn

    @invariant()
    def nobody_waits_with_nothing_while_another_lane_has_idle_connections(self) -> None:
        """A full pool makes room for a lane that has no connection at all."""
        is_held_up = self.in_turn >= self.config.max_connecting
        if self.backs_off_until > self.ticked_at or self.phase != "open" or is_held_up:
            return
        makes_room = len(self.machine.slots) < self.limit or "loop" in self.closing.values()
        for lane in self.lanes:
            if self.queue_of(lane) and not any(slot.lane is lane for slot in self.states()):
                assert makes_room or not self.idle

    @invariant()
    def somebody_answers_for_every_wait(self) -> None:
        machine, books = self.machine, self.machine.books
        caused = (
            books.caused_by_connecting
            + books.caused_by_checking
            + books.caused_by_closing
            + books.caused_by_pool
            + sum(row.wait_caused_seconds for row in books.rows.values())
            + sum(books.caused - s.mark for s in machine.slots if s.state == "checked_out")
            + (self.now - books.integrated_until) * machine.waiting
        )
        in_progress = sum(
            caller.waited + (self.now - caller.queued_at if caller.stage == "waiting" else 0.0)
            for caller in self.callers
        )
        ended = books.wait_time.sum_seconds + books.failed_wait_time.sum_seconds
        assert caused == pytest.approx(ended + in_progress)

    @invariant()
    def snapshot_tells_all_this(self) -> None:
        if not self.is_rushed:
            self.read()

    @rule()
    def read(self) -> None:
        """Compare a snapshot with the test's own books, and the rows of who made whom wait."""
        snapshot = PoolSnapshot(
            name="pool",
            pool_class="Machine",
            pid=None,
            taken_at=self.now,
            **read_machine(self.machine, self.now, describe, has_callers=False),
        )
        assert_it_adds_up(snapshot)
        states = Counter(self.states().values())
        histograms = ("checkout_time", "wait_time", "failed_wait_time", "use_time", "connect_time")
        assert {
            "states": Counter(slot.state for slot in snapshot.slots),
            "peaks": (snapshot.peak_checked_out, snapshot.peak_waiting),
            "oldest wait": snapshot.oldest_wait_seconds,
            "records": {name: getattr(snapshot, name).count for name in histograms},
            "seconds": {name: getattr(snapshot, name).sum_seconds for name in histograms},
            "checkins": snapshot.checkins,
        } == {
            "states": states,
            "peaks": (self.peaks["checked_out"], self.peaks["waiting"]),
            "oldest wait": max(
                (c.waited + self.now - c.queued_at for c in self.queue), default=0.0
            ),
            "records": {name: self.expected.records[name] for name in histograms},
            "seconds": {name: self.expected.seconds[name] for name in histograms},
            "checkins": self.expected.records["use_time"],
        }
        self.compare_rows(snapshot)
        if self.snapshot_before is not None:
            self.compare_with_an_earlier(snapshot, self.snapshot_before)
        self.snapshot_before = snapshot

    def compare_rows(self, snapshot: PoolSnapshot) -> None:
        rows = {label: Row(**vars(row)) for label, row in self.expected.rows.items()}
        for caller in self.callers:
            row = rows.setdefault(caller.label, Row())
            row.wait_seconds += caller.waited
            if caller.stage == "waiting":
                row.wait_seconds += self.now - caller.queued_at
            is_held = caller.slot in self.connections and caller.slot not in self.checking
            if is_held:
                row.use_seconds += self.now - caller.held_since
        assert {
            (label, name): getattr(row, name)
            for label, row in snapshot.labels.items()
            for name in vars(Row())
            if getattr(row, name)
        } == pytest.approx(
            {
                (label or "(unlabelled)", name): value
                for label, row in rows.items()
                for name, value in vars(row).items()
                if value
            }
        )

    def compare_with_an_earlier(self, later: PoolSnapshot, earlier: PoolSnapshot) -> None:
        """An interval and a sum of snapshots obey the same laws."""
        assert_it_adds_up(PoolSnapshot.merge([later, earlier]))
        interval = later - earlier
        ended = sum(getattr(interval, outcome) for outcome in OUTCOMES)
        assert interval.requests == ended + later.requesting - earlier.requesting
        left = interval.connects - sum(interval.closes.values())
        left -= interval.detached + interval.forgotten
        assert left == later.open + later.closing - earlier.open - earlier.closing
        waited = (
            interval.wait_time.sum_seconds
            + interval.failed_wait_time.sum_seconds
            + later.waiting_seconds
            - earlier.waiting_seconds
        )
        caused = sum(row.wait_caused_seconds for row in interval.labels.values())
        assert caused == pytest.approx(waited, abs=1e-6)

    # -- the end -----------------------------------------------------------------------------

    def teardown(self) -> None:
        """Let everybody be served and go, then close: the pool is empty and the books balance."""
        if not hasattr(self, "machine"):
            return
        if self.phase == "paused":
            self.resume()
        for _ in range(2000):
            if not self.go_on():
                break
        else:
            raise AssertionError("the pool never comes to rest")
        assert (self.queue, self.callers, self.ordered()) == ([], [], [])
        self.close()
        while self.closing:
            self.finish_close(0)
        self.read()
        assert (len(self.machine.slots), self.machine.books.requesting) == (0, 0)
        assert self.machine.next_tick(self.now) == inf
        kept = self.expected.counters["detached"] + self.expected.counters["forgotten"]
        assert Counter(c.closes for c in self.ever_opened) == Counter(
            {0: kept, 1: len(self.ever_opened) - kept}
        )

    def go_on(self) -> bool:
        """Do one thing that is due; return whether there was any."""
        todo = [
            (self.closing, self.finish_close),
            (self.ordered(), self.start_attempt),
            (self.under_way(), self.attempt_succeeds),
            (self.at("granted"), self.wake_up),
            (self.held_back(), self.listeners_agree),
        ]
        for things, do in todo:
            if things:
                do(0)
                return True
        if self.checking_callers():
            self.check_passes(0, False, False)
        elif self.at("holding"):
            self.give_back(0, None)
        elif self.queue:
            self.pass_time(MOMENT)
            self.tick()
        else:
            return False
        return True


def chosen(things: list, pick: int):
    return things[pick % len(things)]


def test_the_pool_keeps_its_laws_whatever_happens():
    run_state_machine_as_test(PoolLaws, settings=settings(settings.default, stateful_step_count=40))
