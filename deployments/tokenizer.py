"""The model's tokenizer and chat template. Tokens leave here as int32 bytes and stay so down to the prefix index.

Only the fast tokenizer is used (`tokenizer.json`), through its Rust object: the Python wrapper changes the padding
state of the shared object on every call, which fails under threads. torch is not imported.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from configs.errors import ConfigError, InvalidField
from deployments.detokenize import ByteTextStream, TextStream, WindowTextStream

T = TypeVar("T")

#: longer texts are encoded in a thread: 8k characters take about 2 ms, a stream's step must not wait for more
THREAD_CHARS = 8192


class Tokenizer:
    """Text to tokens and back for one model directory. Thread-safe: nothing changes after construction but caches."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError when the directory holds no fast tokenizer."""
        if not (directory / "tokenizer.json").is_file():
            raise ConfigError(f"{directory} has no tokenizer.json; Tidegate needs a fast tokenizer")
        self.directory = directory
        self._wrapper = PreTrainedTokenizerFast.from_pretrained(directory)
        #: parameters of transformers' own function; a request that could set them could replace the template
        self._reserved_options = frozenset(inspect.signature(self._wrapper.apply_chat_template).parameters)
        self._fast: FastTokenizer = self._wrapper.backend_tokenizer
        # tokenizer.json may ask for truncation or padding; both would change prompts silently.
        self._fast.no_truncation()
        self._fast.no_padding()
        self._special = {i for i, token in self._fast.get_added_tokens_decoder().items() if token.special}
        self._is_byte_level = isinstance(self._fast.decoder, decoders.ByteLevel)
        self._fallback_bytes = {} if self._is_byte_level else self._find_fallback_bytes()
        self.token_bytes: Callable[[int], bytes] = lru_cache(maxsize=1 << 18)(self._token_bytes)

    @property
    def has_chat_template(self) -> bool:
        return self._wrapper.chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> bytes:
        """Tokens of `text` as little-endian int32 bytes. O(len(text)); holds no lock of the interpreter meanwhile."""
        ids = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return np.asarray(ids, dtype="<i4").tobytes()

    def encode_prefix(self, text: str) -> bytes:
        """Tokens with which every longer text begins that begins with `text`, as int32 bytes; empty if none is sure.

        The last word is left out, and the blanks before it: what follows may join it in other tokens. No start token is
        put before a text that spells one itself, as a rendered conversation does. For tokenizers whose tokens do not
        reach from one word into the next.
        """
        begins = self._fast.encode(text, add_special_tokens=False)
        encoded = begins if begins.ids and begins.ids[0] in self._special else self._fast.encode(text)
        end = _end_of_whole_words(text)
        # special tokens that the tokenizer itself puts in stand at (0, 0); those behind the text are no part of it
        last = max((at for at, (begin, stop) in enumerate(encoded.offsets) if begin < stop <= end), default=-1)
        return np.asarray(encoded.ids[: last + 1], dtype="<i4").tobytes()

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def text_stream(self, prompt: bytes, *, skip_special_tokens: bool = True) -> TextStream:
        """An incremental decoder for what is generated after `prompt` (int32 bytes)."""
        if self._is_byte_level:
            return ByteTextStream(self._shown_bytes if skip_special_tokens else self.token_bytes)
        context = np.frombuffer(prompt[-64:], dtype="<i4").tolist()
        return WindowTextStream(
            lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens), context, self._fallback_bytes.get
        )

    def token_text(self, token_id: int) -> str:
        """One token for display; half a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def render_chat(self, messages: list[dict[str, Any]], *, continue_final: bool, options: Mapping[str, Any]) -> str:
        """The prompt text of a conversation through the model's own template.

        options: further variables of the template. Raises InvalidField with the template's own reason.
        """
        if not self.has_chat_template:
            raise InvalidField("this model has no chat template; use /v1/completions or /generate", "messages")
        for name in options.keys() & self._reserved_options:
            raise InvalidField(f"chat_template_kwargs: {name!r} is no variable of a template", "chat_template_kwargs")
        try:
            return self._wrapper.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not continue_final,
                continue_final_message=continue_final,
                **options,
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidField(f"the chat template refuses these messages: {error}", "messages") from error

    def _token_bytes(self, token_id: int) -> bytes:
        """Bytes one token stands for; empty for an id the vocabulary does not have."""
        token = self._fast.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return _byte_level_bytes(token)
        if token_id in self._fallback_bytes:
            return bytes([self._fallback_bytes[token_id]])
        return self.decode([token_id], skip_special_tokens=False).encode()

    def _find_fallback_bytes(self) -> dict[int, int]:
        """Token id -> byte, as SentencePiece's byte fallback spells them, if the decoder reads them so."""
        spelled = {byte: f"<0x{byte:02X}>" for byte in range(256)}
        ids = {byte: self._fast.token_to_id(token) for byte, token in spelled.items()}
        is_read = {byte: i is not None and self._fast.decode([i]) != spelled[byte] for byte, i in ids.items()}
        return {i: byte for byte, i in ids.items() if i is not None and is_read[byte]}

    def _shown_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special else self.token_bytes(token_id)


async def in_thread_if_long(num_chars: int, work: Callable[[], T]) -> T:
    """Run `work` here when it is short, else in a thread, so that other streams go on."""
    return work() if num_chars <= THREAD_CHARS else await asyncio.to_thread(work)


def _end_of_whole_words(text: str) -> int:
    """Characters of `text` before its last run of blanks; 0 if there is none."""
    if text[-1:].isspace():
        return len(text.rstrip())
    parts = text.rsplit(maxsplit=1)
    return len(parts[0]) if len(parts) == 2 else 0


def _byte_level_bytes(token: str) -> bytes:
    """A token of a byte-level vocabulary as bytes; a token outside the alphabet (added tokens) is its own UTF-8."""
    alphabet = _byte_of_character()
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:
        return token.encode()


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the other 68 for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table
