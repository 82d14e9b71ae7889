"""Profiles through every door: all ranks or none, truthful codes, traces that can be listed and fetched."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from configs.errors import Conflict, InvalidField, UnknownResource
from deployments.auth import Keys
from tests.unit.deployments.api_server import Demo, Server, scenario, serving
from tests.unit.deployments.on_a_port import on_a_port
from tests.unit.deployments.test_command_line import tidegate
from tests.unit.deployments.test_grpc import grpc_door
from tidegate import AsyncClient

BODY = {"text": "hello", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
LIGHT = {"with_stack": False, "record_shapes": False}


async def steps_on_every_rank(server: Server) -> None:
    for rank in server.ranks:
        answer = await server.post("/generate", BODY | {"data_parallel_rank": rank.rank})
        assert answer.status_code == 200


@scenario
async def test_a_profile_of_all_ranks_listed_and_fetched(demo: Demo, tmp_path: Path) -> None:
    async with serving(demo, num_ranks=2, traces=tmp_path) as server:
        # as benchmark clients send it, numbers as text included
        asked = LIGHT | {"activities": ["CPU"], "num_steps": "50", "output_dir": "run", "profile_prefix": "bench"}
        begun = await server.post("/v1/profiles/start", asked | {"profile_id": "p-1"})
        assert begun.status_code == 200, begun.text
        assert [row["status"] for row in begun.json()["ranks"]] == ["started", "started"]
        assert (await server.client.get("/v1/profiles")).json()["running"] == {"0": "p-1", "1": "p-1"}
        await steps_on_every_rank(server)
        ended = (await server.post("/v1/profiles/stop", {})).json()
        assert (ended["success"], ended["profile_id"]) == (True, "p-1")
        written = [trace for row in ended["ranks"] for trace in row["traces"]]
        names = ["run/bench-p-1-rank0.trace.json.gz", "run/bench-p-1-rank1.trace.json.gz"]
        assert [trace["name"] for trace in written] == names
        assert all(trace["num_steps"] >= 4 for trace in written)
        listed = (await server.client.get("/v1/profiles")).json()
        assert listed["running"] == {}
        assert sorted(trace["name"] for trace in listed["traces"]) == names
        for trace in written:
            fetched = await server.client.get(f"/v1/profiles/{trace['name']}")
            assert fetched.headers["content-type"] == "application/gzip"
            assert len(fetched.content) == trace["bytes"]
            assert json.loads(gzip.decompress(fetched.content))["traceEvents"]
        calls = [entry["call"] for entry in (await server.client.get("/v1/cache/audit")).json()["entries"]]
        assert calls == ["stop_profile", "start_profile"]


@scenario
async def test_codes_are_truthful(demo: Demo, tmp_path: Path) -> None:
    async with serving(demo, num_ranks=2, traces=tmp_path) as server:
        early = await server.client.post("/stop_profile")
        assert (early.status_code, early.text) == (409, "Profiling is not in progress. Call /start_profile first.\n")
        begun = await server.client.post("/start_profile")
        assert (begun.status_code, begun.text) == (200, "Start profiling.\n")
        again = await server.post("/start_profile", {})
        assert (again.status_code, "already in progress" in again.text) == (409, True)
        # the refused start has not touched the profile under way
        assert set((await server.client.get("/v1/profiles")).json()["running"]) == {"0", "1"}
        await steps_on_every_rank(server)
        assert (await server.client.post("/stop_profile")).status_code == 200
        assert (await server.client.post("/stop_profile")).status_code == 409
        assert (await server.client.get("/start_profile")).status_code == 405


@scenario
async def test_all_ranks_begin_or_none(demo: Demo, tmp_path: Path) -> None:
    async with serving(demo, num_ranks=2, traces=tmp_path) as server:
        server.ranks[1].is_mute = True
        begun = await server.post("/v1/profiles/start", LIGHT)
        assert begun.status_code == 503
        assert [row["status"] for row in begun.json()["ranks"]] == ["started", "unreachable"]
        assert "No rank profiles now." in begun.json()["message"]
        server.ranks[1].is_mute = False
        assert (await server.client.get("/v1/profiles")).json()["running"] == {}
        assert (await server.post("/v1/profiles/start", LIGHT)).status_code == 200
        # a rank that dies takes its trace with it; the other's is written
        await server.post("/generate", BODY | {"data_parallel_rank": 0})
        assert (await server.client.post("/v1/profiles/stop")).json()["ranks"][0]["status"] == "written"


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"num_steps": 0}, 400, "num_steps"),
    ({"num_steps": "ten"}, 400, "num_steps"),
    ({"start_step": -1}, 400, "start_step"),
    ({"activities": ["CPU", "RPD"]}, 400, "activities"),
    ({"activities": "CPU, GPU"}, 400, "activities"),
    ({"output_dir": "../elsewhere"}, 400, "below the root"),
    ({"output_dir": "/etc"}, 400, "below the root"),
    ({"output_dir": 3}, 400, "output_dir"),
    ({"profile_id": "../p"}, 400, "profile_id"),
    ({"profile_prefix": "a/b"}, 400, "profile_prefix"),
    ({"profile_stages": ["decode"]}, 400, "profile_stages"),
    ({"with_stack": "yes"}, 400, "with_stack"),
    ({"activities": ["GPU"]}, 400, "computes on the CPU"),
    ({"merge_profiles": True}, 501, "merge_profiles"),
    ({"depth": 3}, 400, "depth"),
]


@scenario
async def test_bad_arguments_are_named_and_begin_nothing(demo: Demo, tmp_path: Path) -> None:
    async with serving(demo, traces=tmp_path / "root") as server:
        for arguments, status, words in BAD:
            refused = await server.post("/start_profile", arguments)
            assert (refused.status_code, words in refused.text) == (status, True), (arguments, refused.text)
            assert str(tmp_path) not in refused.text
        assert (await server.client.get("/v1/profiles")).json()["running"] == {}
        assert not (tmp_path / "elsewhere").exists()


@scenario
async def test_only_traces_can_be_fetched(demo: Demo, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.trace.json.gz").write_text("hidden words")
    (root / "notes.txt").write_text("hidden words")
    (root / ".half.trace.json.gz").write_text("half")
    (root / "link.trace.json.gz").symlink_to(tmp_path / "secret.trace.json.gz")
    async with serving(demo, traces=root) as server:
        for name in ("notes.txt", ".half.trace.json.gz", "..%2Fsecret.trace.json.gz", "link.trace.json.gz", "none"):
            fetched = await server.client.get(f"/v1/profiles/{name}")
            assert (fetched.status_code, "hidden" in fetched.text) == (404, False), name


@scenario
async def test_profiles_belong_to_the_admin_key(demo: Demo, tmp_path: Path) -> None:
    async with serving(demo, keys=Keys(api_key="user", admin_key="admin"), traces=tmp_path) as server:
        for method, path in (("POST", "/start_profile"), ("POST", "/v1/profiles/stop"), ("GET", "/v1/profiles")):
            refused = await server.client.request(method, path, headers={"authorization": "Bearer user"})
            assert refused.status_code == 403


@scenario
async def test_profiles_from_the_command_line_and_the_client(demo: Demo, tmp_path: Path) -> None:
    async with on_a_port(demo, num_ranks=2, traces=tmp_path / "traces") as (server, url):
        assert (await tidegate("profile", "stop", "--url", url)).status == 1
        begun = await tidegate("profile", "start", "--url", url, "--id", "c-1", "--no-stack", "--output-dir", "cli")
        assert (begun.status, begun.out.count("started")) == (0, 2), begun
        again = await tidegate("profile", "start", "--url", url)
        assert (again.status, "already in progress" in again.err) == (1, True)
        assert (await tidegate("profile", "start", "--url", url, "--steps", "0")).status == 2
        await steps_on_every_rank(server)
        ended = await tidegate("profile", "stop", "--url", url, "--json")
        assert json.loads(ended.out)["profile_id"] == "c-1"
        listed = await tidegate("profile", "list", "--url", url)
        name = "cli/c-1-rank1.trace.json.gz"
        assert name in listed.out
        file = tmp_path / "fetched.json.gz"
        assert (await tidegate("profile", "get", name, "--to", str(file), "--url", url)).status == 0
        assert file.read_bytes() == (tmp_path / "traces" / name).read_bytes()
        async with AsyncClient(url) as client:
            with pytest.raises(UnknownResource):
                await client.save_profile("none.trace.json.gz", tmp_path / "none")
            with pytest.raises(Conflict, match="not in progress"):
                await client.stop_profile()
            with pytest.raises(InvalidField, match="activities"):
                await client.start_profile(activities=["RPD"])
            assert (await client.start_profile(profile_id="c-2", with_stack=False)).profile_id == "c-2"
            assert (await client.profiles()).running == {"0": "c-2", "1": "c-2"}
            assert [row["status"] for row in (await client.stop_profile()).ranks] == ["written", "written"]
    # nothing half fetched is left
    assert sorted(os.listdir(tmp_path)) == ["fetched.json.gz", "traces"]


@scenario
async def test_profiles_over_grpc(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path, traces=tmp_path / "traces") as door:
        early = await door.client.call("StopProfile")
        assert (early.code, early.messages[0].get("success", False)) == ("OK", False)
        begun = await door.client.call("StartProfile", {"num_steps": 2, "with_stack": False, "output_dir": "g"})
        assert begun.messages[0]["success"] is True
        again = await door.client.call("StartProfile", {})
        assert (again.messages[0].get("success", False), "already" in again.messages[0]["message"]) == (False, True)
        assert (await door.client.call("StartProfile", {"num_steps": -1})).code == "INVALID_ARGUMENT"
        await door.generate([5, 6, 7])
        await door.client.call("StopProfile")
        assert len(list((tmp_path / "traces" / "g").iterdir())) == 1
