"""The rank's end of the token path: a ROUTER per transport, one Step frame per engine step and peer.

A peer is one connection of one Api process. Frames that cannot leave (the peer's queue is full) wait here and later
steps are merged into them, so a slow reader costs memory in proportion to its open requests, not to the steps it
missed. A peer that is gone ends its requests: `on_abort` is called for them within one step.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import msgspec
import zmq

from actors.endpoints import TcpDoor
from actors.loop_socket import LoopSocket, end_context, new_socket
from actors.wire import Abort, Refused, Step, Submit, ToApi, decode_to_rank, encode
from engine.request import Output, Request

log = logging.getLogger(__name__)

#: frames that libzmq takes for one peer before it says "congested"; the rest waits here, merged
_SEND_QUEUE = 64
#: a congested peer is tried again this often; meanwhile its outputs only pile up, which costs nothing per step
_RETRY_S = 0.005
#: after a disconnect: libzmq reports it a moment before it forgets the routing id, so one look may be too early
_PROBES_S = (0.002, 0.05, 1.0)
#: no frame of an Api comes near: a prompt of 1M tokens is 4 MB
_MAX_FRAME_BYTES = 64 * 1024 * 1024

OnSubmit: TypeAlias = "Callable[[Request], None]"
OnAbort: TypeAlias = "Callable[[list[str], str], None]"


@dataclass(slots=True, eq=False)
class _Peer:
    """One connection of one Api process."""

    socket: LoopSocket
    #: routing id that libzmq gave the connection; a new connection has a new one
    identity: bytes
    #: outputs that have not left yet, in order
    pending: list[Output] = field(default_factory=list)
    #: refusals that have not left yet; at most one for each submit of the peer
    refusals: deque[Refused] = field(default_factory=deque[Refused])
    request_ids: set[str] = field(default_factory=set)


class _Stream(NamedTuple):
    peer: _Peer
    attempt: int


class DataPlane:
    """Takes requests from Apis and gives them their tokens. Lives on one loop; not thread-safe.

    `on_submit` and `on_abort` are called on the loop and must not wait.
    """

    def __init__(self, incarnation: str, on_submit: OnSubmit, on_abort: OnAbort) -> None:
        self._incarnation = incarnation
        self._on_submit = on_submit
        self._on_abort = on_abort
        self._context: zmq.Context[Any] = zmq.Context()
        self._sockets: list[LoopSocket] = []
        self._peers: dict[tuple[LoopSocket, bytes], _Peer] = {}
        self._streams: dict[str, _Stream] = {}
        #: peers whose frame did not leave at the last try
        self._congested: set[_Peer] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._probes: list[asyncio.TimerHandle] = []
        #: why new requests are refused; None while they are taken
        self._closed_because: str | None = None
        #: frames for another incarnation, unreadable ones, and outputs nobody waits for any more
        self.num_dropped_frames = 0

    def num_open(self, request_ids: list[str] | None) -> int:
        """Requests whose end has not been sent: of these, or of all (None)."""
        if request_ids is None:
            return len(self._streams)
        return len(self._streams.keys() & set(request_ids))

    def bind_ipc(self, endpoint: str) -> None:
        """Listen on this node. Raises zmq.ZMQError when the address cannot be bound."""
        self._bind(endpoint, None)

    def bind_tcp(self, door: TcpDoor) -> str:
        """Listen for other nodes on a free port of `door.host`, for holders of its key; returns the endpoint."""
        return self._bind(f"tcp://{door.host}:*", door)

    def deliver(self, outputs: Iterable[Output]) -> None:
        """Send the new tokens of one engine step: one frame per peer. Outputs of unknown requests are dropped."""
        touched: dict[_Peer, None] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None or stream.attempt != output.attempt:
                continue
            stream.peer.pending.append(output)
            touched[stream.peer] = None
            if output.finish is not None:
                self._forget(output.request_id)
        for peer in touched.keys() - self._congested:
            self._send_pending(peer)

    def fail_all(self, message: str) -> None:
        """End every open request with an error and refuse new ones; the last thing a dying rank says."""
        self._closed_because = message
        self.deliver(
            [
                Output(request_id, stream.attempt, [], finish="error", message=message)
                for request_id, stream in self._streams.items()
            ]
        )

    async def close(self, linger_ms: int = 0) -> None:
        """Close all doors; returns when the frames handed over before have left, at the latest after `linger_ms`."""
        for timer in [*self._probes, self._retry]:
            if timer is not None:
                timer.cancel()
        for socket in self._sockets:
            socket.close(linger_ms)
        await end_context(self._context)

    def _bind(self, endpoint: str, door: TcpDoor | None) -> str:
        router = new_socket(self._context, zmq.ROUTER)
        router.router_mandatory = True
        router.sndhwm = _SEND_QUEUE
        router.rcvhwm = 0  # bounded by the admission of the Apis
        router.maxmsgsize = _MAX_FRAME_BYTES
        if door is not None:
            router.curve_server = True
            router.curve_secretkey = door.secret_key
        router.bind(endpoint)
        bound = router.getsockopt_string(zmq.LAST_ENDPOINT)
        monitor = router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket: LoopSocket
        socket = LoopSocket(router, lambda parts: self._receive(socket, parts))
        self._sockets += [socket, LoopSocket(monitor, lambda _: self._probe_soon())]
        return bound

    def _receive(self, socket: LoopSocket, parts: list[bytes]) -> None:
        peer = self._peers.get((socket, parts[0]))
        if peer is None:
            peer = self._peers[socket, parts[0]] = _Peer(socket, parts[0])
        try:
            frame = decode_to_rank(parts[-1])
        except msgspec.DecodeError as error:
            log.warning("an unreadable frame was dropped: %s", error)
            self._refuse(peer, None, "the frame could not be read")
            return
        match frame:
            case Submit(incarnation=incarnation, request=request) if incarnation == self._incarnation:
                self._submit(peer, request)
            case Submit(request=request):
                self._refuse(peer, request, "the frame names another incarnation")
            case Abort(incarnation=incarnation, request_ids=request_ids) if incarnation == self._incarnation:
                self._abort(peer, request_ids)
            case Abort():
                self.num_dropped_frames += 1

    def _submit(self, peer: _Peer, request: Request) -> None:
        if self._closed_because is not None:
            self._refuse(peer, request, self._closed_because)
        elif request.request_id in self._streams:
            self._refuse(peer, request, "a request of this id is open", is_id_open=True)
        else:
            self._streams[request.request_id] = _Stream(peer, request.attempt)
            peer.request_ids.add(request.request_id)
            self._on_submit(request)

    def _abort(self, peer: _Peer, request_ids: list[str]) -> None:
        """Only the connection that owns a request may end it here; others go through the controller."""
        own = [request_id for request_id in request_ids if request_id in peer.request_ids]
        for request_id in own:
            self._forget(request_id)
        if own:
            self._on_abort(own, "the client has left")

    def _refuse(self, peer: _Peer, request: Request | None, reason: str, *, is_id_open: bool = False) -> None:
        """Say so at once, or, to a congested peer, as soon as it reads: a request without an answer would hang."""
        self.num_dropped_frames += 1
        request_id, attempt = ("", 0) if request is None else (request.request_id, request.attempt)
        peer.refusals.append(Refused(self._incarnation, request_id, reason, attempt, is_id_open))
        if peer not in self._congested:
            self._send_pending(peer)

    def _forget(self, request_id: str) -> None:
        stream = self._streams.pop(request_id)
        stream.peer.request_ids.discard(request_id)

    def _send_pending(self, peer: _Peer) -> None:
        """Refusals, then one frame of all tokens that wait; what does not leave now is tried again, merged."""
        peer.pending = merge(peer.pending)
        while peer.refusals and self._try_send(peer, peer.refusals[0]):
            peer.refusals.popleft()
        if not peer.refusals and peer.pending and self._try_send(peer, Step(self._incarnation, peer.pending)):
            peer.pending = []
        if peer.refusals or peer.pending:
            self._congested.add(peer)
            self._schedule_retry()
        else:
            self._congested.discard(peer)

    def _try_send(self, peer: _Peer, frame: ToApi) -> bool:
        """False: congested, or gone; a peer that is gone is dropped with its requests."""
        try:
            return peer.socket.try_send([peer.identity, encode(frame)])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._drop_peer(peer)
            return False

    def _drop_peer(self, peer: _Peer) -> None:
        orphans = list(peer.request_ids)
        for request_id in orphans:
            self._forget(request_id)
        peer.pending = []
        peer.refusals.clear()
        self._congested.discard(peer)
        self._peers.pop((peer.socket, peer.identity), None)
        if orphans:
            log.info("an Api connection is gone, %d requests are aborted", len(orphans))
            self._on_abort(orphans, "the connection of the client is gone")

    def _probe_soon(self) -> None:
        """A connection has ended; libzmq does not say whose, a send does. Frees requests that have no output yet."""
        loop = asyncio.get_running_loop()
        for timer in self._probes:
            timer.cancel()
        self._probes = [loop.call_later(delay_s, self._probe_peers) for delay_s in _PROBES_S]

    def _probe_peers(self) -> None:
        for peer in list(self._peers.values()):
            self._try_send(peer, Step(self._incarnation, []))

    def _schedule_retry(self) -> None:
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(_RETRY_S, self._retry_congested)

    def _retry_congested(self) -> None:
        self._retry = None
        for peer in list(self._congested):
            self._send_pending(peer)


def merge(outputs: list[Output]) -> list[Output]:
    """The same tokens in one Output per request and attempt, in the order in which the requests first appear."""
    if len({output.request_id for output in outputs}) == len(outputs):
        return outputs
    merged: dict[tuple[str, int], Output] = {}
    for output in outputs:
        key = (output.request_id, output.attempt)
        earlier = merged.get(key)
        merged[key] = output if earlier is None else _joined(earlier, output)
    return list(merged.values())


def _joined(first: Output, second: Output) -> Output:
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (first.logprobs or []) + (second.logprobs or [])
    return replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
        stats=second.stats or first.stats,
    )
