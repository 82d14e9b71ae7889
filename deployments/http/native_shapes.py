"""SGLang's answer object of one sequence, the same for a stream's events and for a whole answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from deployments.logprobs import native_logprobs
from deployments.sequences import Answer, Finish, SequenceJob
from deployments.tokenizer import Tokenizer


class _JsonList:
    """A JSON list that only grows: every item is written once, however often the whole is sent."""

    __slots__ = ("_json", "num_items")

    def __init__(self) -> None:
        self._json = bytearray()
        self.num_items = 0

    def extend(self, items: Sequence[Any]) -> None:
        if items:
            self._json += (b"," if self._json else b"") + orjson.dumps(items)[1:-1]
            self.num_items += len(items)

    def whole(self) -> orjson.Fragment:
        return orjson.Fragment(b"[%b]" % self._json)


@dataclass(frozen=True, slots=True)
class _Written:
    """What was written of one sequence so far."""

    token_ids: _JsonList = field(default_factory=_JsonList)
    chosen: _JsonList = field(default_factory=_JsonList)
    tops: _JsonList = field(default_factory=_JsonList)


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What an answer needs besides the sequence itself."""

    jobs: Sequence[SequenceJob]
    with_text: bool
    tokenizer: Tokenizer
    clock_s: Callable[[], float]
    #: of `clock_s`, when the request came
    began_s: float
    #: by index of the sequence
    _written: dict[int, _Written] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        return len(self.jobs)

    def whole(self, answer: Answer, index: int) -> dict[str, Any]:
        """Everything known of sequence `index` so far; `finish_reason` is null until its end."""
        written = self._written.setdefault(index, _Written())
        meta = self._facts(answer, self.jobs[index]) | self._logprobs(answer, written)
        written.token_ids.extend(answer.token_ids[written.token_ids.num_items :])
        return {"text": answer.text, "output_ids": written.token_ids.whole(), "meta_info": meta}

    def _facts(self, answer: Answer, job: SequenceJob) -> dict[str, Any]:
        stats = answer.stats
        return {
            "id": job.request_id,
            "finish_reason": None if answer.finish is None else finish_reason(answer.finish, job),
            "prompt_tokens": stats.num_prompt_tokens,
            "completion_tokens": len(answer.token_ids),
            "cached_tokens": stats.num_cached_tokens,
            "cached_tokens_details": stats.cached_by_tier or {"device": stats.num_cached_tokens},
            "weight_version": stats.weight_version,
            "num_retractions": stats.num_retractions,
            "kv_epoch": stats.kv_epoch,
            "dp_rank": answer.rank,
            "queue_time": stats.queue_s,
            "e2e_latency": self.clock_s() - self.began_s,
        }

    def _logprobs(self, answer: Answer, written: _Written) -> dict[str, Any]:
        if answer.logprobs is None:
            return {}
        tokenizer = self.tokenizer if self.with_text else None
        begin = written.chosen.num_items
        chosen, tops = native_logprobs(answer.token_ids[begin:], answer.logprobs[begin:], tokenizer)
        written.chosen.extend(chosen)
        written.tops.extend(tops)
        return {
            "input_token_logprobs": [],
            "input_top_logprobs": [],
            "output_token_logprobs": written.chosen.whole(),
            "output_top_logprobs": written.tops.whole(),
        }


def finish_reason(finish: Finish, job: SequenceJob) -> dict[str, Any]:
    """SGLang's finish reasons: stop with what matched, length with the limit, abort with the reason."""
    if finish.reason == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.reason == "length":
        return {"type": "length", "length": job.sampling.max_new_tokens}
    return {"type": "abort", "message": finish.message, "status_code": None, "err_type": None}
