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

    context: the last tokens of the prompt, so that a leading space of the first new token is not lost. byte_of: the
    byte that a token of a byte-fallback vocabulary stands for, None for every other token. Such decoders turn a whole
    run of bytes to U+FFFD for one that is missing, so runs never reach `decode`: an incremental UTF-8 decoder reads
    them, and one token of each stays in the window as what its neighbours lean on.
    """

    __slots__ = ("_byte_of", "_decode", "_is_in_run", "_shown", "_utf8", "_window")

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        context: Sequence[int] = (),
        byte_of: Callable[[int], int | None] = lambda _: None,
    ) -> None:
        self._decode = decode
        self._byte_of = byte_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._window = list(context[-_OVERLAP:])
        self._is_in_run = False
        for token_id in self._window:
            byte = byte_of(token_id)
            self._is_in_run = byte is not None
            self._utf8.decode(b"" if byte is None else bytes([byte]), final=byte is None)
        #: characters of decode(window) that were returned already
        self._shown = len(decode(self._window)) if self._window else 0

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self._push_one, token_ids))

    def finish(self) -> str:
        return self._end_run() + self._rest()

    def _push_one(self, token_id: int) -> str:
        byte = self._byte_of(token_id)
        if byte is None:
            return self._end_run() + self._push_word(token_id)
        begun = "" if self._is_in_run else self._begin_run(token_id)
        return begun + self._utf8.decode(bytes([byte]))

    def _begin_run(self, token_id: int) -> str:
        """Text that was held back before the run. The run's first token stands for all of it in the window."""
        held = self._rest()
        self._is_in_run = True
        self._window.append(token_id)
        self._shown = len(self._decode(self._window))
        return held

    def _end_run(self) -> str:
        self._is_in_run = False
        return self._utf8.decode(b"", True)

    def _push_word(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        # Some decoders show half a character as U+FFFD until the token comes that completes it.
        end = len(text.rstrip(REPLACEMENT))
        # A long run that never decodes must not be decoded anew for ever: let go of it.
        too_long = len(self._window) > 2 * _WINDOW
        new = self._advance(text, len(text) if too_long else end)
        if too_long or (end == len(text) and len(self._window) > _WINDOW):
            del self._window[:-_OVERLAP]
            self._shown = len(self._decode(self._window))
        return new

    def _rest(self) -> str:
        text = self._decode(self._window)
        return self._advance(text, len(text))

    def _advance(self, text: str, end: int) -> str:
        new = text[self._shown : end]
        self._shown = max(self._shown, end)
        return new
