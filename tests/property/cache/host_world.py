"""A node with a host tier: one index writer, ranks that copy, freeze and die, readers that stop anywhere, and a model.

The writer's stores are logged; what readers and the next writer see is a prefix of that log, cut at any store. The
model keeps every page ever handed to a commit and knows what each flush has made void: a read may always miss, and may
never be wrong. Every method checks what must hold after it; the caller chooses the order.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import numpy as np

from cache.arena import SLOT_WORDS, Arena, PageView, control_words
from cache.control_page import ControlPage, ControlPageWriter, FileIdentity
from cache.host_eviction import LruOrder, SlruOrder
from cache.host_reader import HostMatch, HostReader, Verification
from cache.host_tier import CommitOutcome, HostTier
from cache.host_writer import HostWriter
from cache.page_checksum import PageEntry
from cache.processes import ProcessId
from cache.shared_words import Words, fence_for, store_word
from cache.slot_owners import SlotRef
from cache.slot_table import CHECKSUM, NOBODY, Holder
from cache.types import Epoch
from tests.property.cache.host_actors import (
    GEOMETRY,
    HALF,
    MAX_RANKS,
    NAMESPACES,
    NUM_CHAINS,
    NUM_SLOTS,
    PAGE_BYTES,
    Chain,
    FlipTarget,
    OvertakenReader,
    Overtaking,
    Rank,
    Step,
    Version,
    chain_keys,
)
from tests.unit.cache.node_files import ToldProcesses

FENCE = fence_for("x86_64")


class HostWorld:
    """`memory` is what all processes share; the writer works on a copy of its words, and its stores follow."""

    def __init__(self, is_scan_resistant: bool, verification: Verification) -> None:
        """verification: off means that order of stores and state words alone must do; then no bit may flip."""
        self.verification: Verification = verification
        self.memory = bytearray(GEOMETRY.file_bytes)
        identity = FileIdentity("cafe", "layout", NUM_SLOTS, PAGE_BYTES)
        ControlPageWriter(control_words(self.memory), FENCE).initialise(identity, nonce=1)
        self.arena = Arena(self.memory, self.memory, GEOMETRY.data_offset, GEOMETRY)
        self.seen_page = ControlPage(control_words(self.memory), FENCE)
        self.order = SlruOrder if is_scan_resistant else LruOrder
        self.processes = ToldProcesses()
        self.ranks: list[Rank] = []
        self.num_ranks = 0
        self.log: list[Step] = []
        #: every page that a reader may be given, by key; floor, drop and birth tell which are void
        self.versions: dict[bytes, list[Version]] = {}
        self.newest_epoch = 0
        self.sub_epochs: dict[str, int] = dict.fromkeys(NAMESPACES, 0)
        self.now_ns = 0
        self.num_written = 0
        self.tickets: list[tuple[HostMatch, list[bytes]]] = []
        #: what a reader is that others overtake; the simulation's loads words out of order
        self.overtaken_reader: Callable[..., OvertakenReader] = OvertakenReader
        self.generations = [0] * NUM_SLOTS
        #: what has happened so often, so that a test can tell that it tests something
        self.seen: Counter[str] = Counter()
        self.begin_writer()
        for _ in range(MAX_RANKS - 1):
            self.start_rank()

    # -- the writer, its stores and its death ---------------------------------------------------------------------

    def begin_writer(self) -> None:
        """A writer adopts what its predecessor's stores have left. Its own stores are logged."""
        own = bytearray(self.memory)
        self.log = []
        arena = Arena(own, self.memory, GEOMETRY.data_offset, GEOMETRY)
        page_words = control_words(own)
        shared = {
            id(page_words): control_words(self.memory),
            id(arena.slots): self.arena.slots,
            id(arena.index): self.arena.index,
        }

        def store(words: Words, index: int, value: int) -> None:
            store_word(words, index, value)
            self.log.append(functools.partial(store_word, shared[id(words)], index, value))

        self.writer_arena = arena
        self.page = ControlPageWriter(page_words, FENCE, store)
        self.tier = HostTier(arena, self.page, self.order(), self.processes, max_leased=4, store=store)

    def show(self, share: float = 1.0) -> None:
        """Readers see the first `share` of the stores of the operation that has just run."""
        num_stores = round(share * len(self.log))
        for store in self.log[:num_stores]:
            store()
        del self.log[:num_stores]

    def end_operation(self, dies_at: float | None) -> bool:
        """True: done, and answered. With `dies_at` the writer dies after that share of its stores; no answer."""
        if dies_at is None:
            self.show()
            return True
        self.kill_writer(dies_at)
        return False

    def kill_writer(self, share: float = 1.0, again: float | None = None) -> None:
        """SIGKILL after a share of the stores under way; with `again` once more, while adopting."""
        self.show(share)
        self.begin_writer()
        if again is not None:
            self.show(again)
            self.begin_writer()
        self.show()
        self.seen["writer_deaths"] += 1

    # -- ranks ----------------------------------------------------------------------------------------------------

    def rank(self, index: int) -> Rank | None:
        """A rank that can do something now, if there is one."""
        awake = [rank for rank in self.ranks if not rank.is_frozen]
        return awake[index % len(awake)] if awake else None

    def start_rank(self) -> None:
        if len(self.ranks) < MAX_RANKS:
            self.num_ranks += 1
            holder = Holder.of(f"incarnation-{self.num_ranks}", ProcessId(100 + self.num_ranks, self.num_ranks))
            self.ranks.append(Rank(holder, HostWriter(self.arena), self.newest_epoch))

    def lease(self, rank: Rank, num_slots: int, dies_at: float | None = None) -> None:
        lease = self.tier.lease(rank.holder, num_slots)
        if self.end_operation(dies_at):
            self.check_lease(lease.slots)
            rank.writer.accept(lease)

    def check_lease(self, slots: tuple[SlotRef, ...]) -> None:
        """Invariant 11: leased to one at a time, only after the last holder answered or is gone, generation rising."""
        written = {slot for rank in self.ranks for slot in rank.slots()}
        for slot, generation in slots:
            assert slot not in written, f"slot {slot} is leased while another rank may still write it"
            assert generation > self.generations[slot]
            self.generations[slot] = generation

    def write(self, rank: Rank, chain: Chain, num_pages: int, is_halfway: bool) -> None:
        """Copy pages of a chain into leased slots; `is_halfway`: the process stops in the middle of each copy."""
        if rank.writer.num_ready < num_pages:
            self.lease(rank, num_pages)
        for key in self.keys(chain, rank.epoch)[:num_pages]:
            self.write_page(rank, key, is_halfway)

    def write_page(self, rank: Rank, key: bytes, is_halfway: bool) -> None:
        self.num_written += 1
        page = np.random.default_rng(self.num_written).integers(0, 256, PAGE_BYTES, np.uint8)
        before = self.arena.pages.copy()
        if not rank.writer.write(key, Epoch(rank.epoch), self.now_ns, page):
            return
        entry = rank.writer._written[-1]
        rank.contents[entry] = Version(page.tobytes(), entry.epoch, entry.drop, entry.birth_ns)
        if is_halfway:
            rank.half_copied.append((entry.slot, page[HALF:].tobytes()))
            self.arena.pages[entry.slot, HALF:] = before[entry.slot, HALF:]

    def finish_copies(self, rank: Rank) -> None:
        for slot, rest in rank.half_copied:
            self.arena.pages[slot, HALF:] = np.frombuffer(rest, np.uint8)
        rank.half_copied.clear()

    def commit(self, rank: Rank, dies_at: float | None = None) -> None:
        """Commit what was written. If the writer dies, a page may or may not be there: so is the model."""
        self.finish_copies(rank)
        entries, outcomes = self._hand_over(rank)
        if not self.end_operation(dies_at):
            rank.writer.forget(entries)
            return
        rank.writer.settle(entries, outcomes)
        for entry, outcome in zip(entries, outcomes, strict=True):
            if outcome in ("committed", "known"):
                assert self.read([entry.key], entry.epoch) == 1, f"a {outcome} page is not found"

    def _hand_over(self, rank: Rank) -> tuple[list[PageEntry], list[CommitOutcome]]:
        words = self.page.read()
        entries = rank.writer.take_commits()
        outcomes = self.tier.commit(rank.holder, entries)
        self.seen.update(outcomes)
        for entry, outcome in zip(entries, outcomes, strict=True):
            version = rank.contents.pop(entry)
            if outcome == "committed":
                assert version.epoch >= words.floor, "invariant 3: committed below the floor"
                assert version.drop == words.drop, "invariant 3: committed under an old lease"
                self.versions.setdefault(entry.key, []).append(version)
        return entries, outcomes

    def give_back(self, rank: Rank) -> None:
        returns = rank.writer.take_returns()
        assert self.tier.release(rank.holder, returns) == len(returns)
        self.show()

    def reconcile(self, rank: Rank) -> None:
        """The rank has no call out, and says what it holds: nothing else is kept for it."""
        lost = self.tier.reconcile(rank.holder, rank.writer.held())
        self.show()
        assert lost == [], "a living rank keeps its slots over any death of the writer"
        owners = self.tier.owners
        kept = owners.leased.get(rank.holder, set()) | owners.quarantined.get(rank.holder, set())
        assert kept == {slot for slot, _ in rank.writer.held()}

    def thaw(self, rank: Rank) -> None:
        """It wakes and finishes its copies first, whatever was decided about it meanwhile (hole H14)."""
        rank.is_frozen = False
        self.finish_copies(rank)

    def declare_dead(self, rank: Rank, dies_at: float | None) -> None:
        """Somebody says that the rank is dead. It need not be."""
        self.tier.holder_left(rank.holder)
        self.end_operation(dies_at)
        self.seen["quarantines"] += self.tier.counts().quarantined

    def kill_rank(self, rank: Rank) -> None:
        """SIGKILL: what was half copied stays half copied."""
        self.ranks.remove(rank)
        self.processes.gone.add(rank.holder.process)
        self.seen["rank_deaths"] += 1

    def check_holders(self, dies_at: float | None) -> None:
        self.tier.check_holders()
        if self.end_operation(dies_at):
            assert not any(holder.process in self.processes.gone for holder in self.tier.owners.leased)

    # -- flushes --------------------------------------------------------------------------------------------------

    def swap_first(self, rank: Rank) -> None:
        """Modes wait and drain: a rank swaps at its own instant, the floor follows later."""
        self.newest_epoch += 1
        rank.epoch = self.newest_epoch

    def raise_floor(self, is_new_epoch: bool) -> None:
        """A flush of all tiers. Ranks that have not read it yet go on under their old epoch, and reach nothing."""
        self.newest_epoch += is_new_epoch
        assert self.page.raise_floor(term=1, floor=self.newest_epoch)
        self.show()

    def catch_up(self) -> None:
        """The next step of every rank that is awake: it reads the floor and swaps."""
        for rank in self.ranks:
            if not rank.is_frozen:
                rank.epoch = max(rank.epoch, self.page.read().floor)

    def drop_host(self, dies_at: float | None) -> None:
        self.tier.drop_all()
        self.end_operation(dies_at)

    def drop_older(self, age_ns: int) -> None:
        self.page.raise_birth_floor(max(0, self.now_ns - age_ns))
        self.show()

    def drop_namespace(self, namespace: str) -> None:
        """Invariant 16: nothing of the namespace is reachable from now on, and nothing outside it is dropped."""
        committed = self.tier.counts().committed
        self.sub_epochs[namespace] += 1
        for chain in range(NUM_CHAINS):
            for epoch in range(self.page.read().floor, self.newest_epoch + 1):
                assert self.read([*self.keys((namespace, chain), epoch)], epoch) == 0
        assert self.tier.counts().committed == committed

    def reclaim(self, max_pages: int, dies_at: float | None) -> None:
        while self.tier.reclaim(max_pages):
            pass
        words = self.page.read()
        assert all(epoch >= words.floor and drop == words.drop for epoch, drop in self.tier.num_by_version)
        self.end_operation(dies_at)

    # -- readers --------------------------------------------------------------------------------------------------

    def keys(self, chain: Chain, epoch: int) -> tuple[bytes, ...]:
        namespace, number = chain
        return chain_keys(epoch, self.sub_epochs[namespace], namespace, number)

    def reader(self) -> HostReader:
        return HostReader(self.arena, self.seen_page, self.verification)

    def read(self, keys: list[bytes], epoch: int) -> int:
        """Look up and load at once. How many pages were accepted."""
        reader = self.reader()
        return self.load(reader, reader.look_up(b"".join(keys), Epoch(epoch)), keys)

    def look_up(self, rank: Rank, chain: Chain) -> None:
        """Remember what was found; it is loaded later, when anything may have happened."""
        keys = list(self.keys(chain, rank.epoch))
        self.tickets.append((self.reader().look_up(b"".join(keys), Epoch(rank.epoch)), keys))

    def load_later(self) -> None:
        """Load what was found first, and tell the writer what came of it."""
        if self.tickets:
            reader = self.reader()
            self.load(reader, *self.tickets.pop(0))
            self.tier.touch(list(reader.touched))
            confirmed = [ref for ref in reader.corrupt if self.tier.report_corrupt(ref)]
            assert confirmed == [], "nobody has flipped a bit"
            self.show()

    def load(self, reader: HostReader, match: HostMatch, keys: list[bytes]) -> int:
        """Load what was found. Whatever is accepted was committed under that key, and no flush has made it void."""
        for index in range(match.num_pages):
            target = np.zeros(PAGE_BYTES, np.uint8)
            reason = reader.load(match, index, target)
            self.seen[f"load_{reason}"] += 1
            if reason is not None:
                return index
            allowed = [version.content for version in self.versions.get(keys[index], []) if self.is_valid(version)]
            assert target.tobytes() in allowed, "a wrong or stale page was accepted"
        return match.num_pages

    def is_valid(self, version: Version) -> bool:
        words = self.seen_page.read()
        return version.epoch >= words.floor and version.drop == words.drop and version.birth_ns >= words.birth_floor_ns

    def read_overtaken(self, rank: Rank, chain: Chain, other: Rank, what: Overtaking, overtakings: list[float]) -> None:
        """Invariant 12: the writer's stores, and the copies they allow, come between the loads of one reader.

        overtakings: rising shares of the steps of the others, one for each point where the reader is overtaken.
        """
        keys = list(self.keys(chain, rank.epoch))
        steps = self.steps_of(other, what, (chain[0], chain[1] + 1))
        num_steps, shares = len(steps), iter(overtakings)

        def pause() -> None:
            due = round(next(shares, 1.0) * num_steps)
            while steps and num_steps - len(steps) < due:
                steps.pop(0)()

        reader = self.overtaken_reader(self.arena, self.seen_page, self.verification, pause)
        self.load(reader, reader.look_up(b"".join(keys), Epoch(rank.epoch)), keys)
        for step in steps:
            step()

    def steps_of(self, rank: Rank, what: Overtaking, chain: Chain) -> list[Step]:
        """What others do while a reader reads, one store or one half of a copy at a time."""
        match what:
            case "lease":
                lease = self.tier.lease(rank.holder, 4)
                self.check_lease(lease.slots)
                rank.writer.accept(lease)
                return self._take_log() + [
                    functools.partial(self.scribble, slot, half) for slot, _ in lease.slots for half in range(2)
                ]
            case "replace":
                lease = self.tier.lease(rank.holder, 4)
                self.check_lease(lease.slots)
                rank.writer.accept(lease)
                steps = self._take_log() + self._copies_of(rank, self.keys(chain, rank.epoch))
                return steps + self.steps_of(rank, "commit", chain)
            case "commit":
                self.finish_copies(rank)
                rank.writer.settle(*self._hand_over(rank))
            case "drop":
                self.tier.drop_all()
            case "flush":
                self.newest_epoch += 1
                self.page.raise_floor(term=1, floor=self.newest_epoch)
            case "reclaim":
                self.tier.reclaim(4)
        return self._take_log()

    def _take_log(self) -> list[Step]:
        log, self.log = self.log, []
        return log

    def _copies_of(self, rank: Rank, keys: tuple[bytes, ...]) -> list[Step]:
        """Copies of pages into leased slots, put off, each in two halves."""
        before = self.arena.pages.copy()
        for key in keys:
            self.write_page(rank, key, is_halfway=False)
        after = self.arena.pages.copy()
        self.arena.pages[:] = before
        return [
            functools.partial(self._write_half, slot, half, after[slot])
            for slot in np.flatnonzero((before != after).any(axis=1)).tolist()
            for half in range(2)
        ]

    def _write_half(self, slot: int, half: int, page: PageView) -> None:
        self.arena.pages[slot, half * HALF : (half + 1) * HALF] = page[half * HALF : (half + 1) * HALF]

    def scribble(self, slot: int, half: int) -> None:
        """A holder writes into its slot: half a page of which nobody may see a byte."""
        self._write_half(slot, half, np.full(PAGE_BYTES, 0xEE, np.uint8))

    # -- faults ---------------------------------------------------------------------------------------------------

    def flip_a_bit(self, chain: Chain, bit: int, where: FlipTarget) -> None:
        """Invariant 13. Afterwards the writer finds what is wrong, quarantines it, and every slot is accounted for."""
        keys, epoch = list(self.keys(chain, self.newest_epoch)), Epoch(self.newest_epoch)
        match = self.reader().look_up(b"".join(keys), epoch)
        if not match.num_pages or self.verification == "off":
            return
        target = self._bytes_of(match.slots[0], where)
        target[bit // 8 % len(target)] ^= 1 << bit % 8
        self.writer_arena.slots[:] = self.arena.slots
        self.writer_arena.index[:] = self.arena.index
        reader = self.reader()
        assert self.load(reader, reader.look_up(b"".join(keys), epoch), keys) == 0, "a flipped bit was not noticed"
        self.seen["flips"] += 1
        for ref in reader.corrupt:
            self.tier.report_corrupt(ref)
        self.tier.isolate(self.tier.violations())
        self.show()
        # what a reader has found before does not outlive the fault: generations may have gone back
        self.tickets.clear()
        self.generations = [self.tier.table.generation(slot) for slot in range(NUM_SLOTS)]

    def _bytes_of(self, slot: int, where: FlipTarget) -> np.ndarray:
        match where:
            case "row":
                return self.arena.slots[slot * SLOT_WORDS : slot * SLOT_WORDS + CHECKSUM + 1].view(np.uint8)
            case "page":
                return self.arena.pages[slot]
            case "index":
                positions, slots, _ = self.tier.index.occupied()
                position = int(positions[slots == slot][0])
                return self.arena.index[position : position + 1].view(np.uint8)

    # -- always ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Invariant 14: every slot has exactly one state, and memory, table and index agree on it."""
        assert self.tier.sanity_check() == []
        assert sum(self.tier.counts()) == NUM_SLOTS

    def end(self) -> None:
        """No slot is leaked: with every rank gone, each is free, committed, or quarantined for its bytes."""
        for rank in self.ranks:
            self.processes.gone.add(rank.holder.process)
        self.tier.check_holders()
        self.kill_writer()
        counts = self.tier.counts()
        assert counts.leased == 0
        assert counts.quarantined == len(self.tier.owners.quarantined.get(NOBODY, ()))
        self.check()
