"""One eye on each incarnation: a call that never returns, and a pidfd where the rank runs on the controller's node.

The call's failure means that Ray lost the actor (11 ms after SIGKILL); only the pidfd means that its process is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors.messages import RankRecord
from actors.process_proof import ProcessProof
from actors.ray_errors import Answered, CallFailed, outcome_of, outcome_within

# A rank that Ray cannot reach is asked again this often; the answer costs one call.
_RETRY_S = 0.5
_HELLO_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class WatchEvents:
    """Told about an incarnation, always on the loop that started the watch."""

    lost: Callable[[str], None]
    found: Callable[[str], None]
    gone: Callable[[str], None]


class RankWatch:
    """Follows one incarnation until its process is proven gone or `stop` is called."""

    def __init__(self, record: RankRecord, handle: Any, proof: ProcessProof | None, events: WatchEvents) -> None:
        """handle: its actor, None if Ray knows none. proof: None for a rank of another node."""
        self.record = record
        self.handle = handle
        self._proof = proof
        self._events = events
        self._stopped = asyncio.Event()
        #: set once it has given its first sign of life, or failed to
        self.asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def can_prove(self) -> bool:
        """The end of its process would be noticed for certain."""
        return self._proof is not None

    def start(self, is_answering: bool) -> None:
        """Begin. is_answering: it has just registered; otherwise it is asked for a sign of life first."""
        if is_answering or self.handle is None:
            self.asked.set()
        pidfd = self._proof.fileno() if self._proof is not None else None
        if pidfd is not None:
            asyncio.get_running_loop().add_reader(pidfd, self._end)
        self._task = asyncio.create_task(self._follow(is_answering), name=f"watch-{self.record.incarnation}")

    def stop(self) -> None:
        """Stop following; no event comes after this."""
        self._stopped.set()
        self.asked.set()
        if self._task is not None:
            self._task.cancel()
        if self._proof is not None:
            pidfd = self._proof.fileno()
            if pidfd is not None:
                asyncio.get_running_loop().remove_reader(pidfd)
            self._proof.close()
            self._proof = None

    def _end(self) -> None:
        self.stop()
        self._events.gone(self.record.incarnation)

    async def _follow(self, is_answering: bool) -> None:
        can_return = self.handle is not None
        while can_return:
            if is_answering or await self._says_hello():
                self._events.found(self.record.incarnation)
                outcome = await outcome_of(self.handle.watch.remote())
                self._events.lost(self.record.incarnation)
                can_return = not (isinstance(outcome, CallFailed) and outcome.kind == "died")
            is_answering = False
            if self._is_proven_gone():
                return self._end()
            await self._pause()
        await self._until_gone()

    async def _says_hello(self) -> bool:
        hello = await outcome_within(self.handle.hello.remote(), _HELLO_TIMEOUT_S)
        self.asked.set()
        return isinstance(hello, Answered) and hello.value["incarnation"] == self.record.incarnation

    async def _until_gone(self) -> None:
        """Ray will not reach it again. A pidfd tells the end by itself; without one /proc is asked now and then."""
        while self._proof is not None and self._proof.fileno() is None:
            if self._proof.is_gone():
                return self._end()
            await self._pause()

    def _is_proven_gone(self) -> bool:
        return self._proof is not None and self._proof.is_gone()

    async def _pause(self) -> None:
        waiting = asyncio.ensure_future(self._stopped.wait())
        await asyncio.wait({waiting}, timeout=_RETRY_S)
        waiting.cancel()
