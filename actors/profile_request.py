"""The arguments of one profile, checked. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import cast

from actors.flush_request import flag, text
from configs.errors import InvalidField, NotOffered
from engine.profile_spec import ACTIVITIES, Activity, ProfileSpec

#: parts of file names: no separators, no leading dot
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_MAX_FOLDER = 1024
_MAX_STEP = 2**62
_STAGES = ("prefill", "decode")


def parse_profile(arguments: object, make_id: Callable[[], str]) -> ProfileSpec:
    """Check the arguments of /start_profile; what is absent or None takes its default.

    arguments: output_dir, start_step, num_steps, activities, with_stack, record_shapes, profile_by_stage, profile_id,
    profile_prefix, profile_stages, merge_profiles, detailed_annotations; steps also as text, as a benchmark sends them.
    Raises InvalidField, or NotOffered, naming the field.
    """
    if not isinstance(arguments, dict):
        raise InvalidField(f"the arguments must be an object, got {type(arguments).__name__}", "body")
    fields = cast("dict[object, object]", arguments)
    given = {str(name): value for name, value in fields.items() if value is not None}
    known = _FIELDS | _OFF
    unknown = sorted(set(given) - known)
    if unknown:
        raise InvalidField(f"unknown argument {unknown[0][:64]!r} of a profile", unknown[0][:64])
    for name in sorted(_OFF & set(given)):
        if flag(given[name], name):
            raise NotOffered(f"{name} is not offered: every rank writes traces of its own", name)
    return ProfileSpec(
        profile_id=_name(given["profile_id"], "profile_id") if "profile_id" in given else make_id(),
        folder=_folder(given.get("output_dir", "")),
        prefix=_name(given["profile_prefix"], "profile_prefix") if given.get("profile_prefix") else "",
        start_step=_step(given["start_step"], "start_step", 0) if "start_step" in given else None,
        num_steps=_step(given["num_steps"], "num_steps", 1) if "num_steps" in given else None,
        activities=_activities(given.get("activities", ())),
        with_stack=flag(given.get("with_stack", True), "with_stack"),
        record_shapes=flag(given.get("record_shapes", True), "record_shapes"),
        by_stage=_by_stage(given),
    )


_FIELDS = {"output_dir", "start_step", "num_steps", "activities", "with_stack", "record_shapes", "profile_by_stage",
           "profile_id", "profile_prefix", "profile_stages"}  # fmt: skip
_OFF = {"merge_profiles", "detailed_annotations"}


def _name(value: object, param: str) -> str:
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise InvalidField(
            f"{param} must be 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit", param
        )
    return value


def _folder(value: object) -> str:
    """Below the root of traces; each rank looks at that once more, where its links lead."""
    if value == "":
        return ""
    folder = text(value, "output_dir") if isinstance(value, str) and len(value) <= 256 else value
    if not isinstance(folder, str) or len(folder) > _MAX_FOLDER or not folder.isprintable():
        raise InvalidField(f"output_dir must be a path of at most {_MAX_FOLDER} printable characters", "output_dir")
    return folder


def _step(value: object, param: str, least: int) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_STEP:
        raise InvalidField(f"{param} must be a whole number, {least} or more, got {str(value)[:40]!r}", param)
    return value


def _activities(value: object) -> tuple[Activity, ...]:
    entries = cast("list[object]", value) if isinstance(value, list | tuple) else [value]
    for entry in entries:
        if entry not in ACTIVITIES:
            raise InvalidField(f"activities may be {', '.join(ACTIVITIES)}; got {str(entry)[:40]!r}", "activities")
    return tuple(dict.fromkeys(cast("list[Activity]", entries)))


def _by_stage(given: Mapping[str, object]) -> bool:
    stages = given.get("profile_stages")
    is_both = isinstance(stages, list) and sorted(map(str, cast("list[object]", stages))) == sorted(_STAGES)
    if stages not in (None, []) and not is_both:
        raise InvalidField("profile_stages may be [prefill, decode], both or none of them", "profile_stages")
    return flag(given.get("profile_by_stage", False), "profile_by_stage")
