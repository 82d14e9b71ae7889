"""Releasing and resuming memory: the orders that work, those that do not, and repeats."""

from __future__ import annotations

import pytest

from configs.errors import Conflict, InvalidField
from engine.memory_tags import (
    TAGS,
    DropKv,
    DropWeights,
    MakeKv,
    MakeWeights,
    MemoryTags,
    Place,
    Tag,
    parse_tags,
)


def released(*tags: Tag, keep_copy: bool = False) -> MemoryTags:
    memory = MemoryTags()
    memory.release(tags, num_running=0, keep_copy=keep_copy)
    return memory


def places(memory: MemoryTags) -> tuple[Place, Place]:
    """Of KV cache and weights."""
    return memory.places["kv_cache"], memory.places["weights"]


def test_the_round_of_a_trainer_on_the_same_device() -> None:
    memory = MemoryTags()
    assert memory.release(TAGS, num_running=0) == [DropKv(), DropWeights(False)]
    assert memory.resume(["weights"]) == [MakeWeights(False)]
    assert places(memory) == ("released", "hollow")
    memory.check_update(is_partial=False)
    memory.updated()
    assert memory.resume(["kv_cache"]) == [MakeKv()]
    assert places(memory) == ("resident", "resident")
    memory.check_continue()


def test_weights_that_are_kept_on_the_host_come_back() -> None:
    memory = released("weights", keep_copy=True)
    assert memory.resume(["weights"]) == [MakeWeights(True)]
    memory.check_continue()


def test_memory_without_weights_has_nothing_to_keep() -> None:
    memory = released("weights")
    memory.resume(["weights"])
    assert memory.release(["weights"], num_running=0, keep_copy=True) == [DropWeights(False)]
    memory.resume(["weights"])
    assert places(memory) == ("resident", "hollow")


def test_repeats_do_nothing() -> None:
    memory = released(*TAGS)
    assert memory.release(TAGS, num_running=0) == []
    memory.resume(["kv_cache"])
    assert memory.resume(["kv_cache"]) == []
    assert places(memory) == ("resident", "released")


def test_nothing_is_released_under_requests() -> None:
    memory = MemoryTags()
    with pytest.raises(Conflict, match="2 requests run; pause_generation"):
        memory.release(TAGS, num_running=2)
    assert places(memory) == ("resident", "resident")
    # what is released already is no matter of requests
    assert released(*TAGS).release(TAGS, num_running=2) == []


@pytest.mark.parametrize("tags", [["kv_cache"], ["weights"], ["kv_cache", "weights"]])
def test_what_was_never_released_is_not_resumed(tags: list[Tag]) -> None:
    with pytest.raises(Conflict, match="was not released"):
        MemoryTags().resume(tags)
    half = released("kv_cache")
    if "weights" in tags:
        with pytest.raises(Conflict, match="weights was not released"):
            half.resume(tags)
        assert places(half) == ("released", "resident")


def test_updates_need_memory_and_hollow_weights_need_all_of_them() -> None:
    memory = released("weights")
    with pytest.raises(Conflict, match="resume_memory_occupation"):
        memory.check_update(is_partial=False)
    memory.resume(["weights"])
    with pytest.raises(Conflict, match="complete update"):
        memory.check_update(is_partial=True)
    memory.updated()
    memory.check_update(is_partial=True)


@pytest.mark.parametrize("tag", TAGS)
def test_nobody_is_served_while_something_is_missing(tag: Tag) -> None:
    memory = released(tag)
    with pytest.raises(Conflict, match=f"{tag} is released"):
        memory.check_continue()
    memory.resume([tag])
    if tag == "weights":
        with pytest.raises(Conflict, match="has to fill them"):
            memory.check_continue()


def test_tags_of_a_caller() -> None:
    assert parse_tags(None) == TAGS
    assert parse_tags(["weights", "kv_cache", "weights"]) == TAGS
    for value in ("weights", [], 7, ["cuda_graph"], [None]):
        with pytest.raises(InvalidField):
            parse_tags(value)
