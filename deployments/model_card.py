"""Facts about the served model that the doors tell, read from its directory without loading it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What /v1/models, /model_info and /server_info say."""

    name: str
    path: str
    model_type: str
    architectures: tuple[str, ...]
    vocab_size: int
    #: context length in tokens; the ranks may offer less
    max_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    weight_version: str = "default"


def read_model_card(directory: Path, served_name: str | None = None, max_len: int | None = None) -> ModelCard:
    """Read `config.json` and `generation_config.json` of `directory`.

    served_name: None means the directory's name. max_len: None means the model's own.
    Raises ConfigError when the directory is no model.
    """
    config = _read_json(directory / "config.json")
    generation_file = directory / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.is_file() else {}
    own_len = config.get("max_position_embeddings")
    length = max_len or own_len
    if not isinstance(length, int) or not isinstance(config.get("vocab_size"), int):
        raise ConfigError(f"{directory}/config.json names no vocab_size or no context length (configs: model.max_len)")
    return ModelCard(
        name=served_name or directory.name,
        path=str(directory),
        model_type=str(config.get("model_type", "")),
        architectures=tuple(config.get("architectures") or ()),
        vocab_size=config["vocab_size"],
        max_len=length,
        eos_token_ids=_ids(generation.get("eos_token_id", config.get("eos_token_id"))),
        bos_token_id=config.get("bos_token_id"),
        pad_token_id=generation.get("pad_token_id", config.get("pad_token_id")),
    )


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return content
