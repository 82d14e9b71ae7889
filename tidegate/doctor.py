"""`tidegate doctor`: can this machine serve with these settings, and if not, what is to be done.

Pure: `examine(settings, facts)` looks at what `tidegate.doctor_facts` has read, so that every machine that nobody here
owns can be tested as plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from configs.errors import ConfigError
from configs.resolve import GIB, Hardware, is_loopback, resolve
from configs.schema import Settings

MIB = 1024**2
#: what the local start gives Ray's object store; it lies in /dev/shm
OBJECT_STORE_BYTES = 256 * MIB
#: control pages, sockets and what Ray adds beside its object store
_SHARED_MEMORY_REST = 64 * MIB
#: Ray's logs of a run, the demo model, the control log
_STATE_BYTES = 1 * GIB
#: a rank, an Api with 1000 streams and Ray's own connections
_MIN_OPEN_FILES = 4096
#: these are shown each in a row of their own
_SHOWN_PACKAGES = ("torch", "transformers", "ray")


class Level(StrEnum):
    ok = "ok"
    #: it serves, with something that an operator should know
    warning = "warning"
    #: it will not serve
    failed = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was looked at, what was found, and what to do about it ("" where nothing is to be done)."""

    check: str
    level: Level
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder as this process may use it."""

    path: Path
    #: the folder, or the nearest one above it that exists, can be written
    is_writable: bool
    #: it, or that one above it, belongs to this user
    is_own: bool
    exists: bool
    #: permission bits, 0 when it does not exist
    mode: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is on this machine, read once."""

    python: tuple[int, int, int]
    #: installed version by distribution name; None: not installed
    packages: Mapping[str, str | None]
    #: what Tidegate's own package asks for
    requirements: tuple[Requirement, ...]
    #: exact versions of constraints.txt, with which the tests ran; empty outside a checkout
    tested: Mapping[str, str]
    hardware: Hardware
    #: names of the GPUs that the kernel driver knows and CUDA_VISIBLE_DEVICES leaves
    num_gpus: int
    #: version of CUDA that torch was built for; None: a CPU build
    torch_cuda: str | None
    shared_memory: Folder
    state_dir: Folder
    #: a server holds the state directory
    is_serving: bool
    #: by door ("HTTP", "gRPC"): None if it can be listened on, else the reason
    ports: Mapping[str, str | None]
    #: address of a Ray cluster: RAY_ADDRESS, or the one a server of this state directory has written down
    ray_address: str | None
    #: None: somebody listens there, else the reason
    ray_fault: str | None
    #: value of RAY_AUTH_MODE; "" when not set
    ray_auth_mode: str
    #: permission bits of Ray's token file; None when there is none yet
    token_mode: int | None
    open_files: int
    #: the kernel has pidfds, by which the end of a process is proven
    has_pidfd: bool


def examine(settings: Settings, facts: Facts) -> list[Finding]:
    """Every check, in the order in which a start would meet them."""
    findings = [_python(facts), *_packages(facts), _tested(facts), _gpu(settings, facts), _shape(settings, facts)]
    findings += [_shared_memory(settings, facts), _state_dir(facts), *_ports(settings, facts)]
    findings += [_ray(facts), _token(facts), _keys(settings), _open_files(facts), _processes(facts)]
    return findings


def answer(findings: list[Finding]) -> dict[str, Any]:
    """The findings as JSON: `success` unless one of them keeps the server from serving."""
    failed = sum(finding.level is Level.failed for finding in findings)
    warnings = sum(finding.level is Level.warning for finding in findings)
    message = f"{failed} of {len(findings)} checks failed" if failed else "this machine can serve"
    if warnings:
        message += f", {warnings} warning{'s' if warnings > 1 else ''}"
    rows = [
        {"check": finding.check, "status": finding.level.value, "found": finding.found, "advice": finding.advice}
        for finding in findings
    ]
    return {"success": failed == 0, "message": message, "findings": rows}


def _python(facts: Facts) -> Finding:
    found = ".".join(str(part) for part in facts.python)
    if facts.python < (3, 11, 0):
        return Finding("python", Level.failed, found, "install Python 3.11 or newer and make the environment anew")
    return Finding("python", Level.ok, found)


def _packages(facts: Facts) -> list[Finding]:
    """A row for each of the large ones, one for the rest."""
    rows: list[Finding] = []
    rest: list[str] = []
    for requirement in facts.requirements:
        fault = _fault(requirement, facts.packages.get(requirement.name))
        if requirement.name in _SHOWN_PACKAGES:
            found = fault or str(facts.packages[requirement.name])
            rows.append(_package(requirement.name, found, fault))
        elif fault:
            rest.append(f"{requirement.name} {fault}")
    count = f"{len(facts.requirements) - len(rows)} others as required"
    rows.append(_package("packages", "; ".join(rest) or count, "; ".join(rest)))
    return rows


def _package(check: str, found: str, fault: str | None) -> Finding:
    advice = "install again: pip install -c constraints.txt -e ." if fault else ""
    return Finding(check, Level.failed if fault else Level.ok, found, advice)


def _fault(requirement: Requirement, version: str | None) -> str | None:
    if version is None:
        return f"not installed, {requirement.specifier} is needed"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{version} does not meet {requirement.specifier}"


def _tested(facts: Facts) -> Finding:
    """Versions that fit may still be others than those the tests ran with."""
    if not facts.tested:
        return Finding("tested versions", Level.ok, "no constraints.txt here to compare with")
    other = [
        f"{requirement.name} {facts.packages[requirement.name]} (tested: {facts.tested[requirement.name]})"
        for requirement in facts.requirements
        if requirement.name in facts.tested
        and facts.packages.get(requirement.name) is not None
        and _release(str(facts.packages[requirement.name])) != facts.tested[requirement.name]
    ]
    if other:
        return Finding("tested versions", Level.warning, "; ".join(other), "pip install -c constraints.txt -e .")
    return Finding("tested versions", Level.ok, "as in constraints.txt")


def _release(version: str) -> str:
    """Without the local part: 2.13.0+cpu and 2.13.0+cu130 are builds of the same release."""
    return version.partition("+")[0]


def _gpu(settings: Settings, facts: Facts) -> Finding:
    wanted = settings.engine.device
    if facts.num_gpus == 0:
        if wanted == "cuda":
            advice = "check nvidia-smi and CUDA_VISIBLE_DEVICES, or serve with --device cpu"
            return Finding("gpu", Level.failed, "engine.device is cuda, and no GPU can be seen", advice)
        return Finding("gpu", Level.ok, "none; ranks compute on the CPU")
    found = f"{facts.num_gpus} visible, torch built for CUDA {facts.torch_cuda or '(none)'}"
    if wanted == "cpu":
        return Finding("gpu", Level.ok, f"{found}; not used, engine.device is cpu")
    if facts.torch_cuda is None:
        advice = "install a CUDA build of torch (make serve without TORCH_ARGS), or serve with --device cpu"
        return Finding("gpu", Level.failed, found, advice)
    # what README says of it; goes when a GPU is among the machines that run the tests
    return Finding("gpu", Level.warning, f"{found}; Tidegate is untested on GPUs", "compare its tokens with the CPU's")


def _shape(settings: Settings, facts: Facts) -> Finding:
    """What `tidegate serve` would say about dp, device and KV memory."""
    try:
        resolved, _ = resolve(settings, facts.hardware)
    except ConfigError as error:
        return Finding("shape", Level.failed, error.message, "change the settings that are named")
    cores = facts.hardware.num_cores
    found = f"{settings.dp} rank(s) on {resolved.device}, {resolved.threads} torch thread(s) each, {cores} core(s)"
    if resolved.device == "cpu" and resolved.threads * settings.dp >= cores:
        advice = "lower dp or give more cores: a flush deadline inside a long step may be answered late"
        return Finding("shape", Level.warning, found, advice)
    return Finding("shape", Level.ok, found)


def _shared_memory(settings: Settings, facts: Facts) -> Finding:
    folder = facts.shared_memory
    found = f"{folder.path}, {_size(folder.free_bytes)} free"
    if not folder.exists or not folder.is_writable:
        advice = "mount a tmpfs there that this user may write (docker: --shm-size), or set control.shared_dir"
        return Finding("shared memory", Level.failed, f"{folder.path} cannot be written", advice)
    needed = OBJECT_STORE_BYTES + _SHARED_MEMORY_REST + int(settings.host_tier.size_gb * GIB)
    if folder.free_bytes < needed:
        advice = f"make it larger: Ray, the control page and the host tier take {_size(needed)} (docker: --shm-size)"
        return Finding("shared memory", Level.warning, found, advice)
    return Finding("shared memory", Level.ok, found)


def _state_dir(facts: Facts) -> Finding:
    folder = facts.state_dir
    if not folder.is_writable:
        advice = "choose another with --state-dir, or give this user the right to write"
        return Finding("state directory", Level.failed, f"{folder.path} cannot be written", advice)
    if folder.exists and not folder.is_own:
        advice = "choose another with --state-dir"
        return Finding("state directory", Level.failed, f"{folder.path} belongs to another user", advice)
    found = f"{folder.path}, {_size(folder.free_bytes)} free" + ("" if folder.exists else ", made by the first start")
    if folder.exists and folder.mode & 0o077:
        return Finding("state directory", Level.warning, f"{found}, open to others", f"chmod 700 {folder.path}")
    if folder.free_bytes < _STATE_BYTES:
        advice = "free some: Ray's logs and the control log need room, and a full disk stops flushes"
        return Finding("state directory", Level.warning, found, advice)
    return Finding("state directory", Level.ok, found)


def _ports(settings: Settings, facts: Facts) -> list[Finding]:
    numbers = {"HTTP": settings.api.port, "gRPC": settings.grpc.port}
    ways_out = {"HTTP": "--port", "gRPC": "--grpc-port"}
    rows: list[Finding] = []
    for door, fault in facts.ports.items():
        name = f"port {numbers[door]} ({door})"
        if fault is None:
            rows.append(Finding(name, Level.ok, "free"))
        elif facts.is_serving:
            rows.append(Finding(name, Level.ok, "taken; a server of this state directory runs"))
        else:
            rows.append(Finding(name, Level.failed, fault, f"choose another with {ways_out[door]}, or end who has it"))
    return rows


def _ray(facts: Facts) -> Finding:
    if facts.ray_address is None:
        return Finding("ray cluster", Level.ok, "no cluster is named; `tidegate serve` starts its own")
    if facts.ray_fault is None:
        return Finding("ray cluster", Level.ok, f"{facts.ray_address} answers")
    found = f"{facts.ray_address}: {facts.ray_fault}"
    advice = "`tidegate serve` starts a Ray of its own; jobs need a cluster that answers: unset RAY_ADDRESS or start it"
    return Finding("ray cluster", Level.warning, found, advice)


def _token(facts: Facts) -> Finding:
    if facts.ray_auth_mode not in ("", "token"):
        advice = "unset RAY_AUTH_MODE: without a token whoever reaches Ray's ports runs code here"
        return Finding("ray token", Level.warning, f"RAY_AUTH_MODE is {facts.ray_auth_mode}", advice)
    if facts.token_mode is None:
        return Finding("ray token", Level.ok, "none yet, made by the first start")
    if facts.token_mode & 0o077:
        advice = "chmod 600 it, or remove it: whoever reads it runs code as this user"
        return Finding("ray token", Level.warning, f"readable by others (mode {facts.token_mode:03o})", advice)
    return Finding("ray token", Level.ok, "readable by this user only")


def _keys(settings: Settings) -> Finding:
    if is_loopback(settings.api.host):
        return Finding("keys", Level.ok, f"{settings.api.host} serves this machine only")
    missing = [name for name in ("api_key", "admin_key") if getattr(settings.api, name) is None]
    if not missing:
        return Finding("keys", Level.ok, "both are set")
    found = f"{settings.api.host} is open to other machines without {' and '.join(missing)}"
    advice = "set TIDEGATE_API_KEY and TIDEGATE_ADMIN_KEY; without an admin key admin routes stay closed"
    return Finding("keys", Level.warning, found, advice)


def _open_files(facts: Facts) -> Finding:
    if facts.open_files < _MIN_OPEN_FILES:
        advice = f"ulimit -n {_MIN_OPEN_FILES} or more: every stream and every process of Ray takes some"
        return Finding("open files", Level.warning, f"at most {facts.open_files}", advice)
    return Finding("open files", Level.ok, f"at most {facts.open_files}")


def _processes(facts: Facts) -> Finding:
    if facts.has_pidfd:
        return Finding("process ends", Level.ok, "proven by the kernel (pidfd)")
    advice = "a kernel of 5.3 or newer, or a sandbox that lets pidfd_open through, notices dead ranks at once"
    return Finding("process ends", Level.warning, "no pidfd here; ends are read from /proc", advice)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"
