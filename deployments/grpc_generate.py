"""Generate over gRPC: the message as the body of SGLang's /generate, and pieces of sequences as messages.

One body for both doors means one set of ranges and refusals. No I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.errors import InvalidField
from deployments.bodies import parse_body
from deployments.native_models import GenerateBody
from deployments.protos import scheduler
from deployments.sequences import Answer, Finish, Piece
from engine.request import TokenLogprobs

#: numbers whose zero, which is also what an absent field reads as in proto3, is out of range and means "off"
_OFF_AT_ZERO = {"top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "n": 1}


def body_of(request: scheduler.GenerateRequest) -> GenerateBody:
    """The message as a checked body. Raises InvalidField naming the field."""
    if request.HasField("mm_inputs"):
        raise InvalidField("mm_inputs: only text is offered", "mm_inputs")
    if request.HasField("disaggregated_params"):
        raise InvalidField("disaggregated_params: prefill and decode are not split here", "disaggregated_params")
    if not request.tokenized.input_ids:
        raise InvalidField("tokenized.input_ids is empty; the prompt must come as token ids", "tokenized.input_ids")
    content: dict[str, Any] = {
        "input_ids": list(request.tokenized.input_ids),
        "sampling_params": _sampling_of(request.sampling_params) if request.HasField("sampling_params") else {},
        "rid": request.request_id or None,
        "stream": request.stream,
        "return_logprob": request.return_logprob,
        "top_logprobs_num": request.top_logprobs_num,
        "token_ids_logprob": list(request.token_ids_logprob),
        # 0 is also what a client sends that has never heard of the field
        "logprob_start_len": request.logprob_start_len or -1,
        "return_hidden_states": request.return_hidden_states,
        "input_embeds": list(request.input_embeds[:1]),
        "lora_id": request.lora_id,
        "custom_logit_processor": request.custom_logit_processor,
    }
    if request.HasField("data_parallel_rank"):
        content["data_parallel_rank"] = request.data_parallel_rank
    body, _ = parse_body(GenerateBody, content)
    return body


def chunk(request_id: str, piece: Piece, answer: Answer) -> scheduler.GenerateResponse:
    """The new tokens of one sequence, with its counts so far (`answer` includes them)."""
    message = scheduler.GenerateStreamChunk(
        token_ids=piece.token_ids,
        prompt_tokens=piece.stats.num_prompt_tokens,
        completion_tokens=len(answer.token_ids),
        cached_tokens=piece.stats.num_cached_tokens,
        index=piece.index,
        output_logprobs=_logprobs(piece.token_ids, piece.logprobs),
    )
    return scheduler.GenerateResponse(request_id=request_id, chunk=message)


def complete(request_id: str, index: int, answer: Answer) -> scheduler.GenerateResponse:
    """The whole of one sequence, after its last piece."""
    assert answer.finish is not None, "a sequence is complete after its last piece"
    message = scheduler.GenerateComplete(
        output_ids=answer.token_ids,
        finish_reason=answer.finish.reason,
        prompt_tokens=answer.stats.num_prompt_tokens,
        completion_tokens=len(answer.token_ids),
        cached_tokens=answer.stats.num_cached_tokens,
        index=index,
        output_logprobs=_logprobs(answer.token_ids, answer.logprobs),
        **_matched(answer.finish),
    )
    return scheduler.GenerateResponse(request_id=request_id, complete=message)


def _sampling_of(params: scheduler.SamplingParams) -> dict[str, Any]:
    constraint = params.WhichOneof("constraint")
    given: dict[str, Any] = {
        "temperature": params.temperature,
        "min_p": params.min_p,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_token_ids),
        "skip_special_tokens": params.skip_special_tokens,
        "min_new_tokens": params.min_new_tokens,
        "ignore_eos": params.ignore_eos,
        "no_stop_trim": params.no_stop_trim,
        "logit_bias": dict(params.logit_bias),
        "custom_params": {"set": True} if params.custom_params.fields else {},
    }
    if params.HasField("max_new_tokens"):
        given["max_new_tokens"] = params.max_new_tokens
    if constraint is not None:
        given["ebnf" if constraint == "ebnf_grammar" else constraint] = getattr(params, constraint)
    return given | {name: getattr(params, name) or off for name, off in _OFF_AT_ZERO.items()}


def _matched(finish: Finish) -> dict[str, Any]:
    if isinstance(finish.matched, str):
        return {"matched_stop_str": finish.matched}
    return {} if finish.matched is None else {"matched_token_id": finish.matched}


def _logprobs(token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> scheduler.OutputLogProbs | None:
    if logprobs is None:
        return None
    tops = [scheduler.TopLogProbs(values=one.top_logprobs, token_ids=one.top_ids) for one in logprobs]
    chosen = [one.logprob for one in logprobs]
    return scheduler.OutputLogProbs(token_logprobs=chosen, token_ids=token_ids, top_logprobs=tops)
