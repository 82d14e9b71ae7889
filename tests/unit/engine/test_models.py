"""Loading: what is served as it is, and what is refused before a request could be answered wrongly, with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    MambaConfig,
    NemotronConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3NextConfig,
    T5Config,
)

from configs.errors import ConfigError
from engine.models import LoadedModel, load_model
from tests.models import ARCHITECTURES, Architecture, write_checkpoint, write_random_model


def load(directory: Path, *, device: str = "cpu", dtype: str = "auto", max_len: int | None = None) -> LoadedModel:
    return load_model(directory, device, dtype, max_len)


def write_config(directory: Path, config: PretrainedConfig) -> Path:
    directory.mkdir(exist_ok=True)
    config.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_facts(tmp_path: Path, architecture: Architecture) -> None:
    facts = load(write_random_model(tmp_path / "m", architecture), max_len=1000).facts

    assert (facts.num_layers, facts.num_heads, facts.num_kv_heads, facts.head_dim) == (2, 4, 2, 16)
    assert (facts.vocab_size, facts.max_len, facts.eos_token_ids, facts.dtype) == (512, 1000, (2,), "float32")
    assert facts.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4


def test_learned_positions_are_served(tmp_path: Path) -> None:
    """Multi-head attention, absolute positions: nothing Llama-like is assumed."""
    config = GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=False)
    facts = load(write_checkpoint(tmp_path, config)).facts

    assert (facts.num_kv_heads, facts.head_dim, facts.max_len) == (2, 16, 64)


# digests


def test_the_weights_digest_is_of_the_content(tmp_path: Path) -> None:
    first = load(write_random_model(tmp_path / "a", "llama", seed=1))
    same = load(write_random_model(tmp_path / "b", "llama", seed=1))
    other = load(write_random_model(tmp_path / "c", "llama", seed=2))
    half = load(tmp_path / "a", dtype="bfloat16")

    assert first.facts.weights_digest == same.facts.weights_digest
    assert len({model.facts.weights_digest for model in (first, other, half)}) == 3
    assert first.facts.layout_digest == other.facts.layout_digest != half.facts.layout_digest


def test_one_flipped_bit_is_damage(tmp_path: Path) -> None:
    model = load(write_random_model(tmp_path, "llama"))
    assert model.weights.damaged() == []
    weight = model.module.get_parameter("model.layers.1.mlp.up_proj.weight")
    weight.data.view(torch.int32)[3, 5] ^= 1

    assert model.weights.damaged() == ["model.layers.1.mlp.up_proj.weight"]


def test_a_checkpoint_that_is_written_over_changes_nothing_that_is_served(tmp_path: Path) -> None:
    directory = write_random_model(tmp_path, "llama")
    model = load(directory)
    file = directory / "model.safetensors"
    with file.open("r+b") as checkpoint:
        checkpoint.seek(file.stat().st_size // 2)
        checkpoint.write(bytes(file.stat().st_size // 4))
    assert model.weights.damaged() == []
    with file.open("r+b") as checkpoint:  # a mapping of it would end this process with SIGBUS
        checkpoint.truncate(1024)
    assert model.weights.damaged() == []


# dtypes


@pytest.mark.parametrize(
    ("stored", "asked", "served"),
    [
        ("float32", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("float16", "auto", torch.float32),
        ("float16", "float16", torch.float16),
        ("float32", "bfloat16", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
    ],
)
def test_dtype(tmp_path: Path, stored: str, asked: str, served: torch.dtype) -> None:
    directory = write_random_model(tmp_path, "llama", dtype=stored)
    path = directory / "model.safetensors"
    save_file({name: weight.to(getattr(torch, stored)) for name, weight in load_file(path).items()}, path)

    model = load(directory, dtype=asked)

    assert model.module.dtype == served
    assert {weight.dtype for weight in model.module.parameters()} == {served}
    assert model.facts.dtype == str(served).removeprefix("torch.")


# refusals


def refusal(directory: Path, **given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(directory, **given)
    return caught.value.message


TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def tiny(**fields: Any) -> dict[str, Any]:
    return TINY | fields


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent")
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be used" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "from-the-future"}')
    assert "cannot be used" in refusal(tmp_path)

    directory = write_random_model(tmp_path / "m", "llama")
    weights = (directory / "model.safetensors").read_bytes()
    for content in (b"", weights[:100], weights[: len(weights) // 2], b"\xff" * 1000):
        (directory / "model.safetensors").write_bytes(content)
        assert "cannot be loaded" in refusal(directory)
    (directory / "model.safetensors").unlink()
    assert "cannot be loaded" in refusal(directory)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    """transformers would fill what is missing with noise and only warn."""
    directory = write_random_model(tmp_path, "llama")
    path = directory / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"

    save_file({key: weight for key, weight in weights.items() if key != name}, path)
    assert name in refusal(directory)
    save_file(weights | {name: torch.zeros(7, 64)}, path)
    message = refusal(directory)
    assert name in message
    assert "[7, 64]" in message
    assert "[128, 64]" in message


def test_code_in_the_directory_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.M"}})
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('this code ran')")

    assert "cannot be used" in refusal(tmp_path)


def test_unknown_device_and_dtype(tmp_path: Path) -> None:
    directory = write_random_model(tmp_path, "llama")

    assert "abacus" in refusal(directory, device="abacus")
    assert "cuda:99" in refusal(directory, device="cuda:99")
    assert "int8" in refusal(directory, dtype="int8")


def test_context_longer_than_the_models(tmp_path: Path) -> None:
    directory = write_random_model(tmp_path, "llama", max_position_embeddings=256)

    message = refusal(directory, max_len=257)
    assert "257" in message
    assert "256" in message
    assert load(directory, max_len=256).facts.max_len == 256


def test_sliding_window_shorter_than_the_context(tmp_path: Path) -> None:
    directory = write_random_model(tmp_path, "mistral", sliding_window=64)

    assert "sliding_window 64" in refusal(directory)
    assert "sliding_window 64" in refusal(directory, max_len=65)
    assert load(directory, max_len=64).facts.max_len == 64


def test_sliding_window_in_some_layers(tmp_path: Path) -> None:
    config = Qwen2Config(**tiny(use_sliding_window=True, sliding_window=32, max_window_layers=1))

    assert "sliding_window 32" in refusal(write_config(tmp_path, config))


def test_attention_scaled_by_the_place_in_the_row(tmp_path: Path) -> None:
    config = Llama4TextConfig(
        **tiny(num_local_experts=2, floor_scale=64, attention_chunk_size=128, no_rope_layers=[0, 0])
    )
    directory = write_checkpoint(tmp_path, config)

    assert "at most 64" in refusal(directory)
    assert load(directory, max_len=64).facts.max_len == 64


@pytest.mark.parametrize("rope", [
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 10000.0,
     "original_max_position_embeddings": 64, "factor": 2.0},
])  # fmt: skip
def test_rope_that_depends_on_the_row(tmp_path: Path, rope: dict[str, Any]) -> None:
    message = refusal(write_random_model(tmp_path, "llama", rope_parameters=rope))

    assert rope["rope_type"] in message


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(vocab_size=64, d_model=16), "encoder-decoder"),
        (MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2), "recurrent state"),
        (BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2), "attention interface"),
        (Qwen3NextConfig(**tiny()), "recurrent state"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_models_with_another_cache(tmp_path: Path, config: PretrainedConfig, reason: str) -> None:
    """Refused by their configuration: no weights are read."""
    assert reason in refusal(write_config(tmp_path, config), max_len=64)


def test_models_whose_attention_has_further_terms(tmp_path: Path) -> None:
    """Only the trial forward sees these."""
    gemma = Gemma2Config(**tiny(sliding_window=128, query_pre_attn_scalar=16))
    assert "softcap" in refusal(write_checkpoint(tmp_path / "gemma", gemma))

    sinks = GptOssConfig(**tiny(sliding_window=128, num_local_experts=2, num_experts_per_tok=1))
    assert "s_aux" in refusal(write_checkpoint(tmp_path / "sinks", sinks))


def test_attention_that_drops_keyword_arguments(tmp_path: Path) -> None:
    assert "keyword arguments" in refusal(write_checkpoint(tmp_path, NemotronConfig(**tiny())))


def test_a_model_that_transformers_cannot_run(tmp_path: Path) -> None:
    assert "transformers itself" in refusal(write_checkpoint(tmp_path, Gemma2Config(**tiny(sliding_window=None))))


def test_keys_and_values_of_different_size(tmp_path: Path) -> None:
    latent = DeepseekV3Config(
        **{key: value for key, value in TINY.items() if key != "head_dim"},
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        first_k_dense_replace=2,
    )  # fmt: skip

    assert "differ in shape" in refusal(write_checkpoint(tmp_path, latent))
