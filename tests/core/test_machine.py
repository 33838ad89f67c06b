"""What the pool decides, one behaviour at a time, in virtual time."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest

from tests.core.by_hand import REFUSED, Pool, answer

# -- who is served ---------------------------------------------------------------------------


def test_waiters_are_served_first_come_first_served():
    pool = Pool(opened=1, max_size=1)
    slot = pool.ask("holder")
    pool.ask_each("abc")
    for _ in range(3):
        pool.give_back(slot)
    assert pool.woken == ["a", "b", "c"]


def test_a_returned_connection_is_handed_over_so_that_no_newcomer_overtakes():
    pool = Pool(opened=1, max_size=1)
    slot = pool.ask("holder")
    first = pool.ask("first")
    pool.give_back(slot)
    pool.ask("newcomer")
    assert (first.slot, pool.woken, pool.queue) == (slot, ["first"], ["newcomer"])


def test_the_connection_used_last_is_used_again_first():
    pool = Pool(opened=3, max_size=3)
    slots = pool.ask_each("abc")
    for slot in slots:
        pool.give_back(slot)
    assert pool.ask_each("abc") == slots[::-1]


def test_without_lifo_all_connections_are_used_in_turn():
    pool = Pool(opened=3, max_size=3, use_lifo=False)
    slots = pool.ask_each("abc")
    for slot in slots:
        pool.give_back(slot)
    assert pool.ask_each("abc") == slots


def test_a_waiter_whose_deadline_has_passed_is_gone_at_once():
    pool = Pool(opened=1, max_size=1, timeout=2.0)
    pool.ask("holder")
    waiter = pool.ask("waiter")
    pool.now = 2.0
    assert pool.step(pool.machine.expire(waiter, pool.now)) is None
    assert (waiter.failure, pool.queue) == ("timeout", [])
    assert pool.counters("timeouts", "requesting") == {"timeouts": 1, "requesting": 0}


def test_a_waiter_who_leaves_is_gone_at_once():
    pool = Pool(opened=1, max_size=1)
    slot = pool.ask("holder")
    leaver, stayer = pool.ask_each("ab")
    pool.call("cancel", leaver)
    pool.give_back(slot)
    assert (stayer.slot, pool.woken, pool.queue) == (slot, ["b"], [])
    assert pool.counters("cancelled", "requesting") == {"cancelled": 1, "requesting": 0}


def test_a_connection_granted_at_the_last_moment_is_used_at_the_deadline():
    pool = Pool(opened=1, max_size=1, timeout=2.0)
    slot = pool.ask("holder")
    waiter = pool.ask("waiter")
    pool.now = 2.0
    pool.give_back(slot)
    assert pool.step(pool.machine.expire(waiter, pool.now)) is slot
    assert pool.counters("checkouts", "timeouts") == {"checkouts": 2, "timeouts": 0}


@pytest.mark.parametrize("pre_ping", [False, True])
def test_what_was_granted_to_somebody_who_left_goes_to_the_next(pre_ping: bool):
    pool = Pool(opened=1, max_size=1, pre_ping=pre_ping)
    slot = pool.ask("holder")
    leaver, stayer = pool.ask_each("ab")
    pool.give_back(slot)
    pool.call("cancel", leaver)
    assert (stayer.slot, pool.woken) == (slot, ["a", "b"])


def test_leaving_after_everything_is_over_changes_nothing():
    pool = Pool(opened=1, max_size=1)
    slot = pool.ask("holder")
    waiter = pool.ask("waiter")
    pool.call("cancel", waiter)
    pool.call("cancel", waiter)
    assert (pool.gauges, slot.state) == ({"checked_out": 1}, "checked_out")
    assert pool.counters("cancelled", "requesting") == {"cancelled": 1, "requesting": 0}


def test_the_deadline_counts_from_asking_not_from_queueing():
    pool = Pool(max_size=1, timeout=2.0)
    pool.now = 1.5
    assert pool.ask(since=1.0).deadline == 3.0


def test_without_timeout_there_is_no_deadline():
    assert Pool(max_size=1, timeout=None).ask().deadline is None


def test_one_waiter_too_many_is_turned_away_at_once():
    pool = Pool(opened=1, max_size=1, max_waiting=2)
    pool.ask("holder")
    assert [answer(got) for got in pool.ask_each("abc")] == [None, None, "rejected"]
    assert pool.queue == ["a", "b"]


def test_who_waits_for_a_place_that_is_free_is_none_too_many():
    pool = Pool(max_size=3, max_waiting=1)
    assert [answer(got) for got in pool.ask_each("abcde")] == [None] * 4 + ["rejected"]
    pool.open_next()
    assert [answer(got) for got in pool.ask_each("f")] == ["rejected"]
    assert (pool.woken, pool.queue) == (["a"], ["b", "c", "d"])


def test_with_timeout_zero_nobody_queues():
    pool = Pool(opened=1, max_size=2, timeout=0.0, max_connecting=1)
    assert [answer(got) for got in pool.ask_each("abc")] == [
        "checked_out",
        "connecting",
        "timeout",
    ]
    assert pool.gauges == {"checked_out": 1, "connecting": 1}


# -- growth ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("waiters", "attempts"), [(1, 1), (2, 2), (5, 3)])
def test_a_cold_pool_starts_an_attempt_per_waiter_up_to_max_connecting(waiters: int, attempts: int):
    pool = Pool(max_size=10, max_connecting=3)
    pool.ask_each("abcde"[:waiters])
    assert pool.gauges == {"connecting": attempts, "waiting": waiters}


def busy_pool(use_seconds: float, connect_seconds: float) -> Pool:
    """Return a pool of 5 connections that are all held, whose past uses took so long."""
    pool = Pool(opened=5, max_size=50, max_connecting=10)
    pool.machine.books.connect_time.sort()
    pool.machine.books.connect_time._sum = connect_seconds * pool.machine.books.connects
    slots = pool.ask_each("hhhhh")
    pool.now = use_seconds
    for slot in slots:
        pool.give_back(slot)
    pool.ask_each("hhhhh")
    return pool


def test_a_spike_on_short_holds_starts_a_single_attempt():
    pool = busy_pool(use_seconds=0.002, connect_seconds=0.15)
    for _ in range(45):
        pool.ask()
    assert pool.gauges == {"checked_out": 5, "connecting": 1, "waiting": 45}


def test_a_spike_on_long_holds_grows_up_to_max_connecting():
    pool = busy_pool(use_seconds=10.0, connect_seconds=0.15)
    for _ in range(45):
        pool.ask()
    at_once = pool.gauges
    pool.tick(pool.now + 0.15)
    assert [at_once, pool.gauges] == [
        {"checked_out": 5, "connecting": 1, "waiting": 45},
        {"checked_out": 5, "connecting": 10, "waiting": 45},
    ]


def test_a_queue_that_moves_keeps_its_single_attempt():
    pool = busy_pool(use_seconds=0.002, connect_seconds=0.15)
    for _ in range(45):
        pool.ask()
    for _ in range(4):
        pool.now += 0.002
        for slot in pool.held:
            pool.give_back(slot)
        pool.tick()
    assert pool.gauges == {"checked_out": 5, "connecting": 1, "waiting": 25}


def test_a_queue_beside_free_places_is_looked_at_again_soon():
    pool = Pool(opened=1, max_size=3)
    pool.ask("holder")
    pool.ask("waiter")
    assert pool.tick() == 0.01


def test_a_queue_that_was_thought_short_lived_grows_when_it_is_not():
    pool = busy_pool(use_seconds=0.002, connect_seconds=0.15)
    for _ in range(45):
        pool.ask()
    pool.tick(pool.now + 1.0)
    assert pool.gauges == {"checked_out": 5, "connecting": 10, "waiting": 45}


def test_an_attempt_whose_demand_is_gone_is_never_started():
    pool = Pool(opened=1, max_size=2)
    slot = pool.ask("holder")
    pool.ask("waiter")
    pool.give_back(slot)
    assert pool.start_next() is None
    assert (pool.gauges, pool.opening) == ({"checked_out": 1}, [])


def test_an_attempt_that_waited_long_for_its_start_is_dropped_like_any_other():
    pool = Pool(max_size=1, timeout=1.0, connect_timeout=1.0)
    waiter = pool.ask("waiter")
    pool.now = 1.0
    pool.step(pool.machine.expire(waiter, pool.now))
    pool.tick()
    assert pool.start_next() is None


def test_a_new_connection_goes_to_the_head_of_the_queue():
    pool = Pool(max_size=2)
    pool.ask_each("ab")
    slot = pool.open_next()
    assert (slot.holder, pool.woken, pool.queue) == ("a", ["a"], ["b"])


def test_a_connection_that_comes_too_late_for_its_waiter_joins_the_pool():
    pool = Pool(opened=1, max_size=2)
    slot = pool.ask("holder")
    pool.ask("waiter")
    attempt = pool.start_next()
    pool.give_back(slot)
    pool.connect(attempt)
    assert (pool.woken, pool.gauges) == (["waiter"], {"checked_out": 1, "idle": 1})


def test_a_failed_connect_with_nothing_open_wakes_the_head_with_its_error():
    pool = Pool(max_size=2, max_connecting=1)
    first, second = pool.ask_each("ab")
    pool.fail_next()
    assert [(r.failure, r.error) for r in (first, second)] == [("failed", REFUSED), (None, None)]
    assert pool.woken == ["a"]


def test_after_a_failed_connect_the_next_waiters_attempt_starts_at_once():
    pool = Pool(max_size=2, max_connecting=1)
    pool.ask_each("ab")
    pool.fail_next()
    assert (pool.gauges, len(pool.opening)) == ({"connecting": 1, "waiting": 1}, 1)


def test_a_failed_connect_wakes_nobody_while_enough_others_are_in_flight():
    pool = Pool(max_size=3, max_connecting=3)
    leaver, *_ = pool.ask_each("abc")
    attempts = [pool.start_next() for _ in range(3)]
    pool.call("cancel", leaver)
    pool.fail(attempts[0])
    assert (pool.woken, pool.queue) == ([], ["b", "c"])


def test_a_failed_connect_leaves_waiters_waiting_while_others_are_open():
    pool = Pool(opened=1, max_size=3)
    pool.ask("holder")
    pool.ask("waiter")
    pool.fail_next()
    assert (pool.woken, pool.gauges) == ([], {"checked_out": 1, "waiting": 1})


def test_growth_backs_off_after_a_failed_connect_and_goes_on_later():
    pool = Pool(opened=1, max_size=3, chance=0.0)
    pool.ask("holder")
    pool.ask("waiter")
    pool.fail_next()
    pool.tick(0.0625)
    held_back = pool.gauges
    pool.tick(0.125)
    assert [held_back, pool.gauges] == [
        {"checked_out": 1, "waiting": 1},
        {"checked_out": 1, "waiting": 1, "connecting": 1},
    ]


def test_a_success_ends_the_back_off():
    pool = Pool(opened=1, max_size=4, max_connecting=2)
    pool.ask_each("hab")
    pool.tick(1.0)
    attempts = [pool.start_next(), pool.start_next()]
    pool.fail(attempts[0])
    pool.connect(attempts[1])
    assert pool.gauges == {"checked_out": 2, "waiting": 1, "connecting": 1}


def test_an_overdue_attempt_gives_up_its_turn_but_keeps_its_place():
    pool = Pool(max_size=2, max_connecting=1, connect_timeout=1.0)
    pool.ask_each("abc")
    pool.start_next()
    pool.tick(1.0)
    one_more = pool.gauges
    pool.start_next()
    pool.tick(2.0)
    assert [one_more, pool.gauges] == [{"connecting": 2, "waiting": 3}] * 2


def test_an_overdue_attempt_that_succeeds_after_all_serves_the_head():
    pool = Pool(max_size=1, connect_timeout=1.0)
    pool.ask("waiter")
    attempt = pool.start_next()
    pool.tick(1.0)
    pool.connect(attempt)
    assert (pool.woken, pool.gauges) == (["waiter"], {"checked_out": 1})


def test_a_place_is_free_only_when_its_connection_is_really_closed():
    pool = Pool(opened=1, max_size=1)
    slot = pool.ask("holder")
    pool.ask("waiter")
    pool.give_back(slot, "reset")
    while_it_closes = pool.gauges
    pool.close_next()
    assert [while_it_closes, pool.gauges] == [
        {"closing": 1, "waiting": 1},
        {"connecting": 1, "waiting": 1},
    ]


def test_min_size_is_opened_only_when_somebody_asked():
    pool = Pool(min_size=2, max_size=3)
    pool.tick(1.0)
    before = pool.gauges
    pool.ask()
    assert [before, pool.gauges] == [{}, {"connecting": 2, "waiting": 1}]


def test_the_attempts_that_fill_the_pool_are_wanted_without_a_waiter_each():
    pool = Pool(min_size=3, max_size=3)
    pool.ask()
    for _ in range(3):
        pool.open_next()
    assert (pool.gauges, pool.opening) == ({"checked_out": 1, "idle": 2}, [])


def test_warming_opens_min_size_without_anybody_asking():
    pool = Pool(min_size=2, max_size=3)
    pool.call("warm")
    assert pool.gauges == {"connecting": 2}


# -- liveness --------------------------------------------------------------------------------


@pytest.mark.parametrize(("idle_seconds", "needs_ping"), [(0.5, False), (1.0, True)])
def test_a_connection_that_was_idle_for_long_is_to_be_pinged(idle_seconds: float, needs_ping: bool):
    pool = Pool(opened=1, max_size=1, pre_ping=True, ping_after=1.0)
    pool.give_back(pool.ask())
    pool.now += idle_seconds
    slot = pool.ask()
    assert (slot.state, slot.needs_ping) == ("checking", needs_ping)


def test_a_connection_handed_over_was_not_idle_and_needs_no_ping():
    pool = Pool(opened=1, max_size=1, pre_ping=True, ping_after=1.0)
    slot = pool.ask("holder")
    pool.ask("waiter")
    pool.now = 60.0
    pool.give_back(slot)
    assert (slot.state, slot.needs_ping) == ("checking", False)


def test_a_connection_just_opened_is_not_checked():
    pool = Pool(opened=1, max_size=1, pre_ping=True, ping_after=1.0)
    assert pool.ask().state == "checked_out"


def test_a_live_connection_is_served_after_its_check():
    pool = Pool(opened=1, max_size=1, pre_ping=True)
    pool.give_back(pool.ask())
    slot = pool.ask()
    assert (pool.found(slot), slot.state) == (slot, "checked_out")


def test_a_dead_connection_is_replaced_by_another_idle_one():
    pool = Pool(opened=2, max_size=2, pre_ping=True, ping_after=0.0)
    pool.now = 1.0
    dead = pool.ask()
    other = pool.found(dead, "ping")
    assert (other.state, dead.state, pool.closing) == ("checking", "closing", [dead])
    assert pool.counters("requests", "ping_failures") == {"requests": 1, "ping_failures": 1}


def test_callers_of_dead_connections_queue_in_the_order_they_asked():
    pool = Pool(opened=3, max_size=3, pre_ping=True, ping_after=0.0)
    pool.now = 1.0
    dead = pool.ask_each("abc")
    pool.ask("d")
    for slot in (dead[1], dead[0], dead[2]):
        pool.found(slot, "ping")
    assert pool.queue == ["a", "b", "c", "d"]


def test_who_finds_a_dead_connection_does_not_connect_before_older_callers():
    pool = Pool(
        opened=2, max_size=3, pre_ping=True, ping_after=0.0, upkeep="inline", max_connecting=1
    )
    pool.now = 1.0
    first, second, own = pool.ask_each("abc")
    pool.found(first, "ping")
    pool.fail(own)
    while_growth_backs_off = pool.queue
    pool.found(second, "ping")
    # with nothing open any more the first in line connects, and only the first
    assert [while_growth_backs_off, pool.queue] == [["a"], ["b"]]


def test_an_interrupted_check_ends_its_request_and_closes_the_connection():
    pool = Pool(opened=1, max_size=1, pre_ping=True, ping_after=0.0)
    pool.now = 1.0
    slot = pool.ask()
    pool.step(pool.machine.check_interrupted(slot, pool.now, "failed"))
    assert (pool.closing, pool.gauges) == ([slot], {"closing": 1})
    assert pool.counters("failed", "requesting") == {"failed": 1, "requesting": 0}


def test_a_connection_retired_while_it_was_checked_is_not_handed_out():
    pool = Pool(opened=1, max_size=1, pre_ping=True, ping_after=0.0)
    pool.now = 1.0
    slot = pool.ask("waiter")
    pool.call("retire_all")
    pool.found(slot)
    assert (slot.state, pool.queue) == ("closing", ["waiter"])


# -- age, idleness, uses ---------------------------------------------------------------------


def test_below_max_size_the_replacement_is_opened_before_the_aged_one_goes():
    pool = Pool(opened=1, max_size=2, max_lifetime=100.0)
    (aged,) = pool.machine.lanes[0].idle
    pool.tick(99.0)
    meanwhile = pool.gauges
    pool.open_next()
    assert [meanwhile, pool.gauges, pool.closing] == [
        {"idle": 1, "connecting": 1},
        {"idle": 1, "closing": 1},
        [aged],
    ]


def test_at_max_size_an_aged_connection_goes_first_and_its_place_is_reserved():
    pool = Pool(opened=1, max_size=1, max_lifetime=100.0)
    pool.tick(99.0)
    goes = pool.gauges
    pool.close_next()
    assert [goes, pool.gauges] == [{"closing": 1}, {"connecting": 1}]


def test_at_max_size_no_more_go_at_a_time_than_may_be_opened():
    pool = Pool(opened=5, max_size=5, max_lifetime=100.0, max_connecting=2)
    pool.tick(99.9)
    assert pool.gauges == {"idle": 3, "closing": 2}


def test_an_aged_connection_stays_while_its_replacement_fails():
    pool = Pool(opened=1, max_size=2, max_lifetime=100.0)
    pool.tick(99.0)
    pool.fail_next()
    assert pool.gauges == {"idle": 1}


def test_an_aged_connection_in_use_goes_when_it_comes_back():
    pool = Pool(opened=1, max_size=2, max_lifetime=100.0)
    slot = pool.ask("holder")
    pool.now = 99.0
    pool.give_back(slot)
    pool.ask("again")
    pool.open_next()
    pool.give_back(slot)
    assert (pool.gauges, pool.closing) == ({"idle": 1, "closing": 1}, [slot])


def test_nothing_older_than_max_lifetime_is_handed_out():
    pool = Pool(opened=1, max_size=1, max_lifetime=100.0)
    pool.now = 100.0
    pool.ask("waiter")
    assert pool.gauges == {"closing": 1, "waiting": 1}


def test_a_replacement_does_not_look_busier_than_what_it_replaces():
    pool = Pool(opened=1, max_size=2, max_lifetime=100.0, idle_timeout=110.0)
    pool.tick(99.0)
    pool.open_next()
    pool.close_next()
    pool.tick(110.0)
    assert pool.gauges == {"closing": 1}


def test_what_is_idle_for_too_long_goes_but_min_size_stays():
    pool = Pool(opened=3, min_size=1, max_size=3, idle_timeout=10.0)
    pool.tick(9.0)
    before = pool.gauges
    pool.tick(10.0)
    assert [before, pool.gauges] == [{"idle": 3}, {"idle": 1, "closing": 2}]


def test_a_connection_goes_after_max_uses():
    pool = Pool(opened=1, max_size=1, max_uses=2)
    slot = pool.ask()
    pool.give_back(slot)
    after_one = pool.gauges
    pool.ask()
    pool.give_back(slot)
    assert [after_one, pool.gauges, slot.reason] == [{"idle": 1}, {"closing": 1}, "uses"]


def test_a_connection_replaced_in_its_holders_hands_begins_its_life_anew():
    pool = Pool(opened=1, max_size=1, max_uses=2, max_lifetime=100.0)
    slot = pool.ask()
    pool.give_back(slot)
    slot = pool.ask()
    pool.call("retire_all")
    pool.now = 90.0
    pool.step(pool.machine.reconnected(slot, pool.now, 0.5))
    pool.give_back(slot)
    pool.now = 150.0
    assert pool.ask() == slot
    (reading,) = pool.read().slots
    assert (reading.uses, reading.age_seconds) == (2, 60.0)
    pool.give_back(slot)
    assert pool.closing == [slot]


def test_who_keeps_a_connection_replaced_in_his_hands_is_looked_for_once():
    pool = Pool(opened=1, max_size=1, hold_warning=1.0)
    slot = pool.ask("first")
    pool.tick(1.0)
    pool.step(pool.machine.reconnected(slot, pool.now, 0.5))
    pool.tick(2.0)
    pool.give_back(slot)
    pool.ask("second")
    pool.step(pool.machine.reconnected(slot, pool.now, 0.5))
    pool.tick(3.0)
    pool.tick(4.0)
    assert pool.sought == ["first", "second"]


def test_a_long_hold_is_told_even_if_nobody_looked_meanwhile():
    pool = Pool(opened=1, max_size=1, hold_warning=1.0)
    for seconds in (0.875, 1.0, 0.5):
        slot = pool.ask()
        pool.now += seconds
        pool.give_back(slot)
    told = pool.machine.journal.last()
    holds = [(event.name, event.held_seconds) for event in told if "hold_" in event.name]
    assert holds == [("hold_exceeded", 1.0), ("hold_returned", 1.0)]


def test_the_upkeep_comes_in_time_for_long_holds_of_which_it_does_not_hear():
    assert Pool(opened=1, max_size=1, hold_warning=1.0).tick(10.0) <= 10.125


def test_each_caller_keeps_his_own_deadline_when_the_timeout_changes():
    pool = Pool(opened=1, max_size=1, timeout=30.0)
    pool.ask("holder")
    pool.ask("patient")
    pool.config = replace(pool.config, timeout=1.0)
    pool.call("resize", pool.config)
    pool.ask("first")
    pool.now = 0.5
    pool.ask("second")
    (lane,) = pool.machine.lanes
    due = [pool.step(pool.machine.expire_overdue(lane, now)) for now in (0.75, 1.0, 1.5, 30.0)]
    assert (due, pool.woken) == ([1.0, 1.5, 30.0, inf], ["first", "second", "patient"])


@pytest.mark.parametrize("is_refused", [True, False])
def test_a_deadlock_of_more_connections_than_a_lowered_max_size_allows_is_one(is_refused: bool):
    pool = Pool(opened=3, max_size=3, timeout=30.0)
    outer = pool.ask_each("ABC")
    pool.resize(0, 1)
    pool.give_back(outer.pop())  # closes, and serves nobody
    inner = [pool.ask("A"), pool.ask("B")]
    for slot, request in zip(outer, inner, strict=True):
        request.owner = slot.holder
        slot.owner = (slot.uses, slot.holder)
    if is_refused:
        pool.step(pool.machine.refuse_deadlock(inner[0], pool.now))
        assert answer(inner[0]) == "deadlock"
    else:
        found = zip(outer, inner, strict=True)
        places = {slot: (slot.uses, request, "somewhere") for slot, request in found}
        pool.step(pool.machine.entangled(pool.now, places))
    assert pool.gauges["closing"] == 1
    assert inner[0].deadlock.checked_out == 2


def test_a_connection_that_no_replacement_had_room_for_is_not_handed_over_once_it_has_expired():
    pool = Pool(opened=1, max_size=2, max_lifetime=8.0, max_connecting=1, timeout=None)
    slot = pool.ask("holder")
    expires_at = slot.expires_at
    pool.now = expires_at - 0.25
    pool.ask("waiter")
    pool.start_next()
    pool.call("cancel", pool.machine.queue[0])
    pool.now = expires_at - 0.03125
    pool.give_back(slot)
    holder, _ = pool.ask_each("hw")
    pool.now = expires_at
    pool.give_back(holder)
    assert (slot.state, slot.reason, pool.woken) == ("closing", "age", [])


# -- retiring gradually ----------------------------------------------------------------------


def test_retiring_gradually_replaces_one_connection_after_the_other():
    pool = Pool(opened=4, max_size=8)
    pool.machine.retire_gradually(pool.now, 8.0)
    ordered = []
    for now in range(1, 10):
        pool.tick(float(now))
        ordered.append(len(pool.opening))
        while pool.opening:
            pool.open_next()
        while pool.closing:
            assert pool.closing[0].reason == "retired"
            pool.close_next()
    assert (ordered, pool.gauges) == ([0, 1, 0, 1, 0, 1, 0, 1, 0], {"idle": 4})


def test_retiring_gradually_at_max_size_replaces_each_connection():
    pool = Pool(opened=2, max_size=2)
    old = list(pool.machine.slots)
    pool.machine.retire_gradually(pool.now, 8.0)
    for now in range(1, 13):
        pool.tick(float(now))
        while pool.closing:
            assert pool.closing[0].reason == "retired"
            pool.close_next()
        while pool.opening:
            pool.open_next()
    assert (pool.gauges, set(old) & set(pool.machine.slots)) == ({"idle": 2}, set())


def test_retiring_gradually_leaves_a_held_connection_until_it_comes_back():
    pool = Pool(opened=1, max_size=1)
    slot = pool.ask()
    pool.machine.retire_gradually(pool.now, 8.0)
    pool.tick(100.0)
    while_held = pool.gauges
    pool.give_back(slot)
    assert (while_held, slot.reason, pool.gauges) == (
        {"checked_out": 1},
        "retired",
        {"closing": 1},
    )


def test_retiring_gradually_leaves_alone_what_ages_sooner():
    pool = Pool(opened=1, max_size=1, max_lifetime=8.0)
    pool.machine.retire_gradually(pool.now, 100.0)
    pool.tick(8.0)
    assert [slot.reason for slot in pool.closing] == ["age"]


def test_what_is_opened_after_a_gradual_retirement_began_is_not_part_of_it():
    pool = Pool(opened=1, max_size=2)
    pool.machine.retire_gradually(pool.now, 8.0)
    pool.machine._open(pool.machine.lanes[0], pool.now, "fill")
    fresh = pool.open_next()
    for _ in range(4):
        pool.tick(pool.now + 4.0)
        while pool.closing:
            pool.close_next()
        while pool.opening:
            pool.open_next()
    assert (fresh in pool.machine.slots, pool.gauges) == (True, {"idle": 2})


def test_what_a_checkout_finds_expired_of_a_gradual_retirement_is_counted_as_retired():
    pool = Pool(opened=2, max_size=2)
    pool.machine.retire_gradually(pool.now, 8.0)
    pool.now = 20.0
    pool.ask()
    assert [slot.reason for slot in pool.closing] == ["retired", "retired"]


def test_a_gradual_retirement_is_looked_after_often_enough():
    pool = Pool(opened=8, max_size=16)
    pool.machine.retire_gradually(pool.now, 8.0)
    assert pool.tick() <= 1.0


# -- the owner -------------------------------------------------------------------------------


def test_a_lower_limit_closes_idle_connections_first_and_held_ones_as_they_return():
    pool = Pool(opened=3, max_size=3)
    slots = pool.ask_each("ab")
    pool.resize(0, 1)
    at_once = pool.gauges
    pool.give_back(slots[0])
    pool.give_back(slots[1])
    assert [at_once, pool.gauges] == [
        {"checked_out": 2, "closing": 1},
        {"idle": 1, "closing": 2},
    ]


def test_a_lower_limit_holds_also_for_who_connects_itself_meanwhile():
    pool = Pool(max_size=2, timeout=0.0)
    slots = pool.ask_each("ab")
    pool.resize(0, 1)
    for slot in slots:
        pool.connect(slot)
    for slot in slots:
        pool.give_back(slot)
    assert pool.gauges == {"idle": 1, "closing": 1}


def test_a_lower_limit_drops_attempts_that_have_not_begun():
    pool = Pool(max_size=3)
    pool.ask_each("abc")
    pool.resize(0, 1)
    assert [pool.start_next(), pool.start_next()] == [None, None]
    assert pool.gauges == {"connecting": 1, "waiting": 3}


def test_a_higher_limit_grows_for_those_who_wait():
    pool = Pool(opened=1, max_size=1)
    pool.ask_each("abc")
    pool.resize(0, 3)
    pool.tick(1.0)
    assert pool.gauges == {"checked_out": 1, "connecting": 2, "waiting": 2}


def test_a_paused_pool_hands_nothing_out_and_resumes_in_order():
    pool = Pool(opened=2, max_size=2)
    pool.machine.pause()
    pool.ask_each("abc")
    while_paused = (pool.gauges, pool.woken)
    pool.call("resume")
    assert [while_paused, (pool.gauges, pool.woken)] == [
        ({"idle": 2, "waiting": 3}, ["a", "b"]),
        ({"checked_out": 2, "waiting": 1}, ["a", "b"]),
    ]


def test_retire_all_closes_idle_ones_now_and_held_ones_on_their_return():
    pool = Pool(opened=2, max_size=2)
    slot = pool.ask()
    pool.call("retire_all")
    at_once = pool.gauges
    pool.give_back(slot)
    assert [at_once, pool.gauges] == [{"checked_out": 1, "closing": 1}, {"closing": 2}]


def test_retire_all_closes_also_what_is_just_being_opened():
    pool = Pool(max_size=2, max_connecting=1)
    pool.ask("waiter")
    attempt = pool.start_next()
    pool.call("retire_all")
    pool.connect(attempt)
    assert (pool.woken, pool.closing) == ([], [attempt])


def test_retire_all_lets_a_fresh_attempt_begin_beside_the_unwanted_one():
    pool = Pool(max_size=2, max_connecting=1)
    pool.ask("waiter")
    pool.start_next()
    pool.call("retire_all")
    pool.open_next()
    assert pool.woken == ["waiter"]


def test_dispose_closes_what_is_idle_and_keeps_the_rest():
    pool = Pool(opened=2, max_size=2)
    slot = pool.ask()
    pool.call("dispose")
    pool.give_back(slot)
    assert pool.gauges == {"idle": 1, "closing": 1}


def test_a_disposed_pool_opens_nothing_by_itself():
    pool = Pool(opened=2, min_size=1, max_size=2, max_lifetime=100.0)
    pool.call("warm")
    pool.tick(99.9)
    pool.call("dispose")
    while pool.closing:
        pool.close_next()
    assert (pool.gauges, pool.tick()) == ({}, inf)


def test_close_fails_who_waits_and_retires_who_holds():
    pool = Pool(opened=2, max_size=2)
    slot, _ = pool.ask_each("ab")
    waiters = pool.ask_each("cd")
    pool.call("close")
    pool.give_back(slot)
    assert [(r.failure, r.error) for r in waiters] == [("closed", None)] * 2
    assert (pool.woken, pool.gauges) == (["c", "d"], {"checked_out": 1, "closing": 1})


def test_a_closed_pool_refuses_at_once():
    pool = Pool(opened=1, max_size=1)
    pool.call("close")
    assert answer(pool.ask()) == "closed"
    assert pool.counters("failed", "requesting") == {"failed": 1, "requesting": 0}


def test_a_closed_and_empty_pool_needs_no_more_looking_after():
    pool = Pool(opened=1, min_size=1, max_size=1)
    pool.call("warm")
    pool.call("close")
    pool.close_next()
    assert (pool.tick(), pool.gauges) == (inf, {})


def test_a_closed_pool_takes_nothing_back_that_was_replaced_in_its_holders_hands():
    pool = Pool(opened=1, max_size=1)
    slot = pool.ask()
    pool.call("close")
    pool.step(pool.machine.reconnected(slot, pool.now, 0.5))
    pool.give_back(slot)
    assert (pool.gauges, slot.reason) == ({"closing": 1}, "closed")


def test_who_connects_itself_into_a_closed_pool_has_failed():
    pool = Pool(max_size=1, timeout=0.0)
    slot = pool.ask()
    pool.call("close")
    pool.connect(slot)
    assert (pool.closing, pool.gauges) == ([slot], {"closing": 1})
    assert pool.counters("failed", "requesting") == {"failed": 1, "requesting": 0}


# -- callers that connect themselves ---------------------------------------------------------


def test_without_threads_callers_connect_themselves_in_turn():
    pool = Pool(max_size=3, upkeep="inline", max_connecting=1)
    first, second, _third = pool.ask_each("abc")
    pool.connect(first)
    assert (first.state, second.slot.state, pool.woken) == ("checked_out", "connecting", ["b"])
    assert pool.queue == ["c"]


def test_the_wait_of_who_connects_itself_after_a_dead_connection_is_recorded():
    pool = Pool(
        opened=1, max_size=3, pre_ping=True, ping_after=0.0, upkeep="inline", max_connecting=1
    )
    pool.now = 1.0
    held, own = pool.ask_each("ab")
    pool.found(held)
    pool.ask("waiter")
    pool.now = 3.0
    pool.give_back(held)
    pool.connect(own)
    pool.connect(pool.found(held, "ping"))
    assert (pool.read().wait_time.sum_seconds, pool.woken) == (2.0, ["waiter"])


# -- giving back -----------------------------------------------------------------------------


def test_a_second_checkin_changes_nothing():
    pool = Pool(opened=1, max_size=1)
    slot = pool.ask()
    assert [pool.give_back(slot), pool.give_back(slot)] == [True, False]
    assert (pool.gauges, pool.machine.books.checkins) == ({"idle": 1}, 1)


def test_a_detached_connection_leaves_its_place_to_those_who_wait():
    pool = Pool(opened=1, max_size=1)
    slot = pool.ask("holder")
    pool.ask("waiter")
    pool.give_back(slot, "detached")
    assert pool.gauges == {"connecting": 1, "waiting": 1}
    assert pool.counters("detached", "closes") == {"detached": 1, "closes": {}}


def test_a_connection_its_holder_has_lost_counts_as_invalidated():
    pool = Pool(opened=1, max_size=1)
    pool.give_back(pool.ask(), "lost")
    assert pool.gauges == {}
    assert pool.counters("invalidations", "closes") == {
        "invalidations": 1,
        "closes": {"invalidated": 1},
    }


def test_a_return_dealt_with_late_never_makes_a_wait_negative():
    pool = Pool(opened=1, max_size=1)
    slot = pool.ask("holder")
    pool.now = 2.0
    pool.ask("waiter")
    pool.step(pool.machine.checkin(slot, 1.5))
    assert pool.read().wait_time.max_seconds == 0.0
    assert pool.read().wait_time.buckets()[0][0] < 0.001


def test_a_holder_counts_as_asking_until_its_listeners_agreed():
    pool = Pool(opened=1, max_size=1)
    slot = pool.ask()
    pool.machine.hold_back(slot)
    before = pool.counters("checkouts", "requesting", "requests")
    pool.machine.confirm(slot)
    assert [before, pool.counters("checkouts", "requesting", "requests")] == [
        {"checkouts": 0, "requesting": 1, "requests": 1},
        {"checkouts": 1, "requesting": 0, "requests": 1},
    ]


def test_a_holder_whose_listeners_refused_counts_as_failed():
    pool = Pool(opened=1, max_size=1)
    slot = pool.ask()
    pool.machine.hold_back(slot)
    pool.give_back(slot)
    assert pool.counters("checkouts", "requesting", "failed") == {
        "checkouts": 0,
        "requesting": 0,
        "failed": 1,
    }


# -- the books -------------------------------------------------------------------------------


def test_the_waiting_is_split_equally_over_those_who_could_end_it():
    pool = Pool(opened=2, max_size=2, max_connecting=1)
    pool.ask_each("ab")
    pool.now = 1.0
    pool.ask("waiter")
    pool.now = 5.0
    caused = {label: row.wait_caused_seconds for label, row in pool.read().labels.items()}
    assert caused == {"a": 2.0, "b": 2.0, "waiter": 0.0}


def test_the_waiting_beside_no_busy_slot_is_the_pools_own():
    pool = Pool(opened=1, max_size=1)
    pool.machine.pause()
    pool.ask("waiter")
    pool.now = 3.0
    assert pool.read().labels["(pool)"].wait_caused_seconds == 3.0


def test_dropping_an_attempt_ends_its_part_in_the_waiting():
    pool = Pool(max_size=3, max_connecting=3)
    leaver, _, _ = pool.ask_each("abc")
    pool.call("cancel", leaver)
    pool.now = 3.0
    pool.start_next()
    pool.now = 4.0
    assert pool.read().labels["(connecting)"].wait_caused_seconds == 8.0


def test_the_peak_is_known_even_if_nothing_but_idle_connections_were_used():
    pool = Pool(opened=3, max_size=3)
    for slot in pool.ask_each("abc"):
        pool.give_back(slot)
    pool.call("retire_all")
    assert pool.read().peak_checked_out == 3


def test_connections_opened_for_nobody_are_no_peak():
    pool = Pool(min_size=3, max_size=5, max_connecting=5)
    pool.ask()
    while pool.opening:
        pool.open_next()
    assert pool.read().peak_checked_out == 1


# -- when to look again ----------------------------------------------------------------------


def test_an_empty_pool_needs_no_looking_after():
    assert Pool(max_size=1).tick() == inf


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        ({"idle_timeout": None, "max_lifetime": None}, 5.0),
        ({"idle_timeout": 8.0, "max_lifetime": None}, 1.0),
        ({"idle_timeout": None, "max_lifetime": 32.0}, 1.0),
        ({"idle_timeout": 0.0, "min_size": 1}, 0.02),
    ],
)
def test_a_pool_is_looked_after_often_enough_for_its_settings(
    settings: dict[str, Any], seconds: float
):
    assert Pool(opened=1, max_size=2, **settings).tick() == seconds
