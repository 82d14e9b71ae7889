"""Random schemas, random seeds: whatever the model says, an answer that ends is what its schema says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cache.device_cache import DeviceCache
from engine.demo_model import write_demo_model
from engine.grammar import GrammarBook, problem
from engine.limits import SchedulerLimits
from engine.loop import EngineLoop
from engine.models import load_model
from engine.request import Grammar, Request, SamplingParams
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from tests.fakes import tokens_of

words = st.text('abcé"\\ 🌊', max_size=4)
numbers = st.integers(-(2**53), 2**53)
choices = st.lists(st.one_of(words, numbers, st.none()), min_size=1, max_size=4)
leaves = st.one_of(
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span}, numbers, st.integers(0, 500)
    ),
    st.builds(lambda least: {"type": "string", "minLength": least, "maxLength": least + 3}, st.integers(0, 4)),
    choices.map(lambda values: {"enum": values}),
    st.just({"type": "boolean"}),
    st.just({"type": "string", "pattern": "^[a-f]{2,5}$"}),
)


def _object(fields: dict[str, Any]) -> dict[str, Any]:
    required = sorted(fields)[:2]
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


def _larger(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.builds(
        lambda items, num: {"type": "array", "items": items, "minItems": num, "maxItems": num + 1},
        inner,
        st.integers(0, 2),
    )
    objects = st.dictionaries(st.text("abc_é", min_size=1, max_size=3), inner, max_size=3).map(_object)
    return st.one_of(arrays, objects, st.lists(inner, min_size=1, max_size=2).map(lambda either: {"anyOf": either}))


schemas = st.recursive(leaves, _larger, max_leaves=5)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineLoop, Tokenizer]:
    directory: Path = tmp_path_factory.mktemp("grammar") / "tiny"
    write_demo_model(directory, "tiny")
    model = load_model(directory, "cpu", "float32", None)
    eos = model.facts.eos_token_ids
    grammars = GrammarBook(directory / "tokenizer.json", model.facts.vocab_size, eos)
    # 40 pages of 8: four answers of 150 tokens do not fit together
    runner = ModelRunner(model, 40, 8, grammars=grammars)
    loop = EngineLoop(Scheduler(DeviceCache(40, 8), SchedulerLimits(4, 64, 512, eos_token_ids=eos)), runner)
    return loop, Tokenizer.from_file(str(directory / "tokenizer.json"))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=schemas, seed=st.integers(0, 2**31), temperature=st.sampled_from([0.0, 1.0, 3.0]))
def test_an_answer_that_ends_is_what_its_schema_says(
    engine: tuple[EngineLoop, Tokenizer], schema: dict[str, Any], seed: int, temperature: float
) -> None:
    loop, tokenizer = engine
    grammar = Grammar("json_schema", json.dumps(schema))
    assert problem(grammar) == ""
    requests = [
        Request(
            f"r{number}",
            tokens_of([5, number]),
            SamplingParams(temperature=temperature, seed=seed + number, max_new_tokens=150, grammar=grammar),
        )
        for number in range(4)
    ]
    for generation in loop.generate(requests):
        assert generation.finish in ("stop", "length"), generation
        if generation.finish == "stop":
            jsonschema.validate(json.loads(tokenizer.decode(generation.token_ids)), schema)
    assert loop.snapshot().num_private_pages == 0
