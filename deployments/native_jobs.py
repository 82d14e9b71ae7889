"""The sequences that a body of SGLang's /generate asks for; the same for HTTP and gRPC."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from configs.errors import InvalidField
from deployments.core import ApiCore
from deployments.grammar_fields import checked, one_grammar
from deployments.native_models import DEFAULT_NEW_TOKENS, GenerateBody, SamplingBody
from deployments.sampling import sampling_params
from deployments.sampling_fields import seed_of_choice, stop_strings
from deployments.sequences import SequenceJob, sequence_ids
from engine.request import Grammar, SamplingParams

T = TypeVar("T")


async def native_jobs(core: ApiCore, body: GenerateBody) -> tuple[list[SequenceJob], str]:
    """One job per prompt and choice, in the order of the answers, and the id of the whole."""
    prompts = _prompts(body)
    samplings = _each(body.sampling_params or SamplingBody(), len(prompts), "sampling_params")
    core.check_count(sum(sampling.n for sampling in samplings))
    request_id = body.rid if isinstance(body.rid, str) else secrets.token_hex(16)
    ids = _ids(body, request_id, samplings)
    logprobs = _num_logprobs(body, len(prompts))
    param = "text" if body.text is not None else "input_ids"
    encoded = await core.prompt_tokens(prompts, param)
    jobs: list[SequenceJob] = []
    for tokens, sampling, num_logprobs in zip(encoded, samplings, logprobs, strict=True):
        params = _sampling(core, sampling, tokens, num_logprobs, await _grammar(sampling))
        for choice in range(sampling.n):
            seeded = replace(params, seed=seed_of_choice(params.seed, choice))
            jobs.append(_job(body, sampling, ids[len(jobs)], tokens, seeded))
    return jobs, request_id


async def _grammar(body: SamplingBody) -> Grammar | None:
    grammar, field = one_grammar(
        regex=body.regex, ebnf=body.ebnf, json_schema=body.json_schema, within="sampling_params."
    )
    return await checked(grammar, field)


def _sampling(
    core: ApiCore, body: SamplingBody, tokens: bytes, num_logprobs: int | None, grammar: Grammar | None
) -> SamplingParams:
    asked_as = "sampling_params.max_new_tokens"
    return sampling_params(
        core,
        body,
        seed=body.sampling_seed,
        max_new_tokens=core.new_tokens(len(tokens) // 4, body.max_new_tokens, DEFAULT_NEW_TOKENS, asked_as),
        min_new_tokens=body.min_new_tokens,
        num_logprobs=num_logprobs,
        grammar=grammar,
        min_tokens_param="sampling_params.min_new_tokens",
    )


def _job(
    body: GenerateBody, sampling: SamplingBody, request_id: str, tokens: bytes, params: SamplingParams
) -> SequenceJob:
    return SequenceJob(
        request_id=request_id,
        tokens=tokens,
        sampling=params,
        stops=stop_strings(sampling.stop),
        keep_stop=sampling.no_stop_trim,
        skip_special_tokens=sampling.skip_special_tokens,
        namespace=body.extra_key or "",
        rank=body.routed_dp_rank if body.routed_dp_rank is not None else body.data_parallel_rank,
    )


def _prompts(body: GenerateBody) -> Sequence[str | list[int]]:
    prompts: Any = body.text if body.text is not None else body.input_ids
    prompts = prompts if body.is_list else [prompts]
    if not prompts:
        raise InvalidField("the list of prompts is empty", "text")
    return prompts


def _ids(body: GenerateBody, request_id: str, samplings: Sequence[SamplingBody]) -> list[str]:
    """Ids of all sequences: a list of ids names the prompts, one id names the whole."""
    counts = [sampling.n for sampling in samplings]
    if not isinstance(body.rid, list):
        return sequence_ids(request_id, sum(counts))
    ids = _each(body.rid, len(counts), "rid")
    if len(set(ids)) < len(ids):
        raise InvalidField("rid: the ids of one request must differ", "rid")
    return [child for rid, count in zip(ids, counts, strict=True) for child in sequence_ids(rid, count)]


def _num_logprobs(body: GenerateBody, count: int) -> list[int | None]:
    wanted = _each(body.return_logprob or False, count, "return_logprob")
    tops = _each(body.top_logprobs_num or 0, count, "top_logprobs_num")
    return [top if is_wanted else None for is_wanted, top in zip(wanted, tops, strict=True)]


def _each(value: T | list[T], count: int, param: str) -> list[T]:
    """One value for every prompt: the list as it is, or the one value for all."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InvalidField(f"{param} has {len(value)} entries for {count} prompts", param)
    return value
