"""Which rank takes a request: longest cached prefix first, bounded by load.

`choose` is a pure function of one frozen view. `Router` keeps what the view is made of: how many sequences of this Api
replica are on each incarnation, and which prefixes were sent where (`PrefixMemory`). Both are hints: a wrong guess
costs a prefill, never a wrong answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import xxhash

from actors.messages import Member, Membership
from cache.types import TOKEN_BYTES
from configs.errors import InvalidField, NoRank

#: a rank may have at most this multiple of the mean load (consistent hashing with bounded loads, Mirrokni et al. 2018)
LOAD_FACTOR = 1.25
#: blocks remembered per incarnation; 65,536 blocks of 16 tokens are 1M tokens, about 8 MB of hashes
MAX_REMEMBERED_BLOCKS = 1 << 16
#: a block is one page, or several small ones: hashing costs 0.3 us a block on the loop that all streams share
MIN_BLOCK_TOKENS = 16
#: blocks of one prompt that are looked at; prompts that part later than 65k tokens are not told apart
MAX_CHAIN_BLOCKS = 4096


@dataclass(frozen=True, slots=True)
class Candidate:
    """One rank as `choose` sees it."""

    incarnation: str
    #: sequences of this Api replica on it now
    num_running: int
    #: leading blocks of the prompt it is believed to hold
    num_known_blocks: int
    #: sequences ever sent to it by this Api replica; breaks ties, so that idle ranks take turns
    num_sent: int


def choose(candidates: Sequence[Candidate]) -> str:
    """The incarnation to send one more sequence to.

    Longest known prefix among those whose load, with this sequence, stays within 1.25 times the mean; ties go to the
    less loaded, then to the one that was sent less. candidates: not empty.
    """
    total = sum(candidate.num_running for candidate in candidates) + 1
    bound = math.ceil(LOAD_FACTOR * total / len(candidates))
    eligible = [candidate for candidate in candidates if candidate.num_running + 1 <= bound]
    best = max(eligible, key=lambda c: (c.num_known_blocks, -c.num_running, -c.num_sent))
    return best.incarnation


class PrefixMemory:
    """Prefixes sent to one incarnation: a bounded set of block-chain hashes, least recently sent out first."""

    __slots__ = ("_hashes", "_max_blocks")

    def __init__(self, max_blocks: int = MAX_REMEMBERED_BLOCKS) -> None:
        self._hashes: dict[int, None] = {}
        self._max_blocks = max_blocks

    def __len__(self) -> int:
        return len(self._hashes)

    def num_known(self, chain: Sequence[int]) -> int:
        """Leading entries of `chain` that are remembered."""
        for index, block in enumerate(chain):
            if block not in self._hashes:
                return index
        return len(chain)

    def remember(self, chain: Sequence[int]) -> None:
        """Note `chain` as just sent. Deepest block first: when room is needed, leaves go before their parents."""
        for block in reversed(chain[: self._max_blocks]):
            self._hashes.pop(block, None)
            self._hashes[block] = None
        for block in list(islice(self._hashes, max(0, len(self._hashes) - self._max_blocks))):
            del self._hashes[block]


def block_chain(tokens: bytes, page_size: int, namespace: str) -> list[int]:
    """One hash per whole block of `tokens` (int32 bytes), over the block and all before it, seeded by namespace."""
    block_bytes = max(page_size, MIN_BLOCK_TOKENS) * TOKEN_BYTES
    end = min(len(tokens), MAX_CHAIN_BLOCKS * block_bytes)
    state = xxhash.xxh3_64_intdigest(namespace.encode())
    chain: list[int] = []
    for start in range(0, end - block_bytes + 1, block_bytes):
        state = xxhash.xxh3_64_intdigest(tokens[start : start + block_bytes], seed=state)
        chain.append(state)
    return chain


class Router:
    """Loads and prefix memory of one Api replica. Used from one event loop only."""

    def __init__(self, max_blocks: int = MAX_REMEMBERED_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._running: dict[str, int] = {}
        self._sent: dict[str, int] = {}
        self._memories: dict[str, PrefixMemory] = {}
        #: the epoch the memories belong to; a flush makes them all worthless
        self._epoch = 0

    def num_running(self, incarnation: str) -> int:
        return self._running.get(incarnation, 0)

    @contextmanager
    def placed(
        self,
        membership: Membership,
        tokens: bytes,
        namespace: str,
        *,
        rank: int | None = None,
        avoid: frozenset[str] = frozenset(),
    ) -> Iterator[Member]:
        """Choose a member for one sequence and count it there until the block ends.

        rank: only this rank will do. avoid: incarnations that were lost under this sequence.
        Raises NoRank when none is left, InvalidField when `rank` is none of the deployment's.
        """
        self._forget_outdated(membership)
        members = _allowed(membership, rank, avoid)
        chain = block_chain(tokens, members[0].page_size, namespace)
        incarnation = choose([self._candidate(member, chain) for member in members])
        self._memories.setdefault(incarnation, PrefixMemory(self._max_blocks)).remember(chain)
        self._running[incarnation] = self._running.get(incarnation, 0) + 1
        self._sent[incarnation] = self._sent.get(incarnation, 0) + 1
        try:
            yield next(member for member in members if member.incarnation == incarnation)
        finally:
            self._running[incarnation] -= 1

    def _candidate(self, member: Member, chain: Sequence[int]) -> Candidate:
        memory = self._memories.get(member.incarnation)
        return Candidate(
            incarnation=member.incarnation,
            num_running=self.num_running(member.incarnation),
            num_known_blocks=memory.num_known(chain) if memory is not None else 0,
            num_sent=self._sent.get(member.incarnation, 0),
        )

    def _forget_outdated(self, membership: Membership) -> None:
        """A new epoch empties every rank's cache; an incarnation that left takes its cache along."""
        if membership.epoch != self._epoch:
            self._epoch = membership.epoch
            self._memories.clear()
        alive = {member.incarnation for member in membership.members}
        for incarnation in [known for known in self._sent if known not in alive and not self._running.get(known)]:
            self._sent.pop(incarnation)
            self._running.pop(incarnation, None)
            self._memories.pop(incarnation, None)


def _allowed(membership: Membership, rank: int | None, avoid: frozenset[str]) -> list[Member]:
    members = [member for member in membership.members if member.incarnation not in avoid]
    if rank is not None and members and all(member.rank != rank for member in members):
        known = ", ".join(str(member.rank) for member in membership.members)
        raise InvalidField(f"data_parallel_rank {rank} is not serving; serving ranks: {known}", "data_parallel_rank")
    members = [member for member in members if rank is None or member.rank == rank]
    if not members:
        raise NoRank("no rank is serving at the moment; try again in a few seconds")
    return members
