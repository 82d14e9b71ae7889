"""Speed and standstill of an engine, from its snapshots."""

from __future__ import annotations

from actors.pace import Pace
from engine.snapshot import Counters, EngineSnapshot


def snapshot(step: int, num_tokens: int = 0, is_stepping: bool = True) -> EngineSnapshot:
    return EngineSnapshot(step=step, is_stepping=is_stepping, counters=Counters(num_generated_tokens=num_tokens))


def test_tokens_per_second_between_two_looks() -> None:
    pace = Pace(snapshot(0), 10.0)
    pace.note(snapshot(5, 50), 12.0)
    assert pace.tokens_per_s == 25.0
    pace.note(snapshot(9, 50), 13.0)
    assert pace.tokens_per_s == 0.0


def test_one_step_that_does_not_end_is_a_standstill() -> None:
    pace = Pace(snapshot(0, is_stepping=False), 0.0)
    pace.note(snapshot(1), 1.0)
    assert pace.stalled_s(snapshot(1), 1.5) == 0.5
    pace.note(snapshot(1), 2.0)
    pace.note(snapshot(1), 3.0)
    assert pace.stalled_s(snapshot(1), 3.5) == 2.5
    assert pace.stalled_s(snapshot(2), 3.5) == 0.0
    pace.note(snapshot(2), 4.0)
    assert pace.stalled_s(snapshot(2), 4.0) == 0.0


def test_an_idle_engine_stands_still_for_a_reason() -> None:
    pace = Pace(snapshot(7, is_stepping=False), 0.0)
    pace.note(snapshot(7, is_stepping=False), 100.0)
    assert pace.stalled_s(snapshot(7, is_stepping=False), 200.0) == 0.0
