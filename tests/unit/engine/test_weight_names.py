"""Names of checkpoints that are not the module's: understood as from_pretrained understands them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig

from configs.errors import WeightsRejected
from engine.models import load_model
from engine.weight_intake import StageOptions
from engine.weights import LiveWeights, stage
from engine.weights_in_place import InPlaceLoad
from tests.models import write_checkpoint
from tests.unit.engine.weight_models import same_bytes, tensors_in

EXPERT = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"


def mixture_config() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, sliding_window=None, max_position_embeddings=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mixture"), mixture_config(), seed=0)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Other weights of the same model, one tensor per expert: as such models are published."""
    directory = tmp_path_factory.mktemp("published")
    module = AutoModelForCausalLM.from_pretrained(write_checkpoint(directory / "fused", mixture_config(), seed=1))
    # it was loaded from fused tensors, and would be written so again
    del module._weight_conversions
    module.save_pretrained(directory / "split")
    return tensors_in(directory / "split")


@pytest.fixture
def live(mixture: Path) -> LiveWeights:
    return LiveWeights(load_model(mixture, "cpu", "float32", None).module)


def test_experts_become_the_weights_that_transformers_makes_of_them(
    live: LiveWeights, published: dict[str, Tensor], tmp_path: Path
) -> None:
    assert EXPERT.format(2) in published
    expected = write_checkpoint(tmp_path, mixture_config(), seed=1)
    staged = stage(live, published.items())
    fused = stage(live, tensors_in(expected).items())

    assert same_bytes(dict(staged.tensors), dict(fused.tensors))
    assert staged.payload_digest == fused.payload_digest
    live.commit(staged)
    assert live.facts.digest == LiveWeights(load_model(expected, "cpu", "float32", None).module).facts.digest


def test_the_live_model_is_not_touched_by_the_fusing(live: LiveWeights, published: dict[str, Tensor]) -> None:
    before = live.measure()
    stage(live, published.items())
    assert live.measure() == before == dict(live.facts.checksums)


@pytest.mark.parametrize("is_partial", [False, True])
def test_an_expert_is_missing(live: LiveWeights, published: dict[str, Tensor], is_partial: bool) -> None:
    payload = {name: tensor for name, tensor in published.items() if name != EXPERT.format(1)}
    with pytest.raises(WeightsRejected) as caught:
        stage(live, payload.items(), StageOptions(is_partial=is_partial))
    assert caught.value.fault == "fused"


def test_an_expert_of_another_shape(live: LiveWeights, published: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsRejected) as caught:
        stage(live, (published | {EXPERT.format(1): torch.ones(3, 3)}).items())
    assert caught.value.fault == "fused"


def test_an_expert_comes_twice_or_in_another_dtype(live: LiveWeights, published: dict[str, Tensor]) -> None:
    name = EXPERT.format(1)
    with pytest.raises(WeightsRejected, match="twice"):
        stage(live, [*published.items(), (name, published[name])])
    with pytest.raises(WeightsRejected, match="float64"):
        stage(live, (published | {name: published[name].double()}).items())


def test_one_layer_alone_in_place(live: LiveWeights, published: dict[str, Tensor]) -> None:
    """A bucket holds all tensors of each weight it brings."""
    load = InPlaceLoad(live, StageOptions(is_partial=True))
    load.write([(name, tensor) for name, tensor in published.items() if ".layers.1." in name])
    load.finish()
    assert live.facts.digest == stage(live, [("lm_head.weight", live.names.tensor("lm_head.weight"))], PART).digest


PART = StageOptions(is_partial=True)
