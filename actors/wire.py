"""Frames between Api and rank: msgpack over ZeroMQ, one frame per engine step and connection.

Api side: DEALER, one per rank. Rank side: ROUTER, bound to an endpoint that carries its incarnation, so a frame can
never reach another one (protocol.md, hole H38). Frames carry incarnation and attempt all the same: what does not
match is dropped and counted.
"""

from __future__ import annotations

import msgspec

from engine.request import Output, Request


class Submit(msgspec.Struct, frozen=True, tag="submit", array_like=True):
    """Api -> rank: generate."""

    incarnation: str
    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort", array_like=True):
    """Api -> rank: the client is gone, or the text is complete. Unknown ids are ignored."""

    incarnation: str
    request_ids: list[str]


class Step(msgspec.Struct, frozen=True, tag="step", array_like=True):
    """Rank -> Api: all new tokens of one engine step for this connection."""

    incarnation: str
    outputs: list[Output]


class Refused(msgspec.Struct, frozen=True, tag="refused", array_like=True):
    """Rank -> Api: this frame was not for me (another incarnation) or could not be read."""

    incarnation: str
    request_id: str
    reason: str
    #: of the request that is refused
    attempt: int = 0
    #: another request of this id runs there: the caller's doing, and no other rank would be right
    is_id_open: bool = False


ToRank = Submit | Abort
ToApi = Step | Refused

_to_rank = msgspec.msgpack.Decoder(ToRank)
_to_api = msgspec.msgpack.Decoder(ToApi)
_encoder = msgspec.msgpack.Encoder()


def encode(frame: ToRank | ToApi) -> bytes:
    """One frame as msgpack bytes."""
    return _encoder.encode(frame)


def decode_to_rank(data: bytes) -> ToRank:
    """Raises msgspec.DecodeError / ValidationError on anything that is no frame of ours."""
    return _to_rank.decode(data)


def decode_to_api(data: bytes) -> ToApi:
    """Raises msgspec.DecodeError / ValidationError on anything that is no frame of ours."""
    return _to_api.decode(data)
