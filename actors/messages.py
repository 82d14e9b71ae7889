"""What actors tell each other through Ray. Frozen, small, ids rather than objects.

Answers that leave the system (to jobs, to the Api) are plain dicts of str, int, float, bool, list, None: no class of
ours crosses a job's border.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: Ray namespace of every named actor of ours
NAMESPACE = "tidegate"
CONTROLLER_NAME = "controller"
#: version of the messages between actors; a mismatch at hello or register is refused
MESSAGE_VERSION = 1


@dataclass(frozen=True, slots=True)
class RankRecord:
    """What an incarnation says of itself when it registers."""

    incarnation: str
    #: Serve's rank number: an address, never an identity
    rank: int
    node_id: str
    #: of the scheduler actor's process; with start_time it names one process for ever (pid reuse)
    pid: int
    #: field 22 of /proc/<pid>/stat, clock ticks since boot
    start_time: int
    gpu_ids: tuple[str, ...]
    #: zmq endpoints where the rank takes requests: ipc on the node, tcp across
    ipc_endpoint: str
    tcp_endpoint: str
    actor_name: str
    #: lineage and epoch of the KV it holds; "" and 0 when it is new
    lineage: str
    epoch: int
    layout_digest: str
    weights_digest: str
    weight_version: str
    page_size: int
    num_pages: int
    bytes_per_page: int
    max_running: int
    max_len: int
    message_version: int = MESSAGE_VERSION
    #: CURVE public key of the tcp endpoint (Z85): who holds it may connect, so it is shown nowhere. "" with no tcp
    tcp_key: str = ""

    @property
    def is_empty(self) -> bool:
        """It held no KV when it registered, so it can have none from before."""
        return self.lineage == "" and self.epoch == 0


@dataclass(frozen=True, slots=True)
class Registered:
    """The controller's answer, given after the member was added."""

    term: int
    lineage: str
    #: newest epoch allotted; the incarnation swaps to it before its first match
    epoch: int
    floor: int


@dataclass(frozen=True, slots=True)
class Member:
    """One rank as the Api sees it."""

    rank: int
    incarnation: str
    node_id: str
    ipc_endpoint: str
    tcp_endpoint: str
    max_len: int
    page_size: int
    tcp_key: str = ""


@dataclass(frozen=True, slots=True)
class Membership:
    """All ranks that take requests. `version` rises with every change; the Api long-polls on it.

    `epoch` lets routers drop what they remember of prefixes cached before a flush.
    """

    version: int
    epoch: int
    floor: int
    members: tuple[Member, ...] = field(default_factory=tuple)
