"""No door can turn anything less than a whole flush into a success."""

from __future__ import annotations

from typing import Any, get_args

from hypothesis import given
from hypothesis import strategies as st

from actors.flush_run import FlushRun
from deployments.flush_surfaces import FAILED_TEXT, FLUSHED_TEXT, judge
from engine.flush import FLUSH_MODES, GOOD_VERDICTS, FlushMode, FlushVerdict, Verdict
from tests.unit.actors.fakes import make_request, rank_record

statuses = st.one_of(
    st.sampled_from(["flushed", "flushed", "joined", "gone", "expired", "fenced"]),
    st.sampled_from(["timed_out", "refused", "busy", "expired_command", "superseded", "unreachable", "", "ok"]),
    st.none(),
)
rows = st.lists(st.fixed_dictionaries({"status": statuses}), max_size=5)
answers = st.fixed_dictionaries(
    {"success": st.sampled_from([True, True, True, False, None, 1, "true"]), "mode": st.sampled_from(FLUSH_MODES)},
    optional={
        "ranks": rows,
        "host_tiers": rows,
        "message": st.one_of(st.text(max_size=8), st.none()),
        "http_status": st.one_of(
            st.sampled_from([200, 204, 206, 302, 400, 409, 503, 504]), st.none(), st.text(max_size=3)
        ),
    },
)


@given(answers)
def test_a_2xx_means_that_every_row_is_good_and_somebody_lives(answer: dict[str, Any]) -> None:
    outcome = judge(answer)
    is_2xx = 200 <= outcome.http_status < 300
    assert is_2xx == (200 <= outcome.native_status < 300) == outcome.success
    if is_2xx:
        ranks = [row["status"] for row in answer["ranks"]]
        tiers = [row["status"] for row in answer.get("host_tiers", [])]
        assert answer["success"] is True
        assert {*ranks, *tiers} <= GOOD_VERDICTS
        assert "fenced" not in {*ranks, *tiers} or answer["mode"] == "fence"
        assert {"flushed", "fenced", "joined"} & set(ranks)
        assert outcome.native_text == FLUSHED_TEXT
    else:
        assert outcome.native_status == 400
        assert 400 <= outcome.http_status < 600
        assert outcome.message
        assert outcome.native_text


@given(st.lists(st.sampled_from(get_args(Verdict)), min_size=1, max_size=4), st.sampled_from(FLUSH_MODES))
def test_the_doors_and_the_controller_agree(verdicts: list[Verdict], mode: FlushMode) -> None:
    run = FlushRun(make_request(mode=mode), "then", 0.0)
    for rank, verdict in enumerate(verdicts):
        run.expect(rank_record(rank))
        run.answered(f"incarnation-{rank}", FlushVerdict("f", verdict))
    answer = run.close(1.0, [])
    assert judge(answer).success is answer["success"]
    assert judge(answer).http_status == answer["http_status"]
    # the doors see a failing row even where the controller's own word is wrong
    assert judge(answer | {"success": True}).success is answer["success"]


def test_a_whole_flush_is_a_success() -> None:
    answer = {"success": True, "mode": "wait", "ranks": [{"status": "flushed"}, {"status": "gone"}], "host_tiers": []}
    assert judge(answer).http_status == 200


def test_a_failure_without_a_reason_says_what_sglang_says() -> None:
    assert judge({"success": False, "http_status": 504}).native_text == FAILED_TEXT
