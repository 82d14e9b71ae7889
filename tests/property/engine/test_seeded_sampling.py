"""Same seed, same tokens, whatever the batch: alone, among others, retracted in between, from cache or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cache.device_cache import DeviceCache
from engine.generation import Generation
from engine.limits import SchedulerLimits
from engine.loop import EngineLoop
from engine.models import LoadedModel, load_model
from engine.request import Request, SamplingParams
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from tests.models import write_random_model

PAGE_SIZE = 8
BASE = SamplingParams(temperature=0.9, max_new_tokens=24, ignore_eos=True, num_logprobs=3)
PARAMS = [
    BASE,
    replace(BASE, temperature=1.5),
    replace(BASE, top_p=0.8),
    replace(BASE, top_k=7),
    replace(BASE, min_p=0.05),
    replace(BASE, repetition_penalty=1.3),
    replace(BASE, presence_penalty=1.0, frequency_penalty=0.5, top_p=0.9),
    replace(BASE, logit_bias=((5, 4.0), (9, 3.0))),
    replace(BASE, min_new_tokens=10, stop_token_ids=tuple(range(0, 512, 2)), ignore_eos=False),
    replace(BASE, temperature=0.0, frequency_penalty=1.0),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_random_model(tmp_path_factory.mktemp("llama"), "llama"), "cpu", "float32", None)


def requests_of(seed: int) -> list[Request]:
    """Each kind of sampling three times: two with the same prompt and other seeds, one with another prompt."""
    rng = np.random.default_rng(seed)
    requests = []
    for params in PARAMS:
        prompts = [rng.integers(0, 512, rng.integers(1, 60)).astype(np.int32).tobytes() for _ in range(2)]
        for prompt in (prompts[0], prompts[0], prompts[1]):
            chosen = replace(params, seed=len(requests))
            requests.append(Request(str(len(requests)), prompt, chosen))
    return requests


def loop_of(model: LoadedModel, num_pages: int, max_running: int) -> EngineLoop:
    runner = ModelRunner(model, num_pages, PAGE_SIZE)
    limits = SchedulerLimits(
        max_running, 48, model.facts.max_len, model.facts.eos_token_ids, runner.bytes_per_page, 512
    )
    return EngineLoop(Scheduler(DeviceCache(num_pages, PAGE_SIZE), limits), runner)


def test_seeds_decide_whatever_the_batch(model: LoadedModel) -> None:
    requests = requests_of(1)
    alone: list[Generation] = []
    for request in requests:
        alone += loop_of(model, num_pages=40, max_running=1).generate([request])
    loop = loop_of(model, num_pages=20, max_running=12)
    together = loop.generate(requests[::-1])[::-1]

    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert [g.finish for g in together] == [g.finish for g in alone]
    assert loop.snapshot().counters.num_retractions > 0
    assert loop.snapshot().counters.num_cached_tokens > 0
    ends = {g.finish for g in alone}
    assert ends == {"stop", "length"}


def test_other_seeds_give_other_tokens(model: LoadedModel) -> None:
    answers = loop_of(model, num_pages=100, max_running=12).generate(requests_of(2))
    same_prompt = [(a.token_ids, b.token_ids) for a, b in zip(answers[0::3], answers[1::3], strict=True)]

    assert [a == b for a, b in same_prompt] == [False] * 9 + [True]


def test_stop_tokens_wait_for_the_least_length(model: LoadedModel) -> None:
    """Half of the vocabulary ends the request, but not before ten tokens."""
    requests = [request for request in requests_of(3) if request.sampling.min_new_tokens]
    for answer in loop_of(model, num_pages=100, max_running=12).generate(requests):
        assert len(answer.token_ids) > 10 or answer.finish == "length"
        assert all(token % 2 for token in answer.token_ids[:10])
        assert len(answer.logprobs) == len(answer.token_ids)
        assert answer.finish == "stop"
        assert answer.matched_stop == answer.token_ids[-1]
