"""The Api deployment: the ingress of the one Serve application. Holds connections to ranks, no model state."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import ray
from ray import serve
from ray.serve import Deployment
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from actors.controller import ensure_controller
from actors.fleet import Fleet
from actors.metrics import ApiMetrics
from configs.errors import ConfigError
from configs.schema import ApiSettings, Settings
from configs.version import VERSION
from deployments.admission import Admission
from deployments.api_report import ApiReport
from deployments.auth import Keys
from deployments.control import ControllerClient
from deployments.core import ApiCore
from deployments.grpc_ingress import GrpcIngress, keys_behind_proxy
from deployments.grpc_server import GrpcServer
from deployments.grpc_service import GrpcService
from deployments.http.app import build_http_app
from deployments.http.door import Door
from deployments.model_card import read_model_card
from deployments.tokenizer import Tokenizer
from engine.garbage import calm_collector

log = logging.getLogger(__name__)

#: Serve's own limit must never be the one that is met: its default is 5, and a flush would wait behind five streams
_MAX_ONGOING_REQUESTS = 10_000


#: for RPCs that still run when the replica is told to stop
_GRPC_GRACE_S = 1.0


@serve.ingress()
class Api(GrpcIngress):
    """One Api replica. Wrapped in place, so that it is pickled by reference."""

    async def __init__(self, settings: Settings, ranks: DeploymentHandle) -> None:
        """ranks: not called; binding it makes Serve start the ranks with this application.

        Raises ConfigError when the model's directory holds no tokenizer or no configuration.
        """
        directory = settings.model.path
        if directory is None:
            raise ConfigError("no model directory (configs: model.path)")
        card = read_model_card(directory, settings.model.served_name, settings.model.max_len)
        tokenizer = Tokenizer(directory)
        controller = ControllerClient(ensure_controller(settings), settings.control)
        self._fleet = Fleet(controller.membership, ray.get_runtime_context().get_node_id())
        await self._fleet.start()
        core = ApiCore(card, tokenizer, self._fleet, controller, Admission(settings.api.max_inflight))
        keys = _keys(settings.api)
        grpc_keys = keys_behind_proxy(keys) if settings.grpc.server == "serve" else keys
        self.grpc_service = GrpcService(core, grpc_keys, VERSION, settings.control.max_timeout_s)
        self._grpc_server = await self._own_grpc(settings) if settings.grpc.server == "own" else None
        self._report = ApiReport(core.counters, core.admission, self._fleet, ApiMetrics())
        self._door = Door(
            core=core,
            keys=keys,
            max_body_bytes=settings.api.max_body_bytes,
            max_timeout_s=settings.control.max_timeout_s,
            unix_time_s=lambda: datetime.now(UTC).timestamp(),
            clock_s=time.monotonic,
        )
        # A full pass of the collector over all that Ray, Serve and transformers have loaded stops every stream, and
        # the answer of a flush, for 60 ms.
        calm_collector()

    def __serve_build_asgi_app__(self) -> Starlette:
        """Called by Serve once, after `__init__`."""
        return build_http_app(self._door, VERSION, self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._report.start()
        try:
            yield
        finally:
            self._report.stop()
            if self._grpc_server is not None:
                await self._grpc_server.stop(_GRPC_GRACE_S)
            await self._fleet.close()

    async def _own_grpc(self, settings: Settings) -> GrpcServer:
        """The gRPC server in this process, on loopback. Raises ConfigError when it cannot listen."""
        is_shared = settings.api.num_replicas > 1
        server = GrpcServer(self.grpc_service, max_message_bytes=settings.api.max_body_bytes, is_shared=is_shared)
        port = await server.start("127.0.0.1", settings.grpc.port)
        log.info("gRPC on 127.0.0.1:%d", port)
        return server


def api_deployment(settings: Settings) -> Deployment:
    """The deployment to bind with (settings, handle of the rank deployment)."""
    options: dict[str, Any] = {
        "name": "api",
        "num_replicas": settings.api.num_replicas,
        "max_ongoing_requests": _MAX_ONGOING_REQUESTS,
        "ray_actor_options": {"num_cpus": 0},
        # the access log's flushes are the tail of the latency: p99 20 ms with it, 9 without
        "logging_config": {"enable_access_log": False},
    }
    return serve.deployment(**options)(Api)


def _keys(settings: ApiSettings) -> Keys:
    return Keys(
        api_key=settings.api_key.get_secret_value() if settings.api_key is not None else None,
        admin_key=settings.admin_key.get_secret_value() if settings.admin_key is not None else None,
        host=settings.host,
    )
