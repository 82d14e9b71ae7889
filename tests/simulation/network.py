"""Calls between processes as Ray makes them: late, out of order, lost on either way, doubled, and failing by rumour.

A call that fails has been carried out or not; `ActorDiedError` may be said of a process that lives (its node is cut
off), and a call to a stopped process simply does not come back. Nothing here is a fault that Ray cannot show.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass
from random import Random
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from tests.simulation.virtual_loop import Process, VirtualLoop, current_process

#: a call comes twice now and then, if its method does not mind who asks
_DOUBLED = frozenset({"flush", "close_flush", "abort", "raise_floor", "renew"})


@dataclass(frozen=True, slots=True)
class Weather:
    """How bad the network is in one run."""

    typical_s: float
    #: shares of messages that take up to `slow_s`, that are lost, that come twice
    share_slow: float
    slow_s: float
    share_lost: float
    share_doubled: float


class Network:
    """All calls of one world."""

    def __init__(self, loop: VirtualLoop, chance: Random, weather: Weather) -> None:
        self.loop = loop
        self.weather = weather
        self._chance = chance
        #: nodes that messages neither reach nor leave
        self.cut_off: set[str] = set()
        self._nodes: dict[Process, str] = {}
        #: calls without an end, by the process that is called
        self._open: dict[Process, dict[asyncio.Future[Any], None]] = {}

    def attach(self, process: Process, node_id: str) -> None:
        """This process lives on that node."""
        self._nodes[process] = node_id
        self._open[process] = {}
        process.on_end.append(lambda: self._fail_open(process, 0.0))

    def hiccup(self, process: Process) -> None:
        """Every call to it under way is reported as failed, whatever becomes of it."""
        self._fail_open(process, 0.5)

    def delay_s(self) -> float:
        weather, chance = self.weather, self._chance
        if chance.random() < weather.share_slow:
            return chance.uniform(0, weather.slow_s)
        return chance.expovariate(1 / weather.typical_s)

    def can_reach(self, source: Process, target: Process) -> bool:
        one, other = self._nodes.get(source), self._nodes.get(target)
        return one == other or not {one, other} & self.cut_off

    def call(self, target: Process, name: str, method: Callable[..., Awaitable[Any]], args: Any) -> asyncio.Future[Any]:
        """What `handle.method.remote(...)` gives."""
        source = current_process()
        assert source is not None, "only processes call each other"
        result = self.loop.create_future()
        if target.is_dead:
            self._fail(result, 0.0)
            return result
        self._open[target][result] = None
        result.add_done_callback(lambda done: self._open[target].pop(done, None))
        number = 2 if name in _DOUBLED and self._chance.random() < self.weather.share_doubled else 1
        for _ in range(number):
            self._send(source, target, method, args, result)
        return result

    def _send(
        self,
        source: Process,
        target: Process,
        method: Callable[..., Awaitable[Any]],
        args: Any,
        result: asyncio.Future[Any],
    ) -> None:
        if self._is_lost(source, target):
            self._fail(result, 0.9)
            return

        def arrive() -> None:
            task = self.loop.create_task(_carry_out(method, args), context=target.context())
            task.add_done_callback(lambda done: self._reply(source, target, done, result), context=target.context())

        self.loop.call_later(self.delay_s(), arrive, context=target.context())

    def _reply(self, source: Process, target: Process, done: asyncio.Task[Any], result: asyncio.Future[Any]) -> None:
        if result.done():
            return
        if self._is_lost(target, source):
            self._fail(result, 0.9)
            return
        value, error = done.result()

        def come_back() -> None:
            if error is None and not result.done():
                result.set_result(value)
            elif error is not None:
                raise_in(result, RayTaskError("method", "", error))

        self.loop.call_later(self.delay_s(), come_back, context=Context())

    def _is_lost(self, source: Process, target: Process) -> bool:
        return not self.can_reach(source, target) or self._chance.random() < self.weather.share_lost

    def _fail_open(self, process: Process, share_unavailable: float) -> None:
        for result in list(self._open[process]):
            self._fail(result, share_unavailable)

    def _fail(self, result: asyncio.Future[Any], share_unavailable: float) -> None:
        """After a while Ray says that it cannot reach the actor, or that it has died."""
        is_unavailable = self._chance.random() < share_unavailable
        error: Exception = ActorUnavailableError("out of reach", None) if is_unavailable else ActorDiedError()
        after_s = self._chance.choice((0.005, 0.05, 0.5, 2.0))
        self.loop.call_later(after_s, raise_in, result, error, context=Context())


class Handle:
    """An actor's handle: `handle.method.remote(...)` calls `actor.method` in the actor's process."""

    def __init__(self, network: Network, process: Process, actor: Any) -> None:
        self._network = network
        self._process = process
        #: None until it is made: an actor may hold its own handle
        self.actor = actor

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name)

    def call(self, name: str, args: Any) -> asyncio.Future[Any]:
        return self._network.call(self._process, name, getattr(self.actor, name), args)


@dataclass(frozen=True, slots=True)
class _Method:
    handle: Handle
    name: str

    def remote(self, *args: Any) -> asyncio.Future[Any]:
        return self.handle.call(self.name, args)


def raise_in(result: asyncio.Future[Any], error: Exception) -> None:
    """Fail a future, if it is still open."""
    if not result.done():
        result.set_exception(error)
        result.exception()  # whoever waited for it may have died


async def _carry_out(method: Callable[..., Awaitable[Any]], args: Any) -> tuple[Any, Exception | None]:
    """What a method answers, or raises: nobody may be left to hear of it."""
    try:
        return await method(*args), None
    except Exception as error:
        return None, error
