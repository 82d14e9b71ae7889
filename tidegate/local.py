"""`tidegate serve`: a Ray and a Serve application of its own on this machine, from the first line shown to the last
process gone. Paths are made absolute, the shape checked and ports settled before anything starts.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import httpx
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
from ray.serve.schema import ApplicationStatusOverview, LoggingConfig

from actors.detached import find_actor
from actors.messages import CONTROLLER_NAME
from actors.ray_errors import Answered, outcome_within
from configs.errors import ConfigError, ServiceError
from configs.resolve import Hardware, resolve
from configs.schema import Settings
from deployments.hardware import this_node
from tidegate import ports, welcome
from tidegate.janitor import Janitor
from tidegate.local_ray import CPU_RANK_RESOURCE, LocalRay, prepare_process, start_ray
from tidegate.progress import Progress
from tidegate.state_dir import StateDir
from tidegate.stop_signals import StopSignals

APP_NAME = "tidegate"
_POLL_S = 0.25
_READY_TIMEOUT_S = 60.0
_STATUS_TIMEOUT_S = 5.0

#: the application of settings; `deployments.app.bind`
Bind = Callable[[Settings], serve.Application]


class LocalServer:
    """One run of `tidegate serve`: `run` once, then `end`, whatever `run` raised."""

    def __init__(self, settings: Settings, bind: Bind, progress: Progress) -> None:
        self._given = settings
        self._bind = bind
        self._progress = progress
        self._stop = StopSignals(self._leave)
        self._janitor: Janitor | None = None

    def run(self) -> None:
        """Serve until a signal comes. Raises ConfigError and ServiceError for what keeps it from serving."""
        self._stop.install()
        state = StateDir.create(self._given.resolved_state_dir)
        resolved, notes = resolve(*_for_this_machine(self._given, state))
        if resolved.settings.model.path is not None:
            _check_model(resolved.settings.model.path)
        for note in notes:
            self._progress.note(f"note: {note}")
        self._janitor = Janitor.start(state, self._given.control.shared_dir)
        # after the janitor: it has waited for a server that was killed a moment ago and still had the ports
        settings = _with_settled_ports(resolved.settings)
        state.drop_old_runs()
        prepare_process(state)
        application = self._application(settings, state)
        with self._progress.step("Starting Ray"):
            local_ray = self._start_ray(settings, state)
        with self._progress.step(f"Starting {settings.dp} rank(s) on {resolved.device}"):
            _deploy(settings, application)
            if not (self._until_running(state) and self._until_healthy(settings)):
                return
        if settings.host_tier.is_on and not self._until_reserved(settings):
            return
        self._progress.note(welcome.text(settings, resolved.device, local_ray, state))
        self._stop.wait()
        self._progress.note("Stopping")

    def end(self, status: int) -> NoReturn:
        """End this process with `status`, and everything that it started before it."""
        if self._janitor is not None:
            self._janitor.leave(status)
        sys.exit(status)

    def _start_ray(self, settings: Settings, state: StateDir) -> LocalRay:
        try:
            return start_ray(settings, state)
        except SystemExit:  # what Ray makes of SIGTERM while it starts
            self._leave(128 + signal.SIGTERM)
        finally:
            self._stop.install()

    def _application(self, settings: Settings, state: StateDir) -> serve.Application:
        demo = settings.model.path is None and not (state.root / "models" / "demo" / "config.json").exists()
        with self._progress.step("Building the demo model" if demo else "Reading the model's description"):
            return self._bind(settings)

    def _until_running(self, state: StateDir) -> bool:
        """Wait for the application; False if an end was asked for. Raises ServiceError when it cannot start."""
        while True:
            app = serve.status().applications.get(APP_NAME)
            if app is not None and app.status == "RUNNING":
                return True
            if app is not None:
                _raise_if_hopeless(app, state)
                self._progress.update(_counts(app))
            if self._stop.wait(_POLL_S):
                return False

    def _until_healthy(self, settings: Settings) -> bool:
        """Wait for the door itself: Serve calls an application running a moment before its proxy routes to it."""
        url = f"{welcome.base_url(settings)}/health"
        for _ in range(int(_READY_TIMEOUT_S / _POLL_S)):
            try:
                if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                    return True
            except httpx.TransportError:
                pass
            if self._stop.wait(_POLL_S):
                return False
        raise ServiceError(f"the application runs, but {url} does not answer 200 after {_READY_TIMEOUT_S:g} s")

    def _until_reserved(self, settings: Settings) -> bool:
        """Show how far the host tier's memory is; False if an end was asked for. Ranks serve meanwhile, without it."""
        rows: list[dict[str, Any]] = []
        with self._progress.step(f"Reserving {settings.host_tier.size_gb:g} GiB for the host tier"):
            for _ in range(int(_READY_TIMEOUT_S / _POLL_S)):
                rows = _host_tiers()
                while rows and any(row["status"] == "reserving" for row in rows):
                    done, total = (sum(row[name] for row in rows) >> 20 for name in ("reserved_bytes", "file_bytes"))
                    self._progress.update(f"Reserving memory for the host tier: {done} of {total} MiB")
                    if self._stop.wait(_POLL_S):
                        return False
                    rows = _host_tiers()
                if rows and all(row["status"] in ("ready", "failed") for row in rows):
                    break
                if self._stop.wait(_POLL_S):
                    return False
        for row in rows:
            if row["status"] != "ready":
                self._progress.note(f"note: no host tier yet: {row['message'] or row['status']}")
        return True

    def _leave(self, status: int) -> NoReturn:
        """A signal at a moment from which nothing can go on."""
        self._progress.abandon()
        self.end(status)


def _for_this_machine(settings: Settings, state: StateDir) -> tuple[Settings, Hardware]:
    ray_settings = settings.ray.model_copy(update={"cpu_rank_resource": CPU_RANK_RESOURCE, "tcp": False})
    model = settings.model
    if model.path is not None:
        model = model.model_copy(update={"path": Path(os.path.abspath(model.path.expanduser()))})
    absolute = settings.model_copy(update={"ray": ray_settings, "model": model, "state_dir": state.root})
    own = {CPU_RANK_RESOURCE: float(settings.dp)}
    return absolute, this_node(own, os.environ.get("CUDA_VISIBLE_DEVICES"), settings.control.shared_dir)


def _with_settled_ports(settings: Settings) -> Settings:
    api, grpc, ray_settings = settings.api, settings.grpc, settings.ray
    http_port = ports.settle(api.host, api.port, "HTTP", "--port")
    grpc_port = grpc.port
    if grpc.server != "off":
        grpc_port = ports.settle("127.0.0.1", grpc.port, "gRPC", "--grpc-port, or set grpc.server to off")
    dashboard_port = ports.settle_near(ray_settings.dashboard_host, ray_settings.dashboard_port)
    return settings.model_copy(
        update={
            "api": api.model_copy(update={"port": http_port}),
            "grpc": grpc.model_copy(update={"port": grpc_port}),
            "ray": ray_settings.model_copy(update={"dashboard_port": dashboard_port}),
        }
    )


def _check_model(path: Path) -> None:
    """What would otherwise be found by every rank, a minute later."""
    if not path.is_dir():
        raise ConfigError(f"model.path: {path} is not a directory; it must hold a model in Hugging Face format")
    if not (path / "config.json").is_file():
        raise ConfigError(f"model.path: {path} holds no config.json; it must hold a model in Hugging Face format")


def _deploy(settings: Settings, application: serve.Application) -> None:
    grpc_options = None
    if settings.grpc.server == "serve":
        adder = "deployments.protos.add_SglangSchedulerServicer_to_server"
        grpc_options = gRPCOptions(port=settings.grpc.port, grpc_servicer_functions=[adder])
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=settings.api.host, port=settings.api.port),
        grpc_options=grpc_options,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    target = serve.RunTarget(target=application, name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _host_tiers() -> list[dict[str, Any]]:
    """The host tiers as the controller knows them; none before its first word."""
    controller: Any = find_actor(CONTROLLER_NAME)
    if controller is None:
        return []
    outcome = asyncio.run(outcome_within(controller.status.remote(), _STATUS_TIMEOUT_S))
    return outcome.value["host_tiers"] if isinstance(outcome, Answered) else []


def _counts(app: ApplicationStatusOverview) -> str:
    parts = []
    for name, deployment in app.deployments.items():
        states = {str(state): number for state, number in deployment.replica_states.items() if number}
        parts.append(f"{name}: {states.get('RUNNING', 0)} of {sum(states.values())} running")
    return "Starting " + ", ".join(parts)


def _raise_if_hopeless(app: ApplicationStatusOverview, state: StateDir) -> None:
    """A setting that cannot work fails the same way in each of Serve's many tries; the first one is told."""
    texts = [app.message, *(deployment.message for deployment in app.deployments.values())]
    reasons = [line.strip() for text in texts for line in text.splitlines() if "ConfigError: " in line]
    if reasons:
        raise ConfigError(reasons[-1].rpartition("ConfigError: ")[2])
    if app.status == "DEPLOY_FAILED":
        lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
        raise ServiceError(
            f"the application did not start: {lines[-1] if lines else 'no reason given'} (logs: {state.logs})"
        )
