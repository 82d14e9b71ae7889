"""Which tokens a grammar allows next, for every row of a step that has one.

The library is llguidance (Earley parser with derivatives of regular expressions, in Rust). It is imported when the
first grammar comes: rows without one cost nothing, and an engine without the library serves everything else.

Legend: E rows with a grammar, W = ceil(vocabulary / 32) words of a bit mask.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from engine.batch import SampleRow
from engine.grammar_state import GrammarState
from engine.request import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

#: longest text of a grammar; a schema of 500 fields has 30,000 characters
MAX_GRAMMAR_CHARS = 128 * 1024
#: compiled grammars kept; one takes from 10 KB to some MB
_MAX_COMPILED = 128
#: any blanks are JSON, but a model that has lost its way writes them for ever
_JSON_BLANKS = r"[ \n\r\t]{1,16}"
#: integers up to here are doubles without loss
_MAX_EXACT = 2**53
#: of the words of an error; the library draws the whole grammar under some
_MAX_REASON = 300


@dataclass(frozen=True, slots=True)
class GrammarMasks:
    """What the grammars of one step allow."""

    #: E indices into the step's sample rows, rising
    rows: list[int]
    #: int32 [E, W]; bit i of word w is token 32 * w + i
    bits: NDArray[np.int32]
    #: index of a sample row -> why its grammar cannot be followed any further; such a row has no mask
    failed: dict[int, str]


def problem(grammar: Grammar) -> str:
    """Why this grammar cannot be followed, in one line; "" if it can. Compiles it without a vocabulary: up to 1 s."""
    try:
        source = _source(grammar)
    except ValueError as error:
        return _one_line(str(error))
    from llguidance import LLMatcher

    return _one_line(LLMatcher.validate_grammar(source, limits=_limits()))


class GrammarBook:
    """Compiled grammars of one model. `compile` and `knows` on any thread, `masks` on the engine's."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """tokenizer_file: tokenizer.json; read when the first grammar comes. vocab_size: width of the logits."""
        self._tokenizer_file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        #: grammar -> its initial state, or why there is none; the one used last is at the end
        self._compiled: OrderedDict[Grammar, LLMatcher | str] = OrderedDict()
        #: guards the two above
        self._lock = Lock()

    def knows(self, grammar: Grammar) -> bool:
        """Whether `masks` will not have to compile it."""
        with self._lock:
            return grammar in self._compiled

    def compile(self, grammar: Grammar) -> LLMatcher | str:
        """Make it known: its initial state, or why there is none, which `masks` tells of each row that has it.

        Takes milliseconds to a second, most of it without the interpreter's lock. Raises nothing.
        """
        compiled = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        return compiled

    def masks(self, rows: Sequence[SampleRow]) -> GrammarMasks | None:
        """What may come next in each row that has a grammar, after taking in its tokens; None if no row has one."""
        wanted = [index for index, row in enumerate(rows) if row.grammar is not None]
        if not wanted:
            return None
        bits = np.zeros((len(wanted), -(-self._vocab_size // 32)), dtype=np.int32)
        kept: list[int] = []
        failed: dict[int, str] = {}
        for index in wanted:
            reason = self._fill(rows[index], bits[len(kept)])
            if reason:
                failed[index] = reason
            else:
                kept.append(index)
        return GrammarMasks(kept, bits[: len(kept)], failed)

    def _fill(self, row: SampleRow, words: NDArray[np.int32]) -> str:
        """Write the row's mask into `words` int32 [W]; why not, or ""."""
        state = row.grammar
        assert state is not None, "a row without a grammar has no mask"
        matcher = self._matcher(state)
        if isinstance(matcher, str):
            return matcher
        if row.grammar_tokens is not None and len(row.grammar_tokens):
            matcher.consume_tokens(row.grammar_tokens.tolist())
            state.num_taken += len(row.grammar_tokens)
        if not matcher.is_error():
            # the library writes as many bytes as it is told, no more
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return _one_line(matcher.get_error()) or ("" if words.any() else "the grammar allows no token here")

    def _matcher(self, state: GrammarState) -> LLMatcher | str:
        """The sequence's own state, begun if need be."""
        if state.matcher is None:
            initial = self._initial(state.grammar)
            if isinstance(initial, str):
                return initial
            state.matcher = initial.deep_copy()
        matcher: Any = state.matcher
        return matcher

    def _initial(self, grammar: Grammar) -> LLMatcher | str:
        with self._lock:
            known = self._compiled.get(grammar)
            if known is not None:
                self._compiled.move_to_end(grammar)
                return known
        return self.compile(grammar)

    def _compile(self, grammar: Grammar) -> LLMatcher | str:
        if not self._eos_token_ids:
            return "this model has no end-of-sequence token, so no grammar could end"
        try:
            source, tokenizer = _source(grammar), self._ready_tokenizer()
            from llguidance import LLMatcher
        except ImportError:
            return "this rank has no llguidance; grammars are not offered"
        except (ValueError, OSError) as error:
            return _one_line(str(error))
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=_limits())
        return _one_line(matcher.get_error()) or matcher

    def _ready_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _read_tokenizer(self._tokenizer_file, self._vocab_size, self._eos_token_ids)
            return self._tokenizer


def _read_tokenizer(file: Path, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer:
    """Raises ValueError when the library cannot read it."""
    from llguidance import LLTokenizer

    if not file.is_file():
        raise ValueError("this model has no tokenizer.json; grammars need one")
    return LLTokenizer(str(file), n_vocab=vocab_size, eos_token=eos_token_ids)


def _source(grammar: Grammar) -> str:
    """The grammar in the library's own form. Raises ValueError for a text that is none."""
    from llguidance import LLMatcher, grammar_from

    if grammar.kind != "json_schema":
        return grammar_from(grammar.kind, grammar.text)
    schema = json.loads(grammar.text)
    if not isinstance(schema, dict | bool):
        raise ValueError("a JSON schema is an object")
    _check_numbers(schema)
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": _JSON_BLANKS})


def _check_numbers(schema: object) -> None:
    """Raises ValueError for a value to be written that the library, which reads numbers as doubles, would change."""
    pending: list[object] = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            entries = cast("dict[str, object]", part)
            options = [*_listed(entries.get("enum")), entries.get("const")]
            beyond = [value for value in options if isinstance(value, int) and abs(value) > _MAX_EXACT]
            if beyond:
                raise ValueError(f"{beyond[0]} in enum or const: integers beyond 2^53 are not followed exactly")
            pending += entries.values()
        else:
            pending += _listed(part)


def _listed(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []


def _limits() -> Any:
    """The library's own bounds on time and memory of one grammar, and errors that show nothing of the output."""
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_REASON]
