"""Arguments of a flush: every door refuses the same, and names the field."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.flush_request import FlushLimits, parse_flush, refusal
from configs.errors import InvalidField
from engine.flush import FLUSH_MODES, FlushScope

LIMITS = FlushLimits(max_timeout_s=3600.0, step_grace_s=5.0, tiers=("device", "host"))


def parse(**arguments: object):
    return parse_flush(arguments, LIMITS, make_id=lambda: "drawn")


def test_defaults_are_now_or_refuse_over_all_tiers() -> None:
    request = parse()
    assert (request.flush_id, request.mode, request.timeout_s) == ("drawn", "wait", 0.0)
    assert request.tiers == ("device", "host")
    assert request.takes_epoch(LIMITS)


@pytest.mark.parametrize(
    "timeout",
    [
        math.nan,
        math.inf,
        -math.inf,
        -0.001,
        3600.1,
        10**400,
        pytest.param(-(10**5000), id="huge"),
        "5",
        "nan",
        True,
        False,
        [1],
        {},
        b"1",
        1j,
    ],
)
def test_senseless_timeouts_name_the_field(timeout: object) -> None:
    with pytest.raises(InvalidField) as caught:
        parse(timeout_s=timeout)
    assert caught.value.param == "timeout_s"
    assert "timeout_s" in caught.value.message
    assert len(caught.value.message) < 300


@given(st.floats(0, 3600) | st.integers(0, 3600))
def test_every_finite_timeout_in_range_is_taken_as_it_is(timeout: float) -> None:
    assert parse(timeout_s=timeout).timeout_s == timeout


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"mode": "now"}, "mode"),
        ({"mode": 1}, "mode"),
        ({"tiers": "device"}, "tiers"),
        ({"tiers": []}, "tiers"),
        ({"tiers": ["device", "tape"]}, "tiers"),
        ({"tiers": [["device"]]}, "tiers"),
        ({"scope": "tenant"}, "scope"),
        ({"scope": {}}, "scope"),
        ({"scope": {"namespace": "a", "adapter": "b"}}, "scope"),
        ({"scope": {"shape": "a"}}, "scope.shape"),
        ({"scope": {"adapter": "a"}}, "scope.adapter"),
        ({"scope": {"namespace": ""}}, "scope.namespace"),
        ({"scope": {"namespace": "a\nb"}}, "scope.namespace"),
        ({"scope": {"older_than_s": math.inf}}, "scope.older_than_s"),
        ({"scope": {"older_than_s": True}}, "scope.older_than_s"),
        ({"scope": {"prefix_tokens": []}}, "scope.prefix_tokens"),
        ({"scope": {"prefix_tokens": [1, -1]}}, "scope.prefix_tokens"),
        ({"scope": {"prefix_tokens": [1, 2**31]}}, "scope.prefix_tokens"),
        ({"scope": {"prefix_tokens": [1, True]}}, "scope.prefix_tokens"),
        ({"scope": {"prefix_tokens": "12"}}, "scope.prefix_tokens"),
        ({"flush_id": ""}, "flush_id"),
        ({"flush_id": "a b"}, "flush_id"),
        ({"flush_id": "-a"}, "flush_id"),
        ({"flush_id": "a" * 129}, "flush_id"),
        ({"flush_id": 7}, "flush_id"),
        ({"dry_run": 1}, "dry_run"),
        ({"caller": "x" * 300}, "caller"),
        ({"timeout": 3}, "timeout"),
    ],
)
def test_every_other_field_has_its_range(arguments: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidField) as caught:
        parse(**arguments)
    assert caught.value.param == param


def test_scopes_become_one_value() -> None:
    assert parse(scope={"namespace": "tenant-a"}).scope == FlushScope(namespace="tenant-a")
    assert parse(scope={"older_than_s": 60}).scope == FlushScope(older_than_s=60.0)
    assert parse(scope={"prefix_tokens": [1, 256]}).scope == FlushScope(prefix_tokens=b"\1\0\0\0\0\1\0\0")


def test_tiers_come_in_the_configured_order_without_repeats() -> None:
    assert parse(tiers=["host", "device", "host"]).tiers == ("device", "host")


def test_only_a_flush_of_everything_takes_an_epoch() -> None:
    assert not parse(tiers=["device"]).takes_epoch(LIMITS)
    assert not parse(scope={"namespace": "a"}).takes_epoch(LIMITS)
    assert not parse(dry_run=True).takes_epoch(LIMITS)


@pytest.mark.parametrize("mode", FLUSH_MODES)
def test_modes_that_need_a_step_get_the_grace_and_the_others_their_timeout(mode: str) -> None:
    budget_s = parse(mode=mode, timeout_s=1).budget_s(LIMITS.step_grace_s)
    assert budget_s == (1.0 if mode in ("wait", "drain") else 5.0)
    assert parse(mode=mode, timeout_s=9).budget_s(LIMITS.step_grace_s) == 9.0


def test_the_caller_is_no_argument() -> None:
    assert parse(caller="a").has_arguments_of(parse(caller="b"))
    assert not parse(timeout_s=1).has_arguments_of(parse(timeout_s=2))


def test_a_refusal_is_plain_data() -> None:
    assert refusal(InvalidField("no", "mode")) == {
        "success": False, "status": "invalid", "message": "no", "http_status": 400, "param": "mode",
    }  # fmt: skip


def test_no_prefix_is_longer_than_the_context() -> None:
    limits = replace(LIMITS, max_len=8)
    assert parse_flush({"scope": {"prefix_tokens": [1] * 8}}, limits, lambda: "drawn").scope is not None
    with pytest.raises(InvalidField, match="9 tokens, more than the context of the model, 8") as caught:
        parse_flush({"scope": {"prefix_tokens": [1] * 9}}, limits, lambda: "drawn")
    assert caught.value.param == "scope.prefix_tokens"


def test_of_a_long_prefix_no_more_is_kept_than_the_longest_page_has() -> None:
    scope = parse(scope={"prefix_tokens": list(range(32768))}).scope
    assert scope is not None
    assert scope.prefix_tokens == struct.pack("<1024i", *range(1024))
