"""Which memory of a rank is given back to the device, by tag, and in which order that may happen. A pure machine.

    kv_cache:   resident --release--> released --resume--> resident (empty)
    weights:    resident --release--> released --resume--> hollow --new weights--> resident
                                      released (kept on the host) --resume--> resident

A trainer on the same device releases both, trains, resumes the weights, updates them, resumes the KV cache, and goes
on. Wrong orders are answered with Conflict and change nothing; a repeat of what holds already is no error. Releasing
KV swaps the tree in the same step: no page of it is named by anything afterwards (hole H11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from configs.errors import Conflict, InvalidField

Tag: TypeAlias = Literal["kv_cache", "weights"]
TAGS: tuple[Tag, ...] = ("kv_cache", "weights")
#: `hollow`: there is memory for the weights, but nothing in it yet
Place: TypeAlias = Literal["resident", "released", "hollow"]


@dataclass(frozen=True, slots=True)
class DropKv:
    """Swap the tree and free the pool."""


@dataclass(frozen=True, slots=True)
class MakeKv:
    """Allocate the pool anew, empty."""


@dataclass(frozen=True, slots=True)
class DropWeights:
    """Free the weights; keep_copy: their bytes go to the host first."""

    keep_copy: bool


@dataclass(frozen=True, slots=True)
class MakeWeights:
    """Allocate memory for the weights; from_copy: with the bytes of before."""

    from_copy: bool


Command: TypeAlias = DropKv | MakeKv | DropWeights | MakeWeights


def parse_tags(value: object) -> tuple[Tag, ...]:
    """The tags a caller names, in the order of `TAGS`; None: all. Raises InvalidField."""
    if value is None:
        return TAGS
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise InvalidField(f"tags must be a list of {', '.join(TAGS)}, got {value!r:.80}", "tags")
    unknown = [entry for entry in cast("Sequence[object]", value) if entry not in TAGS]
    if unknown:
        raise InvalidField(f"tag {unknown[0]!r:.80} is unknown; there are {', '.join(TAGS)}", "tags")
    return tuple(tag for tag in TAGS if tag in value)


class MemoryTags:
    """One rank's memory. Each method changes the state and says what is to be done for it, or raises and changes
    nothing; whoever calls carries it out before anything else, between two steps."""

    def __init__(self) -> None:
        self._places: dict[Tag, Place] = dict.fromkeys(TAGS, "resident")
        #: the bytes of released weights are on the host
        self._has_copy = False
        #: they were released since the rank began; a resume before that is a mistake, after it perhaps a repeat
        self._ever_released: set[Tag] = set()

    @property
    def places(self) -> dict[Tag, Place]:
        return dict(self._places)

    @property
    def obstacle(self) -> str | None:
        """Why nothing can be served; None: everything is there."""
        for tag in TAGS:
            match self._places[tag]:
                case "released":
                    return f"{tag} is released; resume_memory_occupation brings it back"
                case "hollow":
                    return "the weights were released; a complete weight update has to fill them"
                case "resident":
                    pass
        return None

    def release(self, tags: Sequence[Tag], *, num_running: int, keep_copy: bool = False) -> list[Command]:
        """num_running: requests that own pages.  keep_copy: the weights' bytes survive on the host.

        Between two steps; from then on `obstacle` keeps everybody waiting, paused or not. Raises Conflict while
        requests run.
        """
        due: list[Tag] = [tag for tag in tags if self._places[tag] != "released"]
        if due and num_running:
            message = f"{num_running} requests run; pause_generation (abort or retract) before memory is released"
            raise Conflict(message, "tags")
        commands: list[Command] = []
        for tag in due:
            if tag == "kv_cache":
                commands.append(DropKv())
            else:
                # Memory without weights in it holds nothing that could be kept.
                self._has_copy = keep_copy and self._places[tag] == "resident"
                commands.append(DropWeights(self._has_copy))
            self._places[tag] = "released"
            self._ever_released.add(tag)
        return commands

    def resume(self, tags: Sequence[Tag]) -> list[Command]:
        """Raises Conflict for a tag that was never released."""
        strangers = [tag for tag in tags if tag not in self._ever_released]
        if strangers:
            raise Conflict(f"{strangers[0]} was not released: there is nothing to resume", "tags")
        commands: list[Command] = []
        for tag in tags:
            if self._places[tag] != "released":
                continue
            if tag == "kv_cache":
                commands.append(MakeKv())
                self._places[tag] = "resident"
            else:
                commands.append(MakeWeights(self._has_copy))
                self._places[tag] = "resident" if self._has_copy else "hollow"
        return commands

    def check_update(self, *, is_partial: bool) -> None:
        """Before new weights are staged. Raises Conflict if there is no memory for them, or nothing to be a part of."""
        place = self._places["weights"]
        if place == "released":
            raise Conflict("the weights are released; resume_memory_occupation(tags=['weights']) comes first", "tags")
        if place == "hollow" and is_partial:
            raise Conflict("the weights were released without a copy: a complete update has to fill them")

    def check_continue(self) -> None:
        """Before requests are let in again. Raises Conflict with what is missing."""
        if self.obstacle is not None:
            raise Conflict(self.obstacle)

    def updated(self) -> None:
        """A complete set of weights was committed."""
        if self._places["weights"] == "hollow":
            self._places["weights"] = "resident"
