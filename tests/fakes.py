"""A model that tests can foretell: the next token is a pure function of the whole context, as read from the pages.

Its "KV" of a position is the token and a number mixed from everything before it, kept per page and slot. A step reads
the context back through the page tables it is given, so a stale, swapped or doubly owned page, a page that was handed
out twice, or a prefix computed under another context gives a wrong token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from cache.device_cache import DeviceCache
from configs.errors import InvariantError
from engine.batch import Batch, SampleRow, StepResult
from engine.control_words import ALWAYS_VALID, ControlWords
from engine.events import RequestArrived
from engine.flush import FlushCommand, FlushMode, FlushScope
from engine.host_calls import HostSettings
from engine.limits import SchedulerLimits
from engine.loop import Copier, EngineLoop
from engine.request import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from engine.scheduler import Scheduler

#: tokens, numbers, stamps, ages and births of one page's slots
PageContent: TypeAlias = tuple[np.ndarray, ...]

VOCAB_SIZE = 61
EOS = 0
#: the tree generation of KV that came from a host tier
LOADED = -2
_MASK = (1 << 64) - 1
_COEFFICIENTS = np.random.default_rng(20).integers(1, 1 << 63, size=4096, dtype=np.uint64) | np.uint64(1)


def _mix(value: int) -> int:
    """splitmix64's finaliser: every input bit changes about half of the output bits."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _add(total: int, position: int, token: int) -> tuple[int, int]:
    """One more token of a context whose sum is `total`: its own number, and the sum with it."""
    deep = _mix((total + 0x9E3779B97F4A7C15 * (token + 1)) & _MASK)
    return deep, (total + int(_COEFFICIENTS[position]) * (deep ^ token)) & _MASK


def _choose(total: int, banned_ids: Sequence[int]) -> int:
    value = _mix(total)
    while value % VOCAB_SIZE in banned_ids:
        value = _mix(value + 1)
    return value % VOCAB_SIZE


def tokens_of(ids: Sequence[int]) -> bytes:
    """Token ids as the system carries them."""
    return np.array(ids, dtype=np.int32).tobytes()


@dataclass(frozen=True, slots=True)
class Foretold:
    """What a request must answer, whatever happened to it on the way."""

    token_ids: list[int]
    finish: FinishReason


def foretell(request: Request, max_total: int, eos_ids: Sequence[int] = (EOS,)) -> Foretold:
    """The pure function. No pages, no scheduler."""
    params = request.sampling
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}
    context = np.frombuffer(request.tokens, dtype=np.int32).tolist()
    limit = min(max_total, len(context) + params.max_new_tokens)
    total = 0
    for position, token in enumerate(context):
        _, total = _add(total, position, token)
    token_ids: list[int] = []
    while True:
        token = _choose(total, sorted(ends) if len(token_ids) < params.min_new_tokens else ())
        _, total = _add(total, len(context) + len(token_ids), token)
        token_ids.append(token)
        if token in ends and len(token_ids) > params.min_new_tokens:
            return Foretold(token_ids, "stop")
        if len(context) + len(token_ids) >= limit:
            return Foretold(token_ids, "length")


class FakeRunner:
    """Stands where a ModelRunner stands."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._page_size = page_size
        rng = np.random.default_rng(0)
        # what an unwritten slot holds must spoil whoever reads it
        self._tokens = rng.integers(0, VOCAB_SIZE, size=num_pages * page_size, dtype=np.int64)
        self._deep = rng.integers(0, 1 << 63, size=num_pages * page_size, dtype=np.uint64)
        #: (epoch, tree generation) of the admission that wrote each slot
        self._stamps = np.full((num_pages * page_size, 2), -1, dtype=np.int64)
        #: number of the step that computed the oldest KV which each slot's KV was computed from, its own included
        self._ages = np.full(num_pages * page_size, -1, dtype=np.int64)
        #: the same as a moment of the test's clock
        self._births = np.zeros(num_pages * page_size)
        self.now_s: Callable[[], float] = lambda: 0.0
        #: (epoch, tree generation) per row of the batch to come; set by the test, None: not checked
        self.admissions: Callable[[], list[tuple[int, int]]] | None = None
        #: raised by the next run, after it has spoilt the slots it was to write
        self.failure: BaseException | None = None
        #: called in the middle of each run
        self.during_run: Callable[[Batch], None] = lambda batch: None
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> StepResult:
        self.batches.append(batch)
        self.during_run(batch)
        slots = self._slots(batch)
        self._check_owners(batch)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            for row_slots, q_len in zip(slots, batch.q_lens, strict=True):
                self._deep[row_slots[-q_len:]] = 4711
            raise failure
        totals = self._compute(batch, slots)
        chosen = [_choose(totals[row], s.banned_ids) for row, s in zip(batch.sample_rows, batch.samples, strict=True)]
        return StepResult(batch.step, chosen, [_logprobs(sample) for sample in batch.samples])

    def page_content(self, page: int) -> PageContent:
        """What a copy of the page takes along; a copy."""
        rows = self._rows(page)
        columns = (self._tokens, self._deep, self._stamps, self._ages, self._births)
        return tuple(column[rows].copy() for column in columns)

    def put_page(self, page: int, content: PageContent | None) -> None:
        """A copy from elsewhere lands in the page; None: half of it, or rubbish."""
        rows = self._rows(page)
        if content is None:
            self._deep[rows] = 4711
            return
        self._tokens[rows], self._deep[rows], self._stamps[rows], self._ages[rows], self._births[rows] = content
        self._stamps[rows, 1] = LOADED

    def oldest(self, row: int, batch: Batch) -> tuple[int, float]:
        """Step and moment of the oldest KV that a row of the batch to come reads; (large, inf) if it reads none."""
        past = self._slots(batch)[row][: -batch.q_lens[row]]
        return int(self._ages[past].min(initial=1 << 60)), float(self._births[past].min(initial=np.inf))

    def _rows(self, page: int) -> slice:
        return slice(page * self._page_size, (page + 1) * self._page_size)

    def _slots(self, batch: Batch) -> list[np.ndarray]:
        """Per row: the slots of its context, in order. Checks the arrays against each other on the way."""
        slots: list[np.ndarray] = []
        start = 0
        for q_len, kv_len, table in zip(batch.q_lens, batch.kv_lens, batch.page_tables, strict=True):
            positions = np.arange(kv_len)
            if len(table) != -(-kv_len // self._page_size) or not 1 <= q_len <= kv_len:
                raise InvariantError(f"a row of {q_len} of {kv_len} tokens comes with {len(table)} pages")
            if batch.positions[start : start + q_len].tolist() != positions[-q_len:].tolist():
                raise InvariantError("positions do not end at the row's length")
            slots.append(table[positions // self._page_size] * self._page_size + positions % self._page_size)
            start += q_len
        if start != batch.num_tokens:
            raise InvariantError(f"{batch.num_tokens} tokens in rows of {start}")
        return slots

    def _check_owners(self, batch: Batch) -> None:
        """A page that one row writes is in no other row's table."""
        begins = (batch.kv_lens - batch.q_lens) // self._page_size
        for row, (begin, table) in enumerate(zip(begins, batch.page_tables, strict=True)):
            written = set(table[begin:].tolist())
            for other, foreign in enumerate(batch.page_tables):
                if other != row and written & set(foreign.tolist()):
                    raise InvariantError(f"page written by one row and owned by another: {written}")

    def _compute(self, batch: Batch, slots: list[np.ndarray]) -> list[int]:
        """Write the new tokens' KV; per row the sum over its context."""
        totals: list[int] = []
        start = 0
        admissions = self.admissions() if self.admissions is not None else [None] * len(slots)
        for q_len, row_slots, admission in zip(batch.q_lens, slots, admissions, strict=True):
            past, new = row_slots[:-q_len], row_slots[-q_len:]
            self._check_stamps(past, admission)
            total = self._total(past)
            for position, (slot, token) in enumerate(zip(new, batch.input_ids[start : start + q_len], strict=True)):
                deep, total = _add(total, len(past) + position, int(token))
                self._tokens[slot], self._deep[slot] = token, deep
                self._stamps[slot] = admission or (-1, -1)
            self._ages[new] = self._ages[past].min(initial=len(self.batches) - 1)
            self._births[new] = self._births[past].min(initial=self.now_s())
            totals.append(total)
            start += q_len
        return totals

    def _total(self, slots: np.ndarray) -> int:
        """The sum over a context, read from the pages."""
        values = self._deep[slots] ^ self._tokens[slots].astype(np.uint64)
        return int((_COEFFICIENTS[: len(slots)] * values).sum(dtype=np.uint64))

    def _check_stamps(self, past: np.ndarray, admission: tuple[int, int] | None) -> None:
        """protocol.md, invariant 2: all KV a row reads was computed under its own epoch and tree generation."""
        stamps = self._stamps[past]
        is_right = (stamps[:, 0] == admission[0]) & np.isin(stamps[:, 1], (admission[1], LOADED)) if admission else True
        if not np.all(is_right):
            found = sorted(set(map(tuple, self._stamps[past].tolist())))
            raise InvariantError(f"invariant 2: a row admitted under {admission} reads KV of {found}")


def _logprobs(sample: SampleRow) -> TokenLogprobs | None:
    return None if sample.params.num_logprobs is None else TokenLogprobs(-1.0)


class FakeClock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(slots=True)
class Answer:
    """What a client of the fake rank has received."""

    token_ids: list[int] = field(default_factory=list)
    finishes: list[FinishReason] = field(default_factory=list)
    last: Output | None = None


class FakeRank:
    """A whole engine around the fake model, driven turn by turn on one thread with a clock of the test's."""

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 4,
        *,
        max_running: int = 8,
        max_step_tokens: int = 32,
        max_len: int = 128,
        cache: DeviceCache | None = None,
        host: HostSettings | None = None,
        copier: Copier | None = None,
    ) -> None:
        self.clock = FakeClock()
        self.words: ControlWords = ALWAYS_VALID
        self.cache = cache or DeviceCache(num_pages, page_size)
        self.limits = SchedulerLimits(max_running, max_step_tokens, max_len, (EOS,), 1000, VOCAB_SIZE)
        self.scheduler = Scheduler(self.cache, self.limits, host)
        self.runner = FakeRunner(num_pages, page_size)
        self.runner.admissions = self._admissions
        self.runner.now_s = self.clock
        self.answers: dict[str, Answer] = {}
        self.loop = EngineLoop(
            self.scheduler,
            self.runner,
            clock=self.clock,
            read_words=lambda: self.words,
            on_outputs=self._take_outputs,
            copier=copier,
        )

    @property
    def max_total(self) -> int:
        return self.limits.max_total_tokens(self.cache.num_pages * self.cache.page_size)

    def submit(self, request_id: str, prompt: Sequence[int], namespace: str = "", **params: object) -> Request:
        """Post a greedy request; `params` are fields of SamplingParams."""
        sampling = SamplingParams(temperature=0.0, **params)  # pyright: ignore[reportArgumentType]
        request = Request(request_id, tokens_of(prompt), sampling, namespace)
        self.loop.post(RequestArrived(request))
        return request

    def turn(self, count: int = 1) -> bool:
        """Take turns, looking everything over after each; whether there is more to do."""
        has_work = True
        for _ in range(count):
            has_work = self.loop.turn()
            self.scheduler.check()
            self.clock.now_s += 0.001
        return has_work

    def finish(self, max_turns: int = 2000) -> None:
        """Take turns until nothing is left to do."""
        while self.turn():
            max_turns -= 1
            assert max_turns, "the engine does not come to rest"

    def token_ids(self, request_id: str) -> list[int]:
        return self.answers[request_id].token_ids

    def _admissions(self) -> list[tuple[int, int]]:
        holds = [row.sequence.hold for row in self.scheduler.rows]
        return [(hold.epoch, hold.generation) for hold in holds if hold is not None]

    def _take_outputs(self, outputs: list[Output]) -> None:
        for output in outputs:
            answer = self.answers.setdefault(output.request_id, Answer())
            answer.token_ids += output.token_ids
            answer.last = output
            if output.finish is not None:
                answer.finishes.append(output.finish)


def flush_command(
    flush_id: str = "f",
    mode: FlushMode = "wait",
    *,
    epoch: int = 1,
    budget_s: float = 1.0,
    timeout_s: float | None = None,
    term: int = 1,
    scope: FlushScope | None = None,
    dry_run: bool = False,
    tiers: tuple[str, ...] = ("device",),
    index: int = 0,
    sub_epoch: int = 0,
) -> FlushCommand:
    """A command with the fields a test does not care about filled in."""
    timeout_s = budget_s if timeout_s is None else timeout_s
    return FlushCommand(
        flush_id, mode, tiers, epoch, term, budget_s, timeout_s, scope, dry_run, index, sub_epoch=sub_epoch
    )
