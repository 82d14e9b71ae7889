"""A log that stays short: checkpoints, removal behind them, and controllers that slept meanwhile."""

from __future__ import annotations

import pytest

from actors.control_log import KEEP_S, ControlLog, Superseded
from actors.log_records import Checkpoint, FlushIntent, FlushOutcome, LogState, RankJoined, RankLeft
from actors.log_stores import MemoryStore
from configs.errors import ConfigError
from tests.unit.actors.fakes import SetClock, make_request, rank_record


def _take_over(store: MemoryStore, clock: SetClock) -> tuple[ControlLog, LogState]:
    log = ControlLog(store, clock)
    return log, log.take_over("actor", "cluster", 5.0).state


def _fill(log: ControlLog, state: LogState, number: int) -> None:
    for count in range(number):
        written = log.append(RankLeft(f"nobody-{count}"))
        state.apply(written.index, written.entry)


def test_a_checkpoint_says_what_the_records_before_it_said() -> None:
    store, clock = MemoryStore(), SetClock()
    log, state = _take_over(store, clock)
    ended = make_request("ended", mode="fence", scope={"namespace": "a"})
    for record in (
        RankJoined(rank_record(0, tcp_key="key")),
        FlushIntent(ended, False, ("incarnation-0",), "then"),
        FlushOutcome(3, 0, {"success": True, "status": "flushed", "ranks": [{"status": "flushed"}]}),
        FlushIntent(make_request("open", mode="fence"), True, ("incarnation-0",), "then"),
        RankJoined(rank_record(1)),
        RankLeft("incarnation-0"),
    ):
        written = log.append(record)
        state.apply(written.index, written.entry)
    index = log.append(Checkpoint(state.copy())).index
    log.remove_below(index)
    assert store.indices() == [index]
    again = ControlLog(store, clock).take_over("other", "cluster")
    assert again.checkpoint == index
    assert again.num_records == 1
    found = again.state
    assert (found.term, found.num_restarts, found.actor_id) == (index + 1, 0, "other")
    assert found.members == state.members
    assert found.past == state.past == {"incarnation-0": rank_record(0, tcp_key="key")}
    assert found.open_flushes == state.open_flushes
    assert found.ended["ended"].answer["status"] == "flushed"
    assert (found.lineage, found.epoch, found.floor) == (state.lineage, 5, 5)
    assert found.longest_lease_s == 5.0
    assert found.sub_epochs == []


def test_a_copy_does_not_change_with_the_state() -> None:
    log, state = _take_over(MemoryStore(), SetClock())
    copy = state.copy()
    written = log.append(RankJoined(rank_record(0)))
    state.apply(written.index, written.entry)
    assert copy.members == {}
    assert copy.joined_at == {}


def test_a_log_without_its_beginning_and_without_a_checkpoint_is_refused() -> None:
    store, clock = MemoryStore(), SetClock()
    log, state = _take_over(store, clock)
    _fill(log, state, 3)
    store.remove(1)
    with pytest.raises(ConfigError, match="begins with record 2"):
        _take_over(store, clock)


def test_the_front_may_move_while_the_log_is_read() -> None:
    class Moving(MemoryStore):
        """Another controller removes the front between the listing and the reading, once."""

        others: ControlLog | None = None

        def read(self, index: int) -> bytes | None:
            others, self.others = self.others, None
            if others is not None:
                others.remove_below(4)
            return super().read(index)

    store, clock = Moving(), SetClock()
    log, state = _take_over(store, clock)
    _fill(log, state, 2)
    log.append(Checkpoint(state.copy()))
    _fill(log, state, 1)
    store.others = log
    _, found = _take_over(store, clock)
    assert found.term == 6
    assert found.lineage == state.lineage


@pytest.mark.parametrize("slept_s", [0.0, KEEP_S / 2 - 1, KEEP_S + 1])
def test_a_controller_that_slept_learns_that_it_is_superseded_whatever_was_removed(slept_s: float) -> None:
    store, clock = MemoryStore(), SetClock()
    sleeper, _ = _take_over(store, clock)
    log, state = _take_over(store, clock)
    _fill(log, state, 5)
    index = log.append(Checkpoint(state.copy())).index
    clock.time_s += slept_s
    if slept_s > KEEP_S:
        log.check()
        log.remove_below(index)
        assert 2 not in store.indices(), "the index at which the sleeper writes next is free again"
    with pytest.raises(Superseded):
        sleeper.check()
    with pytest.raises(Superseded):
        sleeper.append(RankLeft("from the past"))
    # whatever it left behind, the log is read as if it had not
    _, found = _take_over(store, clock)
    assert found.lineage == state.lineage
    assert found.term == index + 1


def test_a_controller_that_looked_in_time_writes_on() -> None:
    store, clock = MemoryStore(), SetClock()
    log, state = _take_over(store, clock)
    for _ in range(10):
        clock.time_s += KEEP_S / 3
        log.check()
    clock.time_s += KEEP_S
    # it has not looked for long, but its own last record is still there
    _fill(log, state, 1)
    log.check()


def test_a_check_sees_another_controller() -> None:
    store, clock = MemoryStore(), SetClock()
    log, _ = _take_over(store, clock)
    log.check()
    _take_over(store, clock)
    with pytest.raises(Superseded) as caught:
        log.check()
    assert caught.value.index == 2
