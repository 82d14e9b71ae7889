"""What may be asked of a weight update, and what the log keeps of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from actors.weight_records import WeightDecision, WeightIntent, WeightLogState, WeightOutcome, WeightRecord
from actors.weight_request import WeightRequest, parse_update
from configs.errors import InvalidField


def request(**arguments: object) -> WeightRequest:
    return parse_update({"update_id": "u"} | arguments, 600.0, lambda: "drawn")


def test_defaults() -> None:
    plain = parse_update({}, 600.0, lambda: "drawn")
    assert (plain.update_id, plain.kind, plain.location, plain.in_flight) == ("drawn", "tensors", "", "retract")
    assert (plain.flush_cache, plain.is_partial, plain.cast, plain.in_place) == (True, False, "lossless", False)
    assert (plain.version, plain.exclude, plain.timeout_s, plain.caller) == (None, (), 60.0, "job")
    assert parse_update({}, 5.0, lambda: "drawn").timeout_s == 5.0


def test_exclusions_by_number_or_incarnation() -> None:
    assert request(exclude=[1, "1", "inc-7", 1]).exclude == ("1", "inc-7")


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("colour", "red"), ("kind", "network"), ("kind", 7), ("location", "somewhere"), ("in_flight", "fence"),
        ("flush_cache", 1), ("version", ""), ("cast", "round"), ("exclude", "1"), ("exclude", [-1]),
        ("exclude", [True]),
        ("timeout_s", 0), ("timeout_s", float("nan")), ("timeout_s", 601), ("timeout_s", True), ("update_id", "a\nb"),
    ],
)  # fmt: skip
def test_bad_arguments_name_their_field(param: str, value: object) -> None:
    with pytest.raises(InvalidField) as caught:
        request(**{param: value})
    assert caught.value.param == param


@pytest.mark.parametrize("location", [None, "", 7, "a\nb", "x" * 5000])
def test_a_directory_has_a_path(location: object) -> None:
    with pytest.raises(InvalidField, match="location must be a directory"):
        request(kind="disk", location=location)
    assert request(kind="disk", location="/models/v2").location == "/models/v2"


def test_the_same_id_with_other_arguments() -> None:
    assert request(version="v1").has_arguments_of(request(update_id="another", version="v1", caller="me"))
    assert not request(version="v1").has_arguments_of(request(version="v2"))


# ------------------------------------------------------------------------------------------------------------ the log
def fold(*records: tuple[int, WeightRecord]) -> WeightLogState:
    state = WeightLogState()
    for index, record in records:
        state.apply(index, record)
    return state


def intent_of(**arguments: object) -> WeightIntent:
    return WeightIntent(request(**arguments), ("a",), (), "then")


ANSWER: dict[str, Any] = {"success": True}


def test_an_intent_alone_changes_nothing() -> None:
    state = fold((5, intent_of()))
    assert (state.record, state.digest, list(state.open), state.decided) == (0, "", [5], {})


def test_the_decision_is_the_update() -> None:
    state = WeightLogState()
    assert state.apply(5, intent_of()) == 0
    assert state.apply(8, WeightDecision(5, "new", "v1", True)) == 5
    assert (state.record, state.digest, state.version, list(state.decided)) == (5, "new", "v1", [5])
    state.apply(9, WeightOutcome(5, ANSWER))
    assert (state.record, state.open, state.decided, state.ended["u"].answer) == (5, {}, {}, ANSWER)


def test_without_a_flush_no_floor_rises() -> None:
    state = fold((5, intent_of(flush_cache=False)))
    assert state.apply(6, WeightDecision(5, "new", "v1", False)) == 0


def test_what_a_new_rank_must_load() -> None:
    parts = [
        (1, intent_of(update_id="p0", is_partial=True)),
        (2, WeightDecision(1, "a", "", True)),
        (3, intent_of(update_id="whole")),
        (4, WeightDecision(3, "b", "", True)),
        (5, intent_of(update_id="undecided")),
        (6, WeightOutcome(5, ANSWER)),
        (7, intent_of(update_id="p1", is_partial=True)),
        (8, WeightDecision(7, "c", "", True)),
    ]
    state = fold(*parts)
    assert [entry.update_id for entry in state.since_complete] == ["whole", "p1"]
    assert state.record == 7


def test_a_copy_stands_still() -> None:
    state = fold((5, intent_of()))
    copy = state.copy()
    state.apply(6, WeightDecision(5, "new", "v1", True))
    state.apply(7, WeightOutcome(5, ANSWER))
    assert (copy.record, list(copy.open), copy.ended) == (0, [5], {})


@pytest.mark.parametrize(
    "record", [intent_of(exclude=[1]), WeightDecision(5, "d", "v", True), WeightOutcome(5, ANSWER)]
)
def test_records_come_back_as_they_were_written(record: WeightRecord) -> None:
    assert msgspec.json.decode(msgspec.json.encode(record), type=WeightRecord) == record
    state = fold((5, intent_of()))
    assert msgspec.json.decode(msgspec.json.encode(state), type=WeightLogState) == state
