"""Which models are refused, and why: everything that can be read off a configuration before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from configs.errors import ConfigError

#: layer kinds whose whole state is keys and values per token
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
#: layer kinds that name the feed-forward half only
_MLP_LAYERS = frozenset({"dense", "sparse"})
#: they compute from the longest position in the row: one long request would change all others
_ROW_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def read_config(directory: Path) -> PretrainedConfig:
    """The configuration in `directory`. Raises ConfigError when there is none, or none that transformers knows."""
    if not directory.is_dir():
        raise ConfigError(f"model directory {directory} does not exist (model.path)")
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory} holds no config.json: not a model in Hugging Face format (model.path)")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{directory}/config.json cannot be used: {_first_line(error)}") from error


def check_model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that will be loaded. Raises ConfigError when its state or its attention cannot be paged."""
    if config.is_encoder_decoder:
        raise ConfigError(f"{config.model_type}: an encoder-decoder model; Tidegate serves decoder-only ones")
    entry: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if entry is None:
        raise ConfigError(f"{config.model_type}: transformers has no causal language model for it")
    model_class: type[PreTrainedModel] = entry[0] if isinstance(entry, tuple) else entry
    if model_class._is_stateful:
        raise ConfigError(
            f"{model_class.__name__}: keeps recurrent state beside (or instead of) keys and values, "
            "which a page cannot hold"
        )
    if not model_class._supports_attention_backend:
        raise ConfigError(
            f"{model_class.__name__}: its attention does not go through transformers' attention interface, "
            "so it cannot be paged"
        )
    return model_class


def check_max_len(config: PretrainedConfig, max_len: int | None) -> int:
    """The context length to serve, in tokens. Raises ConfigError when the model has less, or says nothing."""
    own = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if own is None:
        if max_len is None:
            raise ConfigError(f"{config.model_type}: the configuration names no context length (model.max_len: set it)")
        return max_len
    if max_len is not None and max_len > own:
        raise ConfigError(f"model.max_len is {max_len:,}; this model takes {own:,} tokens")
    return int(own) if max_len is None else max_len


def check_attention_config(config: PretrainedConfig, max_len: int) -> None:
    """Refuse, with ConfigError, what a page of plain keys and values cannot express in a context of `max_len`."""
    text = config.get_text_config(decoder=True)
    layer_types = getattr(text, "layer_types", None)
    for kind in sorted(set(layer_types or ()) - _ATTENTION_LAYERS - _MLP_LAYERS):
        raise ConfigError(f"{config.model_type}: layers of kind {kind!r} need another cache than pages of KV")
    windows = {
        "sliding_window": layer_types is None or "sliding_attention" in layer_types,
        "attention_chunk_size": layer_types is None or "chunked_attention" in layer_types,
    }
    for field, is_used in windows.items():
        window = getattr(text, field, None)
        if is_used and window is not None and window < max_len:
            raise ConfigError(
                f"{config.model_type}: {field} {window:,} is shorter than the context of {max_len:,} tokens "
                f"(model.max_len: at most {window:,})"
            )
    scale_from = getattr(text, "floor_scale", None)
    if getattr(text, "attn_temperature_tuning", False) and scale_from is not None and scale_from < max_len:
        # Llama 4 counts the row's tokens here, not the positions of each sequence
        raise ConfigError(
            f"{config.model_type}: attention is scaled by the place in the row beyond {scale_from:,} tokens "
            f"(model.max_len: at most {scale_from:,})"
        )
    for rope_type in _rope_types(getattr(text, "rope_parameters", None)):
        if rope_type in _ROW_DEPENDENT_ROPE:
            raise ConfigError(
                f"{config.model_type}: rope type {rope_type!r} depends on the longest request of a batch; "
                "an answer must not depend on its neighbours"
            )


def _rope_types(parameters: Any) -> Iterator[str]:
    """All rope types in `rope_parameters`: one set for all layers, or one per kind of layer."""
    if not isinstance(parameters, dict):
        return
    rope_type = parameters.get("rope_type", parameters.get("type"))
    if isinstance(rope_type, str):
        yield rope_type
    for value in parameters.values():
        yield from _rope_types(value)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
