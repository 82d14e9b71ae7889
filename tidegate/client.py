"""The command line's own client of the control routes: what it prints are the server's answers, refusals included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx

from configs.errors import ConfigError, Forbidden, ServiceError, TidegateError, Unauthorized

#: environment variables that the commands read keys from, and that a server's welcome names instead of keys
API_KEY_VARIABLE = "TIDEGATE_API_KEY"
ADMIN_KEY_VARIABLE = "TIDEGATE_ADMIN_KEY"

#: beyond a flush's own timeout: the server's answer comes by its deadline, however the ranks are
_GRACE_S = 15.0


class Unreachable(ServiceError):
    """Nobody answers at that address, or something that is not Tidegate."""


class NoAnswer(Unreachable):
    """The call was sent, and its answer did not come: it may have been carried out."""


class RawClient:
    """Calls of one server, one at a time. Answers are the server's own dicts, refusals included; programs want
    `tidegate.Client`, which raises them.

    Raises Unreachable; Unauthorized and Forbidden for keys that are missing or not enough; ServiceError for any other
    refusal that is no answer to the question.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        """url: of the HTTP door, e.g. http://127.0.0.1:8000. key: sent as bearer, if given."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        try:
            # trust_env: a proxy of the environment must not see admin keys meant for this address
            self._http = httpx.Client(base_url=url, headers=headers, timeout=_GRACE_S, trust_env=False)
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"{url!r} is no address: {error}") from None
        self._url = url

    def flush(
        self,
        *,
        timeout_s: float = 0.0,
        mode: str = "wait",
        tiers: Sequence[str] | None = None,
        scope: Mapping[str, Any] | None = None,
        flush_id: str | None = None,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Flush every rank; see ControllerActor.flush. Waits for the server's answer.

        Raises ConfigError for arguments that the server, or JSON, does not take.
        """
        if not 0 <= timeout_s < float("inf"):
            raise ConfigError(f"timeout must be a number of seconds and not below 0, got {timeout_s}")
        body = {"timeout_s": timeout_s, "mode": mode, "tiers": tiers, "scope": scope, "flush_id": flush_id,
                "dry_run": dry_run}  # fmt: skip
        given = {name: value for name, value in body.items() if value is not None}
        return self._call("POST", "/v1/cache/flush", json=given, timeout=timeout_s + _GRACE_S)

    def read(self, flush_id: str) -> dict[str, Any]:
        """The answer of an earlier flush, with verdicts that came later; `status: pending` while it runs."""
        return self._call("GET", f"/v1/cache/flush/{quote(flush_id, safe='')}")

    def cancel(self, flush_id: str) -> dict[str, Any]:
        """End a flush that has not begun; see ControllerActor.cancel_flush."""
        return self._call("DELETE", f"/v1/cache/flush/{quote(flush_id, safe='')}")

    def audit(self, limit: int = 100, flush_id: str | None = None) -> dict[str, Any]:
        """The newest flushes and control calls, newest first; see ControllerActor.audit."""
        params = {"limit": str(limit)} | ({} if flush_id is None else {"flush_id": flush_id})
        return self._call("GET", "/v1/cache/audit", params=params)

    def cache(self) -> dict[str, Any]:
        """Epoch, floor, pending flush, how full the tiers are, and a row per rank and node."""
        return self._call("GET", "/v1/cache")

    def status(self) -> dict[str, Any]:
        """What is served and by whom: `success` is true if some rank takes requests and every known one answers."""
        info = self._call("GET", "/server_info")
        loads = self._call("GET", "/v1/loads?include=all")
        rows = loads.get("loads", [])
        is_up = bool(rows) and all(row.get("status") == "serving" for row in rows)
        return {
            "success": is_up,
            "model": info.get("served_model_name"),
            "version": info.get("version"),
            "weight_version": info.get("weight_version"),
            "context_length": info.get("context_length"),
            "epoch": loads.get("epoch"),
            "controller": info.get("control", {}).get("status"),
            "ranks": rows,
        }

    def close(self) -> None:
        self._http.close()

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **options)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
            raise Unreachable(f"{self._url} cannot be reached: {error}") from None
        except httpx.TimeoutException:
            raise NoAnswer(f"{self._url} did not answer in time") from None
        except httpx.TransportError as error:
            raise NoAnswer(f"{self._url} broke the connection: {error}") from None
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Unreachable(f"{self._url}{path} answered {response.status_code} and no JSON; is it Tidegate?")
        if response.is_success or ("success" in answer and response.status_code != 400):
            return answer
        error = answer.get("error")
        message = str(error.get("message") if isinstance(error, dict) else answer.get("message", response.text))
        kinds: dict[int, type[TidegateError]] = {400: ConfigError, 401: Unauthorized, 403: Forbidden}
        raise kinds.get(response.status_code, ServiceError)(message)
