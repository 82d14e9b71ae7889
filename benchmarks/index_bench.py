"""The device tier's index: microseconds by operation, against memcmp of the same bytes. No model, no KV.

    python -m benchmarks.index_bench [--runs 5]

Requests go through DeviceCache, with namespaces, epochs, page accounting and counters on, garbage collector on;
`match_us` is the index's part of `open_close_us`. What was promised is printed behind the medians as met or missed.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from statistics import mean, median, quantiles

import numpy as np

from benchmarks.harness import Case, Figures, alternate, num_involuntary_switches, report, time_us
from benchmarks.index_traces import NAMESPACE, PAGE_SIZE, Trace, conversations, random_tokens
from cache import DeviceCache, Epoch, PageHold, Swapped, TokenBytes
from engine.garbage import calm_collector
from engine.scheduler import REAP_NODES

K = 1024
NUM_RUNNING = 64
#: seconds after a flush in which pauses are looked for
WATCH_S = 5.0
#: how long a fast engine's step is
STEP_S = 0.005
#: (case begins with, figure, at most)
TARGETS = (
    ("match 32k in 1 edge", "match_to_floor", 2.0),
    ("match 32k in 64 edges", "match_to_floor", 2.0),
    ("match 128k in 1 edge", "match_to_floor", 2.0),
    ("match 128k in 64 edges", "match_to_floor", 2.0),
    ("mix", "us_per_request", 26.0),
    ("flush", "call_us", 1000.0),
    ("flush", "pause_wall_ms", 2.0),
)


def serve(cache: DeviceCache, tokens: TokenBytes, now_s: float = 0.0, spare: int = 1) -> None:
    """One request from admission to end; everything it computed is published."""
    cache.close(start(cache, tokens, now_s, spare))


def start(cache: DeviceCache, tokens: TokenBytes, now_s: float = 0.0, spare: int = 1) -> PageHold:
    """A running request with all its tokens computed; `spare` of them would be computed even if cached."""
    num_tokens = len(tokens) // 4
    hold = cache.open(NAMESPACE, tokens, num_tokens - spare, now_s)
    if not cache.try_extend(hold, num_tokens):
        raise SystemExit(f"{num_tokens} tokens do not fit: {cache.counts()}")
    cache.publish(hold, tokens, num_tokens, now_s)
    return hold


def match_case(num_tokens: int, num_edges: int, rng: np.random.Generator) -> Figures:
    """Match of `num_tokens` cached tokens.

    memcmp: one compare of the same bytes. floor: one compare an edge and, with several edges, one dict get each.
    """
    tokens = random_tokens(rng, num_tokens)
    edge_bytes = len(tokens) // num_edges
    cache = small_cache(num_tokens * 2 + 64 * num_edges * PAGE_SIZE, rng)
    if num_edges == 1:
        serve(cache, tokens, spare=0)
    else:
        for edge in range(num_edges, 0, -1):  # a branch behind every edge, or the tree would merge them
            serve(cache, tokens[: edge * edge_bytes] + random_tokens(rng, PAGE_SIZE), spare=0)
    query = bytes(bytearray(tokens))  # other memory, as with a real prompt
    edges = [tokens[edge * edge_bytes : (edge + 1) * edge_bytes] for edge in range(num_edges)]
    links = [{edge[: PAGE_SIZE * 4]: index} for index, edge in enumerate(edges)] if num_edges > 1 else []
    floors = {
        "memcmp_us": lambda: query.startswith(tokens, 0),
        "floor_us": lambda: _compare(query, edges, links),
    }
    figures = _time_match(cache, query, len(query), floors)
    return figures | {"match_to_floor": figures["match_us"] / figures["floor_us"]}


def partial_case(num_tokens: int, is_equal: bool, rng: np.random.Generator) -> Figures:
    """Match that ends inside a cached edge: where the prompt ends, or where the two part."""
    tokens = random_tokens(rng, num_tokens)
    cache = small_cache(num_tokens * 4, rng)
    serve(cache, tokens + random_tokens(rng, num_tokens))
    query = bytes(bytearray(tokens)) + (b"" if is_equal else random_tokens(rng, num_tokens))
    return _time_match(cache, query, num_tokens * 4)


def _time_match(
    cache: DeviceCache, query: TokenBytes, num_cached_bytes: int, floors: dict[str, Callable[[], object]] | None = None
) -> Figures:
    num_tokens, match = len(query) // 4, cache.index.match
    if match(NAMESPACE, query, len(query))[1] != num_cached_bytes:
        raise SystemExit("the cached prompt is not found")
    operations: dict[str, Callable[[], object]] = {
        "match_us": lambda: match(NAMESPACE, query, len(query)),
        "open_close_us": lambda: cache.close(cache.open(NAMESPACE, query, num_tokens, 0.0)),
    }
    return time_us(operations | (floors or {}), num_calls=max(5, 500_000 // num_tokens))


def _compare(tokens: TokenBytes, edges: list[TokenBytes], links: list[dict[bytes, int]]) -> None:
    for link in links:
        for first_page in link:
            link.get(first_page)
    pos = 0
    for edge in edges:
        if not tokens.startswith(edge, pos):
            raise SystemExit("the floor compares equal bytes")
        pos += len(edge)


def small_cache(num_tokens: int, rng: np.random.Generator) -> DeviceCache:
    """Room for `num_tokens`, and 256 other short prompts cached."""
    cache = DeviceCache(num_tokens // PAGE_SIZE + 512, PAGE_SIZE)
    for _ in range(256):
        serve(cache, random_tokens(rng, PAGE_SIZE), spare=0)
    return cache


def insert_case(rng: np.random.Generator) -> Figures:
    """A request of 8k tokens that shares 4k with a cached one, in the middle of its edge: admit, split, insert, end."""
    num_rounds = 64
    cache = DeviceCache(num_rounds * 2 * 8 * K // PAGE_SIZE, PAGE_SIZE)
    bases = [random_tokens(rng, 8 * K) for _ in range(num_rounds)]
    for base in bases:
        serve(cache, base)
    forks = [base[: len(base) // 2] + random_tokens(rng, 4 * K) for base in bases]
    took_us: list[float] = []
    for fork in forks:
        began = time.perf_counter()
        serve(cache, fork)
        took_us.append((time.perf_counter() - began) * 1e6)
    if cache.num_hit_tokens != num_rounds * 4 * K:
        raise SystemExit(f"{cache.num_hit_tokens} tokens hit")
    return {"us": median(took_us)}


def evict_case(rng: np.random.Generator) -> Figures:
    """A request that needs 1 % of 1M cached tokens evicted before it gets its pages."""
    cache = DeviceCache(1000 * K // PAGE_SIZE, PAGE_SIZE)
    for _ in range(125):
        serve(cache, random_tokens(rng, 8 * K))
    took_us: list[float] = []
    for _ in range(40):
        hold = cache.open(NAMESPACE, b"", 0, 0.0)
        num_tokens = (cache.counts().free + cache.num_pages // 100) * PAGE_SIZE
        began = time.perf_counter()
        cache.try_extend(hold, num_tokens)
        took_us.append((time.perf_counter() - began) * 1e6)
    if cache.num_evicted_pages != 40 * (cache.num_pages // 100):
        raise SystemExit(f"{cache.num_evicted_pages} pages evicted")
    return {"us": median(took_us)}


def mix_case(trace: Trace) -> Figures:
    """Conversations with think times over a pool that holds part of them: every request from open to close.

    undisturbed: requests during which the kernel did not give the core to another process.
    """
    cache = DeviceCache(trace.pool_tokens // PAGE_SIZE, PAGE_SIZE)
    took_us: list[float] = []
    undisturbed_us: list[float] = []
    for now_s, tokens in enumerate(trace.requests):
        switches, began = num_involuntary_switches(), time.perf_counter()
        serve(cache, tokens, now_s)
        took_us.append((time.perf_counter() - began) * 1e6)
        if num_involuntary_switches() == switches:
            undisturbed_us.append(took_us[-1])
    if found := cache.sanity_check():
        raise SystemExit(found[0])
    prompt = random_tokens(np.random.default_rng(0), 32 * K)
    other = bytes(bytearray(prompt))
    return {
        "us_per_request": mean(took_us),
        "undisturbed_us_per_request": mean(undisturbed_us),
        "p50_us": median(took_us),
        "p99_us": quantiles(took_us, n=100)[98],
        "undisturbed_p99_us": quantiles(undisturbed_us, n=100)[98],
        "hit_rate": cache.num_hit_tokens / cache.num_lookup_tokens,
    } | time_us({"memcmp_32k_us": lambda: prompt.startswith(other, 0)}, num_calls=20)


def flush_case(num_tokens: int, request_tokens: int, rng: np.random.Generator) -> Figures:
    """Flush under 64 running requests, then 5 s of engine steps that each take a slice of the old index apart."""
    cache = DeviceCache((num_tokens + NUM_RUNNING * 10 * K) // PAGE_SIZE + 64 * K, PAGE_SIZE)
    prompts = [random_tokens(rng, 8 * K) for _ in range(NUM_RUNNING)]
    for index in range((num_tokens - NUM_RUNNING * 8 * K) // request_tokens):
        serve(cache, random_tokens(rng, request_tokens), index)
    running = [start(cache, prompt) for prompt in prompts]
    for hold in running:
        cache.try_extend(hold, 10 * K)
    counts = cache.counts()
    gc.collect(1)  # what a rank has built up over hours has long grown old
    began = time.perf_counter()
    swapped = cache.swap(Epoch(1))
    call_us = (time.perf_counter() - began) * 1e6
    if swapped != Swapped(counts.cached, counts.pinned + counts.private):
        raise SystemExit(f"{swapped} of {counts}")
    collections = gc.get_stats()
    figures = {"call_us": call_us} | _watch(cache, running, prompts)
    young, middle, full = (
        after["collections"] - b["collections"] for after, b in zip(gc.get_stats(), collections, strict=True)
    )
    return figures | {"young_collections": young + middle, "full_collections": full}


def _watch(cache: DeviceCache, running: list[PageHold], prompts: list[TokenBytes]) -> Figures:
    """Longest pauses: the time of one step's cache work (reap a slice, end a request, serve one, garbage collection
    as a rank has set it).

    wall: as it is. undisturbed: of steps in which the kernel did not give the core to another process. cpu: this
    thread's own time.
    """
    longest = {"pause_wall_ms": 0.0, "pause_undisturbed_ms": 0.0, "pause_cpu_ms": 0.0}
    reaped_s, began, num_steps = 0.0, time.perf_counter(), 0
    kept: list[object] = []
    while (wall := time.perf_counter()) - began < WATCH_S:
        cpu, switches = time.thread_time(), num_involuntary_switches()
        is_left = cache.reap(REAP_NODES)
        outputs = [{"request": index, "tokens": [num_steps]} for index in range(NUM_RUNNING)]
        kept.extend(outputs)  # containers that live on are what makes the collector come
        if num_steps % 10 == 0 and running:
            cache.close(running.pop())
        serve(cache, prompts[num_steps % len(outputs)], wall)
        took_ms = {
            "pause_wall_ms": (time.perf_counter() - wall) * 1e3,
            "pause_cpu_ms": (time.thread_time() - cpu) * 1e3,
        }
        if num_involuntary_switches() == switches:
            took_ms["pause_undisturbed_ms"] = took_ms["pause_wall_ms"]
        longest = {name: max(value, took_ms.get(name, 0.0)) for name, value in longest.items()}
        num_steps += 1
        if not is_left and not reaped_s:
            reaped_s = wall - began
        time.sleep(STEP_S)
    return longest | {"reaped_after_s": reaped_s, "steps": num_steps}


def all_cases(rng: np.random.Generator) -> dict[str, Case]:
    trace = conversations(rng)
    cases: dict[str, Case] = {}
    for num_edges, plural in ((1, ""), (64, "s")):
        for size in (8, 32, 128):
            cases[f"match {size}k in {num_edges} edge{plural}"] = partial(match_case, size * K, num_edges, rng)
    cases["match 32k, prompt ends inside an edge"] = partial(partial_case, 32 * K, True, rng)
    cases["match 32k, parts inside an edge"] = partial(partial_case, 32 * K, False, rng)
    cases["insert 8k sharing 4k"] = partial(insert_case, rng)
    cases["evict 1% of 1M"] = partial(evict_case, rng)
    cases[f"mix of {trace.num_sessions} conversations"] = partial(mix_case, trace)
    cases["flush 10M, in requests of 8k"] = partial(flush_case, 10_000_000, 8 * K, rng)
    cases["flush 10M, in requests of 128"] = partial(flush_case, 10_000_000, 128, rng)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    cases = all_cases(np.random.default_rng(20))
    calm_collector()  # as a rank does once everything is loaded
    report(
        "prefix index",
        alternate({name: cases[name] for name in cases if arguments.only in name}, arguments.runs),
        TARGETS,
    )


if __name__ == "__main__":
    main()
