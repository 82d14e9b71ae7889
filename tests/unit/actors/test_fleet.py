"""The ranks as an Api process sees them: membership, deaths, returns, and a controller that is away."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from actors.data_plane import DataPlane
from actors.loop_socket import end_context
from actors.messages import Member, Membership
from actors.wire import Refused, encode
from configs.errors import Conflict, ControlUnavailable, RankLost
from engine.request import Output
from tests.unit.actors.ranks import (
    LONG,
    NODE,
    Members,
    collect,
    expected,
    fleet_of,
    rank_and_fleet,
    request,
    run,
    running_rank,
    tokens,
    until,
)

#: a rank in a process of its own that answers every request with one token and then keeps silent
LONELY_RANK = """
import asyncio, sys
from actors.data_plane import DataPlane
from engine.request import Output

async def main():
    plane = DataPlane("lonely", lambda r: plane.deliver([Output(r.request_id, r.attempt, [42])]), lambda ids, why: None)
    plane.bind_ipc(sys.argv[1])
    print("UP", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@contextmanager
def lonely_rank(endpoint: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", LONELY_RANK, endpoint], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"UP\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tg-") as folder:
        yield Path(folder)


class Fixed(Members):
    """One member that no rank of this test process serves."""

    def __init__(self, endpoint: str, incarnation: str = "lonely") -> None:
        super().__init__()
        self.current = Membership(1, 0, 0, (Member(0, incarnation, NODE, endpoint, "", 512, 16),))


def test_a_killed_rank_ends_its_streams_after_what_had_come() -> None:
    async def scenario() -> None:
        with short_folder() as folder, lonely_rank(f"ipc://{folder}/s") as process:
            async with fleet_of(Fixed(f"ipc://{folder}/s")) as fleet:
                streams = [fleet.generate("lonely", request(f"r{i}")) for i in range(3)]
                for stream in streams:
                    assert (await anext(stream)).token_ids == [42]
                os.kill(process.pid, signal.SIGKILL)
                for stream in streams:
                    with pytest.raises(RankLost):
                        await anext(stream)
                assert fleet.members().members == ()
                assert fleet.counters.num_lost >= 1
                with pytest.raises(RankLost):
                    await collect(fleet, "lonely", request())

    run(scenario())


def test_an_address_where_nobody_listens_is_lost_at_once() -> None:
    async def scenario() -> None:
        with short_folder() as folder:
            async with fleet_of(Fixed(f"ipc://{folder}/nobody")) as fleet:
                with pytest.raises(RankLost):
                    await collect(fleet, "lonely", request())

    run(scenario())


def test_a_member_whose_connection_broke_is_tried_again() -> None:
    async def scenario() -> None:
        with short_folder() as folder:
            endpoint = f"ipc://{folder}/s"
            async with fleet_of(Fixed(endpoint)) as fleet:
                with pytest.raises(RankLost):
                    await collect(fleet, "lonely", request())
                # it was only slow to listen: the membership still names it
                with lonely_rank(endpoint):
                    await until(lambda: bool(fleet.members().members))
                    stream = fleet.generate("lonely", request("again"))
                    assert (await anext(stream)).token_ids == [42]
                    await stream.aclose()

    run(scenario())


def test_a_frozen_member_is_none_until_it_greets() -> None:
    async def scenario() -> None:
        with short_folder() as folder, socket.socket(socket.AF_UNIX) as frozen:
            endpoint = f"ipc://{folder}/s"
            async with fleet_of(Fixed(endpoint)) as fleet:
                await until(lambda: not fleet.members().members)
                # the kernel takes the connection for a process that does nothing
                frozen.bind(f"{folder}/s")
                frozen.listen()
                frozen.setblocking(False)
                connection, _ = await asyncio.get_running_loop().sock_accept(frozen)
                with connection:
                    assert fleet.members().members == ()
                    with pytest.raises(RankLost):
                        await collect(fleet, "lonely", request())

    run(scenario())


def test_frames_and_outputs_that_do_not_match_are_dropped_and_counted() -> None:
    async def scenario() -> None:
        with short_folder() as folder:
            endpoint = f"ipc://{folder}/s"
            plane = DataPlane("lonely", lambda r: plane.deliver([Output(r.request_id, 0, [1])]), lambda ids, why: None)
            # it answers under another name than its endpoint's membership says
            plane._incarnation = "another"
            plane.bind_ipc(endpoint)
            try:
                async with fleet_of(Fixed(endpoint)) as fleet:
                    stream = asyncio.ensure_future(collect(fleet, "lonely", request()))
                    await until(lambda: fleet.counters.num_dropped > 0)
                    assert not stream.done()
                    stream.cancel()
                    await asyncio.wait({stream})
            finally:
                await plane.close()

    run(scenario())


def test_members_come_and_go_and_running_streams_go_on() -> None:
    async def scenario() -> None:
        async with running_rank("aaaaaaaaaaaa") as one, running_rank("bbbbbbbbbbbb", number=1) as two:
            members = Members(one)
            async with fleet_of(members) as fleet:
                assert [m.rank for m in fleet.members().members] == [0]
                asked = request(num_tokens=600)
                async with aclosing(fleet.generate(one.incarnation, asked)) as stream:
                    got = [await anext(stream)]
                    members.set(two, epoch=4)
                    await until(lambda: fleet.members().epoch == 4)
                    assert [m.rank for m in fleet.members().members] == [1]
                    with pytest.raises(RankLost):
                        await collect(fleet, one.incarnation, request("new"))
                    got += [output async for output in stream]
                assert tokens(got) == expected(asked)
                asked = request("other")
                assert tokens(await collect(fleet, two.incarnation, asked)) == expected(asked)

    run(scenario())


def test_the_old_connection_of_a_member_that_came_back_breaks_alone() -> None:
    async def scenario() -> None:
        async with running_rank() as rank:
            members = Members(rank)
            async with fleet_of(members) as fleet:
                stream = fleet.generate(rank.incarnation, request("old", num_tokens=LONG))
                await anext(stream)
                old = fleet._seats[rank.incarnation].link
                for ranks in ((), (rank,)):
                    members.set(*ranks)
                    await until(lambda: fleet._membership.version == members.current.version)
                new = fleet._seats[rank.incarnation].link
                assert new is not old
                old.lose("its connection has ended")
                with pytest.raises(RankLost):
                    _ = [output async for output in stream]
                # the new one is whole, and no timer will put a third in its place
                assert fleet.members().members == (rank.member,)
                assert fleet._seats[rank.incarnation].retry is None
                asked = request("new")
                assert tokens(await collect(fleet, rank.incarnation, asked)) == expected(asked)

    run(scenario())


def test_an_id_that_is_open_on_its_rank_is_a_conflict_and_no_loss() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            asked = request(num_tokens=40, attempt=6)
            stream = fleet.generate(rank.incarnation, asked)
            got = [await anext(stream)]
            # from this process, and as the rank says it of another one's
            with pytest.raises(Conflict):
                await anext(fleet.generate(rank.incarnation, asked))
            link = fleet._seats[rank.incarnation].link
            other = link.open(replace(asked, request_id="other"))
            link._receive([encode(Refused(rank.incarnation, "other", "it is open", attempt=6, is_id_open=True))])
            with pytest.raises(Conflict, match="'other' is in flight"):
                await other.next()
            link.end(other)
            got += [output async for output in stream]
            assert tokens(got) == expected(asked)

    run(scenario())


def test_a_refusal_of_an_earlier_attempt_ends_nothing() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            asked = request(num_tokens=40, attempt=6)
            stream = fleet.generate(rank.incarnation, asked)
            got = [await anext(stream)]
            late = Refused(rank.incarnation, asked.request_id, "a request of this id is open", attempt=5)
            fleet._seats[rank.incarnation].link._receive([encode(late)])
            got += [output async for output in stream]
            assert tokens(got) == expected(asked)
            assert fleet.counters.num_dropped == 1

    run(scenario())


def test_a_socket_left_open_does_not_hold_up_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        left_open = context.socket(zmq.DEALER)
        try:
            await asyncio.wait_for(end_context(context, timeout_s=0.05), 5)
            assert "left open" in caplog.text
            assert not context.closed
        finally:
            left_open.close()
        await until(lambda: context.closed)

    run(scenario())


def test_a_controller_that_is_away_leaves_the_last_membership_in_force() -> None:
    async def scenario() -> None:
        async with running_rank("aaaaaaaaaaaa") as one, running_rank("bbbbbbbbbbbb", number=1) as two:
            members = Members(one)
            async with fleet_of(members) as fleet:
                members.failure = ControlUnavailable("nobody answers")
                members.wake()
                asked = request()
                assert tokens(await collect(fleet, one.incarnation, asked)) == expected(asked)
                assert fleet.members() == members.current
                # it is back, with a version of its own and one rank more
                members.failure = None
                members.current = replace(members.current, version=1 << 20, members=(one.member, two.member))
                await until(lambda: len(fleet.members().members) == 2)

    run(scenario())


def test_a_fleet_without_a_controller_starts_empty_and_finds_it_later() -> None:
    async def scenario() -> None:
        async with running_rank() as rank:
            members = Members(rank)
            members.failure = ControlUnavailable("not yet")
            async with fleet_of(members) as fleet:
                assert fleet.members().members == ()
                members.failure = None
                await until(lambda: bool(fleet.members().members))

    run(scenario())


def test_closing_ends_streams_and_frees_the_rank() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            stream = fleet.generate(rank.incarnation, request(num_tokens=LONG))
            await anext(stream)
            await fleet.close()
            with pytest.raises(RankLost):
                _ = [output async for output in stream]
            await until(lambda: rank.engine.snapshot().num_running == 0)
            assert (await rank.actor.status())["counters"]["num_finished_abort"] == 1

    run(scenario())
