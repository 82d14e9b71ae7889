"""What a body of POST /v1/cache/flush may say, and the arguments for the controller that it comes to."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from configs.errors import InvalidField
from deployments.bodies import Body, TokenIds, field_error
from deployments.core import ApiCore
from deployments.tokenizer import in_thread_if_long
from engine.flush import FlushMode


class ScopeBody(Body):
    """Part of the cache. Exactly one field."""

    model_config = ConfigDict(extra="forbid")

    namespace: str | None = None
    #: what OpenAI's clients call a namespace
    cache_salt: str | None = None
    adapter: str | None = None
    prefix_tokens: TokenIds | None = None
    prefix_text: Annotated[str, Field(min_length=1)] | None = None
    older_than_s: float | None = None


class FlushBody(Body):
    """Types and names are checked here, values by the controller, for every door alike (actors/flush_request.py)."""

    model_config = ConfigDict(extra="forbid")

    timeout_s: float | None = None
    mode: FlushMode | None = None
    tiers: Annotated[list[str], Field(max_length=16, fail_fast=True)] | None = None
    scope: ScopeBody | None = None
    flush_id: str | None = None
    dry_run: bool | None = None

    @model_validator(mode="after")
    def _one_scope(self) -> Self:
        given = [] if self.scope is None else sorted(self.scope.model_dump(exclude_none=True))
        if self.scope is not None and len(given) != 1:
            names = ", ".join(ScopeBody.model_fields)
            raise field_error("scope", f"it needs exactly one of {names}; got {' and '.join(given) or 'none'}")
        return self


async def flush_arguments(core: ApiCore, body: FlushBody) -> dict[str, Any]:
    """The arguments of ControllerActor.flush: what the body names, a prefix as the tokens that the index knows.

    Raises InvalidField, or ContextOverflow, naming the field.
    """
    arguments = body.model_dump(exclude_unset=True)
    if body.scope is not None:
        arguments["scope"] = await _scope(core, body.scope)
    return arguments


async def _scope(core: ApiCore, scope: ScopeBody) -> dict[str, Any]:
    if scope.prefix_text is not None:
        return {"prefix_tokens": await _tokens_of(core, scope.prefix_text)}
    if scope.prefix_tokens is not None:
        core.check_prefix(scope.prefix_tokens, "scope.prefix_tokens")
    if scope.cache_salt is not None:
        return {"namespace": scope.cache_salt}
    return scope.model_dump(exclude_none=True)


async def _tokens_of(core: ApiCore, text: str) -> list[int]:
    """The tokens that every prompt beginning with `text` begins with."""
    param = "scope.prefix_text"

    def encode() -> list[int]:
        # counted first: finding out which tokens are sure takes several times as long
        core.check_prefix(memoryview(core.tokenizer.encode(text)).cast("i").tolist(), param)
        return memoryview(core.tokenizer.encode_prefix(text)).cast("i").tolist()

    tokens = await in_thread_if_long(len(text), encode)
    if not tokens:
        raise InvalidField(
            f"{param} holds no whole word, and how the tokens of its last word go on is not known: "
            "give more of the text, with a blank behind the word, or scope.prefix_tokens",
            param,
        )
    return tokens
