"""Outputs that follow a grammar: always valid, whatever the model, the batch, the pages and the flushes do to them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from cache.device_cache import DeviceCache
from engine.batch import SampleRow
from engine.demo_model import write_demo_model
from engine.events import RequestArrived
from engine.flush import FlushMode
from engine.flush_gate import PendingFlush
from engine.generation import Collector, Generation
from engine.grammar import GrammarBook, GrammarMasks, problem
from engine.grammar_state import GrammarState
from engine.limits import SchedulerLimits
from engine.loop import EngineLoop
from engine.models import LoadedModel, load_model
from engine.request import Grammar, Request, SamplingParams
from engine.runner import ModelRunner
from engine.sampling import sample
from engine.scheduler import Scheduler
from tests.fakes import flush_command, tokens_of

PAGE_SIZE = 8
VOCAB = 512
EOS = 2
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
PERSON_GRAMMAR = Grammar("json_schema", json.dumps(PERSON))
DATE = "[0-9]{4}-[0-9]{2}-[0-9]{2}( [a-zé]{1,4})?"
ARITHMETIC = 'root ::= term ("+" term){1,3} "="\nterm ::= "(" [0-9] "*" [0-9] ")" | [0-9]'


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("grammar") / "tiny"
    write_demo_model(directory, "tiny")
    return directory


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return load_model(directory, "cpu", "float32", None)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def new_book(directory: Path, model: LoadedModel) -> GrammarBook:
    return GrammarBook(directory / "tokenizer.json", model.facts.vocab_size, model.facts.eos_token_ids)


def new_loop(directory: Path, model: LoadedModel, num_pages: int = 128) -> EngineLoop:
    runner = ModelRunner(model, num_pages, PAGE_SIZE, grammars=new_book(directory, model))
    limits = SchedulerLimits(8, 64, 512, eos_token_ids=model.facts.eos_token_ids)
    return EngineLoop(Scheduler(DeviceCache(num_pages, PAGE_SIZE), limits), runner)


def request(name: str, grammar: Grammar | None, **sampling: Any) -> Request:
    params = SamplingParams(**{"max_new_tokens": 400, "grammar": grammar} | sampling)
    return Request(name, tokens_of([5, 6, 7, len(name)]), params)


def text_of(tokenizer: Tokenizer, generation: Generation) -> str:
    """What it says before its end of sequence."""
    assert generation.finish == "stop", generation
    return tokenizer.decode(generation.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 5.0])
def test_output_follows_its_grammar(
    directory: Path, model: LoadedModel, tokenizer: Tokenizer, temperature: float
) -> None:
    loop = new_loop(directory, model)
    seeds = range(1 if temperature == 0 else 6)
    kinds = {"json": PERSON_GRAMMAR, "date": Grammar("regex", DATE), "sum": Grammar("ebnf", ARITHMETIC)}
    requests = [
        request(f"{kind}-{seed}", grammar, temperature=temperature, seed=seed, top_p=0.9 if seed % 2 else 1.0)
        for kind, grammar in kinds.items()
        for seed in seeds
    ]
    texts: dict[str, set[str]] = {kind: set() for kind in kinds}
    for asked, generation in zip(requests, loop.generate(requests), strict=True):
        kind = asked.request_id.partition("-")[0]
        texts[kind].add(text_of(tokenizer, generation))
    for text in texts["json"]:
        jsonschema.validate(json.loads(text), PERSON)
    assert all(re.fullmatch(DATE, text) for text in texts["date"])
    assert all(re.fullmatch(r"(\(\d\*\d\)|\d)(\+(\(\d\*\d\)|\d)){1,3}=", text) for text in texts["sum"])
    # seeds are heard inside a grammar too
    assert temperature == 0 or all(len(found) > 1 for found in texts.values())


def test_state_survives_retraction_and_flushes(directory: Path, model: LoadedModel, tokenizer: Tokenizer) -> None:
    requests = [request(f"r{seed}", PERSON_GRAMMAR, temperature=1.0, seed=seed) for seed in range(10)]
    undisturbed = new_loop(directory, model).generate(requests)
    loop = new_loop(directory, model, num_pages=24)
    collector = Collector(requests)
    loop._on_outputs = collector.take
    for one in requests:
        loop.post(RequestArrived(one))
    modes: list[FlushMode] = ["fence", "retract", "drain", "retract"]
    ended: list[PendingFlush] = []
    num_turns = 0
    while collector.open_ids:
        num_turns += 1
        if modes and num_turns % 15 == 5 and all(one.ended.done() for one in ended):
            epoch = len(ended) + 1
            offered = loop.offer_flush(flush_command(f"f{epoch}", modes.pop(0), epoch=epoch, budget_s=600.0))
            assert isinstance(offered, PendingFlush)
            ended.append(offered)
        loop.turn()
    by_flush = sum(one.ended.result(0).num_retracted for one in ended)
    assert (len(ended), by_flush > 0) == (4, True)
    assert loop.snapshot().counters.num_retractions > by_flush
    assert [one.token_ids for one in collector.generations] == [one.token_ids for one in undisturbed]
    for generation in collector.generations:
        jsonschema.validate(json.loads(text_of(tokenizer, generation)), PERSON)


def test_without_a_grammar_nothing_changes(directory: Path, model: LoadedModel) -> None:
    free = [request(f"free-{seed}", None, temperature=1.0, seed=seed, max_new_tokens=40) for seed in range(4)]
    alone = new_loop(directory, model).generate(free)
    mixed = [
        one for pair in zip(free, [request(f"g{n}", PERSON_GRAMMAR) for n in range(4)], strict=True) for one in pair
    ]
    beside = new_loop(directory, model).generate(mixed)[::2]
    assert [one.token_ids for one in beside] == [one.token_ids for one in alone]
    book = GrammarBook(Path("/nowhere"), VOCAB, [EOS])
    assert book.masks([SampleRow(SamplingParams(), 0, 0)]) is None
    assert SampleRow(SamplingParams(), 0, 0).grammar_tokens is None


def test_the_end_comes_where_the_grammar_ends(directory: Path, model: LoadedModel, tokenizer: Tokenizer) -> None:
    """Neither min_new_tokens nor ignore_eos nor a bias can carry an answer beyond its grammar's end."""
    word = Grammar("regex", "(yes|no)")
    loop = new_loop(directory, model)
    requests = [
        request("longer", word, min_new_tokens=100),
        request("endless", word, ignore_eos=True),
        request("biased", word, logit_bias=((EOS, -100.0), (0, -100.0))),
    ]
    for generation in loop.generate(requests):
        assert text_of(tokenizer, generation) in ("yes", "no")
        assert generation.token_ids[-1] in model.facts.eos_token_ids


def test_an_answer_that_is_cut_off_is_a_beginning(directory: Path, model: LoadedModel, tokenizer: Tokenizer) -> None:
    (cut,) = new_loop(directory, model).generate([request("cut", PERSON_GRAMMAR, temperature=1.0, max_new_tokens=9)])
    assert (cut.finish, len(cut.token_ids)) == ("length", 9)
    assert tokenizer.decode(cut.token_ids).startswith("{")


def test_a_grammar_that_cannot_be_followed_ends_its_own_request(directory: Path, model: LoadedModel) -> None:
    bad = [
        Grammar("json_schema", '{"type": "objekt"}'),
        Grammar("json_schema", "{"),
        Grammar("json_schema", "3"),
        Grammar("json_schema", '{"anyOf": [{"type": "null"}, {"properties": {"id": {"enum": [9007199254740993]}}}]}'),
        Grammar("regex", "("),
        Grammar("ebnf", "root ::= nothing"),
    ]
    loop = new_loop(directory, model)
    requests = [request(f"bad-{n}", grammar) for n, grammar in enumerate(bad)] + [request("good", PERSON_GRAMMAR)]
    *failed, good = loop.generate(requests)
    assert good.finish == "stop"
    for grammar, generation in zip(bad, failed, strict=True):
        assert (generation.finish, generation.token_ids) == ("error", [])
        assert generation.message == problem(grammar) != ""
    assert loop.snapshot().num_private_pages == 0
    assert problem(PERSON_GRAMMAR) == ""


def test_a_token_that_breaks_the_grammar_is_an_error_and_no_answer(directory: Path, model: LoadedModel) -> None:
    book = new_book(directory, model)
    state = GrammarState(Grammar("regex", "[0-9]+"))
    params = SamplingParams(grammar=state.grammar)
    first = cast(GrammarMasks, book.masks([SampleRow(params, 0, 0, grammar=state)]))
    assert (first.rows, first.failed) == ([0], {})
    letter = Tokenizer.from_file(str(directory / "tokenizer.json")).encode("a", add_special_tokens=False).ids
    broken = SampleRow(params, 0, 1, grammar=state, grammar_tokens=np.array(letter, np.int32))
    masks = cast(GrammarMasks, book.masks([broken, SampleRow(params, 0, 0, grammar=GrammarState(state.grammar))]))
    assert masks.rows == [1]
    assert 0 in masks.failed
    assert "\n" not in masks.failed[0]


def test_models_without_what_grammars_need_say_so(directory: Path) -> None:
    row = SampleRow(SamplingParams(), 0, 0, grammar=GrammarState(PERSON_GRAMMAR))
    for book, words in (
        (GrammarBook(directory / "none.json", VOCAB, [EOS]), "tokenizer.json"),
        (GrammarBook(directory / "tokenizer.json", VOCAB, []), "end-of-sequence"),
    ):
        assert words in cast(GrammarMasks, book.masks([row])).failed[0]


def test_masks_are_bits_of_tokens_and_other_rows_keep_theirs() -> None:
    logits = torch.arange(70, dtype=torch.float32).repeat(3, 1)
    bits = np.zeros((1, 3), dtype=np.int32)
    bits[0, 1] = 1 << 5 | -(1 << 31)  # tokens 37 and 63
    rows = [SampleRow(SamplingParams(temperature=0.0), 0, 0) for _ in range(3)]
    before = logits.clone()
    assert sample(logits, rows, GrammarMasks([1], bits, {}))[0] == [69, 63, 69]
    banned = SampleRow(SamplingParams(temperature=0.0), 0, 0, banned_ids=(63,))
    assert sample(logits, [banned] * 3, GrammarMasks([1], bits, {}))[0] == [69, 37, 69]
    all_banned = SampleRow(SamplingParams(temperature=0.0), 0, 0, banned_ids=(37, 63))
    assert sample(logits, [all_banned] * 3, GrammarMasks([1], bits, {}))[0] == [69, 63, 69]
    assert torch.equal(logits, before)


def test_compiled_once_and_kept_within_bounds(directory: Path, model: LoadedModel) -> None:
    book = new_book(directory, model)
    assert not book.knows(PERSON_GRAMMAR)
    first = book.compile(PERSON_GRAMMAR)
    assert book.knows(PERSON_GRAMMAR)
    assert book._initial(PERSON_GRAMMAR) is first
    for number in range(200):
        book.compile(Grammar("regex", f"a{{{number + 1}}}"))
    assert not book.knows(PERSON_GRAMMAR)
    assert len(book._compiled) == 128
