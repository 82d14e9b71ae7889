"""YAML and dictionaries -> Settings. Every fault is a ConfigError that names the dotted field and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import ConfigError
from configs.schema import Settings


def load_settings(path: Path | None = None, overrides: Mapping[str, object] | None = None) -> Settings:
    """Settings of a YAML file, with single values laid over it.

    path: the tree of `Settings`, or a Ray Serve config whose one application has that tree as its `args` (so that
    `tidegate serve --config F` and `serve run F` serve the same). None: the defaults.
    overrides: dotted field -> value, e.g. {"engine.device": "cpu"}.
    Raises ConfigError: file not readable, not YAML, a key twice, unknown key, value out of range.
    """
    tree = _read_tree(path) if path is not None else {}
    for dotted, value in (overrides or {}).items():
        tree = _with_value(tree, dotted, value)
    return settings_from_dict(tree)


def settings_from_dict(tree: Mapping[str, Any]) -> Settings:
    """Settings of a tree of plain values. Raises ConfigError with every fault that is in it, not only the first."""
    try:
        return Settings.model_validate(dict(tree))
    except ValidationError as error:
        faults = [_fault(entry["type"], entry["loc"], entry["msg"], entry["input"]) for entry in error.errors()]
        raise ConfigError("; ".join(faults)) from None


class _StrictLoader(yaml.SafeLoader):
    """safe_load that refuses a key that is given twice (plain YAML lets the last one win without a word)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise ConfigError(f"key '{key}' is given twice, the second time in line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read the configuration {path}: it is not UTF-8 text") from None
    try:
        document: object = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_yaml_problem(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None
    tree = _mapping({} if document is None else document)
    if tree is None:
        raise ConfigError(f"{path} must hold a mapping of settings, not {_kind(document)}")
    return _serve_arguments(path, tree) if "applications" in tree else tree


def _serve_arguments(path: Path, serve_config: dict[str, Any]) -> dict[str, Any]:
    """The settings inside a Ray Serve config; its HTTP door is where `api.host` and `api.port` come from."""
    given: object = serve_config["applications"]
    applications = cast("list[object]", given) if isinstance(given, list) else []
    application = _mapping(applications[0]) if len(applications) == 1 else None
    if application is None:
        raise ConfigError(f"{path}: Tidegate is exactly one Serve application, this file names {len(applications)}")
    tree = _mapping(application.get("args") or {})
    door = _mapping(serve_config.get("http_options") or {})
    if tree is None or door is None:
        raise ConfigError(f"{path}: 'args' and 'http_options' must be mappings")
    for key in ("host", "port"):
        if key in door:
            tree = _with_agreed(path, tree, key, door[key])
    return tree


def _with_agreed(path: Path, tree: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """`api.host` decides whether admin routes are open without a key, so it must be the address that is served."""
    said = (_mapping(tree.get("api")) or {}).get(key, value)
    if said != value:
        raise ConfigError(f"{path}: http_options.{key} is {value!r} but args.api.{key} is {said!r}; make them equal")
    return _with_value(tree, f"api.{key}", value)


def _with_value(tree: dict[str, Any], dotted: str, value: object) -> dict[str, Any]:
    """A copy of `tree` with one value set; what is not a mapping on the way is left for validation to name."""
    head, _, rest = dotted.partition(".")
    if not rest:
        return {**tree, head: value}
    branch = _mapping(tree.get(head) if tree.get(head) is not None else {})
    return tree if branch is None else {**tree, head: _with_value(branch, rest, value)}


def _mapping(value: object) -> dict[str, Any] | None:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _fault(kind: str, loc: tuple[int | str, ...], message: str, given: object) -> str:
    dotted = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        return f"unknown setting '{dotted}'{_nearest(loc)}"
    if kind == "model_type":
        return f"setting '{dotted}' must be a group of settings, not {_kind(given)}"
    # A secret is never repeated, whatever is wrong with it.
    shown = "" if str(loc[-1]).endswith("_key") else f", given {given!r}"
    return f"setting '{dotted}': {message[:1].lower()}{message[1:]}{shown}"


def _nearest(loc: tuple[int | str, ...]) -> str:
    group = _model_at(loc[:-1])
    if group is None:
        return ""
    names = list(group.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
    parent = "".join(f"{part}." for part in loc[:-1])
    if close:
        return f"; did you mean '{parent}{close[0]}'?"
    return f"; known here: {', '.join(names)}"


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    model: type[BaseModel] = Settings
    for part in loc:
        field = model.model_fields.get(str(part))
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return None
        model = kind
    return model


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return str(error)
