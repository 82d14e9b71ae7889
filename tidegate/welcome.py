"""What a started server prints: where it is, what to try next, how a job reaches it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from configs.schema import Settings
from tidegate.client import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from tidegate.local_ray import LocalRay
from tidegate.state_dir import StateDir

# whole, since nobody need have activated the environment
_COMMAND = shlex.quote(str(Path(sys.executable).with_name("tidegate")))


def base_url(settings: Settings) -> str:
    """Where this machine reaches the server: a host that means every interface is replaced by loopback."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(settings.api.host, settings.api.host)
    return f"http://[{host}]:{settings.api.port}" if ":" in host else f"http://{host}:{settings.api.port}"


def text(settings: Settings, device: str, local_ray: LocalRay, state: StateDir) -> str:
    """The whole message, lines of any length: commands are there to be copied."""
    url = base_url(settings)
    user = _header(API_KEY_VARIABLE) if settings.api.api_key else ""
    admin = _header(ADMIN_KEY_VARIABLE) if settings.api.admin_key else ""
    ranks = "1 rank" if settings.dp == 1 else f"{settings.dp} ranks"
    name = settings.model.served_name or (settings.model.path.name if settings.model.path else "the demo model")
    lines = [
        "",
        f"Tidegate serves {name} on {url} with {ranks} on {device}. Ctrl-C ends it.",
        "",
        "Chat, whole and streamed:",
        f"  curl {url}/v1/chat/completions{user} -H 'content-type: application/json' "
        """-d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}'""",
        f"  curl -N {url}/v1/chat/completions{user} -H 'content-type: application/json' "
        """-d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32, "stream": true}'""",
        "Flush the cache of every rank, waiting up to 10 s for an idle moment:",
        f"  curl -X POST '{url}/flush_cache?timeout=10'{admin}",
        f"  {_COMMAND} flush --url {url} --timeout 10",
        "For jobs (ray job submit -- python my_job.py):",
        f"  export RAY_ADDRESS={local_ray.gcs_address}",
        f"  export RAY_API_SERVER_ADDRESS={local_ray.dashboard_url}",
        "  export RAY_AUTH_MODE=token",
        f"  export RAY_AUTH_TOKEN_PATH={shlex.quote(str(local_ray.token_path))}",
        f"Ray dashboard (asks for the token in that file): {local_ray.dashboard_url}",
    ]
    if settings.grpc.server != "off":
        lines.append(f"gRPC (sglang.grpc.scheduler.SglangScheduler): 127.0.0.1:{settings.grpc.port}")
    lines += [f"Logs: {state.logs}", ""]
    return "\n".join(lines)


def _header(variable: str) -> str:
    return f' -H "authorization: Bearer ${variable}"'
