"""Profiles: /start_profile and /stop_profile, SGLang's contract with truthful codes, and /v1/profiles: rows of all
ranks, the list of traces, their bytes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from configs.errors import InvalidField, ServiceError, UnknownResource
from deployments.flush_surfaces import control_status
from deployments.http.bodies import read_json_object
from deployments.http.door import Door, JsonResponse
from deployments.seams import Controller


@dataclass(frozen=True, slots=True)
class ProfileRoutes:
    door: Door

    @property
    def controller(self) -> Controller:
        return self.door.core.controller

    def routes(self) -> list[Route]:
        route = self.door.route
        return [
            route("/start_profile", self.start_as_text, "admin", "text"),
            route("/stop_profile", self.stop_as_text, "admin", "text"),
            route("/v1/profiles/start", self.start, "admin", "openai"),
            route("/v1/profiles/stop", self.stop, "admin", "openai"),
            route("/v1/profiles", self.traces, "admin", "openai", methods=("GET",)),
            route("/v1/profiles/{name:path}", self.trace, "admin", "openai", methods=("GET",)),
        ]

    async def start_as_text(self, request: Request) -> Response:
        """200 if every rank has begun; 409 if one is under way, 400 for what a rank cannot do. The reason as text."""
        return _as_text(await self._start(request))

    async def stop_as_text(self, request: Request) -> Response:
        """Waits until the traces are written; 409 if no rank profiles."""
        return _as_text(await self.controller.stop_profile(_caller(request)))

    async def start(self, request: Request) -> Response:
        """The same with a row for each rank."""
        return _as_json(await self._start(request))

    async def stop(self, request: Request) -> Response:
        """The same with the traces of each rank."""
        return _as_json(await self.controller.stop_profile(_caller(request)))

    async def traces(self, request: Request) -> Response:
        """What is being recorded, and the traces that every node has, newest first. 503 if a rank is silent."""
        return _as_json(await self.controller.profiles())

    async def trace(self, request: Request) -> Response:
        """One trace (gzip of Chrome's trace format)."""
        name = request.path_params["name"]
        listed = await self.controller.profiles()
        row = next((row for row in listed.get("traces") or () if row["name"] == name), None)
        if row is None:
            raise UnknownResource(f"there is no trace {name[:200]!r}; GET /v1/profiles lists them", "name")
        first = await self._chunk(row, 0)
        filename = quote(name.rpartition("/")[2])
        headers = {
            "content-length": str(row["bytes"]),
            "content-disposition": f"attachment; filename*=utf-8''{filename}",
        }
        return StreamingResponse(self._chunks(row, first), media_type="application/gzip", headers=headers)

    async def _chunks(self, row: Mapping[str, Any], first: bytes) -> AsyncGenerator[bytes, None]:
        chunk, offset = first, 0
        while chunk:
            yield chunk
            offset += len(chunk)
            chunk = await self._chunk(row, offset) if offset < row["bytes"] else b""

    async def _chunk(self, row: Mapping[str, Any], offset: int) -> bytes:
        answer = await self.controller.read_profile(row["incarnation"], row["name"], offset)
        if answer.get("success") is not True:
            raise _refused(answer)
        return answer["data"]

    async def _start(self, request: Request) -> dict[str, Any]:
        content = await read_json_object(request, self.door.max_body_bytes) if _has_body(request) else {}
        return await self.controller.start_profile(content, _caller(request))


def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


def _as_text(answer: Mapping[str, Any]) -> Response:
    code = control_status(answer)
    message = str(answer.get("message") or answer.get("status"))
    notes = {row["message"] for row in answer.get("ranks") or () if row.get("message")} - {message}
    more = "".join(f" {note}" for note in sorted(notes)) if code == 200 else ""
    return PlainTextResponse(f"{message}{more}\n", status_code=code)


def _as_json(answer: Mapping[str, Any]) -> Response:
    code = control_status(answer)
    if code == InvalidField.http_status and "ranks" not in answer:
        raise InvalidField(str(answer.get("message")), answer.get("param"))
    return JsonResponse(answer, status_code=code)


def _refused(answer: Mapping[str, Any]) -> Exception:
    kind = UnknownResource if answer.get("http_status") == UnknownResource.http_status else ServiceError
    return kind(str(answer.get("message")))


def _caller(request: Request) -> str:
    return f"http:{request.url.path}"
