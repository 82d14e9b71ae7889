"""Profiles, structured outputs and the Python client through a real server of two processes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import OpenAI

from configs.errors import Conflict, InvalidField
from tests.cluster.server import Server
from tidegate import Client

CAT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "lives": {"type": "integer", "maximum": 9, "minimum": 0},
    },
    "required": ["name", "lives"],
    "additionalProperties": False,
}


def test_the_official_client_gets_what_its_schema_says(server: Server) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "a cat"}],
            max_tokens=400,
            n=4,
            response_format={"type": "json_schema", "json_schema": {"name": "cat", "schema": CAT, "strict": True}},
        )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), CAT)


@pytest.mark.deep
def test_every_rank_records_the_same_profile(server: Server, tmp_path: Path) -> None:
    with Client(server.url) as client:
        begun = client.start_profile(profile_id="two", profile_by_stage=True, start_step=1, with_stack=False)
        assert [row["status"] for row in begun.ranks] == ["started", "started"]
        with pytest.raises(Conflict, match="already in progress"):
            client.start_profile()
        for rank in (0, 1):
            text = client.generate([5, 6, 7, rank], max_new_tokens=8, ignore_eos=True, rank=rank)
            assert text.rank == rank
        # more prefill steps are wanted still; the stop writes what there is
        ended = client.stop_profile()
        names = {trace["name"] for row in ended.ranks for trace in row["traces"]}
        assert names == {f"two-rank{rank}-prefill.trace.json.gz" for rank in (0, 1)}
        assert {trace["name"] for trace in client.profiles().traces} >= names
        file = tmp_path / "trace.json.gz"
        for name in names:
            client.save_profile(name, file)
            with gzip.open(file) as trace:
                assert any("rows" in str(event.get("name")) for event in json.load(trace)["traceEvents"])
        with pytest.raises(InvalidField, match="was used before"):
            client.start_profile(profile_id="two")
        assert client.flush(timeout_s=10).success
