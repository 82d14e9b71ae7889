"""A rank's way to its node's host tier: claims the arena, maps it for the engine, carries the copier's calls.

The copier thread never waits: its calls are queued here, sent one after the other, and answered through the
`TierAnswers` it connected with. What is not answered in time is answered as lost, and slots given back are told until
somebody hears of it. When the tier's actor is restarted the link claims again, also if it has nothing to say: the same
file goes on being used, another one is attached in its place. Reading needs no actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from actors.audit_log import InThread
from actors.end_proofs import pause
from actors.host_messages import HostCaller, HostClaim, HostPending, HostPlace, HostRefused
from actors.ray_errors import Answered, outcome_within
from cache.arena import Arena
from cache.control_page import ControlPage, FileIdentity
from cache.host_tier import CommitOutcome
from cache.page_checksum import PageEntry
from cache.shared_file import FilePaths, attach
from cache.shared_words import Fence
from cache.slot_owners import SlotLease, SlotRef
from configs.errors import ConfigError
from engine.host_calls import SubEpochs, TierAnswers, TierPlace

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 5.0
_CLAIM_TIMEOUT_S = 10.0
#: a call waits this long for a tier that is gone, then it is answered as lost; Ray starts an actor anew in 1 to 3 s
_PATIENCE_S = 5.0
#: who has nothing to say asks so often whether the tier still knows it; a flush waits 1 s for an agent's file
_LOOK_S = 0.5
#: between two claims while the tier cannot be reached, or its memory is being reserved
_RETRY_S = 0.5
#: after a refusal that settings alone can change: a rank of another layout may have left meanwhile
_REFUSED_RETRY_S = 30.0
_LEAVE_TIMEOUT_S = 0.5


class MappedArena(Protocol):
    """The arena's file as a rank has it."""

    @property
    def page(self) -> ControlPage: ...

    def arena(self) -> Arena: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LinkSurroundings:
    """Every way of the link out of its own loop."""

    #: handle of the node's agent; None: there is none now
    find_tier: Callable[[], Awaitable[Any]]
    #: map the file of a place; None: it is not there (any more). Blocks; ConfigError if it cannot be used
    map_file: Callable[[HostPlace, HostClaim], MappedArena | None]
    #: give the engine an arena; it takes it up in one of its next turns
    attach: Callable[[TierPlace], None]
    #: touch the arena's memory before the first copy does; blocks
    warm: Callable[[Arena], None]
    in_thread: InThread


class HostLink:
    """Lives on one asyncio loop."""

    def __init__(
        self,
        claim: HostClaim,
        sub_epochs: Callable[[], SubEpochs],
        around: LinkSurroundings,
    ) -> None:
        """sub_epochs: of scoped flushes that are still to be kept; asked whenever the engine is given a tier."""
        self._claim = claim
        self._sub_epochs = sub_epochs
        self._around = around
        self._tier: Any | None = None
        self._file: MappedArena | None = None
        self._calls: _Calls | None = None
        self._tasks: list[asyncio.Task[None]] = []
        #: why there is no tier; "" while there is one
        self.message = "the node's host tier has not been asked yet"
        #: calls that were answered as lost
        self.num_lost = 0

    async def begin(self) -> None:
        """Claim the tier once, and go on in the background. Raises ConfigError if this rank can never have it."""
        answer = await self._ask()
        if isinstance(answer, HostRefused) and answer.is_final:
            raise ConfigError(answer.message)
        running = asyncio.create_task(self._run(answer), name="host-link")
        running.add_done_callback(self._ended)
        self._tasks.append(running)

    async def leave(self) -> None:
        """Give every slot back, after all that was asked: the copier has ended and writes nothing. Then `close`.

        Waits for at most 0.5 s; slots that are not given back by then come back with the end of this process.
        """
        if self._calls is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                    await self._calls.leave().wait()

    def close(self) -> None:
        """Claim and carry nothing any more, and give the file back."""
        for task in self._tasks:
            task.cancel()
        if self._calls is not None:
            self._calls.end()
        if self._file is not None:
            self._file.close()
            self._file = None

    def facts(self) -> dict[str, Any]:
        """What the link says of itself, as plain data."""
        return {"is_attached": self.message == "", "message": self.message, "num_lost_calls": self.num_lost}

    # ---------------------------------------------------------------------------------------------------------- inside
    async def _run(self, answer: HostPlace | HostPending | HostRefused) -> None:
        loop = asyncio.get_running_loop()
        had_tier_s = loop.time()
        while True:
            pause_s = self._retry_s(answer)
            if isinstance(answer, HostPlace) and await self._take(answer):
                self.message = ""
                assert self._calls is not None
                # its actor may be back already; if it answers claims and nothing else, it is not asked at once
                pause_s = 0.0 if await self._carry(self._calls) else _RETRY_S
                had_tier_s = loop.time()
            elif self._calls is not None and loop.time() - had_tier_s >= _PATIENCE_S:
                self.num_lost += self._calls.lose_all()
            await pause(pause_s)
            answer = await self._ask()

    def _ended(self, running: asyncio.Task[None]) -> None:
        """A fault of ours: the rank goes on without the tier, and says so."""
        if running.cancelled():
            return
        self.message = "the link to the host tier has failed; the rank's log says why"
        log.critical("the link to the host tier ends", exc_info=running.exception())
        if self._calls is not None:
            self._calls.end()

    def _retry_s(self, answer: HostPlace | HostPending | HostRefused) -> float:
        is_final = isinstance(answer, HostRefused) and answer.is_final
        return _REFUSED_RETRY_S if is_final else _RETRY_S

    async def _ask(self) -> HostPlace | HostPending | HostRefused:
        self._tier = self._tier or await self._around.find_tier()
        if self._tier is None:
            return self._refused("the node's agent is not there")
        outcome = await outcome_within(self._tier.claim_host.remote(self._claim), _CLAIM_TIMEOUT_S)
        if not isinstance(outcome, Answered):
            self._tier = None
            return self._refused(f"the node's agent does not answer: {outcome.message}")
        match outcome.value:
            case HostPending(reserved, total):
                self.message = f"memory is being reserved: {reserved >> 20} of {total >> 20} MiB"
            case HostRefused(message):
                return self._refused(message, outcome.value.is_final)
        return outcome.value

    def _refused(self, message: str, is_final: bool = False) -> HostRefused:
        if message != self.message:
            log.warning("no host tier: %s", message)
        self.message = message
        return HostRefused(message, is_final)

    async def _take(self, place: HostPlace) -> bool:
        """Use the file of this place from now on. False: it is not there any more."""
        if self._calls is not None and self._calls.caller.nonce == place.nonce:
            return True
        if self._file is not None:
            # a process marks a file of one name once; the engine goes on with its own mapping until it has the new one
            self._file.close()
            self._file = None
        try:
            file = await self._around.in_thread(self._around.map_file, place, self._claim)
        except ConfigError as error:
            self._refused(error.message)
            return False
        if file is None or file.page.nonce != place.nonce:
            self.message = "the arena was replaced meanwhile"
            if file is not None:
                file.close()
            return False
        self._attach(file, place)
        return True

    def _attach(self, file: MappedArena, place: HostPlace) -> None:
        if self._calls is not None:
            self._calls.end()
        arena = file.arena()
        caller = HostCaller(self._claim.incarnation, place.nonce)
        calls = _Calls(asyncio.get_running_loop(), caller)
        self._file, self._calls = file, calls
        self._around.attach(TierPlace(arena, file.page, calls.connect, self._claim.lineage, self._sub_epochs()))
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(asyncio.create_task(self._warm(arena), name="warm-arena"))
        log.info("host tier attached: %d slots", place.num_slots)

    async def _warm(self, arena: Arena) -> None:
        await self._around.in_thread(self._around.warm, arena)

    async def _carry(self, calls: _Calls) -> bool:
        """Carry calls until the tier has to be claimed again. False: not one was answered."""
        has_answered = False
        while True:
            call = await calls.next()
            assert self._tier is not None
            outcome = await outcome_within(call.send(self._tier), _CALL_TIMEOUT_S)
            if isinstance(outcome, Answered) and outcome.value is not None and outcome.value is not False:
                call.answered(outcome.value)
                has_answered = True
                continue
            # None or False: the actor was restarted, or the file is another one
            if not isinstance(outcome, Answered):
                log.warning("the host tier did not answer: %s", outcome.message)
                self._tier = None
            if not calls.try_again(call):
                call.lost()
                self.num_lost += call.has_answer
            return has_answered


@dataclass(frozen=True, slots=True)
class _Call:
    send: Callable[[Any], Awaitable[Any]]
    answered: Callable[[Any], None]
    lost: Callable[[], None]
    #: carried out twice it does the same as once
    may_repeat: bool = False
    #: somebody waits for it
    has_answer: bool = True


class _Calls:
    """Implements `TierCalls` for one attachment: any thread puts calls in, the loop takes them out in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop, caller: HostCaller) -> None:
        self.caller = caller
        self._loop = loop
        self._queue: deque[_Call] = deque()
        #: slots given back, pages read, pages found corrupt: told together, before the next call
        self._news: tuple[list[SlotRef], list[SlotRef], list[SlotRef]] = ([], [], [])
        self._has_work = asyncio.Event()
        self._has_ended = False
        self._answers: TierAnswers

    def connect(self, answers: TierAnswers) -> _Calls:
        """Called once by the copier."""
        self._answers = answers
        return self

    # --- any thread ---------------------------------------------------------------------------------------------------

    def lease(self, num_slots: int) -> None:
        def answered(lease: SlotLease) -> None:
            self._answers.leased(lease)

        self._put(_Call(lambda tier: tier.lease_slots.remote(self.caller, num_slots), answered, self._lease_failed))

    def commit(self, entries: Sequence[PageEntry]) -> None:
        def answered(outcomes: list[CommitOutcome]) -> None:
            self._answers.committed(entries, outcomes)

        def lost() -> None:
            self._answers.commit_lost(entries)

        def send(tier: Any) -> Awaitable[Any]:
            # said twice, a page that the first call has committed is refused: its slot is leased to nobody
            return tier.commit_pages.remote(self.caller, list(entries))

        self._put(_Call(send, answered, lost, may_repeat=True))

    def reconcile(self, held: Sequence[SlotRef]) -> None:
        def answered(not_ours: list[SlotRef]) -> None:
            self._answers.reconciled(not_ours)

        def lost() -> None:
            self._answers.reconcile_failed()

        self._put(_Call(lambda tier: tier.reconcile_slots.remote(self.caller, list(held)), answered, lost))

    def release(self, slots: Sequence[SlotRef]) -> None:
        self._on_loop(self._note, list(slots), [], [])

    def told(self, touched: Sequence[SlotRef], corrupt: Sequence[SlotRef]) -> None:
        self._on_loop(self._note, [], list(touched), list(corrupt))

    # --- the loop -----------------------------------------------------------------------------------------------------

    def leave(self) -> asyncio.Event:
        """Give the claim up, after the calls that were made before; set when that is done, or is lost."""
        left, incarnation = asyncio.Event(), self.caller.incarnation

        def answered(is_done: bool) -> None:
            left.set()

        self._put(_Call(lambda tier: tier.leave_host.remote(incarnation), answered, left.set, has_answer=False))
        return left

    async def next(self) -> _Call:
        """The next call to carry, in the order in which they were made; what has no answer goes first.

        If there is none for a while, one that tells nothing.
        """
        while True:
            if any(self._news):
                return self._take_news()
            if self._queue:
                return self._queue.popleft()
            self._has_work.clear()
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._has_work.wait()
            except TimeoutError:
                return self._take_news()

    def try_again(self, call: _Call) -> bool:
        """Carry a call once more, before all others, if it can be repeated and was not yet."""
        if not call.may_repeat or self._has_ended:
            return False
        self._queue.appendleft(replace(call, may_repeat=False))
        return True

    def lose_all(self) -> int:
        """Answer every call that waits as lost; how many they were. Of the news, slots given back are kept."""
        waiting, self._queue = self._queue, deque()
        self._news = (self._news[0], [], [])
        for call in waiting:
            call.lost()
        return len(waiting)

    def end(self) -> None:
        """Another file is used from now on, or none."""
        self._has_ended = True
        self.lose_all()

    def _take_news(self) -> _Call:
        news, self._news = self._news, ([], [], [])

        def lost() -> None:
            # or they would stay leased to us for ever; of what was read and found corrupt others will tell
            self._news[0][:0] = news[0]

        def send(tier: Any) -> Awaitable[Any]:
            return tier.tell_host.remote(self.caller, *news)

        return _Call(send, lambda answer: None, lost, has_answer=False)

    def _lease_failed(self) -> None:
        self._answers.lease_failed()

    def _put(self, call: _Call) -> None:
        if not self._on_loop(self._enqueue, call):
            call.lost()

    def _on_loop(self, function: Callable[..., None], *arguments: Any) -> bool:
        """False: the loop is closed, the process is about to end."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return False
        return True

    def _enqueue(self, call: _Call) -> None:
        if self._has_ended:
            call.lost()
            return
        self._queue.append(call)
        self._has_work.set()

    def _note(self, *news: list[SlotRef]) -> None:
        if self._has_ended:
            return
        for known, more in zip(self._news, news, strict=True):
            known += more
        self._has_work.set()


def map_arena(fence: Fence, place: HostPlace, claim: HostClaim) -> MappedArena | None:
    """The file of `place`, if it holds what `claim` says. None: there is none."""
    identity = FileIdentity(claim.lineage, claim.layout_digest, place.num_slots, claim.page_bytes)
    return attach(FilePaths(Path(place.directory), place.name), fence, identity)


def warm_arena(arena: Arena) -> None:
    """Map every page of the arena into this process: no first copy pays for it. About 0.12 s per GiB."""
    for _ in arena.prefault():
        continue
