"""The ranks as an Api process sees them: who takes requests, and the streams that run on each.

Membership comes from the controller's long poll. While the controller is away the last membership stays in force: a
rank that has died is noticed here anyway, by its connection, within milliseconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import zmq

from actors.link import Link, LinkCounters
from actors.loop_socket import end_context
from actors.messages import Member, Membership
from configs.errors import RankLost
from engine.request import Output, Request

log = logging.getLogger(__name__)

#: one long poll; the controller answers earlier when something changes
_POLL_S = 30.0
#: pause after a failed poll or connection, doubled each time
_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 5.0

#: (known_version, timeout_s) -> membership; raises when the controller does not answer
Watch: TypeAlias = "Callable[[int, float], Awaitable[Membership]]"


@dataclass(frozen=True, slots=True)
class MemberLoad:
    """What this process has running on one rank."""

    num_requests: int
    #: tokens of these requests, prompts and outputs so far
    num_tokens: int


@dataclass(slots=True)
class _Seat:
    """One incarnation of the membership and the connection to it."""

    member: Member
    link: Link
    #: connections that failed since the last one that was made
    num_failures: int = 0
    #: set while the connection is down and will be tried again
    retry: asyncio.TimerHandle | None = None

    @property
    def is_usable(self) -> bool:
        """A first connection is as good as made; one after a failure must be made first: a frozen process answers
        connects (its kernel does) and nothing else."""
        return self.num_failures == 0 and not self.link.is_lost


class Fleet:
    """Lives on the loop on which `start` was called; not thread-safe.

    A rank that leaves the membership gets no new request; its running streams go on until it ends them or dies.
    """

    def __init__(self, watch: Watch, node_id: str) -> None:
        self._watch = watch
        self._node_id = node_id
        self._context: zmq.Context[Any] = zmq.Context()
        self._membership = Membership(version=0, epoch=0, floor=0)
        self._seats: dict[str, _Seat] = {}
        #: links of incarnations that left the membership with streams still running
        self._leaving: set[Link] = set()
        self._closing = asyncio.Event()
        self._first_poll = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None
        self.counters = LinkCounters()

    async def start(self) -> None:
        """Begin to follow the membership; returns after the first poll has ended, well or not."""
        self._poller = asyncio.create_task(self._follow_membership(), name="membership")
        await self._first_poll.wait()

    async def close(self) -> None:
        """End all streams with RankLost and close all connections. Twice is once."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
        for incarnation in list(self._seats):
            self._unseat(incarnation).close("this server is closing")
        for link in self._leaving:
            link.close("this server is closing")
        await end_context(self._context)

    def members(self) -> Membership:
        """The newest membership known, without the ranks that this process cannot reach now."""
        usable = tuple(seat.member for seat in self._seats.values() if seat.is_usable)
        return replace(self._membership, members=usable)

    def loads(self) -> dict[str, MemberLoad]:
        """incarnation -> what this process has running there; all members, idle ones too."""
        return {
            incarnation: MemberLoad(seat.link.num_streams, seat.link.num_tokens)
            for incarnation, seat in self._seats.items()
        }

    async def generate(self, incarnation: str, request: Request) -> AsyncGenerator[Output, None]:
        """Send `request` to a rank and yield its outputs; the last one has `finish` set.

        The request leaves at the first `__anext__`. Closing the iterator early aborts it on the rank at once.
        Raises RankLost when the rank is unknown, refuses or dies; outputs that arrived before come first.
        """
        seat = self._seats.get(incarnation)
        if seat is None or not seat.is_usable:
            raise RankLost("the rank is not reachable any more")
        link = seat.link
        stream = link.open(request)
        try:
            while True:
                output = await stream.next()
                yield output
                if output.finish is not None:
                    return
        finally:
            link.end(stream)
            if link in self._leaving and not link.num_streams:
                self._leaving.discard(link)
                link.close("it has left")

    # --- membership -----------------------------------------------------------------------------------------------

    async def _follow_membership(self) -> None:
        num_failures = 0
        # -1: the first poll is answered at once, even by a controller that has seen no change yet.
        known_version = -1
        while not self._closing.is_set():
            try:
                membership = await self._watch(known_version, _POLL_S)
            except Exception as error:  # a remote call: whatever it is, the last membership stays in force
                num_failures += 1
                log.warning("membership poll failed (%d in a row), keeping the last one: %s", num_failures, error)
                self._first_poll.set()
                await self._pause(num_failures)
                continue
            num_failures = 0
            known_version = membership.version
            self._adopt(membership)
            self._first_poll.set()

    async def _pause(self, num_failures: int) -> None:
        try:
            await asyncio.wait_for(self._closing.wait(), _retry_s(num_failures))
        except TimeoutError:
            return

    def _adopt(self, membership: Membership) -> None:
        reachable = {member.incarnation: member for member in membership.members if self._can_reach(member)}
        for incarnation in self._seats.keys() - reachable.keys():
            self._retire(self._unseat(incarnation))
        for incarnation, member in reachable.items():
            seat = self._seats.get(incarnation)
            if seat is None:
                self._seats[incarnation] = _Seat(member, self._connect(member))
            else:
                seat.member = member
        self._membership = membership

    def _can_reach(self, member: Member) -> bool:
        is_reachable = member.node_id == self._node_id or bool(member.tcp_endpoint)
        if not is_reachable:
            log.error("rank %d is on another node and listens on this node only (configs: ray.tcp)", member.rank)
        return is_reachable

    def _unseat(self, incarnation: str) -> Link:
        seat = self._seats.pop(incarnation)
        if seat.retry is not None:
            seat.retry.cancel()
        return seat.link

    def _retire(self, link: Link) -> None:
        """The rank has left: no new requests, running streams go on."""
        if link.num_streams and not link.is_lost:
            self._leaving.add(link)
        else:
            link.close("it has left")

    # --- connections ----------------------------------------------------------------------------------------------

    def _connect(self, member: Member) -> Link:
        is_local = member.node_id == self._node_id
        return Link(
            self._context, member, is_local=is_local, counters=self.counters, on_up=self._up, on_lost=self._lost
        )

    def _up(self, link: Link) -> None:
        seat = self._seat_of(link)
        if seat is not None:
            seat.num_failures = 0

    def _lost(self, link: Link) -> None:
        """A rank that is still a member may only have been frozen or cut off: try again, ever less often."""
        self._leaving.discard(link)
        seat = self._seat_of(link)
        if seat is None:
            return
        seat.num_failures += 1
        seat.retry = asyncio.get_running_loop().call_later(_retry_s(seat.num_failures), self._reconnect, seat)

    def _seat_of(self, link: Link) -> _Seat | None:
        """None: the rank has left, or it came back and has another connection by now."""
        seat = self._seats.get(link.member.incarnation)
        return seat if seat is not None and seat.link is link else None

    def _reconnect(self, seat: _Seat) -> None:
        """Timer of a seat that is a member; `_unseat` cancels it."""
        seat.retry = None
        seat.link = self._connect(seat.member)


def _retry_s(num_failures: int) -> float:
    return min(_FIRST_RETRY_S * 2 ** (num_failures - 1), _LAST_RETRY_S)
