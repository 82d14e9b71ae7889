"""The controller's end of its log: records go in, the folded state stays with it, and the log stays short.

The state is always the fold of what is stored, so a checkpoint is the state as it stands. Other controllers show
themselves here, at an append or at the check that every lease depends on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from actors.clock import Clock
from actors.control_log import KEEP_S, Superseded, TakenOver, Written
from actors.log_records import Checkpoint, Entry, LogState, Probe, Record, encode_record
from actors.log_thread import LogWriter

log = logging.getLogger(__name__)

#: records between two checkpoints: 1024 are read in 50 ms from a directory, in 0.5 s from the cluster's store
CHECKPOINT_EVERY = 1024


@dataclass(frozen=True, slots=True)
class Stored:
    index: int


@dataclass(frozen=True, slots=True)
class Unstored:
    """The record is not there, or nobody knows yet; `message` says why."""

    message: str
    #: if nobody knows: done when a later record has shown it; its index, or None if it is not there and never will be
    fate: asyncio.Future[int | None] | None = None


@dataclass(frozen=True, slots=True)
class LogEvents:
    """Told by the keeper, on its loop."""

    #: the log held no record of another controller at this time or later
    checked: Callable[[float], None]
    #: another controller has taken over; said once
    superseded: Callable[[Superseded], None]


class LogKeeper:
    """Lives on one asyncio loop. `take_over` first."""

    def __init__(self, writer: LogWriter, clock: Clock, events: LogEvents) -> None:
        self._writer = writer
        self._clock = clock
        self._events = events
        self._is_superseded = False
        self._num_records = 0
        #: checkpoints and when they were stored at the latest, oldest first
        self._checkpoints: deque[tuple[int, float]] = deque()
        self._num_in_flight = 0
        #: records whose appends have failed, encoded, in order; the next that is stored shows what became of them
        self._doubts: list[tuple[bytes, asyncio.Future[int | None]]] = []
        self._is_pruning = False
        self.state: LogState

    async def take_over(self, actor_id: str, cluster: str, lease_s: float) -> float:
        """Read the log and write this controller's own record; see ControlLog.take_over for failures.

        Returns a time before the record was written, as `LogEvents.checked` tells it later.
        """
        begun_s = self._clock.now_s()
        taken: TakenOver = await self._writer.take_over(actor_id, cluster, lease_s)
        self.state = taken.state
        self._num_records = taken.num_records
        if taken.checkpoint:
            self._checkpoints.append((taken.checkpoint, self._clock.now_s()))
        return begun_s

    def append(self, record: Record) -> asyncio.Future[Stored | Unstored]:
        """Store a record and fold it in. It is stored, or fails, whether or not anybody waits. The future fails
        only by a fault of ours.

        After Unstored the record may still turn up in the log and in the state; its `fate` tells.
        """
        begun_s = self._clock.now_s()
        result: asyncio.Future[Stored | Unstored] = asyncio.get_running_loop().create_future()
        self._num_in_flight += 1
        appending = self._writer.append(record)
        appending.add_done_callback(lambda done: self._appended(done, record, result, begun_s))
        return result

    async def check(self) -> None:
        """See whether another controller has written; tells `checked` or `superseded`; neither if the store fails."""
        begun_s = self._clock.now_s()
        try:
            await self._writer.check()
        except Superseded as reason:
            self._supersede(reason)
        except OSError as error:
            log.warning("the control log cannot be read: %s", error)
        else:
            self._events.checked(begun_s)

    def tidy(self) -> None:
        """Write a checkpoint when one is due, remove what is old enough behind one, and settle what is in doubt."""
        if self._doubts and not self._num_in_flight:
            self.append(Probe())
        # While a record is under way, or in doubt, the state does not say what the log says.
        if self._num_records >= CHECKPOINT_EVERY and not self._num_in_flight:
            self.append(Checkpoint(self.state.copy()))
        now_s = self._clock.now_s()
        old = [index for index, stored_s in self._checkpoints if now_s - stored_s > KEEP_S]
        if old and not self._is_pruning:
            self._is_pruning = True
            self._writer.remove_below(old[-1]).add_done_callback(lambda done: self._pruned(done, old[-1]))

    def close(self) -> None:
        self._writer.close()

    def _appended(
        self, done: asyncio.Future[Written], record: Record, result: asyncio.Future[Stored | Unstored], begun_s: float
    ) -> None:
        self._num_in_flight -= 1
        if done.cancelled():
            result.cancel()
            return
        error = done.exception()
        if error is None:
            written = done.result()
            for index, entry in written.found:
                self._fold(index, entry)
            self._fold(written.index, written.entry)
            self._settle(written)
            self._events.checked(begun_s)
            result.set_result(Stored(written.index))
        elif isinstance(error, Superseded):
            self._supersede(error)
            result.set_result(Unstored(str(error)))
        elif isinstance(error, OSError):
            log.error("the control log cannot be written: %s", error)
            fate: asyncio.Future[int | None] = result.get_loop().create_future()
            self._doubts.append((encode_record(record), fate))
            result.set_result(Unstored("the control log cannot be written", fate))
        else:
            result.set_exception(error)

    def _settle(self, written: Written) -> None:
        """Nothing can appear before a record that is stored: what is in doubt was found on the way to it, or is not
        there and never will be."""
        found = [(index, encode_record(entry.record)) for index, entry in written.found]
        doubts, self._doubts = self._doubts, []
        for data, fate in doubts:
            place = next((place for place, (_, other) in enumerate(found) if other == data), None)
            fate.set_result(None if place is None else found.pop(place)[0])

    def _fold(self, index: int, entry: Entry) -> None:
        self.state.apply(index, entry)
        self._num_records += 1
        if isinstance(entry.record, Checkpoint):
            self._num_records = 0
            self._checkpoints.append((index, self._clock.now_s()))

    def _pruned(self, done: asyncio.Future[None], index: int) -> None:
        self._is_pruning = False
        error = None if done.cancelled() else done.exception()
        if error is not None:
            log.warning("old records of the control log cannot be removed: %s", error)
            return
        while self._checkpoints and self._checkpoints[0][0] <= index:
            self._checkpoints.popleft()

    def _supersede(self, reason: Superseded) -> None:
        if not self._is_superseded:
            self._is_superseded = True
            self._events.superseded(reason)
