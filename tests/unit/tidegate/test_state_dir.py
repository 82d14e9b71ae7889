"""The state directory: whose it is, what must be empty, where Ray's sockets fit."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from configs.errors import ConfigError
from tidegate.state_dir import StateDir


@pytest.fixture(autouse=True)
def _temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ray's folder goes when the state directory's path is too long for its sockets; pytest's paths are."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def test_it_is_made_for_its_owner_only(tmp_path: Path) -> None:
    state = StateDir.create(tmp_path / "a" / "state")
    assert state.root.stat().st_mode & 0o777 == 0o700
    assert list(state.cwd.iterdir()) == []
    assert StateDir.create(tmp_path / "a" / "state") == state


def test_a_relative_path_and_a_link_become_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    assert StateDir.create(Path("link/state")).root == tmp_path / "real" / "state"


def test_anything_in_the_working_folder_is_refused(tmp_path: Path) -> None:
    state = StateDir.create(tmp_path)
    (state.cwd / "cache").mkdir()
    with pytest.raises(ConfigError, match="must be empty, it holds cache"):
        StateDir.create(tmp_path)


def test_a_path_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file.*Not a directory"):
        StateDir.create(tmp_path / "file" / "state")


def test_a_folder_that_is_a_link_of_somebody_is_refused(tmp_path: Path) -> None:
    state = StateDir.create(tmp_path / "state")
    state.cwd.rmdir()
    state.cwd.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder of this user"):
        StateDir.create(tmp_path / "state")


def test_ray_moves_out_when_its_sockets_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    try:
        assert StateDir.create(short).ray_temp == short / "ray"
    finally:
        shutil.rmtree(short)
    far, other = StateDir.create(tmp_path / ("d" * 60)), StateDir.create(tmp_path / ("e" * 60))
    assert far.ray_temp != other.ray_temp
    assert far.ray_temp.parent.parent == other.ray_temp.parent.parent == tmp_path / "tmp"
    assert len(far.ray_temp.parent.name) < 30
    assert far.ray_temp.parent.stat().st_mode & 0o777 == 0o700
    assert StateDir.create(tmp_path / ("d" * 60)) == far


def test_the_logs_of_the_last_two_runs_are_kept(tmp_path: Path) -> None:
    state = StateDir.create(tmp_path)
    for day in range(1, 5):
        (state.ray_temp / f"session_2026-01-0{day}" / "logs").mkdir(parents=True)
    (state.ray_temp / "session_latest").symlink_to(state.ray_temp / "session_2026-01-04")
    state.drop_old_runs()
    left = sorted(path.name for path in state.ray_temp.iterdir())
    assert left == ["session_2026-01-03", "session_2026-01-04", "session_latest"]
