"""What one rank's scheduler may do, and which requests can never be served under that."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from configs.errors import ConfigError
from engine.request import Request, SamplingParams


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Sizes of one rank, from the settings and from what was loaded. Raises ConfigError on one that cannot work."""

    #: sequences that may run at once; more than max_step_tokens could never all decode in one step
    max_running: int
    #: tokens of one engine step over all sequences
    max_step_tokens: int
    #: context length of the model, prompt and output together
    max_len: int
    #: the model's own ends of sequence
    eos_token_ids: tuple[int, ...] = ()
    bytes_per_page: int = 0
    #: ids at or above it do not exist; None: not checked
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_running", "max_step_tokens", "max_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1 (configs: engine, model)")

    @property
    def max_rows(self) -> int:
        """Sequences that really run at once: each decodes one token a step."""
        return min(self.max_running, self.max_step_tokens)

    def max_total_tokens(self, pool_tokens: int) -> int:
        """Tokens at which a request ends with `length`: the last one sampled needs no KV of its own."""
        return min(self.max_len, pool_tokens + 1)


def problem(request: Request, limits: SchedulerLimits, pool_tokens: int) -> str | None:
    """Why this request can never be served by this rank, or None.

    The doors check their fields with names and limits of their own; this is the last look before a request could
    fail a whole step, so it covers whatever indexes a tensor.
    """
    num_tokens = request.num_prompt_tokens
    if len(request.tokens) % 4 or not num_tokens:
        return f"prompt is {len(request.tokens)} bytes; it must be int32 token ids, at least one"
    if num_tokens >= limits.max_len:
        return f"prompt has {num_tokens:,} tokens; this model takes {limits.max_len - 1:,} (configs: model.max_len)"
    if num_tokens > pool_tokens:
        return f"prompt has {num_tokens:,} tokens; the KV pool holds {pool_tokens:,} (configs: engine.num_pages)"
    return _unknown_token(request, limits.vocab_size) or _bad_sampling(request.sampling)


def _unknown_token(request: Request, vocab_size: int | None) -> str | None:
    if vocab_size is None:
        return None
    tokens = np.frombuffer(request.tokens, dtype=np.int32)
    params = request.sampling
    others = (*params.stop_token_ids, *(token_id for token_id, _ in params.logit_bias))
    lowest = min(int(tokens.min()), *others, 0)
    highest = max(int(tokens.max()), *others, 0)
    if lowest >= 0 and highest < vocab_size:
        return None
    return f"token id {lowest if lowest < 0 else highest} does not exist; this model has ids 0 to {vocab_size - 1}"


def _bad_sampling(params: SamplingParams) -> str | None:
    """Ranges as documented in `SamplingParams`; comparisons are written so that NaN fails them."""
    checks = (
        (params.max_new_tokens > 0, "max_new_tokens", params.max_new_tokens, "above 0"),
        (params.min_new_tokens >= 0, "min_new_tokens", params.min_new_tokens, "0 or more"),
        (0 <= params.temperature < math.inf, "temperature", params.temperature, "finite, 0 or more"),
        (0 < params.top_p <= 1, "top_p", params.top_p, "above 0, at most 1"),
        (params.top_k == -1 or params.top_k >= 1, "top_k", params.top_k, "-1 or at least 1"),
        (0 <= params.min_p <= 1, "min_p", params.min_p, "0 to 1"),
        (0 < params.repetition_penalty <= 2, "repetition_penalty", params.repetition_penalty, "above 0, at most 2"),
        (-2 <= params.presence_penalty <= 2, "presence_penalty", params.presence_penalty, "-2 to 2"),
        (-2 <= params.frequency_penalty <= 2, "frequency_penalty", params.frequency_penalty, "-2 to 2"),
        (params.num_logprobs is None or params.num_logprobs >= 0, "num_logprobs", params.num_logprobs, "0 or more"),
    )
    for is_good, name, value, wanted in checks:
        if not is_good:
            return f"{name} is {value}; it must be {wanted}"
    return None
