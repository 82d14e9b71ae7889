"""Sees everything and says what may not be: the promise and the invariants of protocol.md, against the ground truth.

Nothing here trusts an epoch, a lease or a verdict: what is true is read from the nodes' pages, the ranks' caches, the
processes that live, and from the origin of each KV slot. Instants are numbers of one counter for the whole world.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from actors.log_records import FlushIntent, TakeOver, decode_entry
from actors.messages import AbortCommand
from configs.schema import ControlSettings
from engine.flush import STEP_MODES, FlushCommand, FlushVerdict
from engine.flush_gate import PendingFlush
from engine.request import Request
from tests.fakes import tokens_of
from tests.simulation.controller import Controller
from tests.simulation.rank import Rank
from tests.simulation.trace import Trace
from tests.simulation.virtual_loop import VirtualLoop

#: verdicts that say: this rank is as it was
_UNTOUCHED = frozenset({"timed_out", "refused", "busy", "expired_command"})
#: clocks of two machines run apart by this much at most, and floats round
_DRIFT = 1.1e-3
_ROUNDING_S = 1e-6


@dataclass(frozen=True, slots=True)
class Promise:
    """What the newest success says of every request that is received from now on."""

    epoch: int = 0
    #: instant at which its epoch was allotted
    began: int = 0


class Oracle:
    """One world's judge. The first violation stops the world."""

    def __init__(self, trace: Trace, settings: ControlSettings, loop: VirtualLoop, ranks: Callable[[], Iterable[Rank]]):
        self.violations: list[str] = []
        self.promise = Promise()
        #: called when there is a new one
        self.on_promise: Callable[[], None] = lambda: None
        self._trace = trace
        self._settings = settings
        self._loop = loop
        self._ranks = ranks
        self._instants = itertools.count(1)
        #: epoch or sub-epoch -> instant of its intent, flush that has it
        self._begun: dict[int, tuple[int, str]] = {}
        #: (flush id, its start) -> index of its intent, and does that raise the floor; and the ranks that an answer
        #: without an index has called untouched
        self._indices: dict[tuple[str, str], tuple[int, bool]] = {}
        self._denied: dict[tuple[str, str], set[str]] = {}
        #: namespace, and beginning of prompts -> instant since which KV in this scope may be reused
        self._promised_spaces: dict[str, int] = {}
        self._promised_stems: dict[bytes, int] = {}
        self._newest_term = 0
        #: request -> what had been promised when it was received
        self._received: dict[str, Promise] = {}
        #: (incarnation, flush id, index) -> executions
        self._executed: Counter[tuple[str, str, int]] = Counter()
        #: (incarnation, flush id, index) that have their verdict
        self._ended: set[tuple[str, str, int]] = set()
        #: nonce of a file -> term and floor on its page when it was last read
        self._pages: dict[tuple[str, int], tuple[int, int]] = {}
        #: flushes of which an answer has said that this incarnation is untouched, and their epochs
        self._untouched: set[tuple[str, str, int]] = set()
        self._barred: set[tuple[str, int]] = set()
        #: highest term that had been heard when a command came
        self._term_at_offer: dict[tuple[str, str, int], int] = {}
        #: truth about the words of the turn under way: may match, least epoch
        self._words: dict[str, tuple[bool, int]] = {}

    def now(self) -> int:
        """A new instant, later than all before."""
        return next(self._instants)

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.violations.append(what)
            self._trace.tell("VIOLATION", what)
            self._loop.stop()

    def failed(self, who: str, error: BaseException) -> None:
        """Production code has raised what it never may."""
        self.require(False, f"{who} failed: {type(error).__name__}: {error}")

    # --------------------------------------------------------------------------------------------------- the log
    def stored(self, index: int, data: bytes) -> None:
        """A record was created."""
        record = decode_entry(data).record
        if isinstance(record, FlushIntent):
            self.require(index not in self._begun, f"invariant 4: epoch {index} is allotted twice")
            self._begun[index] = (self.now(), record.request.flush_id)
            name = (record.request.flush_id, record.started_at)
            self._indices[name] = index, record.takes_epoch and record.request.mode in STEP_MODES
            if name in self._denied:
                self._hold_to(name)
        elif isinstance(record, TakeOver):
            self._newest_term = index
            self._trace.tell("log", f"record {index}: a controller takes over")

    def log_was_lost(self) -> None:
        """A new lineage begins; what was promised stays promised, by instants and no longer by epochs."""
        self._begun.clear()
        self._indices.clear()
        self._denied.clear()
        self.promise = Promise(0, self.promise.began)
        self._received = {request_id: Promise(0, known.began) for request_id, known in self._received.items()}

    # ------------------------------------------------------------------------------------------------- requests
    def received(self, request: Request) -> None:
        """The first byte of a request has come."""
        scoped = [
            self._promised_spaces.get(request.namespace, 0),
            *(began for stem, began in self._promised_stems.items() if request.tokens.startswith(stem)),
        ]
        self._received[request.request_id] = replace(self.promise, began=max(self.promise.began, *scoped))

    def read(self, rank: Rank, request_id: str, admitted: int, epoch: int) -> None:
        """A step of a request attends to KV of this origin."""
        promise = self._received[request_id]
        self.require(
            admitted >= promise.began and epoch >= promise.epoch,
            f"invariant 1: {request_id} on {rank.incarnation} reads KV of epoch {epoch}, admitted at {admitted}; flush "
            f"{promise.epoch}, begun at {promise.began}, had succeeded before it was received",
        )

    def kv_epoch(self, request_id: str, kv_epoch: int | None) -> None:
        """What an answer says of itself."""
        least = self._received[request_id].epoch
        self.require(kv_epoch is None or kv_epoch >= least, f"invariant 1: {request_id} says kv_epoch {kv_epoch}")

    # ---------------------------------------------------------------------------------------------------- ranks
    def words_read(self, rank: Rank) -> None:
        self._words[rank.incarnation] = self._may_match(rank)
        words, name = rank.node.words(), (rank.node.node_id, rank.words.nonce)
        if words is not None and rank.words.nonce == rank.node.nonce:
            term, floor = self._pages.get(name, (0, 0))
            rises = words.term >= term and words.floor >= floor
            self.require(
                rises, f"invariant 4: the page of {name} has gone back to term {words.term}, floor {words.floor}"
            )
            self._pages[name] = words.term, words.floor

    def matched(self, rank: Rank, epoch: int) -> None:
        """An admission has found something in the cache."""
        may_match, least = self._words[rank.incarnation]
        self.require(may_match, f"invariant 5: {rank.incarnation} matches with its lease over")
        self.require(epoch >= least, f"invariant 5: {rank.incarnation} matches epoch {epoch} below its floor {least}")
        self._trace.count("matches")

    def swapped(self, rank: Rank, epoch: int) -> None:
        self._trace.tell(rank.incarnation, f"swaps to {epoch}")
        self.require(
            (rank.incarnation, epoch) not in self._barred,
            f"G4: {rank.incarnation} swaps to epoch {epoch} of a flush which it did not carry out",
        )

    def wrote(self, rank: Rank, pages: set[int]) -> None:
        """A step writes these device pages."""
        assert rank.copier is not None, "only ranks with a host tier tell"
        shared = pages & rank.copier.pages_read()
        self.require(not shared, f"invariant 10: {rank.incarnation} writes {shared}, which a copy still reads")

    def offered(self, rank: Rank, command: FlushCommand) -> None:
        self._term_at_offer.setdefault((rank.incarnation, *command.key), rank.term)
        rank.term = max(rank.term, command.term)

    def ended(self, rank: Rank, pending: PendingFlush, verdict: FlushVerdict) -> None:
        """A rank has given its verdict about a flush that it took in."""
        command, name = pending.command, rank.incarnation
        self.require((name, *command.key) not in self._ended, f"invariant 7: {name} ends {command.flush_id} twice")
        self._ended.add((name, *command.key))
        self._trace.tell(name, f"{command.mode} {command.flush_id}: {verdict.status} {verdict.message}")
        self._trace.count(f"rank {verdict.status}")
        late_s = rank.engine.now_s() - pending.deadline_s - _DRIFT * command.budget_s - 1e-3
        was_stopped = rank.process.was_stopped_since(self._loop.time() - max(0.0, late_s) - 0.01)
        self.require(
            late_s <= 0 or was_stopped, f"invariant 19: {name} held {command.flush_id} {late_s:.3f} s too long"
        )
        if verdict.status == "flushed" and not command.dry_run:
            self._executes(rank, command)

    def _executes(self, rank: Rank, command: FlushCommand) -> None:
        name, key = rank.incarnation, (rank.incarnation, *command.key)
        self._executed[key] += 1
        self.require(self._executed[key] == 1, f"G7: {name} executes flush {command.flush_id} twice")
        self.require(key not in self._untouched, f"G4: {name} executes {command.flush_id}, said to have left it alone")
        is_valid = rank.node.time.now_s() <= command.valid_until_s + _ROUNDING_S
        self.require(is_valid, f"invariant 8: {name} executes {command.flush_id} after its end")
        term = self._term_at_offer[key]
        self.require(command.term >= term, f"invariant 4: {name} obeys term {command.term} after {term}")
        if command.epoch and rank.is_serving:
            self.require(rank.cache.epoch >= command.epoch, f"{name} says flushed and stands at {rank.cache.epoch}")

    def aborts(self, rank: Rank, command: AbortCommand) -> None:
        """A rank ends requests because a controller says so."""
        name = rank.incarnation
        self.require(command.term >= rank.term, f"invariant 4: {name} obeys term {command.term} after {rank.term}")
        is_valid = rank.node.time.now_s() <= command.valid_until_s
        self.require(is_valid, f"invariant 8: {name} aborts after the end of the command")
        rank.term = max(rank.term, command.term)
        self._trace.count("aborts")

    def took_turn(self, rank: Rank) -> None:
        """After each turn and step of an engine."""
        pending = [flush for flush in rank.engine._gate._live.values() if flush.claim.state == "pending"]
        self.require(len(pending) <= 1, f"{rank.incarnation} has {len(pending)} pending flushes")
        counts = rank.cache.counts()
        total = counts.free + counts.cached + counts.pinned + counts.private + counts.fenced + counts.copying
        self.require(total == rank.cache.num_pages, f"invariant 10: {rank.incarnation} has {total} pages")

    # -------------------------------------------------------------------------------------------------- answers
    def answered(
        self, controller: Controller, arguments: Mapping[str, Any], begun_s: float, answer: dict[str, Any]
    ) -> None:
        """An answer leaves a controller."""
        rows = {row["incarnation"]: row["status"] for row in answer["ranks"]}
        what = f"{arguments} -> {answer['status']}, epoch {answer['epoch']}: {rows} {answer['message']}"
        self._trace.tell(controller.name, what)
        self._trace.count(f"{answer['mode']} {answer['status']}")
        self._check_punctuality(controller, arguments, begun_s)
        if answer["status"] == "in_progress":
            return
        if answer["replayed"]:
            # a promise like the first one
            if answer["success"] and not answer["dry_run"]:
                self._check_success(answer, rows, arguments.get("scope"))
            return
        is_superseded = controller.plane._log.state.term != self._newest_term
        for incarnation, status in rows.items():
            # A superseded controller's count is nobody's any more; where nothing succeeded nothing keeps a lease away.
            if not (status == "expired" and (is_superseded or not answer["success"])):
                self._check_verdict(incarnation, status, answer)
        if not (answer["epoch"] or answer["sub_epoch"] or answer["dry_run"]):
            self._deny(answer, rows)
        is_late_floor = answer["mode"] not in STEP_MODES and not answer["success"]
        self.require(
            not (is_late_floor and answer["floor_raised"]), f"G4: {answer['mode']} failed and raised the floor"
        )
        if answer["success"] and not answer["dry_run"]:
            self._check_success(answer, rows, arguments.get("scope"))

    def _deny(self, answer: dict[str, Any], rows: Mapping[str, str]) -> None:
        """An answer that names no epoch says of these ranks that the flush will not touch them."""
        name = (answer["flush_id"], answer["started_at"])
        untouched = {incarnation for incarnation, status in rows.items() if status in _UNTOUCHED}
        if untouched and not answer["floor_raised"]:
            self._trace.count("untouched without an epoch")
            self._denied[name] = untouched
            if name in self._indices:
                self._hold_to(name)

    def _hold_to(self, name: tuple[str, str]) -> None:
        """The intent of such a flush is in the log."""
        flush_id, (index, raises_floor) = name[0], self._indices[name]
        self.require(not raises_floor, f"G4: the floor rises to {index} by {flush_id}, said to touch nobody")
        for incarnation in self._denied[name]:
            key = (incarnation, flush_id, index)
            self.require(not self._executed[key], f"G4: {incarnation} is called untouched and has flushed {flush_id}")
            self._untouched.add(key)

    def _check_punctuality(self, controller: Controller, arguments: Mapping[str, Any], begun_s: float) -> None:
        settings = self._settings
        budget_s = float(arguments.get("timeout_s") or 0.0)
        if arguments.get("mode") in STEP_MODES:
            budget_s = max(budget_s, settings.step_grace_s)
        took_s = self._loop.time() - begun_s
        is_in_time = took_s <= budget_s + settings.answer_slack_s + _ROUNDING_S
        self.require(
            is_in_time or controller.process.was_stopped_since(begun_s),
            f"invariant 19: the answer to {arguments} took {took_s:.3f} s of {budget_s} s",
        )

    def _check_verdict(self, incarnation: str, status: str, answer: dict[str, Any]) -> None:
        """A row of an answer against the truth at the moment it leaves."""
        self._trace.count(f"row {status}")
        rank = next(rank for rank in self._ranks() if rank.incarnation == incarnation)
        epoch, index = answer["epoch"], answer["epoch"] or answer["sub_epoch"]
        if status == "gone":
            self.require(rank.process.is_dead, f"{incarnation} is called gone and lives")
        elif status in ("expired", "fenced") and rank.is_serving:
            # with its next lease an expired one was told the floor
            self.require(self._is_covered(rank, epoch), f"{incarnation} is called {status} and may match below {epoch}")
        elif status == "flushed" and rank.is_serving and epoch:
            # one that was told before it served swaps before its first match
            least = max(rank.cache.epoch, rank.words._least_epoch)
            self.require(least >= epoch, f"{incarnation} is called flushed and stands below {epoch}")
        elif status in _UNTOUCHED and index:
            key = (incarnation, answer["flush_id"], index)
            self.require(not self._executed[key], f"G4: {incarnation} is called {status} and has flushed")
            self._untouched.add(key)
            if epoch and not answer["floor_raised"]:
                self._barred.add((incarnation, epoch))

    def _check_success(self, answer: dict[str, Any], rows: Mapping[str, str], scope: Mapping[str, Any] | None) -> None:
        """Nobody who serves may match anything older from this instant on."""
        self.require(any(status in ("flushed", "fenced", "joined") for status in rows.values()), "no rank lives")
        if answer["untouched_tiers"]:
            return self._check_part(answer, rows)
        epoch = answer["epoch"]
        known = self._begun.get(epoch or answer["sub_epoch"])
        if known is None or known[1] != answer["flush_id"]:
            self.require(False, f"invariant 4: the epoch of {answer['flush_id']} was never stored as its own: {answer}")
            return
        if not epoch:
            return self._promise_scope(known[0], scope)
        for rank in self._ranks():
            if rank.is_serving:
                is_covered = self._is_covered(rank, epoch)
                self.require(is_covered, f"invariant 9: {rank.incarnation} could still match below epoch {epoch}")
        if epoch > self.promise.epoch:
            self.promise = Promise(epoch, known[0])
            self.on_promise()
        self._trace.count("promises")

    def _check_part(self, answer: dict[str, Any], rows: Mapping[str, str]) -> None:
        """It has no epoch: who did not answer itself must be gone, or match nothing before it has a lease again."""
        self._trace.count(f"{' '.join(answer['tiers'])} flushed")
        for rank in self._ranks():
            status = rows.get(rank.incarnation)
            if rank.is_serving and status is not None and not answer["replayed"]:
                is_out = status == "expired" and not self._may_match(rank)[0]
                self.require(
                    is_out or status in ("flushed", "joined"),
                    f"section 6: {answer['flush_id']} of {answer['tiers']} succeeded, {rank.incarnation} is {status}",
                )

    def _promise_scope(self, began: int, scope: Mapping[str, Any] | None) -> None:
        """From now on nothing older in this scope; an age says nothing of what was computed a moment before."""
        assert scope is not None, "a flush without an epoch has a scope"
        if "namespace" in scope:
            self._promised_spaces[scope["namespace"]] = began
        elif "prefix_tokens" in scope:
            self._promised_stems[tokens_of(scope["prefix_tokens"])] = began
        self._trace.count("scoped promises")

    # ------------------------------------------------------------------------------------------------- the truth
    def _may_match(self, rank: Rank) -> tuple[bool, int]:
        """What the page that this rank reads says now: is there a lease; the least epoch."""
        source = rank.words._source
        if source is None:
            return False, 0
        words = source.page.read()
        return not words.is_lease_over(rank.node.time.now_ns()), max(words.floor, rank.words._least_epoch)

    def _is_covered(self, rank: Rank, epoch: int) -> bool:
        """Whatever this rank admits from now on, it matches nothing below `epoch`."""
        may_match, least = self._may_match(rank)
        return not may_match or max(least, rank.cache.epoch) >= epoch
