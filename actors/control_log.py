"""The dense log: every durable act of a controller is a create-if-absent of the next index.

Who finds the index taken is superseded: another controller has taken over, and from then on nothing this one decides
counts (protocol.md section 4, hole H27). All methods block on the store; one thread at a time.

Old records are removed from the front, behind a checkpoint that says what they said, and never one that is younger
than ten minutes. So a controller that looked at the log within that time finds the next index taken if another has
written, and one that slept for longer finds its own last record gone.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass

import msgspec

from actors.clock import Clock
from actors.log_records import Checkpoint, Entry, LogState, Record, TakeOver, decode_entry, encode_entry
from actors.log_stores import LogStore
from configs.errors import ConfigError

log = logging.getLogger(__name__)

#: no record younger than this is removed
KEEP_S = 600.0
# Half of it: records are removed by another process, whose clock may run a little faster.
_MAX_BLIND_S = KEEP_S / 2
# Each lost race means that another controller has taken over in this very moment.
_MAX_TAKE_OVER_TRIES = 16


class Superseded(Exception):
    """Another controller has written to the log; `index` is its record, or the first that may be."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index

    def __str__(self) -> str:
        return f"another controller has taken over: it wrote record {self.index} of the control log"


@dataclass(frozen=True, slots=True)
class Written:
    """One append."""

    index: int
    entry: Entry
    #: own records of earlier appends that were reported as failed and are there after all, in order
    found: tuple[tuple[int, Entry], ...] = ()


@dataclass(frozen=True, slots=True)
class TakenOver:
    """The log as a controller found it, its own record included."""

    state: LogState
    #: records since the newest checkpoint, and its index (0: there is none)
    num_records: int
    checkpoint: int


class ControlLog:
    """One controller's writing end of the log."""

    def __init__(self, store: LogStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._writer = secrets.token_hex(8)
        #: index of the record that is written next
        self._next = 1
        #: when the log was last seen to end before `_next`
        self._seen_s = clock.now_s()
        self._checkpoint = 0

    def take_over(self, actor_id: str, cluster: str, lease_s: float = 0.0) -> TakenOver:
        """Read the log to its end and put this controller's own record behind it.

        The state returned includes that record: its `term` is this controller's. The first record of a log draws the
        lineage. actor_id, cluster: Ray's ids of the controller and of its cluster. lease_s: of the leases this
        controller will give. Raises ConfigError if a record is missing or unreadable, OSError if the store fails.
        """
        for _ in range(_MAX_TAKE_OVER_TRIES):
            state = self._load()
            record = TakeOver(state.lineage or secrets.token_hex(8), actor_id, cluster, lease_s)
            try:
                written = self.append(record)
            except Superseded:
                continue
            state.apply(written.index, written.entry)
            return TakenOver(state, written.index - self._checkpoint, self._checkpoint)
        raise OSError(f"{_MAX_TAKE_OVER_TRIES} other controllers took over the log one after the other")

    def append(self, record: Record) -> Written:
        """Store one record; it is there for every process from the return on.

        Raises Superseded if another controller has written; OSError if the store fails, and then the record may or
        may not be there: the next append finds out and writes behind it.
        """
        begun_s = self._clock.now_s()
        entry = Entry(self._writer, self._clock.boot_id, begun_s, record)
        data = encode_entry(entry)
        found: list[tuple[int, Entry]] = []
        while not self._store.create(self._next, data):
            found.append((self._next, self._own(self._next)))
            self._next += 1
        self._see_past(self._next - 1, begun_s)
        self._next += 1
        return Written(self._next - 1, entry, tuple(found))

    def prepare(self) -> None:
        """Make the next appends quick. Raises nothing: they will say themselves what is wrong."""
        try:
            self._store.prepare()
        except OSError as error:
            log.warning("the control log could not be prepared for its next records: %s", error)

    def close(self) -> None:
        self._store.close()

    def check(self) -> None:
        """See that no other controller has written. Raises Superseded, OSError if the store fails."""
        begun_s = self._clock.now_s()
        index = self._next
        # An own record here is of an append that was reported as failed; the next append takes it in.
        while self._store.read(index) is not None:
            self._own(index)
            index += 1
        self._see_past(index - 1, begun_s)

    def remove_below(self, index: int) -> None:
        """Remove the records before `index`, oldest first, so that at every instant the rest is without a gap.

        The caller knows that record `index` is a checkpoint and that all below it are older than KEEP_S.
        """
        for old in self._store.indices():
            if old >= index:
                return
            self._store.remove(old)

    def _see_past(self, last: int, begun_s: float) -> None:
        """Note that the log ended after record `last` at `begun_s` or later; but not if that may have been removed."""
        if self._clock.now_s() - self._seen_s > _MAX_BLIND_S and last > 0 and self._store.read(last) is None:
            raise Superseded(last + 1)
        self._seen_s = begun_s

    def _own(self, index: int) -> Entry:
        """Our own record, from an append whose end we did not see. Raises Superseded if it is another's."""
        data = self._store.read(index)
        try:
            entry = None if data is None else decode_entry(data)
        except msgspec.DecodeError:  # whoever wrote it, of whatever version: it was not this controller
            entry = None
        if entry is None or entry.writer != self._writer:
            raise Superseded(index)
        return entry

    def _load(self) -> LogState:
        """Fold the log. Others may be removing its front meanwhile; then it is read again."""
        self._seen_s = self._clock.now_s()
        while True:
            entries = self._read_all()
            if entries is not None:
                break
        self._next = max(entries, default=0) + 1
        checkpoints = [index for index, entry in entries.items() if isinstance(entry.record, Checkpoint)]
        self._checkpoint = checkpoints[-1] if checkpoints else 0
        if entries and not checkpoints and min(entries) != 1:
            raise ConfigError(f"the control log has gaps: it begins with record {min(entries)} and has no checkpoint")
        state = LogState()
        if checkpoints:
            record = entries[self._checkpoint].record
            assert isinstance(record, Checkpoint)
            state = record.state
        for index, entry in entries.items():
            if index > self._checkpoint:
                state.apply(index, entry)
        return state

    def _read_all(self) -> dict[int, Entry] | None:
        """All records after the last gap, by rising index; None if the front of the log moved meanwhile."""
        indices = self._store.indices()
        gaps = [place for place in range(1, len(indices)) if indices[place] != indices[place - 1] + 1]
        entries: dict[int, Entry] = {}
        for index in indices[gaps[-1] if gaps else 0 :]:
            data = self._store.read(index)
            if data is None:
                return None
            entries[index] = _decoded(index, data)
        return entries


def _decoded(index: int, data: bytes) -> Entry:
    try:
        return decode_entry(data)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"record {index} of the control log cannot be read ({error}): it is damaged, or another version of "
            "Tidegate wrote it"
        ) from error
