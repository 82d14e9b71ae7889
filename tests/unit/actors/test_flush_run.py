"""What the verdicts of single ranks add up to."""

from __future__ import annotations

import pytest

from actors.flush_run import FlushRun
from engine.flush import TIMED_OUT_WAITING, Blockers, FlushVerdict
from tests.unit.actors.fakes import make_request, rank_record

ROW_KEYS = {
    "rank", "incarnation", "node", "status", "message", "epoch", "waited_ms", "freed_pages", "freed_bytes",
    "copies_in_flight", "blockers", "num_aborted", "num_retracted",
}  # fmt: skip
ANSWER_KEYS = {
    "flush_id", "success", "status", "message", "http_status", "epoch", "sub_epoch", "mode", "tiers", "dry_run",
    "floor_raised", "superseded_by", "replayed", "started_at", "took_ms", "ranks", "host_tiers", "untouched_tiers",
}  # fmt: skip


def _run(*ranks: int, mode: str = "wait") -> FlushRun:
    run = FlushRun(make_request(mode=mode), "then", 10.0)
    run.epoch, run.takes_epoch = 5, True
    for rank in ranks:
        run.expect(rank_record(rank))
    return run


def _say(run: FlushRun, rank: int, status: str, message: str = "", **facts: object) -> None:
    run.answered(f"incarnation-{rank}", FlushVerdict("f", status, message, **facts))  # type: ignore[arg-type]


def test_every_rank_flushed_is_success() -> None:
    run = _run(1, 0)
    assert not run.is_settled
    _say(run, 0, "flushed", freed_pages=4, blockers=Blockers(running=1))
    assert run.waiting_for == ["incarnation-1"]
    _say(run, 1, "flushed")
    assert run.is_settled
    answer = run.close(10.25, ["host"])
    assert set(answer) == ANSWER_KEYS
    assert answer["success"]
    assert (answer["status"], answer["http_status"], answer["epoch"]) == ("flushed", 200, 5)
    assert answer["floor_raised"]
    assert answer["took_ms"] == 250
    assert answer["untouched_tiers"] == ["host"]
    assert [row["rank"] for row in answer["ranks"]] == [0, 1]
    assert all(set(row) == ROW_KEYS for row in answer["ranks"])
    assert answer["ranks"][0]["blockers"] == {"running": 1, "half_prefilled": 0, "copies_in_flight": 0}


@pytest.mark.parametrize(
    ("status", "http_status"),
    [
        ("timed_out", 504), ("expired_command", 504), ("refused", 409), ("busy", 409), ("superseded", 409),
        ("unreachable", 503), ("fenced", 503),
    ],
)  # fmt: skip
def test_one_rank_that_did_not_flush_is_no_success(status: str, http_status: int) -> None:
    run = _run(0, 1)
    _say(run, 0, "flushed")
    _say(run, 1, status, "why")
    answer = run.close(11.0, [])
    assert not answer["success"]
    assert not answer["floor_raised"]
    assert (answer["status"], answer["http_status"]) == (status, http_status)
    assert answer["message"] == "1 of 2 ranks not flushed: rank 1: why"


def test_silence_is_unreachable_and_outweighs_a_timeout() -> None:
    run = _run(0, 1, 2)
    _say(run, 0, "timed_out", TIMED_OUT_WAITING)
    run.failed("incarnation-1", "Ray cannot reach the actor", is_final=False)
    assert run.waiting_for == ["incarnation-1", "incarnation-2"]
    answer = run.close(11.0, [])
    assert answer["status"] == "unreachable"
    assert [row["status"] for row in answer["ranks"]] == ["timed_out", "unreachable", "unreachable"]
    assert answer["ranks"][1]["message"] == "Ray cannot reach the actor"
    assert answer["ranks"][2]["message"] == "no answer by the deadline"


def test_the_ranks_own_words_when_all_say_the_same() -> None:
    run = _run(0, 1)
    for rank in (0, 1):
        _say(run, rank, "timed_out", TIMED_OUT_WAITING)
    assert run.close(11.0, [])["message"] == TIMED_OUT_WAITING


def test_no_rank_is_no_success() -> None:
    answer = _run().close(11.0, [])
    assert (answer["success"], answer["status"], answer["http_status"]) == (False, "no_ranks", 503)


def test_gone_counts_only_beside_a_living_rank() -> None:
    run = _run(0)
    run.gone("incarnation-0")
    assert run.is_settled
    alone = run.close(11.0, [])
    assert (alone["success"], alone["status"]) == (False, "no_ranks")
    assert alone["ranks"][0]["status"] == "gone"
    run = _run(0, 1)
    run.gone("incarnation-0")
    _say(run, 1, "flushed")
    assert run.close(11.0, [])["success"]


def test_a_rank_that_flushed_and_then_died_does_not_live() -> None:
    run = _run(0)
    _say(run, 0, "flushed")
    run.gone("incarnation-0")
    answer = run.close(11.0, [])
    assert answer["ranks"][0]["status"] == "flushed"
    assert answer["status"] == "no_ranks"


def test_a_proof_outweighs_a_failed_call() -> None:
    run = _run(0, 1)
    run.failed("incarnation-0", "Ray reports that the actor has died", is_final=True)
    run.gone("incarnation-0")
    _say(run, 1, "flushed")
    answer = run.close(11.0, [])
    assert answer["success"]
    assert answer["ranks"][0]["status"] == "gone"


def test_who_joins_empty_holds_nothing_old() -> None:
    run = _run(0)
    _say(run, 0, "flushed")
    run.joined(rank_record(1))
    answer = run.close(11.0, [])
    assert answer["success"]
    assert [row["status"] for row in answer["ranks"]] == ["flushed", "joined"]


def test_who_joined_alone_lives() -> None:
    run = _run(0)
    run.gone("incarnation-0")
    run.joined(rank_record(1))
    assert run.close(11.0, [])["success"]


def test_a_fence_is_enough_only_in_mode_fence() -> None:
    for mode, success in (("fence", True), ("retract", False)):
        run = _run(0, mode=mode)
        _say(run, 0, "fenced")
        assert run.close(11.0, [])["success"] is success


def test_the_answer_is_fixed_and_what_comes_later_is_kept_apart() -> None:
    run = _run(0)
    answer = run.close(11.0, [])
    _say(run, 0, "flushed", freed_pages=9)
    run.gone("incarnation-0")
    run.expect(rank_record(1))
    assert not run.has("incarnation-1")
    assert answer["ranks"][0]["status"] == "unreachable"
    assert [(row["rank"], row["status"], row["freed_pages"]) for row in run.late] == [(0, "flushed", 9)]


def test_one_verdict_per_incarnation() -> None:
    run = _run(0)
    _say(run, 0, "timed_out")
    _say(run, 0, "flushed")
    run.answered("stranger", FlushVerdict("f", "flushed"))
    assert [row["status"] for row in run.close(11.0, [])["ranks"]] == ["timed_out"]
