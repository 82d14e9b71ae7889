"""What all request bodies share: strict types, ranges, and an honest treatment of fields that are not ours.

A field we do not know is one of three. Refused: ignoring it would make the answer a lie (`best_of: 4`, `tools`), or it
is a misspelt field of ours. Tolerated: real clients send it and it does not bear on the answer (`user`). Unknown: not
used, and named in the response header `x-tidegate-ignored-fields`, so that nothing is dropped silently.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, Any, ClassVar, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from configs.errors import InvalidField

B = TypeVar("B", bound="Body")

#: one token id; the model's own range is checked once the model is known
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
#: as many ids in one body, in all its lists together: checking them takes 0.2 s, in which no other stream moves
MAX_IDS = 1 << 20
#: fail_fast: one error instead of a million for a long list of the wrong type
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_IDS)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
#: 64: the cost of a generated character grows with their number; real clients send at most a handful
StopList = Annotated[list[StopString], Field(max_length=64, fail_fast=True)]
StopIds = Annotated[list[TokenId], Field(max_length=256, fail_fast=True)]
#: '#' parts the sequences of one request (`<id>#<n>`), so it may not occur in an id
RequestIdText = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[!-\"$-~]+$")]
NamespaceText = Annotated[str, Field(max_length=256)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
#: values of a foreign field that mean it is off
Neutral = tuple[Any, ...]
#: how clients write that they do not use a field, whatever its type
OFF: Neutral = (None, False, [], {}, "")
NO_GRAMMAR = "use json_schema (response_format on OpenAI's routes), regex or ebnf"

#: unknown fields of one body, nested ones included: looking for a misspelt one takes 1 ms each
_MAX_UNKNOWN = 32
#: type of the errors that say themselves which field they mean
_NAMED = "named_field"


class Body(BaseModel):
    """Base of every request body and of the objects in it. Subclasses list the foreign fields they treat specially.

    A field that is null is a field that is absent, as OpenAI's clients mean it. A subclass with extra="forbid" refuses
    every field it does not know.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore", protected_namespaces=())

    #: field -> (values that mean "off", why anything else is refused)
    REFUSED: ClassVar[dict[str, tuple[Neutral, str]]] = {}
    #: fields that real clients send and that do not bear on the answer
    TOLERATED: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _sort_out_foreign_fields(cls, content: Any, info: ValidationInfo) -> Any:
        if not isinstance(content, dict):
            return content
        is_closed = cls.model_config.get("extra") == "forbid"
        # in the caller's order: which of two bad fields is named must not change from call to call
        for name in content:
            if name in cls.model_fields:
                continue
            if name in cls.REFUSED:
                _refuse_unless_neutral(name, content[name], *cls.REFUSED[name])
            elif is_closed:
                raise field_error(name[:64], f"unknown field; there are {', '.join(sorted(cls.model_fields))}")
            elif name not in cls.TOLERATED:
                _note_unknown(name, cls.model_fields, [] if info.context is None else info.context)
        return {name: value for name, value in content.items() if value is not None}


def parse_body(model: type[B], content: dict[str, Any]) -> tuple[B, list[str]]:
    """`content` as a `model`, and the names of fields that were not used.

    Raises InvalidField with the dotted path of the first field that is off, its value and what is allowed.
    """
    unknown: list[str] = []
    try:
        body = model.model_validate(content, context=unknown)
    except ValidationError as error:
        raise _as_invalid_field(error, content) from None
    return body, sorted(set(unknown))


def few_ids(lists: Any) -> Any:
    """A validator to go before that of a list of prompts as ids: refuses too many in all before one is looked at."""
    if isinstance(lists, list):
        num_ids = sum(len(ids) for ids in cast(list[Any], lists)[:4096] if isinstance(ids, list))
        if num_ids > MAX_IDS:
            raise PydanticCustomError("too_long", "The lists hold more than {limit} token ids", {"limit": MAX_IDS})
    return lists


def _refuse_unless_neutral(name: str, value: Any, neutral: Neutral, reason: str) -> None:
    if not any(_same(value, off) for off in neutral):
        raise field_error(name, f"{reason}; got {_shown(value)}")


def _note_unknown(name: str, known: Iterable[str], unknown: list[str]) -> None:
    """Add `name` to `unknown`, unless it is a field misspelt: `temprature: 0` must not be answered at temperature 1."""
    if len(unknown) >= _MAX_UNKNOWN:
        raise field_error(name[:64], f"this is one of more than {_MAX_UNKNOWN} fields that are not known here")
    unknown.append(name)
    near = difflib.get_close_matches(name[:64].lower(), known, n=1, cutoff=0.8)
    if near:
        raise field_error(name[:64], f"unknown field; did you mean {near[0]!r}?")


def field_error(name: str, message: str) -> PydanticCustomError:
    """For validators of a whole body to raise: `name` is the field to blame."""
    # The message goes in as a value: braces in it would be read as placeholders.
    return PydanticCustomError(_NAMED, "{reason}", {"field": name, "reason": message})


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and a boolean only equal to a boolean."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _as_invalid_field(error: ValidationError, content: dict[str, Any]) -> InvalidField:
    """The most telling of pydantic's errors: one of ours, else that of the union's branch that read furthest."""
    errors = [(one, _path(one, content)) for one in error.errors(include_url=False)]
    first, path = max(errors, key=lambda pair: _telling(*pair))
    where = ".".join(path)
    # pydantic names our class
    message = "it must be an object" if first["type"] == "model_type" else first["msg"].removeprefix("Value error, ")
    if first["type"] not in ("missing", "value_error", _NAMED):
        message += f" (got {_shown(first['input'])})"
    return InvalidField(f"{where}: {message}" if where else message, where or None)


def _telling(error: ErrorDetails, path: list[str]) -> tuple[bool, int, list[int], bool]:
    indices = [int(part) for part in path if part.isdigit() and len(part) < 10]
    return error["type"] in (_NAMED, "too_long"), len(path), indices, not error["type"].endswith("_type")


def _path(error: ErrorDetails, body: dict[str, Any]) -> list[str]:
    """The field as the caller wrote it. pydantic's location also names branches of unions, which are no fields."""
    path: list[str] = []
    content: Any = body
    is_found = False
    for part in error["loc"]:
        is_found = False
        if isinstance(content, dict | list):
            with suppress(KeyError, IndexError, TypeError):
                content = cast(Any, content)[part]
                path.append(str(part))
                is_found = True
    # One that was sent as null is missing as well, and found.
    if error["type"] == "missing" and not is_found:
        path.append(str(error["loc"][-1]))
    if error["type"] == _NAMED:
        path.append(error.get("ctx", {})["field"])
    return path


def _shown(value: Any) -> str:
    """The value as an error shows it, cut before it is written out: it may be the whole body."""
    shown = reprlib.repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
