"""Ports are settled before anything is started."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from configs.errors import ConfigError
from tidegate import ports


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_a_taken_port_names_the_door_and_the_way_out(taken: int) -> None:
    with pytest.raises(ConfigError, match=rf"HTTP: port {taken} of 127\.0\.0\.1 is taken .*choose another with --port"):
        ports.settle("127.0.0.1", taken, "HTTP", "--port")


def test_a_free_port_stays_free() -> None:
    port = ports.settle("127.0.0.1", 0, "HTTP", "--port")
    assert port > 0
    assert ports.settle("127.0.0.1", port, "HTTP", "--port") == port


def test_an_address_that_is_not_here_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"HTTP: port 80 of 192\.0\.2\.77 cannot be used"):
        ports.settle("192.0.2.77", 80, "HTTP", "--port")


def test_the_next_free_port_is_taken_instead(taken: int) -> None:
    near = ports.settle_near("127.0.0.1", taken)
    assert taken < near < taken + 20


def test_no_free_port_nearby_is_an_error(taken: int) -> None:
    with pytest.raises(ConfigError, match=r"the dashboard: port .* is taken"):
        ports.settle_near("127.0.0.1", taken, num_tries=1)
