"""One table that turns errors into what each dialect says. Nothing here shows a traceback, a pid or a path.

Dialects: `openai` (an error object), `native` (SGLang's flat object), `text` (SGLang's /flush_cache: the reason alone).
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Literal

from configs.errors import InvariantError, Overloaded, RequestError, ServiceError, TidegateError

Dialect = Literal["openai", "native", "text"]

_UNEXPECTED = "the server failed to answer this request; its log has the reason"


class TransportError(RequestError):
    """The HTTP request itself is off (method, content type, encoding), before any field of ours."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        Exception.__init__(self, status, message)
        self.message = message
        #: the header to blame
        self.param = param
        self.status = status


def as_tidegate_error(error: Exception) -> TidegateError:
    """What a caller may be told of any exception."""
    if isinstance(error, TidegateError):
        return error
    if isinstance(error, InvariantError):
        return ServiceError("a broken promise inside the server ended this request; its log has the story")
    return ServiceError(_UNEXPECTED)


def http_status(error: TidegateError) -> int:
    return error.status if isinstance(error, TransportError) else error.http_status


def headers(error: TidegateError) -> dict[str, str]:
    """Headers that belong to the error: when to come back, how to authenticate."""
    if isinstance(error, Overloaded):
        return {"retry-after": str(max(1, round(error.retry_after_s)))}
    if error.http_status == HTTPStatus.SERVICE_UNAVAILABLE and error.retryable:
        return {"retry-after": "2"}
    if error.http_status == HTTPStatus.UNAUTHORIZED:
        return {"www-authenticate": "Bearer"}
    return {}


def openai_error(error: TidegateError) -> dict[str, Any]:
    """OpenAI's error object: `{"error": {message, type, param, code}}`."""
    return {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.param if isinstance(error, RequestError) else None,
            "code": http_status(error),
        }
    }


def native_error(error: TidegateError) -> dict[str, Any]:
    """SGLang's error object."""
    status = http_status(error)
    return {
        "object": "error",
        "message": error.message,
        "type": HTTPStatus(status).phrase,
        "param": error.param if isinstance(error, RequestError) else None,
        "code": status,
    }
