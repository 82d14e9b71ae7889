"""SGLang's answer object of one sequence, the same for a stream's events and for a whole answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.logprobs import native_logprobs
from deployments.sequences import Answer, Finish, SequenceJob
from deployments.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What an answer needs besides the sequence itself."""

    jobs: Sequence[SequenceJob]
    with_text: bool
    tokenizer: Tokenizer
    clock_s: Callable[[], float]
    #: of `clock_s`, when the request came
    began_s: float

    @property
    def num_sequences(self) -> int:
        return len(self.jobs)

    def whole(self, answer: Answer, index: int) -> dict[str, Any]:
        """Everything known of sequence `index` so far; `finish_reason` is null until its end."""
        job = self.jobs[index]
        meta = self._facts(answer, job) | self._logprobs(answer)
        return {"text": answer.text, "output_ids": answer.token_ids, "meta_info": meta}

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

    def _logprobs(self, answer: Answer) -> dict[str, Any]:
        if answer.logprobs is None:
            return {}
        tokenizer = self.tokenizer if self.with_text else None
        chosen, tops = native_logprobs(answer.token_ids, answer.logprobs, tokenizer)
        return {
            "input_token_logprobs": [],
            "input_top_logprobs": [],
            "output_token_logprobs": chosen,
            "output_top_logprobs": tops,
        }


def finish_reason(finish: Finish, job: SequenceJob) -> dict[str, Any]:
    """SGLang's finish reasons: stop with what matched, length with the limit, abort with the reason."""
    if finish.reason == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.reason == "length":
        return {"type": "length", "length": job.sampling.max_new_tokens}
    return {"type": "abort", "message": finish.message, "status_code": None, "err_type": None}
