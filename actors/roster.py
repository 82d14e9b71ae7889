"""The incarnations with their actor handles: who can be called, who is watched, and who waits for a change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors.membership import MembershipBook
from actors.messages import Membership, RankRecord
from actors.process_proof import ProcessProof
from actors.rank_watch import RankWatch, WatchEvents
from actors.ray_errors import Answered, CallFailed, outcome_within
from configs.errors import RankLost

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankAnswer:
    """What one incarnation said to a call that went to all."""

    record: RankRecord
    outcome: Answered[Any] | CallFailed


class Roster:
    """Lives on one asyncio loop."""

    def __init__(self, book: MembershipBook, node_id: str, on_gone: Callable[[RankRecord], None]) -> None:
        """node_id: of this process; only there can the end of a rank's process be proven."""
        self.book = book
        self._node_id = node_id
        self._on_gone = on_gone
        self._watches: dict[str, RankWatch] = {}
        self._changed = asyncio.Event()
        self._events = WatchEvents(lost=self._lost, found=self._found, gone=self._gone)

    def admit(self, record: RankRecord, handle: Any) -> bool:
        """Add an incarnation that has just registered and begin to watch it; again with a newer handle, if repeated.

        True if its record is news. Raises RankLost if it says to run on this node and no such process runs here.
        """
        proof = self._proof(record)
        is_news = self.book.register(record)
        self._watch(record, handle, proof, is_answering=True)
        self._wake()
        return is_news

    def restore(self, record: RankRecord, handle: Any) -> bool:
        """Add an incarnation that the log names. False if its process has ended meanwhile."""
        try:
            proof = self._proof(record)
        except RankLost:
            return False
        self.book.restore(record)
        self._watch(record, handle, proof, is_answering=False)
        return True

    async def until_asked(self, timeout_s: float) -> None:
        """Until every restored incarnation has given its first sign of life or failed to, at most `timeout_s`."""
        waits = [asyncio.ensure_future(watch.asked.wait()) for watch in self._watches.values()]
        if waits:
            await asyncio.wait(waits, timeout=timeout_s)
        for wait in waits:
            wait.cancel()

    def forget(self, incarnation: str) -> None:
        """Take back an `admit`."""
        watch = self._watches.pop(incarnation, None)
        if watch is not None:
            watch.stop()
        self.book.gone(incarnation)
        self._wake()

    def records(self) -> list[RankRecord]:
        return self.book.records()

    def handle(self, incarnation: str) -> Any | None:
        """Its actor; None if it is unknown here or to Ray."""
        watch = self._watches.get(incarnation)
        return None if watch is None else watch.handle

    def can_prove(self, incarnation: str) -> bool:
        """The end of its process would be noticed for certain."""
        watch = self._watches.get(incarnation)
        return watch is not None and watch.can_prove

    def advance(self, epoch: int, floor: int) -> None:
        """Tell routers that a rank has swapped to `epoch` and that `floor` is stored."""
        version = self.book.version
        self.book.advance(epoch, floor)
        if self.book.version != version:
            self._wake()

    async def changed(self, known_version: int, timeout_s: float) -> Membership:
        """The membership as soon as its version is not `known_version`, at the latest after `timeout_s`."""
        if self.book.version == known_version:
            waiting = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait({waiting}, timeout=timeout_s)
            waiting.cancel()
        return self.book.view()

    async def ask_all(self, method: str, *args: Any, timeout_s: float) -> list[RankAnswer]:
        """Call one method of every incarnation at once; an answer or a failure for each, within `timeout_s`."""
        records = self.records()
        asking = [asyncio.create_task(self._ask(record, method, args, timeout_s)) for record in records]
        if asking:
            await asyncio.wait(asking)
        return [task.result() for task in asking]

    async def _ask(self, record: RankRecord, method: str, args: tuple[Any, ...], timeout_s: float) -> RankAnswer:
        handle = self.handle(record.incarnation)
        if handle is None:
            return RankAnswer(record, CallFailed("died", "Ray knows no actor of this incarnation"))
        return RankAnswer(record, await outcome_within(getattr(handle, method).remote(*args), timeout_s))

    def close(self) -> None:
        """Stop watching."""
        for watch in self._watches.values():
            watch.stop()
        self._watches.clear()

    def _proof(self, record: RankRecord) -> ProcessProof | None:
        if record.node_id != self._node_id:
            return None
        proof = ProcessProof.open(record.pid, record.start_time)
        if proof is None:
            raise RankLost(f"incarnation {record.incarnation}: no process {record.pid} runs on this node")
        return proof

    def _watch(self, record: RankRecord, handle: Any, proof: ProcessProof | None, is_answering: bool) -> None:
        earlier = self._watches.pop(record.incarnation, None)
        if earlier is not None:
            earlier.stop()
        watch = self._watches[record.incarnation] = RankWatch(record, handle, proof, self._events)
        watch.start(is_answering)

    def _lost(self, incarnation: str) -> None:
        if self.book.lost(incarnation):
            log.warning("incarnation %s does not answer", incarnation)
            self._wake()

    def _found(self, incarnation: str) -> None:
        if self.book.found(incarnation):
            log.info("incarnation %s answers", incarnation)
            self._wake()

    def _gone(self, incarnation: str) -> None:
        self._watches.pop(incarnation, None)
        record = self.book.gone(incarnation)
        if record is not None:
            log.warning("rank %d, incarnation %s: its process has ended", record.rank, incarnation)
            self._wake()
            self._on_gone(record)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
