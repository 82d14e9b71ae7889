"""What a caller may ask of a flush, from any door: one check, every error naming its field.

The HTTP and gRPC doors, the command line and jobs that call the controller all end here, so that no door knows a
timeout that another one refuses.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from configs.errors import InvalidField, RequestError, TidegateError
from engine.flush import FLUSH_MODES, STEP_MODES, FlushMode, FlushScope

SCOPE_KEYS = ("namespace", "prefix_tokens", "older_than_s")

_FLUSH_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_MAX_TEXT = 256
_MAX_AGE_S = 10 * 365 * 86400.0
_MAX_TOKEN_ID = 2**31 - 1
#: a flush of a prefix covers its first page, and no page is longer (configs: engine.page_size). What is behind it is
#: neither needed nor kept: the log holds many flushes
_MAX_PAGE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class FlushLimits:
    """What this deployment allows a flush to ask for."""

    max_timeout_s: float
    #: least budget of the floor-first modes
    step_grace_s: float
    #: tiers that exist here, in the order a flush names them
    tiers: tuple[str, ...]
    #: context length of the ranks, in tokens: no prefix is longer. None: no rank is known
    max_len: int | None = None


@dataclass(frozen=True, slots=True)
class FlushRequest:
    """One flush as asked for, every field checked."""

    flush_id: str
    mode: FlushMode
    tiers: tuple[str, ...]
    timeout_s: float
    scope: FlushScope | None
    dry_run: bool
    #: who asks; for the log, not part of the arguments
    caller: str

    def has_arguments_of(self, other: FlushRequest) -> bool:
        """Would the two do the same? The same id with other arguments is a conflict."""
        return self._arguments == other._arguments

    def budget_s(self, step_grace_s: float) -> float:
        """Seconds from receipt to the deadline: step modes get at least the grace for one engine step."""
        return max(self.timeout_s, step_grace_s) if self.mode in STEP_MODES else self.timeout_s

    def takes_epoch(self, limits: FlushLimits) -> bool:
        """Only a flush of all tiers without a scope allots an epoch (protocol.md section 6)."""
        return self.scope is None and not self.dry_run and set(self.tiers) == set(limits.tiers)

    @property
    def drops_host_alone(self) -> bool:
        """Every host tier drops all it has, and the device keeps what it has."""
        return self.tiers == ("host",) and not self.dry_run

    @property
    def drops_host_by_age(self) -> bool:
        """Every host tier drops what is older than an age."""
        is_aged = self.scope is not None and self.scope.older_than_s is not None
        return is_aged and "host" in self.tiers and not self.dry_run

    @property
    def _arguments(self) -> tuple[object, ...]:
        return (self.mode, self.tiers, self.timeout_s, self.scope, self.dry_run)


def parse_flush(arguments: Mapping[str, object], limits: FlushLimits, make_id: Callable[[], str]) -> FlushRequest:
    """Check the arguments of one flush; what is absent or None takes its default.

    arguments: timeout_s, mode, tiers, scope, flush_id, dry_run, caller; plain values as a job or a body gives them.
    Raises InvalidField naming the field, its value and what is allowed.
    """
    unknown = sorted(set(arguments) - {"timeout_s", "mode", "tiers", "scope", "flush_id", "dry_run", "caller"})
    if unknown:
        raise InvalidField(f"unknown argument {unknown[0]!r} of a flush", unknown[0])
    given = {name: value for name, value in arguments.items() if value is not None}
    tiers = _tiers(given.get("tiers", limits.tiers), limits.tiers)
    if "scope" in given and "device" not in tiers:
        # it is kept by ranks, in the keys of what they look for in every tier
        raise InvalidField("a scope covers the device tier in any case: leave tiers out, or name device too", "tiers")
    return FlushRequest(
        flush_id=_flush_id(given["flush_id"]) if "flush_id" in given else make_id(),
        mode=_mode(given.get("mode", "wait")),
        tiers=tiers,
        timeout_s=seconds(given.get("timeout_s", 0.0), "timeout_s", limits.max_timeout_s),
        scope=_scope(given["scope"], limits.max_len) if "scope" in given else None,
        dry_run=flag(given.get("dry_run", False), "dry_run"),
        caller=text(given.get("caller", "job"), "caller"),
    )


def seconds(value: object, param: str, maximum: float) -> float:
    """`value` as finite seconds in [0, maximum]. Raises InvalidField for anything else, booleans and text included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidField(f"{param} must be a number of seconds, got {_shown(value)}", param)
    if not 0 <= value <= maximum:  # false for NaN too; an int of any size is compared without becoming a float
        raise InvalidField(f"{param} must be between 0 and {maximum:g} seconds, got {_shown(value)}", param)
    return float(value)


def whole_number(value: object, param: str, maximum: int) -> int:
    """`value` as an integer in [1, maximum]. Raises InvalidField for anything else, booleans included."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
        raise InvalidField(f"{param} must be a whole number between 1 and {maximum}, got {_shown(value)}", param)
    return value


def flag(value: object, param: str) -> bool:
    """`value` if it is a boolean. Raises InvalidField."""
    if not isinstance(value, bool):
        raise InvalidField(f"{param} must be true or false, got {_shown(value)}", param)
    return value


def text(value: object, param: str) -> str:
    """`value` if it is printable text of 1 to 256 characters. Raises InvalidField."""
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT or not value.isprintable():
        raise InvalidField(f"{param} must be 1 to {_MAX_TEXT} printable characters, got {_shown(value)}", param)
    return value


def refusal(error: TidegateError, status: str | None = None) -> dict[str, object]:
    """An error as the plain answer of a control call: no exception class of ours crosses a job's border."""
    answer: dict[str, object] = {
        "success": False,
        "status": status or _STATUS_OF_HTTP.get(error.http_status, "unavailable"),
        "message": error.message,
        "http_status": error.http_status,
    }
    if isinstance(error, RequestError):
        answer["param"] = error.param
    return answer


_STATUS_OF_HTTP = {400: "invalid", 404: "unknown", 409: "conflict", 501: "not_offered", 503: "unavailable"}


def _flush_id(value: object) -> str:
    if not isinstance(value, str) or _FLUSH_ID.fullmatch(value) is None:
        raise InvalidField(
            "flush_id must be 1 to 128 characters of letters, digits, '.', '_', ':' and '-', beginning with a letter "
            f"or digit, got {_shown(value)}",
            "flush_id",
        )
    return value


def _mode(value: object) -> FlushMode:
    if not isinstance(value, str) or value not in FLUSH_MODES:
        raise InvalidField(f"mode must be one of {', '.join(FLUSH_MODES)}, got {_shown(value)}", "mode")
    return cast(FlushMode, value)


def _tiers(value: object, configured: tuple[str, ...]) -> tuple[str, ...]:
    """The named tiers in the order of `configured`; a tier that is not there is an error, never a silent success."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise InvalidField(f"tiers must be a list of {', '.join(configured)}, got {_shown(value)}", "tiers")
    for tier in value:
        if tier not in configured:
            raise InvalidField(f"tier {_shown(tier)} is not configured; there is {', '.join(configured)}", "tiers")
    return tuple(tier for tier in configured if tier in value)


def _scope(value: object, max_len: int | None) -> FlushScope:
    if not isinstance(value, Mapping) or len(value) != 1:
        raise InvalidField(
            f"scope must be an object with exactly one of {', '.join(SCOPE_KEYS)}, got {_shown(value)}", "scope"
        )
    key, content = next(iter(value.items()))
    param = f"scope.{key}"
    match key:
        case "namespace":
            return FlushScope(namespace=text(content, param))
        case "adapter":
            raise InvalidField("no adapter is served here, so nothing is cached for one", param)
        case "older_than_s":
            return FlushScope(older_than_s=seconds(content, param, _MAX_AGE_S))
        case "prefix_tokens":
            return FlushScope(prefix_tokens=_token_bytes(content, param, max_len))
        case _:
            raise InvalidField(f"unknown scope {_shown(key)}; one of {', '.join(SCOPE_KEYS)}", param)


def _token_bytes(value: object, param: str, max_len: int | None) -> bytes:
    """The first token ids as little-endian int32 bytes, the form in which the index keeps them."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise InvalidField(f"{param} must be a list of token ids, got {_shown(value)}", param)
    if max_len is not None and len(value) > max_len:
        raise InvalidField(f"{param} has {len(value):,} tokens, more than the context of the model, {max_len:,}", param)
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _MAX_TOKEN_ID:
            raise InvalidField(f"{param} must hold token ids, got {_shown(token)}", param)
    first = value[:_MAX_PAGE_TOKENS]
    return struct.pack(f"<{len(first)}i", *first)


def _shown(value: object) -> str:
    """The value as an error shows it: cut, so that a hostile one cannot fill the log."""
    try:
        shown = repr(value)
    except ValueError:  # an int of more than 4300 digits has no text
        shown = f"a {type(value).__name__} too long to show"
    return shown if len(shown) <= 80 else shown[:77] + "..."
