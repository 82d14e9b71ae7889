"""The tiny model, written and loaded once for all tests of the doors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deployments.tokenizer import Tokenizer
from engine.demo_model import write_demo_model
from engine.models import load_model
from tests.unit.deployments.api_server import Demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    write_demo_model(directory, "tiny")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Demo(directory, load_model(directory, "cpu", "float32", None), Tokenizer(directory))
    torch.set_num_threads(num_threads)
