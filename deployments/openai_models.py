"""Bodies of /v1/completions and /v1/chat/completions, every field with its range.

After the OpenAI API reference, with the extensions that SGLang's and vLLM's clients send in `extra_body`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

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
    field_error,
)
from deployments.grammar_fields import GrammarText, ResponseFormat
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

_NO_TOOLS = "tools are not offered"
_NO_ADAPTERS = "adapters are not offered"

#: OpenAI's own default of /v1/completions
DEFAULT_COMPLETION_TOKENS = 16


class StreamOptions(Body):
    REFUSED: ClassVar[dict[str, tuple[Neutral, str]]] = {
        "continuous_usage_stats": (OFF, "usage comes once, in the last chunk"),
    }
    TOLERATED = frozenset({"include_obfuscation"})

    include_usage: bool = False


class OpenAIBody(Body):
    """What the two routes share."""

    REFUSED: ClassVar[dict[str, tuple[Neutral, str]]] = {
        "tools": (OFF, _NO_TOOLS),
        "tool_choice": ((None, "none", "auto"), _NO_TOOLS),
        "functions": (OFF, _NO_TOOLS),
        "function_call": ((None, "none", "auto"), _NO_TOOLS),
        "json_schema": (OFF, NO_GRAMMAR),
        "structural_tag": (OFF, NO_GRAMMAR),
        "guided_json": (OFF, NO_GRAMMAR),
        "guided_regex": (OFF, NO_GRAMMAR),
        "guided_choice": (OFF, NO_GRAMMAR),
        "guided_grammar": (OFF, NO_GRAMMAR),
        "lora_path": (OFF, _NO_ADAPTERS),
        "use_beam_search": (OFF, "beam search is not offered"),
        "length_penalty": ((None, 1, 1.0), "beam search is not offered"),
        "prompt_logprobs": ((None, False), "log-probabilities of the prompt are not offered"),
        "return_hidden_states": (OFF, "hidden states are not offered"),
        "session_params": (OFF, "server-side sessions are not offered; repeat the conversation, its prefix is cached"),
        "custom_logit_processor": (OFF, "custom code in requests is not offered"),
        "logits_processors": (OFF, "custom code in requests is not offered"),
        "priority": ((None, 0), "priorities are not offered"),
        "stop_regex": (OFF, "stop expressions are not offered; use stop"),
        "spaces_between_special_tokens": ((None, True), "text is shown as the tokenizer writes it"),
        "truncate_prompt_tokens": ((None,), "prompts are not cut"),
        "return_cached_tokens_details": (OFF, "usage names cached tokens as one number; /generate has the details"),
    }
    TOLERATED = frozenset(
        {
            "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
            "prompt_cache_retention", "parallel_tool_calls", "separate_reasoning", "stream_reasoning",
            "bootstrap_host", "bootstrap_port", "bootstrap_room", "return_routed_experts",
        }
    )  # fmt: skip

    model: str = "default"
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: NumSequences | None = None
    max_tokens: NumTokens | None = None
    min_tokens: NumTokensOrNone = 0
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    top_k: TopK = -1
    min_p: MinP = 0.0
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty = 1.0
    seed: Seed | None = None
    stop: StopString | StopList | None = None
    stop_token_ids: StopIds | None = None
    no_stop_trim: bool = False
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: LogitBias | None = None
    #: what the output must follow, at most one of the three
    response_format: ResponseFormat | None = None
    regex: GrammarText | None = None
    ebnf: GrammarText | None = None
    rid: RequestIdText | None = None
    request_id: RequestIdText | None = None
    #: isolation: prefixes are shared only between requests of the same one (vLLM's name, and SGLang's)
    cache_salt: NamespaceText | None = None
    extra_key: NamespaceText | None = None
    data_parallel_rank: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "it is only allowed together with stream: true")
        return self

    @property
    def num_sequences(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(OpenAIBody):
    REFUSED = OpenAIBody.REFUSED | {
        "suffix": (OFF, "text after the completion is not offered"),
        "echo": (OFF, "echoing the prompt is not offered"),
    }

    prompt: str | TokenIds | PerPrompt[str] | PromptIds
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: NumSequences | None = None

    @model_validator(mode="after")
    def _best_of_is_n(self) -> Self:
        if self.best_of is not None and self.best_of != self.num_sequences:
            raise field_error("best_of", f"choosing among more than n is not offered; got {self.best_of}")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else DEFAULT_COMPLETION_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(Body):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(Body):
    REFUSED: ClassVar[dict[str, tuple[Neutral, str]]] = {
        "tool_calls": (OFF, _NO_TOOLS),
        "function_call": (OFF, _NO_TOOLS),
        "audio": (OFF, "only text is offered"),
    }
    TOLERATED = frozenset({"refusal", "annotations", "reasoning_content", "prefix"})

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True)]
    name: Annotated[str, Field(max_length=64)] | None = None

    @property
    def for_template(self) -> dict[str, str]:
        """As chat templates read it."""
        return {"role": self.role, "content": self.text} | ({} if self.name is None else {"name": self.name})

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(OpenAIBody):
    REFUSED = OpenAIBody.REFUSED | {
        "audio": (OFF, "only text is offered"),
        "modalities": ((None, ["text"]), "only text is offered"),
        "prediction": (OFF, "predicted outputs are not offered"),
        "web_search_options": (OFF, "web search is not offered"),
        "chat_template": (OFF, "the model's own chat template is used"),
        "documents": (OFF, "documents are not offered"),
    }
    TOLERATED = OpenAIBody.TOLERATED | {"reasoning_effort", "verbosity"}

    #: 8,192: checking as many takes 50 ms, in which no other stream moves
    messages: Annotated[list[Message], Field(min_length=1, max_length=8192, fail_fast=True)]
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    continue_final_message: bool = False
    #: the opposite of `continue_final_message`; clients that set one set both
    add_generation_prompt: bool | None = None
    #: variables of the model's own template, such as `enable_thinking`
    chat_template_kwargs: dict[str, str | bool | int | float | None] | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "it is only allowed together with logprobs: true")
        return self

    @model_validator(mode="after")
    def _a_turn_is_begun_or_continued(self) -> Self:
        if self.add_generation_prompt is self.continue_final_message:
            raise field_error("add_generation_prompt", "it must be the opposite of continue_final_message")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
