"""Log-probabilities in the shapes of the three APIs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deployments.tokenizer import Tokenizer
from engine.request import TokenLogprobs

#: JSON has no minus infinity; OpenAI's and vLLM's stand-in for a token that cannot be chosen
LEAST_LOGPROB = -9999.0


def chat_logprobs(token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""
    content = [
        _chat_token(token_id, one.logprob, tokenizer)
        | {
            "top_logprobs": [
                _chat_token(top, logprob, tokenizer) for top, logprob in zip(one.top_ids, one.top_logprobs, strict=True)
            ]
        }
        for token_id, one in zip(token_ids, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], text_offset: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. text_offset: characters of the answer before the first of these tokens."""
    tokens = [tokenizer.token_text(token_id) for token_id in token_ids]
    offsets: list[int] = []
    for token in tokens:
        offsets.append(text_offset)
        text_offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(one.logprob) for one in logprobs],
        "top_logprobs": [
            {
                tokenizer.token_text(top): _finite(logprob)
                for top, logprob in zip(one.top_ids, one.top_logprobs, strict=True)
            }
            for one in logprobs
        ],
        "text_offset": offsets,
    }


def native_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer | None
) -> tuple[list[Any], list[Any]]:
    """`output_token_logprobs` and `output_top_logprobs`: triples (logprob, token id, text or null).

    tokenizer: None leaves the text out, as SGLang does unless `return_text_in_logprobs` is set.
    """
    chosen = [_triple(one.logprob, token_id, tokenizer) for token_id, one in zip(token_ids, logprobs, strict=True)]
    tops = [
        [_triple(logprob, top, tokenizer) for top, logprob in zip(one.top_ids, one.top_logprobs, strict=True)]
        for one in logprobs
    ]
    return chosen, tops


def _chat_token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _triple(logprob: float, token_id: int, tokenizer: Tokenizer | None) -> list[Any]:
    return [_finite(logprob), token_id, None if tokenizer is None else tokenizer.token_text(token_id)]


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
