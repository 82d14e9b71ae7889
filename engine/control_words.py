"""What the control plane tells a rank, as the engine reads it once in each turn.

The order in a turn is the promise's corner stone: drain the inbox, *then* read these words, *then* match. A request
received after a flush has returned was taken from the inbox before the words were read, so the words it is matched
under hold that flush's floor (protocol.md, hole H7, invariants 5 and 6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class ControlWords:
    """One reading of the control page. Valid for the turn it was read in, and for no other."""

    #: the node's lease has not run out; without it the rank serves uncached: it matches and publishes nothing
    lease_ok: bool = True
    #: lowest epoch that may still be matched; above the rank's own epoch it swaps before it matches
    floor: int = 0
    #: newest epoch the rank was told when it registered; it swaps to it in the same way
    epoch: int = 0

    @property
    def least_epoch(self) -> int:
        """The epoch below which the rank may not match."""
        return max(self.floor, self.epoch)


#: words of an engine that answers to nobody: offline use, tests, benchmarks
ALWAYS_VALID = ControlWords()

ReadWords: TypeAlias = Callable[[], ControlWords]


def read_always_valid() -> ControlWords:
    """Words of an engine without a control plane."""
    return ALWAYS_VALID
