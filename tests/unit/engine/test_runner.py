"""One step: what it leaves alone, what it returns, and that a broken neighbour is nobody's problem."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import InvariantError
from engine.batch import Batch, SampleRow
from engine.models import LoadedModel, load_model
from engine.request import SamplingParams
from engine.runner import ModelRunner
from tests.models import write_random_model

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_random_model(tmp_path_factory.mktemp("llama"), "llama"), "cpu", "auto", None)


def prefill(
    *rows: tuple[list[int], list[int]], samples: list[int] | None = None, params: SamplingParams = GREEDY
) -> Batch:
    """rows: (tokens, pages), whole prompts. samples: rows that sample; None: all."""
    chosen = list(range(len(rows))) if samples is None else samples
    lens = np.array([len(tokens) for tokens, _ in rows], np.int32)
    return Batch(
        step=7,
        input_ids=np.concatenate([tokens for tokens, _ in rows]).astype(np.int32),
        positions=np.concatenate([np.arange(n) for n in lens]).astype(np.int32),
        q_lens=lens,
        kv_lens=lens,
        page_tables=[np.array(pages, np.int32) for _, pages in rows],
        sample_rows=np.array(chosen, np.int32),
        samples=[SampleRow(params, seed=row, num_generated=0) for row in chosen],
    )


def test_only_the_batchs_slots_are_written(model: LoadedModel) -> None:
    runner = ModelRunner(model, num_pages=8, page_size=16)
    runner.kv_pool.pages.fill_(5.0)
    runner.run(prefill((list(range(20)), [6, 2]), ([1, 2, 3], [4])))

    untouched = [0, 1, 3, 5, 7]
    assert (runner.kv_pool.pages[untouched] == 5.0).all()
    assert (runner.kv_pool.pages[6] != 5.0).all()
    assert (runner.kv_pool.pages[2, :, :, 4:] == 0).all()
    assert (runner.kv_pool.pages[4, :, :, 3:] == 0).all()


def test_results_stand_in_the_order_of_the_sample_rows(model: LoadedModel) -> None:
    runner = ModelRunner(model, num_pages=8, page_size=16)
    rows = ([5, 6, 7], [0]), ([300] * 9, [1]), ([17, 18], [2])
    everyone = runner.run(prefill(*rows))
    some = runner.run(prefill(*rows, samples=[0, 2]))

    assert everyone.step == some.step == 7
    assert some.token_ids == [everyone.token_ids[0], everyone.token_ids[2]]
    assert everyone.logprobs == [None, None, None]


def test_a_step_in_which_nobody_samples(model: LoadedModel) -> None:
    runner = ModelRunner(model, num_pages=8, page_size=16)
    result = runner.run(prefill(([5, 6, 7], [3]), samples=[]))

    assert (result.token_ids, result.logprobs) == ([], [])
    assert (runner.kv_pool.pages[3, :, :, :3] != 0).all()


def test_logprobs_are_those_of_the_model(model: LoadedModel) -> None:
    runner = ModelRunner(model, num_pages=8, page_size=16)
    tokens = [9, 8, 7, 6]
    result = runner.run(prefill((tokens, [0]), params=SamplingParams(temperature=0.0, num_logprobs=2)))

    model.module.set_attn_implementation("sdpa")
    plain = model.module(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
    model.module.set_attn_implementation("tidegate_paged")
    (answer,) = result.logprobs
    assert answer is not None
    assert answer.top_logprobs == pytest.approx(plain.topk(2).values.tolist(), abs=1e-5)
    assert answer.top_ids == tuple(plain.topk(2).indices.tolist())
    assert answer.logprob == answer.top_logprobs[0]


def test_the_batch_is_not_changed(model: LoadedModel) -> None:
    batch = prefill(([5, 6, 7], [0]), ([1] * 17, [1, 2]))
    arrays = [batch.input_ids, batch.positions, batch.q_lens, batch.kv_lens, batch.sample_rows, *batch.page_tables]
    before = [array.copy() for array in arrays]
    for array in arrays:
        array.setflags(write=False)
    ModelRunner(model, num_pages=8, page_size=16).run(batch)

    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


def test_torch_threads_are_left_alone_unless_told(model: LoadedModel) -> None:
    before = torch.get_num_threads()
    ModelRunner(model, num_pages=1, page_size=16)
    assert torch.get_num_threads() == before
    try:
        ModelRunner(model, num_pages=1, page_size=16, num_threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_bytes_per_page_follow_from_the_facts(model: LoadedModel) -> None:
    runner = ModelRunner(model, num_pages=3, page_size=16)

    assert runner.bytes_per_page == runner.facts.kv_bytes_per_token * 16
    assert runner.kv_pool.pages.nbytes == 3 * runner.bytes_per_page


def test_a_call_that_bypasses_the_runner_is_an_error(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(InvariantError, match="without a step"):
        model.module(torch.tensor([[1, 2]]), use_cache=False)
