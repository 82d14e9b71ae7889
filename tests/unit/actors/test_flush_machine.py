"""One flush as a machine: what is done in which order, which verdicts suffice, and who came meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from actors import flush_events as events
from actors.flush_machine import FLOOR_PATIENCE_S, OWN_ANSWER_S
from engine.flush import Blockers, FlushVerdict
from tests.unit.actors.flush_machines import (
    COLLECTED_S,
    INDEX,
    SLACK_S,
    START_S,
    Flush,
    TestNodes,
    kinds,
    record_of,
)

# ------------------------------------------------------------------------------------------------------------- order


def test_stored_before_told_and_stored_before_answered() -> None:
    flush = Flush(0, 1, timeout_s=2)
    assert kinds(flush.wanted) == [events.StoreIntent]
    intent = flush.all(events.StoreIntent)[0].intent
    assert (intent.takes_epoch, intent.members) == (True, ("incarnation-0", "incarnation-1"))
    assert kinds(flush.stored()) == [events.TellRank, events.TellRank]
    order = flush.all(events.TellRank)[0]
    assert (order.budget_s, order.valid_until_s) == (1.98, START_S + 2.0 + SLACK_S)
    flush.answer_of(0, "flushed")
    assert flush.all(events.StoreOutcome) == []
    assert kinds(flush.answer_of(1, "flushed")) == [events.StoreOutcome]
    assert flush.all(events.Give) == []
    assert (flush.outcome.intent, flush.outcome.floor) == (INDEX, INDEX)
    after = flush.say(events.OutcomeStored())
    # the floor of a wait rises last, and nobody waits for it
    assert kinds(after) == [events.Give, events.RaiseFloor, events.RaiseFloor]
    assert flush.answer["success"]
    assert flush.answer["epoch"] == INDEX
    assert flush.answer["floor_raised"]
    assert flush.wake_s is None


@pytest.mark.parametrize("mode", ["fence", "retract", "abort"])
def test_the_floor_first_where_nothing_may_be_taken_back(mode: str) -> None:
    flush = Flush(0, 1, mode=mode, timeout_s=1)
    assert flush.stored() == [events.RaiseFloor("node-0", INDEX), events.RaiseFloor("node-1", INDEX)]
    assert flush.told == []
    flush.raised(1)
    assert flush.told == [1]
    flush.raised(0)
    assert flush.told == [1, 0]
    # not less than the grace for one engine step
    assert all(order.budget_s == 4.98 for order in flush.all(events.TellRank))
    flush.answer_of(0, "flushed")
    flush.answer_of(1, "flushed")
    flush.say(events.OutcomeStored())
    assert flush.answer["success"]
    assert flush.all(events.RaiseFloor)[2:] == []


def test_a_frozen_agent_keeps_its_ranks_from_flushing_only_for_a_moment() -> None:
    flush = Flush(0, 1, mode="retract", timeout_s=1)
    flush.stored()
    flush.raised(0)
    flush.pass_time(0.1)
    assert flush.told == [0]
    assert flush.wake_s == FLOOR_PATIENCE_S
    flush.pass_time(FLOOR_PATIENCE_S)
    assert flush.told == [0, 1]


def test_a_rank_is_told_when_it_is_known_what_its_clock_shows() -> None:
    nodes = TestNodes(unheard={"node-1"})
    flush = Flush(0, 1, nodes=nodes, timeout_s=3)
    flush.stored()
    assert flush.told == [0]
    nodes.unheard.clear()
    flush.say(events.NodeChanged("node-1"), at_s=1.0)
    assert flush.told == [0, 1]
    assert flush.all(events.TellRank)[1].budget_s == 1.98


def test_one_whose_node_was_never_heard_of_is_unreachable() -> None:
    flush = Flush(0, 1, nodes=TestNodes(unheard={"node-1"}), timeout_s=1)
    flush.stored()
    flush.answer_of(0, "flushed")
    flush.pass_time(1.03)
    assert flush.statuses == ["flushed", "unreachable"]
    assert "not been heard of" in flush.outcome.answer["ranks"][1]["message"]


def test_a_dry_run_stores_nothing_and_takes_nothing() -> None:
    flush = Flush(0, dry_run=True, mode="fence")
    assert kinds(flush.wanted) == [events.TellRank]
    flush.answer_of(0, "flushed", freed_pages=3)
    assert flush.answer["success"]
    assert (flush.answer["epoch"], flush.answer["floor_raised"]) == (0, False)
    assert flush.all(events.Give)[0].is_remembered is False


def test_nobody_to_flush() -> None:
    flush = Flush()
    assert (flush.answer["status"], flush.answer["http_status"]) == ("no_ranks", 503)
    assert not flush.all(events.Give)[0].is_remembered


# ------------------------------------------------------------------------------------- verdicts without a rank's word


def test_a_fence_is_done_when_the_floor_is_on_every_page() -> None:
    flush = Flush(0, 1, mode="fence")
    flush.stored()
    flush.raised(0, 1)
    flush.answer_of(0, "flushed", freed_pages=5)
    # an idle rank's own word comes at once; one inside a long step is not waited for
    assert flush.all(events.StoreOutcome) == []
    assert flush.wake_s is not None
    assert OWN_ANSWER_S <= flush.wake_s <= 0.03
    flush.pass_time(flush.wake_s)
    assert flush.statuses == ["flushed", "fenced"]
    flush.say(events.OutcomeStored())
    assert flush.answer["success"]
    assert flush.say(events.RankAnswered("incarnation-1", FlushVerdict("f", "flushed")))[0] == events.KeepLate(
        flush.machine.run.late
    )
    assert [row["status"] for row in flush.machine.run.late] == ["flushed"]


def test_a_floor_is_as_good_as_any_bad_word_of_the_rank() -> None:
    flush = Flush(0, 1, 2, mode="fence")
    flush.stored()
    flush.raised(0, 1, 2)
    flush.answer_of(0, "flushed")
    flush.answer_of(1, "busy")
    flush.say(events.RankFailed("incarnation-2", "Ray reports that the actor has died", is_final=True))
    assert flush.statuses == ["flushed", "fenced", "fenced"]
    assert flush.outcome.answer["success"]


@pytest.mark.parametrize("mode", ["retract", "abort"])
def test_a_floor_is_not_enough_for_modes_that_promise_more(mode: str) -> None:
    flush = Flush(0, 1, mode=mode, timeout_s=1)
    flush.stored()
    flush.raised(0, 1)
    flush.answer_of(0, "flushed")
    assert flush.wake_s is not None
    flush.pass_time(5.0 + COLLECTED_S)
    assert flush.statuses == ["flushed", "unreachable"]
    assert not flush.outcome.answer["success"]
    # but the invalidation is irrevocable
    assert flush.outcome.answer["floor_raised"]
    assert flush.outcome.floor == INDEX


def test_a_node_out_of_lease_suffices_and_gets_none_until_the_floor_is_stored() -> None:
    nodes = TestNodes(over_s={"node-1": START_S + 3.0})
    flush = Flush(0, 1, nodes=nodes, timeout_s=30)
    flush.stored()
    flush.answer_of(0, "flushed")
    assert flush.wake_s is not None
    assert flush.wake_s <= 3.0
    flush.pass_time(3.0)
    assert kinds(flush.wanted[-2:]) == [events.Withhold, events.StoreOutcome]
    assert flush.all(events.Withhold)[0].node_ids == ("node-1",)
    assert flush.statuses == ["flushed", "expired"]
    after = flush.say(events.OutcomeStored())
    assert after[0] == events.Release(("node-1",))
    assert flush.answer["success"]


def test_a_node_that_came_back_in_time_is_not_counted_as_out_of_lease() -> None:
    nodes = TestNodes(over_s={"node-1": START_S + 3.0})
    flush = Flush(0, 1, nodes=nodes, timeout_s=30)
    flush.stored()
    flush.answer_of(0, "flushed")
    nodes.over_s["node-1"] = START_S + 9.0
    flush.pass_time(3.0)
    assert flush.all(events.StoreOutcome) == []
    flush.answer_of(1, "flushed")
    assert flush.statuses == ["flushed", "flushed"]


def test_all_nodes_out_of_lease_is_no_success() -> None:
    nodes = TestNodes(over_s={"node-0": START_S})
    flush = Flush(0, nodes=nodes, timeout_s=30)
    flush.stored()
    assert flush.wake_s is not None
    flush.pass_time(flush.wake_s)
    assert flush.statuses == ["expired"]
    assert flush.outcome.answer["status"] == "expired"
    assert not flush.outcome.answer["success"]
    assert flush.outcome.floor == 0


@pytest.mark.parametrize("arguments", [{"scope": {"namespace": "a"}}, {"dry_run": True}])
def test_a_floor_says_nothing_of_a_part_of_the_cache(arguments: dict[str, Any]) -> None:
    nodes = TestNodes(fenced={"node-0"})
    flush = Flush(0, nodes=nodes, mode="fence", timeout_s=1, **arguments)
    flush.stored() if "scope" in arguments else None
    assert flush.all(events.RaiseFloor) == []
    assert flush.told == [0]
    flush.pass_time(5.0 + SLACK_S)
    ended = flush.outcome.answer if "scope" in arguments else flush.answer
    assert [row["status"] for row in ended["ranks"]] == ["unreachable"]
    assert not ended["floor_raised"]


def test_a_node_out_of_lease_counts_for_a_part_of_the_cache_and_gets_no_lease_before_its_floor_is_stored() -> None:
    nodes = TestNodes(over_s={"node-1": START_S})
    flush = Flush(0, 1, nodes=nodes, mode="fence", timeout_s=1, scope={"namespace": "a"})
    flush.stored()
    flush.answer_of(0, "flushed")
    flush.pass_time(0.2)
    assert flush.statuses == ["flushed", "expired"]
    assert flush.outcome.answer["success"]
    assert flush.all(events.Withhold) == [events.Withhold(("node-1",))]


def test_a_scoped_flush_takes_a_sub_epoch_and_no_epoch() -> None:
    flush = Flush(0, scope={"namespace": "a"}, timeout_s=1)
    assert not flush.all(events.StoreIntent)[0].intent.takes_epoch
    flush.stored()
    flush.answer_of(0, "flushed")
    assert (flush.outcome.answer["epoch"], flush.outcome.answer["sub_epoch"]) == (0, INDEX)
    assert flush.outcome.floor == 0
    assert flush.outcome.answer["success"]


def test_an_expired_node_does_not_speak_for_a_rank_that_has_spoken() -> None:
    nodes = TestNodes(over_s={"node-1": START_S})
    flush = Flush(0, 1, nodes=nodes, timeout_s=1)
    flush.stored()
    flush.answer_of(0, "flushed")
    flush.answer_of(1, "timed_out", blockers=Blockers(running=1))
    assert flush.statuses == ["flushed", "timed_out"]
    assert not flush.outcome.answer["success"]


# --------------------------------------------------------------------------------------------------------- newcomers


def test_who_registers_empty_meanwhile_has_joined() -> None:
    flush = Flush(0, timeout_s=5)
    flush.say(events.RankRegistered(record_of(1), is_new=True))
    flush.stored()
    flush.say(events.RankRegistered(record_of(2), is_new=True))
    flush.say(events.RankRegistered(record_of(3), is_new=False))
    assert flush.told == [0, 3]
    # a repeat of its registration changes nothing, whatever it says
    flush.say(events.RankRegistered(record_of(3), is_new=True))
    flush.answer_of(0, "flushed")
    flush.answer_of(3, "flushed")
    assert flush.statuses == ["flushed", "joined", "joined", "flushed"]


def test_whose_registration_was_answered_before_the_intent_was_stored_owes_its_verdict() -> None:
    # It was told the epoch before this one, and may have computed under it since.
    flush = Flush(0)
    flush.say(events.RankRegistered(record_of(1), is_new=True))
    flush.say(events.RankRegistered(record_of(1), is_new=False))
    flush.stored()
    assert flush.machine.run.waiting_for == ["incarnation-0", "incarnation-1"]


def test_who_registered_before_and_again_still_owes_its_verdict() -> None:
    flush = Flush(0, timeout_s=5)
    flush.stored()
    flush.say(events.RankRegistered(record_of(0), is_new=True))
    assert flush.told == [0]
    assert flush.machine.run.waiting_for == ["incarnation-0"]
