"""What clients and gateways ask before they send work: models, health, facts, loads. Nothing secret in any of it."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from actors.messages import Member
from configs.errors import InvalidField, NoRank, TidegateError
from deployments import facts
from deployments.core import ApiCore
from deployments.http.door import Door, JsonResponse
from deployments.http.streaming import unless_gone
from deployments.load_rows import LOAD_SECTIONS, loads_of
from deployments.sequences import SequenceJob
from engine.request import SamplingParams

#: a rank that does not answer one token by then is not healthy; SGLang's own limit
HEALTH_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class InfoRoutes:
    door: Door
    #: of this software
    version: str

    @property
    def core(self) -> ApiCore:
        return self.door.core

    def routes(self) -> list[Route]:
        route, get = self.door.route, ("GET",)
        return [
            route("/health", self.health, "open", "native", get),
            route("/health_generate", self.health_generate, "inference", "native", get),
            route("/v1/models", self.models, "inference", "openai", get),
            route("/v1/models/{model:path}", self.model, "inference", "openai", get),
            route("/model_info", self.model_info, "inference", "native", get),
            route("/get_model_info", self.model_info, "inference", "native", get),
            route("/server_info", self.server_info, "inference", "native", get),
            route("/get_server_info", self.server_info, "inference", "native", get),
            route("/v1/loads", self.loads, "inference", "openai", get),
        ]

    async def health(self, request: Request) -> Response:
        """Open to anybody: 200 if some rank takes requests. Costs no work of a rank."""
        if not self.core.fleet.members().members:
            raise NoRank("no rank is serving at the moment")
        return Response(status_code=200)

    async def health_generate(self, request: Request) -> Response:
        """200 only if every serving rank generates one token, or is too busy with others' to come to it.

        The prompt is one token, so nothing is cached by it.
        """
        members = sorted(self.core.fleet.members().members, key=lambda member: member.rank)
        if not members:
            raise NoRank("no rank is serving at the moment")
        checks = asyncio.gather(*(self._one_token(member) for member in members))
        rows = await unless_gone(request.receive, checks)
        is_healthy = all(row["status"] == "ok" for row in rows)
        return JsonResponse({"ranks": rows}, status_code=200 if is_healthy else 503)

    async def _one_token(self, member: Member) -> dict[str, Any]:
        sampling = SamplingParams(temperature=0.0, max_new_tokens=1, ignore_eos=True)
        job = SequenceJob(f"health-{secrets.token_hex(8)}", bytes(4), sampling, namespace="health", rank=member.rank)
        began_s = self.door.clock_s()
        num_outputs = self.core.num_outputs[member.rank]
        message = ""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self.core.probe(job)
        except TidegateError as error:
            message = error.message
        except TimeoutError:
            if self.core.num_outputs[member.rank] == num_outputs:
                message = f"no token within {HEALTH_TIMEOUT_S:g} s"
        took_ms = (self.door.clock_s() - began_s) * 1000
        status = "failed" if message else "ok"
        return {"rank": member.rank, "status": status, "message": message, "took_ms": round(took_ms, 3)}

    async def models(self, request: Request) -> Response:
        return JsonResponse({"object": "list", "data": [self._model_object()]})

    async def model(self, request: Request) -> Response:
        self.core.check_model(request.path_params["model"])
        return JsonResponse(self._model_object())

    async def model_info(self, request: Request) -> Response:
        return JsonResponse(facts.model_info(self.core))

    async def server_info(self, request: Request) -> Response:
        return JsonResponse(await facts.server_info(self.core, self.version))

    async def loads(self, request: Request) -> Response:
        """What every rank has to do now: `dp_rank` picks one, `include` the sections.

        503 with the rows there are, and the reason, if a rank that was asked for does not answer.
        """
        sections = _sections(request.query_params.get("include"))
        if request.query_params.get("format", "json") != "json":
            raise InvalidField("format: only json is offered; metrics come from Ray's exporter", "format")
        status = await self.core.controller.status()
        loads = loads_of(status, sections, request.query_params.get("dp_rank"))
        content = {
            # text, as SGLang sends it: gateways drop the whole answer when it is a number
            "timestamp": datetime.fromtimestamp(self.door.unix_time_s(), UTC).isoformat(),
            "version": self.version,
            "dp_rank_count": loads.num_ranks,
            "epoch": status.get("epoch"),
            "loads": loads.rows,
        }
        if loads.message:
            return JsonResponse(content | {"success": False, "message": loads.message}, status_code=NoRank.http_status)
        return JsonResponse(content)

    def _model_object(self) -> dict[str, Any]:
        card = self.core.card
        return {
            "id": card.name,
            "object": "model",
            "created": int(self.door.unix_time_s()),
            # gateways take a server for SGLang by this word
            "owned_by": "sglang",
            "root": card.name,
            "parent": None,
            "max_model_len": self.core.max_len,
        }


def _sections(include: str | None) -> frozenset[str]:
    """The sections asked for. Raises InvalidField on one that SGLang does not have either."""
    names = {"core"} if include is None else {name.strip() for name in include.split(",") if name.strip()}
    unknown = sorted(names - LOAD_SECTIONS - {"all"})
    if unknown:
        raise InvalidField(
            f"include: unknown section {unknown[0][:40]!r}; there are {', '.join(sorted(LOAD_SECTIONS))}", "include"
        )
    return LOAD_SECTIONS if "all" in names else frozenset(names)
