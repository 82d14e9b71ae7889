"""Flushing the cache, and looking at it: /flush_cache (SGLang's contract) and /v1/cache (the whole verdict)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from actors.flush_request import seconds
from configs.errors import InvalidField, RequestError, UnknownResource
from deployments.bodies import parse_body
from deployments.cache_report import cache_report
from deployments.flush_body import FlushBody, flush_arguments
from deployments.flush_surfaces import control_status, judge
from deployments.http.bodies import read_json_object
from deployments.http.door import Door, JsonResponse, caller_of
from deployments.seams import Controller

#: what float() takes beyond this (underscores, other alphabets' digits, spaces, words) no client means
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LIMIT = re.compile(r"\d{1,9}", re.ASCII)
_AUDIT_ENTRIES = 100


@dataclass(frozen=True, slots=True)
class AdminRoutes:
    door: Door

    @property
    def controller(self) -> Controller:
        return self.door.core.controller

    def routes(self) -> list[Route]:
        route, one_flush = self.door.route, "/v1/cache/flush/{flush_id}"
        return [
            route("/flush_cache", self.flush_cache, "admin", "text", methods=("GET", "POST")),
            route("/v1/cache/flush", self.flush, "admin", "openai"),
            route(one_flush, self.flush_status, "admin", "openai", methods=("GET",)),
            route(one_flush, self.cancel_flush, "admin", "openai", methods=("DELETE",)),
            route("/v1/cache", self.cache, "admin", "openai", methods=("GET",)),
            route("/v1/cache/audit", self.audit, "admin", "openai", methods=("GET",)),
        ]

    async def flush_cache(self, request: Request) -> Response:
        """SGLang's contract: `timeout` in the query, 200 or 400, the reason as text. Waits on the server."""
        arguments: dict[str, Any] = {"caller": caller_of(request, "/flush_cache")}
        given = request.query_params.getlist("timeout")
        if given:
            with self._noted(arguments | {"timeout": given[-1]}):
                arguments["timeout_s"] = self._timeout(given[-1])
        outcome = judge(await self.controller.flush(arguments))
        return PlainTextResponse(outcome.native_text, status_code=outcome.native_status)

    async def flush(self, request: Request) -> Response:
        """JSON in, the whole verdict out, with the code that says what happened."""
        caller: dict[str, Any] = {"caller": caller_of(request, "/v1/cache/flush")}
        with self._noted(caller):
            content = await read_json_object(request, self.door.max_body_bytes)
        with self._noted(content | caller):
            body, _ = parse_body(FlushBody, content)
            arguments = await flush_arguments(self.door.core, body)
        answer = await self.controller.flush(arguments | caller)
        return _told(answer, judge(answer).http_status)

    async def flush_status(self, request: Request) -> Response:
        """The answer of an earlier flush, late verdicts included. 200 says that it is known, not that it succeeded."""
        answer = await self.controller.flush_status(request.path_params["flush_id"])
        return _told(answer, 200 if "flush_id" in answer else control_status(answer))

    async def cancel_flush(self, request: Request) -> Response:
        """End a flush that has not begun. 409 with the flush's answer, or the reason, if it cannot be ended."""
        caller = caller_of(request, "/v1/cache/flush")
        answer = await self.controller.cancel_flush(request.path_params["flush_id"], caller)
        return _told(answer, control_status(answer))

    async def cache(self, request: Request) -> Response:
        """Tiers and their occupancy, epoch, floor, pending flush, and a row for every rank and node. 503 with the rows
        there are if a rank is silent."""
        answer = await self.controller.status()
        return _told(cache_report(answer), control_status(answer))

    async def audit(self, request: Request) -> Response:
        """The newest flushes and control calls, refused ones too, newest first: `limit` of all or of one id."""
        limit = request.query_params.get("limit", str(_AUDIT_ENTRIES))
        if _LIMIT.fullmatch(limit) is None:
            raise InvalidField(f"limit must be a whole number, got {limit[:40]!r}", "limit")
        answer = await self.controller.audit(int(limit), request.query_params.get("flush_id"))
        return _told(answer, control_status(answer))

    def _timeout(self, text: str) -> float:
        if _NUMBER.fullmatch(text) is None:
            raise InvalidField(f"timeout must be a number of seconds, got {text[:40]!r}", "timeout")
        return seconds(float(text), "timeout", self.door.max_timeout_s)

    @contextmanager
    def _noted(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """A flush that is refused in this block never comes to the controller; the audit log shows it all the same."""
        try:
            yield
        except RequestError as error:
            self.controller.note_refused("flush", arguments, error)
            raise


def _told(answer: Mapping[str, Any], code: int) -> Response:
    """A controller's answer with its code; what was wrong with the question in the error shape of all /v1 routes."""
    if code == InvalidField.http_status:
        raise InvalidField(str(answer.get("message")), answer.get("param"))
    if code == UnknownResource.http_status:
        raise UnknownResource(str(answer.get("message")), answer.get("param"))
    return JsonResponse(answer, status_code=code)
