"""What a rank is asked to generate, and what it answers. Plain frozen data; no torch, no I/O.

These classes travel as they are over the wire between Api and rank (msgspec encodes dataclasses) and into the
scheduler, so there is one shape of a request in the whole system.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

#: why a request ended. `error` carries `message`.
FinishReason = Literal["stop", "length", "abort", "error"]


#: a JSON schema as JSON text; a regular expression (Rust's, without look-around) for the whole output; a context-free
#: grammar in GBNF or Lark
GrammarKind = Literal["json_schema", "regex", "ebnf"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the output must follow from its first token to its end of sequence."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Ranges are checked at the border (`deployments/`), and once more by `problem()`.

    Greedy is `temperature == 0`; then top_p, top_k, min_p and seed have no effect, penalties do.
    """

    #: >= 0; 0 is greedy
    temperature: float = 1.0
    #: (0, 1]; keep the smallest set of tokens with at least this probability
    top_p: float = 1.0
    #: -1 (off) or >= 1
    top_k: int = -1
    #: [0, 1]; drop tokens less likely than min_p times the likeliest
    min_p: float = 0.0
    #: (0, 2]; 1 is off; over prompt and output (Keskar et al. 2019, as transformers does)
    repetition_penalty: float = 1.0
    #: [-2, 2]; 0 is off; over the output only (OpenAI)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    #: same seed, same tokens, whatever the batch. None: drawn once per request at the border.
    seed: int | None = None
    #: > 0, in tokens; the scheduler also stops at the model's context length
    max_new_tokens: int = 128
    #: stop tokens are masked out until this many tokens were generated
    min_new_tokens: int = 0
    #: the model's own end-of-sequence tokens do not end the request
    ignore_eos: bool = False
    #: further token ids that end the request; the stop token is part of the output ids
    stop_token_ids: tuple[int, ...] = ()
    #: None: no logprobs. k >= 0: logprob of the chosen token and of the k likeliest
    num_logprobs: int | None = None
    #: added to the logits before everything else: ((token_id, bias), ...)
    logit_bias: tuple[tuple[int, float], ...] = ()
    #: None: any output. Otherwise the request ends with the model's end of sequence where the grammar ends, also with
    #: ignore_eos, and bans give way where they would leave no token that the grammar allows
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. n > 1 is n requests; stop strings and text live in the Api."""

    request_id: str
    #: prompt as int32 little-endian bytes, never empty
    tokens: bytes
    sampling: SamplingParams
    #: isolation string; "" is the common one
    namespace: str = ""
    #: drawn anew, and higher, each time an Api sends anything under this id; outputs of another attempt are dropped
    attempt: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.tokens) // 4


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logs of the model's distribution at one position, before temperature and truncation."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Facts of a request known at its first token, final at its end."""

    num_prompt_tokens: int
    #: prompt tokens whose KV was reused at the first admission; a multiple of page_size
    num_cached_tokens: int
    #: lowest epoch of any KV it reused, None if none (protocol.md section 3)
    kv_epoch: int | None
    num_retractions: int = 0
    weight_version: str = "default"
    #: seconds from arrival at the rank to the first admission / to the first token
    queue_s: float = 0.0
    first_token_s: float = 0.0
    #: tier -> tokens of `num_cached_tokens`
    cached_by_tier: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens of one request in one engine step. The last one of a request has `finish` set."""

    request_id: str
    attempt: int
    token_ids: list[int]
    #: one per token id, when asked for
    logprobs: list[TokenLogprobs] | None = None
    finish: FinishReason | None = None
    #: token id that ended the request with `stop`, if one did
    matched_stop: int | None = None
    #: with finish == "error" or "abort": the reason in words
    message: str = ""
    #: sent with the first token and with the end
    stats: RequestStats | None = None
