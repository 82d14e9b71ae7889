"""Requests with a new grammar wait outside the engine; nothing overtakes, nothing is lost."""

from __future__ import annotations

import asyncio
from threading import Event

from actors.grammar_queue import GrammarQueue
from engine.events import AbortRequested, RequestArrived
from engine.request import Grammar, Request, SamplingParams
from tests.fakes import tokens_of

DIGITS = Grammar("regex", "[0-9]")


class SlowCompiler:
    """Compiles when it is let."""

    def __init__(self) -> None:
        self.may_go = Event()
        self.compiled: list[Grammar] = []

    def knows(self, grammar: Grammar) -> bool:
        return grammar in self.compiled

    def compile(self, grammar: Grammar) -> None:
        assert self.may_go.wait(10)
        self.compiled.append(grammar)


def request(name: str, grammar: Grammar | None = DIGITS) -> Request:
    return Request(name, tokens_of([1]), SamplingParams(grammar=grammar))


async def drained(queue: GrammarQueue) -> None:
    async with asyncio.timeout(10):
        await asyncio.gather(*queue._held.values())
    assert queue.num_held == 0


def test_only_new_grammars_wait_and_each_is_compiled_once() -> None:
    async def scenario() -> None:
        compiler, posted = SlowCompiler(), list[RequestArrived | AbortRequested]()
        queue = GrammarQueue(compiler, posted.append)
        first, second, plain = request("first"), request("second"), request("plain", None)
        for one in (first, second, plain):
            queue.submit(one)
        await asyncio.sleep(0)
        assert posted == [RequestArrived(plain)]
        assert queue.num_held == 2
        compiler.may_go.set()
        await drained(queue)
        queue.submit(request("third"))
        assert posted[1:] == [RequestArrived(first), RequestArrived(second), RequestArrived(request("third"))]
        assert compiler.compiled == [DIGITS]

    asyncio.run(scenario())


def test_an_abort_reaches_a_request_that_waits_and_saves_the_work() -> None:
    async def scenario() -> None:
        for ids in (None, ("gone",)):
            compiler, posted = SlowCompiler(), list[RequestArrived | AbortRequested]()
            queue = GrammarQueue(compiler, posted.append)
            gone = request("gone")
            queue.submit(gone)
            abort = AbortRequested(ids, "enough")
            queue.abort(abort)
            queue.abort(AbortRequested(("other",), "not meant"))
            await drained(queue)
            assert posted == [abort, AbortRequested(("other",), "not meant"), RequestArrived(gone),
                              AbortRequested(("gone",), "enough")]  # fmt: skip
            assert compiler.compiled == []

    asyncio.run(scenario())


def test_what_is_held_at_the_end_is_dropped() -> None:
    async def scenario() -> None:
        compiler, posted = SlowCompiler(), list[RequestArrived | AbortRequested]()
        queue = GrammarQueue(compiler, posted.append)
        queue.submit(request("late"))
        queue.close()
        compiler.may_go.set()
        await asyncio.sleep(0)
        assert (posted, queue.num_held) == ([], 0)

    asyncio.run(scenario())
