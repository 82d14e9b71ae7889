"""A real `tidegate serve` for the length of a benchmark, in processes of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import yaml

from engine.demo_model import DemoSize, write_demo_model

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 30.0


@contextmanager
def serving(num_ranks: int, model: DemoSize, settings: dict[str, Any]) -> Iterator[str]:
    """The address of a server with `num_ranks` ranks of a demo model; nothing of it is left at the end.

    settings: what differs from the defaults, as in a configuration file.
    """
    home = Path(tempfile.mkdtemp(prefix="tgb-"))
    try:
        write_demo_model(home / "model", model)
        (home / "config.yaml").write_text(yaml.safe_dump(settings))
        port = _free_port()
        command = [
            str(Path(sys.executable).parent / "tidegate"), "serve", "--model", str(home / "model"),
            "--dp", str(num_ranks), "--config", str(home / "config.yaml"), "--state-dir", str(home / "state"),
            "--port", str(port), "--grpc-port", str(_free_port()), "--dashboard-port", str(_free_port()),
        ]  # fmt: skip
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        with (home / "serve.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=home, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, url, home / "serve.log")
            yield url
        finally:
            _stop(process)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server is not ready:\n{log.read_text(errors='replace')}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
