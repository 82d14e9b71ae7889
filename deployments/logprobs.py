"""Log-probabilities in the shapes of the three APIs."""

from __future__ import annotations

import codecs
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


class TextOffsets:
    """Where each token of one answer begins, in characters of its text, whatever is held back from the client."""

    __slots__ = ("_num_characters", "_utf8")

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_characters = 0

    def next(self, token: bytes) -> int:
        """Offset of the next token. One that goes on with a half character has that character's offset."""
        offset = self._num_characters
        self._num_characters += len(self._utf8.decode(token))
        return offset


def completion_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offsets: TextOffsets, tokenizer: Tokenizer
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. offsets: has seen the tokens before these, and sees these."""
    pairs = list(zip(token_ids, logprobs, strict=True))
    return {
        "tokens": [_name(token_id, tokenizer) for token_id in token_ids],
        "token_logprobs": [_finite(one.logprob) for one in logprobs],
        "top_logprobs": [_by_name(token_id, one, tokenizer) for token_id, one in pairs],
        "text_offset": [offsets.next(tokenizer.token_bytes(token_id)) for token_id in token_ids],
    }


def _by_name(token_id: int, one: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, float]:
    """The likeliest tokens, and always the chosen one: OpenAI's up to `logprobs + 1` entries."""
    named: dict[str, float] = {}
    for top, logprob in zip(one.top_ids, one.top_logprobs, strict=True):
        named.setdefault(_name(top, tokenizer), _finite(logprob))
    named[_name(token_id, tokenizer)] = _finite(one.logprob)
    return named


def _name(token_id: int, tokenizer: Tokenizer) -> str:
    """A token's text; of one that is no whole characters its bytes, as OpenAI writes them: `bytes:\\xe2\\x82`."""
    token = tokenizer.token_bytes(token_id)
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


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
