"""Reading a stream the way strict benchmark clients do: every line is empty, [DONE], or complete JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream; asserts that nothing but `data:` lines arrives and that [DONE] comes last."""
    done = False
    for line in response.iter_lines():
        if not line:
            continue
        assert not done, f"after [DONE]: {line}"
        assert line.startswith("data: "), line
        payload = line.removeprefix("data: ")
        if payload == "[DONE]":
            done = True
            continue
        yield json.loads(payload)
    assert done, "the stream ended without [DONE]"
