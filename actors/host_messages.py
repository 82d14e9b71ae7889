"""What a rank and its node's agent tell each other about the host tier. Slots and pages go as cache/ has them."""

from __future__ import annotations

from dataclasses import dataclass

from actors.messages import ProcessName


@dataclass(frozen=True, slots=True)
class HostClaim:
    """A rank asks for its node's host tier, and says what its pages are like."""

    incarnation: str
    process: ProcessName
    lineage: str
    layout_digest: str
    page_bytes: int


@dataclass(frozen=True, slots=True)
class HostPlace:
    """The arena is there: map this very file."""

    directory: str
    name: str
    #: of the file; calls carry it, so that one meant for a file that is gone reaches no other
    nonce: int
    num_slots: int


@dataclass(frozen=True, slots=True)
class HostPending:
    """The arena is being made; ask again."""

    reserved_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class HostRefused:
    """There is no tier for this rank. is_final: nothing will change that while the settings are as they are."""

    message: str
    is_final: bool


@dataclass(frozen=True, slots=True)
class HostCaller:
    """Who calls the tier, and which file it means."""

    incarnation: str
    nonce: int


@dataclass(frozen=True, slots=True)
class HostDropOrder:
    """A flush that a node's tier must carry out itself: of that tier alone, or by age."""

    #: log index of its intent
    index: int
    #: drop what was begun more than so many seconds before the order comes; None: everything
    older_than_s: float | None
    #: of the controller that sends it
    term: int
    #: CLOCK_BOOTTIME of the node in seconds; past it nothing is dropped: the caller was told that this tier did not
    valid_until_s: float


@dataclass(frozen=True, slots=True)
class HostDropped:
    """What a node's tier did about a flush of its own."""

    #: pages that no reader finds any more; 0 if there was no tier
    freed_pages: int
    freed_bytes: int
    #: "": done. Else why the tier could not flush
    failure: str = ""
