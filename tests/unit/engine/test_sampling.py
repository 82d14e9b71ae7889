"""Sampling against a plain reference: distributions by chi-square, seeds by equality, greedy by argmax.

The reference below is numpy and loops, written from the parameters' definitions, and shares no code with the sampler.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import sampling
from engine.batch import SampleRow
from engine.request import SamplingParams
from engine.sampling import sample, uniform

VOCAB = 24
#: one-sided 1e-4: with fixed seeds a test passes or fails for ever, so the level only says how odd a pass may look
Z_LEVEL = 3.719
NUM_DRAWS = 6000

PROMPT = np.array([3, 3, 5, 7, 20], np.int32)
OUTPUT = np.array([5, 5, 5, 9, 11], np.int32)


def logits_of(seed: int, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, 2.0, vocab).astype(np.float32)


def row_of(params: SamplingParams, seed: int = 0, num_generated: int = 0, banned: tuple[int, ...] = ()) -> SampleRow:
    return SampleRow(params, seed, num_generated, PROMPT, OUTPUT, banned)


def reference(logits: np.ndarray, params: SamplingParams, banned: tuple[int, ...] = ()) -> np.ndarray:
    """Probabilities of one row, step by step from the definitions."""
    x = logits.astype(np.float64).copy()
    for token, bias in params.logit_bias:
        x[token] += bias
    for token in set(PROMPT.tolist()) | set(OUTPUT.tolist()):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in range(len(x)):
        count = OUTPUT.tolist().count(token)
        x[token] -= params.frequency_penalty * count + (params.presence_penalty if count else 0.0)
    x[list(banned)] = -np.inf
    if params.temperature == 0:
        return np.eye(len(x))[int(np.argmax(x))]
    x = x / params.temperature
    if params.top_k > 0:
        for token in np.argsort(-x)[params.top_k :]:
            x[token] = -np.inf
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    if params.top_p < 1.0:
        total = 0.0
        for token in np.argsort(-p):
            if total >= params.top_p:
                p[token] = 0.0
            total += p[token]
        p = p / p.sum()
    p[p < params.min_p * p.max()] = 0.0
    return p / p.sum()


def draws(logits: np.ndarray, params: SamplingParams, banned: tuple[int, ...] = (), seed: int = 1) -> np.ndarray:
    rows = [row_of(params, seed, index, banned) for index in range(NUM_DRAWS)]
    tokens, _ = sample(torch.from_numpy(logits).expand(NUM_DRAWS, -1), rows)
    return np.bincount(tokens, minlength=len(logits))


def chi_square_excess(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Chi-square minus its critical value (Wilson and Hilferty 1931); cells expected below 5 are pooled."""
    expected = probabilities * counts.sum()
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum()).astype(float)
    expected = np.append(expected[~small], expected[small].sum())
    used = expected > 0
    assert observed[~used].sum() == 0, "a token outside the distribution was drawn"
    freedom = int(used.sum()) - 1
    if freedom == 0:
        return -1.0
    statistic = ((observed[used] - expected[used]) ** 2 / expected[used]).sum()
    spread = 2 / (9 * freedom)
    return float(statistic - freedom * (1 - spread + Z_LEVEL * math.sqrt(spread)) ** 3)


PLAIN = SamplingParams(temperature=1.0)
CASES = {
    "temperature 1": PLAIN,
    "temperature 0.4": replace(PLAIN, temperature=0.4),
    "temperature 2.5": replace(PLAIN, temperature=2.5),
    "top_k 1": replace(PLAIN, top_k=1),
    "top_k 5": replace(PLAIN, top_k=5),
    "top_k beyond the vocabulary": replace(PLAIN, top_k=1000),
    "top_p 0.3": replace(PLAIN, top_p=0.3),
    "top_p 0.9": replace(PLAIN, top_p=0.9),
    "min_p 0.1": replace(PLAIN, min_p=0.1),
    "min_p 1": replace(PLAIN, min_p=1.0),
    "repetition 1.5": replace(PLAIN, repetition_penalty=1.5),
    "repetition 0.7": replace(PLAIN, repetition_penalty=0.7),
    "presence 1.2": replace(PLAIN, presence_penalty=1.2),
    "presence -1.2": replace(PLAIN, presence_penalty=-1.2),
    "frequency 0.8": replace(PLAIN, frequency_penalty=0.8),
    "logit_bias": replace(PLAIN, logit_bias=((2, 3.0), (4, -2.0), (2, 0.5))),
    "top_k and top_p": replace(PLAIN, top_k=8, top_p=0.7),
    "top_p and min_p": replace(PLAIN, top_p=0.95, min_p=0.2),
    "everything": SamplingParams(
        temperature=1.3,
        top_p=0.9,
        top_k=12,
        min_p=0.02,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias=((1, 1.0), (5, 2.0)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_distribution_is_that_of_the_reference(name: str) -> None:
    params = CASES[name]
    for seed in (10, 11):
        logits = logits_of(seed)
        assert chi_square_excess(draws(logits, params), reference(logits, params)) < 0


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in ("temperature 1", "top_k beyond the vocabulary")]
)
def test_the_chi_square_would_notice_a_missing_parameter(name: str) -> None:
    """The same draws against the distribution without the parameter: rejected, so the test above can fail."""
    logits = logits_of(10)
    without = reference(logits, PLAIN)

    assert chi_square_excess(draws(logits, CASES[name]), without) > 0


def test_banned_ids_are_never_drawn() -> None:
    logits = logits_of(12)
    banned = tuple(int(token) for token in np.argsort(-logits)[:3])

    assert chi_square_excess(draws(logits, PLAIN, banned), reference(logits, PLAIN, banned)) < 0
    assert draws(logits, PLAIN, banned)[list(banned)].sum() == 0


@pytest.mark.parametrize("name", CASES)
def test_greedy_takes_the_best_after_penalties(name: str) -> None:
    for seed in range(20):
        logits = logits_of(seed)
        params = replace(CASES[name], temperature=0.0)
        banned = (int(np.argmax(logits)),) if seed % 2 else ()
        tokens, _ = sample(torch.from_numpy(logits)[None], [row_of(params, banned=banned)])
        assert tokens == [int(np.argmax(reference(logits, params, banned)))]


def test_a_row_draws_the_same_whatever_the_batch() -> None:
    """Every case alone and among all others, in shuffled order: the same tokens and log-probabilities."""
    rng = np.random.default_rng(5)
    cases = [replace(params, num_logprobs=2) for params in CASES.values()] + [replace(PLAIN, temperature=0.0)]
    rows = [row_of(cases[index % len(cases)], seed=index, num_generated=index % 7) for index in range(200)]
    logits = torch.from_numpy(rng.normal(0, 2, (200, 3000)).astype(np.float32))
    alone = [sample(logits[index][None], [row]) for index, row in enumerate(rows)]

    order = rng.permutation(200)
    tokens, logprobs = sample(logits[torch.from_numpy(order)], [rows[index] for index in order])

    assert tokens == [alone[index][0][0] for index in order]
    assert [p.top_ids for p in logprobs if p] == [p.top_ids for i in order for p in alone[i][1] if p]


def test_seed_and_position_decide_the_token() -> None:
    logits = torch.from_numpy(logits_of(1, 500)).expand(300, -1)
    rows = [row_of(PLAIN, seed=7, num_generated=index) for index in range(300)]
    first, _ = sample(logits, rows)
    again, _ = sample(logits, rows)
    other, _ = sample(logits, [replace(row, seed=8) for row in rows])

    assert first == again
    assert sum(a != b for a, b in zip(first, other, strict=True)) > 200
    assert len(set(first)) > 20


def test_uniform_is_pinned_and_uniform() -> None:
    """The numbers are part of the contract: a seed gives the same tokens after an upgrade."""
    assert uniform(0, 0) == 0.3859926107094097
    assert uniform(-(2**70), 3) == 0.2921235363812068
    numbers = np.array([uniform(seed, place) for seed in range(50) for place in range(200)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.bincount((numbers * 50).astype(int), minlength=50)
    assert chi_square_excess(counts, np.full(50, 1 / 50)) < 0


@pytest.mark.parametrize("params", [replace(PLAIN, top_p=0.97), replace(PLAIN, min_p=0.001)], ids=["top_p", "min_p"])
def test_truncation_beyond_the_first_candidates(params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat distribution keeps thousands: the second ranking gives what one ranking of everything gives."""
    logits = torch.from_numpy(np.random.default_rng(2).normal(0, 0.5, (40, 6000)).astype(np.float32))
    rows = [row_of(replace(params, top_k=50) if i % 3 == 0 else params, seed=i) for i in range(40)]
    tokens, _ = sample(logits, rows)
    monkeypatch.setattr(sampling, "_FIRST_CANDIDATES", 6000)

    assert sample(logits, rows)[0] == tokens
    ranks = (logits > logits.gather(1, torch.tensor(tokens)[:, None])).sum(1)
    assert ranks.max() > 1024


def test_equal_logits_rank_by_id() -> None:
    """16-bit logits tie often; which of them is kept must not depend on the batch."""
    logits = torch.zeros(1, 3000, dtype=torch.bfloat16)
    logits[0, 100:] = 1.0
    params = replace(PLAIN, top_k=3, num_logprobs=4)
    tokens, logprobs = sample(logits.expand(200, -1), [row_of(params, num_generated=i) for i in range(200)])

    assert set(tokens) == {100, 101, 102}
    assert logprobs[0] is not None
    assert logprobs[0].top_ids == (100, 101, 102, 103)


def test_minus_zero_ranks_as_zero() -> None:
    logits = torch.zeros(1, 50)
    logits[0, :10] = -0.0

    _, logprobs = sample(logits, [row_of(replace(PLAIN, num_logprobs=3))])
    tokens, _ = sample(logits.expand(50, -1), [row_of(replace(PLAIN, top_k=2), num_generated=i) for i in range(50)])

    assert set(tokens) == {0, 1}
    assert logprobs[0] is not None
    assert logprobs[0].top_ids == (0, 1, 2)


@pytest.mark.parametrize("params", [PLAIN, replace(PLAIN, top_p=0.9)], ids=["all", "truncated"])
def test_the_smallest_random_number_draws_no_impossible_token(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.from_numpy(logits_of(8))[None]
    monkeypatch.setattr(sampling, "uniform", lambda seed, num_generated: 0.0)

    tokens, _ = sample(logits, [row_of(params, banned=(0, 1, 2))])

    assert tokens[0] > 2


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = logits_of(3)
    params = replace(CASES["everything"], num_logprobs=3)
    rows = [row_of(params, num_generated=1), row_of(PLAIN), row_of(replace(params, num_logprobs=0))]

    tokens, logprobs = sample(torch.from_numpy(logits).expand(3, -1), rows)

    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    assert logprobs[1] is None
    assert logprobs[0] is not None
    assert logprobs[2] is not None
    assert logprobs[0].logprob == pytest.approx(expected[tokens[0]], abs=1e-5)
    assert logprobs[0].top_ids == tuple(np.argsort(-logits)[:3])
    assert logprobs[0].top_logprobs == pytest.approx(np.sort(expected)[::-1][:3], abs=1e-5)
    assert logprobs[2].top_ids == ()


def test_logits_are_not_changed() -> None:
    logits = torch.from_numpy(logits_of(4)).expand(2, -1).contiguous()
    before = logits.clone()
    sample(logits, [row_of(CASES["everything"], banned=(1,)), row_of(replace(PLAIN, temperature=0.0), banned=(2,))])

    assert torch.equal(logits, before)


def test_ids_outside_the_vocabulary_are_left_out() -> None:
    logits = torch.from_numpy(logits_of(5))[None]
    params = replace(PLAIN, temperature=0.0, logit_bias=((VOCAB, 50.0), (-1, 50.0), (4, 60.0)), frequency_penalty=1.0)
    row = SampleRow(params, 0, 0, None, np.array([VOCAB + 3, 2], np.int32), (9999,))

    assert sample(logits, [row])[0] == [4]


@pytest.mark.parametrize("temperature", [1e-40, 1e-8])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = logits_of(6)
    counts = draws(logits, replace(PLAIN, temperature=temperature, top_p=0.99))

    assert counts.argmax() == logits.argmax()
    assert counts.max() == NUM_DRAWS


def test_a_row_of_nan_disturbs_no_other_row() -> None:
    logits = torch.from_numpy(np.stack([logits_of(1), np.full(VOCAB, np.nan, np.float32), logits_of(2)]))
    for params in (PLAIN, replace(PLAIN, top_p=0.5), replace(PLAIN, min_p=0.5), replace(PLAIN, temperature=0.0)):
        rows = [row_of(params, seed=index) for index in range(3)]
        tokens, _ = sample(logits, rows)
        assert tokens[0] == sample(logits[:1], rows[:1])[0][0]
        assert tokens[2] == sample(logits[2:], rows[2:])[0][0]
        assert 0 <= tokens[1] < VOCAB


def test_nothing_to_sample() -> None:
    assert sample(torch.empty(0, VOCAB), []) == ([], [])
