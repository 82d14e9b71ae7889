"""Signals of a server: the first while it serves is an event, any other moment is an immediate end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from threading import Timer
from typing import NoReturn

import pytest

from tidegate.stop_signals import StopSignals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Left(Exception):
    pass


def _leave(status: int) -> NoReturn:
    raise _Left(status)


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # as a command that a script starts with `&`
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    installed = StopSignals(_leave)
    installed.install()
    yield installed
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_waiting_ends_the_wait(signals: StopSignals, number: signal.Signals) -> None:
    timer = Timer(0.05, os.kill, [os.getpid(), number])
    timer.start()
    assert signals.wait(timeout_s=10) is True
    timer.join()


def test_no_signal_is_no_end(signals: StopSignals) -> None:
    assert signals.wait(timeout_s=0.01) is False


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_at_any_other_moment_ends_the_process(signals: StopSignals, number: signal.Signals) -> None:
    with pytest.raises(_Left) as left:
        os.kill(os.getpid(), number)
    assert left.value.args == (128 + number,)


def test_a_second_signal_does_not_wait_for_the_first(signals: StopSignals) -> None:
    Timer(0.05, os.kill, [os.getpid(), signal.SIGTERM]).start()
    assert signals.wait(timeout_s=10) is True
    with pytest.raises(_Left):
        os.kill(os.getpid(), signal.SIGTERM)
