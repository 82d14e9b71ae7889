"""What gateways and clients ask first: models, health, facts, loads, and the tokenizer's routes."""

from __future__ import annotations

import asyncio
import tomllib
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.version import VERSION
from deployments.http import info
from deployments.http.info import HEALTH_TIMEOUT_S
from deployments.model_card import read_model_card
from tests.unit.deployments.api_server import Demo, scenario, serving, until

GENERATE = {"text": "x", "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}}


@scenario
async def test_the_models_page_is_what_gateways_take_for_sglang(demo: Demo) -> None:
    async with serving(demo) as server:
        page = (await server.client.get("/v1/models")).json()
        one = (await server.client.get("/v1/models/tiny")).json()
        missing = await server.client.get("/v1/models/other/model")
    assert page["object"] == "list"
    assert page["data"] == [one]
    assert one["id"] == one["root"] == "tiny"
    assert one["owned_by"] == "sglang"
    assert one["max_model_len"] == demo.model.facts.max_len
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "model_not_found"


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
@scenario
async def test_server_info_has_what_a_gateway_reads(demo: Demo, path: str) -> None:
    async with serving(demo, num_ranks=2) as server:
        info = (await server.client.get(path)).json()
    assert info["served_model_name"] == "tiny"
    assert info["model_path"] == info["tokenizer_path"] == str(demo.directory)
    assert (info["tp_size"], info["dp_size"], info["pp_size"]) == (1, 2, 1)
    assert info["context_length"] == demo.model.facts.max_len
    assert info["version"] == "0.test"
    assert len(info["internal_states"]) == 2
    assert info["max_running_requests"] > 0
    assert info["control"]["controller_restarts"] == 0


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
@scenario
async def test_model_info_names_path_type_and_weights(demo: Demo, path: str) -> None:
    async with serving(demo) as server:
        info = (await server.client.get(path)).json()
    assert info["is_generation"] is True
    assert info["model_type"] == "llama"
    assert info["architectures"] == ["LlamaForCausalLM"]
    assert info["weight_version"] == "default"
    assert info["vocab_size"] == 512
    assert info["eos_token_ids"] == [2, 0]


@scenario
async def test_health_asks_no_rank_and_health_generate_asks_all(demo: Demo) -> None:
    async with serving(demo, num_ranks=2) as server:
        health = await server.client.get("/health")
        before = [len(rank.requests) for rank in server.ranks]
        generate = await server.client.get("/health_generate")
        after = [len(rank.requests) for rank in server.ranks]
        await server.idle()
        cached = [rank.engine.snapshot().num_cached_pages for rank in server.ranks]
        server.ranks[0].dies_after = 0
        failing = await server.client.get("/health_generate")
        still = await server.client.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    assert (before, after) == ([0, 0], [1, 1])
    assert generate.status_code == 200
    assert [row["status"] for row in generate.json()["ranks"]] == ["ok", "ok"]
    assert cached == [0, 0]
    assert failing.status_code == 503
    assert [row["status"] for row in failing.json()["ranks"]] == ["failed", "ok"]
    assert still.status_code == 200
    assert HEALTH_TIMEOUT_S == 20


@scenario
async def test_a_full_server_is_a_healthy_one(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    long = {"temperature": 0, "max_new_tokens": 1500, "ignore_eos": True}
    async with serving(demo, max_inflight=40) as server:
        (rank,) = server.ranks
        running = asyncio.create_task(server.post("/generate", {"text": ["x"] * 40, "sampling_params": long}))
        await until(lambda: rank.engine.snapshot().num_running == 32, "the rank is full")
        assert (await server.post("/generate", GENERATE)).status_code == 429
        monkeypatch.setattr(info, "HEALTH_TIMEOUT_S", 0.2)
        busy = await server.client.get("/health_generate")
        num_probes = len(rank.requests) - 40
        # a rank that is silent is not healthy, however much it has to do
        rank._hand_out = lambda outputs: None
        silent = await server.client.get("/health_generate")
        await server.core.abort(None, "test")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert busy.status_code == 200, busy.text
    assert num_probes == 1
    assert silent.status_code == 503


@scenario
async def test_loads_have_a_row_per_rank_with_the_sections_asked_for(demo: Demo) -> None:
    async with serving(demo, num_ranks=2) as server:
        for _ in range(2):
            await server.post("/generate", GENERATE | {"text": "word " * 40})
        await server.idle()
        loads = (await server.client.get("/v1/loads")).json()
        gateway = (await server.client.get("/v1/loads?include=core,disagg,queues,memory")).json()
        one = (await server.client.get("/v1/loads?dp_rank=1&include=all")).json()
        bad = await server.client.get("/v1/loads?include=core,secrets")
        text = await server.client.get("/v1/loads?format=prometheus")
        nobody = await server.client.get("/v1/loads?dp_rank=9")
    assert loads["dp_rank_count"] == 2
    # gateways parse it as text and drop the whole answer otherwise
    assert loads["timestamp"] == "2023-11-14T22:13:20+00:00"
    assert [row["dp_rank"] for row in loads["loads"]] == [0, 1]
    for row in loads["loads"]:
        assert row["num_running_reqs"] == row["num_waiting_reqs"] == row["num_used_tokens"] == 0
        assert row["num_waiting_uncached_tokens"] == 0
        assert row["max_total_num_tokens"] == 256 * 16
        assert "memory" not in row
    assert sum(row["cache_hit_rate"] > 0 for row in loads["loads"]) == 1
    assert gateway["loads"][0]["memory"]["token_capacity"] == 256 * 16
    assert gateway["loads"][0]["queues"] == {"waiting": 0}
    assert [row["dp_rank"] for row in one["loads"]] == [1]
    assert [bad.status_code, text.status_code, nobody.status_code] == [400, 400, 400]
    assert bad.json()["error"]["param"] == "include"


@scenario
async def test_a_silent_rank_is_no_success(demo: Demo) -> None:
    async with serving(demo, num_ranks=2) as server:
        server.ranks[0].is_mute = True
        loads = await server.client.get("/v1/loads")
        mute = await server.client.get("/v1/loads?dp_rank=0")
        other = await server.client.get("/v1/loads?dp_rank=1")
        nobody = await server.client.get("/v1/loads?dp_rank=9")
    async with serving(demo, num_ranks=0) as server:
        empty = await server.client.get("/v1/loads")
    assert loads.status_code == mute.status_code == empty.status_code == 503
    assert [(row["dp_rank"], row["status"]) for row in loads.json()["loads"]] == [(0, "unreachable"), (1, "serving")]
    assert "num_running_reqs" not in loads.json()["loads"][0]
    assert loads.json()["loads"][1]["num_running_reqs"] == 0
    assert loads.json()["message"] == "no answer from rank 0"
    # by this word the command line tells an answer from an error, and shows the rows
    assert loads.json()["success"] is False
    assert (other.status_code, nobody.status_code) == (200, 400)
    assert empty.json()["loads"] == []


@pytest.mark.parametrize("prefix", ["", "/v1"])
@scenario
async def test_tokenize_and_detokenize_undo_each_other(demo: Demo, prefix: str) -> None:
    texts = ["The tide 🌊", "a" * 20_000]
    async with serving(demo) as server:
        one = (await server.post(f"{prefix}/tokenize", {"prompt": texts[0]})).json()
        many = (await server.post(f"{prefix}/tokenize", {"prompt": texts})).json()
        text = (await server.post(f"{prefix}/detokenize", {"tokens": one["tokens"]})).json()
        both = (await server.post(f"{prefix}/detokenize", {"tokens": many["tokens"]})).json()
        unknown = await server.post(f"{prefix}/detokenize", {"tokens": [99_999]})
        empty = (await server.post(f"{prefix}/detokenize", {"tokens": []})).json()
    assert one["count"] == len(one["tokens"])
    assert one["max_model_len"] == demo.model.facts.max_len
    assert many["tokens"][0] == one["tokens"]
    assert text["text"] == texts[0]
    assert both["text"] == texts
    assert unknown.status_code == 400
    assert empty["text"] == ""


@scenario
async def test_tokenising_counts_as_one_in_flight(demo: Demo) -> None:
    async with serving(demo, max_inflight=1) as server:
        with server.core.admission.hold(1):
            refused = [
                await server.post("/tokenize", {"prompt": "x"}),
                await server.post("/detokenize", {"tokens": [5]}),
            ]
        taken = await server.post("/tokenize", {"prompt": "x"})
        assert server.core.admission.num_inflight == 0
    assert [response.status_code for response in refused] == [429, 429]
    assert taken.status_code == 200


def test_the_version_is_the_packages(request: pytest.FixtureRequest) -> None:
    project = tomllib.loads((Path(request.config.rootpath) / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


def test_a_card_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="vocab_size"):
        read_model_card(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 9, "max_position_embeddings": 64, "eos_token_id": 3}')
    card = read_model_card(tmp_path, max_len=32)
    assert (card.name, card.max_len, card.eos_token_ids) == (tmp_path.name, 32, (3,))
