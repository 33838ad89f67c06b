"""When connecting fails: when the database counts as down, who tries again, who is told."""

from __future__ import annotations

from itertools import pairwise
from math import inf
from typing import Any

import pytest

from sqla_poolkit.core.policies import Breaker
from sqla_poolkit.core.slots import ConnectFault, Slot
from tests.core.by_hand import REFUSED, Pool, answer

FAULTS_OF_AN_OUTAGE = ["refused", "authentication", "other"]


def fail(
    breaker: Breaker,
    *moments: float,
    took: float = 0.0,
    fault: ConnectFault = "refused",
    chance: float = 0.5,
    is_bare: bool = True,
) -> list[bool]:
    """Let attempts fail at these moments; return which of them opened the breaker."""
    return [breaker.failed(now - took, now, chance, fault, is_bare=is_bare) for now in moments]


def open_breaker(**how: Any) -> Breaker:
    """Return a breaker that has just opened, at 1.0."""
    breaker = Breaker()
    assert fail(breaker, 0.0, 0.5, 1.0, **how) == [False, False, True]
    return breaker


def pauses(breaker: Breaker, number: int, **how: Any) -> list[float]:
    """Return how long it waits after each of so many failures, each at the first moment allowed."""
    waits = []
    now = max(breaker.until, 0.0)
    for _ in range(number):
        fail(breaker, now, **how)
        waits.append(breaker.until - now)
        now = breaker.until
    return waits


# -- when it opens ---------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS_OF_AN_OUTAGE)
def test_the_third_failure_in_a_row_opens_it_after_half_a_second(fault: ConnectFault):
    breaker = Breaker()
    opened = fail(breaker, 0.0, 0.25, 0.5, fault=fault)
    assert (opened, breaker.is_open) == ([False, False, True], True)


def test_many_failures_within_half_a_second_do_not_open_it():
    assert not any(fail(Breaker(), 0.0, 0.1, 0.2, 0.3, 0.4, 0.49))


def test_two_failures_do_not_open_it_however_far_apart():
    assert fail(Breaker(), 0.0, 60.0) == [False, False]


def test_the_half_second_counts_from_the_beginning_of_the_first_attempt():
    assert fail(Breaker(), 0.5, 0.5, 0.5, took=0.5) == [False, False, True]


def test_it_says_only_once_that_it_opens():
    assert fail(open_breaker(), 2.0, 3.0) == [False, False]


def test_a_success_in_between_begins_the_count_anew():
    breaker = Breaker()
    fail(breaker, 0.0, 0.5)
    breaker.succeeded()
    assert fail(breaker, 1.0, 1.5, 2.0) == [False, False, True]


def test_failures_beside_an_open_connection_do_not_count_towards_opening():
    breaker = Breaker()
    fail(breaker, 0.0, 1.0, is_bare=False)
    assert fail(breaker, 2.0, 2.5, 3.0) == [False, False, True]


def test_a_failure_beside_an_open_connection_begins_the_count_anew():
    breaker = Breaker()
    fail(breaker, 0.0, 0.25)
    fail(breaker, 0.5, is_bare=False)
    assert fail(breaker, 0.75, 1.0, 1.25) == [False, False, True]


def test_congestion_never_opens_it():
    assert not any(fail(Breaker(), *range(100), fault="congestion"))


def test_congestion_begins_the_count_anew():
    breaker = Breaker()
    fail(breaker, 0.0, 0.25)
    fail(breaker, 0.5, 1.0, fault="congestion")
    assert fail(breaker, 1.5, 2.0, 2.5) == [False, False, True]


# -- when to try again -----------------------------------------------------------------------


def test_while_it_is_closed_the_pauses_double_up_to_a_second():
    breaker = Breaker()
    waits = pauses(breaker, 6, chance=0.0, is_bare=False)
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])


def test_pauses_are_stretched_by_up_to_half_at_random():
    assert pauses(Breaker(), 1, chance=1.0) == pytest.approx([0.15])


@pytest.mark.parametrize(("chance", "seconds"), [(0.0, 0.5), (1.0, 1.0)])
def test_congestion_pauses_growth_for_at_least_half_a_second(chance: float, seconds: float):
    assert pauses(Breaker(), 1, fault="congestion", chance=chance) == [seconds]


def test_congestion_is_over_with_the_next_failure_of_another_kind():
    breaker = Breaker()
    fail(breaker, 0.0, fault="congestion")
    was_congested = breaker.is_congested
    fail(breaker, 1.0)
    assert (was_congested, breaker.is_congested) == (True, False)


@pytest.mark.parametrize("chance", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("fault", ["refused", "other"])
def test_while_it_is_open_attempts_are_half_a_second_to_a_second_apart(
    chance: float, fault: ConnectFault
):
    waits = pauses(open_breaker(chance=chance), 20, chance=chance, fault=fault)
    assert all(0.499 <= wait <= 0.901 for wait in waits)


def test_the_pauses_of_two_processes_drift_apart():
    early, late = (open_breaker(chance=chance) for chance in (0.0, 1.0))
    assert sum(pauses(late, 5, chance=1.0)) - sum(pauses(early, 5, chance=0.0)) > 1.0


def test_refused_passwords_are_tried_ever_more_seldom_up_to_thirty_seconds():
    breaker = open_breaker(fault="authentication", chance=0.0)
    waits = pauses(breaker, 8, fault="authentication", chance=0.0)
    assert waits == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0])


def test_another_failure_ends_the_long_pauses_after_refused_passwords():
    breaker = open_breaker(fault="authentication", chance=0.0)
    pauses(breaker, 8, fault="authentication", chance=0.0)
    assert pauses(breaker, 1, chance=0.0) == pytest.approx([0.5])


def test_even_ten_thousand_failures_leave_the_pauses_as_they_are():
    breaker = open_breaker(fault="authentication")
    assert pauses(breaker, 10_000, fault="authentication")[-1] == pytest.approx(30.0)


# -- when it closes --------------------------------------------------------------------------


def test_a_success_closes_it_and_ends_every_pause():
    breaker = open_breaker()
    breaker.succeeded()
    assert (breaker.is_open, breaker.is_congested, breaker.until) == (False, False, -inf)


def test_after_a_success_it_opens_no_sooner_than_the_first_time():
    breaker = open_breaker(fault="authentication", chance=0.0)
    pauses(breaker, 8, fault="authentication", chance=0.0)
    breaker.succeeded()
    opened = fail(breaker, 100.0, 100.25, 100.5, fault="authentication", chance=0.0)
    assert (opened, breaker.until - 100.5) == ([False, False, True], 0.5)


def test_when_forgotten_it_lets_the_next_try_and_one_more_failure_opens_it_again():
    breaker = open_breaker()
    breaker.forget()
    forgotten = (breaker.is_open, breaker.until)
    assert (forgotten, fail(breaker, 100.0)) == ((False, -inf), [True])


# -- a pool whose database is down -----------------------------------------------------------


def lose_database(pool: Pool, fault: ConnectFault) -> None:
    """Let callers ask and attempts fail until the database is known to be down."""
    while not pool.machine.breaker.is_open:
        if not pool.queue:
            pool.ask("early")
        if not pool.opening:
            pool.tick(pool.now + 0.25)
            continue
        slot = pool.start_next()
        pool.now += 0.25
        pool.fail(slot, fault)


def lost(fault: ConnectFault = "other", **settings: Any) -> Pool:
    """Return a pool whose database is known to be down; nobody has tried again yet."""
    pool = Pool(**settings)
    lose_database(pool, fault)
    while pool.opening:
        assert pool.start_next() is None
    pool.woken.clear()
    return pool


def begin_trial(pool: Pool) -> Slot:
    """Let the next trial begin as soon as it may."""
    pool.tick(max(pool.now, pool.machine.breaker.until))
    (slot,) = pool.opening
    assert pool.start_next() is slot
    return slot


def moments_of_trials(pool: Pool, fault: ConnectFault, until: float) -> list[float]:
    """Let the upkeep come as it asks to, callers ask and trials fail; return when these began."""
    moments = []
    due = pool.now
    while due < until:
        due = pool.tick(due)
        if pool.opening:
            pool.fail_next(fault)
            moments.append(pool.now)
            pool.ask("interested")
            due = pool.tick()
    return moments


def test_when_it_is_found_out_all_who_wait_are_told_at_once():
    pool = Pool(max_size=3, max_connecting=3)
    waiters = pool.ask_each("abcde")
    attempts = [pool.start_next() for _ in range(3)]
    pool.now = 0.5
    for slot in attempts:
        pool.fail(slot)
    assert [waiter.failure for waiter in waiters] == ["failed"] * 2 + ["unavailable"] * 3
    assert (pool.woken, pool.queue) == ([*"abcde"], [])
    assert pool.counters("failed", "unavailable", "requesting") == {
        "failed": 2,
        "unavailable": 3,
        "requesting": 0,
    }
    assert pool.read().failed_wait_time.sum_seconds == 2.5


def test_who_asks_while_the_database_is_down_is_told_at_once():
    pool = lost(max_size=2)
    assert (answer(pool.ask()), pool.queue) == ("unavailable", [])
    assert pool.counters("waits", "requesting") == {"waits": 3, "requesting": 0}


def test_who_asks_when_a_trial_is_due_waits_for_its_end_and_nobody_else_does():
    pool = lost(max_size=3)
    pool.now = pool.machine.breaker.until
    first, second = pool.ask_each("ab")
    meanwhile = (pool.queue, answer(second))
    pool.fail_next()
    assert meanwhile == (["a"], "unavailable")
    assert (first.failure, first.error, pool.queue) == ("failed", REFUSED, [])


def test_who_asked_when_a_trial_was_due_is_served_by_it():
    pool = lost(max_size=3)
    pool.now = pool.machine.breaker.until
    first = pool.ask("a")
    pool.open_next()
    assert (answer(first.slot), pool.woken) == ("checked_out", ["a"])


def test_a_paused_pool_tells_who_waits_when_it_resumes():
    pool = Pool(max_size=3, max_connecting=3)
    waiters = pool.ask_each("abcde")
    attempts = [pool.start_next() for _ in range(3)]
    pool.machine.pause()
    pool.now = 0.5
    for slot in attempts:
        pool.fail(slot)
    while_paused = pool.queue
    pool.call("resume")
    assert (while_paused, pool.queue) == (["d", "e"], [])
    assert [waiter.failure for waiter in waiters] == ["failed"] * 3 + ["unavailable"] * 2


def test_a_pool_that_is_closed_during_an_outage_says_that_it_is_closed():
    pool = lost(max_size=1)
    pool.call("close")
    assert (answer(pool.ask()), pool.tick()) == ("closed", inf)


@pytest.mark.parametrize("fault", ["refused", "other"])
def test_with_wait_callers_wait_for_the_database_to_come_back(fault: ConnectFault):
    pool = lost(fault, max_size=2, on_outage="wait")
    pool.ask("late")
    pool.fail(begin_trial(pool), fault)
    while_down = (pool.queue, list(pool.woken))
    pool.connect(begin_trial(pool))
    assert [while_down, (pool.queue, pool.woken)] == [
        (["early", "late"], []),
        (["late"], ["early"]),
    ]


def test_with_wait_a_refused_password_is_told_to_who_waits_longest():
    pool = Pool(max_size=1, on_outage="wait")
    first, _ = pool.ask_each("ab")
    pool.fail_next("authentication")
    assert (first.failure, first.error, pool.queue) == ("failed", REFUSED, ["b"])


def test_with_wait_each_trial_that_is_refused_a_password_is_told_to_one_caller():
    pool = lost("authentication", max_size=1, on_outage="wait")
    pool.ask_each("ab")
    pool.fail(begin_trial(pool), "authentication")
    assert (pool.woken, pool.queue) == (["a"], ["b"])


def test_with_wait_growth_backs_off_even_if_no_connection_is_open():
    pool = Pool(max_size=2, on_outage="wait", chance=0.0)
    pool.ask("waiter")
    pool.fail_next()
    pool.tick(0.0625)
    held_back = pool.gauges
    pool.tick(0.125)
    assert [held_back, pool.gauges] == [{"waiting": 1}, {"waiting": 1, "connecting": 1}]


@pytest.mark.parametrize("on_outage", ["raise", "wait"])
def test_congestion_fails_nobody_and_growth_backs_off(on_outage: str):
    pool = Pool(max_size=2, on_outage=on_outage, chance=0.0)
    pool.ask_each("ab")
    for _ in range(2):
        pool.fail_next("congestion")
    pool.tick(0.4375)
    held_back = pool.gauges
    pool.tick(0.5)
    assert (pool.woken, held_back) == ([], {"waiting": 2})
    assert pool.gauges == {"waiting": 2, "connecting": 2}


@pytest.mark.parametrize("on_outage", ["raise", "wait"])
def test_congestion_is_no_outage_however_long_it_lasts(on_outage: str):
    pool = Pool(max_size=2, on_outage=on_outage, timeout=None)
    pool.ask("waiter")
    for _ in range(20):
        pool.fail_next("congestion")
        pool.tick(pool.now + 2.0)
    assert (pool.machine.breaker.is_open, pool.queue) == (False, ["waiter"])


def test_a_refused_connect_ends_the_connections_that_were_open():
    pool = Pool(opened=2, max_size=3)
    held = pool.ask("holder")
    pool.machine._open(pool.machine.lanes[0], pool.now, "fill")
    pool.fail_next("refused")
    idle_goes = pool.gauges
    pool.give_back(held)
    assert [idle_goes, pool.gauges] == [{"checked_out": 1, "closing": 1}, {"closing": 2}]
    assert {slot.reason for slot in pool.closing} == {"generation"}


def test_a_refused_connect_tells_its_caller_at_once():
    pool = Pool(max_size=2)
    waiter = pool.ask("waiter")
    pool.fail_next("refused")
    assert (waiter.failure, waiter.error, pool.opening) == ("failed", REFUSED, [])


# -- who finds out that it is there again ----------------------------------------------------


def test_one_attempt_at_a_time_looks_for_a_lost_database():
    pool = lost(max_size=5, max_connecting=3, on_outage="wait")
    pool.ask_each("abc")
    slot = begin_trial(pool)
    pool.tick(pool.now + 0.9)
    assert (slot.purpose, pool.gauges) == ("trial", {"connecting": 1, "waiting": 4})


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("on_outage", ["raise", "wait"])
@pytest.mark.parametrize("fault", ["refused", "other"])
def test_trials_are_half_a_second_to_a_second_apart(
    fault: ConnectFault, on_outage: str, chance: float
):
    pool = lost(fault, max_size=3, on_outage=on_outage, timeout=None, chance=chance)
    moments = moments_of_trials(pool, fault, until=60.0)
    assert len(moments) > 50
    assert all(0.499 <= late - early <= 1.0 for early, late in pairwise(moments))


def test_a_refused_password_is_tried_again_every_thirty_seconds():
    pool = lost("authentication", max_size=3, chance=0.0)
    moments = moments_of_trials(pool, "authentication", until=300.0)
    apart = [late - early for early, late in pairwise(moments)]
    assert apart[:3] == pytest.approx([1.0, 2.0, 4.0])
    assert apart[5:] == pytest.approx([30.0] * len(apart[5:]))


def test_when_a_trial_succeeds_everything_is_as_before():
    pool = lost(max_size=3, min_size=2)
    pool.connect(begin_trial(pool))
    pool.open_next()
    assert (answer(pool.ask()), pool.gauges) == ("checked_out", {"checked_out": 1, "idle": 1})


def test_when_a_trial_succeeds_the_others_who_wait_get_attempts_too():
    pool = lost(max_size=5, max_connecting=3, on_outage="wait")
    pool.ask_each("ab")
    pool.connect(begin_trial(pool))
    pool.tick(pool.now + 1.0)
    assert pool.gauges == {"checked_out": 1, "connecting": 2, "waiting": 2}


def test_a_trial_is_dropped_when_another_attempt_succeeds_before_it_begins():
    pool = lost(max_size=4)
    slow = begin_trial(pool)
    pool.tick(pool.now + 1.0)
    pool.connect(slow)
    assert (pool.start_next(), pool.gauges) == (None, {"idle": 1})


def test_what_was_ordered_before_the_database_was_known_to_be_down_is_dropped():
    pool = Pool(max_size=3, max_connecting=2, on_outage="wait")
    pool.ask_each("ab")
    for slot in [pool.start_next(), pool.start_next()]:
        pool.fail(slot)
    pool.tick(1.0)
    pool.fail_next()
    assert (pool.machine.breaker.is_open, len(pool.opening)) == (True, 1)
    assert (pool.start_next(), pool.gauges) == (None, {"waiting": 2})


@pytest.mark.parametrize("max_size", [2, 5, None])
def test_a_slow_trial_gives_up_its_turn_after_a_second(max_size: int | None):
    pool = lost(max_size=max_size)
    begin_trial(pool)
    pool.tick(pool.now + 0.9)
    after_less = pool.gauges
    pool.tick(pool.now + 0.1)
    assert [after_less, pool.gauges] == [{"connecting": 1}, {"connecting": 2}]


@pytest.mark.parametrize(("max_size", "trials"), [(1, 1), (2, 2), (3, 2), (4, 3)])
def test_trials_that_hang_fill_no_more_than_half_of_the_pool(max_size: int, trials: int):
    pool = lost(max_size=max_size, connect_timeout=60.0)
    for _ in range(20):
        pool.tick(pool.now + 1.0)
    assert pool.gauges == {"connecting": trials}


def test_a_slow_trial_that_succeeds_after_all_ends_the_outage():
    pool = lost(max_size=4, on_outage="wait")
    slow = begin_trial(pool)
    pool.tick(pool.now + 2.0)
    pool.connect(slow)
    assert (pool.machine.breaker.is_open, pool.woken) == (False, ["early"])


def test_a_trial_that_hangs_beyond_connect_timeout_counts_as_failed():
    pool = lost(max_size=1, connect_timeout=5.0)
    pool.tick(pool.now + 1.0)
    begun = pool.now
    pool.start_next()
    pool.tick(begun + 5.0)
    assert pool.machine.breaker.until > begun + 5.0


def test_the_lane_where_somebody_asked_last_tries():
    pool = Pool(max_size=3, lanes=3)
    lose_database(pool, "other")
    pool.ask("other", lane=1)
    assert begin_trial(pool).lane is pool.machine.lanes[1]


def test_if_the_lane_where_somebody_asked_last_sleeps_another_one_tries():
    pool = Pool(max_size=3, lanes=2)
    lose_database(pool, "other")
    pool.call("put_to_sleep", pool.machine.lanes[0])
    assert begin_trial(pool).lane is pool.machine.lanes[1]


@pytest.mark.parametrize(("after", "is_tried"), [(30.0, True), (31.0, False)])
def test_a_lost_database_is_looked_for_until_nobody_has_asked_for_half_a_minute(
    after: float, is_tried: bool
):
    pool = lost(max_size=1)
    pool.ask()
    pool.tick(pool.now + after)
    assert (bool(pool.opening), pool.machine.breaker.is_open) == (is_tried, is_tried)


def test_a_lost_database_is_looked_for_as_long_as_anybody_waits():
    pool = lost(max_size=1, on_outage="wait", timeout=None)
    pool.tick(pool.now + 3600.0)
    assert pool.opening


def test_a_pool_that_keeps_some_connections_open_looks_for_its_database_for_good():
    pool = lost("authentication", min_size=2, max_size=3)
    pool.tick(pool.now + 3600.0)
    assert [slot.purpose for slot in pool.opening] == ["trial"]


def test_after_the_outage_is_forgotten_the_next_caller_sees_for_himself():
    pool = lost(max_size=1)
    pool.tick(pool.now + 31.0)
    pool.ask("late")
    while_trying = pool.gauges
    pool.fail_next()
    assert (while_trying, answer(pool.ask())) == ({"connecting": 1, "waiting": 1}, "unavailable")


def test_a_forgotten_pool_needs_no_more_looking_after():
    pool = lost(max_size=1)
    assert pool.tick(pool.now + 31.0) == inf


def test_an_outage_is_not_forgotten_at_once_because_callers_were_served_quickly_before():
    pool = Pool(opened=1, min_size=1, max_size=1)
    pool.machine.warm(pool.now)
    pool.now = 100.0
    pool.give_back(pool.ask(), "lost")
    while not pool.machine.breaker.is_open:
        pool.tick(pool.now + 0.5)
        if pool.opening:
            pool.fail_next("other")
    pool.tick(pool.now + 1.0)
    assert (pool.start_next().purpose, answer(pool.ask())) == ("trial", "unavailable")


def test_a_full_pool_is_not_tried_but_told():
    pool = lost(max_size=1, connect_timeout=5.0)
    begin_trial(pool)
    pool.tick(pool.now + 6.0)
    assert (pool.gauges, answer(pool.ask())) == ({"connecting": 1}, "unavailable")


@pytest.mark.parametrize("settings", [{"upkeep": "inline"}, {}], ids=["inline", "asleep"])
def test_no_tick_is_wasted_on_a_trial_that_nobody_can_make(settings: dict[str, Any]):
    pool = Pool(max_size=2, **settings)
    if settings:
        lose_inline(pool)
    else:
        lose_database(pool, "other")
        pool.call("put_to_sleep", pool.machine.lanes[0])
    pool.now += 2.0
    assert pool.tick() - pool.now >= 0.2


# -- callers that connect themselves ---------------------------------------------------------


def lose_inline(pool: Pool) -> None:
    """Let callers fail to connect by themselves until the database is known to be down."""
    while not pool.machine.breaker.is_open:
        slot = pool.ask("early")
        pool.now += 0.25
        pool.fail(slot)


@pytest.mark.parametrize(("after", "is_down"), [(30.0, True), (31.0, False)])
@pytest.mark.parametrize("min_size", [0, 1])
def test_where_only_callers_find_out_an_outage_is_over_when_none_has_asked_for_half_a_minute(
    after: float, is_down: bool, min_size: int
):
    """Or a service that gets no requests while the pool is down would never get any again."""
    pool = Pool(max_size=3, min_size=min_size, upkeep="inline")
    assert pool.read().is_down is False
    lose_inline(pool)
    pool.now += after
    assert pool.read().is_down is is_down


CALLERS_CONNECT = [{"upkeep": "inline"}, {"timeout": 0.0}]


@pytest.mark.parametrize("settings", CALLERS_CONNECT)
def test_who_connects_himself_is_told_while_no_trial_is_due(settings: dict[str, Any]):
    pool = Pool(max_size=3, **settings)
    lose_inline(pool)
    pool.now += 0.4
    assert answer(pool.ask()) == "unavailable"


@pytest.mark.parametrize("settings", CALLERS_CONNECT)
def test_when_a_trial_is_due_the_next_who_asks_makes_it_and_nobody_else(settings: dict[str, Any]):
    pool = Pool(max_size=3, **settings)
    lose_inline(pool)
    pool.now = pool.machine.breaker.until
    assert [answer(got) for got in pool.ask_each("ab")] == ["connecting", "unavailable"]


@pytest.mark.parametrize("settings", CALLERS_CONNECT)
def test_when_the_trial_of_a_caller_succeeds_he_is_served(settings: dict[str, Any]):
    pool = Pool(max_size=3, **settings)
    lose_inline(pool)
    pool.now = pool.machine.breaker.until
    pool.connect(pool.ask())
    assert [answer(pool.ask()), pool.gauges] == ["connecting", {"checked_out": 1, "connecting": 1}]


@pytest.mark.parametrize("settings", CALLERS_CONNECT)
def test_callers_who_are_interrupted_in_their_own_connects_say_nothing_of_the_database(
    settings: dict[str, Any],
):
    pool = Pool(max_size=3, **settings)
    for _ in range(5):
        slot = pool.ask()
        pool.now += 0.5
        pool.step(pool.machine.abandon(slot, pool.now, KeyboardInterrupt()))
    assert answer(pool.ask()) == "connecting"
    assert pool.counters("failed", "requesting") == {"failed": 5, "requesting": 1}


@pytest.mark.parametrize("settings", CALLERS_CONNECT)
def test_a_trial_of_a_caller_that_hangs_gives_up_its_turn_too(settings: dict[str, Any]):
    pool = Pool(max_size=4, **settings)
    lose_inline(pool)
    pool.now = pool.machine.breaker.until
    pool.ask("hanging")
    pool.tick(pool.now + 1.0)
    pool.ask("next")
    assert pool.machine.connecting == 2  # he tries, or the upkeep does so already


def test_with_timeout_zero_and_wait_nobody_queues_for_a_lost_database():
    pool = Pool(max_size=3, timeout=0.0, on_outage="wait")
    lose_inline(pool)
    assert answer(pool.ask()) == "timeout"


def test_without_threads_who_waits_longest_makes_the_trial():
    pool = Pool(max_size=3, upkeep="inline", on_outage="wait")
    lose_inline(pool)
    first, second = pool.ask_each("ab")
    pool.tick(pool.machine.breaker.until)
    assert (answer(first.slot), pool.woken, pool.queue) == ("connecting", ["a"], ["b"])
    pool.connect(first.slot)
    assert answer(second.slot) == "connecting"
