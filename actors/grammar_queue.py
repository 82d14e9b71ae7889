"""Requests wait here for their grammar: compiling one may take a second, which no step of the engine may wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from engine.events import AbortRequested, RequestArrived
from engine.request import Grammar, Request

Post: TypeAlias = "Callable[[RequestArrived | AbortRequested], None]"


class Compiler(Protocol):
    """What the queue needs of `engine.grammar.GrammarBook`; called from threads."""

    def knows(self, grammar: Grammar) -> bool: ...

    def compile(self, grammar: Grammar) -> object: ...


@dataclass(slots=True, eq=False)
class _Held:
    """One request whose grammar is being compiled."""

    request: Request
    #: it is to be aborted as soon as the engine has it, for this reason
    abort_reason: str | None = None


class GrammarQueue:
    """Hands requests and aborts to the engine in an order that loses none. Lives on one loop.

    A request without a grammar, or with one that is known, passes at once.
    """

    def __init__(self, compiler: Compiler | None, post: Post) -> None:
        """compiler: None lets everything pass; the engine compiles then, or says that it cannot."""
        self._compiler = compiler
        self._post = post
        self._held: dict[_Held, asyncio.Task[None]] = {}
        #: one at a time: the cores belong to the model
        self._turn = asyncio.Semaphore(1)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def submit(self, request: Request) -> None:
        """Post the request, now or when its grammar is compiled (also if it cannot be: the engine says why)."""
        grammar = request.sampling.grammar
        compiler = self._compiler
        if grammar is None or compiler is None or compiler.knows(grammar):
            self._post(RequestArrived(request))
            return
        held = _Held(request)
        self._held[held] = asyncio.create_task(self._compile(held, grammar, compiler), name="grammar")

    def abort(self, event: AbortRequested) -> None:
        """Post the abort; requests that are held here end as soon as the engine has them."""
        for held in self._held:
            if event.request_ids is None or held.request.request_id in event.request_ids:
                held.abort_reason = event.reason
        self._post(event)

    def close(self) -> None:
        """Drop what is held."""
        for task in self._held.values():
            task.cancel()
        self._held.clear()

    async def _compile(self, held: _Held, grammar: Grammar, compiler: Compiler) -> None:
        async with self._turn:
            if held.abort_reason is None and not compiler.knows(grammar):
                await asyncio.to_thread(compiler.compile, grammar)
        del self._held[held]
        self._post(RequestArrived(held.request))
        if held.abort_reason is not None:
            self._post(AbortRequested((held.request.request_id,), held.abort_reason))
