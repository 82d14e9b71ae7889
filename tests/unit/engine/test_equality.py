"""Greedy tokens of the paged engine are those of plain transformers: mixed batches, chunks, pages in no order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.models import LoadedModel, load_model
from engine.runner import ModelRunner
from tests.hand_scheduler import HandScheduler, Sequence
from tests.models import ARCHITECTURES, Architecture, write_random_model
from tests.oracle import PlainModel


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture: Architecture = request.param
    return write_random_model(tmp_path_factory.mktemp(architecture), architecture)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return load_model(checkpoint, "cpu", "auto", None)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> PlainModel:
    return PlainModel(checkpoint)


@pytest.mark.parametrize("page_size", [1, 16])
def test_mixed_ragged_batches_equal_plain_generation(model: LoadedModel, plain: PlainModel, page_size: int) -> None:
    rng = np.random.default_rng(page_size)
    runner = ModelRunner(model, num_pages=3000 // page_size, page_size=page_size)
    # what an earlier owner left in a page must not matter, NaN included
    runner.kv_pool.pages.fill_(torch.nan)
    lengths = [1, 2, 15, 16, 17, 31, 33, 64, 100, 130, 300, 600]
    sequences = [Sequence(rng.integers(0, 512, length).tolist(), num_new=12) for length in rng.permutation(lengths)]
    scheduler = HandScheduler(runner, rng, max_step_tokens=96, max_running=5)

    scheduler.run(sequences)

    outcomes = [plain.compare(sequence.prompt, sequence.output) for sequence in sequences]
    assert scheduler.num_chunks > 5
    assert scheduler.num_mixed_steps > 5
    assert outcomes.count("equal") >= len(sequences) - 1


def test_blocks_of_a_long_chunk_equal_plain_generation(model: LoadedModel, plain: PlainModel) -> None:
    """A chunk longer than a block of queries, with a past."""
    rng = np.random.default_rng(7)
    runner = ModelRunner(model, num_pages=64, page_size=16)
    sequence = Sequence(rng.integers(0, 512, 900).tolist(), num_new=4)

    HandScheduler(runner, rng, max_step_tokens=600, max_running=1).run([sequence])

    assert plain.compare(sequence.prompt, sequence.output) == "equal"


def test_logits_do_not_depend_on_neighbours_or_page_order(model: LoadedModel) -> None:
    """The same sequence alone and among others, through other pages: the same tokens."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 512, length).tolist() for length in (5, 40, 90, 200)]
    alone = []
    for prompt in prompts:
        sequence = Sequence(prompt, num_new=8)
        HandScheduler(ModelRunner(model, 64, 16), rng, max_step_tokens=64, max_running=1).run([sequence])
        alone.append(sequence.output)
    together = [Sequence(prompt, num_new=8) for prompt in prompts]

    HandScheduler(ModelRunner(model, 64, 16), rng, max_step_tokens=64, max_running=4).run(together)

    assert [sequence.output for sequence in together] == alone
