"""What sharing the host tier between the ranks of a node is worth: hit rates on a synthetic multi-turn trace.

Eight simulated ranks serve conversations: Poisson arrivals, shared system prompts, answers, think times. Each rank has
a device pool; the host memory is one tier for all of them, or the same bytes split into eight private ones. Requests
go round the ranks, or to the longest known prefix within bounded load, by the door's own `choose`. Pages are counted,
not copied; a page that is evicted from a device goes to the host tier, as under `write_back`.

Think times have the median of the reuse gaps of Mooncake's synthetic trace (59 s), prompts and answers the lengths of
multi-round chat generators (system prompt of 2,000 tokens, turns of 50 to 500, answers of 50 to 350).

    python -m benchmarks.host_sharing_bench [--sessions N] [--host-pages N] [--device-pages N]
"""

from __future__ import annotations

import argparse
import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.harness import Figures, alternate, report
from deployments.routing import Candidate, PrefixMemory, choose

NUM_RANKS = 8
PAGE_TOKENS = 64
NUM_SYSTEMS = 32
SYSTEM_PAGES = 2000 // PAGE_TOKENS
#: new sessions per second; a session has 6 turns on average
SESSIONS_PER_S = 2.0
MEAN_TURNS = 6.0
THINK_MEDIAN_S, THINK_SIGMA = 59.0, 1.0
#: computed tokens per second of prefill, and seconds an answer takes
PREFILL_TOKENS_PER_S, ANSWER_S = 20_000.0, 6.0


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: when it comes, and the pages of its prompt and of its prompt with the answer."""

    at_s: float
    prompt: tuple[int, ...]
    whole: tuple[int, ...]


def trace(rng: np.random.Generator, num_sessions: int) -> list[Turn]:
    """All requests in order of arrival. Pages are numbers; the first of a session are its system prompt's."""
    turns: list[Turn] = []
    next_page = NUM_SYSTEMS * SYSTEM_PAGES
    weights = 1.0 / np.arange(1, NUM_SYSTEMS + 1)
    begin_s = np.cumsum(rng.exponential(1 / SESSIONS_PER_S, num_sessions))
    for at_s in begin_s.tolist():
        system = int(rng.choice(NUM_SYSTEMS, p=weights / weights.sum()))
        pages = tuple(range(system * SYSTEM_PAGES, (system + 1) * SYSTEM_PAGES))
        for _ in range(int(rng.geometric(1 / MEAN_TURNS))):
            num_asked = -(-int(rng.integers(50, 500)) // PAGE_TOKENS)
            num_said = -(-int(rng.integers(50, 350)) // PAGE_TOKENS)
            prompt = (*pages, *range(next_page, next_page + num_asked))
            pages = (*prompt, *range(next_page + num_asked, next_page + num_asked + num_said))
            next_page += num_asked + num_said
            turns.append(Turn(at_s, prompt, pages))
            at_s += ANSWER_S + float(rng.lognormal(np.log(THINK_MEDIAN_S), THINK_SIGMA))
    return sorted(turns, key=lambda turn: turn.at_s)


class Lru:
    """A tier of a fixed number of pages."""

    def __init__(self, num_pages: int) -> None:
        self._num_pages = num_pages
        self._pages: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, page: int) -> bool:
        return page in self._pages

    def use(self, pages: Sequence[int]) -> list[int]:
        """Add or touch `pages`, parents last and hence warmest; the pages given up for them."""
        for page in reversed(pages):
            self._pages[page] = None
            self._pages.move_to_end(page)
        num_over = max(0, len(self._pages) - self._num_pages)
        return [self._pages.popitem(last=False)[0] for _ in range(num_over)]


class Rank:
    """One rank: its device pool, the host tier it uses, the requests it runs."""

    def __init__(self, device: Lru, host: Lru) -> None:
        self.device = device
        self.host = host
        self.memory = PrefixMemory()
        self.num_sent = 0
        self._ends: list[float] = []

    def num_running(self, now_s: float) -> int:
        while self._ends and self._ends[0] <= now_s:
            heapq.heappop(self._ends)
        return len(self._ends)

    def serve(self, turn: Turn) -> tuple[int, int]:
        """Leading pages of the prompt found on the device and in the host tier."""
        num_device = num_host = 0
        # the last page is computed for its logits in any case
        for page in turn.prompt[:-1]:
            if page in self.device:
                num_device += 1
            elif page in self.host:
                num_host += 1
            else:
                break
        self.host.use([page for page in turn.prompt[: num_device + num_host] if page in self.host])
        self.host.use(self.device.use(turn.whole)[::-1])
        num_computed = len(turn.prompt) - num_device - num_host
        heapq.heappush(self._ends, turn.at_s + num_computed * PAGE_TOKENS / PREFILL_TOKENS_PER_S + ANSWER_S)
        self.num_sent += 1
        return num_device, num_host


#: (ranks, request) -> the rank that serves it
Route = Callable[[list[Rank], Turn], Rank]


def bounded_affinity(ranks: list[Rank], turn: Turn) -> Rank:
    """The door's own choice: longest known prefix among ranks within 1.25 times the mean load."""
    candidates = [
        Candidate(str(number), rank.num_running(turn.at_s), rank.memory.num_known(turn.prompt), rank.num_sent)
        for number, rank in enumerate(ranks)
    ]
    rank = ranks[int(choose(candidates))]
    rank.memory.remember(turn.prompt)
    return rank


def round_robin(ranks: list[Rank], turn: Turn) -> Rank:
    return min(ranks, key=lambda rank: rank.num_sent)


def replay(turns: Sequence[Turn], route: Route, *, is_shared: bool, device_pages: int, host_pages: int) -> Figures:
    """Shares of all prompt pages, in per cent. host_pages: of one rank; a shared tier has as many for each rank."""
    shared = Lru(host_pages * NUM_RANKS)
    ranks = [Rank(Lru(device_pages), shared if is_shared else Lru(host_pages)) for _ in range(NUM_RANKS)]
    found = [route(ranks, turn).serve(turn) for turn in turns]
    total = sum(len(turn.prompt) for turn in turns)
    device, host = (100 * sum(row[tier] for row in found) / total for tier in (0, 1))
    return {"hit_%": device + host, "device_%": device, "host_%": host}


def ideal(turns: Sequence[Turn]) -> Figures:
    """With one cache that never forgets."""
    return replay(turns, lambda ranks, turn: ranks[0], is_shared=True, device_pages=1 << 40, host_pages=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--device-pages", type=int, default=500, help=f"of {PAGE_TOKENS} tokens, of each rank")
    parser.add_argument("--host-pages", type=int, default=1500, help="for each rank")
    parser.add_argument("--runs", type=int, default=5, help="each with a trace of its own")
    arguments = parser.parse_args()
    traces = [trace(np.random.default_rng(seed), arguments.sessions) for seed in range(arguments.runs)]

    def case(run: Callable[[Sequence[Turn]], Figures]) -> Callable[[], Figures]:
        each: Iterator[list[Turn]] = iter(traces)
        return lambda: run(next(each))

    def case_of(route: Route, is_shared: bool) -> Callable[[], Figures]:
        sizes = {"device_pages": arguments.device_pages, "host_pages": arguments.host_pages}
        return case(lambda turns: replay(turns, route, is_shared=is_shared, **sizes))

    cases = {
        "round robin, split": case_of(round_robin, False),
        "round robin, shared": case_of(round_robin, True),
        "bounded affinity, split": case_of(bounded_affinity, False),
        "bounded affinity, shared": case_of(bounded_affinity, True),
        "one cache that never forgets": case(ideal),
    }
    num_turns = sum(map(len, traces)) // len(traces)
    title = (
        f"host tier of {NUM_RANKS} ranks, shared or split: {num_turns} requests a run, {arguments.device_pages} device "
        f"pages and {arguments.host_pages} host pages of {PAGE_TOKENS} tokens for each rank"
    )
    report(title, alternate(cases, arguments.runs))


if __name__ == "__main__":
    main()
