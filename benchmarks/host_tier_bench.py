"""The host tier's data plane: copies as a share of plain memcpy, look-up of a prefix, flush of a full arena.

    python -m benchmarks.host_tier_bench [--pages 64] [--page-bytes 1835008] [--runs 5]

Pages of an 8B model (28 layers, 8 KV heads of 128, bfloat16, 16 tokens: 1.8 MB) between a page-first pool and a real
file in /dev/shm, both touched before. A write is what a rank does for a page: hash the source, copy it, build the
entry. A read is what a reader does: copy, hash what arrived, load the state word and the floors last. Shares are of
memcpy of the same pages in the same run and direction, by this thread's processor time (the machine may be shared).
Targets: write 0.8, verified read 0.7, look-up of 512 pages 100 us, flush 1 ms whatever the size.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from actors.node_processes import NodeClock, NodeProcesses
from benchmarks.harness import Case, Figures, alternate, report, time_us
from cache.arena import Arena, ArenaGeometry, PageView, control_words
from cache.control_page import ControlPage, ControlPageWriter, FileIdentity
from cache.host_eviction import LruOrder
from cache.host_reader import HostReader, Verification
from cache.host_tier import HostTier
from cache.host_writer import HostWriter
from cache.shared_file import FileMaker, FilePaths
from cache.shared_words import fence_for
from cache.slot_owners import SlotLease
from cache.slot_table import COMMITTED, EPOCH, GENERATION_SHIFT, KEY_HIGH, KEY_LOW, STATE, Holder
from cache.types import Epoch

FENCE = fence_for("x86_64")
EPOCH_0 = Epoch(0)
PREFIX_PAGES = 512


@contextmanager
def arena_in_shm(num_slots: int, page_bytes: int) -> Iterator[tuple[Arena, ControlPageWriter]]:
    """A real file, pre-faulted, gone at the end."""
    identity = FileIdentity("bench", "bench", num_slots, page_bytes)
    owned = FileMaker(identity, NodeProcesses(), NodeClock(), FENCE, nonce=0).open(
        FilePaths(Path("/dev/shm"), f"bench-{os.getpid()}")
    )
    try:
        arena = owned.arena()
        for _ in arena.prefault():
            pass
        yield arena, owned.page
    finally:
        owned.retire()


def copies(arena: Arena, page: ControlPageWriter, pool: np.ndarray, order: list[int]) -> Figures:
    """GB/s of memcpy and of the tier in both directions, and their ratios."""
    tier = HostTier(arena, page, LruOrder(), NodeProcesses(), max_leased=len(pool))
    writer, holder = HostWriter(arena), Holder.of("bench", NodeProcesses().own_id())
    lease = tier.lease(holder, len(pool))
    keys = [np.random.default_rng(number).bytes(16) for number in range(len(pool))]
    num_bytes = pool.nbytes
    memcpy_out = _gb_per_s(num_bytes, partial(_memcpy_out, pool, arena, order, lease))
    writer.accept(lease)
    write = _gb_per_s(num_bytes, partial(_write, writer, keys, pool, order))
    assert set(tier.commit(holder, writer.take_commits())) == {"committed"}
    memcpy_in = _gb_per_s(num_bytes, partial(_memcpy_in, pool, arena, order, lease))
    figures = {"memcpy_out_gb_s": memcpy_out, "memcpy_in_gb_s": memcpy_in, "write_share": write / memcpy_out}
    levels: tuple[Verification, ...] = ("full", "sampled", "off")
    for verification in levels:
        reader = HostReader(arena, page, verification)
        read = _gb_per_s(num_bytes, partial(_read, reader, b"".join(keys), pool, order))
        assert reader.num_hits == len(pool)
        figures[f"read_{verification}_share"] = read / memcpy_in
    tier.drop_all()
    while tier.reclaim(len(pool)):
        pass
    return figures


def _gb_per_s(num_bytes: int, copy: Callable[[], None]) -> float:
    begin = time.thread_time()
    copy()
    return num_bytes / (time.thread_time() - begin) / 1e9


def _memcpy_out(pool: np.ndarray, arena: Arena, order: list[int], lease: SlotLease) -> None:
    for page_id, (slot, _) in zip(order, lease.slots, strict=True):
        arena.pages[slot] = pool[page_id]


def _memcpy_in(pool: np.ndarray, arena: Arena, order: list[int], lease: SlotLease) -> None:
    for page_id, (slot, _) in zip(order, lease.slots, strict=True):
        pool[page_id] = arena.pages[slot]


def _write(writer: HostWriter, keys: list[bytes], pool: np.ndarray, order: list[int]) -> None:
    for page_id, key in zip(order, keys, strict=True):
        writer.write(key, EPOCH_0, 0, pool[page_id])


def _read(reader: HostReader, keys: bytes, pool: np.ndarray, order: list[int]) -> None:
    targets: list[PageView] = [pool[page_id] for page_id in order]
    reader.load_chain(reader.look_up(keys, EPOCH_0), targets)


def full_tier(num_slots: int) -> tuple[HostTier, HostReader, bytes]:
    """A tier in plain memory whose every slot is committed, adopted from the words that commits leave; its keys."""
    geometry = ArenaGeometry(num_slots, 64)
    memory = bytearray(geometry.file_bytes)
    page = ControlPageWriter(control_words(memory), FENCE)
    page.initialise(FileIdentity("bench", "bench", num_slots, 64), nonce=0)
    arena = Arena(memory, memory, geometry.data_offset, geometry)
    keys = np.random.default_rng(0).bytes(16 * num_slots)
    rows = arena.slots.reshape(num_slots, -1)
    rows[:, KEY_LOW : KEY_HIGH + 1] = np.frombuffer(keys, "<u8").reshape(-1, 2)
    rows[:, STATE] = 1 << GENERATION_SHIFT | COMMITTED
    rows[:, EPOCH] = EPOCH_0
    tier = HostTier(arena, page, LruOrder(), NodeProcesses(), max_leased=num_slots)
    return tier, HostReader(arena, ControlPage(control_words(memory), FENCE)), keys


def metadata(num_slots: int) -> Figures:
    """Look-up, flush and what follows it, in a full tier of `num_slots`."""
    tier, reader, keys = full_tier(num_slots)
    assert tier.counts().committed > 0.999 * num_slots
    begin = 16 * (num_slots // 2)
    prefix = keys[begin : begin + 16 * PREFIX_PAGES]
    assert reader.look_up(prefix, EPOCH_0).num_pages == PREFIX_PAGES
    look_up = time_us({"look_up": lambda: reader.look_up(prefix, EPOCH_0)}, num_calls=2)["look_up"]
    figures = {"look_up_512_us": look_up, "control_words_us": _read_words_us(tier.page)}
    figures["sanity_check_ms"] = _ms(tier.sanity_check)
    figures["flush_ms"] = _ms(lambda: (tier.page.raise_floor(term=1, floor=1), tier.drop_all()))
    assert tier.num_valid == 0
    slices = []
    is_more = True
    while is_more:
        begin_s = time.perf_counter()
        is_more = tier.reclaim(100)
        slices.append((time.perf_counter() - begin_s) * 1e3)
    assert tier.counts().free == num_slots
    return figures | {"reclaim_slice_p50_ms": float(np.median(slices)), "reclaim_all_s": sum(slices) / 1e3}


def _read_words_us(page: ControlPage) -> float:
    return time_us({"read": page.read}, num_calls=100)["read"]


def _ms(operation: Callable[[], object]) -> float:
    begin = time.perf_counter()
    operation()
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=64)
    parser.add_argument("--page-bytes", type=int, default=28 * 2 * 8 * 128 * 16 * 2)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, (arguments.pages, arguments.page_bytes), np.uint8)
    order = rng.permutation(arguments.pages).tolist()
    with arena_in_shm(arguments.pages, arguments.page_bytes) as (arena, page):
        cases: dict[str, Case] = {f"{arguments.page_bytes:,} B pages": partial(copies, arena, page, pool, order)}
        report("host tier copies, 1 thread", alternate(cases, arguments.runs))
    sizes: dict[str, Case] = {f"{size:,} slots": partial(metadata, size) for size in (100_000, 1_000_000)}
    report("host tier metadata", alternate(sizes, num_runs=3))


if __name__ == "__main__":
    main()
