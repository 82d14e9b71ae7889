"""Faults put into production code on purpose: each takes one rule of protocol.md away, and must be noticed.

A mutation replaces one function or method. Those of the page's last paragraph are here but for two that concern slots
and bytes of the host tier (`test_host_tier.py`); the others are rows of its table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from actors import control_log
from actors.control_log import ControlLog
from actors.flush_machine import FlushMachine
from actors.flush_plan import FlushPlan
from actors.lease_book import LeaseBook
from actors.messages import LeaseAnswer, NodeRenewal, RankRecord
from actors.node_agent import NodeAgent
from actors.nodes import Nodes
from actors.rank_words import RankWords
from cache.control_page import ControlPageWriter, FileIdentity
from cache.device_cache import DeviceCache
from cache.page_counts import Swapped
from cache.page_hold import PageHold
from cache.types import Epoch, TokenBytes
from engine.control_words import ControlWords
from engine.events import TurnStarted
from engine.flush_gate import FlushGate
from engine.loop import EngineLoop
from tests.simulation.controller import Controller
from tests.simulation.log_writing import StoreFaults
from tests.simulation.network import Weather
from tests.simulation.rank import Rank


@dataclass(frozen=True, slots=True)
class Mutation:
    """Which rule is taken away, and how."""

    name: str
    #: what is said of it: a pattern of the violation, so that it is missed for its own sake
    shows: str
    #: object, name of its attribute, what replaces it
    replaced: tuple[tuple[Any, str, Any], ...]
    #: where it is likely to show: fields of the plan
    plan: Mapping[str, Any]

    @contextmanager
    def applied(self) -> Iterator[None]:
        patches = [patch.object(*replaced) for replaced in self.replaced]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()


# ---------------------------------------------------------------------------------- the list at the end of protocol.md
def _read_words_first(self: EngineLoop) -> bool:
    """`EngineLoop.turn` with its two readings the other way round (hole H7)."""
    words = self._read_words()
    commands = self._drain()
    commands += self._scheduler.handle(TurnStarted(words), self._clock())
    batch = self._carry_out(commands)
    if batch is not None:
        self._run_step(batch)
    return self._scheduler.has_work or bool(self._inbox)


def _publish_under_the_current_epoch(
    self: DeviceCache, hold: PageHold, tokens: TokenBytes, num_tokens: int, now_s: float
) -> None:
    """`DeviceCache.publish` without the taint: what a fenced hold has computed enters the tree of today."""
    if hold.is_fenced and hold.span is None:
        hold.is_fenced = False
        self._num_fenced -= hold.num_private_pages
        self._num_private += hold.num_private_pages
    _publish(self, hold, tokens, num_tokens, now_s)


_publish = DeviceCache.publish


def _free_pages_of_copies(self: DeviceCache, epoch: Epoch) -> Swapped:
    """`DeviceCache.swap` that takes copies for past: their pages go back to the pool while they run (hole H13)."""
    for hold in self.holds:
        if hold.is_copy and hold.num_shared_pages == 0:
            self._num_copying -= hold.num_private_pages
            hold.replace_pages(b"")
    return _swap(self, epoch)


_swap = DeviceCache.swap


async def _keep_the_file(self: NodeAgent, lineage: str) -> None:
    """`NodeAgent._begin_lineage` without retiring what was cached under another one."""
    if self._file is None:
        await _begin_lineage(self, lineage)
    self._lineage = lineage


_begin_lineage = NodeAgent._begin_lineage


def _obey_any_term(self: ControlPageWriter, term: int, floor: int, weights_floor: int = 0) -> bool:
    return _raise_floor(self, self.read().term, floor, weights_floor)


_raise_floor = ControlPageWriter.raise_floor


def _take_any_term(self: FlushGate, *args: Any, **options: Any) -> Any:
    self._term = 0
    return _offer(self, *args, **options)


_offer = FlushGate.offer


# ------------------------------------------------------------------------------------- the table of protocol.md
def _lease_always(self: RankWords) -> ControlWords:
    words = _read(self)
    return ControlWords(True, words.floor, words.epoch)


_read = RankWords.read


def _count_from_the_start(self: LeaseBook, lease_s: float, longest_s: float, started_s: float) -> None:
    _init_leases(self, lease_s, longest_s, started_s)
    self._earlier_over_s = -math.inf


_init_leases = LeaseBook.__init__


def _deny_in_doubt(self: FlushMachine, message: str, now_s: float) -> Any:
    return self._give_up("unavailable", f"{message}; no rank was told to flush", now_s)


async def _nobody(self: Controller) -> bool:
    return False


def _silent_is_dead(self: FlushMachine, record: RankRecord, now_s: float) -> Any:
    return "expired", "it does not answer"


def _grant_without_check(self: LeaseBook, node_id: str, now_s: float) -> str | None:
    self._checked_s = now_s
    return _why_not(self, node_id, now_s)


_why_not = LeaseBook.why_not


def _write_over_others(self: ControlLog, index: int) -> Any:
    """`ControlLog._own` without the look at who wrote the record: the next index is taken whoever has this one."""
    data = self._store.read(index)
    assert data is not None
    return control_log.decode_entry(data)


def _never_superseded(self: ControlLog) -> None:
    self._see_past(self._next - 1, self._clock.now_s())


def _grant_floor_of_before(self: Nodes, renewal: NodeRenewal, handle: Any) -> LeaseAnswer:
    return replace(_renew(self, renewal, handle), floor=0)


_renew = Nodes.renew


_BUSY = {"num_requests": 60, "num_flushes": 12, "length_s": 12.0}

_DOUBTFUL_STORE = StoreFaults(typical_s=0.002, share_slow=0.0, slow_s=0.0, share_failing=0.12, share_preempted=0.0)
_LATE_STORE = StoreFaults(typical_s=0.02, share_slow=0.0, slow_s=0.0, share_failing=0.0, share_preempted=0.0)
_DOUBLED = Weather(typical_s=0.005, share_slow=0.2, slow_s=0.5, share_lost=0.0, share_doubled=0.5)

ALL = (
    Mutation(
        "read words before draining",
        r"invariant [15]:",
        ((EngineLoop, "turn", _read_words_first),),
        _BUSY | {"share_preempted": 0.3, "modes": ("fence",), "step_s": 0.002},
    ),
    Mutation(
        "key by current epoch at insert",
        r"invariant [12]:",
        ((DeviceCache, "publish", _publish_under_the_current_epoch),),
        _BUSY | {"modes": ("fence",), "step_s": 0.08},
    ),
    Mutation(
        "floor first in wait",
        r"G4: .* raised the floor",
        ((FlushPlan, "raises_floor_first", property(lambda self: self.takes_epoch)),),
        _BUSY | {"modes": ("wait",)},
    ),
    Mutation(
        "free a page at flush with its copy running",
        r"invariant 10:",
        ((DeviceCache, "swap", _free_pages_of_copies),),
        _BUSY | {"modes": ("fence", "retract"), "host_policy": "write_back"},
    ),
    Mutation(
        "no lineage",
        r"has no lease: the page obeys a higher term",
        (
            (NodeAgent, "_begin_lineage", _keep_the_file),
            (FileIdentity, "difference", lambda self, page: None),
            (Rank, "_is_foreign", lambda self, lineage: False),
        ),
        _BUSY | {"faults": ("lose_log", "kill_controller"), "num_faults": 6},
    ),
    Mutation(
        "no term",
        r"invariant 4:.* obeys term",
        (
            (ControlPageWriter, "raise_floor", _obey_any_term),
            (FlushGate, "offer", _take_any_term),
            (FlushGate, "see_term", lambda self, term: True),
        ),
        _BUSY | {"faults": ("second_controller", "freeze_controller"), "num_faults": 9, "num_aborts": 20},
    ),
    Mutation("lease ignored by ranks", r"invariant 5:.* lease over", ((RankWords, "read", _lease_always),), _BUSY),
    Mutation(
        "a new controller does not wait two leases",
        r"invariant [159]:|is called expired and may match",
        ((LeaseBook, "__init__", _count_from_the_start),),
        _BUSY | {"faults": ("kill_controller", "cut_off"), "num_faults": 9},
    ),
    Mutation(
        "a floor that may rise is denied",
        r"G4: the floor rises",
        ((FlushMachine, "_give_up_in_doubt", _deny_in_doubt),),
        _BUSY | {"modes": ("fence", "retract", "abort"), "store_faults": _DOUBTFUL_STORE},
    ),
    Mutation(
        "a controller whose log was lost does not wait for the end of earlier leases",
        r"invariant [19]:",
        ((Controller, "_has_elders", _nobody),),
        _BUSY
        | {
            "faults": ("lose_log", "kill_controller", "cut_off"),
            "num_faults": 9,
            "lease_s": 6.0,
            "num_nodes": 3,
            "num_ranks": 5,
            "modes": ("fence", "abort", "retract"),
        },
    ),
    Mutation(
        "unreachable counted as dead",
        r"is called expired and may match|section 6: .* is expired|invariant [19]:",
        ((FlushMachine, "_stand_in", _silent_is_dead),),
        _BUSY,
    ),
    Mutation(
        "grants without a check of the store",
        r"is called expired and may match|section 6: .* is expired|invariant [19]:",
        ((LeaseBook, "why_not", _grant_without_check),),
        _BUSY | {"faults": ("second_controller",), "num_faults": 3, "num_nodes": 3},
    ),
    Mutation(
        "a lease for a node that a flush counts as out of lease",
        r"is called expired and may match|section 6: .* is expired|invariant [19]:",
        ((LeaseBook, "withhold", lambda self, node_ids: None),),
        _BUSY
        | {
            "modes": ("wait", "drain"),
            "faults": ("freeze_agent", "cut_off"),
            "num_faults": 9,
            "store_faults": _LATE_STORE,
        },
    ),
    Mutation(
        "a grant older than its sender's own floor",
        r"invariant [159]:",
        ((Nodes, "renew", _grant_floor_of_before),),
        _BUSY | {"faults": ("freeze_agent", "cut_off"), "num_faults": 9},
    ),
    Mutation(
        "verdicts are not remembered",
        r"invariant 7:",
        ((FlushGate, "_keep", lambda self, *facts: None),),
        _BUSY | {"weather": _DOUBLED},
    ),
    Mutation(
        "writes not fenced by the log",
        r"is called expired and may match|invariant [1459]:",
        ((ControlLog, "_own", _write_over_others), (ControlLog, "check", _never_superseded)),
        _BUSY | {"faults": ("second_controller",), "num_faults": 3},
    ),
)
