"""From logits to tokens, for all rows of a step at once.

Legend: S rows, V vocabulary, E rows that share a treatment, K candidates looked at in order of probability.

Order of treatment, per row: logit_bias; repetition, presence and frequency penalty; banned ids; grammar; then greedy,
or temperature, top_k, top_p (of what top_k left), min_p, and one draw by inverse CDF.

The random number of a token is a function of (seed, num_generated) and nothing else, the order of candidates is total
(probability, then id), and no row's arithmetic depends on another row: same seed, same tokens, whatever the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.batch import SampleRow
from engine.grammar import GrammarMasks
from engine.request import SamplingParams, TokenLogprobs

#: candidates ranked at first; rows whose top_p or min_p reaches further are ranked over the whole vocabulary
_FIRST_CANDIDATES = 1024
#: 2^-53: the uniform numbers are k * 2^-53 in [0, 1), the doubles of that spacing
_UNIFORM_STEP = 2.0**-53


def sample(
    logits: Tensor, rows: Sequence[SampleRow], masks: GrammarMasks | None = None
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """One token per row, and its log-probabilities where the row asks for them.

    logits [S, V], any float dtype, not changed; rows: S of them. masks: of the rows that follow a grammar.
    Log-probabilities are of the model's own distribution: before bias, penalties, grammar, temperature and truncation.
    A batch of plain greedy rows costs one argmax.
    """
    if not rows:
        return [], []
    scores = logits.float()
    treated = _treat(scores, rows)
    if masks is not None and masks.rows:
        treated = _allow_only(treated, scores, masks)
    tokens = treated.argmax(dim=-1)
    drawn = [index for index, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        at = torch.tensor(drawn, device=logits.device)
        tokens[at] = _draw(treated[at], [rows[index] for index in drawn])
    token_ids: list[int] = tokens.tolist()
    return token_ids, _logprobs(scores, token_ids, rows)


def uniform(seed: int, num_generated: int) -> float:
    """The random number in [0, 1) of output token `num_generated`. The same on every machine and version."""
    digest = hashlib.blake2b(f"{seed}:{num_generated}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * _UNIFORM_STEP


# treatment of logits


def _treat(scores: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """scores [S, V] with every row's bias, penalties and bans applied; `scores` itself when there are none."""
    steps = [
        (_add_bias, lambda row: bool(row.params.logit_bias)),
        (_penalize_repetition, lambda row: row.params.repetition_penalty != 1.0),
        (_penalize_presence_and_frequency, lambda row: _has_count_penalty(row.params)),
        (_ban, lambda row: bool(row.banned_ids)),
    ]
    treated = scores
    for apply, is_wanted in steps:
        wanted = [index for index, row in enumerate(rows) if is_wanted(row)]
        if wanted:
            treated = scores.clone() if treated is scores else treated
            at = torch.tensor(wanted, device=scores.device)
            treated[at] = apply(treated[at], [rows[index] for index in wanted])
    return treated


def _add_bias(scores: Tensor, rows: list[SampleRow]) -> Tensor:
    at, ids = _places(scores, [[token for token, _ in row.params.logit_bias] for row in rows])
    bias = [value for row in rows for token, value in row.params.logit_bias if 0 <= token < scores.shape[1]]
    return scores.index_put((at, ids), _column(bias, scores), accumulate=True)


def _penalize_repetition(scores: Tensor, rows: list[SampleRow]) -> Tensor:
    """Keskar et al. 2019 (CTRL), over prompt and output, as transformers does it: divide above 0, multiply below."""
    is_seen = _counts(scores, [row.prompt_tokens for row in rows]) + _counts(
        scores, [row.output_tokens for row in rows]
    )
    penalty = _column([row.params.repetition_penalty for row in rows], scores)[:, None]
    penalized = torch.where(scores > 0, scores / penalty, scores * penalty)
    return torch.where(is_seen > 0, penalized, scores)


def _penalize_presence_and_frequency(scores: Tensor, rows: list[SampleRow]) -> Tensor:
    """OpenAI's: minus presence once, and minus frequency per occurrence, over the output only."""
    counts = _counts(scores, [row.output_tokens for row in rows])
    presence = _column([row.params.presence_penalty for row in rows], scores)[:, None]
    frequency = _column([row.params.frequency_penalty for row in rows], scores)[:, None]
    return scores - presence * (counts > 0) - frequency * counts


def _ban(scores: Tensor, rows: list[SampleRow]) -> Tensor:
    at, ids = _places(scores, [row.banned_ids for row in rows])
    return scores.index_put((at, ids), scores.new_tensor(-torch.inf))


def _allow_only(treated: Tensor, scores: Tensor, masks: GrammarMasks) -> Tensor:
    """`treated` [S, V] with what the grammars do not allow at minus infinity.

    Where bans and biases left nothing that is allowed, they give way: an answer that breaks its grammar is none.
    """
    at = torch.tensor(masks.rows, device=scores.device)
    is_allowed = _unpacked(torch.from_numpy(masks.bits).to(scores.device), scores.shape[1])
    limited = treated[at].masked_fill(~is_allowed, -torch.inf)
    is_lost = torch.isneginf(limited).all(dim=-1, keepdim=True)
    limited = torch.where(is_lost, scores[at].masked_fill(~is_allowed, -torch.inf), limited)
    return treated.index_copy(0, at, limited)


def _unpacked(bits: Tensor, vocab_size: int) -> Tensor:
    """bool [E, V] of int32 [E, W], the lowest bit of a word first."""
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits[:, :, None] >> places) & 1).bool().flatten(1)[:, :vocab_size]


def _has_count_penalty(params: SamplingParams) -> bool:
    return params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _counts(scores: Tensor, tokens: Sequence[np.ndarray | None]) -> Tensor:
    """float32 [E, V]: how often each token occurs in each row's tokens."""
    at, ids = _places(scores, [() if row is None else row for row in tokens])
    return torch.zeros_like(scores).index_put_((at, ids), scores.new_tensor(1.0), accumulate=True)


def _places(scores: Tensor, ids: Sequence[Sequence[int] | np.ndarray]) -> tuple[Tensor, Tensor]:
    """Indices (row, token) of all ids that lie in the vocabulary; others name no token and are left out."""
    flat = np.concatenate([np.asarray(row, np.int64) for row in ids])
    at = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    is_token = (flat >= 0) & (flat < scores.shape[1])
    return torch.from_numpy(at[is_token]).to(scores.device), torch.from_numpy(flat[is_token]).to(scores.device)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


# drawing


def _draw(scores: Tensor, rows: list[SampleRow]) -> Tensor:
    """int64 [E]: one token per row. scores [E, V], temperature not yet applied."""
    temperature = torch.tensor([row.params.temperature for row in rows], dtype=torch.float64, device=scores.device)
    numbers = [uniform(row.seed, row.num_generated) for row in rows]
    uniforms = torch.tensor(numbers, dtype=torch.float64, device=scores.device)
    # the peak is subtracted first: with any temperature > 0, however small, the peak's weight is exactly 1
    weights = torch.exp((scores.double() - scores.amax(dim=-1, keepdim=True)) / temperature[:, None])
    is_truncated = torch.tensor([_truncates(row.params) for row in rows])
    tokens = torch.empty(len(rows), dtype=torch.int64, device=scores.device)
    for draw, chosen in ((_draw_from_all, ~is_truncated), (_draw_truncated, is_truncated)):
        at = chosen.nonzero().flatten()
        if len(at):
            params = [rows[index].params for index in at.tolist()]
            at = at.to(scores.device)
            tokens[at] = draw(scores[at], weights[at], uniforms[at], params)
    return tokens


def _draw_from_all(scores: Tensor, weights: Tensor, uniforms: Tensor, params: list[SamplingParams]) -> Tensor:
    """No truncation: inverse CDF in the order of ids, no ranking needed."""
    return _invert(weights.cumsum(dim=-1), uniforms, torch.full_like(uniforms, weights.shape[1], dtype=torch.int64))


def _draw_truncated(scores: Tensor, weights: Tensor, uniforms: Tensor, params: list[SamplingParams]) -> Tensor:
    """Inverse CDF over the candidates kept, in order of probability.

    top_k, top_p and min_p each keep a prefix of that order, so their intersection is the shortest of the three.
    """
    vocab_size = scores.shape[1]
    widest = max((k for k in (p.top_k for p in params) if k > 0), default=0)
    num_candidates = min(vocab_size, max(_FIRST_CANDIDATES, widest))
    ids, kept, cumulative = _rank(scores, weights, params, num_candidates)
    tokens = ids.gather(1, _invert(cumulative, uniforms, kept.clamp(max=num_candidates))[:, None]).flatten()
    # only the rows themselves decide whether they are ranked further: the batch does not change their answer
    is_short = (kept > num_candidates).nonzero().flatten()
    if len(is_short):
        again = [params[index] for index in is_short.tolist()]
        ids, kept, cumulative = _rank(scores[is_short], weights[is_short], again, vocab_size)
        places = _invert(cumulative, uniforms[is_short], kept.clamp(max=vocab_size))
        tokens[is_short] = ids.gather(1, places[:, None]).flatten()
    return tokens


def _rank(
    scores: Tensor, weights: Tensor, params: list[SamplingParams], num_candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest candidates: ids [E, K], how many are kept [E] (K + 1: more than K), cumulative weights [E, K]."""
    ids = _ranked_ids(scores, num_candidates)
    ranked = weights.gather(1, ids)
    cumulative = ranked.cumsum(dim=-1)
    vocab_size = scores.shape[1]
    top_k = _per_row(params, lambda p: p.top_k if 0 < p.top_k < vocab_size else vocab_size, ids)
    top_p = _per_row(params, lambda p: p.top_p, weights)
    min_p = _per_row(params, lambda p: p.min_p, weights)
    is_whole = top_k >= vocab_size
    mass_of_top_k = cumulative.gather(1, (top_k - 1).clamp(max=num_candidates - 1)[:, None]).flatten()
    mass = torch.where(is_whole, weights.sum(dim=-1), mass_of_top_k)
    by_top_p = (cumulative < (top_p * mass)[:, None]).sum(dim=-1) + 1
    by_top_p = torch.where(top_p < 1.0, by_top_p, vocab_size)
    by_min_p = (ranked >= min_p[:, None] * ranked[:, :1]).sum(dim=-1)
    # all K pass: how many more would is not known, unless K is everything
    by_min_p = torch.where(by_min_p < num_candidates, by_min_p, vocab_size)
    # at least the likeliest one, also where NaN logits compare false with everything
    return ids, torch.minimum(torch.minimum(top_k, by_top_p), by_min_p).clamp(min=1), cumulative


def _ranked_ids(scores: Tensor, num: int) -> Tensor:
    """int64 [E, num]: ids by falling score, equal scores by rising id.

    A total order, so that the first n are the same however many are asked for (topk promises nothing about ties, and
    16-bit logits tie often): the key holds the order-preserving bits of the float above the complement of the id.
    """
    bits = (scores + 0.0).contiguous().view(torch.int32)  # + 0.0: minus zero becomes zero
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    complement = 0xFFFFFFFF - torch.arange(scores.shape[1], device=scores.device)
    keys = (ordered << 32) | complement
    return 0xFFFFFFFF - (keys.topk(num, dim=-1).values & 0xFFFFFFFF)


def _invert(cumulative: Tensor, uniforms: Tensor, kept: Tensor) -> Tensor:
    """int64 [E]: the place at which the cumulative weight of the first `kept` passes uniform times their mass."""
    mass = cumulative.gather(1, kept[:, None] - 1)
    places = torch.searchsorted(cumulative, uniforms[:, None] * mass, right=True).flatten()
    # rounding may carry uniform * mass up to the mass itself
    return torch.minimum(places, kept - 1)


def _truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _per_row(params: list[SamplingParams], of: Callable[[SamplingParams], float], like: Tensor) -> Tensor:
    return torch.tensor([of(p) for p in params], dtype=like.dtype, device=like.device)


# log-probabilities


def _logprobs(scores: Tensor, token_ids: list[int], rows: Sequence[SampleRow]) -> list[TokenLogprobs | None]:
    """Of each row that asks; scores [S, V] are the model's own logits."""
    answers: list[TokenLogprobs | None] = [None] * len(rows)
    wanted = [index for index, row in enumerate(rows) if row.params.num_logprobs is not None]
    if not wanted:
        return answers
    logprobs = scores[torch.tensor(wanted, device=scores.device)].log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor([[token_ids[index]] for index in wanted], device=scores.device))
    depth = min(scores.shape[1], max(rows[index].params.num_logprobs or 0 for index in wanted))
    top_ids = _ranked_ids(logprobs, depth)
    tops = zip(top_ids.tolist(), logprobs.gather(1, top_ids).tolist(), strict=True)
    for index, (logprob,), (ids, values) in zip(wanted, chosen.tolist(), tops, strict=True):
        num = rows[index].params.num_logprobs or 0
        answers[index] = TokenLogprobs(logprob, tuple(ids[:num]), tuple(values[:num]))
    return answers
