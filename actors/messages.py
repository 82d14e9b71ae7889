"""What actors tell each other through Ray. Frozen, small, ids rather than objects.

Answers that leave the system (to jobs, to the Api) are plain dicts of str, int, float, bool, list, None: no class of
ours crosses a job's border.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.flush import FlushScope

#: Ray namespace of every named actor of ours
NAMESPACE = "tidegate"
CONTROLLER_NAME = "controller"
#: version of the messages between actors; a mismatch at hello or register is refused
MESSAGE_VERSION = 2


def node_agent_name(controller_name: str, node_id: str) -> str:
    """Actor name of a node's agent: `host-tier-<node>` for the agents of `controller`."""
    return f"host-tier-{node_id[:12]}{controller_name.removeprefix(CONTROLLER_NAME)}"


@dataclass(frozen=True, slots=True)
class PagePlace:
    """Where the file lies in which a node's control page is; for the processes of that node."""

    directory: str
    name: str
    #: random number in this very file: one that is made anew under the same name has another
    nonce: int


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
    #: the pid namespace in which `pid` names the process; "": that of its node
    pid_namespace: str = ""
    #: of the file whose control page it reads; 0 before it has been told one
    page_nonce: int = 0

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
    #: the control page of its node, read before each match from now on
    page: PagePlace
    #: sub-epochs of scoped flushes newer than the floor
    sub_epochs: tuple[SubEpoch, ...] = ()


@dataclass(frozen=True, slots=True)
class SubEpoch:
    """A scoped flush that is still to be kept: part of the key of every page in its scope (protocol.md section 6)."""

    #: None: everything
    scope: FlushScope | None
    #: index of the flush's intent in the log
    index: int


@dataclass(frozen=True, slots=True)
class AbortCommand:
    """End requests on a rank."""

    #: None: all
    request_ids: tuple[str, ...] | None
    reason: str
    #: of the controller that sends it
    term: int
    #: CLOCK_BOOTTIME of the rank's machine in seconds; past it nothing is aborted: a rank that was frozen must not end
    #: requests that came long after
    valid_until_s: float


@dataclass(frozen=True, slots=True)
class HostReport:
    """A node's host tier as its actor last saw it; travels with each renewal of the node's lease."""

    #: none: no rank has asked for it yet.  reserving: its memory is being taken.  ready.  failed: `message` says why
    status: str
    message: str = ""
    num_slots: int = 0
    page_bytes: int = 0
    file_bytes: int = 0
    reserved_bytes: int = 0
    #: slots by state; they sum to num_slots
    free: int = 0
    leased: int = 0
    committed: int = 0
    quarantined: int = 0
    #: committed pages that a reader may still find
    valid: int = 0
    num_ranks: int = 0


@dataclass(frozen=True, slots=True)
class NodeRenewal:
    """What a node's agent says when it asks for a lease, about once a fifth of a lease."""

    node_id: str
    boot_id: str
    #: CLOCK_BOOTTIME of the node in seconds, read before this was sent: the lease counts from here
    sent_s: float
    #: its control page; None: it has no file yet, because it knows no lineage
    page: PagePlace | None = None
    #: as the page says now
    floor: int = 0
    message_version: int = MESSAGE_VERSION
    #: None: the node has no host tier
    host: HostReport | None = None


@dataclass(frozen=True, slots=True)
class LeaseAnswer:
    """What the controller answers to a renewal. The floor is stored; a lease vouches for it."""

    lineage: str
    term: int
    floor: int
    #: seconds from the renewal's `sent_s`; 0: no lease this time, `message` says why
    lease_s: float
    #: ask again after this many seconds
    period_s: float
    message: str = ""
    #: log index of the newest flush of host tiers that this node's tier may have missed: what is older in it is void,
    #: and goes before the lease is written
    host_drop: int = 0


@dataclass(frozen=True, slots=True)
class FloorAnswer:
    """What a node's agent answers to a floor."""

    #: of the file; 0: it has none
    nonce: int
    #: on the page now
    floor: int
    #: the page obeys a higher term: whoever sent this floor is superseded
    is_refused: bool = False
    #: pages of the node's host tier that this floor made void, and their bytes
    host_pages: int = 0
    host_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ProcessName:
    """One process of a node for ever, as an agent is asked about it."""

    pid: int
    start_time: int
    #: "": the agent's own
    pid_namespace: str = ""


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
