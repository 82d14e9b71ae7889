"""What one run is made of, drawn from its seed: sizes, times, weather, and which faults may come."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from cache.write_policy import WritePolicy
from engine.flush import FLUSH_MODES
from tests.simulation.log_writing import StoreFaults
from tests.simulation.network import Weather

#: each with its share among the faults of a run that has it
FAULTS = {
    "freeze_rank": 5, "freeze_agent": 3, "freeze_controller": 3, "kill_rank": 3, "kill_agent": 2, "kill_controller": 3,
    "second_controller": 3, "cut_off": 3, "hiccup": 2, "store_out": 2, "failing_step": 1, "lose_machine": 1,
    "lose_log": 1,
}  # fmt: skip
#: one run in this many has 64 ranks
_LARGE_EVERY = 400


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of one run."""

    num_nodes: int
    num_ranks: int
    lease_s: float
    step_grace_s: float
    #: faults and traffic come within this time
    length_s: float
    step_s: float
    share_preempted: float
    #: None: there is no host tier
    host_policy: WritePolicy | None
    num_requests: int
    num_flushes: int
    #: calls that end all running requests
    num_aborts: int
    #: modes that are asked for
    modes: tuple[str, ...]
    faults: tuple[str, ...]
    num_faults: int
    weather: Weather
    store_faults: StoreFaults

    @property
    def rest_s(self) -> float:
        """Until all is well again after the last fault: leases of earlier controllers, timeouts, restarts, a poll."""
        return 2.2 * self.lease_s + self.step_grace_s + 10.0

    @classmethod
    def draw(cls, chance: Random) -> Plan:
        is_large = chance.randrange(_LARGE_EVERY) == 0
        num_nodes = 8 if is_large else chance.choice((1, 2, 3, 3))
        is_calm = chance.random() < 0.15
        length_s = chance.choice((4.0, 7.0, 12.0))
        return cls(
            num_nodes=num_nodes,
            num_ranks=64 if is_large else chance.choice((2, 3, 4, 5)),
            lease_s=chance.choice((0.5, 1.0, 1.0, 2.0)),
            step_grace_s=chance.choice((0.3, 1.0, 2.0)),
            length_s=length_s,
            step_s=chance.choice((0.002, 0.01, 0.01, 0.08)),
            share_preempted=chance.choice((0.0, 0.02, 0.1)),
            host_policy=chance.choice((None, None, "write_back", "write_through", "write_through_selective")),
            num_requests=chance.choice((15, 30, 45)),
            num_flushes=chance.choice((3, 5, 8)),
            num_aborts=chance.choice((0, 0, 0, 3)),
            modes=tuple(chance.sample(FLUSH_MODES, chance.choice((1, 2, 5)))),
            faults=() if is_calm else tuple(chance.sample(sorted(FAULTS), chance.choice((1, 3, len(FAULTS))))),
            num_faults=0 if is_calm else chance.choice((2, 5, 9)),
            weather=_weather(chance),
            store_faults=_store_faults(chance),
        )

    def flush(self, chance: Random, number: int) -> dict[str, Any]:
        """Arguments of one flush."""
        flush_id = f"f{number}" if number < 2 or chance.random() < 0.85 else f"f{number - 2}"
        arguments: dict[str, Any] = {
            "flush_id": flush_id,
            "mode": chance.choice(self.modes),
            "timeout_s": chance.choice((0.0, 0.1, 0.5, 0.5, 2.0)),
        }
        scope = chance.choice((None,) * 7 + ({"namespace": "tenant"}, {"prefix_tokens": [1, 2]}, {"older_than_s": 0.5}))
        if scope is not None:
            arguments["scope"] = scope
        elif self.host_policy is not None and chance.random() < 0.15:
            arguments["tiers"] = ["device"]
        elif chance.random() < 0.06:
            arguments["dry_run"] = True
        return arguments


def _weather(chance: Random) -> Weather:
    return Weather(
        typical_s=chance.choice((0.0002, 0.001, 0.005)),
        share_slow=chance.choice((0.0, 0.01, 0.05)),
        slow_s=chance.choice((0.05, 0.5, 2.0)),
        share_lost=chance.choice((0.0, 0.0, 0.01, 0.04)),
        share_doubled=chance.choice((0.0, 0.1)),
    )


def _store_faults(chance: Random) -> StoreFaults:
    return StoreFaults(
        typical_s=chance.choice((0.0002, 0.002)),
        share_slow=chance.choice((0.0, 0.02, 0.1)),
        slow_s=chance.choice((0.05, 1.0)),
        share_failing=chance.choice((0.0, 0.0, 0.01, 0.05)),
        share_preempted=chance.choice((0.0, 0.02)),
    )


#: after the last fault
FAIR_WEATHER = Weather(0.001, 0.0, 0.0, 0.0, 0.0)
FAIR_STORE = StoreFaults(0.001, 0.0, 0.0, 0.0, 0.0)
