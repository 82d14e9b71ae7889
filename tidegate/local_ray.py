"""A Ray cluster of its own on this machine, for as long as this process lives.

Order matters here. The process changes into an empty folder before `ray.init`: workers import from the folder in which
Ray was started, before site-packages. Its interpreter's folder is first on PATH: a job's `python` is looked up there.
And `ray.init` runs in the main thread: the kernel ends Ray's processes when the thread that started them ends.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private import parameter

from configs.errors import ConfigError, ServiceError
from configs.schema import Settings
from tidegate.state_dir import StateDir

#: logical resource of the local Ray: one per CPU rank, so that ranks and jobs do not compete for CPUs
CPU_RANK_RESOURCE = "tidegate_rank"

# Logical, not a limit: the actors of Serve, the Api and a job must be placeable on a machine with one core.
_MIN_LOGICAL_CPUS = 4
# KV pages never enter Ray's object store; this is for the user's jobs.
_OBJECT_STORE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class LocalRay:
    """Where the Ray that was started can be reached."""

    gcs_address: str
    dashboard_url: str
    token_path: Path


def prepare_process(state: StateDir) -> None:
    """What Ray and its workers inherit from this process. Before `ray.init`."""
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    os.chdir(state.cwd)
    os.environ.pop("RAY_ADDRESS", None)
    # Unset, `ray.init` turns token authentication on for its own cluster; nobody may have turned it off for ours.
    os.environ.pop("RAY_AUTH_MODE", None)
    # Ray's default of 15 starves its workers beside anything else on the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _ensure_token(os.environ)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def _ensure_token(environ: Mapping[str, str]) -> None:
    """Ray makes a missing token readable by every user of the machine; whoever has it runs code as us."""
    path = token_path(environ)
    if "RAY_AUTH_TOKEN" in environ or path.exists():
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except OSError as error:
        raise ConfigError(f"cannot write Ray's token {path}: {error.strerror}; set RAY_AUTH_TOKEN_PATH") from None


def start_ray(settings: Settings, state: StateDir) -> LocalRay:
    try:
        with _free_agent_port():
            context = ray.init(
                address="local",
                num_cpus=max(_MIN_LOGICAL_CPUS, os.cpu_count() or 1),
                resources={CPU_RANK_RESOURCE: float(settings.dp)},
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=True,
                dashboard_host=settings.ray.dashboard_host,
                dashboard_port=settings.ray.dashboard_port,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(state.ray_temp),
            )
    except (RuntimeError, ValueError, ConnectionError, TimeoutError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ServiceError(f"Ray did not start: {reason} (logs: {state.logs})") from None
    facts: dict[str, str] = context.address_info  # type: ignore[attr-defined]
    # `ray start` writes it and `ray.init` does not; without it a job may join another cluster of this machine.
    (state.ray_temp / "ray_current_cluster").write_text(facts["gcs_address"])
    return LocalRay(facts["gcs_address"], f"http://{facts['webui_url']}", token_path(os.environ))


@contextmanager
def _free_agent_port() -> Iterator[None]:
    """Have the kernel choose the port of the node's agent, which takes the jobs.

    With the default, 52365 for all, the second cluster of a machine answers "No available agent to submit job".
    `ray start` has an option for it and `ray.init` none, so its parameters (Ray is pinned to one version) get another
    default for the length of the call.
    """
    original = parameter.RayParams
    parameter.RayParams = functools.partial(original, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = original


def token_path(environ: Mapping[str, str]) -> Path:
    """The file of the token that Ray's own processes and every job must show."""
    return Path(environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
