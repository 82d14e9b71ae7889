"""Small random-weight checkpoints of the architectures that Tidegate is proved on, seeded, in Hugging Face format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PretrainedConfig,
    Qwen3Config,
)

from engine.demo_model import fill_weights

Architecture = Literal["llama", "qwen3", "mistral", "olmo2"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen3", "mistral", "olmo2")

_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": 2,
    "dtype": "float32",
}

_CONFIGS: dict[Architecture, Callable[..., PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen3": lambda **fields: Qwen3Config(head_dim=16, **fields),
    "mistral": lambda **fields: MistralConfig(**{"sliding_window": None, **fields}),
    "olmo2": Olmo2Config,
}


def write_random_model(directory: Path, architecture: Architecture, seed: int = 0, **overrides: object) -> Path:
    """Write a tiny checkpoint (0.1M parameters, no tokenizer), return `directory`. overrides: fields of its config."""
    return write_checkpoint(directory, _CONFIGS[architecture](**(_TINY | overrides)), seed)


def write_checkpoint(directory: Path, config: PretrainedConfig, seed: int = 0) -> Path:
    """Write a checkpoint with seeded weights for any configuration of a causal language model."""
    directory.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_config(config)
    fill_weights(model, seed)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    save_model(model, str(directory / "model.safetensors"))
    return directory
