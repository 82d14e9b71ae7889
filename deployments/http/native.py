"""/generate and /abort_request: SGLang's native contract."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from configs.errors import InvalidField
from deployments.core import ApiCore
from deployments.http.door import Door, JsonResponse, caller_of
from deployments.http.native_shapes import AnswerShape
from deployments.http.streaming import EventStream, event, first_of, unless_gone
from deployments.native_jobs import native_jobs
from deployments.native_models import AbortBody, GenerateBody
from deployments.sequences import Answer, Piece, SequenceJob, collected

#: chosen ones and alternatives of one sequence of a stream: 1.3 MB in its last event
MAX_STREAMED_LOGPROBS = 32_768


@dataclass(frozen=True, slots=True)
class NativeRoutes:
    door: Door

    @property
    def core(self) -> ApiCore:
        return self.door.core

    def routes(self) -> list[Route]:
        route = self.door.route
        return [
            route("/generate", self.generate, "inference", "native", methods=("POST", "PUT")),
            route("/abort_request", self.abort, "admin", "native"),
        ]

    async def generate(self, request: Request) -> Response:
        began_s = self.door.clock_s()
        body, headers = await self.door.body(request, GenerateBody)
        self.core.check_model(body.model)
        jobs, request_id = await native_jobs(self.core, body)
        if body.stream:
            _bound_logprobs(jobs)
        shape = AnswerShape(jobs, body.return_text_in_logprobs, self.core.tokenizer, self.door.clock_s, began_s)
        pieces = self.core.stream(request_id, jobs)
        is_list = body.is_list or len(jobs) > 1
        if body.stream:
            first = await first_of(pieces, request.receive)
            return EventStream(_events(first, pieces, shape, is_list), pieces, headers)
        answers = await unless_gone(request.receive, collected(pieces, len(jobs)))
        whole = [shape.whole(answer, index) for index, answer in enumerate(answers)]
        return JsonResponse(whole if is_list else whole[0], headers=headers)

    async def abort(self, request: Request) -> Response:
        """End one request by its exact id, or all. Says of an id that no rank knows it that it is unknown."""
        body, headers = await self.door.body(request, AbortBody)
        if not body.rid and not body.abort_all:
            raise InvalidField("rid is empty; name a request, or set abort_all", "rid")
        caller = caller_of(request, "/abort_request")
        answer = await self.core.abort(None if body.abort_all else body.rid, caller)
        is_unknown = not body.abort_all and answer.get("success") is True and not answer.get("num_aborted")
        if is_unknown:
            answer |= {"status": "unknown", "message": f"no rank knows {body.rid!r}; it may have ended already"}
        return JsonResponse(answer, status_code=answer.get("http_status", 200), headers=headers)


def _bound_logprobs(jobs: Sequence[SequenceJob]) -> None:
    """Every event of a stream repeats all log-probabilities before it, so the work grows with their square."""
    for job in jobs:
        num_logprobs, max_new = job.sampling.num_logprobs, job.sampling.max_new_tokens
        if num_logprobs is not None and max_new * (num_logprobs + 1) > MAX_STREAMED_LOGPROBS:
            raise InvalidField(
                f"top_logprobs_num: {max_new:,} tokens with {num_logprobs} alternatives each are too many to stream; "
                f"(1 + alternatives) * max_new_tokens may be {MAX_STREAMED_LOGPROBS:,}, or leave stream out",
                "top_logprobs_num",
            )


async def _events(
    first: Piece, rest: AsyncGenerator[Piece, None], shape: AnswerShape, is_list: bool
) -> AsyncGenerator[bytes, None]:
    """One event per piece with all that is known of its sequence: text, ids and counts are cumulative."""
    answers = [Answer() for _ in range(shape.num_sequences)]

    def of(piece: Piece) -> bytes:
        answers[piece.index].add(piece)
        content = shape.whole(answers[piece.index], piece.index)
        return event(content | {"index": piece.index} if is_list else content)

    yield of(first)
    async for piece in rest:
        yield of(piece)
