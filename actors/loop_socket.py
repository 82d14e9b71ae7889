"""A ZeroMQ socket on an asyncio loop: messages come in as callbacks, sends never wait.

`zmq.asyncio` makes a future per message; a step's frame is cheaper as a plain call, and a send that would block has
to be an answer (congested: merge), not a suspended coroutine.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import zmq

log = logging.getLogger(__name__)

#: libzmq's heartbeats are answered by its I/O thread: a busy peer answers, a stopped or vanished one does not
HEARTBEAT_MS = 2_000
#: the health check gives a rank 10 s as well
HEARTBEAT_TIMEOUT_MS = 10_000
#: messages handled before other callbacks of the loop get their turn
_BURST = 128
#: a context whose sockets are closed ends within their linger; one that has not by then never will
_TERM_TIMEOUT_S = 5.0

Socket: TypeAlias = "zmq.Socket[bytes]"
OnMessage: TypeAlias = "Callable[[list[bytes]], None]"


def new_socket(context: zmq.Context[Any], kind: int) -> Socket:
    """A socket with heartbeats that keeps nothing back when it is closed."""
    socket = context.socket(kind)
    socket.linger = 0
    socket.heartbeat_ivl = HEARTBEAT_MS
    socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    socket.heartbeat_ttl = HEARTBEAT_TIMEOUT_MS
    # A frozen process accepts connections and never greets.
    socket.handshake_ivl = HEARTBEAT_TIMEOUT_MS
    return socket


async def end_context(context: zmq.Context[Any], timeout_s: float = _TERM_TIMEOUT_S) -> None:
    """End `context` once its sockets are closed. A socket left open costs `timeout_s` and a warning, never the loop."""
    # A daemon and not the loop's executor: the interpreter waits for the threads of executors.
    thread = threading.Thread(target=context.term, name="zmq-term", daemon=True)
    thread.start()
    await asyncio.to_thread(thread.join, timeout_s)
    if thread.is_alive():
        log.warning("a ZeroMQ socket was left open; its context did not end within %.1f s", timeout_s)


class LoopSocket:
    """Owns `socket` from now on. Lives on the loop that is running when it is made; not thread-safe."""

    def __init__(self, socket: Socket, on_message: OnMessage) -> None:
        self._socket = socket
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._is_drain_due = False
        self._is_closed = False
        self._loop.add_reader(socket.FD, self._drain)
        # What arrived before add_reader has already used up its edge.
        self._schedule_drain()

    def try_send(self, parts: list[bytes]) -> bool:
        """Send one message now. False: the peer's queue is full (or there is none), nothing was sent.

        Raises zmq.ZMQError with EHOSTUNREACH when a ROUTER no longer knows the peer.
        """
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            return False
        finally:
            # A send reads libzmq's mailbox and may swallow the edge that announces a message.
            if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                self._schedule_drain()
        return True

    def drain(self) -> None:
        """Hand over every message that has arrived. Before a disconnect is acted on: what came earlier comes first."""
        while self._drain_burst():
            pass

    def close(self, linger_ms: int = 0) -> None:
        """Give up the socket; frames that were handed over may still leave for `linger_ms`. Twice is once."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._socket.FD)
        self._socket.close(linger_ms)

    def _schedule_drain(self) -> None:
        if not self._is_drain_due:
            self._is_drain_due = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._is_drain_due = False
        if self._drain_burst():
            self._schedule_drain()

    def _drain_burst(self) -> bool:
        """Hand over what is there, up to a burst; True while there may be more.

        The descriptor is edge-triggered, so it must be read until it is empty.
        """
        for _ in range(_BURST):
            if self._is_closed:
                return False
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._on_message(parts)
        return not self._is_closed
