"""The incarnations with their actor handles: who can be called, who is watched, and who waits for a change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeAlias

from actors.end_proofs import EndProof
from actors.membership import MembershipBook
from actors.messages import Membership, RankRecord
from actors.rank_watch import RankWatch, WatchEvents
from actors.ray_errors import Answered, CallFailed, outcome_within
from configs.errors import RankLost

log = logging.getLogger(__name__)

#: a call under way, or why there is none
Call: TypeAlias = Awaitable[Any] | CallFailed


@dataclass(frozen=True, slots=True)
class RankAnswer:
    """What one incarnation said to a call that went to all."""

    record: RankRecord
    outcome: Answered[Any] | CallFailed


class Roster:
    """Lives on one asyncio loop."""

    def __init__(
        self, book: MembershipBook, prove: Callable[[RankRecord], EndProof], on_gone: Callable[[RankRecord], None]
    ) -> None:
        """prove: eye on the process of a record; raises RankLost if it is known not to run."""
        self.book = book
        self._prove = prove
        self._on_gone = on_gone
        self._watches: dict[str, RankWatch] = {}
        self._changed = asyncio.Event()
        self._events = WatchEvents(lost=self._lost, found=self._found, gone=self._gone)

    def admit(self, record: RankRecord, handle: Any) -> bool:
        """Add an incarnation that has just registered and begin to watch it; again with a newer handle, if repeated.

        True if its record is news. Raises RankLost if its process is known not to run.
        """
        proof = self._prove(record)
        is_news = self.book.register(record)
        self._watch(record, handle, proof, is_answering=True)
        self._wake()
        return is_news

    def renew(self, record: RankRecord) -> bool:
        """Take what an incarnation says of itself anew. True if that is news."""
        if self.book.record(record.incarnation) is None:
            return False
        is_news = self.book.register(record)
        self._wake()
        return is_news

    def answered(self, incarnation: str) -> None:
        """Its registration is being answered: it will take requests, with what it is told."""
        self.book.answered(incarnation)
        self._wake()

    def restore(self, record: RankRecord, handle: Any) -> bool:
        """Add an incarnation that the log names. False if its process has ended meanwhile."""
        try:
            proof = self._prove(record)
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

    def settled_records(self) -> list[RankRecord]:
        """Of the incarnations that may hold KV."""
        return [record for record in self.book.records() if not self.book.is_joining(record.incarnation)]

    def joining_records(self) -> list[RankRecord]:
        """Of those that hold nothing and will be told the newest epoch."""
        return [record for record in self.book.records() if self.book.is_joining(record.incarnation)]

    def handle(self, incarnation: str) -> Any | None:
        """Its actor; None if it is unknown here or to Ray."""
        watch = self._watches.get(incarnation)
        return None if watch is None else watch.handle

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

    async def ask_all(self, call: Callable[[RankRecord, Any], Call], timeout_s: float) -> list[RankAnswer]:
        """Call every incarnation at once; an answer or a failure for each, within `timeout_s`.

        call: begins the call of one actor handle, or says why it cannot be made.
        """
        return await self._ask_each(self.records(), call, timeout_s)

    async def ask_some(
        self, incarnations: Collection[str], call: Callable[[RankRecord, Any], Call], timeout_s: float
    ) -> list[RankAnswer]:
        """The same for these; those that are not known any more are left out."""
        wanted = [record for record in self.records() if record.incarnation in incarnations]
        return await self._ask_each(wanted, call, timeout_s)

    async def _ask_each(
        self, records: list[RankRecord], call: Callable[[RankRecord, Any], Call], timeout_s: float
    ) -> list[RankAnswer]:
        asking = [asyncio.create_task(self._ask(record, call, timeout_s)) for record in records]
        if asking:
            await asyncio.wait(asking)
        return [task.result() for task in asking]

    async def _ask(self, record: RankRecord, call: Callable[[RankRecord, Any], Call], timeout_s: float) -> RankAnswer:
        handle = self.handle(record.incarnation)
        if handle is None:
            return RankAnswer(record, CallFailed("died", "Ray knows no actor of this incarnation"))
        calling = call(record, handle)
        if isinstance(calling, CallFailed):
            return RankAnswer(record, calling)
        return RankAnswer(record, await outcome_within(calling, timeout_s))

    def close(self) -> None:
        """Stop watching."""
        for watch in self._watches.values():
            watch.stop()
        self._watches.clear()

    def _watch(self, record: RankRecord, handle: Any, proof: EndProof, is_answering: bool) -> None:
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
