"""OpenAI's response objects, whole and in chunks, from the pieces of the sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deployments.logprobs import TextOffsets, chat_logprobs, completion_logprobs
from deployments.sequences import Answer, Piece
from deployments.tokenizer import Tokenizer


class Shape(Protocol):
    """How one of the two routes writes its answers."""

    @property
    def request_id(self) -> str: ...

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]: ...

    def chunks(self, piece: Piece, answer: Answer, include_usage: bool) -> Iterator[dict[str, Any]]:
        """Chunks that show `piece`, none if it shows nothing. Adds it to `answer`, what came before it."""
        ...

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class _BaseShape:
    #: id, created, model
    head: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def request_id(self) -> str:
        return self.head["id"]


class CompletionShape(_BaseShape):
    __slots__ = ()

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": answer.text,
                "logprobs": self._logprobs(answer, TextOffsets()),
                "finish_reason": _finish(answer),
                "matched_stop": _matched(answer),
            }
            for index, answer in enumerate(answers)
        ]
        return self.head | {"object": "text_completion", "choices": choices, "usage": usage}

    def chunks(self, piece: Piece, answer: Answer, include_usage: bool) -> Iterator[dict[str, Any]]:
        answer.add(piece)
        if _shows_something(piece):
            choice = {
                "index": piece.index,
                "text": piece.text,
                "logprobs": self._logprobs(piece, answer.offsets),
                "finish_reason": _finish(piece),
                "matched_stop": _matched(piece),
            }
            yield self._chunk([choice], include_usage)

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._chunk([], False) | {"usage": usage}

    def _chunk(self, choices: list[dict[str, Any]], include_usage: bool) -> dict[str, Any]:
        chunk = self.head | {"object": "text_completion", "choices": choices}
        return chunk | {"usage": None} if include_usage else chunk

    def _logprobs(self, part: Answer | Piece, offsets: TextOffsets) -> dict[str, Any] | None:
        if part.logprobs is None:
            return None
        return completion_logprobs(part.token_ids, part.logprobs, offsets, self.tokenizer)


class ChatShape(_BaseShape):
    __slots__ = ()

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer),
                "finish_reason": _finish(answer),
                "matched_stop": _matched(answer),
            }
            for index, answer in enumerate(answers)
        ]
        return self.head | {"object": "chat.completion", "choices": choices, "usage": usage}

    def chunks(self, piece: Piece, answer: Answer, include_usage: bool) -> Iterator[dict[str, Any]]:
        is_first = not answer.token_ids and answer.finish is None
        answer.add(piece)
        if is_first:
            yield self._chunk(piece.index, {"role": "assistant", "content": ""}, include_usage)
        if piece.text or piece.logprobs:
            delta = {"content": piece.text}
            yield self._chunk(piece.index, delta, include_usage, logprobs=self._logprobs(piece))
        if piece.finish is not None:
            yield self._chunk(piece.index, {}, include_usage, finish=_finish(piece), matched=_matched(piece))

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self.head | {"object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        include_usage: bool,
        *,
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
        matched: int | str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish,
            "matched_stop": matched,
        }
        chunk = self.head | {"object": "chat.completion.chunk", "choices": [choice]}
        return chunk | {"usage": None} if include_usage else chunk

    def _logprobs(self, part: Answer | Piece) -> dict[str, Any] | None:
        if part.logprobs is None:
            return None
        return chat_logprobs(part.token_ids, part.logprobs, self.tokenizer)


def usage(answers: Sequence[Answer], num_choices: int) -> dict[str, Any]:
    """Token counts of a request. A prompt is counted once, however many choices it has."""
    prompts = [answer.stats for answer in answers[::num_choices]]
    num_prompt = sum(stats.num_prompt_tokens for stats in prompts)
    num_completion = sum(len(answer.token_ids) for answer in answers)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": sum(stats.num_cached_tokens for stats in prompts)},
    }


def _shows_something(piece: Piece) -> bool:
    return bool(piece.text or piece.logprobs or piece.finish is not None)


def _finish(part: Answer | Piece) -> str | None:
    return None if part.finish is None else part.finish.reason


def _matched(part: Answer | Piece) -> int | str | None:
    return None if part.finish is None else part.finish.matched
