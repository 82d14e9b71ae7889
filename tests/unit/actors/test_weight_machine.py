"""One weight update as a machine: what is done in which order, what makes it fail, and when the answer leaves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest

from actors import weight_events as events
from actors.messages import RankRecord
from actors.weight_events import Command, Event
from actors.weight_machine import RETRY_S, WeightMachine
from actors.weight_plan import LATE_COMMIT_S, WeightPlan
from actors.weight_records import WeightDecision, WeightIntent
from actors.weight_recovery import interrupted_rows
from actors.weight_request import parse_update
from actors.weight_run import WeightRun
from engine.weight_update import RankUpdate, UpdateStatus
from tests.unit.actors.fakes import rank_record

START_S = 100.0
SLACK_S = 0.05
INDEX = 7
T = TypeVar("T")


@dataclass
class Clocks:
    """Nodes whose clocks are known, but for these."""

    unheard: set[str] = field(default_factory=set)

    def boot_s(self, node_id: str, now_s: float) -> float | None:
        return None if node_id in self.unheard else now_s


def record_of(rank: int, **changes: Any) -> RankRecord:
    return replace(rank_record(rank), node_id=f"node-{rank}", **changes)


class Update:
    """A machine with a memory of what it wanted."""

    def __init__(self, *ranks: int, begins: bool = True, clocks: Clocks | None = None, **arguments: Any) -> None:
        self.clocks = clocks or Clocks()
        self.request = parse_update({"update_id": "u", "timeout_s": 8.0, **arguments}, 60.0, lambda: "drawn")
        self.plan = WeightPlan.of(self.request, START_S, SLACK_S)
        self.run = WeightRun(self.request, "then", START_S)
        self.machine = WeightMachine(self.plan, self.run, self.clocks)
        self.now_s = START_S
        self.wanted: list[Command] = []
        if begins:
            self.take(self.machine.begin([record_of(rank) for rank in ranks], self.now_s))

    def take(self, commands: list[Command]) -> list[Command]:
        self.wanted += commands
        return commands

    def say(self, event: Event, at_s: float | None = None) -> list[Command]:
        self.now_s = self.now_s if at_s is None else at_s
        return self.take(self.machine.handle(event, self.now_s))

    def pass_time(self, at_s: float) -> list[Command]:
        return self.say(events.TimePassed(), at_s)

    def stored(self) -> Update:
        self.say(events.IntentStored(INDEX))
        return self

    def rank_says(self, rank: int, status: UpdateStatus, **facts: Any) -> list[Command]:
        row = replace(RankUpdate("u", INDEX, status, digest="new", version="v1"), **facts)
        return self.say(events.RankAnswered(f"incarnation-{rank}", row))

    def voted(self, *ranks: int) -> Update:
        for rank in ranks:
            self.rank_says(rank, "prepared")
        return self

    def decided(self) -> Update:
        self.say(events.DecisionStored())
        return self

    def committed(self, *ranks: int) -> Update:
        for rank in ranks:
            self.rank_says(rank, "committed")
        return self

    def all(self, kind: type[T]) -> list[T]:
        return [command for command in self.wanted if isinstance(command, kind)]

    def ranks_of(self, kind: type[Any]) -> list[int]:
        return [command.record.rank for command in self.all(kind)]

    @property
    def answer(self) -> dict[str, Any]:
        (give,) = self.all(events.Give)
        return give.answer

    @property
    def statuses(self) -> list[str]:
        return [row["status"] for row in self.answer["ranks"]]


# ------------------------------------------------------------------------------------------------- the straight way
def test_every_step_waits_for_the_one_before() -> None:
    update = Update(0, 1, version="v1")
    (intent,) = update.wanted
    assert isinstance(intent, events.StoreIntent)
    assert (intent.intent.members, intent.intent.excluded) == (("incarnation-0", "incarnation-1"), ())

    update.stored()
    assert update.ranks_of(events.PrepareRank) == [0, 1]
    assert update.voted(0).all(events.StoreDecision) == []
    update.voted(1)
    assert update.all(events.StoreDecision) == [events.StoreDecision(WeightDecision(INDEX, "new", "v1", True))]
    assert not update.all(events.CommitOnRank)
    assert not update.all(events.RaiseWeights)

    update.decided()
    raised = [(command.node_id, command.weights_floor, command.floor) for command in update.all(events.RaiseWeights)]
    assert raised == [("node-0", INDEX, INDEX), ("node-1", INDEX, INDEX)]
    assert update.ranks_of(events.CommitOnRank) == [0, 1]
    update.committed(0, 1)
    assert not update.all(events.Give)
    update.say(events.OutcomeStored())
    assert update.answer["success"]
    assert (update.answer["status"], update.answer["http_status"], update.answer["decided"]) == ("updated", 200, True)
    facts = ("digest", "version", "weights_record", "epoch", "laggards")
    assert [update.answer[name] for name in facts] == ["new", "v1", INDEX, INDEX, []]
    assert update.statuses == ["committed", "committed"]
    assert update.machine.wake_s is None


def test_an_update_without_flush_takes_no_epoch() -> None:
    update = Update(0, flush_cache=False).stored().voted(0).decided().committed(0)
    update.say(events.OutcomeStored())
    assert update.all(events.RaiseWeights)[0].floor == 0
    assert (update.answer["success"], update.answer["epoch"]) == (True, 0)


def test_budgets_shrink() -> None:
    update = Update(0)
    update.say(events.IntentStored(INDEX), START_S + 1)
    (told,) = update.all(events.PrepareRank)
    # of 8 s a quarter is kept for the commit; the ranks keep what they staged for longer than all of it
    assert 4.9 < told.vote_budget_s < 5
    assert told.keep_budget_s > 7


def test_a_partial_update_names_the_weights_it_is_meant_for() -> None:
    update = Update(0, 1, is_partial=True).stored()
    assert {command.base_digest for command in update.all(events.PrepareRank)} == {"weights"}

    later = Update(begins=False, is_partial=True)
    later.take(later.machine.begin([record_of(0), record_of(1)], START_S, decided_digest="decided"))
    assert {command.base_digest for command in later.stored().all(events.PrepareRank)} == {"decided"}

    torn = Update(begins=False, is_partial=True)
    torn.take(torn.machine.begin([record_of(0), record_of(1, weights_digest="others")], START_S))
    assert (torn.answer["status"], torn.answer["http_status"]) == ("conflict", 409)
    assert not torn.all(events.StoreIntent)


# ---------------------------------------------------------------------------------------------------- no decision
def test_one_no_is_the_end_with_nothing_changed() -> None:
    update = Update(0, 1).stored().voted(0)
    update.rank_says(1, "refused", message="norm is [3], not [4]", digest="old")
    assert update.ranks_of(events.AbortOnRank) == [0, 1]
    assert not update.all(events.StoreDecision)
    update.say(events.OutcomeStored())
    assert (update.answer["status"], update.answer["http_status"], update.answer["decided"]) == ("refused", 400, False)
    assert (
        "rank 1: norm is [3]" in update.answer["message"] or update.answer["message"] == "rank 1: norm is [3], not [4]"
    )
    assert update.statuses == ["aborted", "refused"]
    # no decision comes of what is said afterwards
    assert update.voted(1) is update
    assert not update.all(events.StoreDecision)


def test_ranks_that_hold_different_bytes_do_not_commit() -> None:
    update = Update(0, 1).stored().voted(0)
    update.rank_says(1, "prepared", digest="other")
    update.say(events.OutcomeStored())
    assert not update.all(events.StoreDecision)
    assert (update.answer["success"], "different weights" in update.answer["message"]) == (False, True)


def test_a_vote_that_does_not_come() -> None:
    update = Update(0, 1).stored().voted(0)
    assert update.machine.wake_s == update.plan.vote_until_s
    update.pass_time(update.plan.vote_until_s)
    assert update.ranks_of(events.AbortOnRank) == [0, 1]
    update.say(events.OutcomeStored())
    assert (update.answer["status"], update.answer["http_status"]) == ("timed_out", 504)
    assert update.statuses == ["aborted", "timed_out"]


def test_a_vote_behind_the_time_decides_nothing() -> None:
    update = Update(0).stored()
    update.pass_time(update.plan.vote_until_s)
    update.voted(0)
    assert not update.all(events.StoreDecision)


def test_votes_about_another_update_do_not_count() -> None:
    update = Update(0).stored()
    update.say(events.RankAnswered("incarnation-0", RankUpdate("u", INDEX - 1, "prepared", digest="new")))
    assert not update.all(events.StoreDecision)


def test_a_call_that_fails_is_made_again_or_ends_it() -> None:
    update = Update(0, 1).stored().voted(0)
    update.say(events.RankFailed("incarnation-1", "the connection broke", False))
    assert update.machine.wake_s == pytest.approx(START_S + RETRY_S)
    update.pass_time(START_S + RETRY_S)
    assert update.ranks_of(events.PrepareRank) == [0, 1, 1]
    update.say(events.RankFailed("incarnation-1", "no such actor", True))
    update.say(events.OutcomeStored())
    assert (update.answer["status"], update.answer["http_status"]) == ("unreachable", 503)
    assert "no such actor" in update.answer["message"]


def test_a_rank_proven_gone_need_not_vote() -> None:
    update = Update(0, 1).stored().voted(0)
    update.say(events.RankGone("incarnation-1"))
    assert len(update.all(events.StoreDecision)) == 1
    update.decided().committed(0).say(events.OutcomeStored())
    assert (update.answer["success"], update.statuses) == (True, ["committed", "gone"])


def test_nobody_is_left() -> None:
    update = Update(0).stored()
    update.say(events.RankGone("incarnation-0"))
    update.say(events.OutcomeStored())
    assert (update.answer["status"], update.answer["http_status"]) == ("no_ranks", 503)
    assert Update().answer["status"] == "no_ranks"


def test_an_excluded_rank_has_no_vote_and_no_service() -> None:
    update = Update(0, 1, 2, exclude=[1, "incarnation-2"]).stored()
    assert update.ranks_of(events.PrepareRank) == [0]
    update.voted(0).decided().committed(0)
    assert [command.node_id for command in update.all(events.RaiseWeights)] == ["node-0", "node-1", "node-2"]
    assert update.ranks_of(events.CommitOnRank) == [0]
    update.say(events.OutcomeStored())
    assert (update.answer["success"], update.statuses) == (True, ["committed", "excluded", "excluded"])
    assert Update(0, exclude=[0]).answer["status"] == "no_ranks"


def test_cancelled_before_the_decision() -> None:
    storing = Update(0)
    storing.say(events.CancelAsked())
    assert (storing.answer["status"], storing.answer["http_status"]) == ("cancelled", 409)
    assert storing.say(events.IntentStored(INDEX)) == [
        events.StoreOutcome(storing.all(events.StoreOutcome)[-1].outcome)
    ]

    preparing = Update(0).stored()
    preparing.say(events.CancelAsked())
    assert preparing.ranks_of(events.AbortOnRank) == [0]

    deciding = Update(0).stored().voted(0)
    assert not deciding.machine.can_cancel
    assert deciding.say(events.CancelAsked()) == []


def test_a_clock_that_is_not_known_is_waited_for() -> None:
    update = Update(0, clocks=Clocks({"node-0"})).stored()
    assert not update.all(events.PrepareRank)
    update.clocks.unheard.clear()
    update.say(events.NodeChanged("node-0"))
    assert update.ranks_of(events.PrepareRank) == [0]


# -------------------------------------------------------------------------------------------------- behind a decision
def test_a_laggard_is_named_and_nothing_goes_back() -> None:
    update = Update(0, 1).stored().voted(0, 1).decided().committed(0)
    update.say(events.RankFailed("incarnation-1", "frozen", False))
    update.pass_time(START_S + RETRY_S)
    assert update.ranks_of(events.CommitOnRank) == [0, 1, 1]
    update.pass_time(update.plan.commit_until_s)
    update.say(events.OutcomeStored())
    assert not update.all(events.AbortOnRank)
    facts = [update.answer[name] for name in ("success", "status", "http_status", "decided", "laggards", "digest")]
    assert facts == [False, "laggards", 503, True, ["incarnation-1"], "new"]
    assert update.statuses == ["committed", "unreachable"]


@pytest.mark.parametrize("status", ["stale", "failed", "timed_out"])
def test_a_rank_that_voted_and_cannot_follow(status: UpdateStatus) -> None:
    update = Update(0, 1).stored().voted(0, 1).decided().committed(0)
    update.rank_says(1, status, message="gave it up", digest="old")
    update.say(events.OutcomeStored())
    assert (update.answer["success"], update.answer["laggards"]) == (False, ["incarnation-1"])
    assert "gave it up" in update.answer["message"]


def test_a_repeated_vote_is_no_commit() -> None:
    update = Update(0).stored().voted(0).decided()
    update.voted(0)
    assert update.machine.state == "committing"


def test_all_that_voted_die() -> None:
    update = Update(0).stored().voted(0)
    update.say(events.RankGone("incarnation-0"))
    update.decided()
    update.say(events.OutcomeStored())
    assert (update.answer["status"], update.answer["decided"]) == ("no_ranks", True)


# ---------------------------------------------------------------------------------------------------- newcomers
def test_who_registers_before_the_votes_are_in_votes() -> None:
    update = Update(0)
    update.say(events.RankRegistered(record_of(1), True))
    update.stored().voted(0)
    update.say(events.RankRegistered(record_of(2), True))
    assert update.ranks_of(events.PrepareRank) == [0, 1, 2]
    assert not update.all(events.StoreDecision)
    update.voted(1, 2)
    assert len(update.all(events.StoreDecision)) == 1


def test_who_registers_while_the_decision_is_stored_says_that_it_follows() -> None:
    """It was told the old weights. That it has read of the decision, and admits nothing, suffices."""
    update = Update(0).stored().voted(0)
    update.say(events.RankRegistered(record_of(1), True))
    update.decided().committed(0)
    assert "node-1" in [command.node_id for command in update.all(events.RaiseWeights)]
    assert update.machine.state == "committing"
    update.rank_says(1, "stale", digest="old")
    update.say(events.OutcomeStored())
    assert (update.answer["success"], update.statuses) == (True, ["committed", "stale"])


def test_who_registers_behind_the_decision_was_told_of_it() -> None:
    update = Update(0).stored().voted(0).decided()
    update.say(events.RankRegistered(record_of(1), True))
    update.committed(0)
    update.say(events.OutcomeStored())
    assert (update.answer["success"], update.statuses) == (True, ["committed", "joined"])


def test_who_registers_again_is_told_again() -> None:
    update = Update(0, 1).stored()
    update.say(events.RankRegistered(record_of(1), False))
    assert update.ranks_of(events.PrepareRank) == [0, 1, 1]


# ----------------------------------------------------------------------------------------------------------- the log
def test_no_intent_no_update() -> None:
    update = Update(0)
    update.say(events.NotStored("the disk is full"))
    assert (update.answer["status"], update.answer["http_status"]) == ("unavailable", 503)
    assert not update.all(events.Give)[0].is_remembered

    silent = Update(0)
    silent.pass_time(silent.plan.answer_until_s)
    assert silent.answer["status"] == "unavailable"
    # it turns up after all: the log shall say what became of it
    (store,) = silent.say(events.IntentStored(INDEX))
    assert isinstance(store, events.StoreOutcome)
    assert store.outcome.intent == INDEX
    assert not silent.all(events.PrepareRank)


def test_a_decision_that_is_not_there_for_certain_is_an_abort() -> None:
    update = Update(0).stored().voted(0)
    update.say(events.NotStored("the disk is full", is_final=True))
    assert update.ranks_of(events.AbortOnRank) == [0]
    update.say(events.OutcomeStored())
    assert (update.answer["status"], update.answer["decided"]) == ("unavailable", False)


@pytest.mark.parametrize("is_there", [True, False])
def test_in_doubt_nobody_is_told_anything(is_there: bool) -> None:
    update = Update(0).stored().voted(0)
    told = len(update.wanted)
    update.say(events.NotStored("the store hangs"))
    assert (update.machine.state, len(update.wanted)) == ("in_doubt", told)
    assert update.machine.wake_s == update.plan.answer_until_s
    update.pass_time(update.plan.answer_until_s)
    assert (update.answer["status"], update.answer["success"]) == ("in_doubt", False)
    assert not update.all(events.AbortOnRank)
    assert update.machine.wake_s is None

    if is_there:
        update.now_s += 100
        update.decided()
        assert update.machine.wake_s == pytest.approx(update.now_s + LATE_COMMIT_S)
        update.committed(0)
    else:
        update.say(events.NotStored("another record lies there", is_final=True))
        assert update.ranks_of(events.AbortOnRank) == [0]
    update.say(events.OutcomeStored())
    (amended,) = update.all(events.Amend)
    assert amended.answer["success"] is is_there
    assert len(update.all(events.Give)) == 1


@pytest.mark.parametrize("ends", [events.NotStored("the disk is full"), events.TimePassed(), events.OutcomeStored()])
def test_the_answer_leaves_whether_or_not_its_record_is_stored(ends: Event) -> None:
    update = Update(0).stored().voted(0).decided().committed(0)
    assert update.machine.wake_s == update.plan.answer_until_s
    update.say(ends, update.plan.answer_until_s)
    assert update.answer["success"]


# ------------------------------------------------------------------------------------------------------- taking over
def resumed(decision: WeightDecision | None, **arguments: Any) -> Update:
    update = Update(begins=False, **arguments)
    intent = WeightIntent(update.request, ("incarnation-0", "incarnation-1", "incarnation-9"), (), "then")
    here = [record_of(0), record_of(1), record_of(3)]
    interrupted_rows(update.run, intent, here, {"incarnation-9": record_of(9)}, is_decided=decision is not None)
    update.take(update.machine.resume(INDEX, decision, START_S))
    return update


def test_an_undecided_update_is_aborted_by_the_next_controller() -> None:
    update = resumed(None)
    assert update.ranks_of(events.AbortOnRank) == [0, 1, 3]
    assert not update.all(events.CommitOnRank)
    update.say(events.OutcomeStored())
    assert (update.answer["status"], update.answer["decided"]) == ("interrupted", False)


def test_a_decided_update_is_carried_forward_by_the_next_controller() -> None:
    update = resumed(WeightDecision(INDEX, "new", "v1", True))
    assert update.ranks_of(events.CommitOnRank) == [0, 1, 3]
    assert not update.all(events.AbortOnRank)
    update.committed(0, 1)
    update.rank_says(3, "stale", digest="old")
    update.say(events.OutcomeStored())
    assert update.answer["success"]
    assert update.statuses == ["committed", "committed", "stale", "gone"]
