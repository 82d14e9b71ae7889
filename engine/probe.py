"""A trial forward at load: what the model really does with attention, and whether a ragged row changes its answers.

Legend: T tokens of the row, H query heads, G KV heads, D head_dim.

Two short sequences are computed apart with transformers' own attention, then side by side in one ragged row as the
engine will do it. A model that numbers its positions itself, passes a bias, or leaves state in a cache differs here
and is refused, whatever its configuration says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from configs.errors import ConfigError

_PROBE_NAME = "tidegate_probe"
_LENGTHS = (5, 9)
#: arguments of an attention call that change its result in a way paged attention does not know
_UNKNOWN_TERMS = ("softcap", "s_aux", "position_bias", "alibi", "head_mask")
#: largest difference of logits, in standard deviations: the same sums in another order stay below 1e-5 in float32 and
#: within a few per cent in 16 bits; another mask or another position is of the order of 1
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What one token's KV looks like, as the layers handed it over."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


@dataclass(slots=True)
class _Recorder:
    """Attends each sequence of the probe's row apart, and notes what it was given."""

    #: layer -> (query heads, KV heads, head_dim)
    shapes: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    #: shortest window that a layer asked for, in tokens
    window: int | None = None

    def note(self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> None:
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or layer in self.shapes:
            self.problems.append(f"attention of {type(module).__name__} does not say which layer it is")
            return
        if key.shape != value.shape:
            self.problems.append("keys and values differ in shape, and a page holds both alike")
        self.shapes[layer] = (query.shape[1], key.shape[1], key.shape[3])
        if not given.get("is_causal", getattr(module, "is_causal", True)):
            self.problems.append("attention is not causal")
        self.problems.extend(
            f"attention takes {term!r}, which paged attention does not apply"
            for term in _UNKNOWN_TERMS
            if given.get(term) is not None
        )
        window = given.get("sliding_window")
        if window is not None:
            self.window = window if self.window is None else min(self.window, window)


def probe_attention(model: PreTrainedModel, max_len: int) -> AttentionShape:
    """Run both forwards; leaves the model with the probe's attention set. Reads weights, changes none.

    Raises ConfigError, with the reason, when the model cannot be served through paged attention.
    """
    recorder = _Recorder()
    with _refusing(model, "transformers itself cannot run it"):
        plain = _plain_logits(model)
    with _refusing(model, "it does not run over a ragged row"):
        model.set_attn_implementation(_PROBE_NAME)
        ragged = _ragged_logits(model, recorder)
    num_layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    if sorted(recorder.shapes) != list(range(num_layers)):
        raise _refusal(model, f"{len(recorder.shapes)} of its {num_layers} layers use the attention interface")
    if recorder.problems:
        raise _refusal(model, recorder.problems[0])
    if recorder.window is not None and recorder.window < max_len:
        raise _refusal(model, f"a window of {recorder.window:,} is shorter than the context of {max_len:,} tokens")
    if len(set(recorder.shapes.values())) != 1:
        raise _refusal(model, "its layers differ in heads or head size, and pages hold all layers alike")
    deviation = ((ragged - plain).abs().max() / plain.std()).item()
    tolerance = _TOLERANCE.get(model.dtype, 1e-3)
    if not deviation <= tolerance:
        raise _refusal(model, f"in a ragged row its logits differ by {deviation:.2g} standard deviations")
    num_heads, num_kv_heads, head_dim = recorder.shapes[0]
    return AttentionShape(num_layers, num_heads, num_kv_heads, head_dim, plain.shape[-1])


def _probe_attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    paged: _Recorder | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]; each sequence causal, blind to the other."""
    if paged is None:
        raise ValueError("its layers do not hand keyword arguments on to attention")
    paged.note(module, query, key, value, given)
    outs: list[Tensor] = []
    for q, k, v in zip(*(tensor.split(_LENGTHS, dim=2) for tensor in (query, key, value)), strict=True):
        outs.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True))
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(_PROBE_NAME, _probe_attention_function)


def _sequences(model: PreTrainedModel) -> list[Tensor]:
    """Fixed token ids spread over the vocabulary, int64, one tensor per sequence."""
    vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = (torch.arange(sum(_LENGTHS), device=model.device) * 7919 + 11) % vocab_size
    return list(ids.split(_LENGTHS))


def _plain_logits(model: PreTrainedModel) -> Tensor:
    """Last logits `[2, vocab]` of each sequence computed alone, as transformers does it."""
    with torch.inference_mode():
        return torch.stack([model(ids[None], use_cache=False).logits[0, -1].float() for ids in _sequences(model)])


def _ragged_logits(model: PreTrainedModel, recorder: _Recorder) -> Tensor:
    """Last logits `[2, vocab]` of each sequence, both in one row."""
    positions = torch.cat([torch.arange(length, device=model.device) for length in _LENGTHS])
    last = torch.tensor(_LENGTHS, device=model.device).cumsum(0) - 1
    with torch.inference_mode():
        logits = model(
            input_ids=torch.cat(_sequences(model))[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=last,
            paged=recorder,
        ).logits[0]
    return (logits if logits.shape[0] == len(_LENGTHS) else logits[last]).float()


@contextmanager
def _refusing(model: PreTrainedModel, what: str) -> Iterator[None]:
    """Whatever a foreign model's forward raises means the same here: it cannot be served."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _refusal(model, f"{what} ({reason})") from error


def _refusal(model: PreTrainedModel, reason: str) -> ConfigError:
    return ConfigError(f"{type(model).__name__} cannot be served: {reason}")
