"""What a caller may ask of a weight update, from any door: one check, every error naming its field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from actors.flush_request import flag, seconds, text
from configs.errors import InvalidField
from engine.weight_update import IN_FLIGHT_MODES, InFlightMode

#: the way the bytes come
SourceKind = Literal["disk", "tensors", "distributed", "ipc"]
#: see engine.weight_intake
Cast = Literal["exact", "lossless", "any"]

_FIELDS = frozenset({
    "update_id", "kind", "location", "in_flight", "flush_cache", "version", "is_partial", "cast", "check_finite",
    "in_place", "empty_device_cache", "exclude", "timeout_s", "caller",
})  # fmt: skip
_MAX_EXCLUDED = 1024


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """One update as asked for, every field checked. The bytes travel beside it, never through the log."""

    update_id: str
    kind: SourceKind
    #: disk: the directory; distributed: the group's name; else ""
    location: str
    in_flight: InFlightMode
    flush_cache: bool
    #: label after the commit; None: as before
    version: str | None
    is_partial: bool
    cast: Cast
    check_finite: bool
    #: load over the live weights: no second set of them, and no way back if it fails
    in_place: bool
    #: give unused device memory back after the commit
    empty_device_cache: bool
    #: ranks that need not vote, by number or by incarnation; they are out of service until they have followed
    exclude: tuple[str, ...]
    timeout_s: float
    #: who asks; for the log, not part of the arguments
    caller: str

    def has_arguments_of(self, other: WeightRequest) -> bool:
        """Would the two do the same? The same id with other arguments is a conflict. Bytes are not compared here; the
        digest of what was staged is."""
        return self._arguments == other._arguments

    @property
    def _arguments(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in sorted(_FIELDS - {"update_id", "caller"}))


def parse_update(arguments: Mapping[str, object], max_timeout_s: float, make_id: Callable[[], str]) -> WeightRequest:
    """Check the arguments of one update; what is absent or None takes its default.

    Raises InvalidField naming the field, its value and what is allowed.
    """
    unknown = sorted(set(arguments) - _FIELDS)
    if unknown:
        raise InvalidField(f"unknown argument {unknown[0]!r} of a weight update", unknown[0])
    given = {name: value for name, value in arguments.items() if value is not None}
    kind = cast(SourceKind, _one_of(given.get("kind", "tensors"), "kind", get_args(SourceKind)))
    request = WeightRequest(
        update_id=text(given["update_id"], "update_id") if "update_id" in given else make_id(),
        kind=kind,
        location=_location(given.get("location"), kind),
        in_flight=cast(InFlightMode, _one_of(given.get("in_flight", "retract"), "in_flight", IN_FLIGHT_MODES)),
        flush_cache=flag(given.get("flush_cache", True), "flush_cache"),
        version=text(given["version"], "version") if "version" in given else None,
        is_partial=flag(given.get("is_partial", False), "is_partial"),
        cast=cast(Cast, _one_of(given.get("cast", "lossless"), "cast", get_args(Cast))),
        check_finite=flag(given.get("check_finite", False), "check_finite"),
        in_place=flag(given.get("in_place", False), "in_place"),
        empty_device_cache=flag(given.get("empty_device_cache", False), "empty_device_cache"),
        exclude=_excluded(given.get("exclude", ())),
        timeout_s=seconds(given.get("timeout_s", min(60.0, max_timeout_s)), "timeout_s", max_timeout_s),
        caller=text(given.get("caller", "job"), "caller"),
    )
    if request.timeout_s == 0:
        raise InvalidField("timeout_s of a weight update must be above 0: weights have to be loaded first", "timeout_s")
    return request


def _one_of(value: object, param: str, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise InvalidField(f"{param} must be one of {', '.join(allowed)}, got {value!r:.80}", param)
    return value


def _location(value: object, kind: SourceKind) -> str:
    if kind in ("tensors", "ipc"):
        if value is not None:
            raise InvalidField(f"an update by {kind} has no location", "location")
        return ""
    if not isinstance(value, str) or not 0 < len(value) <= 4096 or not value.isprintable():
        what = "a directory" if kind == "disk" else "the name of a group"
        raise InvalidField(f"location must be {what}, got {value!r:.80}", "location")
    return value


def _excluded(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) > _MAX_EXCLUDED:
        raise InvalidField("exclude must be a list of rank numbers or incarnations", "exclude")
    excluded = []
    for entry in value:
        is_number = isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0
        excluded.append(str(entry) if is_number else text(entry, "exclude"))
    return tuple(dict.fromkeys(excluded))
