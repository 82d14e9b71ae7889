"""Loading a model from a directory: any causal language model of transformers whose attention can be paged."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel

from configs.errors import ConfigError
from engine.attention import ATTENTION_NAME
from engine.device import resolve_device
from engine.model_checks import check_attention_config, check_max_len, check_model_class, read_config
from engine.probe import AttentionShape, probe_attention
from engine.quiet_loading import without_progress_bars
from engine.weights import LiveWeights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the other parts need to know of a loaded model. Plain values; crosses process borders."""

    #: the directory's name
    name: str
    #: transformers' class
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    #: width of the logits; token ids are in [0, vocab_size)
    vocab_size: int
    #: context length served, in tokens
    max_len: int
    eos_token_ids: tuple[int, ...]
    #: of weights and KV: float32, bfloat16 or float16
    dtype: str
    num_parameters: int
    #: of one token's KV: dtype and shape; pages of another layout are never attached
    layout_digest: str
    #: of what was loaded, in the dtype it is served in (engine/weights.py)
    weights_digest: str

    @property
    def kv_bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights on their device, attention set to ours, ready for `ModelRunner`."""

    module: PreTrainedModel
    facts: ModelFacts
    device: torch.device
    weights: LiveWeights


def load_model(directory: Path, device: str, dtype: str, max_len: int | None) -> LoadedModel:
    """Load the model in `directory`, offline, and prove by a trial forward that it can be served.

    device: auto, cpu, cuda, cuda:1, ...  dtype: float32, bfloat16, float16, or auto: the checkpoint's own, but
    float32 where it is float16 and the device is a CPU.  max_len: tokens; None: the model's own.
    The weights lie in memory of their own: a checkpoint that is written over changes nothing that is served.
    Runs no code from the directory. Raises ConfigError, with the reason, for what cannot work: missing or broken
    files, weights that do not fit, and models that need another cache than pages of keys and values.
    """
    target = resolve_device(device)
    config = read_config(directory)
    model_class = check_model_class(config)
    served_len = check_max_len(config, max_len)
    check_attention_config(config, served_len)
    module = _read_weights(directory, model_class, dtype, target)
    shape = probe_attention(module, served_len)
    module.set_attn_implementation(ATTENTION_NAME)
    weights = LiveWeights(module)
    facts = _facts(directory, config, module, shape, served_len, weights.facts.digest)
    return LoadedModel(module, facts, target, weights)


def _read_weights(
    directory: Path, model_class: type[PreTrainedModel], dtype: str, device: torch.device
) -> PreTrainedModel:
    if dtype != "auto" and dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of auto, {', '.join(_DTYPES)} (model.dtype)")
    try:
        with without_progress_bars():
            loaded = model_class.from_pretrained(
                directory,
                dtype=_DTYPES.get(dtype, "auto"),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the report names them
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"the weights in {directory} cannot be loaded: {reason}") from error
    module, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    problem = _loading_problem(report)
    if problem:
        raise ConfigError(f"the weights in {directory} do not fit {model_class.__name__}: {problem}")
    if dtype == "auto" and device.type == "cpu" and module.dtype == torch.float16:
        # half precision on a CPU is emulated: slower than float32 and less exact
        module = module.float()
    if str(module.dtype).removeprefix("torch.") not in _DTYPES:
        raise ConfigError(f"the weights in {directory} are {module.dtype}; choose model.dtype: {', '.join(_DTYPES)}")
    torch.nn.Module.to(module, device)
    return module.eval().requires_grad_(False)


def _loading_problem(report: dict[str, Any]) -> str:
    """transformers fills what is missing or misshapen with noise, and only warns."""
    problems = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        problems.append(f"{name} is {list(stored)} in the file, {list(wanted)} in the model")
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def _facts(
    directory: Path,
    config: PretrainedConfig,
    module: PreTrainedModel,
    shape: AttentionShape,
    max_len: int,
    weights_digest: str,
) -> ModelFacts:
    dtype = str(module.dtype).removeprefix("torch.")
    layout = f"{dtype} L{shape.num_layers} G{shape.num_kv_heads} D{shape.head_dim}"
    return ModelFacts(
        name=directory.resolve().name,
        architecture=type(module).__name__,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_len=max_len,
        eos_token_ids=_eos_token_ids(config, module),
        dtype=dtype,
        num_parameters=module.num_parameters(),
        layout_digest=hashlib.blake2b(layout.encode(), digest_size=16).hexdigest(),
        weights_digest=weights_digest,
    )


def _eos_token_ids(config: PretrainedConfig, module: PreTrainedModel) -> tuple[int, ...]:
    """The generation config's; where it has none, the model's."""
    generation = getattr(module, "generation_config", None)
    for source in (generation, config.get_text_config(decoder=True)):
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            return tuple(int(token) for token in (eos if isinstance(eos, list | tuple) else [eos]))
    return ()
