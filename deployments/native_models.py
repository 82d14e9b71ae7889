"""Bodies of SGLang's native routes: /generate, /tokenize, /detokenize, /abort_request. After SGLang 0.5.23."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from deployments.bodies import (
    NO_GRAMMAR,
    OFF,
    Body,
    NamespaceText,
    Neutral,
    Penalty,
    RequestIdText,
    Seed,
    StopIds,
    StopList,
    StopString,
    TokenIds,
    few_ids,
    field_error,
)
from deployments.grammar_fields import GrammarText, JsonSchema
from deployments.sampling_fields import (
    LogitBias,
    MinP,
    NumSequences,
    NumTokens,
    NumTokensOrNone,
    PerPrompt,
    PromptIds,
    RepetitionPenalty,
    TopK,
    TopP,
)

_TEXT_ONLY = "only text is offered"

#: SGLang's own default of max_new_tokens; cut to what the context leaves when the caller named none
DEFAULT_NEW_TOKENS = 128

#: texts, or lists of ids, that /tokenize and /detokenize take at once
MAX_TEXTS = 2048

StartLen = Annotated[int, Field(ge=-1)]
NumTopLogprobs = Annotated[int, Field(ge=0, le=20)]


class SamplingBody(Body):
    REFUSED: ClassVar[dict[str, tuple[Neutral, str]]] = {
        "structural_tag": (OFF, NO_GRAMMAR),
        "stop_regex": (OFF, "stop expressions are not offered; use stop"),
        "custom_params": (OFF, "custom code in requests is not offered"),
        "beam_width": ((None, 1), "beam search is not offered"),
        "spaces_between_special_tokens": ((None, True), "text is shown as the tokenizer writes it"),
    }
    TOLERATED = frozenset({"stream_interval"})

    max_new_tokens: NumTokens | None = None
    min_new_tokens: NumTokensOrNone = 0
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: TopP = 1.0
    top_k: TopK = -1
    min_p: MinP = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    sampling_seed: Seed | None = None
    stop: StopString | StopList | None = None
    stop_token_ids: StopIds | None = None
    no_stop_trim: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: LogitBias | None = None
    #: what the output must follow, at most one of the three; a schema as JSON text, as SGLang takes it, or as an object
    json_schema: GrammarText | JsonSchema | None = None
    regex: GrammarText | None = None
    ebnf: GrammarText | None = None
    n: NumSequences = 1


class GenerateBody(Body):
    REFUSED: ClassVar[dict[str, tuple[Neutral, str]]] = {
        "input_embeds": (OFF, "embeddings as input are not offered; use text or input_ids"),
        "image_data": (OFF, _TEXT_ONLY),
        "video_data": (OFF, _TEXT_ONLY),
        "audio_data": (OFF, _TEXT_ONLY),
        "modalities": ((None, [], ["text"]), _TEXT_ONLY),
        "token_ids_logprob": (OFF, "log-probabilities of chosen tokens are not offered; use top_logprobs_num"),
        "return_hidden_states": (OFF, "hidden states are not offered"),
        "return_entropy": (OFF, "the entropy of the distribution is not offered"),
        "session_params": (OFF, "server-side sessions are not offered; repeat the prompt, its prefix is cached"),
        "lora_path": (OFF, "adapters are not offered"),
        "lora_id": (OFF, "adapters are not offered"),
        "custom_logit_processor": (OFF, "custom code in requests is not offered"),
        "priority": ((None, 0), "priorities are not offered"),
        "background": (OFF, "background requests are not offered"),
        "return_bytes": (OFF, "answers are JSON"),
    }
    TOLERATED = frozenset(
        {
            "log_metrics", "no_logs", "return_routed_experts", "return_prompt_token_ids", "conversation_id",
            "bootstrap_host", "bootstrap_port", "bootstrap_room", "http_worker_ipc", "routing_key",
            "return_cached_tokens_details",
        }
    )  # fmt: skip

    model: str = "default"
    text: str | PerPrompt[str] | None = None
    input_ids: TokenIds | PromptIds | None = None
    sampling_params: SamplingBody | PerPrompt[SamplingBody] | None = None
    rid: RequestIdText | PerPrompt[RequestIdText] | None = None
    stream: bool = False
    return_logprob: bool | PerPrompt[bool] | None = None
    top_logprobs_num: NumTopLogprobs | PerPrompt[NumTopLogprobs] | None = None
    #: first token whose log-probability is asked for; -1: the first one generated
    logprob_start_len: StartLen | PerPrompt[StartLen] | None = None
    return_text_in_logprobs: bool = False
    extra_key: NamespaceText | None = None
    data_parallel_rank: Annotated[int, Field(ge=0)] | None = None
    routed_dp_rank: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_kind_of_prompt(self) -> Self:
        if (self.text is None) == (self.input_ids is None):
            raise field_error("text", "exactly one of text and input_ids is needed")
        return self

    @model_validator(mode="after")
    def _no_logprobs_of_the_prompt(self) -> Self:
        """Clients send a start without asking for log-probabilities; it means nothing then."""
        starts = self.logprob_start_len if isinstance(self.logprob_start_len, list) else [self.logprob_start_len]
        wanted = self.return_logprob if isinstance(self.return_logprob, list) else [self.return_logprob]
        if any(wanted) and any(start not in (None, -1) for start in starts):
            raise field_error("logprob_start_len", f"log-probabilities of the prompt are not offered; got {starts[0]}")
        return self

    @property
    def is_list(self) -> bool:
        """The caller sent a list of prompts and gets a list of answers."""
        return isinstance(self.text, list) or bool(self.input_ids and isinstance(self.input_ids[0], list))


class TokenizeBody(Body):
    TOLERATED = frozenset({"return_token_strs"})

    model: str = "default"
    prompt: str | Annotated[list[str], Field(max_length=MAX_TEXTS, fail_fast=True)]
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    model: str = "default"
    tokens: TokenIds | Annotated[list[TokenIds], Field(max_length=MAX_TEXTS, fail_fast=True), BeforeValidator(few_ids)]
    skip_special_tokens: bool = True


class AbortBody(Body):
    TOLERATED = frozenset({"abort_message", "finished_reason"})

    rid: Annotated[str, Field(max_length=256)] = ""
    abort_all: bool = False
