"""What the doctor says of machines that nobody here owns, and what it reads of this one."""

from __future__ import annotations

import io
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from configs.load import settings_from_dict
from configs.resolve import GIB, Hardware
from configs.schema import Settings
from tidegate import tables
from tidegate.doctor import MIB, Facts, Finding, Folder, Level, answer, examine
from tidegate.doctor_facts import connect_fault, folder_facts, read_facts, server_of

ROOMY = Folder(Path("/state"), is_writable=True, is_own=True, exists=True, mode=0o700, free_bytes=50 * GIB)
WELL = Facts(
    python=(3, 11, 7),
    packages={"torch": "2.13.0+cpu", "transformers": "5.23.0", "ray": "2.60.0", "numpy": "2.4.6"},
    requirements=tuple(map(Requirement, ("torch>=2.11", "transformers>=5.17", "ray==2.60.0", "numpy>=2.0"))),
    tested={"torch": "2.13.0", "transformers": "5.23.0", "ray": "2.60.0", "numpy": "2.4.6"},
    hardware=Hardware(8, 32 * GIB, 1, {"CPU": 8.0, "GPU": 0.0}),
    num_gpus=0,
    torch_cuda=None,
    shared_memory=replace(ROOMY, path=Path("/dev/shm"), mode=0o1777),
    state_dir=ROOMY,
    is_serving=False,
    ports={"HTTP": None, "gRPC": None},
    ray_address=None,
    ray_fault=None,
    ray_auth_mode="",
    token_mode=0o600,
    open_files=65536,
    has_pidfd=True,
)
GPUS = replace(WELL, num_gpus=2, torch_cuda="13.0", hardware=Hardware(8, 32 * GIB, 1, {"CPU": 8.0, "GPU": 2.0}))


def finding(check: str, facts: Facts, **settings: Any) -> Finding:
    (found,) = [row for row in examine(settings_from_dict(settings), facts) if row.check == check]
    return found


def test_a_machine_on_which_all_is_well() -> None:
    findings = examine(Settings(), WELL)
    assert {row.level for row in findings} == {Level.ok}
    assert all(row.advice == "" for row in findings)
    told = answer(findings)
    assert told["success"] is True
    assert told["message"] == "this machine can serve"


BROKEN: list[tuple[str, Facts, dict[str, Any], Level, str]] = [
    ("python", replace(WELL, python=(3, 10, 12)), {}, Level.failed, "3.10.12"),
    (
        "ray",
        replace(WELL, packages=dict(WELL.packages) | {"ray": "2.59.0"}),
        {},
        Level.failed,
        "does not meet ==2.60.0",
    ),
    ("torch", replace(WELL, packages=dict(WELL.packages) | {"torch": None}), {}, Level.failed, "not installed"),
    ("packages", replace(WELL, packages=dict(WELL.packages) | {"numpy": "1.26"}), {}, Level.failed, "numpy 1.26"),
    ("tested versions", replace(WELL, packages=dict(WELL.packages) | {"numpy": "2.5.0"}), {}, Level.warning, "2.4.6"),
    ("gpu", WELL, {"engine": {"device": "cuda"}}, Level.failed, "no GPU can be seen"),
    ("gpu", replace(GPUS, torch_cuda=None), {}, Level.failed, "CUDA (none)"),
    ("gpu", GPUS, {}, Level.warning, "untested"),
    ("gpu", GPUS, {"engine": {"device": "cpu"}}, Level.ok, "not used"),
    ("shape", GPUS, {"dp": 3}, Level.failed, "needs 1 GPU"),
    ("shape", WELL, {"dp": 8}, Level.warning, "8 rank(s) on cpu"),
    ("shared memory", replace(WELL, shared_memory=replace(ROOMY, free_bytes=64 * MIB)), {}, Level.warning, "64 MiB"),
    ("shared memory", WELL, {"host_tier": {"size_gb": 50}}, Level.warning, "50.0 GiB free"),
    ("shared memory", replace(WELL, shared_memory=replace(ROOMY, exists=False)), {}, Level.failed, "cannot be written"),
    ("state directory", replace(WELL, state_dir=replace(ROOMY, is_writable=False)), {}, Level.failed, "written"),
    ("state directory", replace(WELL, state_dir=replace(ROOMY, is_own=False)), {}, Level.failed, "another user"),
    ("state directory", replace(WELL, state_dir=replace(ROOMY, mode=0o755)), {}, Level.warning, "open to others"),
    ("state directory", replace(WELL, state_dir=replace(ROOMY, free_bytes=MIB)), {}, Level.warning, "1 MiB free"),
    ("port 8000 (HTTP)", replace(WELL, ports={"HTTP": "is taken"}), {}, Level.failed, "is taken"),
    ("port 9000 (gRPC)", replace(WELL, ports={"gRPC": "x"}, is_serving=True), {}, Level.ok, "a server of this"),
    ("ray cluster", replace(WELL, ray_address="a:1", ray_fault="refused"), {}, Level.warning, "a:1: refused"),
    ("ray token", replace(WELL, token_mode=0o644), {}, Level.warning, "mode 644"),
    ("ray token", replace(WELL, ray_auth_mode="disabled"), {}, Level.warning, "RAY_AUTH_MODE is disabled"),
    ("keys", WELL, {"api": {"host": "0.0.0.0"}}, Level.warning, "without api_key and admin_key"),
    ("open files", replace(WELL, open_files=1024), {}, Level.warning, "1024"),
    ("process ends", replace(WELL, has_pidfd=False), {}, Level.warning, "no pidfd"),
]


@pytest.mark.parametrize(("check", "facts", "settings", "level", "words"), BROKEN)
def test_what_is_amiss_is_named_with_a_way_out(
    check: str, facts: Facts, settings: dict[str, Any], level: Level, words: str
) -> None:
    row = finding(check, facts, **settings)
    assert row.level is level
    assert words in row.found
    assert bool(row.advice) is (level is not Level.ok)
    assert answer([row])["success"] is (level is not Level.failed)


def test_keys_that_are_set_are_never_shown() -> None:
    row = finding("keys", WELL, api={"host": "0.0.0.0", "api_key": "user-secret", "admin_key": "admin-secret"})
    assert row == Finding("keys", Level.ok, "both are set")


def test_the_table_holds_every_check_and_every_advice() -> None:
    console = Console(width=300, file=io.StringIO())
    told = answer(examine(Settings(), replace(WELL, python=(3, 10, 0), open_files=64)))
    console.print(tables.doctor(told))
    text = cast("io.StringIO", console.file).getvalue()
    assert "1 of 17 checks failed, 1 warning" in text
    for row in told["findings"]:
        assert row["check"] in text
        assert row["advice"] in text


def test_this_machine_is_read_and_left_as_it_was(tmp_path: Path) -> None:
    root = tmp_path / "state"
    settings = settings_from_dict({"state_dir": str(root), "api": {"port": 0}, "grpc": {"port": 0}})
    facts = read_facts(settings, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none"), "CUDA_VISIBLE_DEVICES": ""})
    assert facts.python == sys.version_info[:3]
    assert facts.num_gpus == 0
    assert facts.token_mode is None
    assert facts.ray_address is None
    assert facts.ports == {"HTTP": None, "gRPC": None}
    assert not facts.is_serving
    assert not root.exists()
    by_check = {row.check: row for row in examine(settings, facts)}
    assert {"llguidance", "packaging"} <= set(facts.packages)
    for check in ("python", "ray", "torch", "transformers", "packages"):
        assert by_check[check].level is Level.ok, by_check[check]


def test_a_taken_port_and_a_port_nobody_has_are_told_apart(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        settings = settings_from_dict({"state_dir": str(tmp_path), "api": {"port": port}, "grpc": {"server": "off"}})
        facts = read_facts(settings, {"RAY_ADDRESS": f"127.0.0.1:{port}"})
        assert "is taken by another process" in str(facts.ports["HTTP"])
        assert facts.ray_fault is None
    assert "does not answer" in str(connect_fault(f"127.0.0.1:{port}"))
    assert "no host:port" in str(connect_fault("auto"))


def test_a_folder_that_is_not_there_is_judged_by_the_one_above(tmp_path: Path) -> None:
    folder = folder_facts(tmp_path / "a" / "b")
    assert not folder.exists
    assert folder.is_writable
    (tmp_path / "file").write_text("")
    assert not folder_facts(tmp_path / "file" / "below").is_writable


def test_a_lock_file_of_an_ended_server_holds_nobody(tmp_path: Path) -> None:
    lock = tmp_path / "server.lock"
    assert server_of(tmp_path) is None
    lock.write_text("1 999999999999")
    assert server_of(tmp_path) is None
