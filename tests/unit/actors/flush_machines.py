"""A flush machine with a memory of what it wanted, among nodes as a test says they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from actors import flush_events as events
from actors.flush_events import Command, Event
from actors.flush_machine import FlushMachine
from actors.flush_plan import FlushPlan
from actors.flush_request import FlushLimits, parse_flush
from actors.flush_run import Answer, FlushRun
from actors.messages import HostReport, RankRecord
from engine.flush import FlushVerdict
from tests.unit.actors.fakes import LIMITS, rank_record

START_S = 100.0
SLACK_S = 0.05
#: after the deadline: the answer leaves then whatever happens, and verdicts are waited for until then
ANSWERED_S = 0.9 * SLACK_S
COLLECTED_S = 0.55 * ANSWERED_S
INDEX = 7

T = TypeVar("T")


@dataclass
class TestNodes:
    """Nodes as a test says they are."""

    __test__ = False

    fenced: set[str] = field(default_factory=set)
    over_s: dict[str, float] = field(default_factory=dict)
    unheard: set[str] = field(default_factory=set)
    hosts: dict[str, HostReport] = field(default_factory=dict)
    floors: dict[str, int] = field(default_factory=dict)

    def is_fenced(self, record: RankRecord, epoch: int) -> bool:
        return record.node_id in self.fenced

    def lease_over_s(self, node_id: str) -> float:
        return self.over_s.get(node_id, math.inf)

    def boot_s(self, node_id: str, now_s: float) -> float | None:
        return None if node_id in self.unheard else now_s

    def host(self, node_id: str) -> HostReport | None:
        return self.hosts.get(node_id)

    def host_nodes(self) -> list[str]:
        return sorted(self.hosts)

    def floor_on(self, node_id: str) -> int:
        return self.floors.get(node_id, 0)


def record_of(rank: int, node: str | None = None) -> RankRecord:
    """Rank n lives on node n unless told otherwise."""
    return replace(rank_record(rank), node_id=node or f"node-{rank}")


class Flush:
    """A machine with a memory of what it wanted."""

    def __init__(
        self, *ranks: int, nodes: TestNodes | None = None, limits: FlushLimits = LIMITS, **arguments: Any
    ) -> None:
        self.nodes = nodes or TestNodes()
        request = parse_flush({"flush_id": "f"} | arguments, limits, make_id=lambda: "drawn")
        self.plan = FlushPlan.of(request, limits, START_S, SLACK_S)
        self.machine = FlushMachine(self.plan, FlushRun(request, "then", START_S), self.nodes, ["host"])
        self.now_s = START_S
        self.wanted: list[Command] = []
        self._take(self.machine.begin([record_of(rank) for rank in ranks], self.now_s))

    def _take(self, commands: list[Command]) -> list[Command]:
        self.wanted += commands
        return commands

    def say(self, event: Event, at_s: float | None = None) -> list[Command]:
        self.now_s = self.now_s if at_s is None else START_S + at_s
        return self._take(self.machine.handle(event, self.now_s))

    def pass_time(self, at_s: float) -> list[Command]:
        return self.say(events.TimePassed(), at_s)

    def stored(self) -> list[Command]:
        """The intent is in the log."""
        return self.say(events.IntentStored(INDEX))

    def answer_of(self, rank: int, status: str, **facts: Any) -> list[Command]:
        verdict = FlushVerdict("f", status, **facts)  # type: ignore[arg-type]
        return self.say(events.RankAnswered(f"incarnation-{rank}", verdict))

    def raised(self, *nodes: int, fences: bool = True) -> list[Command]:
        commands: list[Command] = []
        for node in nodes:
            if fences:
                self.nodes.fenced.add(f"node-{node}")
            commands += self.say(events.FloorSettled(f"node-{node}"))
        return commands

    def all(self, kind: type[T]) -> list[T]:
        return [command for command in self.wanted if isinstance(command, kind)]

    @property
    def told(self) -> list[int]:
        return [command.record.rank for command in self.all(events.TellRank)]

    @property
    def answer(self) -> Answer:
        (give,) = self.all(events.Give)
        return give.answer

    @property
    def outcome(self) -> Any:
        (store,) = self.all(events.StoreOutcome)
        return store.outcome

    @property
    def given(self) -> list[str]:
        return [row["status"] for row in self.answer["ranks"]]

    @property
    def statuses(self) -> list[str]:
        return [row["status"] for row in self.outcome.answer["ranks"]]

    @property
    def wake_s(self) -> float | None:
        wake_s = self.machine.wake_s
        return None if wake_s is None else round(wake_s - START_S, 9)


def kinds(commands: list[Command]) -> list[type]:
    return [type(command) for command in commands]
