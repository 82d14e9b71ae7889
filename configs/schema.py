"""Every setting of Tidegate, with its default, unit and range. Frozen; an unknown key is an error.

YAML is read by `configs.load`; what depends on the machine is settled by `configs.resolve`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(_Settings):
    """What is served."""

    #: directory in Hugging Face format; None: the demo model, built when absent
    path: Path | None = None
    #: name in the routes; None: the directory's name
    served_name: str | None = None
    #: context length in tokens; None: the model's own
    max_len: Annotated[int, Field(ge=16)] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class EngineSettings(_Settings):
    """One rank's engine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: tokens per KV page: unit of allocation, matching, transfer, checksum
    page_size: Annotated[int, Field(ge=1, le=1024)] = 16
    #: pages of the device pool; None: from `kv_memory_gb`
    num_pages: Annotated[int, Field(ge=8)] | None = None
    #: device memory for KV in GiB; None: 0.25 on CPU, 85 % of what the weights leave on a GPU
    kv_memory_gb: Annotated[float, Field(gt=0)] | None = None
    #: sequences that may run at once
    max_running: Annotated[int, Field(ge=1, le=4096)] = 64
    #: tokens of one engine step over all sequences; longer prompts are prefilled in chunks
    max_step_tokens: Annotated[int, Field(ge=16)] = 512
    #: torch threads of one rank; None: (cores - 1) shared over the ranks of the node, at least 1
    threads: Annotated[int, Field(ge=1)] | None = None
    prefix_cache: bool = True
    #: seconds between two runs of sanity_check() in production; 0: never
    sanity_check_s: Annotated[float, Field(ge=0)] = 30.0


class HostTierSettings(_Settings):
    """Host memory of each node as a second tier of the cache, shared by all ranks of the node."""

    #: GiB of a node's arena, its index included; 0: no host tier
    size_gb: Annotated[float, Field(ge=0, le=65536)] = 0.0
    #: instead of size_gb: share of the memory that is free in `control.shared_dir` at the start
    memory_share: Annotated[float, Field(gt=0, le=0.9)] | None = None
    #: when a device page is copied: before it is evicted, at its first insert, or at its second use
    write_policy: Literal["write_back", "write_through", "write_through_selective"] = "write_back"
    #: of the checksum on every read: each page, one in 16, or none
    verification: Literal["full", "sampled", "off"] = "full"
    #: slru: pages that were read again are safe from a scan of pages that nobody reads twice
    eviction: Literal["lru", "slru"] = "lru"
    #: shares of the device pool, write_back only: below `low` free pages the coldest leave until `high` are free
    low_watermark: Annotated[float, Field(ge=0, lt=1)] = 0.05
    high_watermark: Annotated[float, Field(ge=0, lt=1)] = 0.10
    #: MiB of pages that a rank has on their way at once, in both directions; more is dropped, or computed
    max_inflight_mb: Annotated[int, Field(ge=1)] = 256
    #: slots that a rank asks for at once; a rank may hold four times as many
    lease_batch: Annotated[int, Field(ge=1, le=4096)] = 64
    #: seconds between two runs of the tier's own check; 0: never
    sanity_check_s: Annotated[float, Field(ge=0)] = 30.0

    @property
    def is_on(self) -> bool:
        """There is a host tier."""
        return self.size_gb > 0 or self.memory_share is not None


class ProfilingSettings(_Settings):
    """Traces of engine steps (/start_profile)."""

    #: every trace lies below it, on the node of its rank; None: `profiles` below the state directory
    root: Path | None = None
    #: a profile that nobody stops ends after so many steps (of each stage)
    max_steps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    #: no profile begins while the root holds more GiB than this
    max_gb: Annotated[float, Field(gt=0)] = 10.0


class ControlSettings(_Settings):
    """The control plane: flushes, leases, the log."""

    #: largest timeout a caller may ask for
    max_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    #: least budget of modes that need the next step boundary (fence, retract, abort)
    step_grace_s: Annotated[float, Field(ge=0)] = 5.0
    #: after this a rank out of contact with the controller serves uncached; renewed five times in it
    lease_s: Annotated[float, Field(ge=0.1)] = 5.0
    #: file system in memory in which the processes of a node share their control page
    shared_dir: Path = Path("/dev/shm")
    #: the answer leaves the controller by the deadline plus this, whatever the ranks do
    answer_slack_s: Annotated[float, Field(gt=0)] = 0.05
    #: where the log lives: `directory` below the state directory, for a server of one machine; or the cluster's `gcs`
    #: key-value store
    log: Literal["directory", "gcs"] = "directory"


class ApiSettings(_Settings):
    """The HTTP door."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    num_replicas: Annotated[int, Field(ge=1)] = 1
    #: generations in flight per Api replica; more are answered 429
    max_inflight: Annotated[int, Field(ge=1)] = 1024
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8 * 1024 * 1024
    #: requests of the inference routes must carry it when set
    api_key: SecretStr | None = None
    #: admin routes must carry it when set; without one they are closed as soon as `host` is not loopback, and to
    #: callers of other machines in any case
    admin_key: SecretStr | None = None


class GrpcSettings(_Settings):
    """The gRPC door: service sglang.grpc.scheduler.SglangScheduler."""

    #: own: a server in the Api on 127.0.0.1. serve: Ray Serve's proxy (binds all interfaces). off: none
    server: Literal["own", "serve", "off"] = "own"
    port: Annotated[int, Field(ge=0, le=65535)] = 9000


class RaySettings(_Settings):
    """How the actors are placed."""

    #: name of the deployment: sockets, files and log records of two deployments never meet
    deployment: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")] = "tidegate"
    #: logical resource a CPU rank asks for; None: num_cpus=1. Set by the local start.
    cpu_rank_resource: str | None = None
    #: ranks also listen on tcp for Apis of other nodes, whom a key lets in; a server of one node needs no such port
    tcp: bool = True
    #: a rank whose process does not answer at all is replaced after three times this; one that has died at once
    health_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    dashboard_host: str = "127.0.0.1"
    dashboard_port: Annotated[int, Field(ge=0, le=65535)] = 8265


class Settings(_Settings):
    """The whole configuration."""

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    host_tier: HostTierSettings = HostTierSettings()
    control: ControlSettings = ControlSettings()
    profiling: ProfilingSettings = ProfilingSettings()
    api: ApiSettings = ApiSettings()
    grpc: GrpcSettings = GrpcSettings()
    ray: RaySettings = RaySettings()
    #: data-parallel ranks
    dp: Annotated[int, Field(ge=1, le=256)] = 1
    #: sockets, log, demo model, local Ray; None: ~/.local/state/tidegate
    state_dir: Path | None = None

    @property
    def resolved_state_dir(self) -> Path:
        """Where this node keeps what must be found again: `state_dir`, or a folder below the home directory."""
        return self.state_dir or Path.home() / ".local" / "state" / "tidegate"

    @property
    def profiling_root(self) -> Path:
        """Where the ranks of this node write their traces."""
        return self.profiling.root or self.resolved_state_dir / "profiles"

    def with_model_path(self, directory: Path) -> Settings:
        """The same settings with another model directory."""
        return self.model_copy(update={"model": self.model.model_copy(update={"path": directory})})
