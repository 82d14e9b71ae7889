"""What `tidegate doctor` looks at, read from this machine once. Starts nothing, and leaves nothing behind."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import resource
import shutil
import socket
import stat
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from actors.process_proof import start_time_of
from configs.errors import ConfigError
from configs.resolve import Hardware
from configs.schema import Settings
from tidegate import ports
from tidegate.doctor import Facts, Folder
from tidegate.state_dir import ray_temp_of

#: of a checkout; an installed package has neither
_CHECKOUT = Path(__file__).resolve().parent.parent
_CONNECT_S = 2.0


def read_facts(settings: Settings, environ: Mapping[str, str]) -> Facts:
    """Everything that `examine` asks for. environ: of this process, for CUDA_VISIBLE_DEVICES and Ray's variables."""
    # Ray comes with them: a second that no other command needs
    from deployments.hardware import count_gpus, this_node
    from tidegate.local_ray import CPU_RANK_RESOURCE, token_path

    requirements = _requirements(_CHECKOUT / "pyproject.toml")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    root = settings.resolved_state_dir.expanduser()
    address = environ.get("RAY_ADDRESS") or _written_address(root)
    shared_dir = settings.control.shared_dir
    own = {CPU_RANK_RESOURCE: float(settings.dp)}
    hardware: Hardware = this_node(own, visible, shared_dir if shared_dir.is_dir() else None)
    return Facts(
        python=sys.version_info[:3],
        packages={requirement.name: _version(requirement.name) for requirement in requirements},
        requirements=requirements,
        tested=_tested_versions(_CHECKOUT / "constraints.txt"),
        hardware=hardware,
        num_gpus=count_gpus(visible),
        torch_cuda=_torch_cuda(),
        shared_memory=folder_facts(shared_dir),
        state_dir=folder_facts(root),
        is_serving=server_of(root) is not None,
        ports=_port_faults(settings),
        ray_address=address,
        ray_fault=None if address is None else connect_fault(address),
        ray_auth_mode=environ.get("RAY_AUTH_MODE", ""),
        token_mode=_mode(token_path(environ)),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        has_pidfd=_has_pidfd(),
    )


def folder_facts(path: Path) -> Folder:
    """How this process may use `path`, which need not exist."""
    nearest = next(candidate for candidate in (path, *path.absolute().parents) if candidate.exists())
    facts = nearest.stat()
    return Folder(
        path=path,
        is_writable=nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
        is_own=facts.st_uid == os.getuid(),
        exists=nearest == path,
        mode=stat.S_IMODE(facts.st_mode) if nearest == path else 0,
        free_bytes=shutil.disk_usage(nearest).free,
    )


def server_of(root: Path) -> int | None:
    """Pid of the living server that uses this state directory; see tidegate/cleanup.py for who writes the file."""
    try:
        pid, _, start_time = (root / "server.lock").read_text().partition(" ")
    except OSError:
        return None
    is_alive = start_time.isdigit() and start_time_of(int(pid)) == int(start_time)
    return int(pid) if is_alive else None


def connect_fault(address: str) -> str | None:
    """None if somebody listens at `host:port` (a `ray://` before it is allowed), else why not, in words."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return "is no host:port; nothing was asked"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            return None
    except OverflowError:
        return "has no such port"
    except OSError as error:
        return f"does not answer ({error.strerror or error})"


def _requirements(project: Path) -> tuple[Requirement, ...]:
    """What the package asks for; development tools are no part of it.

    project: pyproject.toml of a checkout, which may have gone on since it was installed.
    """
    try:
        if project.is_file():
            lines = tomllib.loads(project.read_text())["project"]["dependencies"]
        else:
            lines = importlib.metadata.requires("tidegate") or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("the package tidegate is not installed here: pip install -c constraints.txt -e .") from None
    wanted = [requirement for requirement in map(Requirement, lines) if requirement.marker is None]
    for requirement in wanted:
        requirement.name = canonicalize_name(requirement.name)
    return tuple(wanted)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tested_versions(constraints: Path) -> dict[str, str]:
    if not constraints.is_file():
        return {}
    lines = (line.partition("#")[0].strip().partition("==") for line in constraints.read_text().splitlines())
    return {canonicalize_name(name): version for name, separator, version in lines if separator}


def _torch_cuda() -> str | None:
    """Read from torch's own file of facts: importing torch takes seconds and may itself be what is broken."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        return None
    facts = Path(found.origin).with_name("version.py")
    for line in facts.read_text().splitlines() if facts.is_file() else ():
        name, _, value = line.partition("=")
        if name.partition(":")[0].strip() == "cuda":
            value = value.strip().strip("'\"")
            return None if value == "None" else value
    return None


def _port_faults(settings: Settings) -> dict[str, str | None]:
    doors = {"HTTP": (settings.api.host, settings.api.port)}
    if settings.grpc.server != "off":
        doors["gRPC"] = ("127.0.0.1", settings.grpc.port)
    return {door: _port_fault(host, port, door) for door, (host, port) in doors.items()}


def _port_fault(host: str, port: int, door: str) -> str | None:
    try:
        ports.settle(host, port, door, "another port")
    except ConfigError as error:
        return error.message.partition(": ")[2].partition("; ")[0]
    except OSError as error:  # the address cannot be looked up
        return f"{host} is no address of this machine: {error.strerror or error}"
    return None


def _written_address(root: Path) -> str | None:
    """Where the server of this state directory has its Ray; what an ended one has left says nothing."""
    if server_of(root) is None:
        return None
    try:
        return (ray_temp_of(root.resolve()) / "ray_current_cluster").read_text().strip() or None
    except OSError:
        return None


def _mode(path: Path) -> int | None:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None


def _has_pidfd() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True
