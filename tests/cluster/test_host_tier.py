"""The host tier of a real server: shared by its ranks, flushed with them, exact through SIGKILLs, warm after all died.

Two ranks of the tiny model with device pools far smaller than what they serve; write_through, so that what a killed
rank had computed is not lost with it.
"""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cache.arena import ArenaGeometry
from tests.cluster.server import STOP_TIMEOUT_S, Server, marked_processes, until

PAGE_SIZE = 16
#: pages of one prompt; the last one is computed anew each time, for its logits
PROMPT_PAGES = 8
NUM_PROMPTS = 16
NUM_PAGES = 48
NUM_TOKENS = 8
LEASE_BATCH = 8
GREEDY = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
ARGUMENTS = [
    "--dp", "2", "--host-tier-gb", "0.03", "--set", f"engine.num_pages={NUM_PAGES}",
    "--set", f"engine.page_size={PAGE_SIZE}", "--set", "host_tier.write_policy=write_through",
    "--set", f"host_tier.lease_batch={LEASE_BATCH}", "--set", "host_tier.sanity_check_s=1",
]  # fmt: skip
#: a killed rank or agent is back after this, on a machine that does other things
BACK_S = 60.0


@pytest.fixture(scope="module")
def host_server(tiny_model: Path, short_home: Path) -> Iterator[Server]:
    """A server whose processes may be killed.

    With a folder of its own in memory: other servers of this machine remove the files of dead ones when they start.
    """
    home = short_home / "host"
    home.mkdir()
    shared = Path(tempfile.mkdtemp(prefix="tidegate-test-", dir="/dev/shm"))
    server = Server(home, "--model", str(tiny_model), *ARGUMENTS, "--set", f"control.shared_dir={shared}")
    try:
        server.start()
        yield server
        server.stop()
        assert server.leftovers() == []
        assert list(shared.iterdir()) == []
    finally:
        server.close()
        shutil.rmtree(shared)


@pytest.fixture
def client(host_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=host_server.url, timeout=60) as session:
        yield session


class Prompts:
    """Prompts that share nothing, and what plain transformers says to each, in float32."""

    def __init__(self, model_path: Path) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        # as with ignore_eos: its end token is a token like any other
        model.generation_config.eos_token_id = None
        rng = np.random.default_rng(7)
        self.ids = rng.integers(3, 250, (NUM_PROMPTS, PROMPT_PAGES * PAGE_SIZE)).tolist()
        out = model.generate(
            torch.tensor(self.ids), max_new_tokens=NUM_TOKENS, do_sample=False,
            attention_mask=torch.ones(NUM_PROMPTS, PROMPT_PAGES * PAGE_SIZE, dtype=torch.long),
        )  # fmt: skip
        self.answers: list[list[int]] = out[:, PROMPT_PAGES * PAGE_SIZE :].tolist()


@pytest.fixture(scope="module")
def prompts(tiny_model: Path) -> Prompts:
    return Prompts(tiny_model)


def ask(client: httpx.Client, prompts: Prompts, number: int, rank: int | None = None) -> dict[str, int]:
    """Have one prompt answered, by this rank, and compare it token by token. Where its cached tokens were."""
    body = {"input_ids": prompts.ids[number], "sampling_params": GREEDY, "data_parallel_rank": rank}
    response = client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["output_ids"] == prompts.answers[number]
    details: dict[str, int] = answer["meta_info"]["cached_tokens_details"]
    assert sum(details.values()) == answer["meta_info"]["cached_tokens"]
    return details


def ask_all(client: httpx.Client, prompts: Prompts, rank: int) -> dict[str, int]:
    """Every prompt once. Cached tokens by tier."""
    rows = [ask(client, prompts, number, rank) for number in range(NUM_PROMPTS)]
    return {tier: sum(row[tier] for row in rows) for tier in ("device", "host")}


def tier_row(client: httpx.Client) -> dict[str, Any]:
    (row,) = client.get("/v1/cache").json()["host_tiers"]
    return row


def ranks_of(client: httpx.Client) -> list[dict[str, Any]]:
    """Ranks that serve and have their tier, in order."""
    ranks = client.get("/v1/cache").json()["ranks"]
    return [rank for rank in ranks if rank["status"] == "serving" and rank["host"]["is_attached"]]


def flush(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/cache/flush", json={"timeout_s": 20} | body)
    assert response.status_code == 200, response.text
    return response.json()


#: cached tokens of one pass over all prompts when nothing but the last page of each is computed
ALL_CACHED = NUM_PROMPTS * (PROMPT_PAGES - 1) * PAGE_SIZE


def test_what_one_rank_computed_the_other_finds(client: httpx.Client, prompts: Prompts) -> None:
    assert ask_all(client, prompts, rank=0) == {"device": 0, "host": 0}
    found = ask_all(client, prompts, rank=1)
    assert found["device"] == 0
    assert found["host"] >= 0.95 * ALL_CACHED
    ranks = ranks_of(client)
    assert [rank["host"]["num_loaded_pages"] > 0 for rank in ranks] == [False, True]
    assert ranks[0]["host"]["commits"]["committed"] >= NUM_PROMPTS * (PROMPT_PAGES - 1)


def test_a_flush_covers_both_tiers(client: httpx.Client, prompts: Prompts) -> None:
    ask_all(client, prompts, rank=0)
    flushed = flush(client)
    (row,) = flushed["host_tiers"]
    assert (row["status"], flushed["untouched_tiers"]) == ("flushed", [])
    assert row["freed_pages"] > 0
    assert ask_all(client, prompts, rank=1) == {"device": 0, "host": 0}
    assert flush(client, mode="fence")["host_tiers"][0]["freed_pages"] > 0
    assert ask_all(client, prompts, rank=0) == {"device": 0, "host": 0}


def test_the_host_tier_alone_is_flushed_alone(client: httpx.Client, prompts: Prompts) -> None:
    ask(client, prompts, 0, rank=0)
    ask(client, prompts, 0, rank=0)
    answer = flush(client, tiers=["host"])
    assert (answer["untouched_tiers"], answer["epoch"]) == (["device"], 0)
    assert answer["host_tiers"][0]["freed_pages"] > 0
    assert ask(client, prompts, 0, rank=0)["device"] == (PROMPT_PAGES - 1) * PAGE_SIZE
    assert ask(client, prompts, 0, rank=1) == {"device": 0, "host": 0}
    refused = client.post("/v1/cache/flush", json={"tiers": ["disk"]})
    assert refused.status_code == 400
    assert "not configured" in refused.text


class Traffic(threading.Thread):
    """Asks on and on, of whatever rank; every answer is compared, and what a killed rank did not answer is counted."""

    def __init__(self, server: Server, prompts: Prompts, first: int) -> None:
        super().__init__()
        self._url = server.url
        self._prompts = prompts
        self._number = first
        self.is_over = threading.Event()
        self.num_exact = 0
        self.num_lost = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self.is_over.is_set():
                self._ask_one(client)

    def _ask_one(self, client: httpx.Client) -> None:
        self._number = (self._number + 1) % NUM_PROMPTS
        body = {"input_ids": self._prompts.ids[self._number], "sampling_params": GREEDY}
        response = client.post("/generate", json=body)
        if response.status_code != 200:
            self.num_lost += 1
        elif response.json()["output_ids"] == self._prompts.answers[self._number]:
            self.num_exact += 1
        else:
            self.wrong.append(response.text)


def arena_of(client: httpx.Client) -> Path:
    """The file of the one node's host tier; its folder is in the path of every process that maps it."""
    name = f"tidegate-tidegate-{tier_row(client)['node'][:12]}-arena.kv"
    (path,) = Path("/dev/shm").glob(f"*/{name}")
    return path


def users_of(path: Path, title: bytes = b"") -> list[int]:
    """Pids of the processes that map the file, and whose command line holds `title`."""
    pids: list[int] = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and title in (process / "cmdline").read_bytes():
                pids += [int(process.name)] if str(path) in (process / "maps").read_text() else []
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return pids


def agent_pid(client: httpx.Client) -> int:
    """Of the process that owns the arena; 0: there is none now."""
    return max(users_of(arena_of(client), b"NodeAgentActor"), default=0)


def kill(client: httpx.Client, *victims: str) -> None:
    """SIGKILL to these at once; returns when all of them are back and attached."""
    before = {rank["rank"]: rank["pid"] for rank in ranks_of(client)}
    pids = {"agent": agent_pid(client)} | {f"rank {rank}": pid for rank, pid in before.items()}
    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)

    def are_back() -> bool:
        ranks = {rank["rank"]: rank["pid"] for rank in ranks_of(client)}
        now = {"agent": agent_pid(client)} | {f"rank {rank}": pid for rank, pid in ranks.items()}
        return set(ranks) == {0, 1} and all(now[victim] not in (0, pids[victim]) for victim in victims)

    until(are_back, BACK_S, f"{victims} back")


def test_sigkill_of_ranks_and_tier_serves_no_wrong_byte_leaks_no_slot_and_stays_warm(
    host_server: Server, client: httpx.Client, prompts: Prompts
) -> None:
    flush(client)
    # slots leased before a flush of the tier cannot commit: what they held is computed and written once more
    for rank in (0, 1, 0):
        ask_all(client, prompts, rank)
    before = sum(ask_all(client, prompts, rank=1).values())
    assert before >= 0.95 * ALL_CACHED
    traffic = [Traffic(host_server, prompts, first=8 * number) for number in range(2)]
    for thread in traffic:
        thread.start()
    try:
        for victims in (["rank 0"], ["agent"], ["agent", "rank 1"], ["agent"]):  # five
            seen = [thread.num_exact for thread in traffic]
            kill(client, *victims)
            until(lambda seen=seen: all(t.num_exact > n + 2 for t, n in zip(traffic, seen, strict=True)), BACK_S, "on")
    finally:
        for thread in traffic:
            thread.is_over.set()
            thread.join()
    assert [thread.wrong for thread in traffic] == [[], []]
    assert sum(thread.num_lost for thread in traffic) <= 2 * 2, "more than was open on the two killed ranks"
    for rank in (0, 1):
        assert sum(ask_all(client, prompts, rank).values()) >= 0.95 * before
    until(lambda: no_slot_is_lost(client), BACK_S, f"no slot lost: {tier_row(client)}")
    assert [rank["counters"]["num_violations"] for rank in ranks_of(client)] == [0, 0]


def no_slot_is_lost(client: httpx.Client) -> bool:
    """Every slot is free, committed, or ready with one of the two ranks that live."""
    row = tier_row(client)
    adds_up = row["free"] + row["leased"] + row["committed"] + row["quarantined"] == row["num_slots"]
    return adds_up and row["quarantined"] == 0 and row["num_ranks"] == 2 and row["leased"] <= 2 * 4 * LEASE_BATCH


def test_after_kill_9_of_everything_the_next_start_is_warm_and_an_end_in_good_order_leaves_nothing(
    host_server: Server, prompts: Prompts
) -> None:
    assert host_server.process is not None
    with httpx.Client(base_url=host_server.url, timeout=60) as client:
        ask_all(client, prompts, rank=0)
        arena = arena_of(client)
    for _ in range(3):  # who was being started meanwhile goes with the next round
        for pid in marked_processes(host_server.mark):
            kill_one(pid)
    host_server.process.wait(timeout=STOP_TIMEOUT_S)
    until(nobody(host_server), BACK_S, "the last process gone")
    until(lambda: users_of(arena) == [], BACK_S, "nobody uses the cache that is still there")
    assert arena.exists()
    host_server.start()
    with httpx.Client(base_url=host_server.url, timeout=60) as client:
        until(lambda: len(ranks_of(client)) == 2, BACK_S, "two ranks")
        assert sum(ask_all(client, prompts, rank=1).values()) >= 0.95 * ALL_CACHED
        # it has another name now, that of the new node
        assert [path.name for path in arena.parent.glob("*-arena.kv")] == [arena_of(client).name]


def test_flipped_bits_cost_misses_and_no_token(client: httpx.Client, prompts: Prompts) -> None:
    """The last one: the slots of what it breaks are out of use until the file is made anew."""
    for rank in (0, 1):
        ask_all(client, prompts, rank)
    flush(client, tiers=["device"])
    row = tier_row(client)
    geometry = ArenaGeometry(row["num_slots"], row["page_bytes"])
    with arena_of(client).open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for slot in range(geometry.num_slots):
            memory[geometry.data_offset + slot * geometry.page_stride + slot % geometry.page_bytes] ^= 1 << slot % 8
    assert ask_all(client, prompts, rank=0)["host"] == 0
    assert ranks_of(client)[0]["host"]["misses"]["corrupt"] == NUM_PROMPTS
    until(lambda: tier_row(client)["quarantined"] >= NUM_PROMPTS, BACK_S, "their slots out of use")


def kill_one(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def nobody(server: Server) -> Callable[[], bool]:
    return lambda: not marked_processes(server.mark)
