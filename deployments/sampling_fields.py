"""Fields of a request that say how tokens are chosen, and what becomes of them.

OpenAI's routes and SGLang's native one name and default them differently; the ranges are the same.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Annotated, TypeVar, cast

from pydantic import AfterValidator, BeforeValidator, Field

from deployments.bodies import StopList, StopString, TokenIds, few_ids

T = TypeVar("T")

#: below this, dividing by the temperature overflows and the distribution has one token anyway
GREEDY_BELOW = 1e-6

TopP = Annotated[float, Field(gt=0, le=1)]
MinP = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(gt=0, le=2)]
#: a request may ask for this many sequences in all
MAX_SEQUENCES = 128
#: an entry for every prompt of one body
PerPrompt = Annotated[list[T], Field(min_length=1, max_length=MAX_SEQUENCES, fail_fast=True)]
PromptIds = Annotated[PerPrompt[TokenIds], BeforeValidator(few_ids)]
NumSequences = Annotated[int, Field(ge=1, le=MAX_SEQUENCES)]
NumTokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
NumTokensOrNone = Annotated[int, Field(ge=0, le=2**31 - 1)]


def _top_k(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError(f"top_k must be -1 (off) or at least 1, got {value}")
    return value


def _few_entries(value: object) -> object:
    if isinstance(value, dict) and len(cast(dict[object, object], value)) > 1024:
        raise ValueError(f"logit_bias has {len(cast(dict[object, object], value))} entries, the limit is 1024")
    return value


def _logit_bias(value: dict[str, float]) -> dict[str, float]:
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise ValueError(f"logit_bias: {token[:40]!r} is not a token id")
        if not -100 <= bias <= 100:
            raise ValueError(f"logit_bias: the bias of token {token} must be between -100 and 100, got {bias:g}")
    return value


TopK = Annotated[int, Field(le=2**31 - 1), AfterValidator(_top_k)]
#: their number is looked at before the first entry
LogitBias = Annotated[dict[str, float], BeforeValidator(_few_entries), AfterValidator(_logit_bias)]


def stop_strings(value: StopString | StopList | None) -> tuple[str, ...]:
    """`stop` as the routes accept it, one string or a list, without repetitions."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(dict.fromkeys(value))


def greedy_if_cold(temperature: float) -> float:
    return 0.0 if temperature < GREEDY_BELOW else temperature


def seed_in_range(seed: int | None) -> int | None:
    """Callers may give any 64-bit integer; the engine takes 0 to 2^63-1. Two seeds stay two seeds, but for the sign."""
    return None if seed is None else seed % (1 << 63)


def seed_of_choice(seed: int | None, choice: int) -> int | None:
    """Choices of one request differ, and differ in the same way when the request is repeated.

    The first has the seed itself. The others are hashed: with seed + choice, a request's second choice would be the
    first one of whoever took the next seed.
    """
    if seed is None or choice == 0:
        return seed
    digest = hashlib.blake2b(struct.pack("<QI", seed, choice), digest_size=8).digest()
    return int.from_bytes(digest, "little") % (1 << 63)


def bias_pairs(bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    return tuple((int(token), value) for token, value in (bias or {}).items())
