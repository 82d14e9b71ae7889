"""A node's host tier in its agent: claims, files that are made, adopted or refused, floors, flushes, ranks that go."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.audit_log import InThread
from actors.host_messages import HostCaller, HostClaim, HostDropped, HostPending, HostPlace, HostRefused
from actors.host_opener import Progress
from actors.host_store import HostStore, StoreSurroundings
from actors.messages import ProcessName
from cache.control_page import FileIdentity
from cache.host_reader import HostReader
from cache.host_writer import HostWriter
from cache.orphans import discard, inherit
from cache.processes import ProcessId
from cache.shared_file import FileMaker, FilePaths, OwnedFile
from cache.shared_words import fence_for
from cache.types import Epoch
from configs.errors import ConfigError
from configs.schema import HostTierSettings
from tests.unit.actors.planes import run, until
from tests.unit.cache.node_files import HurriedClock, ToldProcesses, held_elsewhere

FENCE = fence_for("x86_64")
PAGE_BYTES = 4096
SETTINGS = HostTierSettings(size_gb=1 / 1024, lease_batch=8, sanity_check_s=0.01)
KEYS = [bytes([number]) * 16 for number in range(1, 64)]


class Node:
    """A store on real files, with processes and their ends as told."""

    def __init__(self, directory: Path, settings: HostTierSettings = SETTINGS, name: str = "n", nonce: int = 7) -> None:
        self.paths = FilePaths(directory, f"{name}-arena")
        self.nonce = nonce
        self.processes = ToldProcesses()
        self.used: list[bool] = []
        self.file: OwnedFile | None = None
        self.refuse: Callable[[], None] = lambda: None
        self.in_thread: InThread = asyncio.to_thread
        self._ends: dict[int, asyncio.Event] = {}
        self.store = HostStore(
            settings,
            StoreSurroundings(
                str(directory), self.paths.name, self._open, self.processes, self._until_gone, self._in_thread,
                "here", self.paths.data.exists, lambda: discard(self.paths, FENCE), self.used.append,
            ),
        )  # fmt: skip

    def _open(self, identity: FileIdentity, on_progress: Progress) -> OwnedFile:
        self.refuse()
        inherit(self.paths, identity, FENCE)
        maker = FileMaker(identity, self.processes, HurriedClock(), FENCE, nonce=self.nonce, on_progress=on_progress)
        self.file = maker.open(self.paths)
        return self.file

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await self.in_thread(function, *arguments)

    async def _until_gone(self, name: ProcessName) -> bool:
        await self._ends.setdefault(name.pid, asyncio.Event()).wait()
        return True

    def kill(self, rank: Rank) -> None:
        self.processes.gone.add(ProcessId(rank.claim.process.pid, 1))
        self._ends.setdefault(rank.claim.process.pid, asyncio.Event()).set()

    def begin(self, lineage: str = "cafe", floor: int = 0) -> HostStore:
        self.store.begin_lineage(lineage)
        self.store.raise_floor(1, floor)
        return self.store


class Rank:
    """One that writes into the arena of its node as the copier does."""

    def __init__(self, node: Node, pid: int, **changes: Any) -> None:
        self.node = node
        name = ProcessName(pid, 1, "here")
        self.claim = replace(HostClaim(f"inc-{pid}", name, "cafe", "layout", PAGE_BYTES), **changes)

    async def claim_it(self) -> Any:
        answer = await self.node.store.claim(self.claim)
        if isinstance(answer, HostPlace):
            self.caller = HostCaller(self.claim.incarnation, answer.nonce)
            assert self.node.file is not None
            self.writer = HostWriter(self.node.file.arena())
            self.reader = HostReader(self.node.file.arena(), self.node.file.page)
        return answer

    async def lease(self, num_slots: int) -> int:
        lease = await self.node.store.lease(self.caller, num_slots)
        assert lease is not None
        self.writer.accept(lease)
        return len(lease.slots)

    async def write(self, key: bytes, epoch: int = 0, birth_ns: int = 100) -> str:
        await self.lease(1)
        assert self.writer.write(key, Epoch(epoch), birth_ns, np.full(PAGE_BYTES, key[0], np.uint8))
        outcomes = await self.node.store.commit(self.caller, self.writer.take_commits())
        assert outcomes is not None
        return outcomes[0]

    def finds(self, key: bytes, epoch: int = 0) -> bool:
        match = self.reader.look_up(key, Epoch(epoch))
        target = np.zeros(PAGE_BYTES, np.uint8)
        is_there = match.num_pages == 1 and self.reader.load(match, 0, target) is None
        assert not is_there or (target == key[0]).all()
        return is_there


def _must(holds: bool) -> None:
    assert holds


def test_what_one_rank_writes_the_other_finds(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()
        first, second = Rank(node, 11), Rank(node, 12)
        place, again = await asyncio.gather(first.claim_it(), second.claim_it())
        assert place == again == await first.claim_it()
        assert await first.write(KEYS[0]) == "committed"
        assert second.finds(KEYS[0])
        report = node.store.report()
        assert report is not None
        assert (report.status, report.num_slots, report.committed, report.num_ranks) == ("ready", place.num_slots, 1, 2)
        assert report.free + report.leased + report.committed + report.quarantined == report.num_slots
        node.store.close()

    run(scenario())


def test_a_claim_that_cannot_be_is_refused_with_the_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()
        user = Rank(node, 11)
        await user.claim_it()
        for changes, reason, is_final in [
            # its users may leave
            ({"layout_digest": "other"}, "another layout.*1 rank", False),
            ({"page_bytes": 8192}, "8,192.*1 rank", False),
            ({"page_bytes": 1 << 30}, "holds no page.*size_gb", True),
            ({"process": ProcessName(12, 1, "elsewhere")}, "cannot be seen", True),
        ]:
            refused = await node.store.claim(replace(Rank(node, 12).claim, **changes))
            assert isinstance(refused, HostRefused)
            assert refused.is_final is is_final
            assert re.search(reason, refused.message), refused.message
        early = await node.store.claim(replace(user.claim, lineage="beef"))
        assert isinstance(early, HostRefused)
        assert not early.is_final
        assert user.finds(KEYS[0]) is False
        assert await user.write(KEYS[0]) == "committed"
        node.store.close()

    run(scenario())


def test_a_file_that_cannot_be_made_is_tried_again_with_the_next_claim(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()

        def refuse() -> None:
            raise ConfigError("it does not fit")

        node.refuse = refuse
        rank = Rank(node, 11)
        assert await rank.claim_it() == HostRefused("it does not fit", is_final=True)
        report = node.store.report()
        assert report is not None
        assert (report.status, report.message) == ("failed", "it does not fit")
        node.refuse = lambda: None
        assert isinstance(await rank.claim_it(), HostPlace)
        node.store.close()

    run(scenario())


def test_an_arena_of_another_layout_goes_when_nobody_uses_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()
        first = Rank(node, 11)
        await first.claim_it()
        await first.write(KEYS[0])
        await node.store.leave(first.claim.incarnation)
        assert node.used == [True, False]
        other = Rank(node, 12, layout_digest="other")
        assert isinstance(await other.claim_it(), HostPlace)
        assert not other.finds(KEYS[0])
        node.store.close()

    run(scenario())


def test_a_floor_voids_commits_and_pages_and_frees_their_slots(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()
        rank = Rank(node, 11)
        await rank.claim_it()
        await rank.write(KEYS[0])
        assert node.store.raise_floor(1, 5) == HostDropped(1, PAGE_BYTES)
        assert not rank.finds(KEYS[0])
        assert await rank.write(KEYS[1], epoch=4) == "below_floor"
        assert await rank.write(KEYS[1], epoch=5) == "committed"
        report = node.store.report
        await until(lambda: (now := report()) is not None and now.committed == 1 and now.leased == 0)
        node.store.close()

    run(scenario())


def test_a_floor_from_before_the_file_is_on_it_before_the_first_commit(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin(floor=9)
        rank = Rank(node, 11)
        await rank.claim_it()
        assert await rank.write(KEYS[0], epoch=8) == "below_floor"
        node.store.close()

    run(scenario())


def test_a_flush_of_this_tier_alone_refuses_what_was_leased_before_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()
        assert await node.store.drop_all(1) == HostDropped(0, 0)
        rank = Rank(node, 11)
        await rank.claim_it()
        await rank.write(KEYS[0])
        await rank.lease(1)
        assert await node.store.drop_all(2) == HostDropped(1, PAGE_BYTES)
        assert not rank.finds(KEYS[0])
        assert rank.writer.write(KEYS[1], Epoch(0), 100, np.zeros(PAGE_BYTES, np.uint8))
        assert await node.store.commit(rank.caller, rank.writer.take_commits()) == ["old_drop"]
        assert await rank.write(KEYS[2]) == "committed"
        assert await node.store.drop_older(101) == HostDropped(0, 0)
        assert not rank.finds(KEYS[2])
        assert await rank.write(KEYS[2], birth_ns=100) == "too_old"
        node.store.close()

    run(scenario())


def test_an_agent_that_has_not_opened_its_file_again_flushes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()
        rank = Rank(node, 11)
        await rank.claim_it()
        await rank.write(KEYS[0])
        node.store.close()
        second = Node(tmp_path)
        second.begin()
        assert (await second.store.drop_all(3)).failure != ""
        # its rank claims again: it is the same file, and warm
        rank.node = second
        dropping = asyncio.create_task(second.store.drop_all(3))
        place = await rank.claim_it()
        assert place.nonce == rank.caller.nonce
        assert await dropping == HostDropped(1, PAGE_BYTES)
        second.store.close()

    run(scenario())


def test_a_flush_that_the_tier_has_missed_is_made_up_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()
        rank = Rank(node, 11)
        await rank.claim_it()
        await rank.write(KEYS[0])
        assert node.store.raise_drop(7, known_drop=0)
        assert not rank.finds(KEYS[0])
        # told of the same flush once more it still says what that one made void
        assert await node.store.drop_all(7) == HostDropped(1, PAGE_BYTES)
        await rank.write(KEYS[1])
        assert node.store.raise_drop(7, known_drop=0)
        assert rank.finds(KEYS[1])
        node.store.close()

    run(scenario())


@pytest.mark.parametrize("known_drop", [7, 3])
def test_a_file_that_nobody_has_opened_again_is_read_no_more_if_it_missed_a_flush(
    tmp_path: Path, known_drop: int
) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()
        rank = Rank(node, 11)
        await rank.claim_it()
        await rank.write(KEYS[0])
        node.store.close()
        second = Node(tmp_path, nonce=8)
        second.begin()
        assert second.store.raise_drop(7, known_drop)
        assert rank.finds(KEYS[0]) == (known_drop == 7)
        rank.node = second
        place = await rank.claim_it()
        assert place.nonce == (7 if known_drop == 7 else 8)
        second.store.close()

    run(scenario())


def test_a_rank_that_died_gives_its_slots_back_and_a_frozen_one_keeps_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()
        rank, other = Rank(node, 11), Rank(node, 12)
        await rank.claim_it()
        await other.claim_it()
        assert await rank.lease(8) == 8
        assert await other.lease(8) == 8
        node.kill(rank)
        report = node.store.report
        await until(lambda: (now := report()) is not None and (now.leased, now.num_ranks) == (8, 1))
        assert await node.store.lease(rank.caller, 1) is None
        # a crash leaves the pages to the next start
        assert node.used == [True, True]
        node.store.close()

    run(scenario())


def test_a_restarted_agent_keeps_the_slots_of_the_living_and_frees_those_of_who_dies_later(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()
        rank, doomed = Rank(node, 11), Rank(node, 12)
        await rank.claim_it()
        await doomed.claim_it()
        await rank.lease(4)
        await doomed.lease(8)
        node.store.close()
        second = Node(tmp_path)
        second.begin()
        rank.node = second
        assert await second.store.lease(rank.caller, 1) is None
        held = rank.writer.held()
        await rank.claim_it()
        report = second.store.report
        assert (now := report()) is not None
        assert now.leased == 12
        assert await second.store.reconcile(rank.caller, held) == []
        # it never comes back
        second.kill(doomed)
        await until(lambda: (now := report()) is not None and now.leased == 4)
        second.store.close()

    run(scenario())


def test_the_arena_of_a_dead_node_is_warm_for_the_next_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()
        rank = Rank(node, 11)
        await rank.claim_it()
        await rank.write(KEYS[0])
        node.store.close()
        second = Node(tmp_path, name="m")
        second.begin()
        heir = Rank(second, 12)
        await heir.claim_it()
        assert heir.finds(KEYS[0])
        assert not node.paths.data.exists()
        second.store.begin_lineage("beef")
        assert not heir.finds(KEYS[0])
        assert not second.paths.data.exists()
        second.store.close()

    run(scenario())


@pytest.mark.parametrize("flush", ["all", "older"])
def test_a_flush_from_before_the_arena_counts_for_one_that_is_taken_over(tmp_path: Path, flush: str) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()
        rank = Rank(node, 11)
        await rank.claim_it()
        await rank.write(KEYS[0], birth_ns=100)
        node.store.close()
        second = Node(tmp_path, name="m")
        second.begin()
        if flush == "all":
            assert await second.store.drop_all(3) == HostDropped(0, 0)
        else:
            assert await second.store.drop_older(101) == HostDropped(0, 0)
        heir = Rank(second, 12)
        await heir.claim_it()
        assert not heir.finds(KEYS[0])
        second.store.close()

    run(scenario())


def test_a_node_that_missed_a_flush_waits_until_its_arena_is_open(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()
        rank = Rank(node, 11)
        await rank.claim_it()
        await rank.write(KEYS[0])
        node.store.close()
        second = Node(tmp_path)
        second.begin()
        may_open = threading.Event()
        second.refuse = lambda: _must(may_open.wait(10))
        rank.node = second
        claiming = asyncio.create_task(rank.claim_it())
        report = second.store.report
        await until(lambda: (now := report()) is not None and now.status == "reserving")
        assert not second.store.raise_drop(7, known_drop=0)
        assert not second.store.raise_drop(7, known_drop=0)
        may_open.set()
        assert isinstance(await claiming, HostPlace)
        assert second.store.raise_drop(7, known_drop=0)
        assert not rank.finds(KEYS[0])
        second.store.close()

    run(scenario())


def test_a_restarted_agent_leaves_the_arena_to_the_ranks_that_use_it(tmp_path: Path) -> None:
    """A rank of another layout claims first; it is told of its own failure, and no other rank is."""

    async def scenario() -> None:
        node = Node(tmp_path)
        node.begin()
        user = Rank(node, 11)
        await user.claim_it()
        assert await user.write(KEYS[0]) == "committed"
        node.store.close()
        with held_elsewhere(node.paths.lock, "read"):
            second = Node(tmp_path)
            second.begin()
            user.node = second
            other = Rank(second, 12, layout_digest="other")
            refused, place = await asyncio.gather(other.claim_it(), user.claim_it())
            assert isinstance(refused, HostRefused)
            assert "other processes use it" in refused.message
            assert not refused.is_final
            assert isinstance(place, HostPending)
            assert (await user.claim_it()).nonce == user.caller.nonce
            assert user.finds(KEYS[0])
            second.store.close()

    run(scenario())


def test_the_check_on_a_timer_takes_bad_slots_out_of_use(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        store = node.begin()
        rank = Rank(node, 11)
        await rank.claim_it()
        await rank.write(KEYS[0])
        checking = asyncio.create_task(store.run_checks())
        assert node.file is not None
        node.file.arena().slots[16] = 99  # a stray write on the state of slot 1
        await until(lambda: store.events["violations"] > 0)
        report = store.report()
        assert report is not None
        assert report.quarantined >= 1
        assert await rank.write(KEYS[1]) == "committed"
        checking.cancel()
        store.close()

    run(scenario())


def test_the_check_changes_nothing_in_its_thread(tmp_path: Path) -> None:
    """The loop reports and raises floors meanwhile, from the same counts."""

    async def scenario() -> None:
        node = Node(tmp_path)
        store = node.begin()
        rank = Rank(node, 11)
        await rank.claim_it()
        await rank.write(KEYS[0])
        before = store.report()
        looks: list[bool] = []

        async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
            found = await asyncio.to_thread(function, *arguments)
            looks.append(store.report() == before and store.events["violations"] == 0)
            return found

        node.in_thread = in_thread
        assert node.file is not None
        node.file.arena().slots[16] = 99  # a stray write on the state of slot 1
        checking = asyncio.create_task(store.run_checks())
        await until(lambda: store.events["violations"] > 0)
        assert looks == [True]
        assert store.report() != before
        checking.cancel()
        store.close()

    run(scenario())
