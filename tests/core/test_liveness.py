"""What one dead connection says of the others, and how idle ones are kept alive."""

from __future__ import annotations

from typing import Any

import pytest

from sqla_poolkit.core.slots import Slot
from tests.core.by_hand import Pool


def ready(opened: int, **settings: Any) -> Pool:
    """Return a pool with so many idle connections, opened at 0.0, that pings."""
    settings = {"max_size": opened, "pre_ping": True, **settings}
    return Pool(opened=opened, **settings)


def names(pool: Pool, slots: list[Slot]) -> list[int]:
    """Return which connections these are, by the order in which they were opened."""
    opened = list(pool.machine.slots)
    return [opened.index(slot) for slot in slots]


# -- one death -------------------------------------------------------------------------------


def test_after_one_death_each_other_connection_is_pinged_before_it_is_used():
    pool = ready(3)
    pool.lose(pool.ask("holder"))
    pool.now = 0.25
    slots = pool.ask_each("ab")
    assert [(slot.state, slot.needs_ping) for slot in slots] == [("checking", True)] * 2


def test_a_suspect_that_answered_a_ping_is_above_suspicion():
    pool = ready(2)
    pool.lose(pool.ask("holder"))
    pool.give_back(pool.found(pool.ask()))
    assert pool.ask().needs_ping is False


def test_a_suspect_is_pinged_also_when_it_is_handed_over():
    pool = ready(2)
    slots = pool.ask_each("ab")
    waiter = pool.ask("waiter")
    pool.lose(slots[0])
    pool.give_back(slots[1])
    assert (waiter.slot.state, waiter.slot.needs_ping) == ("checking", True)


def test_a_connection_opened_after_a_death_is_no_suspect():
    pool = ready(1)
    pool.lose(pool.ask("holder"))
    pool.ask("waiter")
    assert pool.open_next().state == "checked_out"


def test_a_connection_replaced_in_its_holders_hands_is_no_suspect():
    pool = ready(2)
    slots = pool.ask_each("ab")
    pool.lose(slots[0])
    pool.step(pool.machine.reconnected(slots[1], pool.now, 0.0))
    pool.give_back(slots[1])
    assert pool.ask().needs_ping is False


def test_the_owner_may_have_all_pinged_before_they_are_used():
    pool = ready(1)
    pool.machine.suspect_all()
    assert (pool.ask().state, next(iter(pool.machine.slots)).needs_ping) == ("checking", True)


# -- an event of the server's ----------------------------------------------------------------


@pytest.mark.parametrize(("apart", "idle_left"), [(1.0, 0), (1.125, 2)])
def test_two_deaths_within_a_second_retire_all_of_their_generation(apart: float, idle_left: int):
    pool = ready(4)
    slots = pool.ask_each("ab")
    pool.lose(slots[0])
    pool.now = apart
    pool.lose(slots[1])
    assert pool.machine.idle == idle_left
    assert [slot.reason for slot in pool.closing] == ["generation"] * (2 - idle_left)


def test_a_generation_that_is_held_goes_when_it_comes_back():
    pool = ready(3)
    held, *dying = pool.ask_each("abc")
    for slot in dying:
        pool.lose(slot)
    pool.give_back(held)
    assert (pool.closing, held.reason) == ([held], "generation")


def test_a_generation_that_is_being_checked_is_not_handed_out():
    pool = ready(3, ping_after=0.0)
    dying = pool.ask_each("ab")
    pool.now = 0.25
    checking = pool.ask("waiter")
    for slot in dying:
        pool.lose(slot)
    pool.found(checking)
    assert (checking.state, checking.reason, pool.queue) == ("closing", "generation", ["waiter"])


def test_a_death_of_an_older_generation_tells_nothing_new():
    pool = ready(4)
    *dying, old, fresh = pool.ask_each("abcd")
    for slot in dying:
        pool.lose(slot)
    pool.step(pool.machine.reconnected(fresh, pool.now, 0.0))
    pool.lose(old)
    pool.give_back(fresh)
    assert (pool.machine.generation, fresh.state, pool.ask().needs_ping) == (1, "idle", False)


def test_a_death_in_the_next_generation_is_the_first_of_its_own():
    pool = ready(3)
    *dying, fresh = pool.ask_each("abc")
    for slot in dying:
        pool.lose(slot)
    pool.step(pool.machine.reconnected(fresh, pool.now, 0.0))
    pool.lose(fresh)
    assert pool.machine.generation == 1


def test_without_pre_ping_one_death_retires_all():
    pool = ready(3, pre_ping=False)
    pool.lose(pool.ask("holder"))
    assert (pool.gauges, pool.machine.generation) == ({"closing": 2}, 1)


def test_a_failed_check_is_a_death_too():
    pool = ready(3, ping_after=0.0)
    pool.now = 0.25
    pool.found(pool.found(pool.ask(), "ping"), "probe")
    assert [slot.reason for slot in pool.closing] == ["ping", "probe", "generation"]


def test_an_interrupted_check_is_no_death():
    pool = ready(3, ping_after=0.0)
    pool.now = 0.25
    for slot in pool.ask_each("ab"):
        pool.step(pool.machine.check_interrupted(slot, pool.now, "cancelled"))
    assert pool.gauges == {"idle": 1, "closing": 2}


@pytest.mark.parametrize(
    ("ping_timeout", "took", "is_telling"),
    [(5.0, 0.25, False), (5.0, 0.5, True), (0.25, 0.25, True)],
)
def test_a_ping_cut_off_for_its_callers_deadline_tells_nothing_if_it_had_little_time(
    ping_timeout: float, took: float, is_telling: bool
):
    pool = ready(2, ping_after=0.0, ping_timeout=ping_timeout)
    pool.now = 1.0
    slot = pool.ask()
    pool.now += took
    other = pool.found(slot, "ping", was_cut=True)
    assert (slot.state, other.is_suspect) == ("closing", is_telling)


def test_pings_that_hang_one_after_the_other_are_an_event():
    pool = ready(3, ping_after=0.0, ping_timeout=2.0)
    pool.now = 1.0
    second = pool.found(wait_for_cut(pool, pool.ask()), "ping", was_cut=True)
    pool.found(wait_for_cut(pool, second), "ping", was_cut=True)
    assert [slot.reason for slot in pool.closing] == ["ping", "ping", "generation"]


def wait_for_cut(pool: Pool, slot: Slot) -> Slot:
    pool.now += pool.config.ping_timeout
    return slot


def test_retiring_a_generation_leaves_what_is_just_being_opened():
    pool = ready(1, max_size=2)
    pool.ask("holder")
    pool.ask("waiter")
    pool.call("retire_generation")
    pool.open_next()
    assert pool.woken == ["waiter"]


# -- keeping idle connections alive ----------------------------------------------------------


def test_what_was_idle_for_long_is_pinged_in_the_background():
    pool = ready(1, keepalive=10.0)
    pool.tick(9.0)
    before = pool.gauges
    pool.tick(10.0)
    assert [before, pool.gauges, len(pool.keeping)] == [{"idle": 1}, {"checking": 1}, 1]


def test_what_answered_is_idle_again_and_pinged_after_the_same_time():
    pool = ready(1, keepalive=10.0)
    pool.tick(10.0)
    pool.keep(pool.keeping[0])
    gauges = [pool.gauges]
    for now in (19.0, 20.0):
        pool.tick(now)
        gauges.append(pool.gauges)
    assert gauges == [{"idle": 1}, {"idle": 1}, {"checking": 1}]
    assert pool.counters("pings", "ping_failures") == {"pings": 1, "ping_failures": 0}


def test_a_connection_in_use_is_not_due_before_it_is_idle_for_so_long():
    pool = ready(1, keepalive=10.0)
    slot = pool.ask()
    pool.now = 8.0
    pool.give_back(slot)
    pool.tick(16.0)
    assert pool.gauges == {"idle": 1}


def test_connections_returned_together_are_not_all_pinged_together():
    pool = ready(8, keepalive=10.0, max_connecting=8)
    moments = []
    for step in range(90, 101):
        before = len(pool.keeping)
        pool.tick(step / 10)
        moments += [pool.now] * (len(pool.keeping) - before)
    assert (len(moments), len(set(moments)) > 4) == (8, True)


def test_no_more_are_pinged_at_a_time_than_may_connect():
    pool = ready(5, keepalive=10.0, max_connecting=2)
    pool.tick(10.0)
    at_once = pool.gauges
    pool.keep(pool.keeping[0])
    pool.tick()
    assert [at_once, pool.gauges] == [{"idle": 3, "checking": 2}] * 2


def test_keeping_alive_leaves_the_order_of_the_idle_connections_as_it_was():
    pool = ready(4, keepalive=10.0, max_connecting=2)
    for slot in pool.ask_each("abcd")[::-1]:
        pool.now += 0.125
        pool.give_back(slot)
    order = names(pool, list(pool.machine.lanes[0].idle))
    pool.tick(10.5)
    pool.keep(pool.keeping[1])
    pool.keep(pool.keeping[0])
    assert names(pool, list(pool.machine.lanes[0].idle)) == order


def test_what_is_kept_alive_is_still_retired_for_its_idleness():
    pool = ready(1, keepalive=1.0, idle_timeout=8.0)
    for now in (1.0, 2.0, 4.0, 7.0):
        pool.tick(now)
        pool.keep(pool.keeping[0])
    pool.tick(8.0)
    assert [slot.reason for slot in pool.closing] == ["idle"]


def test_what_does_not_answer_is_closed_and_makes_the_others_suspect():
    pool = ready(2, keepalive=10.0, max_connecting=1)
    pool.tick(10.0)
    pool.keep(pool.keeping[0], is_alive=False)
    assert (pool.gauges, pool.closing[0].reason) == ({"idle": 1, "closing": 1}, "ping")
    assert pool.ask().needs_ping is True
    assert pool.counters("pings", "ping_failures") == {"pings": 1, "ping_failures": 1}


def test_what_is_cut_off_after_its_time_makes_the_others_suspect():
    pool = ready(2, keepalive=10.0, max_connecting=1, ping_timeout=2.0)
    pool.tick(10.0)
    pool.now = 12.0
    pool.keep(pool.keeping[0], is_alive=False, was_cut=True)
    assert pool.machine.lanes[0].idle[0].is_suspect


def test_who_asks_meanwhile_is_served_by_what_answers():
    pool = ready(1, keepalive=10.0)
    pool.tick(10.0)
    waiter = pool.ask("waiter")
    pool.keep(pool.keeping[0])
    assert (waiter.slot.state, waiter.slot.needs_ping, pool.woken) == (
        "checking",
        False,
        ["waiter"],
    )


def test_who_asks_meanwhile_is_served_by_a_new_one_if_nothing_answers():
    pool = ready(1, keepalive=10.0)
    pool.tick(10.0)
    pool.ask("waiter")
    pool.keep(pool.keeping[0], is_alive=False)
    pool.close_next()
    pool.open_next()
    assert pool.woken == ["waiter"]


@pytest.mark.parametrize(
    ("call", "reason"),
    [("retire_all", "retired"), ("retire_generation", "generation"), ("dispose", "disposed")],
)
def test_what_is_retired_while_it_is_pinged_goes_although_it_answers(call: str, reason: str):
    pool = ready(1, keepalive=10.0)
    pool.tick(10.0)
    pool.call(call)
    pool.keep(pool.keeping[0])
    assert [slot.reason for slot in pool.closing] == [reason]


def test_a_report_on_a_ping_that_was_given_up_changes_nothing():
    pool = ready(1, keepalive=10.0)
    pool.tick(10.0)
    pool.call("put_to_sleep", pool.machine.lanes[0])
    before = pool.gauges
    pool.keep(pool.keeping[0], is_alive=False)
    assert [before, pool.gauges] == [{}, {}]
    assert pool.counters("pings", "ping_failures") == {"pings": 0, "ping_failures": 0}


@pytest.mark.parametrize("settings", [{"keepalive": 0.0}, {"pre_ping": False}])
def test_without_pings_nothing_is_kept_alive(settings: dict[str, Any]):
    pool = ready(1, **settings)
    pool.tick(500.0)
    assert pool.gauges == {"idle": 1}


def test_a_paused_pool_keeps_nothing_alive():
    pool = ready(1, keepalive=10.0)
    pool.machine.pause()
    pool.tick(20.0)
    assert pool.gauges == {"idle": 1}


def test_a_sleeping_lane_is_not_kept_alive():
    pool = ready(1, keepalive=10.0)
    pool.call("put_to_sleep", pool.machine.lanes[0])
    pool.tick(20.0)
    assert pool.gauges == {"idle": 1}


def test_a_pool_is_looked_after_often_enough_to_keep_it_alive():
    pool = ready(1, keepalive=32.0, idle_timeout=None, max_lifetime=None)
    assert pool.tick() == 1.0


# -- a check that comes too late -------------------------------------------------------------


def test_a_caller_whose_deadline_passed_before_its_check_has_timed_out():
    pool = ready(1, timeout=2.0, ping_after=0.0)
    pool.now = 1.0
    slot = pool.ask("late")
    pool.ask("next")
    pool.now = 3.0
    request = pool.step(pool.machine.check_expired(slot, pool.now))
    assert (request.failure, request.slot, pool.woken) == ("timeout", None, ["next"])
    assert pool.counters("timeouts", "requesting") == {"timeouts": 1, "requesting": 1}


def test_a_connection_whose_check_never_began_is_idle_again():
    pool = ready(1, timeout=2.0, ping_after=0.0)
    pool.now = 1.0
    slot = pool.ask("late")
    pool.now = 3.0
    pool.step(pool.machine.check_expired(slot, pool.now))
    assert (pool.gauges, pool.ask()) == ({"idle": 1}, slot)


def test_a_connection_retired_meanwhile_is_not_idle_again():
    pool = ready(1, timeout=2.0, ping_after=0.0)
    pool.now = 1.0
    slot = pool.ask("late")
    pool.call("retire_all")
    pool.now = 3.0
    pool.step(pool.machine.check_expired(slot, pool.now))
    assert (pool.gauges, pool.closing) == ({"closing": 1}, [slot])


# -- lanes -----------------------------------------------------------------------------------


def test_an_aged_connection_of_a_sleeping_lane_gets_no_replacement():
    pool = Pool(opened=1, max_size=2, max_lifetime=100.0)
    pool.call("put_to_sleep", pool.machine.lanes[0])
    pool.tick(99.0)
    assert (pool.gauges, pool.opening) == ({"idle": 1}, [])


def test_who_asks_again_after_a_dead_connection_wakes_its_lane():
    pool = ready(1, max_size=2, ping_after=0.0)
    pool.now = 1.0
    slot = pool.ask("caller")
    pool.call("put_to_sleep", pool.machine.lanes[0])
    pool.found(slot, "ping")
    assert pool.gauges == {"closing": 1, "connecting": 1, "waiting": 1}


def test_a_lane_put_to_sleep_answers_for_the_waiting_until_then():
    pool = Pool(max_size=1, lanes=2)
    leaver = pool.ask("leaver", lane=0)
    pool.start_next()
    pool.call("cancel", leaver)
    pool.ask("waiter", lane=1)
    pool.now = 2.0
    pool.call("put_to_sleep", pool.machine.lanes[0])
    assert pool.read().labels["(connecting)"].wait_caused_seconds == 2.0


def test_a_lane_put_to_sleep_gives_up_its_trial_and_another_lane_tries():
    pool = Pool(max_size=2, lanes=2)
    while not pool.machine.breaker.is_open:
        pool.ask("early")
        slot = pool.start_next()
        pool.now += 0.25
        pool.fail(slot)
    pool.tick(pool.machine.breaker.until)
    pool.start_next()
    pool.call("put_to_sleep", pool.machine.lanes[0])
    assert [slot.lane for slot in pool.opening] == [pool.machine.lanes[1]]
