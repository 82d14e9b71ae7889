"""One pending flush, one end, one verdict per flush id, from any thread."""

from __future__ import annotations

import math
import threading

import pytest

from engine.flush import ALREADY_IN_PROGRESS, TIMED_OUT_WAITING, Blockers, FlushMode, FlushScope, FlushVerdict
from engine.flush_gate import NOW_GRACE_S, NUM_REMEMBERED_VERDICTS, FlushGate, PendingFlush
from engine.snapshot import EngineSnapshot
from tests.fakes import flush_command

IDLE = EngineSnapshot(epoch=7)
BUSY = EngineSnapshot(epoch=7, blockers=Blockers(running=2, half_prefilled=1))


def take_in(gate: FlushGate, flush_id: str = "f", mode: FlushMode = "wait", now_s: float = 10.0) -> PendingFlush:
    offered = gate.offer(flush_command(flush_id, mode), now_s, BUSY)
    assert isinstance(offered, PendingFlush)
    return offered


def finish(gate: FlushGate, pending: PendingFlush) -> FlushVerdict:
    """As the engine does it."""
    assert pending.claim.try_claim()
    verdict = pending.verdict("flushed", 10.5, 8, freed_pages=3)
    gate.end(pending, verdict)
    return verdict


def refusal(offered: PendingFlush | FlushVerdict) -> FlushVerdict:
    assert isinstance(offered, FlushVerdict)
    return offered


def test_first_offer_is_taken_in_with_a_deadline_of_this_clock() -> None:
    gate = FlushGate()
    pending = take_in(gate)
    assert (pending.arrived_s, pending.deadline_s) == (10.0, 11.0)
    assert gate.pending is pending


def test_second_offer_is_busy_and_stays_so() -> None:
    gate = FlushGate()
    first = take_in(gate)
    second = refusal(gate.offer(flush_command("g"), 10.1, BUSY))
    assert (second.status, second.message, second.epoch) == ("busy", ALREADY_IN_PROGRESS, 7)
    finish(gate, first)
    assert gate.offer(flush_command("g"), 10.6, IDLE) == second


def test_an_ended_flush_frees_the_slot_and_is_remembered() -> None:
    gate = FlushGate()
    pending = take_in(gate)
    verdict = finish(gate, pending)
    assert gate.pending is None
    assert pending.ended.result(0) == verdict
    assert verdict.waited_ms == pytest.approx(500)
    assert gate.verdict_of(("f", 0)) == verdict
    assert gate.offer(flush_command("f"), 12.0, IDLE) is verdict
    assert take_in(gate, "next", now_s=12.0).command.flush_id == "next"


def test_a_repeat_joins_the_open_flush_whatever_is_left_of_its_budget() -> None:
    gate = FlushGate()
    pending = take_in(gate)
    assert gate.offer(flush_command("f", budget_s=0.2, timeout_s=1.0, term=2), 10.8, BUSY) is pending
    assert pending.claim.try_claim(), "joining must not touch the claim"
    assert gate.offer(flush_command("f", term=2), 10.9, BUSY) is pending, "claimed, verdict not written yet"


@pytest.mark.parametrize(
    "other", [flush_command("f", "fence"), flush_command("f", epoch=2), flush_command("f", dry_run=True)]
)
def test_the_id_of_another_flush_is_refused_and_the_first_one_kept(other) -> None:
    gate = FlushGate()
    pending = take_in(gate)
    assert "other arguments" in refusal(gate.offer(other, 10.1, BUSY)).message
    verdict = finish(gate, pending)
    assert refusal(gate.offer(other, 11.0, IDLE)).status == "refused"
    assert gate.verdict_of(("f", 0)) == verdict


def test_the_same_id_of_another_intent_is_another_flush() -> None:
    """The controller frees an id after an hour; what this rank remembers of the first must not answer the second."""
    gate = FlushGate()
    first = finish(gate, take_in(gate))
    again = gate.offer(flush_command("f", "fence", epoch=9, index=9), 4000.0, IDLE)
    assert isinstance(again, PendingFlush)
    assert gate.withdraw(("f", 0), 4000.0, IDLE) == first
    second = finish(gate, again)
    assert (gate.verdict_of(("f", 0)), gate.verdict_of(("f", 9))) == (first, second)


def test_a_repeat_from_a_lower_term_is_told_what_happened() -> None:
    gate = FlushGate()
    pending = take_in(gate)
    gate.see_term(5)
    assert gate.offer(pending.command, 10.1, BUSY) is pending
    verdict = finish(gate, pending)
    assert gate.offer(pending.command, 10.6, IDLE) == verdict


def test_lower_terms_are_refused_but_the_flush_may_still_be_finished_by_the_new_controller() -> None:
    gate = FlushGate()
    gate.see_term(5)
    late = refusal(gate.offer(flush_command(term=4), 10.0, IDLE))
    assert (late.status, "term 5" in late.message) == ("refused", True)
    assert gate.verdict_of(("f", 0)) is None
    assert isinstance(gate.offer(flush_command(term=5), 10.1, IDLE), PendingFlush)
    assert refusal(gate.offer(flush_command("g", term=4), 10.2, IDLE)).status == "refused"


@pytest.mark.parametrize("budget_s", [math.nan, math.inf, -math.inf, -0.1])
def test_budgets_that_are_no_time_are_refused(budget_s: float) -> None:
    offered = FlushGate().offer(flush_command(budget_s=budget_s, timeout_s=1.0), 10.0, IDLE)
    assert "budget_s" in refusal(offered).message


def test_a_command_past_its_end_in_this_clock_is_never_taken_in() -> None:
    gate = FlushGate()
    late = refusal(gate.offer(flush_command(mode="fence"), 10.0, IDLE, valid_until_s=9.99))
    assert late.status == "expired_command"
    assert gate.offer(flush_command(mode="fence"), 10.0, IDLE) == late, "one verdict per flush id"
    assert gate.pending is None


def test_the_command_ends_with_what_comes_first() -> None:
    pending = FlushGate().offer(flush_command(), 10.0, IDLE, valid_until_s=10.4)
    assert isinstance(pending, PendingFlush)
    assert pending.deadline_s == 10.4


@pytest.mark.parametrize("mode", ["fence", "retract", "abort"])
def test_a_pending_wait_gives_way(mode: FlushMode) -> None:
    ended: list[tuple[str, str]] = []
    gate = FlushGate(lambda pending, verdict: ended.append((verdict.flush_id, verdict.status)))
    wait = take_in(gate, "w")
    newcomer = take_in(gate, "n", mode)
    assert gate.pending is newcomer
    verdict = wait.ended.result(0)
    assert verdict.status == "superseded"
    assert "flush n" in verdict.message
    assert ended == [("w", "superseded")]
    assert not wait.claim.try_claim()


@pytest.mark.parametrize(
    ("pending_mode", "newcomer"),
    [
        ("drain", flush_command("n", "fence")),
        ("fence", flush_command("n", "fence")),
        ("wait", flush_command("n", "drain")),
        ("wait", flush_command("n", "fence", dry_run=True)),
        ("wait", flush_command("n", "fence", scope=FlushScope(namespace="a"))),
        ("wait", flush_command("n", "fence", tiers=("host",))),
    ],
)
def test_between_equals_and_for_less_the_second_is_refused(pending_mode: FlushMode, newcomer) -> None:
    gate = FlushGate()
    pending = take_in(gate, "p", pending_mode)
    assert refusal(gate.offer(newcomer, 10.1, BUSY)).status == "busy"
    assert gate.pending is pending


def test_a_flush_that_is_being_carried_out_does_not_block_the_next() -> None:
    gate = FlushGate()
    first = take_in(gate, "w")
    assert first.claim.try_claim()
    second = take_in(gate, "n", "fence")
    gate.end(first, first.verdict("flushed", 10.2, 8))
    assert gate.pending is second


def test_expiry_names_the_blockers_and_the_engine_can_no_longer_claim() -> None:
    gate = FlushGate()
    pending = take_in(gate)
    verdict = gate.expire(pending, 11.0, BUSY)
    assert verdict is not None
    assert (verdict.status, verdict.message, verdict.blockers) == ("timed_out", TIMED_OUT_WAITING, BUSY.blockers)
    assert verdict.waited_ms == pytest.approx(1000)
    assert not pending.claim.try_claim()
    assert pending.ended.result(0) == verdict


def test_expiry_loses_against_a_claim() -> None:
    gate = FlushGate()
    pending = take_in(gate)
    assert pending.claim.try_claim()
    assert gate.expire(pending, 11.0, BUSY) is None
    assert gate.withdraw(("f", 0), 11.0, BUSY) is pending
    assert not pending.ended.done()


def test_timeout_zero_has_a_moment_to_reach_a_sleeping_engine() -> None:
    pending = FlushGate().offer(flush_command(budget_s=0.0), 10.0, IDLE)
    assert isinstance(pending, PendingFlush)
    assert pending.deadline_s == 10.0 + NOW_GRACE_S


@pytest.mark.parametrize("mode", ["wait", "drain"])
def test_a_timeout_below_the_grace_is_no_shorter_than_zero_on_an_idle_engine(mode: FlushMode) -> None:
    pending = FlushGate().offer(flush_command(mode=mode, budget_s=0.0, timeout_s=1e-9), 10.0, IDLE)
    assert isinstance(pending, PendingFlush)
    assert pending.deadline_s == 10.0 + NOW_GRACE_S


def test_a_short_timeout_is_kept_by_a_busy_engine() -> None:
    pending = FlushGate().offer(flush_command(budget_s=0.003), 10.0, BUSY)
    assert isinstance(pending, PendingFlush)
    assert pending.deadline_s == 10.003


def test_timeout_zero_ends_refused_when_the_engine_does_not_wake_up() -> None:
    gate = FlushGate()
    pending = gate.offer(flush_command(budget_s=0.0), 10.0, IDLE)
    assert isinstance(pending, PendingFlush)
    verdict = gate.expire(pending, 10.0 + NOW_GRACE_S, IDLE)
    assert verdict is not None
    assert (verdict.status, verdict.message) == ("refused", "The engine did not look at it in time.")


@pytest.mark.parametrize("mode", ["wait", "drain"])
def test_timeout_zero_is_refused_by_a_busy_engine(mode: FlushMode) -> None:
    gate = FlushGate()
    pending = gate.offer(flush_command(mode=mode, budget_s=0.0), 10.0, IDLE)
    assert isinstance(pending, PendingFlush)
    assert gate.refuse_if_busy(pending, 10.0, IDLE) is None
    verdict = gate.refuse_if_busy(pending, 10.0, BUSY)
    assert verdict is not None
    assert (verdict.status, verdict.message) == ("refused", "Not idle: 2 running, 1 half-prefilled.")


def test_copies_alone_make_no_engine_busy() -> None:
    gate = FlushGate()
    pending = gate.offer(flush_command(budget_s=0.0), 10.0, IDLE)
    assert isinstance(pending, PendingFlush)
    assert gate.refuse_if_busy(pending, 10.0, EngineSnapshot(blockers=Blockers(copies_in_flight=3))) is None


def test_who_can_wait_is_not_refused() -> None:
    gate = FlushGate()
    assert gate.refuse_if_busy(take_in(gate), 10.0, BUSY) is None
    step_mode = gate.offer(flush_command("n", "fence", budget_s=5.0, timeout_s=0.0), 10.0, BUSY)
    assert isinstance(step_mode, PendingFlush)
    assert gate.refuse_if_busy(step_mode, 10.0, BUSY) is None


def test_withdrawing_ends_only_the_flush_of_that_id() -> None:
    gate = FlushGate()
    pending = take_in(gate)
    other = refusal(gate.withdraw(("other", 0), 10.2, BUSY))
    assert other.status == "refused"
    assert gate.pending is pending
    verdict = refusal(gate.withdraw(("f", 0), 10.2, BUSY))
    assert (verdict.status, pending.ended.result(0)) == ("refused", verdict)
    assert gate.withdraw(("f", 0), 10.3, IDLE) == verdict


def test_what_was_withdrawn_before_it_came_is_never_begun() -> None:
    gate = FlushGate()
    verdict = gate.withdraw(("f", 3), 10.0, IDLE)
    assert gate.offer(flush_command("f", index=3), 10.1, IDLE) == verdict
    assert gate.pending is None
    assert isinstance(gate.offer(flush_command("f", index=4), 10.2, IDLE), PendingFlush)


def test_an_engine_that_has_not_served_has_nothing_to_flush() -> None:
    gate = FlushGate()
    pending = take_in(gate)
    verdict = gate.end_unstarted(pending, 10.0)
    assert verdict is not None
    assert (verdict.status, verdict.epoch, pending.ended.result(0)) == ("flushed", pending.command.epoch, verdict)
    assert gate.end_unstarted(pending, 10.1) is None
    assert gate.offer(pending.command, 10.2, IDLE) == verdict


def test_a_caller_that_hangs_up_does_not_cancel() -> None:
    gate = FlushGate()
    pending = take_in(gate)
    assert not pending.ended.cancel()
    assert finish(gate, pending) == pending.ended.result(0)


def test_a_closed_gate_ends_what_is_pending_and_refuses_what_comes() -> None:
    gate = FlushGate()
    pending = take_in(gate)
    gate.close("The engine has stopped.", 10.3, IDLE)
    assert pending.ended.result(0).status == "refused"
    assert refusal(gate.offer(flush_command("g"), 10.4, IDLE)).message == "The engine has stopped."


def test_the_memory_of_verdicts_is_bounded() -> None:
    gate = FlushGate()
    for number in range(NUM_REMEMBERED_VERDICTS + 1):
        finish(gate, take_in(gate, f"f{number}"))
    assert gate.verdict_of(("f0", 0)) is None
    assert gate.verdict_of(("f1", 0)) is not None


def test_threads_that_race_for_the_end_leave_exactly_one_verdict() -> None:
    """protocol.md, hole H8: the loop sees the deadline while the engine sees an idle instant."""
    for round_number in range(200):
        ended: list[str] = []
        gate = FlushGate(lambda pending, verdict, ended=ended: ended.append(verdict.status))
        pending = take_in(gate, f"f{round_number}")
        start = threading.Barrier(2)

        def expire(gate=gate, pending=pending, start=start) -> None:
            start.wait()
            gate.expire(pending, 11.0, BUSY)

        loop = threading.Thread(target=expire)
        loop.start()
        start.wait()
        if pending.claim.try_claim():
            gate.end(pending, pending.verdict("flushed", 11.0, 8))
        loop.join()
        assert len(ended) == 1
        assert pending.ended.result(0).status == ended[0]
