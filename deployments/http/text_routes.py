"""/tokenize and /detokenize: the served model's own tokenizer, for clients that count or cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.http.door import Door, JsonResponse
from deployments.native_models import DetokenizeBody, TokenizeBody
from deployments.tokenizer import in_thread_if_long


@dataclass(frozen=True, slots=True)
class TextRoutes:
    door: Door

    def routes(self) -> list[Route]:
        route = self.door.route
        return [
            route("/v1/tokenize", self.tokenize, "inference", "openai"),
            route("/tokenize", self.tokenize, "inference", "native"),
            route("/v1/detokenize", self.detokenize, "inference", "openai"),
            route("/detokenize", self.detokenize, "inference", "native"),
        ]

    async def tokenize(self, request: Request) -> Response:
        """Text, or a list of texts, to token ids. Nothing is checked against the context: that is the caller's sum.

        Counts as one sequence in flight: threads that tokenise are bounded as generations are.
        """
        body, headers = await self.door.body(request, TokenizeBody)
        self.door.core.check_model(body.model)
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        tokenizer = self.door.core.tokenizer

        def encode_all() -> list[list[int]]:
            encoded = [tokenizer.encode(text, add_special_tokens=body.add_special_tokens) for text in texts]
            return [np.frombuffer(tokens, dtype="<i4").tolist() for tokens in encoded]

        with self.door.core.admission.hold(1):
            lists = await in_thread_if_long(_length(texts), encode_all)
        counts = [len(ids) for ids in lists]
        is_one = isinstance(body.prompt, str)
        content = {
            "tokens": lists[0] if is_one else lists,
            "count": counts[0] if is_one else counts,
            "max_model_len": self.door.core.max_len,
        }
        return JsonResponse(content, headers=headers)

    async def detokenize(self, request: Request) -> Response:
        """Token ids, or a list of such lists, to text."""
        body, headers = await self.door.body(request, DetokenizeBody)
        self.door.core.check_model(body.model)
        is_many = bool(body.tokens) and isinstance(body.tokens[0], list)
        lists: list[list[int]] = body.tokens if is_many else [body.tokens]  # pyright: ignore[reportAssignmentType]
        for ids in lists:
            self.door.core.check_ids(ids, "tokens")
        tokenizer = self.door.core.tokenizer

        def decode_all() -> list[str]:
            return [tokenizer.decode(ids, skip_special_tokens=body.skip_special_tokens) for ids in lists]

        with self.door.core.admission.hold(1):
            texts = await in_thread_if_long(_length(lists), decode_all)
        return JsonResponse({"text": texts if is_many else texts[0]}, headers=headers)


def _length(parts: Sequence[str | list[int]]) -> int:
    """In characters, or what takes as long: each text costs as much as 32 of them, however short."""
    return sum(map(len, parts)) + 32 * len(parts)
