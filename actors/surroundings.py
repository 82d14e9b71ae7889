"""What the controller needs of the world: Ray and the kernel in production, plain values in tests and simulation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from actors.audit_log import InThread
from actors.clock import Clock
from actors.end_proofs import EndProof
from actors.messages import RankRecord
from actors.nodes import EnsureAgent


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Every way of the controller out of its own loop. None of them may block it."""

    clock: Clock
    #: Ray's id of this actor, the same over its restarts
    actor_id: str
    #: Ray's name of this cluster
    cluster: str
    #: node of this process
    node_id: str
    #: actor handle of a registered rank, None if Ray knows none
    find_handle: Callable[[RankRecord], Awaitable[Any]]
    #: eye on the process of a rank of this node; None: it does not run (any more)
    find_process: Callable[[RankRecord], EndProof | None]
    #: make the agent of a node if it has none; OSError if that fails
    ensure_agent: EnsureAgent
    #: run a blocking call aside from the loop
    in_thread: InThread
    #: end this process, because another controller has taken over
    end_process: Callable[[], None]
    #: the log is in this machine's own directory, so only its nodes can be served
    is_one_machine: bool
    #: are there agents, hence perhaps ranks, that an earlier controller of this cluster has made?
    has_elders: Callable[[], Awaitable[bool]]
    #: of the cache, in the order in which a flush names them
    tiers: tuple[str, ...] = ("device",)
