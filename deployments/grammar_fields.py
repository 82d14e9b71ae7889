"""What a request's output must follow, in the words of every route: `response_format`, `json_schema`, `regex`, `ebnf`.

A grammar that cannot be followed is refused here with the field's name, before anything is generated.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, Self

import orjson
from pydantic import Field, model_validator

from configs.errors import InvalidField, NotOffered
from deployments.bodies import Body, Neutral, field_error
from engine.grammar import MAX_GRAMMAR_CHARS, problem
from engine.request import Grammar, GrammarKind

GrammarText = Annotated[str, Field(max_length=MAX_GRAMMAR_CHARS)]
JsonSchema = dict[str, Any]

ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')
#: how SGLang's clients ask for any JSON object
_ANY = "$$ANY$$"

_problem = lru_cache(maxsize=512)(problem)


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    REFUSED: ClassVar[dict[str, tuple[Neutral, str]]] = {}

    type: Literal["text", "json_object", "json_schema"]
    #: {name, schema, strict, description}; without a schema any JSON object will do
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise field_error("json_schema", "it is needed with type json_schema, and with no other")
        if self.json_schema is not None and not isinstance(self.json_schema.get("schema", {}), dict):
            raise field_error("json_schema.schema", "it must be a JSON schema, an object")
        return self

    @property
    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        schema = (self.json_schema or {}).get("schema")
        return ANY_OBJECT if not schema else Grammar("json_schema", orjson.dumps(schema).decode())


def one_grammar(
    *,
    regex: str | None,
    ebnf: str | None,
    json_schema: str | JsonSchema | None = None,
    response_format: ResponseFormat | None = None,
    within: str = "",
) -> tuple[Grammar | None, str]:
    """The grammar of a body that may name it in several ways, and the name of its field. "" and None: not named.

    within: put before names of fields. Raises InvalidField when there are two of them.
    """
    named: list[tuple[Grammar, str]] = []
    if response_format is not None and response_format.grammar is not None:
        schema_field = ".json_schema" if response_format.type == "json_schema" else ""
        named.append((response_format.grammar, "response_format" + schema_field))
    if json_schema:
        named.append((_of_schema(json_schema), "json_schema"))
    texts: list[tuple[GrammarKind, str | None]] = [("regex", regex), ("ebnf", ebnf)]
    named += [(Grammar(kind, text), kind) for kind, text in texts if text]
    if len(named) > 1:
        second = within + named[1][1]
        raise InvalidField(f"{second}: only one of {' and '.join(field for _, field in named)} can be followed", second)
    return (named[0][0], within + named[0][1]) if named else (None, "")


async def checked(grammar: Grammar | None, param: str) -> Grammar | None:
    """The grammar, after it has been compiled once in a thread. param: its field, for errors.

    Raises InvalidField with what is wrong with it, NotOffered where the library is missing.
    """
    if grammar is None:
        return None
    if len(grammar.text) > MAX_GRAMMAR_CHARS:
        raise InvalidField(f"{param}: {len(grammar.text):,} characters; {MAX_GRAMMAR_CHARS:,} is the most", param)
    try:
        reason = await asyncio.to_thread(_problem, grammar)
    except ImportError:
        raise NotOffered(f"{param}: this server has no llguidance; install it to follow grammars", param) from None
    if reason:
        raise InvalidField(f"{param}: {reason}", param)
    return grammar


def _of_schema(schema: str | JsonSchema) -> Grammar:
    if schema == _ANY:
        return ANY_OBJECT
    return Grammar("json_schema", schema if isinstance(schema, str) else orjson.dumps(schema).decode())
