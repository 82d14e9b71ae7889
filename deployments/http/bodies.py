"""Reading what a client sent: size, content type, encoding, JSON. Everything that is off is a 4xx with the reason."""

from __future__ import annotations

import gc
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from configs.errors import InvalidField, PayloadTooLarge
from deployments.errors import TransportError

_JSON_TYPES = ("application/json", "text/json")


async def read_json_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object.

    Raises PayloadTooLarge before the rest of a large body is read, TransportError (415) for another content type,
    InvalidField for what is no JSON object, nests deeper than 1,024 levels or holds NaN.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in _JSON_TYPES and not content_type.endswith("+json"):
        raise TransportError(415, f"content-type must be application/json, got {content_type[:80] or 'none'!r}")
    try:
        content = _parsed(await _read(request, max_bytes))
    except orjson.JSONDecodeError as error:
        raise InvalidField(f"the body is not valid JSON: {error}", "body") from None
    if not isinstance(content, dict):
        raise InvalidField(f"the body must be a JSON object, got {type(content).__name__}", "body")
    return content


def _parsed(body: bytes) -> Any:
    """A million small lists make the collector look through the whole process a dozen times; none is garbage yet."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return orjson.loads(body)
    finally:
        if was_enabled:
            gc.enable()


async def _read(request: Request, max_bytes: int) -> bytes:
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise TransportError(415, f"content-encoding {encoding[:40]!r} is not accepted; send the body as it is")
    _refuse_too_large(_declared_length(request), max_bytes)
    body = bytearray()
    try:
        async for chunk in request.stream():
            _refuse_too_large(len(body) + len(chunk), max_bytes)
            body += chunk
    except ClientDisconnect:
        raise TransportError(400, "the client left before its request was complete") from None
    return bytes(body)


def _declared_length(request: Request) -> int:
    declared = request.headers.get("content-length", "0")
    return int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 19 else 0


def _refuse_too_large(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise PayloadTooLarge(f"the body is larger than {max_bytes:,} bytes (configs: api.max_body_bytes)", "body")
