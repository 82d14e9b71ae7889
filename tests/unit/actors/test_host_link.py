"""A rank's way to its host tier: a real store on a real file, an actor that is lost, frozen, restarted or replaced."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.exceptions

from actors import host_link
from actors.host_link import HostLink, LinkSurroundings, MappedArena
from actors.host_messages import HostClaim, HostPlace
from cache.arena import Arena
from cache.control_page import ControlPage
from cache.host_reader import HostReader
from cache.host_tier import CommitOutcome
from cache.host_writer import HostWriter
from cache.page_checksum import PageEntry
from cache.shared_file import OwnedFile
from cache.slot_owners import SlotLease, SlotRef
from cache.types import Epoch
from configs.errors import ConfigError
from engine.flush import FlushScope
from engine.host_calls import SubEpochs, TierCalls, TierPlace
from tests.unit.actors.fakes import Remote
from tests.unit.actors.planes import run, until
from tests.unit.actors.test_host_store import KEYS, PAGE_BYTES, Node, Rank

METHODS = {
    "claim_host": "claim",
    "lease_slots": "lease",
    "commit_pages": "commit",
    "reconcile_slots": "reconcile",
    "tell_host": "tell",
    "leave_host": "leave",
}


class TierActor:
    """The actor as a handle to it looks; it can be lost and frozen."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.is_lost = False
        self.thawed = asyncio.Event()
        self.thawed.set()

    def __getattr__(self, name: str) -> Remote:
        method: Callable[..., Awaitable[Any]] = getattr(self.node.store, METHODS[name])

        async def call(*args: Any) -> Any:
            if self.is_lost:
                raise ray.exceptions.ActorUnavailableError("it is being restarted", None)
            await self.thawed.wait()
            return await method(*args)

        return Remote(call)


class Mapped:
    """The node's own file, as a rank would have mapped it."""

    def __init__(self, file: OwnedFile) -> None:
        self._file = file
        self.page: ControlPage = file.page
        self.is_closed = False

    def arena(self) -> Arena:
        return self._file.arena()

    def close(self) -> None:
        self.is_closed = True


class Copier:
    """Asks and is answered as the copier thread does, from a thread of its own."""

    def __init__(self, place: TierPlace) -> None:
        self.place = place
        self.writer = HostWriter(place.arena)
        self.reader = HostReader(place.arena, place.page)
        self.answers: list[str] = []
        self.calls: TierCalls = place.connect(self)

    def ask(self, question: Callable[[TierCalls], None]) -> None:
        thread = threading.Thread(target=question, args=(self.calls,))
        thread.start()
        thread.join()

    def leased(self, lease: SlotLease) -> None:
        self.writer.accept(lease)
        self.answers.append("leased")

    def lease_failed(self) -> None:
        self.answers.append("lease_failed")

    def committed(self, entries: Sequence[PageEntry], outcomes: Sequence[CommitOutcome]) -> None:
        self.writer.settle(entries, outcomes)
        self.answers += outcomes

    def commit_lost(self, entries: Sequence[PageEntry]) -> None:
        self.writer.forget(entries)
        self.answers.append("commit_lost")

    def reconciled(self, not_ours: Sequence[SlotRef]) -> None:
        self.writer.lose(not_ours)
        self.answers.append("reconciled")

    def reconcile_failed(self) -> None:
        self.answers.append("reconcile_failed")

    def write(self, key: bytes) -> None:
        assert self.writer.write(key, Epoch(0), 100, np.full(PAGE_BYTES, key[0], np.uint8))
        self.ask(lambda calls: calls.commit(self.writer.take_commits()))


class World:
    """A node, its actor, and one rank's link."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.node = Node(directory)
        self.node.begin()
        self.actor: TierActor | None = TierActor(self.node)
        self.copiers: list[Copier] = []
        self.mapped: list[Mapped] = []
        self.num_warmed = 0
        self.claim = Rank(self.node, 11).claim
        self.sub_epochs: SubEpochs = ()

    def link(self, **changes: Any) -> HostLink:
        async def find_tier() -> Any:
            return self.actor

        around = LinkSurroundings(
            find_tier, self._map, lambda place: self.copiers.append(Copier(place)), self._warm, asyncio.to_thread
        )
        return HostLink(replace(self.claim, **changes), lambda: self.sub_epochs, around)

    @property
    def copier(self) -> Copier:
        return self.copiers[-1]

    def restart_tier(self) -> None:
        """The actor's process ends and Ray starts another one, which knows nothing."""
        assert self.actor is not None
        self.node.store.close()
        self.node = Node(self.directory)
        self.node.begin()
        self.actor.node = self.node

    def _map(self, place: HostPlace, claim: HostClaim) -> MappedArena | None:
        assert self.node.file is not None
        self.mapped.append(Mapped(self.node.file))
        return self.mapped[-1]

    def _warm(self, arena: Arena) -> None:
        self.num_warmed += 1


def test_the_engine_gets_the_scopes_that_were_flushed_until_its_tier_is_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        actor, world.actor = world.actor, None
        link = world.link()
        await link.begin()
        told = world.sub_epochs = ((FlushScope(namespace="tenant"), 12),)
        world.actor = actor
        await until(lambda: len(world.copiers) == 1)
        assert world.copier.place.sub_epochs == told
        link.close()

    run(scenario())


def test_calls_are_carried_in_order_and_answered(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        link = world.link()
        await link.begin()
        await until(lambda: len(world.copiers) == 1 and world.num_warmed == 1)
        copier = world.copier
        copier.ask(lambda calls: calls.lease(3))
        await until(lambda: copier.answers == ["leased"])
        copier.write(KEYS[0])
        ready = copier.writer.held()[:1]
        copier.ask(lambda calls: calls.release(ready))
        copier.writer.lose(ready)
        copier.ask(lambda calls: calls.reconcile(copier.writer.held()))
        await until(lambda: len(copier.answers) == 3)
        assert copier.answers == ["leased", "committed", "reconciled"]
        report = world.node.store.report()
        assert report is not None
        assert (report.committed, report.leased) == (1, 1)
        assert copier.reader.look_up(KEYS[0], Epoch(0)).num_pages == 1
        assert link.facts() == {"is_attached": True, "message": "", "num_lost_calls": 0}
        await link.leave()
        report = world.node.store.report()
        assert report is not None
        assert (report.leased, report.num_ranks) == (0, 0)
        link.close()
        assert world.mapped[0].is_closed
        world.node.store.close()

    run(scenario())


def test_a_rank_that_can_never_have_the_tier_does_not_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        with pytest.raises(ConfigError, match="holds no page"):
            await world.link(page_bytes=1 << 30).begin()
        world.node.store.close()

    run(scenario())


def test_a_rank_of_another_layout_serves_without_the_tier_until_its_users_have_left(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        user = Rank(world.node, 12)
        await user.claim_it()
        link = world.link(layout_digest="other")
        await link.begin()
        assert "another layout" in link.facts()["message"]
        await world.node.store.leave(user.claim.incarnation)
        await until(lambda: len(world.copiers) == 1)
        await until(lambda: link.facts()["is_attached"])
        link.close()
        world.node.store.close()

    run(scenario())


def test_a_rank_without_its_agent_starts_and_gets_the_tier_later(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        actor, world.actor = world.actor, None
        link = world.link()
        await link.begin()
        assert link.facts()["message"] == "the node's agent is not there"
        world.actor = actor
        await until(lambda: len(world.copiers) == 1)
        await until(lambda: link.facts()["is_attached"])
        link.close()
        world.node.store.close()

    run(scenario())


def test_a_commit_outlives_a_restart_and_other_answers_are_said_to_be_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        link = world.link()
        await link.begin()
        await until(lambda: len(world.copiers) == 1)
        copier, actor = world.copier, world.actor
        assert actor is not None
        copier.ask(lambda calls: calls.lease(3))
        await until(lambda: copier.answers == ["leased"])
        actor.is_lost = True
        copier.ask(lambda calls: calls.lease(1))
        await until(lambda: copier.answers[1:] == ["lease_failed"])
        copier.write(KEYS[0])
        world.restart_tier()
        actor.is_lost = False
        await until(lambda: copier.answers[-1] == "committed")
        copier.ask(lambda calls: calls.reconcile(copier.writer.held()))
        await until(lambda: copier.answers[-1] == "reconciled")
        assert len(world.copiers) == 1
        report = world.node.store.report()
        assert report is not None
        assert (report.committed, report.leased, report.quarantined) == (1, 2, 0)
        link.close()
        world.node.store.close()

    run(scenario())


def test_a_tier_that_stays_away_loses_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_link, "_PATIENCE_S", 0.02)
    monkeypatch.setattr(host_link, "_RETRY_S", 0.01)

    async def scenario() -> None:
        world = World(tmp_path)
        link = world.link()
        await link.begin()
        await until(lambda: len(world.copiers) == 1)
        copier, actor = world.copier, world.actor
        assert actor is not None
        copier.ask(lambda calls: calls.lease(1))
        await until(lambda: copier.answers == ["leased"])
        actor.is_lost = True
        copier.write(KEYS[0])
        await until(lambda: copier.answers[1:] == ["commit_lost"])
        copier.ask(lambda calls: calls.reconcile([]))
        await until(lambda: copier.answers[2:] == ["reconcile_failed"])
        assert not link.facts()["is_attached"]
        actor.is_lost = False
        await until(lambda: link.facts()["is_attached"])
        link.close()
        world.node.store.close()

    run(scenario())


def test_a_frozen_tier_is_waited_for_no_longer_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_link, "_CALL_TIMEOUT_S", 0.02)
    monkeypatch.setattr(host_link, "_CLAIM_TIMEOUT_S", 0.02)
    monkeypatch.setattr(host_link, "_PATIENCE_S", 0.02)

    async def scenario() -> None:
        world = World(tmp_path)
        link = world.link()
        await link.begin()
        await until(lambda: len(world.copiers) == 1)
        copier, actor = world.copier, world.actor
        assert actor is not None
        actor.thawed.clear()
        copier.ask(lambda calls: calls.lease(2))
        copier.ask(lambda calls: calls.reconcile([]))
        await until(lambda: copier.answers == ["lease_failed", "reconcile_failed"])
        actor.thawed.set()
        await until(lambda: link.facts()["is_attached"])
        link.close()
        world.node.store.close()

    run(scenario())


def test_a_new_file_is_attached_in_place_of_the_old_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        link = world.link()
        await link.begin()
        await until(lambda: len(world.copiers) == 1)
        old, actor = world.copier, world.actor
        assert actor is not None
        assert world.node.file is not None
        actor.is_lost = True
        world.node.file.retire()
        world.node = Node(tmp_path, nonce=8)
        world.node.begin()
        actor.node = world.node
        old.ask(lambda calls: calls.lease(1))
        await until(lambda: old.answers == ["lease_failed"])
        actor.is_lost = False
        await until(lambda: len(world.copiers) == 2)
        assert world.mapped[0].is_closed
        world.copier.ask(lambda calls: calls.lease(1))
        await until(lambda: world.copier.answers == ["leased"])
        old.ask(lambda calls: calls.lease(1))
        await until(lambda: old.answers == ["lease_failed"] * 2)
        link.close()
        # a copier that asks after the end is told so, too
        world.copier.ask(lambda calls: calls.lease(1))
        await until(lambda: world.copier.answers[-1] == "lease_failed")
        world.node.store.close()

    run(scenario())


@pytest.mark.parametrize("patience_s", [5.0, 0.02])
def test_slots_given_back_while_the_tier_is_away_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    monkeypatch.setattr(host_link, "_PATIENCE_S", patience_s)
    monkeypatch.setattr(host_link, "_RETRY_S", 0.01)

    async def scenario() -> None:
        world = World(tmp_path)
        link = world.link()
        await link.begin()
        await until(lambda: len(world.copiers) == 1)
        copier, actor = world.copier, world.actor
        assert actor is not None
        copier.ask(lambda calls: calls.lease(3))
        await until(lambda: copier.answers == ["leased"])
        actor.is_lost = True
        returned = copier.writer.held()[:2]
        copier.ask(lambda calls: calls.release(returned))
        copier.ask(lambda calls: calls.lease(1))
        if patience_s < 1:
            await until(lambda: copier.answers[1:] == ["lease_failed"])
        await until(lambda: not link.facts()["is_attached"])
        world.restart_tier()
        actor.is_lost = False
        await until(lambda: link.facts()["is_attached"])
        copier.ask(lambda calls: calls.lease(1))
        await until(lambda: len(copier.answers) == 3)
        report = world.node.store.report()
        assert report is not None
        assert report.leased == copier.writer.num_ready - len(returned)
        link.close()
        world.node.store.close()

    run(scenario())


def test_a_rank_with_nothing_to_say_claims_again_when_its_agent_was_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_link, "_LOOK_S", 0.01)
    monkeypatch.setattr(host_link, "_RETRY_S", 0.01)

    async def scenario() -> None:
        world = World(tmp_path)
        link = world.link()
        await link.begin()
        await until(lambda: len(world.copiers) == 1)
        world.restart_tier()
        report = world.node.store.report
        await until(lambda: (now := report()) is not None and now.num_ranks == 1)
        assert link.facts() == {"is_attached": True, "message": "", "num_lost_calls": 0}
        assert len(world.copiers) == 1
        link.close()
        world.node.store.close()

    run(scenario())


def test_the_last_commit_comes_before_the_leave(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        link = world.link()
        await link.begin()
        await until(lambda: len(world.copiers) == 1)
        copier, actor = world.copier, world.actor
        assert actor is not None
        copier.ask(lambda calls: calls.lease(2))
        await until(lambda: copier.answers == ["leased"])
        actor.thawed.clear()
        copier.ask(lambda calls: calls.lease(1))
        copier.write(KEYS[0])
        leaving = asyncio.create_task(link.leave())
        await asyncio.sleep(0)
        actor.thawed.set()
        await leaving
        assert copier.answers == ["leased", "leased", "committed"]
        report = world.node.store.report()
        assert report is not None
        assert (report.committed, report.leased, report.num_ranks) == (1, 0, 0)
        link.close()
        world.node.store.close()

    run(scenario())


def test_who_leaves_a_tier_that_does_not_answer_waits_for_a_moment_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_link, "_LEAVE_TIMEOUT_S", 0.02)

    async def scenario() -> None:
        world = World(tmp_path)
        link = world.link()
        await link.begin()
        await until(lambda: len(world.copiers) == 1)
        assert world.actor is not None
        world.actor.thawed.clear()
        await asyncio.wait_for(link.leave(), 5)
        report = world.node.store.report()
        assert report is not None
        assert report.num_ranks == 1
        link.close()
        world.node.store.close()

    run(scenario())
