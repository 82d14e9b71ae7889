"""The controller: who takes requests, and the calls about all ranks other than flushes."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import pytest

from actors.clock import BootClock
from actors.log_records import RankJoined
from actors.process_proof import start_time_of
from configs.errors import ControlUnavailable, InvalidField, RankLost
from tests.unit.actors.fakes import FakeRank, rank_record
from tests.unit.actors.planes import (
    LATEST_S,
    Failing,
    add,
    control_plane,
    never,
    ranks,
    run,
    statuses,
)


def test_a_lost_rank_takes_no_requests_but_still_counts() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            fleet = ranks(2)
            await add(plane, *fleet)
            before = await plane.membership(-1, 0)
            waiting = asyncio.create_task(plane.membership(before.version, 10))
            fleet[1].dies.set()
            after = await waiting
            assert [member.rank for member in after.members] == [0]
            fleet[1].behave = never
            answer = await plane.flush(timeout_s=0)
            assert statuses(answer) == ["flushed", "unreachable"]
            rows = (await plane.status(timeout_s=1))["ranks"]
            assert [(row["rank"], row["status"]) for row in rows] == [(0, "serving"), (1, "lost")]

    run(scenario())


def test_the_membership_poll_ends_with_its_time() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            empty = await plane.membership(-1, 10)
            begin = time.monotonic()
            assert await plane.membership(empty.version, 0.05) == empty
            assert time.monotonic() - begin < 0.05 + LATEST_S

    run(scenario())


def test_registering_is_refused_to_strangers() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            other_version = FakeRank(rank_record(0, message_version=99))
            with pytest.raises(InvalidField, match="99"):
                await add(plane, other_version)
            own = rank_record(0)
            recycled = FakeRank(rank_record(0, start_time=(start_time_of(own.pid) or 0) + 1))
            with pytest.raises(RankLost):
                await add(plane, recycled)
            assert (await plane.membership(-1, 0)).members == ()

    run(scenario())


def test_a_registration_that_cannot_be_stored_is_taken_back() -> None:
    async def scenario() -> None:
        async with control_plane(Failing(RankJoined)) as plane:
            with pytest.raises(ControlUnavailable, match="cannot be written"):
                await add(plane, *ranks(1))
            assert (await plane.membership(-1, 0)).members == ()

    run(scenario())


def test_abort_goes_to_every_rank() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            fleet = ranks(2)
            await add(plane, *fleet)
            answer = await plane.abort("request-1", False, 5.0, "test")
            assert answer["success"]
            assert answer["num_aborted"] == 4
            assert [rank.aborted[0].request_ids for rank in fleet] == [("request-1",), ("request-1",)]
            left_s = fleet[0].aborted[0].valid_until_s - BootClock().now_s()
            assert 2.5 < left_s <= 5.1
            assert fleet[0].aborted[0].term == (await plane.hello())["term"]
            assert (await plane.abort(None, True, 5.0, "test"))["success"]
            assert fleet[0].aborted[-1].request_ids is None
            for request_id, everything in ((None, False), ("a", True), (7, False), ([], 1)):
                refused = await plane.abort(request_id, everything, 5.0, "test")
                assert refused["status"] == "invalid"

    run(scenario())


def test_status_names_who_does_not_answer_within_its_time() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            fleet = ranks(2)
            await add(plane, *fleet)

            async def silent() -> dict[str, Any]:
                await asyncio.Event().wait()
                raise AssertionError

            fleet[1].do_status = silent
            begin = time.monotonic()
            answer = await plane.status(timeout_s=0.1)
            assert time.monotonic() - begin < 0.1 + LATEST_S
            assert not answer["success"]
            assert [(row["rank"], row["status"]) for row in answer["ranks"]] == [(0, "serving"), (1, "unreachable")]
            assert answer["ranks"][0]["pages"] == {"free": 64}
            assert answer["ranks"][0]["longest_step_s"] == 0.1
            assert (await plane.status(timeout_s=math.nan))["status"] == "invalid"

    run(scenario())


def test_info_tells_no_endpoint_and_no_key() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            await add(plane, FakeRank(rank_record(0, tcp_key="secret", tcp_endpoint="tcp://10.0.0.1:5")))
            info = await plane.info()
            assert info["ranks"][0]["page_size"] == 16
            assert "secret" not in str(info)
            assert "tcp://" not in str(info)
            assert (await plane.flush_status("unknown"))["http_status"] == 404
            assert (await plane.flush_status(7))["http_status"] == 400

    run(scenario())
