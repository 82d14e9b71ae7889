"""The dense log: nothing is allotted twice, and who is late learns it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from actors.clock import Clock
from actors.control_log import ControlLog, Superseded
from actors.flush_run import flush_answer
from actors.log_records import FlushIntent, FlushOutcome, LogState, RankJoined, RankLeft
from actors.log_stores import DirectoryStore, LogStore, MemoryStore, boot_directory
from actors.messages import SubEpoch
from configs.errors import ConfigError
from engine.flush import FlushScope
from tests.unit.actors.fakes import SetClock, make_request, rank_record


def make_intent(flush_id: str = "f", *, takes_epoch: bool = True, **arguments: object) -> FlushIntent:
    return FlushIntent(make_request(flush_id, **arguments), takes_epoch, ("incarnation-0",), "now")


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LogStore:
    return MemoryStore() if request.param == "memory" else DirectoryStore(tmp_path / "log", is_synced=False)


def take_over(
    store: LogStore, actor_id: str = "actor", cluster: str = "cluster", clock: Clock | None = None
) -> tuple[ControlLog, LogState]:
    log = ControlLog(store, clock or SetClock())
    return log, log.take_over(actor_id, cluster).state


def test_of_many_that_create_one_index_exactly_one_is_told_yes(store: LogStore) -> None:
    barrier = threading.Barrier(8)
    told: list[tuple[int, bool]] = []

    def create(number: int) -> None:
        barrier.wait()
        told.append((number, store.create(1, b"%d" % number)))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for number, is_winner in told if is_winner]
    assert len(winners) == 1
    assert store.read(1) == b"%d" % winners[0]
    assert store.indices() == [1]
    assert store.read(2) is None


def test_the_directory_keeps_nothing_but_records(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "log", is_synced=True)
    assert store.create(1, b"a")
    assert not store.create(1, b"b")
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["000000000001.json"]
    assert (tmp_path / "log" / "000000000001.json").stat().st_mode & 0o077 == 0


def test_files_made_ready_become_records_and_the_rest_goes(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, is_synced=False)
    store.prepare()
    drafts = {path.stat().st_ino for path in tmp_path.iterdir()}
    assert len(drafts) == 2
    assert store.create(1, b"intent")
    assert store.create(2, b"outcome")
    assert {path.stat().st_ino for path in tmp_path.iterdir()} == drafts
    assert [store.read(index) for index in store.indices()] == [b"intent", b"outcome"]
    store.prepare()
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000001.json", "000000000002.json"]


def test_each_boot_of_the_machine_begins_its_own_log(tmp_path: Path) -> None:
    first = DirectoryStore(boot_directory(tmp_path, "monday"), is_synced=False)
    _, state = take_over(first)
    again = DirectoryStore(boot_directory(tmp_path, "monday"), is_synced=False)
    assert take_over(again)[1].lineage == state.lineage
    other = DirectoryStore(boot_directory(tmp_path, "tuesday"), is_synced=False)
    assert take_over(other)[1].lineage != state.lineage
    assert [path.name for path in tmp_path.iterdir()] == ["tuesday"]


def test_terms_and_epochs_rise_over_restarts(store: LogStore) -> None:
    first, state = take_over(store)
    assert (state.term, state.epoch, state.floor) == (1, 0, 0)
    assert first.append(make_intent()).index == 2
    _, second = take_over(store)
    assert second.lineage == state.lineage
    assert second.term == 3
    assert second.epoch == 2
    assert second.num_restarts == 1


def test_a_record_of_another_version_supersedes_like_any_other(store: LogStore) -> None:
    log, state = take_over(store)
    assert store.create(state.term + 1, b'{"writer": "newer", "record": {"type": "unheard_of"}}')
    with pytest.raises(Superseded, match=str(state.term + 1)):
        log.append(make_intent())


def test_the_loser_is_superseded_for_good(store: LogStore) -> None:
    old, _ = take_over(store)
    new, state = take_over(store)
    with pytest.raises(Superseded) as caught:
        old.append(make_intent("old"))
    assert caught.value.index == state.term
    with pytest.raises(Superseded):
        old.append(make_intent("old-again"))
    assert new.append(make_intent("new")).index == state.term + 1


def test_two_that_take_over_at_once_get_two_terms(store: LogStore) -> None:
    barrier = threading.Barrier(4)
    terms: list[int] = []

    def begin() -> None:
        log = ControlLog(store, SetClock())
        barrier.wait()
        terms.append(log.take_over("actor", "cluster").state.term)

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(terms) == [1, 2, 3, 4]


def test_everything_stored_is_read_again(store: LogStore) -> None:
    log, _ = take_over(store)
    record, other = rank_record(0, tcp_key="key", gpu_ids=("1",)), rank_record(1)
    log.append(RankJoined(record))
    log.append(RankJoined(other))
    ended = make_request("ended", timeout_s=2.5)
    intent = log.append(FlushIntent(ended, True, (record.incarnation,), "then")).index
    answer = flush_answer(ended, success=True, status="flushed", message="Cache flushed.", http_status=200)
    log.append(FlushOutcome(intent, intent, answer))
    scoped = make_intent("open", takes_epoch=False, scope={"prefix_tokens": [1, 2]})
    open_index = log.append(scoped).index
    log.append(RankLeft(other.incarnation))
    _, state = take_over(store)
    assert state.members == {record.incarnation: record}
    assert state.joined_at == {record.incarnation: 2}
    assert state.past == {other.incarnation: other}
    assert (state.epoch, state.floor, state.promised) == (intent, intent, intent)
    assert state.sub_epochs == [SubEpoch(FlushScope(prefix_tokens=b"\1\0\0\0\2\0\0\0"), open_index)]
    assert state.ended["ended"].answer == answer
    assert state.ended["ended"].request == ended
    assert (state.ended["ended"].boot_id, state.ended["ended"].boot_s) == ("boot", 100.0)
    assert state.open_flushes == {open_index: scoped}
    assert state.open_flushes[open_index].request.scope == FlushScope(prefix_tokens=b"\1\0\0\0\2\0\0\0")


def test_ranks_of_an_earlier_cluster_are_past(store: LogStore) -> None:
    log, _ = take_over(store, cluster="monday")
    log.append(RankJoined(rank_record(0)))
    log.append(make_intent())
    _, state = take_over(store, actor_id="other", cluster="tuesday")
    assert state.members == {}
    assert list(state.past) == ["incarnation-0"]
    assert state.num_restarts == 0


class Uncertain(MemoryStore):
    """Stores the record and then fails, once."""

    fails = False

    def create(self, index: int, data: bytes) -> bool:
        created = super().create(index, data)
        if self.fails:
            self.fails = False
            raise OSError("no answer")
        return created


def test_after_an_uncertain_write_the_next_one_goes_behind_it() -> None:
    store = Uncertain()
    log, _ = take_over(store)
    store.fails = True
    with pytest.raises(OSError, match="no answer"):
        log.append(make_intent("uncertain"))
    written = log.append(make_intent("next"))
    assert written.index == 3
    assert [(index, entry.record) for index, entry in written.found] == [(2, make_intent("uncertain"))]
    _, state = take_over(store)
    assert [intent.request.flush_id for intent in state.open_flushes.values()] == ["uncertain", "next"]


def test_a_check_sees_what_another_wrote_behind_an_uncertain_write() -> None:
    store = Uncertain()
    old, _ = take_over(store)
    store.fails = True
    with pytest.raises(OSError, match="no answer"):
        old.append(make_intent())
    old.check()
    _, state = take_over(store)
    with pytest.raises(Superseded) as caught:
        old.check()
    assert caught.value.index == state.term == 3


def test_damage_is_named(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, is_synced=False)
    take_over(store)
    store.create(2, b"{}")
    with pytest.raises(ConfigError, match="record 2"):
        take_over(store)


def test_a_missing_record_is_named() -> None:
    store = MemoryStore()
    take_over(store)
    store.create(3, store.read(1) or b"")
    with pytest.raises(ConfigError, match="gaps"):
        take_over(store)


def _of_tiers(*tiers: str, **scope: object) -> FlushIntent:
    request = make_request(scope=scope or None)
    return FlushIntent(replace(request, tiers=tiers), False, ("incarnation-0",), "now")


def _end(log: ControlLog, intent: FlushIntent, **rows: str) -> int:
    """Store a flush with its success; rows: node -> status of its host tier. The intent's index."""
    index = log.append(intent).index
    tiers = [{"node": node, "status": status} for node, status in rows.items()]
    facts = {"success": True, "status": "flushed", "message": "", "http_status": 200}
    log.append(FlushOutcome(index, 0, flush_answer(intent.request, **facts, host_tiers=tiers)))
    return index


def test_a_flush_of_the_host_tier_alone_binds_every_node_from_its_intent_on(store: LogStore) -> None:
    log, _ = take_over(store)
    index = log.append(_of_tiers("host")).index
    _, state = take_over(store)
    assert state.host_drop_of("any") == index


def test_a_flush_by_age_binds_the_nodes_that_missed_it_until_the_floor_rises(store: LogStore) -> None:
    log, _ = take_over(store)
    aged = [_end(log, _of_tiers("device", "host", older_than_s=5), a="flushed", b="expired") for number in range(40)]
    newest = _end(log, _of_tiers("device", "host", older_than_s=5), a="expired", b="flushed")
    _, state = take_over(store)
    assert state.host_drop_of("a") == state.host_drop_of("unknown") == newest
    assert state.host_drop_of("b") == aged[-1]
    assert len(state.aged) == 32
    log, _ = take_over(store)
    log.append(make_intent("all", mode="fence"))
    _, state = take_over(store)
    assert state.host_drop_of("b") == 0


def _scoped(log: ControlLog, status: str, **scope: object) -> int:
    """Store a scoped flush about which one rank says `status`. The intent's index."""
    intent = _of_tiers("device", "host", **scope)
    index = log.append(intent).index
    answer = flush_answer(
        intent.request, success=status == "flushed", status=status, message="", http_status=200,
        ranks=[{"status": status}],
    )  # fmt: skip
    log.append(FlushOutcome(index, 0, answer))
    return index


@pytest.mark.parametrize("status", ["refused", "timed_out", "busy", "expired_command", "gone"])
def test_a_scope_that_no_rank_has_flushed_leaves_the_earlier_one_as_it_was(store: LogStore, status: str) -> None:
    log, _ = take_over(store)
    first = _scoped(log, "flushed", namespace="a")
    _scoped(log, status, namespace="a")
    _scoped(log, status, namespace="b")
    _, state = take_over(store)
    assert state.sub_epochs == [SubEpoch(FlushScope(namespace="a"), first)]


@pytest.mark.parametrize("status", ["flushed", "unreachable", "joined"])
def test_a_scope_that_some_rank_may_have_flushed_stands_for_the_earlier_one(store: LogStore, status: str) -> None:
    log, _ = take_over(store)
    _scoped(log, "flushed", namespace="a")
    second = _scoped(log, status, namespace="a")
    _, state = take_over(store)
    assert state.sub_epochs == [SubEpoch(FlushScope(namespace="a"), second)]


def test_an_age_is_no_part_of_a_key(store: LogStore) -> None:
    log, _ = take_over(store)
    _scoped(log, "flushed", older_than_s=5)
    _, state = take_over(store)
    assert state.sub_epochs == []


def test_a_checkpoint_has_the_first_page_of_a_prefix(store: LogStore) -> None:
    log, _ = take_over(store)
    log.append(RankJoined(rank_record(0, page_size=4)))
    _scoped(log, "flushed", prefix_tokens=list(range(100)))
    _, state = take_over(store)
    assert [sub_epoch.scope for sub_epoch in state.sub_epochs] == [
        FlushScope(prefix_tokens=b"".join(number.to_bytes(4, "little") for number in range(4)))
    ]
