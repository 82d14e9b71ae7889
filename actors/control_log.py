"""The dense log: every durable act of a controller is a create-if-absent of the next index.

Who finds the index taken is superseded: another controller has taken over, and from then on nothing this one decides
counts (protocol.md section 4, hole H27). All methods block on the store; one thread at a time.
"""

from __future__ import annotations

import secrets

import msgspec

from actors.clock import Clock
from actors.log_records import Entry, LogState, Record, TakeOver, decode_entry, encode_entry
from actors.log_stores import LogStore
from configs.errors import ConfigError

# Each lost race means that another controller has taken over in this very moment.
_MAX_TAKE_OVER_TRIES = 16


class Superseded(Exception):
    """Another controller has written to the log; `index` is its record."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index

    def __str__(self) -> str:
        return f"another controller has taken over: it wrote record {self.index} of the control log"


class ControlLog:
    """One controller's writing end of the log."""

    def __init__(self, store: LogStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._writer = secrets.token_hex(8)
        #: index of the record that is written next
        self._next = 1

    def take_over(self, actor_id: str, cluster: str) -> LogState:
        """Read the log to its end and put this controller's own record behind it.

        The state returned includes that record: its `term` is this controller's. The first record of a log draws the
        lineage. actor_id, cluster: Ray's ids of the controller and of its cluster. Raises ConfigError if a record is
        missing or unreadable, OSError if the store fails.
        """
        for _ in range(_MAX_TAKE_OVER_TRIES):
            state = self._load()
            record = TakeOver(state.lineage or secrets.token_hex(8), actor_id, cluster)
            try:
                index, entry = self._write(record)
            except Superseded:
                continue
            state.apply(index, entry)
            return state
        raise OSError(f"{_MAX_TAKE_OVER_TRIES} other controllers took over the log one after the other")

    def append(self, record: Record) -> int:
        """Store one record durably and return its index.

        Raises Superseded if another controller has written; OSError if the store fails, and then the record may or
        may not be there: the next append finds out and writes behind it.
        """
        return self._write(record)[0]

    def _write(self, record: Record) -> tuple[int, Entry]:
        entry = Entry(self._writer, self._clock.boot_id, self._clock.now_s(), record)
        data = encode_entry(entry)
        while not self._store.create(self._next, data):
            if not self._is_own(self._next):
                raise Superseded(self._next)
            self._next += 1  # ours, from an append whose end we did not see
        self._next += 1
        return self._next - 1, entry

    def _is_own(self, index: int) -> bool:
        data = self._store.read(index)
        try:
            return data is not None and decode_entry(data).writer == self._writer
        except msgspec.DecodeError:  # whoever wrote it, of whatever version: it was not this controller
            return False

    def _load(self) -> LogState:
        state = LogState()
        indices = self._store.indices()
        if indices != list(range(1, len(indices) + 1)):
            raise ConfigError(f"the control log has gaps: {len(indices)} records, the last is number {indices[-1]}")
        for index in indices:
            data = self._store.read(index)
            if data is None:
                raise ConfigError(f"record {index} of the control log vanished while it was read")
            state.apply(index, _decoded(index, data))
        self._next = len(indices) + 1
        return state


def _decoded(index: int, data: bytes) -> Entry:
    try:
        return decode_entry(data)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"record {index} of the control log cannot be read ({error}): it is damaged, or another version of "
            "Tidegate wrote it"
        ) from error
