"""The proof that a process is gone, on real processes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from actors.process_proof import ProcessProof, start_time_of


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def _proof(pid: int) -> ProcessProof:
    start_time = start_time_of(pid)
    assert start_time is not None
    proof = ProcessProof.open(pid, start_time)
    assert proof is not None
    return proof


def test_a_living_process_is_not_gone_even_when_frozen(child: subprocess.Popen[bytes]) -> None:
    proof = _proof(child.pid)
    os.kill(child.pid, signal.SIGSTOP)
    assert not proof.is_gone()
    os.kill(child.pid, signal.SIGCONT)
    assert not proof.is_gone()
    proof.close()
    proof.close()


def test_a_killed_process_is_gone_before_anybody_has_reaped_it(child: subprocess.Popen[bytes]) -> None:
    proof = _proof(child.pid)
    pidfd = proof.fileno()
    assert pidfd is not None
    child.kill()
    assert select.select([pidfd], [], [], 10)[0] == [pidfd]
    assert proof.is_gone()
    assert start_time_of(child.pid) is None
    proof.close()


def test_without_pidfds_proc_proves_the_end(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise PermissionError(pid)

    monkeypatch.setattr(os, "pidfd_open", refuse)
    proof = _proof(child.pid)
    assert proof.fileno() is None
    assert not proof.is_gone()
    child.kill()
    child.wait(timeout=10)
    assert proof.is_gone()


def test_another_start_time_is_another_process(child: subprocess.Popen[bytes]) -> None:
    start_time = start_time_of(child.pid)
    assert start_time is not None
    assert ProcessProof.open(child.pid, start_time - 1) is None


def test_no_process_no_proof() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=10)
    assert ProcessProof.open(process.pid, 1) is None
    assert start_time_of(process.pid) is None
