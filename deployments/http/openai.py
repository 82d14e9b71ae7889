"""/v1/completions and /v1/chat/completions."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from configs.errors import InvalidField
from deployments.core import ApiCore
from deployments.grammar_fields import checked, one_grammar
from deployments.http.door import Door, JsonResponse
from deployments.http.openai_shapes import ChatShape, CompletionShape, Shape, usage
from deployments.http.streaming import EventStream, event, first_of, unless_gone
from deployments.openai_models import ChatBody, CompletionBody, OpenAIBody
from deployments.sampling import sampling_params
from deployments.sampling_fields import seed_of_choice, stop_strings
from deployments.sequences import Answer, Piece, SequenceJob, collected, sequence_ids
from engine.request import Grammar, SamplingParams


@dataclass(frozen=True, slots=True)
class OpenAIRoutes:
    door: Door

    @property
    def core(self) -> ApiCore:
        return self.door.core

    def routes(self) -> list[Route]:
        route = self.door.route
        return [
            route("/v1/completions", self.completions, "inference", "openai"),
            route("/v1/chat/completions", self.chat, "inference", "openai"),
        ]

    async def completions(self, request: Request) -> Response:
        body, headers = await self.door.body(request, CompletionBody)
        self.core.check_model(body.model)
        texts_or_ids = _prompts(body.prompt)
        self.core.check_count(len(texts_or_ids) * body.num_sequences)
        prompts = await self.core.prompt_tokens(texts_or_ids, "prompt")
        request_id = body.rid or body.request_id or f"cmpl-{secrets.token_hex(12)}"
        shape = CompletionShape(self._head(request_id, body), self.core.tokenizer)
        return await self._respond(request, body, prompts, "max_tokens", shape, headers)

    async def chat(self, request: Request) -> Response:
        body, headers = await self.door.body(request, ChatBody)
        self.core.check_model(body.model)
        self.core.check_count(body.num_sequences)
        tokens = await self.core.chat_tokens(
            [message.for_template for message in body.messages],
            continue_final=body.continue_final_message,
            options=body.chat_template_kwargs or {},
        )
        request_id = body.rid or body.request_id or f"chatcmpl-{secrets.token_hex(12)}"
        shape = ChatShape(self._head(request_id, body), self.core.tokenizer)
        asked_as = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        return await self._respond(request, body, [tokens], asked_as, shape, headers)

    async def _respond(
        self,
        request: Request,
        body: CompletionBody | ChatBody,
        prompts: Sequence[bytes],
        asked_as: str,
        shape: Shape,
        headers: dict[str, str],
    ) -> Response:
        grammar, field = one_grammar(regex=body.regex, ebnf=body.ebnf, response_format=body.response_format)
        jobs = self._jobs(shape.request_id, body, prompts, asked_as, await checked(grammar, field))
        pieces = self.core.stream(shape.request_id, jobs)
        if not body.stream:
            answers = await unless_gone(request.receive, collected(pieces, len(jobs)))
            return JsonResponse(shape.whole(answers, usage(answers, body.num_sequences)), headers=headers)
        first = await first_of(pieces, request.receive)
        return EventStream(_events(first, pieces, len(jobs), body, shape), pieces, headers)

    def _jobs(
        self,
        request_id: str,
        body: CompletionBody | ChatBody,
        prompts: Sequence[bytes],
        asked_as: str,
        grammar: Grammar | None,
    ) -> list[SequenceJob]:
        """One job per prompt and choice, choices of a prompt side by side, as OpenAI numbers them."""
        n = body.num_sequences
        ids = sequence_ids(request_id, len(prompts) * n)
        jobs: list[SequenceJob] = []
        for tokens in prompts:
            max_new = self.core.new_tokens(len(tokens) // 4, body.max_new_tokens, None, asked_as)
            sampling = self._sampling(body, max_new, grammar)
            for choice in range(n):
                jobs.append(
                    SequenceJob(
                        request_id=ids[len(jobs)],
                        tokens=tokens,
                        sampling=replace(sampling, seed=seed_of_choice(sampling.seed, choice)),
                        stops=stop_strings(body.stop),
                        keep_stop=body.no_stop_trim or body.include_stop_str_in_output,
                        skip_special_tokens=body.skip_special_tokens,
                        namespace=body.cache_salt or body.extra_key or "",
                        rank=body.data_parallel_rank,
                    )
                )
        return jobs

    def _sampling(
        self, body: CompletionBody | ChatBody, max_new_tokens: int, grammar: Grammar | None
    ) -> SamplingParams:
        return sampling_params(
            self.core,
            body,
            seed=body.seed,
            max_new_tokens=max_new_tokens,
            min_new_tokens=body.min_tokens,
            num_logprobs=body.num_logprobs,
            grammar=grammar,
            min_tokens_param="min_tokens",
        )

    def _head(self, request_id: str, body: OpenAIBody) -> dict[str, Any]:
        return {"id": request_id, "created": int(self.door.unix_time_s()), "model": self.core.card.name}


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidField("the prompt is empty; it needs at least one token", "prompt")
    if isinstance(prompt[0], int):
        return [prompt]  # pyright: ignore[reportReturnType]
    return list(prompt)  # pyright: ignore[reportReturnType]


async def _events(
    first: Piece, rest: AsyncGenerator[Piece, None], count: int, body: OpenAIBody, shape: Shape
) -> AsyncGenerator[bytes, None]:
    """One event per piece that shows something, then the usage if it was asked for."""
    answers = [Answer() for _ in range(count)]
    include_usage = body.include_usage
    for chunk in shape.chunks(first, answers[first.index], include_usage):
        yield event(chunk)
    async for piece in rest:
        for chunk in shape.chunks(piece, answers[piece.index], include_usage):
            yield event(chunk)
    if include_usage:
        yield event(shape.usage_chunk(usage(answers, body.num_sequences)))
