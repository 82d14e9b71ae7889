"""One real server for the tests that leave it as it was; tests that kill or configure start their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine.demo_model import write_demo_model
from tests.cluster.server import Server, serving


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder starts a real cluster; the hook is given the items of all folders."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny demo checkpoint, float32."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    write_demo_model(directory, "tiny")
    return directory


@pytest.fixture(scope="session")
def short_home() -> Iterator[Path]:
    """A folder with a short path: a socket's path may have 107 bytes, pytest's own folders are long."""
    home = Path(tempfile.mkdtemp(prefix="tg-"))
    yield home
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def server(tiny_model: Path, short_home: Path) -> Iterator[Server]:
    """Two ranks of the tiny model behind the real command."""
    home = short_home / "main"
    home.mkdir()
    with serving(home, "--model", str(tiny_model), "--dp", "2") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as session:
        yield session
