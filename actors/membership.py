"""Which incarnations exist, which of them take requests: the controller's book of ranks. Pure.

An incarnation stays in the book until its process is proven gone. One that Ray calls dead, or that does not answer,
is `lost`: no request goes there, but a flush still has to account for it, because it may come back with old pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from actors.messages import Member, Membership, RankRecord

MemberState = Literal["serving", "lost"]


class MembershipBook:
    """All registered incarnations. `version` differs after every change that routers must see.

    version: begins above every version of an earlier controller of the same lineage, because terms only rise.
    """

    def __init__(self, term: int, epoch: int, floor: int) -> None:
        self.version = term << 20
        #: newest epoch that some rank is known to have swapped to; routers forget prefixes when it rises
        self.epoch = epoch
        self.floor = floor
        self._records: dict[str, RankRecord] = {}
        self._states: dict[str, MemberState] = {}
        #: incarnations whose first registration has not been answered: they hold nothing and serve nobody
        self._joining: set[str] = set()

    def register(self, record: RankRecord) -> bool:
        """Add an incarnation, take what it says anew (another rank number), and that it answers.

        True if the record is news, to be stored.
        """
        known = self._records.get(record.incarnation)
        if known is None and record.is_empty:
            self._joining.add(record.incarnation)
        is_news = known != record
        if is_news or self._states[record.incarnation] == "lost":
            self.version += 1
        self._records[record.incarnation] = record
        self._states[record.incarnation] = "serving"
        return is_news

    def answered(self, incarnation: str) -> None:
        """Its registration is being answered: with what it is told it will take requests."""
        if incarnation in self._joining:
            self._joining.discard(incarnation)
            self.version += 1

    def restore(self, record: RankRecord) -> None:
        """Add an incarnation that the log names; lost until it has answered this controller."""
        self._records[record.incarnation] = record
        self._states[record.incarnation] = "lost"

    def found(self, incarnation: str) -> bool:
        """It answers. False if that is no news, or it is not in the book."""
        return self._move(incarnation, "serving")

    def lost(self, incarnation: str) -> bool:
        """It does not answer, or Ray calls it dead. False if that is no news, or it is not in the book."""
        return self._move(incarnation, "lost")

    def gone(self, incarnation: str) -> RankRecord | None:
        """Its process is proven gone: strike it from the book. None if it was not there."""
        record = self._records.pop(incarnation, None)
        self._joining.discard(incarnation)
        if record is not None and self._states.pop(incarnation) == "serving":
            self.version += 1
        return record

    def advance(self, epoch: int, floor: int) -> None:
        """A rank has swapped to `epoch`; `floor` is stored. Neither ever falls."""
        if epoch > self.epoch or floor > self.floor:
            self.epoch = max(self.epoch, epoch)
            self.floor = max(self.floor, floor)
            self.version += 1

    def record(self, incarnation: str) -> RankRecord | None:
        return self._records.get(incarnation)

    def records(self) -> list[RankRecord]:
        """All incarnations in the book, by rank, then in order of registration."""
        return sorted(self._records.values(), key=lambda record: record.rank)

    def is_joining(self, incarnation: str) -> bool:
        """It holds nothing yet, and will be told the newest epoch before it serves."""
        return incarnation in self._joining

    def state(self, incarnation: str) -> MemberState:
        """KeyError if it is not in the book."""
        return self._states[incarnation]

    def view(self) -> Membership:
        """What routers see: the incarnations that take requests."""
        serving = (record for record in self.records() if self._takes_requests(record.incarnation))
        return Membership(self.version, self.epoch, self.floor, tuple(_members(serving)))

    def _takes_requests(self, incarnation: str) -> bool:
        return self._states[incarnation] == "serving" and incarnation not in self._joining

    def _move(self, incarnation: str, to: MemberState) -> bool:
        if self._states.get(incarnation, to) == to:
            return False
        self._states[incarnation] = to
        self.version += 1
        return True


def _members(records: Iterable[RankRecord]) -> Iterable[Member]:
    for record in records:
        yield Member(
            rank=record.rank,
            incarnation=record.incarnation,
            node_id=record.node_id,
            ipc_endpoint=record.ipc_endpoint,
            tcp_endpoint=record.tcp_endpoint,
            max_len=record.max_len,
            page_size=record.page_size,
            tcp_key=record.tcp_key,
        )
