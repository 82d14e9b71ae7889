"""Synthetic requests for the index benchmark. Everything follows from the generator given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cache import DEFAULT_NAMESPACE, TokenBytes

NAMESPACE = DEFAULT_NAMESPACE
PAGE_SIZE = 16
_VOCABULARY = 128_000


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival: prompt and answer together, as they stand when the request ends."""

    requests: list[TokenBytes]
    num_sessions: int
    #: tokens the device pool holds
    pool_tokens: int


def random_tokens(rng: np.random.Generator, num_tokens: int) -> TokenBytes:
    return rng.integers(0, _VOCABULARY, num_tokens, dtype=np.int32).tobytes()


def conversations(
    rng: np.random.Generator, num_sessions: int = 1000, num_requests: int = 8000, pool_tokens: int = 2_000_000
) -> Trace:
    """Sessions of growing length under 8 system prompts of 1k to 2k tokens.

    A turn brings 50 to 500 tokens and an answer of 50 to 350. Sessions come back at random, recent ones more often
    (Zipf, exponent 1.1); past 8k tokens a session begins anew.
    """
    systems = [random_tokens(rng, int(rng.integers(1000, 2000))) for _ in range(8)]
    histories = [systems[session % 8] for session in range(num_sessions)]
    weights = 1.0 / np.arange(1, num_sessions + 1) ** 1.1
    requests: list[TokenBytes] = []
    for session in rng.choice(num_sessions, num_requests, p=weights / weights.sum()):
        history = histories[session] + random_tokens(rng, int(rng.integers(100, 850)))
        requests.append(history)
        histories[session] = history if len(history) < 4 * 8192 else systems[session % 8]
    return Trace(requests, num_sessions, pool_tokens)
