"""One flush as a machine: what is done in which order, which verdicts suffice, and when the answer leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest

from actors import flush_events as events
from actors.flush_events import Command, Event
from actors.flush_machine import CANCEL_S, FLOOR_PATIENCE_S, OWN_ANSWER_S, FlushMachine
from actors.flush_plan import FlushPlan
from actors.flush_request import FlushLimits, parse_flush
from actors.flush_run import Answer, FlushRun
from actors.messages import HostReport, RankRecord
from engine.flush import Blockers, FlushVerdict
from tests.unit.actors.fakes import LIMITS, rank_record

START_S = 100.0
SLACK_S = 0.05
#: after the deadline: the answer leaves then whatever happens, and verdicts are waited for until then
ANSWERED_S = 0.9 * SLACK_S
COLLECTED_S = 0.55 * ANSWERED_S
INDEX = 7

T = TypeVar("T")


@dataclass
class TestNodes:
    """Nodes as a test says they are."""

    __test__ = False

    fenced: set[str] = field(default_factory=set)
    over_s: dict[str, float] = field(default_factory=dict)
    unheard: set[str] = field(default_factory=set)
    hosts: dict[str, HostReport] = field(default_factory=dict)
    floors: dict[str, int] = field(default_factory=dict)

    def is_fenced(self, record: RankRecord, epoch: int) -> bool:
        return record.node_id in self.fenced

    def lease_over_s(self, node_id: str) -> float:
        return self.over_s.get(node_id, math.inf)

    def boot_s(self, node_id: str, now_s: float) -> float | None:
        return None if node_id in self.unheard else now_s

    def host(self, node_id: str) -> HostReport | None:
        return self.hosts.get(node_id)

    def host_nodes(self) -> list[str]:
        return sorted(self.hosts)

    def floor_on(self, node_id: str) -> int:
        return self.floors.get(node_id, 0)


def record_of(rank: int, node: str | None = None) -> RankRecord:
    """Rank n lives on node n unless told otherwise."""
    return replace(rank_record(rank), node_id=node or f"node-{rank}")


class Flush:
    """A machine with a memory of what it wanted."""

    def __init__(
        self, *ranks: int, nodes: TestNodes | None = None, limits: FlushLimits = LIMITS, **arguments: Any
    ) -> None:
        self.nodes = nodes or TestNodes()
        request = parse_flush({"flush_id": "f"} | arguments, limits, make_id=lambda: "drawn")
        self.plan = FlushPlan.of(request, limits, START_S, SLACK_S)
        self.machine = FlushMachine(self.plan, FlushRun(request, "then", START_S), self.nodes, ["host"])
        self.now_s = START_S
        self.wanted: list[Command] = []
        self._take(self.machine.begin([record_of(rank) for rank in ranks], self.now_s))

    def _take(self, commands: list[Command]) -> list[Command]:
        self.wanted += commands
        return commands

    def say(self, event: Event, at_s: float | None = None) -> list[Command]:
        self.now_s = self.now_s if at_s is None else START_S + at_s
        return self._take(self.machine.handle(event, self.now_s))

    def pass_time(self, at_s: float) -> list[Command]:
        return self.say(events.TimePassed(), at_s)

    def stored(self) -> list[Command]:
        """The intent is in the log."""
        return self.say(events.IntentStored(INDEX))

    def answer_of(self, rank: int, status: str, **facts: Any) -> list[Command]:
        verdict = FlushVerdict("f", status, **facts)  # type: ignore[arg-type]
        return self.say(events.RankAnswered(f"incarnation-{rank}", verdict))

    def raised(self, *nodes: int, fences: bool = True) -> list[Command]:
        commands: list[Command] = []
        for node in nodes:
            if fences:
                self.nodes.fenced.add(f"node-{node}")
            commands += self.say(events.FloorSettled(f"node-{node}"))
        return commands

    def all(self, kind: type[T]) -> list[T]:
        return [command for command in self.wanted if isinstance(command, kind)]

    @property
    def told(self) -> list[int]:
        return [command.record.rank for command in self.all(events.TellRank)]

    @property
    def answer(self) -> Answer:
        (give,) = self.all(events.Give)
        return give.answer

    @property
    def outcome(self) -> Any:
        (store,) = self.all(events.StoreOutcome)
        return store.outcome

    @property
    def given(self) -> list[str]:
        return [row["status"] for row in self.answer["ranks"]]

    @property
    def statuses(self) -> list[str]:
        return [row["status"] for row in self.outcome.answer["ranks"]]

    @property
    def wake_s(self) -> float | None:
        wake_s = self.machine.wake_s
        return None if wake_s is None else round(wake_s - START_S, 9)


def kinds(commands: list[Command]) -> list[type]:
    return [type(command) for command in commands]


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
