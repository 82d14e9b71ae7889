"""Token ids to text, as they come, without half a character.

Two ways. Byte-level vocabularies (GPT-2, Llama 3, Qwen, OLMo, ...): every token is a fixed string of bytes, and an
incremental UTF-8 decoder gives exactly what decoding all tokens at once would. All other decoders (SentencePiece with
byte fallback, WordPiece, ...) depend on neighbouring tokens: a short window of tokens is decoded anew and the text
beyond what was shown is new (the prefix-offset method of text-generation-inference).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "�"
#: tokens decoded anew at each step; beyond it the window is cut to its last `_OVERLAP`
_WINDOW = 32
_OVERLAP = 4


class TextStream(Protocol):
    """Incremental decoder of one sequence."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is certain after these tokens; may be empty."""
        ...

    def finish(self) -> str:
        """The rest: an unfinished character becomes U+FFFD."""
        ...


class ByteTextStream:
    """For byte-level vocabularies: `token_bytes` gives the bytes of one token."""

    __slots__ = ("_decoder", "_token_bytes")

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(map(self._token_bytes, token_ids)))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class WindowTextStream:
    """For every other decoder: `decode` turns a list of ids into text.

    context: the last tokens of the prompt, so that a leading space of the first new token is not lost.
    """

    __slots__ = ("_decode", "_shown", "_window")

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context[-_OVERLAP:])
        #: characters of decode(window) that were returned already
        self._shown = len(decode(self._window)) if self._window else 0

    def push(self, token_ids: Sequence[int]) -> str:
        self._window.extend(token_ids)
        text = self._decode(self._window)
        # Byte fallback shows a whole run of byte tokens as U+FFFD until its last character is complete.
        end = len(text.rstrip(REPLACEMENT))
        # A long run that never decodes must not be decoded anew for ever: let go of it.
        too_long = len(self._window) > 2 * _WINDOW
        new = self._advance(text, len(text) if too_long else end)
        if too_long or (end == len(text) and len(self._window) > _WINDOW):
            del self._window[:-_OVERLAP]
            self._shown = len(self._decode(self._window))
        return new

    def finish(self) -> str:
        text = self._decode(self._window)
        return self._advance(text, len(text))

    def _advance(self, text: str, end: int) -> str:
        new = text[self._shown : end]
        self._shown = max(self._shown, end)
        return new
