"""Faults of the world and of callers, in one small tree.

    TidegateError
    ├── RequestError            the caller's fault: 400, or the class's own status
    │   ├── InvalidField        one field of a request is off; `param` names it
    │   ├── ContextOverflow     prompt (or prompt + max_tokens) does not fit the model
    │   ├── UnknownModel        404
    │   ├── UnknownResource     404, e.g. a flush id nobody remembers
    │   ├── Conflict            409, the same id with other arguments, an operation that excludes this one
    │   ├── Unauthorized        401, no key
    │   ├── Forbidden           403, a key without the right
    │   ├── PayloadTooLarge     413
    │   ├── WeightsRejected     new weights that do not fit; `fault` says how, nothing was changed
    │   └── NotOffered          501, a thing Tidegate says it does not do
    ├── ServiceError            our side: 500, or the class's own status
    │   ├── Overloaded          429, come back after `retry_after_s`
    │   ├── NoRank              503, no rank can take the request now
    │   ├── RankLost            503, the rank that served the request is gone
    │   ├── WeightsTorn         503, a load in place has failed half way: the rank serves nothing
    │   └── ControlUnavailable  503, the controller does not answer
    └── ConfigError             a setting that cannot work; message says the way out

Every constructor argument goes to `super().__init__`, so an error crosses a Ray or pickle border whole.
`http_status`, `grpc_status` and `retryable` are read by the tables in `deployments/errors.py`. Ordinary outcomes
(a page shortage, a flush that timed out) are values, not exceptions; a broken promise of ours is `InvariantError`,
which is no `TidegateError`: nobody may catch it by accident.
"""

from __future__ import annotations

from typing import ClassVar, Literal


class TidegateError(Exception):
    """Root of everything a caller may be told. `message` says the value, the limit and the way out."""

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    #: the `type` of an OpenAI error object
    kind: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        """The sentence alone, also of classes with further arguments."""
        return self.message


class RequestError(TidegateError):
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    kind = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        Exception.__init__(self, message, param)
        self.message = message
        self.param = param


class InvalidField(RequestError):
    """`param` is the dotted path of the field, as the caller wrote it."""


class ContextOverflow(RequestError):
    pass


class UnknownModel(RequestError):
    http_status = 404
    grpc_status = "NOT_FOUND"
    kind = "model_not_found"


class UnknownResource(RequestError):
    http_status = 404
    grpc_status = "NOT_FOUND"
    kind = "not_found_error"


class Conflict(RequestError):
    http_status = 409
    grpc_status = "ABORTED"
    kind = "conflict_error"


class Unauthorized(RequestError):
    http_status = 401
    grpc_status = "UNAUTHENTICATED"
    kind = "authentication_error"


class Forbidden(RequestError):
    http_status = 403
    grpc_status = "PERMISSION_DENIED"
    kind = "permission_error"


class PayloadTooLarge(RequestError):
    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"
    kind = "request_too_large"


#: what is wrong with new weights; `payload`: their container (directory, file, bucket), not a tensor
WeightFault = Literal[
    "payload", "unknown_name", "duplicate_name", "missing_name", "shape", "dtype", "fused", "tied", "not_finite",
]  # fmt: skip


class WeightsRejected(RequestError):
    """New weights do not fit the model that is served, which is as it was."""

    kind = "weights_rejected_error"

    def __init__(self, message: str, fault: WeightFault, names: tuple[str, ...] = ()) -> None:
        Exception.__init__(self, message, fault, names)
        self.message = message
        self.param = None
        self.fault: WeightFault = fault
        #: the weights concerned, at most a few
        self.names = names


class NotOffered(RequestError):
    http_status = 501
    grpc_status = "UNIMPLEMENTED"
    kind = "not_implemented_error"


class ServiceError(TidegateError):
    kind = "server_error"


class Overloaded(ServiceError):
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    kind = "overloaded_error"
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        Exception.__init__(self, message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s


class NoRank(ServiceError):
    http_status = 503
    grpc_status = "UNAVAILABLE"
    kind = "unavailable_error"
    retryable = True


class RankLost(ServiceError):
    http_status = 503
    grpc_status = "UNAVAILABLE"
    kind = "rank_lost_error"
    retryable = True


class WeightsTorn(ServiceError):
    """Some weights are new and some old. A complete update heals it; until then nothing is served."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    kind = "weights_torn_error"


class ControlUnavailable(ServiceError):
    http_status = 503
    grpc_status = "UNAVAILABLE"
    kind = "control_unavailable_error"
    retryable = True


class ConfigError(TidegateError):
    """A setting that cannot work. Raised before anything is started."""

    kind = "config_error"


class InvariantError(RuntimeError):
    """A broken promise of ours. `story` holds what led there; a rank reports it and is rebuilt.

    No control call (flush, weights, pause, profile) and no periodic check may end in one.
    """

    def __init__(self, message: str, story: tuple[str, ...] = ()) -> None:
        super().__init__(message, story)
        self.message = message
        self.story = story

    def __str__(self) -> str:
        return self.message if not self.story else self.message + "\n  " + "\n  ".join(self.story)
