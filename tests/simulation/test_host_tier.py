"""Slots and bytes of the host tier under every order of things, on a machine that reorders loads; and what it costs to
do without two of the protocol's rules."""

from __future__ import annotations

from typing import Any

import pytest

from cache import host_reader, host_writer, page_checksum
from cache.slot_owners import SlotOwners
from cache.slot_table import Holder
from tests.simulation.host_story import run_host

NUM_SEEDS = 60
NUM_DEEP_SEEDS = 3000


def test_no_seed_finds_a_wrong_page_or_a_lost_slot() -> None:
    for seed in range(NUM_SEEDS):
        fault = run_host(seed)
        assert fault is None, f"seed {seed}: {fault}"


@pytest.mark.deep
def test_three_thousand_seeds() -> None:
    for seed in range(NUM_SEEDS, NUM_SEEDS + NUM_DEEP_SEEDS):
        fault = run_host(seed)
        assert fault is None, f"seed {seed}: {fault}"


def _free_on_timeout(self: SlotOwners, holder: Holder) -> None:
    """`SlotOwners.holder_left` without asking the kernel (hole H14)."""
    self._free_all(self.leased.pop(holder, set()))


def _seed_without_key(key_low: int, key_high: int, *others: int) -> int:
    return _entry_seed(0, 0, *others)


_entry_seed: Any = page_checksum.entry_seed

MUTATIONS = {
    "re-lease on timeout": [(SlotOwners, "holder_left", _free_on_timeout)],
    "checksum without the key": [
        (module, "entry_seed", _seed_without_key) for module in (host_reader, host_writer, page_checksum)
    ],
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_rule_that_is_taken_away_is_missed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for replaced in MUTATIONS[name]:
        monkeypatch.setattr(*replaced)
    seed, fault = next(((seed, fault) for seed in range(100) if (fault := run_host(seed)) is not None), (-1, None))
    assert fault is not None, "nobody misses the rule in 100 seeds"
    print(f"{name}: seed {seed}, {fault}")
    monkeypatch.undo()
    assert run_host(seed) is None
