"""Two eyes on each incarnation: a call that never returns, and the kernel of its node.

The call's failure means that Ray lost the actor (11 ms after SIGKILL); only the kernel's word means that its process is
gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors.end_proofs import EndProof, pause
from actors.messages import RankRecord
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

    def __init__(self, record: RankRecord, handle: Any, proof: EndProof, events: WatchEvents) -> None:
        """handle: its actor, None if Ray knows none."""
        self.record = record
        self.handle = handle
        self._proof = proof
        self._events = events
        #: set once it has given its first sign of life, or failed to
        self.asked = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, is_answering: bool) -> None:
        """Begin. is_answering: it has just registered; otherwise it is asked for a sign of life first."""
        if is_answering or self.handle is None:
            self.asked.set()
        name = f"watch-{self.record.incarnation}"
        self._tasks = [
            asyncio.create_task(self._follow(is_answering), name=name),
            asyncio.create_task(self._until_gone(), name=name),
        ]

    def stop(self) -> None:
        """Stop following; no event comes after this."""
        self.asked.set()
        for task in self._tasks:
            task.cancel()
        self._proof.close()

    async def _until_gone(self) -> None:
        await self._proof.until_gone()
        self._tasks.pop()  # itself, which must not be cancelled before the event is told
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
            await pause(_RETRY_S)

    async def _says_hello(self) -> bool:
        hello = await outcome_within(self.handle.hello.remote(), _HELLO_TIMEOUT_S)
        self.asked.set()
        return isinstance(hello, Answered) and hello.value["incarnation"] == self.record.incarnation
