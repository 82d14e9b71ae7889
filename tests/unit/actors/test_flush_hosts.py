"""Host tiers in a flush: whom it tells, what it waits for, and the rows of its answer."""

from __future__ import annotations

from typing import Any

import pytest

from actors import flush_events as events
from actors.flush_request import FlushLimits, parse_flush
from actors.messages import HostReport
from configs.errors import InvalidField
from tests.unit.actors.test_flush_machine import COLLECTED_S, INDEX, START_S, Flush, TestNodes

LIMITS = FlushLimits(3600.0, 5.0, ("device", "host"))
HELD = HostReport("ready", num_slots=100, page_bytes=10, committed=40, valid=30)


def flush(*ranks: int, **arguments: Any) -> Flush:
    """A flush of ranks whose nodes all have a host tier; its intent is stored."""
    begun = Flush(*ranks, nodes=TestNodes(hosts={f"node-{rank}": HELD for rank in ranks}), limits=LIMITS, **arguments)
    begun.stored()
    return begun


def host_rows(begun: Flush) -> list[tuple[str, str, int]]:
    return [(row["node"], row["status"], row["freed_pages"]) for row in begun.outcome.answer["host_tiers"]]


def test_a_flush_of_everything_reaches_the_host_tiers_by_its_epoch() -> None:
    begun = flush(0, 1)
    assert begun.all(events.TellHost) == []
    begun.answer_of(0, "flushed", epoch=INDEX)
    begun.answer_of(1, "flushed", epoch=INDEX)
    assert host_rows(begun) == [("node-0", "flushed", 30), ("node-1", "flushed", 30)]
    assert begun.outcome.answer["success"]
    assert begun.outcome.answer["untouched_tiers"] == ["host"]  # what the machine was given


def test_the_floor_of_a_fence_says_what_it_made_void() -> None:
    begun = flush(0, mode="fence")
    begun.say(events.FloorSettled("node-0", 28, 280))
    begun.answer_of(0, "flushed", epoch=INDEX)
    assert host_rows(begun) == [("node-0", "flushed", 28)]
    assert begun.outcome.answer["host_tiers"][0]["freed_bytes"] == 280


def test_a_flush_that_times_out_leaves_the_host_tier_as_it_was() -> None:
    begun = flush(0, 1)
    begun.answer_of(0, "timed_out")
    begun.answer_of(1, "flushed", epoch=INDEX)
    assert host_rows(begun) == [("node-0", "refused", 0), ("node-1", "refused", 0)]
    assert begun.outcome.answer["status"] == "timed_out"


def test_the_host_tier_alone_is_told_and_no_rank_is() -> None:
    begun = flush(0, 1, tiers=["host"])
    assert begun.told == []
    assert begun.all(events.TellHost) == [events.TellHost("node-0", None), events.TellHost("node-1", None)]
    assert not begun.machine.can_cancel
    begun.say(events.HostFlushed("node-0", 5, 50))
    assert begun.all(events.StoreOutcome) == []
    begun.say(events.HostFlushed("node-1", 6, 60))
    answer = begun.outcome.answer
    assert host_rows(begun) == [("node-0", "flushed", 5), ("node-1", "flushed", 6)]
    assert (answer["success"], answer["epoch"], answer["floor_raised"]) == (True, 0, False)
    assert begun.statuses == ["flushed", "flushed"]


def test_a_host_tier_that_does_not_answer_is_no_success() -> None:
    begun = flush(0, 1, tiers=["host"])
    begun.say(events.HostFlushed("node-0", 5, 50))
    begun.pass_time(COLLECTED_S)
    answer = begun.outcome.answer
    assert [status for _, status, _ in host_rows(begun)] == ["flushed", "unreachable"]
    assert (answer["success"], answer["status"], answer["http_status"]) == (False, "unreachable", 503)
    assert "host tier of node-1" in answer["message"]


def test_a_node_that_has_not_been_heard_of_owes_its_word_too() -> None:
    begun = Flush(0, nodes=TestNodes(), limits=LIMITS, tiers=["host"])
    begun.stored()
    assert begun.all(events.TellHost) == [events.TellHost("node-0", None)]
    assert begun.all(events.StoreOutcome) == []
    begun.pass_time(COLLECTED_S)
    assert host_rows(begun) == [("node-0", "unreachable", 0)]
    assert not begun.outcome.answer["success"]


def test_a_node_that_is_heard_of_while_the_flush_runs_is_told() -> None:
    begun = flush(0, tiers=["host"])
    begun.nodes.hosts["node-7"] = HELD
    begun.say(events.NodeChanged("node-7"))
    begun.say(events.HostFlushed("node-0", 5, 50))
    assert begun.all(events.StoreOutcome) == []
    begun.say(events.HostFlushed("node-7", 0, 0))
    assert host_rows(begun) == [("node-0", "flushed", 5), ("node-7", "flushed", 0)]


def test_a_silent_node_counts_when_its_lease_is_over_and_gets_none_before_the_outcome_is_stored() -> None:
    begun = flush(0, 1, tiers=["host"])
    begun.say(events.HostFlushed("node-0", 5, 50))
    begun.say(events.HostFailed("node-1", "the actor died"))
    assert begun.outcome.answer["status"] == "unreachable"
    begun = flush(0, 1, tiers=["host"])
    begun.nodes.over_s["node-1"] = START_S + 0.2
    begun.say(events.HostFlushed("node-0", 5, 50))
    begun.pass_time(0.2)
    assert host_rows(begun) == [("node-0", "flushed", 5), ("node-1", "expired", 0)]
    assert begun.outcome.answer["success"]
    assert begun.all(events.Withhold) == [events.Withhold(("node-1",))]


def test_a_floor_that_no_agent_has_confirmed_is_waited_for() -> None:
    begun = flush(0, 1, mode="abort")
    begun.say(events.FloorSettled("node-0", 28, 280))
    begun.say(events.FloorSettled("node-1"))
    begun.answer_of(0, "flushed", epoch=INDEX)
    begun.answer_of(1, "flushed", epoch=INDEX)
    assert begun.all(events.StoreOutcome) == []
    begun.nodes.floors["node-1"] = INDEX  # as its next renewal says
    begun.say(events.NodeChanged("node-1"))
    assert [status for _, status, _ in host_rows(begun)] == ["flushed", "flushed"]
    assert begun.outcome.answer["success"]


def test_a_floor_that_is_not_confirmed_by_the_deadline_is_no_success() -> None:
    begun = flush(0, mode="abort")
    begun.say(events.FloorSettled("node-0"))
    begun.answer_of(0, "flushed", epoch=INDEX)
    begun.pass_time(10.0)
    answer = begun.outcome.answer
    assert host_rows(begun) == [("node-0", "unreachable", 0)]
    assert (answer["success"], answer["floor_raised"]) == (False, True)


def test_a_tier_on_a_node_out_of_lease_is_not_called_flushed() -> None:
    begun = flush(0, 1)
    begun.nodes.over_s["node-1"] = START_S
    begun.answer_of(0, "flushed", epoch=INDEX)
    begun.pass_time(COLLECTED_S)
    assert begun.statuses == ["flushed", "expired"]
    assert host_rows(begun) == [("node-0", "flushed", 30), ("node-1", "expired", 0)]
    assert begun.outcome.answer["success"]


def test_a_host_tier_that_says_no_is_no_success() -> None:
    begun = flush(0, tiers=["host"])
    begun.say(events.HostFailed("node-0", "it is not open yet"))
    assert begun.outcome.answer["message"] == "host tier of node-0: it is not open yet"


def test_a_tier_on_a_node_without_ranks_is_flushed_too() -> None:
    nodes = TestNodes(hosts={"node-0": HELD, "node-7": HELD})
    begun = Flush(0, nodes=nodes, limits=LIMITS, tiers=["host"])
    begun.stored()
    assert [tell.node_id for tell in begun.all(events.TellHost)] == ["node-0", "node-7"]


def test_an_age_is_told_to_the_host_tiers_as_well_as_to_the_ranks() -> None:
    begun = flush(0, scope={"older_than_s": 60})
    assert begun.all(events.TellHost) == [events.TellHost("node-0", 60.0)]
    begun.answer_of(0, "flushed")
    assert begun.all(events.StoreOutcome) == []
    begun.say(events.HostFlushed("node-0", 0, 0))
    assert begun.outcome.answer["success"]


def test_other_scopes_are_kept_by_the_ranks_keys() -> None:
    begun = flush(0, scope={"namespace": "tenant"})
    assert begun.all(events.TellHost) == []
    begun.answer_of(0, "flushed")
    assert host_rows(begun) == [("node-0", "flushed", 0)]


def test_the_device_alone_has_no_host_rows() -> None:
    begun = flush(0, tiers=["device"])
    begun.answer_of(0, "flushed")
    assert host_rows(begun) == []
    assert begun.outcome.answer["success"]


def test_a_dry_run_counts_and_tells_nobody() -> None:
    nodes = TestNodes(hosts={"node-0": HELD})
    begun = Flush(0, nodes=nodes, limits=LIMITS, dry_run=True, tiers=["host"])
    assert begun.all(events.TellHost) == []
    (row,) = begun.answer["host_tiers"]
    assert (row["status"], row["freed_pages"]) == ("flushed", 30)


def test_a_scope_of_the_host_tier_alone_is_refused() -> None:
    with pytest.raises(InvalidField, match="leave tiers out"):
        parse_flush({"tiers": ["host"], "scope": {"namespace": "a"}}, LIMITS, make_id=lambda: "drawn")
