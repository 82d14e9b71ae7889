"""Who asks a cluster for answers, and who asks it to flush."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from actors.ray_errors import Answered, outcome_within
from engine.events import AbortRequested
from engine.request import Output, Request, SamplingParams
from tests.fakes import foretell, tokens_of
from tests.simulation.network import Handle, Network
from tests.simulation.oracle import Oracle
from tests.simulation.rank import MAX_TOTAL, Rank
from tests.simulation.trace import Trace
from tests.simulation.virtual_loop import Process

#: prompts begin like one of these, so that prefixes are shared
STEMS = ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 40, 41], [20, 21, 22, 23, 24])
NAMESPACES = ("", "", "tenant")
#: after a success every rank is asked for what it is likely to have cached, within this time
_PROBE_WITHIN_S = 0.03


@dataclass
class Asked:
    """One request and all that its client has seen of it."""

    request: Request
    rank: Rank
    token_ids: list[int] = field(default_factory=list)
    #: how it ended; exactly one in the end
    ends: list[str] = field(default_factory=list)


class Clients:
    """Send requests to ranks and watch every answer; a rank that dies costs those that have had a token of it."""

    def __init__(self, network: Network, chance: Random, oracle: Oracle, trace: Trace) -> None:
        self._network = network
        self._chance = chance
        self._oracle = oracle
        self._trace = trace
        self.ranks: list[Rank] = []
        self.asked: dict[str, Asked] = {}
        #: requests may end with `abort` or `error` in this world
        self.may_abort = False
        self.may_fail = False

    def meet(self, rank: Rank) -> None:
        """A rank has been started."""
        self.ranks.append(rank)
        rank.on_outputs = self._take_outputs
        rank.process.on_end.append(lambda: self._later(self._network.delay_s(), lambda: self._rank_lost(rank)))

    def ask(self) -> None:
        """A request to some rank that takes requests, if there is one."""
        serving = [rank for rank in self.ranks if rank.is_serving]
        if serving:
            self._ask(self._chance.choice(serving), self._chance.choice(STEMS))

    def probe(self) -> None:
        """Ask every rank for what it is likely to have cached, now and a little later."""
        for rank in self.ranks:
            if rank.is_serving:
                delay_s = self._chance.uniform(0, _PROBE_WITHIN_S)
                self._ask(rank, STEMS[0])
                self._later(delay_s, lambda rank=rank: self._ask(rank, self._chance.choice(STEMS)))

    def open_requests(self) -> list[Asked]:
        return [asked for asked in self.asked.values() if not asked.ends]

    def _ask(self, rank: Rank, stem: list[int]) -> None:
        chance = self._chance
        request_id = f"r{len(self.asked)}"
        cut, tail = chance.randint(2, len(stem)), [chance.randint(50, 60) for _ in range(chance.randint(0, 5))]
        sampling = SamplingParams(temperature=0.0, max_new_tokens=chance.choice((1, 2, 6)), ignore_eos=True)
        request = Request(request_id, tokens_of([*stem[:cut], *tail]), sampling, chance.choice(NAMESPACES))
        self._oracle.received(request)
        self.asked[request_id] = Asked(request, rank)
        self._send(request, rank)
        if self.may_abort and chance.random() < 0.05:
            abort = AbortRequested((request_id,))
            self._network.loop.call_later(
                chance.uniform(0, 0.05), lambda: rank.engine.post(abort), context=rank.process.context()
            )

    def _send(self, request: Request, rank: Rank) -> None:
        def arrive() -> None:
            rank.submit(request)

        if rank.process.is_dead:
            self._later(0.01, lambda: self._rank_lost(rank))
        self._network.loop.call_later(self._network.delay_s(), arrive, context=rank.process.context())

    def _take_outputs(self, rank: Rank, outputs: list[Output]) -> None:
        """Called by the engine thread: they leave through the rank's loop, in order."""
        self._network.loop.call_soon(self._deliver, rank, outputs, context=rank.process.context())

    def _deliver(self, rank: Rank, outputs: list[Output]) -> None:
        for output in outputs:
            asked = self.asked[output.request_id]
            if asked.rank is rank and output.attempt == asked.request.attempt:
                self._take(asked, output)

    def _take(self, asked: Asked, output: Output) -> None:
        require, name = self._oracle.require, output.request_id
        require(not asked.ends, f"{name} goes on after its end")
        asked.token_ids += output.token_ids
        if output.stats is not None:
            self._oracle.kv_epoch(name, output.stats.kv_epoch)
        if output.finish is None:
            return
        asked.ends.append(output.finish)
        self._trace.tell(asked.rank.incarnation, f"{name} ends: {output.finish}")
        self._trace.count(f"ended {output.finish}")
        expected = foretell(asked.request, MAX_TOTAL).token_ids
        if output.finish in ("abort", "error"):
            may = self.may_abort if output.finish == "abort" else self.may_fail
            require(may, f"{name} ended with {output.finish}: {output.message}")
            expected = expected[: len(asked.token_ids)]
        require(asked.token_ids == expected, f"{name} was answered {asked.token_ids}, not {expected}")

    def _rank_lost(self, rank: Rank) -> None:
        """Its connection broke: requests without a token go to another rank, the others are over."""
        serving = [other for other in self.ranks if other.is_serving]
        for asked in self.open_requests():
            if asked.rank is not rank:
                continue
            if asked.token_ids or not serving:
                asked.ends.append("lost")
                continue
            asked.request = replace(asked.request, attempt=asked.request.attempt + 1)
            asked.rank = self._chance.choice(serving)
            self._send(asked.request, asked.rank)

    def _later(self, after_s: float, step: Callable[[], object]) -> None:
        self._network.loop.call_later(after_s, step, context=Context())


class Callers:
    """Jobs that flush: they try again under the same id when the connection breaks, and some think better of it."""

    def __init__(self, process: Process, chance: Random, trace: Trace, find: Callable[[], Handle | None]) -> None:
        """find: the handle of the controller, as the callers' node knows it."""
        self._process = process
        self._chance = chance
        self._trace = trace
        self._find = find
        #: flush id -> every answer that some caller has got
        self.answers: dict[str, list[dict[str, Any]]] = {}

    def flush(self, arguments: dict[str, Any]) -> None:
        """Ask for one flush."""
        chance = self._chance
        self._process.spawn(self._until_answered(arguments))
        if chance.random() < 0.2:  # another door asks the same
            self._process.loop.call_later(
                chance.uniform(0, 1), lambda: self._process.spawn(self._until_answered(arguments)), context=Context()
            )
        if chance.random() < 0.15:
            self._process.spawn(self._cancel(arguments["flush_id"], chance.uniform(0, 0.3)))

    def abort(self) -> None:
        """Ask for the end of all running requests."""
        controller = self._find()
        if controller is not None:
            self._process.spawn(self._abort(controller))

    def flush_last(self) -> None:
        """When all is well again: everything, in a mode that needs no idle instant."""
        self._process.spawn(self._until_answered({"flush_id": "last", "mode": "fence", "timeout_s": 1.0}))

    async def _until_answered(self, arguments: dict[str, Any]) -> None:
        patience_s = float(arguments["timeout_s"]) + 6.0
        for _ in range(4):
            controller = self._find()
            if controller is not None:
                outcome = await outcome_within(controller.flush.remote(arguments), patience_s)
                if isinstance(outcome, Answered):
                    self.answers.setdefault(arguments["flush_id"], []).append(outcome.value)
                    return
            await asyncio.sleep(self._chance.uniform(0.05, 0.8))

    async def _abort(self, controller: Handle) -> None:
        await outcome_within(controller.abort.remote(), 5.0)

    async def _cancel(self, flush_id: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        controller = self._find()
        if controller is not None:
            await outcome_within(controller.cancel_flush.remote(flush_id), 2.0)
