"""The seam between a rank's engine and its node's host tier: what each asks of the other. Plain data and protocols.

The copier thread (engine/host_copier.py) copies page bytes and asks `TierCalls`; whoever carries the calls to the tier
(an actor's link, or in tests the tier itself) answers through the `TierAnswers` it was connected with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from cache.arena import Arena
from cache.control_page import ControlPage
from cache.host_reader import Verification
from cache.host_tier import CommitOutcome
from cache.page_checksum import PageEntry
from cache.slot_owners import SlotLease, SlotRef
from cache.write_policy import WritePolicy
from configs.errors import ConfigError
from engine.flush import FlushScope


class TierCalls(Protocol):
    """What the copier asks of the tier. Called by the copier thread; no method blocks or raises.

    Calls arrive at the tier in the order in which they were made. A call that has an answer gets exactly one.
    """

    def lease(self, num_slots: int) -> None:
        """`HostTier.lease`; answered by `leased` or `lease_failed`."""
        ...

    def commit(self, entries: Sequence[PageEntry]) -> None:
        """`HostTier.commit`; answered by `committed` or `commit_lost`."""
        ...

    def reconcile(self, held: Sequence[SlotRef]) -> None:
        """`HostTier.reconcile`; answered by `reconciled` or `reconcile_failed`. Asked when no other call is open."""
        ...

    def release(self, slots: Sequence[SlotRef]) -> None:
        """`HostTier.release`; no answer. A lost one is made good by the next `reconcile`."""
        ...

    def told(self, touched: Sequence[SlotRef], corrupt: Sequence[SlotRef]) -> None:
        """`HostTier.touch` for pages that were read, `report_corrupt` for each bad one; no answer."""
        ...


class TierAnswers(Protocol):
    """Where answers go. Any thread may call; nothing blocks. Answers of a tier that was replaced are ignored."""

    def leased(self, lease: SlotLease) -> None: ...

    def lease_failed(self) -> None:
        """The answer was lost, or the call was: slots may have been leased to us that we do not know."""
        ...

    def committed(self, entries: Sequence[PageEntry], outcomes: Sequence[CommitOutcome]) -> None: ...

    def commit_lost(self, entries: Sequence[PageEntry]) -> None:
        """These may be committed or not."""
        ...

    def reconciled(self, not_ours: Sequence[SlotRef]) -> None: ...

    def reconcile_failed(self) -> None:
        """It is asked again with the next piece of work."""
        ...


#: scoped flushes to keep that were before: (scope, sub-epoch), a scope of None covers everything
SubEpochs: TypeAlias = tuple[tuple[FlushScope | None, int], ...]

#: makes the calls of one attachment, given where their answers go
ConnectTier: TypeAlias = Callable[[TierAnswers], TierCalls]


@dataclass(frozen=True, slots=True)
class TierPlace:
    """A mapped arena and the way to its tier. Attached to an engine, it stays mapped until another one, or none, is."""

    arena: Arena
    #: of the same file
    page: ControlPage
    connect: ConnectTier
    #: of the controller's log; part of every key
    lineage: str
    #: as the controller told them when the rank registered
    sub_epochs: SubEpochs = ()


@dataclass(frozen=True, slots=True)
class HostSettings:
    """How a rank uses its node's host tier. Raises ConfigError on what cannot work."""

    #: shape, dtype and page size of the rank's KV pages; content of its weights (`ModelFacts`)
    layout_digest: str
    weights_digest: str
    page_bytes: int
    write_policy: WritePolicy = "write_back"
    verification: Verification = "full"
    #: pages on their way in either direction hold at most this; more is dropped (writes) or computed (loads)
    max_inflight_bytes: int = 256 * 1024 * 1024
    #: shares of the device pool, `write_back` only: below `low` free pages the coldest leave, until `high` are free or
    #: on their way
    low_watermark: float = 0.05
    high_watermark: float = 0.10
    #: slots asked for at once; as many are kept ready
    lease_batch: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.low_watermark <= self.high_watermark < 1:
            raise ConfigError(
                f"host_tier watermarks are {self.low_watermark} and {self.high_watermark}; "
                "they must satisfy 0 <= low <= high < 1"
            )
        if self.lease_batch < 1:
            raise ConfigError(f"host_tier lease_batch is {self.lease_batch}; it must be at least 1")
        if self.max_inflight_bytes < self.page_bytes:
            raise ConfigError(
                f"host_tier max_inflight_bytes is {self.max_inflight_bytes:,}, less than one page "
                f"({self.page_bytes:,} bytes); raise it"
            )

    @property
    def max_inflight_pages(self) -> int:
        return self.max_inflight_bytes // self.page_bytes
