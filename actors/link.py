"""One connection from an Api process to one incarnation of a rank, and the streams on it.

A link is used once: when the connection ends, every stream on it ends with RankLost and a new link is made. So no
frame that libzmq has queued ever reaches another incarnation, and a rank that was frozen meets new streams only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from actors.loop_socket import LoopSocket, new_socket
from actors.messages import Member
from actors.wire import Abort, Refused, Step, Submit, decode_to_api, encode
from configs.errors import Conflict, RankLost
from engine.request import Output, Request

log = logging.getLogger(__name__)

#: frames that libzmq takes before the rank sees a congested peer and begins to merge
_RECEIVE_QUEUE = 64
#: a tcp connection that is not made by then is lost; ipc answers at once
_CONNECT_TIMEOUT_MS = 2_000
#: libzmq's own "never" (-1) throws away what has arrived and was not yet read; the link is closed long before this
_NEVER_MS = 3_600_000
#: CLOSED without a connection: nobody listens there
_ENDS = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_AUTH


@dataclass(slots=True)
class LinkCounters:
    """Totals over all links of a process; they only rise."""

    #: frames and outputs of another incarnation or attempt, or that could not be read
    num_dropped: int = 0
    #: links that ended while streams ran on them, or that could not be made
    num_lost: int = 0


class Stream:
    """Outputs of one request, in order, as they arrive."""

    __slots__ = ("_items", "attempt", "is_ended", "num_tokens", "request_id")

    def __init__(self, request: Request) -> None:
        self.request_id = request.request_id
        self.attempt = request.attempt
        #: prompt and output tokens so far
        self.num_tokens = request.num_prompt_tokens
        #: the last output, or the error instead of it, has been put
        self.is_ended = False
        # Not bounded here: a rank sends at most max_new_tokens of them.
        self._items: asyncio.Queue[Output | RankLost | Conflict] = asyncio.Queue()

    def put(self, item: Output | RankLost | Conflict) -> None:
        """Add an output, or the error that ends the stream."""
        self.is_ended = isinstance(item, RankLost | Conflict) or item.finish is not None
        self._items.put_nowait(item)

    async def next(self) -> Output:
        """The next output; raises RankLost after the last one that came, Conflict instead of the first."""
        item = await self._items.get()
        if isinstance(item, RankLost | Conflict):
            raise item
        return item


class Link:
    """Lives on the loop that is running when it is made; not thread-safe."""

    def __init__(
        self,
        context: zmq.Context[Any],
        member: Member,
        *,
        is_local: bool,
        counters: LinkCounters,
        on_up: Callable[[Link], None],
        on_lost: Callable[[Link], None],
    ) -> None:
        self.member = member
        self._counters = counters
        self._on_up = on_up
        self._on_lost = on_lost
        self._streams: dict[str, Stream] = {}
        self.num_tokens = 0
        self.is_lost = False
        dealer = new_socket(context, zmq.DEALER)
        dealer.reconnect_ivl = _NEVER_MS
        dealer.sndhwm = 0  # bounded by the Api's own admission
        dealer.rcvhwm = _RECEIVE_QUEUE
        dealer.connect_timeout = _CONNECT_TIMEOUT_MS
        monitor = dealer.get_monitor_socket(_ENDS | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        dealer.connect(self._prepare(dealer, is_local))
        self._socket = LoopSocket(dealer, self._receive)
        self._monitor = LoopSocket(monitor, self._observe)

    @property
    def num_streams(self) -> int:
        """Requests open on this link."""
        return len(self._streams)

    def open(self, request: Request) -> Stream:
        """Send `request`. Raises RankLost when the link is down, Conflict when the request's id is open on it."""
        if self.is_lost:
            raise self._lost("its connection is down")
        if request.request_id in self._streams:
            raise _open_already(request.request_id)
        stream = self._streams[request.request_id] = Stream(request)
        self.num_tokens += stream.num_tokens
        if not self._socket.try_send([encode(Submit(self.member.incarnation, request))]):
            self.lose("its connection takes no frames")
        return stream

    def end(self, stream: Stream) -> None:
        """Forget `stream`; if its rank may still be working on it, tell it to stop."""
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
            self.num_tokens -= stream.num_tokens
        if not stream.is_ended and not self.is_lost:
            self._socket.try_send([encode(Abort(self.member.incarnation, [stream.request_id]))])

    def lose(self, reason: str) -> None:
        """The connection has failed: end every stream with RankLost, then tell the owner. Twice is once."""
        if self.is_lost:
            return
        self._counters.num_lost += 1
        if self._streams:
            log.warning("rank %d is lost with %d streams: %s", self.member.rank, len(self._streams), reason)
        self.close(reason)
        self._on_lost(self)

    def close(self, reason: str) -> None:
        """End every stream with RankLost and close the connection; the rank aborts them. Twice is once."""
        self.is_lost = True
        for stream in self._streams.values():
            if not stream.is_ended:
                stream.put(self._lost(reason))
        self._monitor.close()
        self._socket.close()

    def _prepare(self, dealer: zmq.Socket[bytes], is_local: bool) -> str:
        """The endpoint to connect to; over tcp the dealer gets the key that lets it in."""
        if is_local:
            return self.member.ipc_endpoint
        dealer.curve_serverkey = self.member.tcp_key.encode()
        dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
        return self.member.tcp_endpoint

    def _receive(self, parts: list[bytes]) -> None:
        try:
            frame = decode_to_api(parts[-1])
        except msgspec.DecodeError as error:
            log.warning("rank %d sent an unreadable frame: %s", self.member.rank, error)
            self._counters.num_dropped += 1
            return
        if frame.incarnation != self.member.incarnation:
            self._counters.num_dropped += 1
        elif isinstance(frame, Step):
            for output in frame.outputs:
                self._give(output)
        else:
            self._refused(frame)

    def _give(self, output: Output) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None or stream.attempt != output.attempt or stream.is_ended:
            self._counters.num_dropped += 1
            return
        stream.num_tokens += len(output.token_ids)
        self.num_tokens += len(output.token_ids)
        stream.put(output)

    def _refused(self, frame: Refused) -> None:
        self._counters.num_dropped += 1
        stream = self._streams.get(frame.request_id)
        if stream is not None and stream.attempt == frame.attempt and not stream.is_ended:
            reason = self._lost(f"it refused the request: {frame.reason}")
            stream.put(_open_already(frame.request_id) if frame.is_id_open else reason)

    def _observe(self, parts: list[bytes]) -> None:
        event = parse_monitor_message(parts)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._on_up(self)
        else:
            self._socket.drain()
            self.lose("its connection has ended")

    def _lost(self, reason: str) -> RankLost:
        return RankLost(f"rank {self.member.rank} is lost: {reason}")


def _open_already(request_id: str) -> Conflict:
    return Conflict(f"a request with id {request_id!r} is in flight; ids of running requests are unique", "rid")
