"""What every HTTP route shares: the key check, the error table, JSON in and out."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from configs.errors import TidegateError
from deployments.auth import Access, Keys
from deployments.bodies import Body, parse_body
from deployments.core import ApiCore
from deployments.errors import (
    Dialect,
    TransportError,
    as_tidegate_error,
    headers,
    http_status,
    native_error,
    openai_error,
)
from deployments.http.bodies import read_json_object
from deployments.http.streaming import ClientGone

log = logging.getLogger(__name__)

B = TypeVar("B", bound=Body)
Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


@dataclass(frozen=True, slots=True)
class Door:
    """One Api replica's HTTP side: what its routes need."""

    core: ApiCore
    keys: Keys
    max_body_bytes: int
    #: largest `timeout` that a control route takes
    max_timeout_s: float
    #: seconds since 1970, shown as `created`; decides nothing
    unix_time_s: Callable[[], float]
    #: seconds that never go back, for latencies
    clock_s: Callable[[], float]

    def route(
        self, path: str, handler: Handler, access: Access, dialect: Dialect, methods: Sequence[str] = ("POST",)
    ) -> Route:
        """A route whose handler runs only with the right key, and whose errors speak `dialect`."""

        async def endpoint(request: Request) -> Response:
            response = await self._answer(request, path, handler, access, dialect)
            self.core.counters.responses[path, response.status_code] += 1
            return response

        return Route(path, endpoint, methods=list(methods))

    async def _answer(
        self, request: Request, path: str, handler: Handler, access: Access, dialect: Dialect
    ) -> Response:
        try:
            self.keys.check(access, request.headers, request.client.host if request.client is not None else "")
            return await handler(request)
        except ClientGone:
            return Response(status_code=499)  # nobody reads it; nginx's number for "client closed request"
        except TidegateError as error:
            return error_response(error, dialect)
        except Exception as error:  # the edge of the process: the client gets a sentence, the log the rest
            log.exception("%s %s failed", request.method, path)
            return error_response(as_tidegate_error(error), dialect)

    async def body(self, request: Request, model: type[B]) -> tuple[B, dict[str, str]]:
        """The request's body as a `model`, and response headers that name the fields that were not used."""
        content = await read_json_object(request, self.max_body_bytes)
        body, ignored = parse_body(model, content)
        names = [name[:64] for name in ignored if name.isascii() and name.replace("_", "").isalnum()]
        return body, {"x-tidegate-ignored-fields": ",".join(names)} if names else {}


def caller_of(request: Request, path: str) -> str:
    """Which door a control call came through, and from where: for the audit log."""
    peer = request.client.host[:64] if request.client is not None else ""
    return f"http:{path} from {peer}" if peer and peer.isprintable() else f"http:{path}"


def error_response(error: TidegateError, dialect: Dialect) -> Response:
    status = http_status(error)
    if dialect == "text":
        return PlainTextResponse(error.message + "\n", status_code=status, headers=headers(error))
    content = openai_error(error) if dialect == "openai" else native_error(error)
    return JsonResponse(content, status_code=status, headers=headers(error))


async def unrouted(request: Request, error: Exception) -> Response:
    """404 and 405 of the router itself, in the dialect that the path suggests."""
    assert isinstance(error, HTTPException)
    dialect: Dialect = "openai" if request.url.path.startswith("/v1/") else "native"
    reason = {
        404: f"there is no route {request.url.path[:200]}",
        405: f"{request.method} is not allowed on {request.url.path[:200]}",
    }.get(error.status_code, error.detail)
    response = error_response(TransportError(error.status_code, reason), dialect)
    response.headers.update(error.headers or {})
    return response
