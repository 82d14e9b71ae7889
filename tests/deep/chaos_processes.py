"""The processes of the chaos test: an index writer behind a socket, and ranks that write and read pages through it.

Each may be killed or frozen at any instruction. A page's bytes follow from its key, so every rank can tell a wrong page
from a right one without asking.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

from actors.node_processes import NodeClock, NodeProcesses
from cache.arena import PageView
from cache.control_page import FileIdentity
from cache.host_eviction import LruOrder
from cache.host_reader import HostReader
from cache.host_tier import HostTier
from cache.host_writer import HostWriter
from cache.keys import KEY_BYTES, KeyRoot, page_keys
from cache.shared_file import FileMaker, FilePaths, attach
from cache.shared_words import fence_for
from cache.slot_table import Holder
from cache.types import Epoch, Namespace

NUM_SLOTS, PAGE_BYTES = 48, 16 * 1024
IDENTITY = FileIdentity("cafe", "chaos", NUM_SLOTS, PAGE_BYTES)
CHAIN_PAGES, NUM_CHAINS = 6, 12
FENCE = fence_for("x86_64")
STATS = ("hits", "wrong", "committed", "misses")


@dataclass(frozen=True)
class Place:
    """Where the processes of one run meet."""

    directory: Path
    shared: Path

    @property
    def paths(self) -> FilePaths:
        # two runs on one machine must not meet
        name = hashlib.blake2b(bytes(self.directory), digest_size=8).hexdigest()
        return FilePaths(self.shared, f"chaos-{name}")

    @property
    def socket(self) -> str:
        return str(self.directory / "tier")

    def stats(self) -> np.ndarray:
        """int64 [roles, STATS]; each row has one writer at a time."""
        return np.memmap(self.directory / "stats", np.int64, "r+", shape=(16, len(STATS)))


def maker(nonce: int) -> FileMaker:
    return FileMaker(IDENTITY, NodeProcesses(), NodeClock(), FENCE, nonce)


def chain_keys(epoch: int, chain: int) -> bytes:
    root = KeyRoot("cafe", "chaos", "weights", Namespace(""), Epoch(epoch)).digest()
    return page_keys(root, np.full(CHAIN_PAGES, chain, "<i4").tobytes(), page_size=1)


def split(keys: bytes) -> list[bytes]:
    return [keys[begin : begin + KEY_BYTES] for begin in range(0, len(keys), KEY_BYTES)]


def content_of(key: bytes) -> PageView:
    return np.frombuffer(hashlib.shake_128(key).digest(PAGE_BYTES), np.uint8)


def open_tier(place: Place, nonce: int) -> tuple[HostTier, Callable[[], None]]:
    """Own the node's file and adopt what is in it; the second value gives it up again."""
    owned = maker(nonce).open(place.paths)
    return HostTier(owned.arena(), owned.page, LruOrder(), NodeProcesses(), max_leased=12), owned.close


def run_tier(place: Place, nonce: int) -> None:
    """Serve until killed. Between requests: look after dead holders, reclaim, now and then flush."""
    tier, _ = open_tier(place, nonce)
    Path(place.socket).unlink(missing_ok=True)
    listener = connection.Listener(place.socket, "AF_UNIX", backlog=64)
    accepting: Any = listener._listener._socket  # type: ignore[attr-defined]
    ends: list[Any] = []
    for turn in itertools.count(nonce):
        for end in connection.wait([accepting, *ends], timeout=0.005):
            if end is accepting:
                ends.append(listener.accept())
            elif not answer(tier, end):
                ends.remove(end)
        tier.check_holders()
        tier.reclaim(8)
        if turn % 400 == 399:
            tier.page.raise_floor(term=1, floor=tier.page.read().floor + 1)
        if turn % 1500 == 1499:
            tier.drop_all()


def answer(tier: HostTier, end: Any) -> bool:
    """Do what is asked. False: the asker is gone."""
    try:
        method, args = end.recv()
        end.send(getattr(tier, method)(*args))
    except (EOFError, OSError):
        end.close()
        return False
    return True


class TierGone(Exception):
    """The answer was lost with the tier, or the question was."""


class TierClient:
    """A rank's calls to whichever tier lives."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._end: Any = None

    @property
    def is_connected(self) -> bool:
        return self._end is not None

    def connect(self) -> bool:
        try:
            self._end = connection.Client(self._socket, "AF_UNIX")
        except (OSError, EOFError):
            threading.Event().wait(0.005)
            return False
        return True

    def call(self, method: str, *args: Any) -> Any:
        try:
            self._end.send((method, args))
            return self._end.recv()
        except (OSError, EOFError) as error:
            self._end.close()
            self._end = None
            raise TierGone from error


class ChaosRank:
    """Writes chains that it does not find, reads those that it does, and counts."""

    def __init__(self, place: Place, role: int, seed: int) -> None:
        while (attached := attach(place.paths, FENCE, IDENTITY)) is None:
            threading.Event().wait(0.005)
        arena = attached.arena()
        self._attached = attached
        self._reader = HostReader(arena, attached.page)
        self._writer = HostWriter(arena)
        self._holder = Holder.of(f"{role}-{seed}", NodeProcesses().own_id())
        self._tier = TierClient(place.socket)
        self._rng = np.random.default_rng(seed)
        self._counts = place.stats()[role]
        self._target = np.zeros(PAGE_BYTES, np.uint8)

    def run(self) -> None:
        while True:
            try:
                if self._tier.is_connected or self._tier.connect():
                    self._turn()
            except TierGone:
                self._after_loss()

    def _after_loss(self) -> None:
        """Nothing told to the dead tier will be answered; the next one is told what we still hold."""
        self._writer.forget(self._writer.take_commits())
        while not self._tier.connect():
            continue
        try:
            self._writer.lose(self._tier.call("reconcile", self._holder, self._writer.held()))
        except TierGone:
            return

    def _turn(self) -> None:
        epoch = self._attached.page.read().floor
        keys = chain_keys(epoch, int(self._rng.integers(NUM_CHAINS)))
        num_read = self._read(keys, epoch)
        missing = split(keys)[num_read:]
        if missing:
            self._write(missing, epoch)

    def _read(self, keys: bytes, epoch: int) -> int:
        match = self._reader.look_up(keys, Epoch(epoch))
        for index, key in enumerate(split(keys)[: match.num_pages]):
            if self._reader.load(match, index, self._target) is not None:
                self._counts[3] += 1
                return index
            is_right = bool((self._target == content_of(key)).all())
            self._counts[0 if is_right else 1] += 1
        self._tier.call("touch", list(self._reader.touched))
        self._reader.touched.clear()
        return match.num_pages

    def _write(self, keys: list[bytes], epoch: int) -> None:
        if self._writer.num_ready < len(keys):
            self._writer.accept(self._tier.call("lease", self._holder, len(keys)))
        for key in keys:
            self._writer.write(key, Epoch(epoch), 0, content_of(key))
        entries = self._writer.take_commits()
        try:
            outcomes = self._tier.call("commit", self._holder, entries)
        except TierGone:
            self._writer.forget(entries)
            raise
        self._writer.settle(entries, outcomes)
        self._counts[2] += Counter(outcomes)["committed"]
        self._tier.call("release", self._holder, self._writer.take_returns())


def run_rank(place: Place, role: int, seed: int) -> None:
    """Write and read until killed."""
    ChaosRank(place, role, seed).run()
