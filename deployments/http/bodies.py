"""Reading what a client sent: size, content type, encoding, JSON. Everything that is off is a 4xx with the reason."""

from __future__ import annotations

import gc
import json
import math
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from configs.errors import InvalidField, PayloadTooLarge
from deployments.errors import TransportError

#: Python's own parser takes 10 times as long, and only looks for what to blame
_MAX_LOOK_AGAIN_BYTES = 16 * 1024
_JSON_TYPES = ("application/json", "text/json")


async def read_json_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object.

    Raises PayloadTooLarge before the rest of a large body is read, TransportError (415) for another content type,
    InvalidField for what is no JSON object, nests deeper than 1,024 levels or holds NaN.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in _JSON_TYPES and not content_type.endswith("+json"):
        message = f"content-type must be application/json, got {content_type[:80] or 'none'!r}"
        raise TransportError(415, message, "content-type")
    body = await _read(request, max_bytes)
    try:
        content = _parsed(body)
    except orjson.JSONDecodeError as error:
        path = _no_number(body)
        if path:
            raise InvalidField(f"{path}: JSON has no NaN and no infinity, and no number so large", path) from None
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


def _no_number(body: bytes) -> str | None:
    """Path of the first NaN or infinity of a body that is JSON but for it; None if it is not, or is too large."""
    if len(body) > _MAX_LOOK_AGAIN_BYTES:
        return None
    try:
        pending: list[tuple[str, Any]] = [("", json.loads(body))]
    except (ValueError, RecursionError):
        return None
    while pending:
        path, value = pending.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return path[:200]
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            inner = [(f"{path}.{name}" if path else str(name), one) for name, one in items]
            pending.extend(reversed(inner))
    return None


async def _read(request: Request, max_bytes: int) -> bytes:
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        message = f"content-encoding {encoding[:40]!r} is not accepted; send the body as it is"
        raise TransportError(415, message, "content-encoding")
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
