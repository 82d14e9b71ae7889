"""One request inside the scheduler: its tokens, how many of them have KV, and what its answer will say.

Token ids are data and survive everything; KV belongs to one admission (`hold`) and dies with it.
"""

from __future__ import annotations

from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from cache.device_cache import PageHold
from cache.types import Namespace, TokenBytes
from engine.batch import SampleRow
from engine.grammar_state import GrammarState
from engine.request import FinishReason, Output, Request, RequestStats, TokenLogprobs


class Sequence:
    """Written by the scheduler only. `hold is None` while it waits."""

    __slots__ = (
        "_kv_epoch",
        "_num_cached",
        "_num_loaded",
        "_tokens",
        "abort_reason",
        "arrived_s",
        "first_token_s",
        "grammar",
        "hold",
        "last_token",
        "load",
        "matched_stop",
        "max_tokens",
        "namespace",
        "num_computed",
        "num_generated",
        "num_retractions",
        "num_tokens",
        "order",
        "queue_s",
        "request",
        "seed",
        "stop_ids",
    )

    def __init__(
        self, request: Request, order: int, arrived_s: float, max_total_tokens: int, eos_ids: frozenset[int]
    ) -> None:
        params = request.sampling
        self.request = request
        self.namespace = Namespace(request.namespace)
        #: place in the line of arrivals; lower is older, and the oldest one never has to give way
        self.order = order
        self.arrived_s = arrived_s
        #: prompt and output tokens; the last one's KV is computed when the next token is wanted
        self.num_tokens = request.num_prompt_tokens
        #: tokens whose KV is in the hold's pages
        self.num_computed = 0
        self.num_generated = 0
        #: total at which it ends with `length`
        self.max_tokens = min(max_total_tokens, self.num_tokens + params.max_new_tokens)
        #: pages and admission; None while it waits
        self.hold: PageHold | None = None
        #: the copy from the host tier that it waits for: until that has ended nothing of it is computed
        self.load: int | None = None
        #: set when it was to be aborted while a step with it was out; it ends with that step
        self.abort_reason: str | None = None
        self.num_retractions = 0
        #: ids that end it; banned from the sampler's choice until min_new_tokens were generated
        may_outlive_eos = params.ignore_eos and params.grammar is None
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if may_outlive_eos else eos_ids)
        #: where the output stands in the grammar that it must follow; None: it need not follow any
        self.grammar = None if params.grammar is None else GrammarState(params.grammar)
        self.matched_stop: int | None = None
        #: a request without a seed gets one from its id, so that a replay of a run gives the same tokens
        self.seed = params.seed if params.seed is not None else crc32(request.request_id.encode())
        self.last_token = 0
        #: seconds from arrival to first admission, to first token; None until then
        self.queue_s: float | None = None
        self.first_token_s: float | None = None
        #: prompt tokens found in the cache at the first admission; lowest epoch reused at any
        self._num_cached = 0
        #: further prompt tokens loaded from the host tier at the first admission
        self._num_loaded = 0
        self._kv_epoch: int | None = None
        #: int32 [max_tokens]; made at the first admission, so that a deep queue costs only its prompts
        self._tokens: NDArray[np.int32] | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 when it decodes."""
        return self.num_tokens - self.num_computed

    @property
    def tokens(self) -> NDArray[np.int32]:
        """int32 [num_tokens], prompt and output; a view."""
        if self._tokens is None:
            return np.frombuffer(self.request.tokens, dtype=np.int32)
        return self._tokens[: self.num_tokens]

    def tokens_ahead(self, num_tokens: int) -> NDArray[np.int32]:
        """The next tokens to compute; a view."""
        return self.tokens[self.num_computed : self.num_computed + num_tokens]

    def token_bytes(self, num_tokens: int) -> TokenBytes:
        """The first `num_tokens` tokens as the cache takes them."""
        if num_tokens == self.request.num_prompt_tokens:
            return self.request.tokens
        return self.tokens[:num_tokens].tobytes()

    def admit(self, hold: PageHold, now_s: float) -> None:
        """A new admission: KV of the hold's cached tokens, nothing else."""
        if self._tokens is None:
            self._tokens = np.empty(self.max_tokens, dtype=np.int32)
            self._tokens[: self.num_tokens] = np.frombuffer(self.request.tokens, dtype=np.int32)
            self.last_token = int(self._tokens[self.num_tokens - 1])
            self._num_cached = hold.num_cached_tokens
            self.queue_s = now_s - self.arrived_s
        self.hold = hold
        self.num_computed = hold.num_cached_tokens
        if hold.kv_epoch is not None:
            self._kv_epoch = hold.kv_epoch if self._kv_epoch is None else min(self._kv_epoch, hold.kv_epoch)

    def take_loaded(self, num_tokens: int) -> None:
        """The load it waited for has ended: the KV of `num_tokens` more tokens is in its pages."""
        assert self.hold is not None, f"{self.request_id} holds no pages"
        self.load = None
        self.num_computed += num_tokens
        if self.num_retractions == 0:
            self._num_loaded = num_tokens
        if num_tokens:
            self._kv_epoch = self.hold.epoch if self._kv_epoch is None else min(self._kv_epoch, self.hold.epoch)

    def leave(self) -> PageHold:
        """The admission is over; its pages go back to the caller, the tokens stay."""
        hold = self.hold
        assert hold is not None, f"{self.request_id} holds no pages"
        self.hold = None
        self.num_computed = 0
        return hold

    def append(self, token: int, now_s: float) -> FinishReason | None:
        """Take a sampled token in; why the sequence ends with it, or None."""
        assert self._tokens is not None, "a token was sampled before the first admission"
        self._tokens[self.num_tokens] = token
        self.last_token = token
        self.num_tokens += 1
        self.num_generated += 1
        if self.first_token_s is None:
            self.first_token_s = now_s - self.arrived_s
        if token in self.stop_ids:
            self.matched_stop = token
            return "stop"
        return "length" if self.num_tokens >= self.max_tokens else None

    def sample_row(self) -> SampleRow:
        """What the sampler has to know for the next token."""
        params = self.request.sampling
        num_prompt = self.request.num_prompt_tokens
        wants_prompt = params.repetition_penalty != 1.0
        wants_output = wants_prompt or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        return SampleRow(
            params,
            self.seed,
            self.num_generated,
            # the prompt never changes, the output goes on
            np.frombuffer(self.request.tokens, dtype=np.int32) if wants_prompt else None,
            self.tokens[num_prompt:].copy() if wants_output else None,
            tuple(sorted(self.stop_ids)) if self.num_generated < params.min_new_tokens else (),
            self.grammar,
            None if self.grammar is None else self.tokens[num_prompt + self.grammar.num_taken :].copy(),
        )

    def output(self, token: int, logprobs: TokenLogprobs | None, finish: FinishReason | None) -> Output:
        """The part of the answer that `token` is; with the facts when it is the first or the last part."""
        return Output(
            self.request.request_id,
            self.request.attempt,
            [token],
            None if logprobs is None else [logprobs],
            finish,
            self.matched_stop,
            "",
            self.stats() if finish is not None or self.num_generated == 1 else None,
        )

    def ended(self, finish: FinishReason, message: str) -> Output:
        """The last part of the answer, without a token."""
        return Output(self.request.request_id, self.request.attempt, [], None, finish, None, message, self.stats())

    def stats(self) -> RequestStats:
        return RequestStats(
            num_prompt_tokens=self.request.num_prompt_tokens,
            num_cached_tokens=self._num_cached + self._num_loaded,
            kv_epoch=self._kv_epoch,
            num_retractions=self.num_retractions,
            queue_s=self.queue_s or 0.0,
            first_token_s=self.first_token_s or 0.0,
            cached_by_tier={"device": self._num_cached, "host": self._num_loaded},
        )
