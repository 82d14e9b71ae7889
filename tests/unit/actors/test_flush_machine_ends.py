"""How one flush ends: on time whatever the log does, cancelled, or given way to another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors import flush_events as events
from actors.flush_machine import CANCEL_S
from actors.messages import HostReport
from tests.unit.actors.fakes import LIMITS
from tests.unit.actors.flush_machines import (
    ANSWERED_S,
    COLLECTED_S,
    INDEX,
    SLACK_S,
    START_S,
    Flush,
    TestNodes,
    kinds,
    record_of,
)

# --------------------------------------------------------------------------------------------------- time and the log


def test_the_answer_leaves_on_time_whatever_the_ranks_do() -> None:
    flush = Flush(0, 1, timeout_s=2)
    flush.stored()
    assert flush.wake_s is not None
    flush.answer_of(0, "flushed")
    assert flush.pass_time(2.0) == []
    assert flush.wake_s == 2.0 + COLLECTED_S
    flush.pass_time(2.0 + COLLECTED_S)
    assert flush.statuses == ["flushed", "unreachable"]
    flush.say(events.OutcomeStored())
    assert flush.answer["http_status"] == 503


def test_the_answer_leaves_on_time_whatever_the_log_does() -> None:
    flush = Flush(0, timeout_s=2)
    assert flush.wake_s == 2.0 + ANSWERED_S
    flush.pass_time(2.0 + ANSWERED_S)
    assert flush.answer["status"] == "unavailable"
    assert "no rank was told" in flush.answer["message"]
    assert flush.given == ["refused"]
    # the intent is found in the log later: nobody is told, and the log learns that it is over
    late = flush.stored()
    assert kinds(late) == [events.StoreOutcome]
    assert flush.told == []
    assert flush.outcome.floor == 0
    assert flush.say(events.OutcomeStored()) == []


@pytest.mark.parametrize("mode", ["fence", "retract", "abort"])
@pytest.mark.parametrize("is_slow", [True, False])
def test_a_floor_that_was_stored_with_a_late_intent_is_told_as_it_is(mode: str, is_slow: bool) -> None:
    flush = Flush(0, mode=mode)
    if is_slow:
        flush.pass_time(5.0 + SLACK_S)
    else:
        flush.say(events.NotStored("the control log cannot be written"))
    # until it is known whether the floor rises nobody says that the ranks are untouched, and the id is not free
    (given,) = flush.all(events.Give)
    assert given.is_remembered
    assert flush.given == ["unreachable"]
    assert "may drop it all" in flush.answer["message"]
    flush.stored()
    assert flush.told == []
    assert flush.outcome.answer["floor_raised"]
    assert flush.outcome.floor == flush.outcome.answer["epoch"] == INDEX
    (amend,) = flush.say(events.OutcomeStored())
    assert isinstance(amend, events.Amend)
    assert amend.answer["floor_raised"]
    assert not amend.answer["success"]


def test_a_drop_of_host_tiers_that_may_be_stored_is_never_denied() -> None:
    flush = Flush(
        0,
        nodes=TestNodes(hosts={"node-0": HostReport("ready")}),
        limits=replace(LIMITS, tiers=("device", "host")),
        tiers=["host"],
    )
    flush.say(events.NotStored("the control log cannot be written"))
    assert flush.given == ["unreachable"]
    flush.stored()
    (amend,) = flush.say(events.OutcomeStored())
    assert isinstance(amend, events.Amend)
    assert (amend.answer["success"], amend.answer["floor_raised"]) == (False, False)
    assert "before its next lease" in amend.answer["message"]


def test_an_id_is_free_again_when_its_intent_is_known_to_be_missing() -> None:
    flush = Flush(0, mode="fence")
    flush.say(events.NotStored("the control log cannot be written"))
    assert flush.say(events.NotStored("it is not in the log", is_final=True)) == [events.Forget()]
    superseded = Flush(0, mode="fence")
    superseded.say(events.NotStored("another controller has taken over", is_final=True))
    assert superseded.given == ["refused"]
    assert not superseded.all(events.Give)[0].is_remembered


def test_one_that_registered_while_the_intent_was_stored_and_died_has_not_joined() -> None:
    flush = Flush(0)
    flush.say(events.RankRegistered(record_of(1), is_new=True))
    flush.say(events.RankGone("incarnation-1"))
    flush.stored()
    flush.answer_of(0, "flushed")
    flush.say(events.OutcomeStored())
    assert flush.statuses == ["flushed"]


def test_success_is_not_said_before_it_is_stored() -> None:
    nodes = TestNodes(over_s={"node-1": START_S})
    flush = Flush(0, 1, nodes=nodes, timeout_s=1)
    flush.stored()
    flush.answer_of(0, "flushed")
    flush.pass_time(0.5)
    assert flush.machine.state == "ending"
    assert flush.wake_s == 1.0 + ANSWERED_S
    flush.pass_time(1.0 + ANSWERED_S)
    assert (flush.answer["success"], flush.answer["status"]) == (False, "unavailable")
    assert not flush.answer["floor_raised"]
    # the node that was counted as out of lease still gets none: the floor may be stored at any moment
    assert flush.all(events.Release) == []
    after = flush.say(events.OutcomeStored())
    assert kinds(after) == [events.Release, events.Amend]
    assert flush.all(events.Amend)[0].answer["success"]


def test_a_log_that_refuses_the_outcome() -> None:
    nodes = TestNodes(over_s={"node-1": START_S})
    flush = Flush(0, 1, nodes=nodes, timeout_s=1)
    flush.stored()
    flush.answer_of(0, "flushed")
    flush.pass_time(0.5)
    after = flush.say(events.NotStored("the control log cannot be written"))
    # perhaps it is there, and the next controller reads a success that counts on the node being out of lease
    assert kinds(after) == [events.Give]
    assert flush.answer["message"] == "every rank has flushed, but the control log cannot be written"
    assert [row["status"] for row in flush.answer["ranks"]] == ["flushed", "expired"]
    after = flush.say(events.NotStored("it is not in the log", is_final=True))
    assert kinds(after) == [events.Release, events.StoreOutcome]
    closing = flush.all(events.StoreOutcome)[-1].outcome
    assert (closing.answer["success"], closing.floor) == (False, 0)
    assert flush.say(events.NotStored("another controller has taken over", is_final=True)) == []


def test_a_floor_that_is_raised_stays_raised_in_what_is_told() -> None:
    flush = Flush(0, mode="fence")
    flush.stored()
    flush.raised(0)
    flush.answer_of(0, "flushed")
    flush.say(events.NotStored("superseded"))
    assert not flush.answer["success"]
    assert flush.answer["floor_raised"]


# ------------------------------------------------------------------------------------------- cancelling, giving way


def test_cancelled_before_anybody_was_told() -> None:
    flush = Flush(0, timeout_s=9)
    assert flush.machine.can_cancel
    flush.say(events.CancelAsked())
    assert (flush.answer["status"], flush.answer["http_status"]) == ("cancelled", 409)
    flush.stored()
    assert flush.told == []
    assert kinds(flush.wanted[-1:]) == [events.StoreOutcome]


def test_cancelled_while_it_waits() -> None:
    flush = Flush(0, 1, 2, nodes=TestNodes(unheard={"node-2"}), timeout_s=9)
    flush.stored()
    flush.answer_of(0, "flushed")
    assert kinds(flush.say(events.CancelAsked())) == [events.CancelOnRank]
    assert flush.say(events.CancelAsked()) == []
    flush.answer_of(1, "refused", message="Cancelled before it began.")
    assert flush.statuses == ["flushed", "refused", "refused"]
    assert flush.outcome.answer["status"] == "cancelled"


def test_a_cancelled_flush_does_not_wait_for_a_frozen_rank() -> None:
    flush = Flush(0, timeout_s=600)
    flush.stored()
    flush.say(events.CancelAsked(), at_s=1.0)
    assert flush.wake_s == 1.0 + CANCEL_S
    flush.pass_time(1.0 + CANCEL_S)
    assert flush.statuses == ["unreachable"]
    assert flush.outcome.answer["status"] == "cancelled"


def test_flushed_everywhere_before_the_cancel_arrived_is_a_success() -> None:
    flush = Flush(0, timeout_s=600)
    flush.stored()
    flush.say(events.CancelAsked())
    flush.answer_of(0, "flushed")
    assert flush.outcome.answer["success"]


@pytest.mark.parametrize("mode", ["fence", "retract", "abort"])
def test_what_is_irrevocable_is_not_cancelled(mode: str) -> None:
    flush = Flush(0, mode=mode)
    assert not flush.machine.can_cancel
    flush.stored()
    assert not flush.machine.can_cancel
    assert flush.say(events.CancelAsked()) == []


def test_it_gives_way_and_says_to_whom() -> None:
    flush = Flush(0, 1, 2, timeout_s=600)
    flush.stored()
    assert flush.machine.can_give_way
    flush.answer_of(0, "flushed")
    flush.say(events.Superseded("other"))
    flush.answer_of(1, "superseded", message="Gave way to fence flush other.")
    assert flush.all(events.StoreOutcome) == []
    flush.say(events.SupersederEnded())
    assert flush.statuses == ["flushed", "superseded", "superseded"]
    answer = flush.outcome.answer
    assert (answer["status"], answer["http_status"], answer["superseded_by"]) == ("superseded", 409, "other")


def test_flushed_everywhere_before_it_gave_way_is_a_success() -> None:
    flush = Flush(0, timeout_s=600)
    flush.stored()
    flush.say(events.Superseded("other"))
    flush.answer_of(0, "flushed")
    assert flush.outcome.answer["success"]


def test_the_machine_asks_to_be_woken_only_for_what_it_may_decide_then() -> None:
    nodes = TestNodes(over_s={"node-0": START_S - 50, "node-1": START_S + 4})
    flush = Flush(0, 1, nodes=nodes, timeout_s=30)
    flush.stored()
    seen: list[float] = []
    while (wake_s := flush.wake_s) is not None and not flush.all(events.StoreOutcome):
        assert wake_s + START_S > flush.now_s
        seen.append(wake_s)
        nodes.over_s["node-1"] = START_S + 40  # it renews its lease
        flush.pass_time(wake_s)
        assert len(seen) < 10
    assert seen[-1] == 30 + COLLECTED_S
    assert flush.statuses == ["expired", "unreachable"]
