"""How a rank's engine thread ends: with its actor, and never into a loop that is gone."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from actors import scheduler
from configs.errors import RankLost
from tests.unit.actors.ranks import Gate, collect, rank_and_fleet, request, run, until


def test_stopping_waits_for_the_step_under_way() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            stream = asyncio.create_task(collect(fleet, rank.incarnation, request()))
            gate = await rank.inside_a_step()
            stopping = asyncio.create_task(rank.actor.stop())
            # the doors close at once: the client hears of it while the step goes on
            with pytest.raises(RankLost):
                await stream
            await until(lambda: not rank.has_socket)
            ended, _ = await asyncio.wait({stopping}, timeout=0.05)
            assert not ended
            gate.open()
            await stopping
            assert not rank.actor._thread.is_alive()

    run(scenario())


class Link:
    """A link to a host tier that is only told of the end."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    async def leave(self) -> None:
        self.heard.append("leave")

    def close(self) -> None:
        self.heard.append("close")


class Copier:
    """Whose last page took as long as it says."""

    def __init__(self, has_ended: bool) -> None:
        self.has_ended = has_ended

    def stop(self) -> bool:
        return self.has_ended


@pytest.mark.parametrize(("has_ended", "heard"), [(True, ["leave", "close"]), (False, ["close"])])
def test_slots_are_given_back_only_if_nothing_is_written_to_them(
    monkeypatch: pytest.MonkeyPatch, has_ended: bool, heard: list[str]
) -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, _):
            link = Link()
            monkeypatch.setattr(rank.actor, "_host", link)
            monkeypatch.setattr(rank.engine, "_copier", Copier(has_ended))
            await rank.actor.stop()
            assert link.heard == heard

    run(scenario())


def test_a_step_that_outlives_the_stop_and_the_loop_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scheduler, "_LAST_STEP_S", 0.01)
    left: list[tuple[Gate, threading.Thread]] = []

    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            stream = asyncio.create_task(collect(fleet, rank.incarnation, request()))
            left.append((await rank.inside_a_step(), rank.actor._thread))
            await rank.actor.stop()
            with pytest.raises(RankLost):
                await stream

    run(scenario())
    gate, thread = left[0]
    assert thread.is_alive()
    assert "did not end" in caplog.text
    gate.open()
    thread.join(10)
    assert not thread.is_alive()
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []
