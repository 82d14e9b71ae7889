"""Ports are settled before anything is started: a taken one is an error within milliseconds, not a silent retry."""

from __future__ import annotations

import errno
import socket

from configs.errors import ConfigError


def settle(host: str, port: int, what: str, way_out: str) -> int:
    """`port` if it can be listened on now, a free one for 0.

    Raises ConfigError that names `what` listens there and the `way_out` when it is taken or may not be used.
    """
    try:
        return _bound(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "is taken by another process"
        elif error.errno == errno.EACCES:
            reason = "may not be used by this user"
        else:
            reason = f"cannot be used: {error.strerror or error}"
        raise ConfigError(f"{what}: port {port} of {host} {reason}; choose another with {way_out}") from None


def settle_near(host: str, port: int, num_tries: int = 20) -> int:
    """`port`, or the next one that is free; for doors that nobody has written down, like the dashboard's.

    Raises ConfigError when all of them are taken.
    """
    for candidate in range(port, min(port + num_tries, 65536)):
        try:
            return _bound(host, candidate)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                break
    return settle(host, port, "the dashboard", "--dashboard-port")


def _bound(host: str, port: int) -> int:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # As the servers do: connections of a server that has just ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        # With SO_REUSEADDR, bind() alone succeeds beside a socket that is bound and not yet listening.
        probe.listen(1)
        return int(probe.getsockname()[1])
