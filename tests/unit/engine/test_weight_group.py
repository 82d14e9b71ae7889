"""Weights over a real gloo group: a trainer in a process of its own, and groups that never come together."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from configs.errors import Conflict, ControlUnavailable, InvalidField, UnknownResource, WeightsRejected
from engine.weight_group import GroupSettings, WeightGroups
from engine.weight_sources import FlatTensor, flatten, unflatten
from tests.unit.engine.weight_models import same_bytes

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7), "c": torch.ones(3).bfloat16()}
TABLE = flatten(TENSORS.items()).tensors
CPU = torch.device("cpu")
#: broadcasts the tensors singly, then in one bucket, then goes away without a word
TRAINER = """
import sys, torch
from engine.weight_group import GroupSettings, WeightGroups
from engine.weight_sources import flatten
tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7), "c": torch.ones(3).bfloat16()}
groups = WeightGroups()
groups.join(GroupSettings("weights", "127.0.0.1", int(sys.argv[1]), 0, 2, timeout_s=30.0))
groups.send("weights", tensors.items())
groups.send("weights", [("bucket", flatten(tensors.items()).data)])
sys.stdin.readline()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def groups() -> Iterator[WeightGroups]:
    groups = WeightGroups()
    yield groups
    groups.close()


def settings(port: int, timeout_s: float = 30.0) -> GroupSettings:
    return GroupSettings("weights", "127.0.0.1", port, 1, 2, timeout_s=timeout_s)


def test_singly_in_a_bucket_and_not_at_all(groups: WeightGroups) -> None:
    port = free_port()
    root = Path(__file__).parents[3]
    with subprocess.Popen([sys.executable, "-c", TRAINER, str(port)], stdin=subprocess.PIPE, cwd=root) as trainer:
        groups.join(settings(port))
        with pytest.raises(Conflict):
            groups.join(settings(port))
        assert same_bytes(dict(groups.receive("weights", TABLE, CPU)), TENSORS)
        assert same_bytes(dict(unflatten(groups.receive_bucket("weights", TABLE, CPU))), TENSORS)

        trainer.communicate(b"\n", timeout=30)
        with pytest.raises(WeightsRejected, match="did not come"):
            list(groups.receive("weights", TABLE, CPU))
    assert trainer.returncode == 0
    assert groups.names == ()


def test_a_group_that_never_comes_together(groups: WeightGroups) -> None:
    with pytest.raises(ControlUnavailable, match=r"within 0\.2 s"):
        groups.join(settings(free_port(), timeout_s=0.2))
    assert groups.names == ()


def test_groups_that_are_not_there(groups: WeightGroups) -> None:
    with pytest.raises(UnknownResource):
        groups.leave("weights")
    with pytest.raises(UnknownResource):
        list(groups.receive("weights", TABLE, CPU))


@pytest.mark.parametrize(
    "bad",
    [
        GroupSettings("", "127.0.0.1", 1234, 1, 2),
        GroupSettings("g", "127.0.0.1", 0, 1, 2),
        GroupSettings("g", "127.0.0.1", 1234, 2, 2),
        GroupSettings("g", "127.0.0.1", 1234, 0, 1),
    ],
)
def test_settings_that_make_no_group(groups: WeightGroups, bad: GroupSettings) -> None:
    with pytest.raises(InvalidField):
        groups.join(bad)


def test_a_dtype_that_torch_does_not_know(groups: WeightGroups) -> None:
    with pytest.raises(WeightsRejected):
        list(groups.receive("weights", [FlatTensor("a", (1,), "float7", 0, 1)], CPU))
