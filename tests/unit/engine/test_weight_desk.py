"""The rank's side of a weight update: votes, the decision by word and by message, doubt, deadlines, repeats, terms."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest

from configs.errors import InvariantError
from engine.flush import Blockers
from engine.weight_desk import NUM_REMEMBERED, WeightDesk
from engine.weight_policy import fate_of_running, holds_admission, may_vote
from engine.weight_update import (
    IN_FLIGHT_MODES,
    AbortTold,
    Answer,
    Command,
    Commit,
    CommitDone,
    CommitFailed,
    CommitTold,
    Drop,
    Event,
    InFlightMode,
    PrepareCommand,
    PrepareTold,
    RankUpdate,
    Registered,
    Stage,
    Staged,
    StagingFailed,
    Turn,
)

BUSY = Blockers(running=2, half_prefilled=1)
VOTE_UNTIL_S, KEEP_UNTIL_S = 10.0, 20.0
T = TypeVar("T")


class Rank:
    """A desk with a clock and a memory of what it wanted."""

    def __init__(self, **facts: Any) -> None:
        self.desk = WeightDesk("d0", "v0", **facts)
        self.now_s = 0.0
        self.floor = 0
        self.lease_ok = True
        self.blockers = Blockers()
        self.wanted: list[Command] = []

    def say(self, event: Event) -> list[Command]:
        commands = self.desk.handle(event, self.now_s)
        self.wanted += commands
        return commands

    def turn(self) -> list[Command]:
        """One step boundary; a commit that is wanted is carried out."""
        commands = self.say(Turn(self.floor, self.lease_ok, self.blockers))
        for command in commands:
            if isinstance(command, Commit):
                self.say(CommitDone(command.index, num_retracted=self.blockers.running))
        return commands

    def prepare(self, index: int = 7, term: int = 1, **fields: Any) -> list[Command]:
        command = PrepareCommand(f"u{index}", index, term, **fields)
        return self.say(PrepareTold(command, self.now_s + VOTE_UNTIL_S, self.now_s + KEEP_UNTIL_S))

    def voted(self, index: int = 7, **fields: Any) -> Rank:
        """Prepared, with a yes."""
        self.prepare(index, **fields)
        self.say(Staged(index, f"d{index}"))
        self.turn()
        assert self.last.status == "prepared"
        return self

    def all(self, kind: type[T]) -> list[T]:
        return [command for command in self.wanted if isinstance(command, kind)]

    @property
    def last(self) -> RankUpdate:
        return self.all(Answer)[-1].answer

    @property
    def serves(self) -> tuple[int, str, str]:
        return self.desk.record, self.desk.digest, self.desk.version


# ----------------------------------------------------------------------------------------------------- the straight way
def test_prepare_vote_decision_commit() -> None:
    rank = Rank()
    (stage,) = rank.prepare(version="v1")
    assert isinstance(stage, Stage)
    assert (rank.desk.phase, rank.desk.may_admit, rank.desk.open_update_id) == ("staging", True, "u7")
    assert rank.say(Staged(7, "d7")) == []
    rank.turn()
    assert (rank.last.status, rank.last.digest, rank.last.version) == ("prepared", "d7", "v1")
    assert (rank.desk.phase, rank.desk.may_admit, rank.serves) == ("prepared", True, (0, "d0", "v0"))

    rank.floor, rank.blockers = 7, BUSY
    assert rank.turn() == [Commit(7, "retract", "v1", 7)]
    assert (rank.last.status, rank.last.num_retracted, rank.last.digest) == ("committed", 2, "d7")
    assert (rank.serves, rank.desk.phase, rank.desk.may_admit) == ((7, "d7", "v1"), "serving", True)


def test_a_message_brings_the_decision_too_and_is_answered_after_the_commit() -> None:
    rank = Rank().voted()
    assert rank.say(CommitTold("u7", 7, 1)) == []
    assert not rank.desk.may_admit
    rank.turn()
    assert rank.last.status == "committed"
    assert rank.serves == (7, "d7", "v0")


def test_without_a_flush_the_cache_stays() -> None:
    rank = Rank().voted(flush_cache=False)
    rank.floor = 7
    assert rank.turn() == [Commit(7, "none", None, None)]


def test_nothing_is_admitted_between_the_order_to_commit_and_its_end() -> None:
    rank = Rank().voted(in_flight="keep")
    rank.say(Turn(7, True, BUSY))
    assert not rank.desk.may_admit
    rank.say(CommitDone(7))
    assert rank.desk.may_admit


def test_a_failed_swap_puts_the_rank_out_of_service() -> None:
    rank = Rank().voted()
    rank.say(Turn(7, True, Blockers()))
    rank.say(CommitFailed(7, "the device is gone"))
    assert (rank.last.status, rank.last.message) == ("failed", "the device is gone")
    assert (rank.serves, rank.desk.may_admit) == ((0, "d0", "v0"), False)


def test_a_swap_that_nobody_asked_for_is_a_fault_of_ours() -> None:
    with pytest.raises(InvariantError):
        Rank().voted().say(CommitDone(7))


# ----------------------------------------------------------------------------------------------------------- no vote
def test_a_payload_that_does_not_fit_is_a_no() -> None:
    rank = Rank()
    rank.prepare()
    assert rank.say(StagingFailed(7, "norm is [3], not [4]"))[0] == Drop(7)
    assert (rank.last.status, rank.last.message) == ("refused", "norm is [3], not [4]")
    assert (rank.desk.phase, rank.serves) == ("serving", (0, "d0", "v0"))


def test_a_part_is_laid_upon_the_weights_it_was_meant_for() -> None:
    rank = Rank()
    rank.prepare(base_digest="other")
    assert rank.last.status == "refused"
    assert not rank.all(Stage)
    rank.prepare(8, base_digest="d0")
    assert len(rank.all(Stage)) == 1


def test_a_late_command_is_not_begun() -> None:
    rank = Rank()
    rank.say(PrepareTold(PrepareCommand("u7", 7, 1), 0.0, 5.0))
    assert rank.last.status == "expired_command"
    assert not rank.all(Stage)


def test_weights_that_are_not_there_in_time() -> None:
    rank = Rank()
    rank.prepare()
    rank.now_s = rank.desk.wake_s
    assert rank.now_s == VOTE_UNTIL_S
    rank.turn()
    assert rank.last.status == "timed_out"
    # what the loader then has is dropped
    assert rank.say(Staged(7, "d7")) == [Drop(7)]


def test_an_older_update_gives_way_and_its_late_command_is_refused() -> None:
    rank = Rank().voted(7)
    rank.prepare(9)
    assert [answer.answer.status for answer in rank.all(Answer)] == ["prepared", "aborted"]
    rank.prepare(8)
    assert rank.last.status == "refused"
    assert rank.desk.open_update_id == "u9"


def test_an_update_that_is_decided_is_committed_before_the_next_begins() -> None:
    rank = Rank().voted(7)
    rank.prepare(9, decided_record=7)
    assert rank.last.status == "refused"
    rank.turn()
    assert rank.serves == (7, "d7", "v0")


# ------------------------------------------------------------------------------------------------------ the in-flight
@pytest.mark.parametrize("mode", ["wait", "drain"])
def test_the_idle_instant_is_waited_for_and_kept(mode: InFlightMode) -> None:
    rank = Rank()
    rank.blockers = BUSY
    rank.prepare(in_flight=mode)
    assert rank.desk.may_admit
    rank.say(Staged(7, "d7"))
    rank.turn()
    assert rank.desk.phase == "staged"
    assert rank.desk.may_admit is (mode == "wait")

    rank.blockers = Blockers()
    rank.turn()
    assert rank.last.status == "prepared"
    assert not rank.desk.may_admit
    rank.floor = 7
    assert rank.turn() == [Commit(7, "none", None, 7)]
    assert rank.desk.may_admit


@pytest.mark.parametrize("mode", ["wait", "drain"])
def test_no_idle_instant_in_time(mode: InFlightMode) -> None:
    rank = Rank()
    rank.blockers = BUSY
    rank.prepare(in_flight=mode)
    rank.say(Staged(7, "d7"))
    rank.now_s = VOTE_UNTIL_S
    rank.turn()
    assert (rank.last.status, rank.last.blockers) == ("timed_out", BUSY)
    assert rank.desk.may_admit


@pytest.mark.parametrize("mode", IN_FLIGHT_MODES)
def test_a_hold_ends_with_the_ranks_own_deadline(mode: InFlightMode) -> None:
    rank = Rank().voted(in_flight=mode)
    rank.now_s = rank.desk.wake_s
    rank.turn()
    assert (rank.now_s, rank.last.status) == (KEEP_UNTIL_S, "timed_out")
    assert Drop(7) in rank.wanted
    assert rank.desk.may_admit


def test_the_policy_in_one_table() -> None:
    modes: dict[InFlightMode, tuple[bool, bool, bool, str]] = {
        "wait": (False, False, True, "retract"),
        "drain": (False, True, True, "retract"),
        "retract": (True, False, False, "retract"),
        "abort": (True, False, False, "abort"),
        "keep": (True, False, False, "keep"),
    }
    for mode, expected in modes.items():
        said = (
            may_vote(mode, BUSY),
            holds_admission(mode, has_voted=False),
            holds_admission(mode, has_voted=True),
            fate_of_running(mode, BUSY),
        )
        assert said == expected
        assert may_vote(mode, Blockers(copies_in_flight=3))
        assert fate_of_running(mode, Blockers(copies_in_flight=3)) == "none"


# ----------------------------------------------------------------------------------------------- aborted, or in doubt
def test_an_abort_leaves_the_old_weights() -> None:
    rank = Rank().voted()
    rank.say(AbortTold("u7", 7, 1))
    assert (rank.last.status, rank.desk.phase, rank.serves) == ("aborted", "serving", (0, "d0", "v0"))
    rank.lease_ok = False
    rank.turn()
    assert rank.desk.may_admit


def test_an_abort_that_overtakes_its_update() -> None:
    rank = Rank()
    rank.say(AbortTold("u7", 7, 1))
    rank.prepare(7)
    assert rank.last.status == "aborted"
    assert not rank.all(Stage)


def test_in_doubt_without_a_lease_nothing_is_admitted() -> None:
    """Nobody could tell it of the decision; uncached answers would come from weights that are perhaps the old ones."""
    rank = Rank().voted()
    rank.lease_ok = False
    rank.turn()
    assert not rank.desk.may_admit
    rank.now_s = KEEP_UNTIL_S
    rank.turn()
    assert (rank.desk.phase, rank.desk.may_admit) == ("serving", False)
    rank.say(AbortTold("u7", 7, 1))
    assert rank.desk.may_admit


def test_without_a_vote_a_lost_lease_costs_no_service() -> None:
    rank = Rank()
    rank.prepare()
    rank.lease_ok = False
    rank.say(Turn(0, False, Blockers()))
    rank.say(Staged(7, "d7"))
    assert rank.desk.may_admit


def test_a_decision_behind_the_deadline_makes_it_stale() -> None:
    rank = Rank().voted()
    rank.now_s = KEEP_UNTIL_S
    rank.turn()
    rank.floor = 7
    rank.turn()
    assert (rank.desk.is_stale, rank.desk.may_admit) == (True, False)
    rank.say(CommitTold("u7", 7, 1))
    assert rank.last.status == "stale"


def test_a_decision_seen_first_after_the_deadline_still_counts() -> None:
    """A rank that was frozen reads the word before it looks at the clock."""
    rank = Rank().voted()
    rank.now_s, rank.floor = KEEP_UNTIL_S + 100, 7
    rank.turn()
    assert rank.serves == (7, "d7", "v0")


def test_a_higher_floor_is_not_the_decision_of_a_lower_update() -> None:
    """It voted for 7 and froze; 7 was given up, 9 was decided without it. Below the floor is not decided."""
    rank = Rank().voted(7)
    rank.floor = 9
    assert Drop(7) in rank.turn()
    assert not rank.all(Commit)
    assert (rank.serves, rank.desk.may_admit, rank.last.status) == ((0, "d0", "v0"), False, "stale")


def test_a_decision_it_never_voted_for_makes_it_stale() -> None:
    for prepare in (False, True):
        rank = Rank()
        if prepare:
            rank.prepare(7)
        rank.floor = 7
        rank.turn()
        assert not rank.desk.may_admit
        assert not rank.all(Commit)
        if prepare:
            assert rank.last.status == "stale"


# ----------------------------------------------------------------------------------------------------------- catch up
def test_a_stale_rank_catches_up() -> None:
    rank = Rank()
    rank.floor = 7
    rank.turn()
    rank.prepare(7, decided_digest="d7", in_flight="keep")
    assert not rank.desk.may_admit
    rank.say(Staged(7, "d7"))
    rank.turn()
    assert (rank.serves, rank.desk.may_admit, rank.last.status) == ((7, "d7", "v0"), True, "committed")


def test_catching_up_after_having_been_refused_or_left_behind() -> None:
    rank = Rank().voted()
    rank.now_s, rank.floor = KEEP_UNTIL_S, 0
    rank.turn()
    assert rank.last.status == "timed_out"
    rank.floor = 7
    rank.turn()
    rank.prepare(7, decided_digest="d7")
    rank.say(Staged(7, "d7"))
    rank.turn()
    assert rank.serves[0] == 7
    rank.prepare(7, decided_digest="d7")
    assert (rank.last.status, len(rank.all(Commit))) == ("committed", 1)


def test_other_weights_than_the_decided_ones_are_not_taken() -> None:
    rank = Rank()
    rank.floor = 7
    rank.turn()
    rank.prepare(7, decided_digest="d7")
    rank.say(Staged(7, "d8"))
    rank.turn()
    assert (rank.last.status, rank.desk.may_admit) == ("refused", False)


def test_a_catch_up_that_is_overtaken() -> None:
    rank = Rank()
    rank.prepare(7, decided_digest="d7")
    rank.floor = 9
    rank.turn()
    assert (rank.last.status, rank.desk.may_admit) == ("stale", False)
    rank.prepare(7, decided_digest="d7")
    assert rank.last.status == "refused"


def test_a_complete_update_heals_a_stale_rank() -> None:
    rank = Rank()
    rank.floor = 7
    rank.turn()
    rank.voted(9)
    assert not rank.desk.may_admit
    rank.floor = 9
    rank.turn()
    assert (rank.serves, rank.desk.may_admit) == ((9, "d9", "v0"), True)


def test_registering_compares_what_was_loaded() -> None:
    rank = Rank()
    rank.say(Registered(7, "d0"))
    assert (rank.desk.record, rank.desk.may_admit) == (7, True)
    stale = Rank()
    stale.say(Registered(7, "d7"))
    assert (stale.desk.record, stale.desk.may_admit) == (0, False)


# --------------------------------------------------------------------------------------------------- repeats and terms
def test_repeats_are_answered_alike() -> None:
    rank = Rank()
    rank.prepare()
    assert rank.prepare() == []
    rank.say(Staged(7, "d7"))
    rank.turn()
    (again,) = rank.prepare()
    assert isinstance(again, Answer)
    assert again.answer.status == "prepared"
    rank.say(CommitTold("u7", 7, 1))
    rank.say(CommitTold("u7", 7, 1))
    rank.turn()
    for event in (CommitTold("u7", 7, 1), AbortTold("u7", 7, 1), PrepareTold(PrepareCommand("u7", 7, 1), 99, 99)):
        (answer,) = rank.say(event)
        assert isinstance(answer, Answer)
        assert answer.answer.status == "committed"
    assert len(rank.all(Stage)) == len(rank.all(Commit)) == 1


def test_a_superseded_controller_is_refused() -> None:
    rank = Rank().voted(7, term=5)
    for event in (CommitTold("u7", 7, 4), AbortTold("u7", 7, 4)):
        rank.say(event)
        assert rank.last.status == "refused"
        assert "term 5" in rank.last.message
    rank.prepare(8, term=4)
    assert rank.last.status == "refused"
    assert (rank.desk.phase, rank.desk.open_update_id) == ("prepared", "u7")
    rank.say(AbortTold("u7", 7, 6))
    assert rank.last.status == "aborted"


def test_the_memory_of_answers_is_bounded() -> None:
    rank = Rank()
    for index in range(1, NUM_REMEMBERED + 3):
        rank.say(AbortTold(f"u{index}", index, 1))
    assert len(rank.desk._answers) == NUM_REMEMBERED
    assert 1 not in rank.desk._answers
