"""The Starlette application of one Api replica."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from deployments.http.admin import AdminRoutes
from deployments.http.door import Door, unrouted
from deployments.http.info import InfoRoutes
from deployments.http.native import NativeRoutes
from deployments.http.openai import OpenAIRoutes
from deployments.http.profile import ProfileRoutes
from deployments.http.text_routes import TextRoutes


def build_http_app(
    door: Door, version: str, lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]] | None = None
) -> Starlette:
    """All HTTP routes.

    version: of this software, shown in /server_info. lifespan: entered before the first request, left after the last.
    """
    groups = (
        InfoRoutes(door, version),
        OpenAIRoutes(door),
        NativeRoutes(door),
        TextRoutes(door),
        AdminRoutes(door),
        ProfileRoutes(door),
    )
    routes = [route for group in groups for route in group.routes()]
    return Starlette(routes=routes, exception_handlers={HTTPException: unrouted}, lifespan=lifespan)
