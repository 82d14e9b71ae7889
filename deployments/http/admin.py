"""Flushing the cache, and looking at it: /flush_cache (SGLang's contract) and /v1/cache (the whole verdict)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from actors.flush_request import seconds
from configs.errors import InvalidField
from deployments.flush_surfaces import judge
from deployments.http.bodies import read_json_object
from deployments.http.door import Door, JsonResponse
from deployments.tokenizer import in_thread_if_long

#: what float() takes beyond this (underscores, other alphabets' digits, spaces, words) no client means
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
#: of a flush as JSON; their values are checked by the controller, for every door alike
_FLUSH_FIELDS = frozenset({"timeout_s", "mode", "tiers", "scope", "flush_id", "dry_run"})


@dataclass(frozen=True, slots=True)
class AdminRoutes:
    door: Door

    def routes(self) -> list[Route]:
        route = self.door.route
        return [
            route("/flush_cache", self.flush_cache, "admin", "text", methods=("GET", "POST")),
            route("/v1/cache/flush", self.flush, "admin", "openai"),
            route("/v1/cache/flush/{flush_id}", self.flush_status, "admin", "openai", methods=("GET",)),
            route("/v1/cache", self.cache, "admin", "openai", methods=("GET",)),
        ]

    async def flush_cache(self, request: Request) -> Response:
        """SGLang's contract: `timeout` in the query, 200 or 400, the reason as text. Waits on the server."""
        arguments: dict[str, object] = {"caller": "http:/flush_cache"}
        given = request.query_params.getlist("timeout")
        if given:
            arguments["timeout_s"] = self._timeout(given[-1])
        outcome = judge(await self.door.core.controller.flush(arguments))
        return PlainTextResponse(outcome.native_text, status_code=outcome.native_status)

    async def flush(self, request: Request) -> Response:
        """JSON in, the whole verdict out, with the code that says what happened."""
        arguments = await read_json_object(request, self.door.max_body_bytes)
        for name in (name for name in arguments if name not in _FLUSH_FIELDS):
            raise InvalidField(f"unknown field {name[:64]!r}; there are {', '.join(sorted(_FLUSH_FIELDS))}", name[:64])
        arguments = await _with_prefix_tokens(self.door, arguments)
        answer = await self.door.core.controller.flush(arguments | {"caller": "http:/v1/cache/flush"})
        outcome = judge(answer)
        if outcome.http_status == InvalidField.http_status:
            raise InvalidField(outcome.message, answer.get("param"))
        return JsonResponse(answer, status_code=outcome.http_status)

    async def flush_status(self, request: Request) -> Response:
        """The answer of an earlier flush, late verdicts included. 200 says that it is known, not that it succeeded."""
        answer = await self.door.core.controller.flush_status(request.path_params["flush_id"])
        is_unknown = answer.get("success") is False and "flush_id" not in answer
        return JsonResponse(answer, status_code=answer.get("http_status", 404) if is_unknown else 200)

    async def cache(self, request: Request) -> Response:
        """Epoch, floor, pending flush, and the pages of every rank. 503 with the rows there are if a rank is silent."""
        status = await self.door.core.controller.status()
        return JsonResponse(status, status_code=status.get("http_status", 200))

    def _timeout(self, text: str) -> float:
        if _NUMBER.fullmatch(text) is None:
            raise InvalidField(f"timeout must be a number of seconds, got {text[:40]!r}", "timeout")
        return seconds(float(text), "timeout", self.door.max_timeout_s)


async def _with_prefix_tokens(door: Door, arguments: dict[str, Any]) -> dict[str, Any]:
    """A prefix given as text, as the tokens that the index knows it by."""
    scope = arguments.get("scope")
    if not isinstance(scope, dict) or "prefix_text" not in scope:
        return arguments
    text = scope["prefix_text"]
    if not isinstance(text, str) or not text:
        raise InvalidField("scope.prefix_text must be a non-empty text", "scope.prefix_text")
    tokens = await in_thread_if_long(len(text), lambda: door.core.tokenizer.encode(text))
    door.core.check_tokens(tokens, "scope.prefix_text")
    ids = memoryview(tokens).cast("i").tolist()
    return arguments | {
        "scope": {key: value for key, value in scope.items() if key != "prefix_text"} | {"prefix_tokens": ids}
    }
