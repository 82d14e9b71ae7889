"""A rank's engine, put together from the settings: model, pages, cache, scheduler, loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from actors.rank_host import host_settings
from actors.rank_profiles import Profiler
from cache.device_cache import DeviceCache
from configs.errors import ConfigError
from configs.resolve import GIB, kv_memory_bytes
from configs.schema import EngineSettings, Settings
from engine.control_words import ReadWords
from engine.garbage import calm_collector
from engine.grammar import GrammarBook
from engine.limits import SchedulerLimits
from engine.loop import EngineLoop, OnFlush, OnOutputs
from engine.scheduler import Scheduler

if TYPE_CHECKING:
    from engine.models import LoadedModel
    from engine.runner import ModelRunner

log = logging.getLogger(__name__)

#: of the memory that the weights leave on a GPU; the rest is for activations and the allocator
GPU_KV_MEMORY_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class EngineHooks:
    """What the engine thread calls; none of it may block."""

    read_words: ReadWords
    on_outputs: OnOutputs
    on_flush: OnFlush


@dataclass(frozen=True, slots=True)
class RankEngine:
    """A loaded engine that has not run yet, and what the rank says of it when it registers."""

    loop: EngineLoop
    max_len: int
    page_size: int
    num_pages: int
    bytes_per_page: int
    layout_digest: str
    weights_digest: str
    #: grammars of the model's vocabulary; None: the engine has none to offer
    grammars: GrammarBook | None = None
    #: None: its steps cannot be recorded
    profiler: Profiler | None = None


#: (settings, hooks) -> engine; blocks for seconds. Raises ConfigError for what cannot work.
BuildEngine: TypeAlias = Callable[[Settings, EngineHooks], RankEngine]


def load_engine(settings: Settings, hooks: EngineHooks) -> RankEngine:
    """Load the model of the settings and build its engine around it.

    settings: with model.path set. Sets torch's threads for the whole process, and takes everything that is alive
    afterwards (modules, weights) out of the garbage collector's sight: its passes would stop steps for nothing.
    """
    # Here and not above: the actor that only names this module for a rank must not pay 174 MB and 1.5 s for torch.
    from engine.host_copier import HostCopier
    from engine.models import load_model
    from engine.page_store import page_store
    from engine.profiler import Profiler as TorchProfiler
    from engine.runner import ModelRunner

    engine = settings.engine
    model = load_model(_model_path(settings), engine.device, settings.model.dtype, settings.model.max_len)
    num_pages = engine.num_pages or _pages_that_fit(model, engine)
    facts = model.facts
    grammars = GrammarBook(_model_path(settings) / "tokenizer.json", facts.vocab_size, facts.eos_token_ids)
    runner = ModelRunner(model, num_pages, engine.page_size, engine.threads, grammars)
    limits = _limits(runner, engine)
    cache = DeviceCache(num_pages, engine.page_size, enabled=engine.prefix_cache)
    host = host_settings(
        settings.host_tier,
        layout_digest=facts.layout_digest,
        weights_digest=facts.weights_digest,
        page_bytes=runner.bytes_per_page,
    )
    profiler = TorchProfiler(settings.profiling_root, model.device, settings.profiling.max_steps)
    loop = EngineLoop(
        Scheduler(cache, limits, host),
        runner,
        read_words=hooks.read_words,
        on_outputs=hooks.on_outputs,
        on_flush=hooks.on_flush,
        sanity_check_s=engine.sanity_check_s,
        copier=None if host is None else HostCopier(page_store(runner.kv_pool), host),
        observer=profiler,
    )
    profiler.wake = loop.wake
    calm_collector()
    pages = f"{num_pages} pages of {engine.page_size} tokens"
    log.info("loaded %s: %d parameters, %s", facts.name, facts.num_parameters, pages)
    return RankEngine(
        loop,
        # a pool smaller than the context is the limit that the doors must know
        max_len=limits.max_total_tokens(num_pages * engine.page_size),
        page_size=engine.page_size,
        num_pages=num_pages,
        bytes_per_page=runner.bytes_per_page,
        layout_digest=facts.layout_digest,
        weights_digest=facts.weights_digest,
        grammars=grammars,
        profiler=profiler,
    )


def _limits(runner: ModelRunner, engine: EngineSettings) -> SchedulerLimits:
    return SchedulerLimits(
        max_running=engine.max_running,
        max_step_tokens=engine.max_step_tokens,
        max_len=runner.facts.max_len,
        eos_token_ids=runner.facts.eos_token_ids,
        bytes_per_page=runner.bytes_per_page,
        vocab_size=runner.facts.vocab_size,
    )


def _model_path(settings: Settings) -> Path:
    if settings.model.path is None:
        raise ConfigError("no model is named (configs: model.path)")
    return settings.model.path


def _pages_that_fit(model: LoadedModel, engine: EngineSettings) -> int:
    """Pages in the memory that the settings give, or that the weights leave."""
    page_bytes = model.facts.kv_bytes_per_token * engine.page_size
    budget = kv_memory_bytes(engine, model.device.type)
    if budget is None:
        budget = int(_free_device_memory(model) * GPU_KV_MEMORY_SHARE)
    if budget < page_bytes * 8:
        raise ConfigError(
            f"{budget / GIB:.3f} GiB for KV hold {budget // page_bytes} pages of {engine.page_size} tokens, "
            f"8 is the least (configs: engine.kv_memory_gb)"
        )
    return budget // page_bytes


def _free_device_memory(model: LoadedModel) -> int:
    import torch

    free, _ = torch.get_device_module(model.device).mem_get_info(model.device)
    return int(free)
