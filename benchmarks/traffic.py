"""Clients that always have a request in flight, in a process of their own, and what became of each request.

    python -m benchmarks.traffic URL --clients 16 --prompt-tokens 64 --max-new-tokens 32

Every request streams `/generate`: a beginning that all share (half of the prompt), then tokens of its own. Ten times a
second a line of JSON says how things stand: the monotonic clock of the machine, tokens received, requests that ended
whole, aborted and lost. A request ends whole with exactly the tokens it asked for; aborted if its last event says so;
anything else (another status, a cut stream, a missing token) is lost. When its input closes the process lets the
requests in flight end and prints a last line.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import httpx

_REPORT_S = 0.1
_REQUEST_TIMEOUT_S = 120.0


@dataclass
class Totals:
    """Since the start."""

    now_s: float = 0.0
    num_tokens: int = 0
    num_whole: int = 0
    num_aborted: int = 0
    num_lost: int = 0
    #: why requests were lost, and how many for each reason
    losses: str = ""


class Clients:
    """Lives on one asyncio loop."""

    def __init__(self, url: str, prompt_tokens: int, max_new_tokens: int) -> None:
        self._http = httpx.AsyncClient(
            base_url=url, timeout=_REQUEST_TIMEOUT_S, limits=httpx.Limits(max_connections=None)
        )
        self._prompt_tokens = prompt_tokens
        self._max_new_tokens = max_new_tokens
        self._numbers = itertools.count()
        self._losses: Counter[str] = Counter()
        self.totals = Totals()
        self.is_stopping = False

    async def run(self, num_clients: int) -> None:
        """Until `is_stopping`, and the requests of then have ended."""
        await asyncio.gather(*(self._keep_asking() for _ in range(num_clients)))
        await self._http.aclose()

    def report(self) -> None:
        self.totals.now_s = time.monotonic()
        self.totals.losses = "; ".join(f"{number} x {reason}" for reason, number in self._losses.items())
        print(json.dumps(asdict(self.totals)), flush=True)

    async def _keep_asking(self) -> None:
        while not self.is_stopping:
            try:
                finish, num_tokens = await self._ask(next(self._numbers))
            except httpx.HTTPError as error:
                finish, num_tokens = type(error).__name__, 0
            if finish == "abort":
                self.totals.num_aborted += 1
            elif (finish, num_tokens) == ("length", self._max_new_tokens):
                self.totals.num_whole += 1
            else:
                self.totals.num_lost += 1
                self._losses[f"{finish} after {num_tokens} tokens"] += 1

    async def _ask(self, number: int) -> tuple[str, int]:
        """How the stream ended, and how many tokens it brought."""
        finish, num_tokens = "no end", 0
        sampling = {"temperature": 0, "max_new_tokens": self._max_new_tokens, "ignore_eos": True}
        body = {"input_ids": self._prompt(number), "sampling_params": sampling, "stream": True}
        async with self._http.stream("POST", "/generate", json=body) as response:
            if response.status_code != 200:
                return f"status {response.status_code}", 0
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event: dict[str, Any] = json.loads(line[len("data: ") :])
                if "meta_info" not in event:
                    return f"error {line[:120]}", num_tokens
                self.totals.num_tokens += event["meta_info"]["completion_tokens"] - num_tokens
                num_tokens = event["meta_info"]["completion_tokens"]
                finish = (event["meta_info"]["finish_reason"] or {}).get("type", finish)
        return finish, num_tokens

    def _prompt(self, number: int) -> list[int]:
        num_shared = self._prompt_tokens // 2
        own = [(number * 7919 + place * place) % 250 + 1 for place in range(self._prompt_tokens - num_shared)]
        return [place % 250 + 1 for place in range(num_shared)] + own


class Traffic:
    """The process as its starter sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._reports: list[Totals] = [Totals()]
        self._has_more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def until(self, instant_s: float) -> Totals:
        """How things stood at the first report after that instant of the monotonic clock; waits for it."""
        with self._has_more:
            while self._reports[-1].now_s < instant_s:
                if not self._has_more.wait(timeout=30):
                    raise RuntimeError("the clients do not report")
            return self._reports[bisect_left(self._reports, instant_s, key=lambda totals: totals.now_s)]

    def tokens_per_s(self, begin_s: float, end_s: float) -> float:
        """Between two instants, to the nearest reports."""
        end, begin = self.until(end_s), self.until(begin_s)
        return (end.num_tokens - begin.num_tokens) / (end.now_s - begin.now_s)

    def end(self) -> Totals:
        """Let the requests in flight end; the totals of all of them."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=_REQUEST_TIMEOUT_S)
        self._reader.join()
        return self._reports[-1]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._has_more:
                self._reports.append(Totals(**json.loads(line)))
                self._has_more.notify_all()


@contextmanager
def traffic(url: str, num_clients: int, prompt_tokens: int, max_new_tokens: int) -> Iterator[Traffic]:
    """Clients for the length of a block."""
    command = [sys.executable, "-m", "benchmarks.traffic", url, "--clients", str(num_clients),
               "--prompt-tokens", str(prompt_tokens), "--max-new-tokens", str(max_new_tokens)]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Traffic(process)
    finally:
        process.kill()
        process.wait()


async def _run(arguments: argparse.Namespace) -> None:
    clients = Clients(arguments.url, arguments.prompt_tokens, arguments.max_new_tokens)
    running = asyncio.create_task(clients.run(arguments.clients))

    async def report() -> None:
        while True:
            clients.report()
            await asyncio.sleep(_REPORT_S)

    reporting = asyncio.create_task(report())
    await asyncio.to_thread(sys.stdin.read)
    clients.is_stopping = True
    await running
    reporting.cancel()
    clients.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
