"""What a started server prints: commands to copy, exports for jobs, and no key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.load import settings_from_dict
from tidegate import welcome
from tidegate.local_ray import LocalRay
from tidegate.state_dir import StateDir

RAY = LocalRay("10.0.0.1:6379", "http://127.0.0.1:8265", Path("/state/auth_token"))
STATE = StateDir(Path("/state"), Path("/state/ray"))


def _text(**tree: Any) -> str:
    return welcome.text(settings_from_dict(tree), "cpu", RAY, STATE)


def test_it_says_where_and_what_to_try() -> None:
    text = _text(dp=2, model={"path": "/models/small"})
    assert "Tidegate serves small on http://127.0.0.1:8000 with 2 ranks on cpu" in text
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in text
    assert "curl -N " in text
    assert "curl -X POST 'http://127.0.0.1:8000/flush_cache?timeout=10'" in text
    assert "127.0.0.1:9000" in text
    assert "http://127.0.0.1:8265" in text


def test_a_job_gets_its_exports() -> None:
    text = _text()
    assert "export RAY_ADDRESS=10.0.0.1:6379\n" in text
    assert "export RAY_AUTH_MODE=token\n" in text
    assert "export RAY_AUTH_TOKEN_PATH=/state/auth_token\n" in text


def test_keys_are_named_and_never_shown() -> None:
    text = _text(api={"api_key": "secret-a", "admin_key": "secret-b"})
    assert "secret" not in text
    assert '-H "authorization: Bearer $TIDEGATE_API_KEY"' in text
    assert '-H "authorization: Bearer $TIDEGATE_ADMIN_KEY"' in text


def test_a_door_that_is_off_is_not_named() -> None:
    assert "gRPC" not in _text(grpc={"server": "off"})


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:8000"), ("::", "http://[::1]:8000"), ("10.1.2.3", "http://10.1.2.3:8000")],
)
def test_a_host_that_means_all_interfaces_is_reached_by_loopback(host: str, url: str) -> None:
    assert welcome.base_url(settings_from_dict({"api": {"host": host}})) == url
