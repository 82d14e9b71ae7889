"""The worst place to start a server: foreign packages of our names, no activated venv, SIGINT ignored, another cluster.

Kept for ever: each line here once broke a real start (docs/operations.md).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from tests.cluster.server import MARK, Server, marked_processes, until
from tests.cluster.test_flush import submit_job
from tests.cluster.test_ranks_die import ranks_of

OTHER_CLUSTER = """
import sys, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 * 1024 * 1024)
print("UP", flush=True)
sys.stdin.read()
"""


def _hostile_folder(folder: Path) -> Path:
    for package in ("cache", "actors", "configs", "engine", "deployments"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(f'raise RuntimeError("the foreign {package} was imported")\n')
    return folder


def _ignore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_a_hostile_start(tiny_model: Path, short_home: Path, tmp_path: Path) -> None:
    home = short_home / "hostile"
    home.mkdir()
    keys = ("--api-key", "user-key-1", "--admin-key", "admin-key-1")
    # PATH without the venv: nothing was activated
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    cwd = _hostile_folder(home / "foreign")
    server = Server(home, "--model", str(tiny_model), "--dp", "2", *keys, cwd=cwd, env=env)
    other_env = os.environ | {MARK: f"other-{server.mark}"}
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env=other_env,
    )
    try:
        assert other.stdout is not None
        until(lambda: other.stdout is not None and b"UP" in other.stdout.readline(), 60, "the other cluster is up")
        server.start(preexec=_ignore_sigint)
        _keys_are_asked_for(server)
        _every_rank_survives_its_kill(server)
        answers = submit_job(server, tmp_path / "job")
        assert answers["flush"]["success"] is True
        assert "Traceback" not in server.log
        server.stop(signal.SIGINT)
        assert server.leftovers() == []
        # the second start works at once, and SIGKILL of the command leaves nothing either
        server.start(preexec=_ignore_sigint)
        assert server.process is not None
        server.process.kill()
        until(lambda: not marked_processes(server.mark), 10, "everything is gone after SIGKILL of the command")
        server.process.wait(timeout=10)
        assert server.leftovers() == []
    finally:
        server.close()
        # the end of its input ends it; SIGKILL would leave Ray's agents behind for a minute
        other.communicate(timeout=30)
        until(lambda: not marked_processes(f"other-{server.mark}"), 20, "the other cluster is gone")


def _keys_are_asked_for(server: Server) -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    user, admin = {"authorization": "Bearer user-key-1"}, {"authorization": "Bearer admin-key-1"}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/health").status_code == 200
        assert client.post("/v1/chat/completions", json=chat).status_code == 401
        assert client.post("/v1/chat/completions", json=chat, headers=user).status_code == 200
        assert client.post("/flush_cache?timeout=10").status_code == 401
        assert client.post("/flush_cache?timeout=10", headers=user).status_code == 403
        assert client.post("/flush_cache?timeout=10", headers=admin).status_code == 200
        info = client.get("/server_info", headers=user).text
        assert "user-key-1" not in info
        assert "admin-key-1" not in info


def _every_rank_survives_its_kill(server: Server) -> None:
    admin = {"authorization": "Bearer admin-key-1"}
    with httpx.Client(base_url=server.url, timeout=60, headers=admin) as client:
        for number in range(2):
            victim = next(rank for rank in ranks_of(client) if rank["rank"] == number)
            os.kill(victim["pid"], signal.SIGKILL)

            def returned(gone: str = victim["incarnation"]) -> bool:
                living = {rank["incarnation"] for rank in ranks_of(client)}
                return len(living) == 2 and gone not in living

            until(returned, 60, f"rank {number} is back")
        assert client.get("/v1/cache").json()["controller_restarts"] == 0
        assert client.post("/v1/cache/flush", json={"timeout_s": 20}).status_code == 200
