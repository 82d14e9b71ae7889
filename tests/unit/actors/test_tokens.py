"""The way of a request's tokens: Fleet, sockets, data plane, engine thread and back."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing
from dataclasses import replace

import pytest
import zmq

from actors.fleet import MemberLoad
from actors.messages import AbortCommand
from configs.errors import Conflict, RankLost
from tests.unit.actors.ranks import (
    LONG,
    Members,
    collect,
    expected,
    fleet_of,
    rank_and_fleet,
    request,
    run,
    running_rank,
    tokens,
)


def test_tokens_come_in_order_one_output_per_step_with_the_facts_at_both_ends() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            asked = request(num_tokens=12)
            outputs = await collect(fleet, rank.incarnation, asked)
            assert tokens(outputs) == expected(asked)
            assert outputs[-1].finish == "length"
            assert [output.finish for output in outputs[:-1]] == [None] * 11
            assert outputs[0].stats is not None
            assert outputs[-1].stats is not None
            assert outputs[0].stats.num_prompt_tokens == 3

    run(scenario())


def test_many_streams_of_two_processes_keep_apart() -> None:
    async def scenario() -> None:
        async with running_rank() as rank, fleet_of(Members(rank)) as one, fleet_of(Members(rank)) as other:
            asked = [request(f"r{i}", [i, i + 1, 7], num_tokens=5 + i) for i in range(20)]
            fleets = [one, other]
            answers = await asyncio.gather(
                *(collect(fleets[i % 2], rank.incarnation, each) for i, each in enumerate(asked))
            )
            for each, answer in zip(asked, answers, strict=True):
                assert tokens(answer) == expected(each)
            assert one.counters.num_dropped == other.counters.num_dropped == 0

    run(scenario())


def test_a_repeated_prompt_is_cached() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            prompt = list(range(1, 14))
            await collect(fleet, rank.incarnation, request("first", prompt))
            again = await collect(fleet, rank.incarnation, request("again", prompt))
            assert again[-1].stats is not None
            assert again[-1].stats.num_cached_tokens == 12
            assert again[-1].stats.kv_epoch == 0

    run(scenario())


def test_a_closed_iterator_aborts_its_request_at_once() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            async with aclosing(fleet.generate(rank.incarnation, request(num_tokens=LONG))) as stream:
                await anext(stream)
                assert fleet.loads()[rank.incarnation].num_requests == 1
            assert fleet.loads()[rank.incarnation] == MemberLoad(0, 0)
            # the next answer comes after the abort was seen: one connection, one order
            await collect(fleet, rank.incarnation, request("next", num_tokens=1))
            status = await rank.actor.status()
            assert status["num_running"] == 0
            assert status["counters"]["num_finished_abort"] == 1
            assert status["num_private_pages"] == status["num_pinned_pages"] == 0

    run(scenario())


def test_load_counts_prompt_and_generated_tokens() -> None:
    async def scenario() -> None:
        asked = request(prompt=range(1, 11), num_tokens=500)
        async with rank_and_fleet() as (rank, fleet), aclosing(fleet.generate(rank.incarnation, asked)) as stream:
            await anext(stream)
            load = fleet.loads()[rank.incarnation]
            assert load.num_requests == 1
            assert load.num_tokens >= 11

    run(scenario())


def test_a_control_call_aborts_by_id_or_all() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            streams = {i: fleet.generate(rank.incarnation, request(i, num_tokens=LONG)) for i in ("a", "b", "c")}
            for stream in streams.values():
                await anext(stream)
            assert await rank.actor.abort(AbortCommand(("a", "unknown"), "asked to", 1, math.inf)) == {"num_aborted": 1}
            last = [output async for output in streams["a"]][-1]
            assert (last.finish, last.message) == ("abort", "asked to")
            assert await rank.actor.abort(AbortCommand(None, "all of them", 1, math.inf)) == {"num_aborted": 2}
            for name in ("b", "c"):
                assert [output async for output in streams[name]][-1].finish == "abort"

    run(scenario())


def test_a_refused_request_says_why_and_the_rank_goes_on() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            answer = await collect(fleet, rank.incarnation, request("long", [1] * 20_000))
            assert answer[-1].finish == "error"
            assert "20,000 tokens" in answer[-1].message
            asked = request("fine")
            assert tokens(await collect(fleet, rank.incarnation, asked)) == expected(asked)

    run(scenario())


def test_an_id_that_is_open_elsewhere_is_refused() -> None:
    async def scenario() -> None:
        async with running_rank() as rank, fleet_of(Members(rank)) as one, fleet_of(Members(rank)) as other:
            stream = one.generate(rank.incarnation, request("same", num_tokens=LONG))
            await anext(stream)
            with pytest.raises(Conflict, match="is in flight"):
                await collect(other, rank.incarnation, request("same"))
            assert (await anext(stream)).finish is None
            await stream.aclose()

    run(scenario())


def test_tcp_takes_who_holds_the_key_and_nobody_else() -> None:
    async def scenario() -> None:
        async with running_rank(tcp=True) as rank:
            asked = request()
            async with fleet_of(Members(rank), "another-node") as fleet:
                assert tokens(await collect(fleet, rank.incarnation, asked)) == expected(asked)
            foreign_key, _ = zmq.curve_keypair()
            rank.record = replace(rank.record, tcp_key=foreign_key.decode())
            async with fleet_of(Members(rank), "another-node") as fleet:
                with pytest.raises(RankLost):
                    await collect(fleet, rank.incarnation, asked)
            assert (await rank.actor.status())["counters"]["num_arrived"] == 1

    run(scenario())


def test_a_rank_without_tcp_is_no_member_for_other_nodes() -> None:
    async def scenario() -> None:
        async with running_rank() as rank, fleet_of(Members(rank), "another-node") as fleet:
            assert fleet.members().members == ()
            with pytest.raises(RankLost):
                await collect(fleet, rank.incarnation, request())

    run(scenario())
