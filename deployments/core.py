"""What an Api replica does, whatever the door: tokenise, check, place, stream, detokenise, stop, abort, flush.

HTTP and gRPC handlers call this and nothing below it. It keeps no model state: what it knows of ranks comes from the
fleet, what it asks of the control plane goes through the controller.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from configs.errors import Conflict, ContextOverflow, InvalidField, RankLost, ServiceError, UnknownModel
from deployments.admission import Admission
from deployments.detokenize import TextStream
from deployments.merge import merged
from deployments.model_card import ModelCard
from deployments.routing import Router
from deployments.sampling_fields import MAX_SEQUENCES
from deployments.seams import Controller, Fleet
from deployments.sequences import Piece, SequenceJob, SequenceText, ids_of_request
from deployments.tokenizer import Tokenizer, in_thread_if_long
from engine.request import Output, Request, SamplingParams

log = logging.getLogger(__name__)

#: times a sequence is sent in all, when the rank is lost before its first token
MAX_ATTEMPTS = 3


@dataclass(slots=True)
class ApiCounters:
    """Totals of one Api replica; they only rise. `actors.metrics` shows them."""

    num_sequences: int = 0
    #: sequences sent again because their rank was lost before the first token
    num_resent: int = 0
    #: sequences whose answer reused KV below the floor known at receipt; not one may ever be
    num_stale: int = 0
    #: (route, status) -> HTTP responses begun
    responses: Counter[tuple[str, int]] = field(default_factory=Counter)


@dataclass(slots=True)
class ApiCore:
    """Lives on one event loop."""

    card: ModelCard
    tokenizer: Tokenizer
    fleet: Fleet
    controller: Controller
    admission: Admission
    #: draws a seed in [0, 2^63) for a request that named none
    draw_seed: Callable[[], int] = lambda: secrets.randbits(63)
    #: draws a request's attempt. A client may send an id again as soon as the first stream has ended, while its rank
    #: still computes for it: counted from the time of day in ns, no two requests of an id ever share an attempt
    next_attempt: Callable[[], int] = field(default_factory=lambda: itertools.count(time.time_ns()).__next__)
    router: Router = field(default_factory=Router)
    counters: ApiCounters = field(default_factory=ApiCounters)
    #: rank -> outputs that came from it
    num_outputs: Counter[int] = field(default_factory=Counter)
    #: ids of the requests in flight here
    _inflight: set[str] = field(default_factory=set)

    @property
    def max_len(self) -> int:
        """Context length in tokens that every serving rank offers."""
        return min((member.max_len for member in self.fleet.members().members), default=self.card.max_len)

    # --- before anything runs -------------------------------------------------------------------------------------

    def check_model(self, name: str) -> None:
        """Raise UnknownModel unless `name` is the served model, or one of the names clients send for "whichever"."""
        if name not in (self.card.name, "default", "unknown"):
            raise UnknownModel(f"model {name[:200]!r} is not served here; this server has {self.card.name!r}", "model")

    def check_count(self, num_sequences: int) -> None:
        """Raise unless so many sequences may start now; asked before the work of tokenising them."""
        if num_sequences > MAX_SEQUENCES:
            raise InvalidField(f"the request asks for {num_sequences} sequences; the limit is {MAX_SEQUENCES}", "n")
        self.admission.check(num_sequences)

    async def prompt_tokens(self, prompts: Sequence[str | list[int]], param: str) -> list[bytes]:
        """Prompts as text or ids, as checked int32 bytes.

        Raises Overloaded when too many are being tokenised: long texts queue for threads, and hold their memory.
        """
        with self.admission.hold(len(prompts)):
            length = sum(map(len, prompts))
            encoded = await in_thread_if_long(length, lambda: [self._encode(prompt) for prompt in prompts])
        for tokens in encoded:
            self.check_tokens(tokens, param)
        return encoded

    def _encode(self, prompt: str | list[int]) -> bytes:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else np.asarray(prompt, dtype="<i4").tobytes()

    async def chat_tokens(
        self, messages: list[dict[str, str]], *, continue_final: bool, options: Mapping[str, Any]
    ) -> bytes:
        """A conversation through the model's chat template, as checked int32 bytes; see Tokenizer.render_chat."""

        def render_and_encode() -> bytes:
            text = self.tokenizer.render_chat(messages, continue_final=continue_final, options=options)
            # The template writes the special tokens itself.
            return self.tokenizer.encode(text, add_special_tokens=False)

        with self.admission.hold(1):
            length = sum(len(message["content"]) for message in messages)
            tokens = await in_thread_if_long(length, render_and_encode)
        self.check_tokens(tokens, "messages")
        return tokens

    def check_tokens(self, tokens: bytes, param: str) -> None:
        """Raise unless `tokens` (int32 bytes) is a prompt this model can read and leaves room for one more token."""
        num_tokens = len(tokens) // 4
        if num_tokens == 0:
            raise InvalidField("the prompt is empty; it needs at least one token", param)
        if num_tokens >= self.max_len:
            raise ContextOverflow(
                f"the prompt has {num_tokens:,} tokens; this model takes {self.max_len:,} for prompt and answer "
                "together (configs: model.max_len)",
                param,
            )
        self.check_ids([int(np.frombuffer(tokens, dtype="<i4").max())], param)

    def check_prefix(self, token_ids: Sequence[int], param: str) -> None:
        """Raise unless a prompt of this model could begin with these tokens."""
        if len(token_ids) > self.max_len:
            raise ContextOverflow(
                f"the prefix has {len(token_ids):,} tokens, more than the context of this model, {self.max_len:,}",
                param,
            )
        self.check_ids(token_ids, param)

    def new_tokens(self, num_prompt_tokens: int, asked: int | None, default: int | None, param: str) -> int:
        """Tokens to generate at most: what was asked for, or the default cut to what the context leaves.

        default: None means all the room there is. Raises ContextOverflow if `asked` does not fit.
        """
        room = self.max_len - num_prompt_tokens
        if asked is None:
            return room if default is None else min(default, room)
        if asked > room:
            raise ContextOverflow(
                f"{param} is {asked:,} and the prompt has {num_prompt_tokens:,} tokens; this model takes "
                f"{self.max_len:,} for both together, so {param} may be {room:,}",
                param,
            )
        return asked

    def check_sampling(self, sampling: SamplingParams, min_tokens_param: str) -> None:
        """What depends on the model or on two fields at once. Raises InvalidField naming the field."""
        self.check_ids(sampling.stop_token_ids, "stop_token_ids")
        self.check_ids([token_id for token_id, _ in sampling.logit_bias], "logit_bias")
        if sampling.min_new_tokens > sampling.max_new_tokens:
            raise InvalidField(
                f"{min_tokens_param} is {sampling.min_new_tokens:,}, more than the {sampling.max_new_tokens:,} tokens "
                "the answer may have",
                min_tokens_param,
            )

    def check_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Raise InvalidField unless every id is in the model's vocabulary."""
        highest = max(token_ids, default=0)
        if highest >= self.card.vocab_size:
            raise InvalidField(
                f"{param}: token id {highest} is not below the vocabulary's {self.card.vocab_size}", param
            )

    # --- generation -----------------------------------------------------------------------------------------------

    async def stream(self, request_id: str, jobs: Sequence[SequenceJob]) -> AsyncGenerator[Piece, None]:
        """Generate all `jobs`, yielding their pieces as they come; every job's last piece has `finish` set.

        request_id: by which `abort` finds all of them. Closing the generator aborts what still runs, at once.
        Raises Overloaded, NoRank, RankLost, Conflict (the id is in flight here) or ServiceError.
        """
        with self.admission.hold(len(jobs)), self._tracked(request_id, jobs):
            streams = [self._sequence(job, index) for index, job in enumerate(jobs)]
            async with aclosing(merged(streams)) as pieces:
                async for piece in pieces:
                    yield piece

    async def probe(self, job: SequenceJob) -> None:
        """Generate one sequence and drop it. Outside the admission's count: a full server is a healthy one.

        Raises as `stream`, but never Overloaded.
        """
        async with aclosing(self._sequence(job, 0)) as pieces:
            async for _ in pieces:
                pass

    async def abort(self, request_id: str | None, caller: str) -> dict[str, Any]:
        """End one request by its exact id, all its sequences with it; None: every request of every rank.

        Goes to the ranks through the controller and not to a table of this process: the stream may be another Api
        replica's. caller: for the audit log. Answers the controller's dict.
        """
        return await self.controller.abort(None if request_id is None else ids_of_request(request_id), caller)

    async def _sequence(self, job: SequenceJob, index: int) -> AsyncGenerator[Piece, None]:
        """One sequence from the first attempt to its last piece."""
        text = SequenceText(job, index, self._text_stream(job))
        self.counters.num_sequences += 1
        async with aclosing(self._outputs(job)) as outputs:
            async for output, rank in outputs:
                if output.finish == "error":
                    raise ServiceError(output.message or "the rank could not finish this request")
                piece = text.take(output, rank)
                yield piece
                if piece.finish is not None:
                    return
        raise RankLost("the rank ended this request's stream without an end")

    def _text_stream(self, job: SequenceJob) -> TextStream:
        return self.tokenizer.text_stream(job.tokens, skip_special_tokens=job.skip_special_tokens)

    async def _outputs(self, job: SequenceJob) -> AsyncGenerator[tuple[Output, int], None]:
        """Outputs of one sequence and the rank they come from; sent anew while no token was seen."""
        request = self._request(job)
        floor = self.fleet.members().floor
        lost: frozenset[str] = frozenset()
        for num_tries in itertools.count(1):
            is_begun = False
            try:
                with self.router.placed(
                    self.fleet.members(), job.tokens, job.namespace, rank=job.rank, avoid=lost
                ) as member:
                    lost |= {member.incarnation}
                    async with aclosing(self.fleet.generate(member.incarnation, request)) as outputs:
                        async for output in outputs:
                            is_begun = True
                            self._refuse_stale(output, floor)
                            self.num_outputs[member.rank] += 1
                            yield output, member.rank
                return
            except RankLost as error:
                if is_begun or num_tries >= MAX_ATTEMPTS:
                    raise
                log.warning("request_id=%s try=%d lost: %s", request.request_id, num_tries, error.message)
                self.counters.num_resent += 1
                request = replace(request, attempt=self.next_attempt())

    def _request(self, job: SequenceJob) -> Request:
        sampling = job.sampling
        if sampling.seed is None:
            sampling = replace(sampling, seed=self.draw_seed())
        return Request(job.request_id, job.tokens, sampling, job.namespace, self.next_attempt())

    def _refuse_stale(self, output: Output, floor: int) -> None:
        """The proof of the flush promise: no answer may rest on KV below the floor known when it was asked for."""
        kv_epoch = output.stats.kv_epoch if output.stats is not None else None
        if kv_epoch is not None and kv_epoch < floor:
            self.counters.num_stale += 1
            log.error("request_id=%s reused KV of epoch %d below floor %d", output.request_id, kv_epoch, floor)
            raise ServiceError("the answer would rest on KV that a flush has invalidated; it was stopped")

    @contextmanager
    def _tracked(self, request_id: str, jobs: Sequence[SequenceJob]) -> Iterator[None]:
        """Keep the id of the whole and those of its prompts, which a list of ids may name one by one."""
        ids = {request_id, *(job.request_id.partition("#")[0] for job in jobs)}
        for taken in ids & self._inflight:
            raise Conflict(f"a request with id {taken!r} is in flight; ids of running requests are unique", "rid")
        self._inflight |= ids
        try:
            yield
        finally:
            self._inflight -= ids
