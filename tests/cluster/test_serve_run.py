"""`serve run configs/demo.yaml`, Ray Serve's own command on the shipped file: it serves, flushes and ends clean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml

from tests.cluster.server import START_TIMEOUT_S, Server, marked_processes, until

ROOT = Path(__file__).parents[2]


def _own_config(server: Server, model: Path) -> Path:
    """The shipped file with the tiny model and ports and folders of this test's own."""
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config["http_options"]["port"] = server.port
    settings = config["applications"][0]["args"]
    settings["api"]["port"] = server.port
    settings |= {
        "dp": 1,
        "model": {"path": str(model), "served_name": "tiny"},
        "grpc": {"port": server.grpc_port},
        "state_dir": str(server.state_dir),
    }
    path = server.home / "demo.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _is_healthy(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def _take_sigint() -> None:
    """Ray's command ends by KeyboardInterrupt only, and a test run started with `&` inherits an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _serve_run(server: Server, config: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(Path(sys.executable).parent / "serve"), "run", str(config)]
    # a short temporary folder of Ray's own: nothing may attach to a cluster that runs there already
    env = server.env | {"RAY_TMPDIR": str(server.home)}
    with server.log_path.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            preexec_fn=_take_sigint,
        )  # fmt: skip
    server.process = process
    try:
        until(lambda: process.poll() is not None or _is_healthy(server), START_TIMEOUT_S, f"ready\n{server.log}")
        assert process.poll() is None, server.log
        yield process
    finally:
        server.close()


def test_the_shipped_config_serves_flushes_and_ends(tiny_model: Path, short_home: Path) -> None:
    home = short_home / "run"
    home.mkdir()
    server = Server(home)
    with _serve_run(server, _own_config(server, tiny_model)) as process:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
            said = client.post("/v1/chat/completions", json=chat)
            assert said.status_code == 200, said.text
            assert said.json()["usage"]["completion_tokens"] > 0
            flushed = client.post("/v1/cache/flush", json={"timeout_s": 20})
            assert flushed.status_code == 200, flushed.text
            assert [row["status"] for row in flushed.json()["ranks"]] == ["flushed"]
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 0, server.log
        until(lambda: not marked_processes(server.mark), 30, f"nothing left: {marked_processes(server.mark)}")
        assert server.leftovers() == []
