"""The rank's doors: frames that are not for it, peers that vanish, peers that do not read."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from actors.data_plane import DataPlane, merge
from actors.wire import Abort, Refused, Step, Submit, ToRank, decode_to_api, encode
from engine.request import Output, Request, RequestStats, TokenLogprobs
from tests.unit.actors.ranks import request, run, until

INCARNATION = "0123456789ab"


class Door:
    """A data plane and what it told."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.submitted: asyncio.Queue[Request] = asyncio.Queue()
        self.aborted: asyncio.Queue[tuple[list[str], str]] = asyncio.Queue()
        self.plane = DataPlane(
            INCARNATION, self.submitted.put_nowait, lambda ids, reason: self.aborted.put_nowait((ids, reason))
        )
        self.plane.bind_ipc(endpoint)


class Client:
    """An Api process in the raw: one DEALER."""

    def __init__(self, endpoint: str, receive_queue: int = 1000) -> None:
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.rcvhwm = receive_queue
        self.socket.linger = 0
        self.socket.connect(endpoint)

    async def send(self, frame: ToRank | bytes) -> None:
        await self.socket.send(frame if isinstance(frame, bytes) else encode(frame))

    async def receive(self) -> Step | Refused:
        return decode_to_api(await self.socket.recv())

    def close(self) -> None:
        self._context.destroy()


@asynccontextmanager
async def door_and_client() -> AsyncIterator[tuple[Door, Client]]:
    with tempfile.TemporaryDirectory(prefix="tg-") as folder:
        door = Door(f"ipc://{Path(folder) / 's'}")
        client = Client(door.endpoint)
        try:
            yield door, client
        finally:
            client.close()
            await door.plane.close()


def test_outputs_of_one_step_leave_in_one_frame() -> None:
    async def scenario() -> None:
        async with door_and_client() as (door, client):
            for name in ("a", "b"):
                await client.send(Submit(INCARNATION, request(name)))
                await door.submitted.get()
            outputs = [Output("a", 0, [1]), Output("b", 0, [2], finish="stop"), Output("nobody", 0, [3])]
            door.plane.deliver(outputs)
            assert await client.receive() == Step(INCARNATION, outputs[:2])
            assert door.plane.num_open(None) == 1

    run(scenario())


def test_frames_for_another_incarnation_are_refused_and_counted() -> None:
    async def scenario() -> None:
        async with door_and_client() as (door, client):
            await client.send(Submit("another", request("a", attempt=3)))
            answer = await client.receive()
            assert isinstance(answer, Refused)
            assert (answer.incarnation, answer.request_id, answer.attempt) == (INCARNATION, "a", 3)
            await client.send(Abort("another", ["a"]))
            await client.send(Submit(INCARNATION, request("b")))
            assert (await door.submitted.get()).request_id == "b"
            assert door.submitted.empty()
            assert door.plane.num_dropped_frames == 2

    run(scenario())


def test_unreadable_frames_are_refused_and_the_door_stays_open() -> None:
    async def scenario() -> None:
        async with door_and_client() as (door, client):
            garbage = [b"", b"\xc1", msgspec.msgpack.encode(["submit", INCARNATION]), msgspec.msgpack.encode({"a": 1})]
            for frame in garbage:
                await client.send(frame)
                assert isinstance(await client.receive(), Refused)
            assert door.plane.num_dropped_frames == len(garbage)
            await client.send(Submit(INCARNATION, request("b")))
            assert (await door.submitted.get()).request_id == "b"

    run(scenario())


def test_only_the_owner_may_abort() -> None:
    async def scenario() -> None:
        async with door_and_client() as (door, client):
            stranger = Client(door.endpoint)
            try:
                await client.send(Submit(INCARNATION, request("a")))
                await door.submitted.get()
                await stranger.send(Abort(INCARNATION, ["a"]))
                await stranger.send(Submit(INCARNATION, request("b")))
                await door.submitted.get()
                assert door.aborted.empty()
                await client.send(Abort(INCARNATION, ["a", "unknown"]))
                assert (await door.aborted.get())[0] == ["a"]
            finally:
                stranger.close()

    run(scenario())


def test_outputs_of_an_earlier_attempt_go_nowhere() -> None:
    async def scenario() -> None:
        async with door_and_client() as (door, client):
            await client.send(Submit(INCARNATION, request("a")))
            await door.submitted.get()
            await client.send(Abort(INCARNATION, ["a"]))
            await client.send(Submit(INCARNATION, request("a", attempt=1)))
            await door.submitted.get()
            door.plane.deliver([Output("a", 0, [], finish="abort")])
            door.plane.deliver([Output("a", 1, [9])])
            assert await client.receive() == Step(INCARNATION, [Output("a", 1, [9])])

    run(scenario())


def test_a_vanished_client_ends_its_requests_without_any_output() -> None:
    async def scenario() -> None:
        async with door_and_client() as (door, client):
            for name in ("a", "b"):
                await client.send(Submit(INCARNATION, request(name)))
                await door.submitted.get()
            client.close()
            ids, _ = await door.aborted.get()
            assert sorted(ids) == ["a", "b"]
            assert door.plane.num_open(None) == 0
            door.plane.deliver([Output("a", 0, [1])])

    run(scenario())


def test_steps_are_merged_while_a_client_does_not_read_and_no_token_is_lost() -> None:
    num_steps = 20_000
    padding = "x" * 200

    async def scenario() -> None:
        async with door_and_client() as (door, client):
            reader = Client(door.endpoint, receive_queue=1)
            try:
                await reader.send(Submit(INCARNATION, request("slow")))
                await client.send(Submit(INCARNATION, request("other")))
                await door.submitted.get()
                await door.submitted.get()
                for step in range(num_steps):
                    # the message makes frames big: a socket's own buffers fill up sooner
                    door.plane.deliver([Output("slow", 0, [step], message=padding)])
                # nobody else waits behind the slow one
                door.plane.deliver([Output("other", 0, [1], finish="stop")])
                assert await client.receive() == Step(INCARNATION, [Output("other", 0, [1], finish="stop")])
                door.plane.deliver([Output("slow", 0, [num_steps], finish="length")])
                got: list[int] = []
                num_frames = 0
                while not got or got[-1] != num_steps:
                    frame = await reader.receive()
                    assert isinstance(frame, Step)
                    num_frames += 1
                    got += [token for output in frame.outputs for token in output.token_ids]
                assert got == list(range(num_steps + 1))
                assert num_frames < num_steps / 2
            finally:
                reader.close()

    run(scenario())


def test_a_refusal_reaches_a_client_that_did_not_read_for_a_while() -> None:
    padding = "x" * 10_000

    async def scenario() -> None:
        async with door_and_client() as (door, _):
            reader = Client(door.endpoint, receive_queue=1)
            try:
                await reader.send(Submit(INCARNATION, request("slow")))
                await door.submitted.get()
                while not door.plane._congested:
                    door.plane.deliver([Output("slow", 0, [1], message=padding)])
                for name in ("one", "two"):
                    await reader.send(Submit("another", request(name)))
                await until(lambda: door.plane.num_dropped_frames == 2)
                door.plane.deliver([Output("slow", 0, [2], finish="stop")])
                refused: list[str] = []
                finish = None
                while finish is None or len(refused) < 2:
                    frame = await reader.receive()
                    if isinstance(frame, Refused):
                        refused.append(frame.request_id)
                    else:
                        finish = frame.outputs[-1].finish
                assert refused == ["one", "two"]
                assert not door.plane._congested
            finally:
                reader.close()

    run(scenario())


def test_the_last_words_reach_every_client() -> None:
    async def scenario() -> None:
        async with door_and_client() as (door, client):
            await client.send(Submit(INCARNATION, request("a", attempt=2)))
            await door.submitted.get()
            door.plane.fail_all("the rank has failed")
            expected = Output("a", 2, [], finish="error", message="the rank has failed")
            assert await client.receive() == Step(INCARNATION, [expected])
            await client.send(Submit(INCARNATION, request("late")))
            answer = await client.receive()
            assert isinstance(answer, Refused)
            assert answer.reason == "the rank has failed"
            assert door.submitted.empty()

    run(scenario())


def test_merging_keeps_order_logprobs_and_the_newest_facts() -> None:
    first, last = RequestStats(3, 0, None), RequestStats(3, 0, None, num_retractions=1)
    one, two = TokenLogprobs(-1.0), TokenLogprobs(-2.0)
    merged = merge(
        [
            Output("a", 0, [1], [one], stats=first),
            Output("b", 0, [7]),
            Output("a", 0, [2], [two]),
            Output("a", 1, [5]),
            Output("b", 0, [8], finish="stop", matched_stop=8, stats=last),
        ]
    )
    assert merged == [
        Output("a", 0, [1, 2], [one, two], stats=first),
        Output("b", 0, [7, 8], finish="stop", matched_stop=8, stats=last),
        Output("a", 1, [5]),
    ]
