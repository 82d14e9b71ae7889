"""From a server's refusal to the exception that belongs to it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.errors import (
    Conflict,
    ControlUnavailable,
    Forbidden,
    InvalidField,
    NoRank,
    NotOffered,
    Overloaded,
    PayloadTooLarge,
    RankLost,
    RequestError,
    ServiceError,
    TidegateError,
    Unauthorized,
    UnknownModel,
    UnknownResource,
)

Json = Mapping[str, Any]

_CLASSES = (UnknownModel, UnknownResource, Conflict, Unauthorized, Forbidden, PayloadTooLarge, NotOffered, Overloaded,
            NoRank, RankLost, ControlUnavailable)  # fmt: skip
#: by the `type` of an OpenAI error object
_BY_KIND: dict[str, type[TidegateError]] = {one.kind: one for one in _CLASSES}
#: native routes name no kind
_BY_STATUS: dict[int, type[TidegateError]] = {400: InvalidField, 401: Unauthorized, 403: Forbidden,
    404: UnknownResource, 405: InvalidField, 409: Conflict, 413: PayloadTooLarge, 415: InvalidField, 429: Overloaded,
    501: NotOffered, 503: NoRank}  # fmt: skip


def must_succeed(answer: Json) -> Json:
    """A control answer that says `success`; else raises what its `http_status` stands for."""
    if answer.get("success") is True:
        return answer
    code = answer.get("http_status")
    raise _error(code if isinstance(code, int) else 500, ControlUnavailable, answer)


def is_answer(answer: Json, status: int, answers_with: str) -> bool:
    """Is this what was asked for? Of refusals only those that hold the field `answers_with`, and no 400 or 404."""
    return status < 300 or (status not in (400, 404) and answers_with in answer)


def error_of(answer: Json, status: int, retry_after: str = "") -> TidegateError:
    """The error that an HTTP answer tells: OpenAI's object, SGLang's, or a control answer.

    retry_after: value of that header, in seconds; "" when there was none.
    """
    told = answer.get("error")
    if isinstance(told, Mapping):
        kind = _BY_KIND.get(str(told.get("type")), _BY_STATUS.get(status, ServiceError))
        return _made(kind, told, retry_after)
    is_native = answer.get("object") == "error"
    return _error(status, NoRank if is_native else ControlUnavailable, answer, retry_after)


def _error(status: int, unavailable: type[TidegateError], answer: Json, retry_after: str = "") -> TidegateError:
    kind = unavailable if status == 503 else _BY_STATUS.get(status, ServiceError)
    return _made(kind, answer, retry_after)


def _made(kind: type[TidegateError], told: Json, retry_after: str) -> TidegateError:
    message = str(told.get("message") or told.get("status") or "the server gave no reason")
    if issubclass(kind, RequestError):
        return kind(message, told.get("param"))
    if kind is Overloaded:
        return Overloaded(message, float(retry_after) if retry_after.isdigit() else 1.0)
    return kind(message)
