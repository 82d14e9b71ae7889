"""One rank: engine, gate, words and flush commands of production, in a process that can be stopped anywhere.

What `actors.scheduler.SchedulerActor` and `deployments.rank.Rank` do around them (threads, sockets, Serve) is told
again here in few lines: register, join, look after the page, follow a controller that was restarted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Protocol

from actors.messages import AbortCommand, Registered
from actors.rank_flushes import RankFlushes
from actors.rank_words import RankWords
from actors.ray_errors import Answered, CallFailed, outcome_of, outcome_within
from cache.write_policy import WritePolicy
from configs.errors import ConfigError
from engine.control_words import ControlWords
from engine.events import AbortRequested, RequestArrived, TierAttached
from engine.flush import FlushCommand, FlushVerdict
from engine.flush_gate import PendingFlush
from engine.limits import SchedulerLimits
from engine.request import Output, Request
from engine.scheduler import Scheduler
from tests.fakes import EOS, VOCAB_SIZE
from tests.simulation.host import SlowCopier, host_settings
from tests.simulation.network import Handle, Network
from tests.simulation.node import Node
from tests.simulation.rank_parts import ThreadlessEngine, WitnessCache, WitnessRunner
from tests.unit.actors.fakes import rank_record

PAGE_SIZE = 2
NUM_PAGES = 24
LIMITS = SchedulerLimits(4, 8, 40, (EOS,), 1000, VOCAB_SIZE)
MAX_TOTAL = LIMITS.max_total_tokens(NUM_PAGES * PAGE_SIZE)
_RETRY_S = 0.5
_HEALTH_PERIOD_S = 2.0
_REPORT_PERIOD_S = 1.0


class RankWitness(Protocol):
    """Who is told what a rank does; the oracle."""

    def now(self) -> int: ...
    def words_read(self, rank: Rank) -> None: ...
    def matched(self, rank: Rank, epoch: int) -> None: ...
    def swapped(self, rank: Rank, epoch: int) -> None: ...
    def read(self, rank: Rank, request_id: str, admitted: int, epoch: int) -> None: ...
    def offered(self, rank: Rank, command: FlushCommand) -> None: ...
    def wrote(self, rank: Rank, pages: set[int]) -> None: ...
    def ended(self, rank: Rank, pending: PendingFlush, verdict: FlushVerdict) -> None: ...
    def aborts(self, rank: Rank, command: AbortCommand) -> None: ...
    def took_turn(self, rank: Rank) -> None: ...
    def failed(self, who: str, error: BaseException) -> None: ...


@dataclass(frozen=True, slots=True)
class RankTools:
    """What every rank of a world uses."""

    network: Network
    chance: Random
    witness: RankWitness
    #: whom the name of the controller stands for on a node now
    find_controller: Callable[[str], Handle | None]
    #: of turns in which the engine thread loses the processor
    share_preempted: float
    #: None: the ranks have no host tier
    host_policy: WritePolicy | None


class Rank:
    """One incarnation, from the start of its process to its end."""

    def __init__(self, tools: RankTools, node: Node, number: int, incarnation: str) -> None:
        self.node = node
        self.incarnation = incarnation
        self._tools = tools
        self.process, pid = node.begin_process(incarnation)
        self.handle = Handle(tools.network, self.process, self)
        self.words = RankWords(node.time.now_ns)
        witness = tools.witness
        self.cache = WitnessCache(NUM_PAGES, PAGE_SIZE, witness.now)
        self.cache.on_match = lambda hold: witness.matched(self, int(hold.epoch))
        self.cache.on_swap = lambda epoch: witness.swapped(self, epoch)
        policy = tools.host_policy
        self.copier = None if policy is None else SlowCopier(node.tier, self.process, tools.chance)
        self.scheduler = Scheduler(self.cache, LIMITS, None if policy is None else host_settings(policy))
        self.runner = WitnessRunner(self.cache, lambda: self.scheduler.rows)
        if self.copier is not None:
            self.copier.runner = self.runner
            self.runner.during_run = lambda batch: witness.wrote(self, self.runner.pages_written(batch))
        self.runner.on_read = lambda sequence, admitted, epoch: witness.read(self, sequence.request_id, admitted, epoch)
        self.on_outputs: Callable[[Rank, list[Output]], None] = lambda rank, outputs: None
        self.engine = ThreadlessEngine(
            self.process, tools.chance, tools.share_preempted, self.scheduler, self.runner,
            clock=node.time.now_s, read_words=self._read_words,
            on_outputs=lambda outputs: self.on_outputs(self, outputs),
            on_flush=lambda pending, verdict: witness.ended(self, pending, verdict),
            copier=self.copier,
        )  # fmt: skip
        self.engine.after_turn = lambda: witness.took_turn(self)
        self.engine.on_death = lambda error: witness.failed(self.incarnation, error)
        self.flushes = RankFlushes(self.engine, node.time.now_s, self.words.raise_epoch, lambda command, verdict: None)
        self.record = rank_record(
            number, incarnation, node_id=node.node_id, pid=pid, start_time=pid, actor_name=incarnation,
            page_size=PAGE_SIZE, num_pages=NUM_PAGES,
        )  # fmt: skip
        self.registered: Registered | None = None
        #: highest term of any message to its scheduler
        self.term = 0
        self.process.spawn(self._live())

    @property
    def is_serving(self) -> bool:
        return self.registered is not None and not self.process.is_dead

    # ---------------------------------------------------------------------------------------- what SchedulerActor does
    async def hello(self) -> dict[str, Any]:
        return {"incarnation": self.incarnation, "page_nonce": self.words.nonce}

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def flush(self, command: FlushCommand) -> FlushVerdict:
        self._tools.witness.offered(self, command)
        return await self.flushes.flush(command)

    async def close_flush(self, flush_id: str, index: int, term: int) -> FlushVerdict:
        self.term = max(self.term, term)
        return await self.flushes.close((flush_id, index), term)

    async def abort(self, command: AbortCommand) -> dict[str, Any]:
        if self.flushes.is_late(command.valid_until_s) or not self.engine.see_term(command.term):
            return {"num_aborted": 0}
        self._tools.witness.aborts(self, command)
        self.engine.post(AbortRequested(command.request_ids, command.reason))
        return {"num_aborted": 1}

    async def status(self) -> dict[str, Any]:
        return {"epoch": self.engine.snapshot().epoch}

    def submit(self, request: Request) -> None:
        """A request has come over the data plane."""
        self.engine.post(RequestArrived(request))

    # --------------------------------------------------------------------------------- what the rank's replica does
    async def _live(self) -> None:
        registered = await self._register()
        if registered is None:
            self.process.kill()
            return
        try:
            self._join(registered)
        except ConfigError:
            self.process.kill()
            return
        self.process.loop.call_later(_REPORT_PERIOD_S, self._look, context=self.process.context())
        while True:
            await asyncio.sleep(_HEALTH_PERIOD_S)
            await self._follow_controller()

    async def _register(self) -> Registered | None:
        """None: the controller refuses this rank, and so it ends."""
        while True:
            controller = self._tools.find_controller(self.node.node_id)
            if controller is not None:
                match await outcome_of(controller.register.remote(self.record, self.handle)):
                    case Answered(registered):
                        return registered
                    case CallFailed("error", _):
                        return None
            await asyncio.sleep(_RETRY_S)

    def _join(self, registered: Registered) -> None:
        self._attach(registered)
        self.words.raise_epoch(max(registered.epoch, registered.floor))
        self.registered = registered
        self.term = max(self.term, registered.term)
        self.engine.see_term(registered.term)
        self.flushes.serve(registered.lineage)
        if self.copier is not None:
            sub_epochs = tuple((known.scope, known.index) for known in registered.sub_epochs)
            sub_epochs += self.flushes.early_sub_epochs
            self.engine.post(TierAttached(self.copier.tier, registered.lineage, sub_epochs))
        self.engine.start()

    def _attach(self, registered: Registered) -> None:
        """Map the node's file, if it is of this rank's lineage."""
        file = self.node.file
        if file is not None and file.belongs_to(registered.lineage):
            self.words.attach(file)

    def _look(self) -> None:
        """Once in a while; see actors.rank_words.NodePage.look."""
        assert self.registered is not None
        if not self.words.has_lease:
            self._attach(self.registered)
        self.process.loop.call_later(_REPORT_PERIOD_S, self._look, context=self.process.context())

    async def _follow_controller(self) -> None:
        """See deployments.rank.Rank.check_health."""
        controller = self._tools.find_controller(self.node.node_id)
        if controller is None or self.registered is None:
            return
        hello = await outcome_within(controller.hello.remote(), _HEALTH_PERIOD_S)
        if not isinstance(hello, Answered):
            return
        if self._is_foreign(hello.value["lineage"]):
            self.process.kill()
            return
        if hello.value["term"] != self.registered.term:
            record = replace(
                self.record, lineage=self.registered.lineage, epoch=self.cache.epoch, page_nonce=self.words.nonce
            )
            again = await outcome_within(controller.register.remote(record, self.handle), _HEALTH_PERIOD_S)
            if isinstance(again, Answered):
                self.registered = again.value  # the replica's knowledge; its scheduler hears of the term by commands

    def _is_foreign(self, lineage: str) -> bool:
        """Epochs of another lineage mean nothing here: only an empty rank may join it."""
        return self.registered is not None and lineage != self.registered.lineage

    def _read_words(self) -> ControlWords:
        if self.copier is not None:
            self.copier.scribble()
        self.engine.lose_processor()
        words = self.words.read()
        self._tools.witness.words_read(self)
        self.engine.lose_processor()
        return words
