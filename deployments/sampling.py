"""The engine's sampling parameters out of a body's fields, whichever route's names the body uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from deployments.core import ApiCore
from deployments.sampling_fields import bias_pairs, greedy_if_cold, seed_in_range
from engine.request import Grammar, SamplingParams


class SamplingFields(Protocol):
    """What bodies of all routes call the same. None: the field's neutral value."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float | None: ...
    @property
    def frequency_penalty(self) -> float | None: ...
    @property
    def ignore_eos(self) -> bool: ...
    @property
    def stop_token_ids(self) -> Sequence[int] | None: ...
    @property
    def logit_bias(self) -> dict[str, float] | None: ...


def sampling_params(
    core: ApiCore,
    body: SamplingFields,
    *,
    seed: int | None,
    max_new_tokens: int,
    min_new_tokens: int,
    num_logprobs: int | None,
    grammar: Grammar | None,
    min_tokens_param: str,
) -> SamplingParams:
    """Checked against the model. min_tokens_param: the name of `min_new_tokens` in this body, for errors.

    Raises InvalidField naming the field.
    """
    sampling = SamplingParams(
        temperature=greedy_if_cold(1.0 if body.temperature is None else body.temperature),
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=seed_in_range(seed),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        ignore_eos=body.ignore_eos,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        num_logprobs=num_logprobs,
        logit_bias=bias_pairs(body.logit_bias),
        grammar=grammar,
    )
    core.check_sampling(sampling, min_tokens_param)
    return sampling
