"""Tiny models with weights to exchange, and what plain transformers says with them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache.device_cache import DeviceCache
from engine.limits import SchedulerLimits
from engine.loop import EngineLoop
from engine.models import LoadedModel, load_model
from engine.request import Request, SamplingParams
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.weights import LiveWeights
from tests.fakes import tokens_of
from tests.oracle import PlainModel

PROMPTS = ([5, 99, 7, 300, 41, 8, 8, 21, 477, 3], [17], [256, 255, 254, 253, 252, 251])
NUM_TOKENS = 12


class Served:
    """A loaded model with its weights, and an engine around it that answers prompts."""

    def __init__(self, directory: Path, dtype: str = "float32") -> None:
        self.model: LoadedModel = load_model(directory, "cpu", dtype, 512)
        self.live = LiveWeights(self.model.module, "v0")
        self._runner = ModelRunner(self.model, 32, 8)

    def greedy(self) -> list[list[int]]:
        """With a cache of its own: KV of other weights must not be met here."""
        loop = EngineLoop(Scheduler(DeviceCache(32, 8), SchedulerLimits(8, 64, 512)), self._runner)
        sampling = SamplingParams(temperature=0.0, max_new_tokens=NUM_TOKENS, ignore_eos=True)
        requests = [Request(f"r{n}", tokens_of(prompt), sampling) for n, prompt in enumerate(PROMPTS)]
        return [generation.token_ids for generation in loop.generate(requests)]

    def bytes(self) -> dict[str, Tensor]:
        """A copy of every weight."""
        return {name: tensor.clone() for name, tensor in self.model.module.state_dict().items()}


def plain_greedy(directory: Path) -> list[list[int]]:
    plain = PlainModel(directory)
    return [plain.generate(prompt, NUM_TOKENS) for prompt in PROMPTS]


def tensors_in(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint of one file, in memory of their own."""
    return {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}


def write_tensors(directory: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / name)
    return directory


def same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
