"""Pause and continue on one rank: what is held, what is answered when, and the watchdog."""

from __future__ import annotations

import math

import pytest

from engine.pause import (
    PAUSE_MODES,
    Command,
    Continued,
    ContinueTold,
    PauseAnswer,
    PauseDesk,
    PauseMode,
    PauseTold,
    RemoveRunning,
    TimePassed,
    TurnStarted,
)


class Rank:
    def __init__(self, num_running: int = 0) -> None:
        self.desk = PauseDesk()
        self.now_s = 0.0
        self.num_running = num_running

    def pause(self, mode: PauseMode, watchdog_s: float = math.inf, term: int = 1) -> list[Command]:
        return self.desk.handle(PauseTold(mode, term, watchdog_s=watchdog_s), self.now_s)

    def resume(self, term: int = 1) -> list[Command]:
        return self.desk.handle(ContinueTold(term), self.now_s)

    def turn(self) -> list[Command]:
        commands = self.desk.handle(TurnStarted(self.num_running), self.now_s)
        if any(isinstance(command, RemoveRunning) for command in commands):
            self.num_running = 0
        return commands


@pytest.mark.parametrize("mode", PAUSE_MODES)
def test_a_pause_is_answered_at_the_step_boundary(mode: PauseMode) -> None:
    rank = Rank(num_running=3)
    assert rank.pause(mode) == []
    assert (rank.desk.is_paused, rank.desk.has_work) == (True, True)
    *removed, answer = rank.turn()
    gone = {"abort": (3, 0, 0), "retract": (0, 3, 0), "in_place": (0, 0, 3)}[mode]
    assert removed == ([] if mode == "in_place" else [RemoveRunning(mode)])
    assert answer == PauseAnswer("paused", "", mode, *gone)
    assert rank.turn() == []
    assert not rank.desk.has_work


@pytest.mark.parametrize("mode", PAUSE_MODES)
def test_continue_is_at_once_and_may_be_repeated(mode: PauseMode) -> None:
    rank = Rank(1)
    rank.pause(mode)
    rank.turn()
    rank.now_s = 2.5
    assert rank.resume() == [Continued(False, 2.5), PauseAnswer("running")]
    assert rank.resume() == [PauseAnswer("running")]
    assert not rank.desk.is_paused
    assert rank.turn() == []


def test_a_continue_before_the_boundary_leaves_everybody_running() -> None:
    rank = Rank(2)
    rank.pause("abort")
    rank.resume()
    assert rank.turn() == [PauseAnswer("running")]


def test_repeats_are_answered_each_and_do_nothing_twice() -> None:
    rank = Rank(2)
    rank.pause("retract")
    rank.pause("retract")
    assert rank.turn() == [RemoveRunning("retract"), *[PauseAnswer("paused", "", "retract", 0, 2)] * 2]
    rank.pause("retract")
    assert rank.turn() == [PauseAnswer("paused", "", "retract", 0, 2)]


def test_a_stronger_mode_is_obeyed_and_a_weaker_one_changes_nothing() -> None:
    rank = Rank(2)
    rank.pause("in_place")
    assert rank.turn() == [PauseAnswer("paused", "", "in_place", 0, 0, 2)]
    rank.pause("retract")
    assert rank.turn() == [RemoveRunning("retract"), PauseAnswer("paused", "", "retract", 0, 2)]
    rank.pause("in_place")
    assert rank.turn() == [PauseAnswer("paused", "", "retract", 0, 2)]


def test_the_watchdog_ends_a_pause_that_nobody_ends() -> None:
    rank = Rank(1)
    rank.pause("in_place", watchdog_s=10.0)
    (answer,) = rank.turn()
    assert isinstance(answer, PauseAnswer)
    assert answer.remaining_s == 10.0
    rank.now_s = 9.9
    assert rank.desk.handle(TimePassed(), rank.now_s) == []
    rank.now_s = rank.desk.wake_s
    assert rank.desk.handle(TimePassed(), rank.now_s) == [Continued(True, 10.0)]
    assert (rank.desk.is_paused, rank.desk.wake_s) == (False, math.inf)


def test_a_repeat_winds_the_watchdog_up_again() -> None:
    rank = Rank()
    rank.pause("retract", watchdog_s=10.0)
    rank.now_s = 8.0
    rank.pause("retract", watchdog_s=10.0)
    rank.now_s = 12.0
    assert rank.desk.handle(TimePassed(), rank.now_s) == []
    assert rank.desk.wake_s == 18.0


def test_a_rank_that_slept_through_its_pause_continues_and_says_so() -> None:
    rank = Rank(2)
    rank.pause("abort", watchdog_s=5.0)
    rank.now_s = 60.0
    assert rank.turn() == [Continued(True, 60.0), PauseAnswer("running")]


def test_late_commands_and_superseded_controllers_are_not_obeyed() -> None:
    rank = Rank(1)
    rank.now_s = 7.0
    (late,) = rank.desk.handle(PauseTold("abort", 1, valid_until_s=6.0), rank.now_s)
    assert isinstance(late, PauseAnswer)
    assert (late.status, rank.desk.is_paused) == ("expired_command", False)
    rank.pause("in_place", term=5)
    rank.turn()
    (refused,) = rank.resume(term=4)
    assert isinstance(refused, PauseAnswer)
    assert (refused.status, rank.desk.is_paused) == ("refused", True)
    (refused,) = rank.pause("abort", term=4)
    assert isinstance(refused, PauseAnswer)
    assert refused.mode == "in_place"
