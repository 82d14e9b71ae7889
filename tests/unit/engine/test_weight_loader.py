"""A rank's update from the order to the tokens: desk, loader and a real model together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
from torch import Tensor

from configs.errors import Conflict
from engine.flush import Blockers
from engine.weight_desk import WeightDesk
from engine.weight_intake import StageOptions
from engine.weight_loader import Payload, WeightLoader
from engine.weight_sources import NamedTensors, read_directory
from engine.weight_update import (
    AbortTold,
    Answer,
    Commit,
    CommitDone,
    Drop,
    Event,
    PrepareCommand,
    PrepareTold,
    RankUpdate,
    Stage,
    Staged,
    StagingFailed,
    Turn,
)
from tests.models import write_random_model
from tests.unit.engine.weight_models import Served, plain_greedy, same_bytes, tensors_in

WAIT_S = 20.0


class Rank:
    """What the engine loop does for weights, turn by turn."""

    def __init__(self, directory: Path) -> None:
        self.served = Served(directory)
        self.events: SimpleQueue[Staged | StagingFailed] = SimpleQueue()
        self.loader = WeightLoader(self.served.live, self.events.put)
        self.desk = WeightDesk(self.served.live.facts.digest, self.served.live.facts.version)
        self.answers: list[RankUpdate] = []

    def say(self, event: Event) -> None:
        for command in self.desk.handle(event, 0.0):
            match command:
                case Stage(told):
                    self.loader.stage(told)
                case Drop(index):
                    self.loader.drop(index)
                case Commit(index, _, version, _):
                    self.loader.commit(index, version)
                    self.say(CommitDone(index))
                case Answer(answer):
                    self.answers.append(answer)

    def prepare(self, index: int, payload: NamedTensors, options: StageOptions | None = None) -> None:
        self.loader.offer(index, Payload(lambda: payload, options or StageOptions()))
        self.say(PrepareTold(PrepareCommand(f"u{index}", index, 1, version=f"v{index}"), 60.0, 90.0))

    def loaded(self) -> None:
        self.say(self.events.get(timeout=WAIT_S))
        self.turn()

    def turn(self, floor: int = 0) -> None:
        self.say(Turn(floor, True, Blockers()))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("old"), "qwen3", seed=0)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("new"), "qwen3", seed=1)


@pytest.fixture
def rank(old: Path) -> Iterator[Rank]:
    rank = Rank(old)
    yield rank
    rank.loader.close()
    assert not any(thread.name == "weights" for thread in threading.enumerate())


def test_from_the_order_to_the_tokens(rank: Rank, old: Path, new: Path) -> None:
    rank.prepare(7, read_directory(new))
    rank.loaded()
    assert rank.answers[-1].status == "prepared"
    assert rank.served.greedy() == plain_greedy(old)
    rank.turn(floor=7)
    assert rank.answers[-1].status == "committed"
    assert rank.answers[-1].digest == rank.served.live.facts.digest
    assert rank.served.greedy() == plain_greedy(new)
    assert (rank.desk.record, rank.served.live.facts.version) == (7, "v7")

    rank.prepare(9, read_directory(old))
    rank.loaded()
    rank.turn(floor=9)
    assert rank.served.greedy() == plain_greedy(old)


def test_a_misfit_is_a_no_with_its_reason(rank: Rank, new: Path) -> None:
    before = rank.served.bytes()
    rank.prepare(7, [("model.norm.weight", tensors_in(new)["model.norm.weight"])])
    rank.loaded()
    assert rank.answers[-1].status == "refused"
    assert "did not come" in rank.answers[-1].message
    assert same_bytes(rank.served.bytes(), before)


def test_a_source_that_breaks_is_a_no(rank: Rank, new: Path, caplog: pytest.LogCaptureFixture) -> None:
    def breaking() -> Iterator[tuple[str, Tensor]]:
        yield next(iter(tensors_in(new).items()))
        raise ConnectionError("the trainer is gone")

    rank.prepare(7, breaking())
    rank.loaded()
    assert (rank.answers[-1].status, "ConnectionError" in rank.answers[-1].message) == ("refused", True)
    assert "the trainer is gone" in caplog.text


def test_an_update_without_its_weights(rank: Rank) -> None:
    rank.say(PrepareTold(PrepareCommand("u7", 7, 1), 60.0, 90.0))
    rank.loaded()
    assert rank.answers[-1].status == "refused"


def test_an_abort_frees_what_is_staged(rank: Rank, new: Path) -> None:
    rank.prepare(7, read_directory(new))
    rank.loaded()
    rank.say(AbortTold("u7", 7, 1))
    assert rank.answers[-1].status == "aborted"
    with pytest.raises(Conflict, match="no weights are staged"):
        rank.loader.commit(7, None)


def test_an_update_that_is_dropped_while_it_loads_ends_at_the_next_tensor(rank: Rank, new: Path) -> None:
    tensors = tensors_in(new)
    begun, go_on = threading.Event(), threading.Event()
    taken: list[str] = []

    def slow() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            taken.append(name)
            yield name, tensor
            begun.set()
            assert go_on.wait(WAIT_S)

    rank.prepare(7, slow())
    assert begun.wait(WAIT_S)
    # a newer one takes its place; the thread is free for it as soon as the source gives way
    rank.prepare(9, read_directory(new))
    go_on.set()
    rank.loaded()
    assert [(answer.index, answer.status) for answer in rank.answers] == [(7, "aborted"), (9, "prepared")]
    assert len(taken) == 2
    rank.turn(floor=9)
    assert rank.served.greedy() == plain_greedy(new)
