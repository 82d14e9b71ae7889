"""New weights: the tokens that come of them, what is refused, and that nothing changes before the commit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.errors import Conflict, WeightFault, WeightsRejected, WeightsTorn
from engine.weight_intake import StageOptions
from engine.weight_sources import flatten, read_directory, unflatten
from engine.weights import Staging, stage
from engine.weights_in_place import InPlaceLoad
from tests.models import ARCHITECTURES, Architecture, write_random_model
from tests.unit.engine.weight_models import Served, plain_greedy, same_bytes, tensors_in, write_tensors

PARTIAL = StageOptions(is_partial=True)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("old"), "llama", seed=0)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("new"), "llama", seed=1)


@pytest.fixture
def served(old: Path) -> Served:
    return Served(old)


# ------------------------------------------------------------------------------------------------------------- tokens
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_are_those_of_the_weights_that_are_committed(tmp_path: Path, architecture: Architecture) -> None:
    old = write_random_model(tmp_path / "old", architecture, seed=0)
    new = write_random_model(tmp_path / "new", architecture, seed=1)
    served = Served(old)
    old_tokens, new_tokens = plain_greedy(old), plain_greedy(new)
    assert old_tokens != new_tokens

    staged = stage(served.live, read_directory(new))
    assert served.greedy() == old_tokens

    served.live.commit(staged, "v1")
    assert served.greedy() == new_tokens
    assert served.live.facts.version == "v1"

    served.live.commit(stage(served.live, read_directory(old)))
    assert served.greedy() == old_tokens


def test_an_update_that_is_dropped_leaves_every_bit(served: Served, new: Path) -> None:
    before, facts = served.bytes(), served.live.facts
    staged = stage(served.live, read_directory(new))
    del staged

    assert same_bytes(served.bytes(), before)
    assert served.live.facts == facts


def test_a_part_of_the_weights(served: Served, new: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = tensors_in(new)[name]
    served.live.commit(stage(served.live, [(name, tensor)], PARTIAL))

    assert torch.equal(served.bytes()[name], tensor)
    assert served.live.facts.version == "v0"
    assert served.live.damaged() == []


def test_the_old_weights_live_until_they_are_dropped(served: Served, new: Path) -> None:
    """What a commit frees is freed by whoever drops it, not by the engine thread."""
    before = served.bytes()
    staged = stage(served.live, read_directory(new))
    replaced = served.live.commit(staged)

    assert replaced.num_bytes == sum(tensor.nbytes for tensor in before.values())
    assert same_bytes(dict(zip(staged.tensors, replaced.tensors, strict=True)), before)


def test_a_commit_moves_pointers_only(served: Served, new: Path) -> None:
    staged = stage(served.live, read_directory(new))
    places = {name: tensor.data_ptr() for name, tensor in staged.tensors.items()}
    served.live.commit(staged)

    assert {name: tensor.data_ptr() for name, tensor in served.model.module.state_dict().items()} == places


def test_parts_of_an_older_state_are_not_committed(served: Served, new: Path) -> None:
    name = "model.norm.weight"
    staged = stage(served.live, [(name, tensors_in(new)[name])], PARTIAL)
    served.live.commit(stage(served.live, read_directory(new)))
    before = served.bytes()

    with pytest.raises(Conflict):
        served.live.commit(staged)
    assert same_bytes(served.bytes(), before)


def test_weights_wait_where_they_are_told_to(served: Served, new: Path) -> None:
    staged = stage(served.live, read_directory(new), StageOptions(device="cpu"))
    assert {tensor.device.type for tensor in staged.tensors.values()} == {"cpu"}
    served.live.commit(staged)
    assert served.greedy() == plain_greedy(new)


# --------------------------------------------------------------------------------------------------------- memory
def test_the_payload_is_copied(served: Served, new: Path) -> None:
    """The trainer goes on with its own tensors."""
    tensors = tensors_in(new)
    staged = stage(served.live, tensors.items())
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    served.live.commit(staged)

    assert served.greedy() == plain_greedy(new)


def test_a_checkpoint_written_over_the_file_that_is_served(tmp_path: Path, new: Path) -> None:
    """transformers maps the file; a trainer that writes the next checkpoint over it must change nothing here."""
    served = Served(write_random_model(tmp_path, "llama", seed=0))
    before = served.bytes()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write((new / "model.safetensors").read_bytes())

    assert same_bytes(served.bytes(), before)
    served.live.commit(stage(served.live, read_directory(tmp_path)))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert served.greedy() == plain_greedy(new)


def test_staging_under_inference_mode(served: Served, new: Path) -> None:
    with torch.inference_mode():
        staged = stage(served.live, read_directory(new))
        served.live.commit(staged)
    assert not any(tensor.is_inference() for tensor in served.model.module.parameters())


# --------------------------------------------------------------------------------------------------------- refusals
def broken(tensors: dict[str, Tensor], fault: WeightFault) -> list[tuple[str, Tensor]]:
    """A payload with one fault, in its last tensor where that is possible."""
    name = "model.norm.weight"
    good = [(key, tensor) for key, tensor in tensors.items() if key != name]
    norm = tensors[name]
    match fault:
        case "unknown_name":
            return [*tensors.items(), ("model.norm.wait", norm)]
        case "missing_name":
            return good
        case "duplicate_name":
            return [*tensors.items(), (name, norm)]
        case "shape":
            return [*good, (name, norm[:-1])]
        case "dtype":
            return [*good, (name, norm.double())]
        case "not_finite":
            return [*good, (name, torch.where(norm > norm.median(), norm, torch.inf))]
        case _:
            return []


@pytest.mark.parametrize(
    "fault", ["unknown_name", "missing_name", "duplicate_name", "shape", "dtype", "not_finite", "payload"]
)
def test_a_payload_that_does_not_fit_changes_nothing(served: Served, new: Path, fault: WeightFault) -> None:
    before, facts = served.bytes(), served.live.facts
    options = StageOptions(check_finite=True, is_partial=fault == "payload")

    with pytest.raises(WeightsRejected) as caught:
        stage(served.live, broken(tensors_in(new), fault), options)

    assert caught.value.fault == fault
    assert fault == "payload" or "model.norm.wai" in caught.value.message or "model.norm.weight" in caught.value.message
    assert same_bytes(served.bytes(), before)
    assert served.live.facts == facts


def test_nan_is_taken_unless_it_is_looked_for(served: Served, new: Path) -> None:
    payload = broken(tensors_in(new), "not_finite")
    served.live.commit(stage(served.live, payload))
    assert served.live.damaged() == []


def test_names_without_the_prefix_of_the_base_model(served: Served, new: Path) -> None:
    """A checkpoint of the base model alone is understood, as from_pretrained understands it."""
    stripped = {name.removeprefix("model."): tensor for name, tensor in tensors_in(new).items()}
    served.live.commit(stage(served.live, stripped.items()))
    assert served.greedy() == plain_greedy(new)


def test_one_weight_under_two_names(served: Served, new: Path) -> None:
    tensors = tensors_in(new)
    with pytest.raises(WeightsRejected, match="twice"):
        stage(served.live, [*tensors.items(), ("norm.weight", tensors["model.norm.weight"])])


def test_what_transformers_ignores_is_ignored(served: Served, new: Path) -> None:
    payload = [*tensors_in(new).items(), ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))]
    served.live.commit(stage(served.live, payload))
    assert served.greedy() == plain_greedy(new)


# ------------------------------------------------------------------------------------------------------------- casts
def test_a_wider_model_takes_narrow_weights_exactly(served: Served, new: Path) -> None:
    payload = {name: tensor.bfloat16() for name, tensor in tensors_in(new).items()}
    served.live.commit(stage(served.live, payload.items()))
    assert all(torch.equal(tensor, payload[name].float()) for name, tensor in served.bytes().items())

    with pytest.raises(WeightsRejected) as caught:
        stage(served.live, payload.items(), StageOptions(cast="exact"))
    assert caught.value.fault == "dtype"


def test_rounding_is_done_only_when_asked_for(old: Path, new: Path) -> None:
    served = Served(old, "bfloat16")
    payload = tensors_in(new)
    with pytest.raises(WeightsRejected, match="served in bfloat16"):
        stage(served.live, payload.items())

    served.live.commit(stage(served.live, payload.items(), StageOptions(cast="any")))
    assert all(torch.equal(tensor, payload[name].bfloat16()) for name, tensor in served.bytes().items())


def test_whole_numbers_never_become_weights(served: Served, new: Path) -> None:
    name = "model.norm.weight"
    options = StageOptions(is_partial=True, cast="any")
    with pytest.raises(WeightsRejected, match="int64"):
        stage(served.live, [(name, tensors_in(new)[name].long())], options)


# -------------------------------------------------------------------------------------------------------------- ties
def test_tied_weights_come_under_either_name_or_both(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    old = write_random_model(tmp_path / "old", "qwen3", seed=0, **tied)
    new = write_random_model(tmp_path / "new", "qwen3", seed=1, **tied)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    served = Served(old)
    rest = tensors_in(new)
    weight = rest.pop(embedding, None)
    weight = rest.pop(head) if weight is None else weight
    rest.pop(head, None)
    digests = set()
    for given in ({head: weight}, {embedding: weight}, {head: weight, embedding: weight.clone()}):
        staged = stage(served.live, (rest | given).items())
        digests.add((staged.digest, staged.payload_digest))
        served.live.commit(staged)
        assert served.greedy() == plain_greedy(new)
        served.live.commit(stage(served.live, read_directory(old)))
    assert len(digests) == 1
    module = served.model.module
    assert module.get_parameter(head) is module.get_parameter(embedding)

    with pytest.raises(WeightsRejected) as caught:
        stage(served.live, (rest | {head: weight, embedding: weight + 1}).items())
    assert caught.value.fault == "tied"


# ---------------------------------------------------------------------------------------------------- ways and digest
def test_equal_content_has_one_digest_over_all_ways_in(tmp_path: Path, old: Path, new: Path) -> None:
    tensors = tensors_in(new)
    names = list(tensors)
    half = len(names) // 2
    write_tensors(tmp_path, {name: tensors[name] for name in names[:half]}, "a.safetensors")
    write_tensors(tmp_path, {name: tensors[name] for name in names[half:]}, "b.safetensors")
    shards = {name: "a.safetensors" if place < half else "b.safetensors" for place, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    served = Served(old)

    buckets = Staging(served.live)
    for start in range(0, len(names), 5):
        bucket = flatten([(name, tensors[name]) for name in names[start : start + 5]])
        buckets.take(unflatten(bucket))
    ways = [
        stage(served.live, read_directory(new)),
        stage(served.live, read_directory(tmp_path)),
        stage(served.live, tensors.items()),
        stage(served.live, [(name, tensors[name]) for name in reversed(names)]),
        buckets.finish(),
    ]

    assert len({way.payload_digest for way in ways}) == 1
    assert {way.digest for way in ways} == {Served(new).live.facts.digest}
    served.live.commit(ways[-1])
    assert served.greedy() == plain_greedy(new)


def test_one_bit_makes_another_digest(served: Served, new: Path) -> None:
    tensors = tensors_in(new)
    digest = stage(served.live, tensors.items()).digest
    tensors["model.norm.weight"].view(torch.int32)[3] ^= 1
    assert stage(served.live, tensors.items()).digest != digest


def test_the_digest_says_what_is_served_not_what_was_before(served: Served, old: Path, new: Path) -> None:
    """In one update, in two parts, or back and forth."""
    wanted = Served(new).live.facts.digest
    tensors = list(tensors_in(new).items())
    served.live.commit(stage(served.live, tensors[:5], PARTIAL))
    served.live.commit(stage(served.live, tensors[5:], PARTIAL))
    assert served.live.facts.digest == wanted

    served.live.commit(stage(served.live, read_directory(old)))
    assert served.live.facts.digest == Served(old).live.facts.digest != wanted


def test_damage_is_found(served: Served) -> None:
    assert served.live.damaged() == []
    served.model.module.get_parameter("model.norm.weight").data.view(torch.int32)[0] ^= 1
    assert served.live.damaged() == ["model.norm.weight"]


# ---------------------------------------------------------------------------------------------------------- in place
def test_a_load_in_place_ends_where_a_staged_update_ends(served: Served, new: Path) -> None:
    tensors = list(tensors_in(new).items())
    load = InPlaceLoad(served.live)
    assert served.live.facts.state == "whole"
    load.write(tensors[:7])
    assert (served.live.facts.state, served.live.facts.digest) == ("torn", "")
    load.write(tensors[7:])
    load.finish("v1")

    assert (served.live.facts.state, served.live.facts.version) == ("whole", "v1")
    assert served.live.facts.digest == Served(new).live.facts.digest
    assert served.greedy() == plain_greedy(new)


def test_a_bad_first_bucket_tears_nothing(served: Served, new: Path) -> None:
    before = served.bytes()
    with pytest.raises(WeightsRejected):
        InPlaceLoad(served.live).write(broken(tensors_in(new), "shape"))
    assert served.live.facts.state == "whole"
    assert same_bytes(served.bytes(), before)


def test_torn_weights_take_a_complete_update_and_nothing_less(served: Served, new: Path) -> None:
    tensors = list(tensors_in(new).items())
    load = InPlaceLoad(served.live)
    load.write(tensors[:7])
    with pytest.raises(WeightsRejected, match="twice"):
        load.write(tensors[6:8])
    with pytest.raises(WeightsRejected, match="mixture"):
        load.finish()
    assert served.live.facts.state == "torn"
    with pytest.raises(WeightsTorn):
        served.live.check_whole()
    with pytest.raises(WeightsTorn):
        stage(served.live, tensors[7:], PARTIAL)
    with pytest.raises(WeightsTorn):
        InPlaceLoad(served.live, PARTIAL)

    served.live.commit(stage(served.live, tensors))
    assert served.live.facts.state == "whole"
    assert served.greedy() == plain_greedy(new)


def test_parts_staged_before_the_tear_do_not_heal_it(served: Served, new: Path) -> None:
    tensors = list(tensors_in(new).items())
    part = stage(served.live, tensors[:3], PARTIAL)
    InPlaceLoad(served.live).write(tensors[:7])
    with pytest.raises(WeightsTorn):
        served.live.commit(part)
