"""A rank's engine from the settings: the tiny model, its pages, its limits."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from actors.rank_engine import EngineHooks, load_engine
from configs.errors import ConfigError
from configs.schema import Settings
from engine.control_words import ALWAYS_VALID
from engine.demo_model import write_demo_model
from engine.request import Request, SamplingParams

HOOKS = EngineHooks(lambda: ALWAYS_VALID, lambda outputs: None, lambda pending, verdict: None)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_demo_model(path, "tiny")
    return path


def settings(model_path: Path, **engine: object) -> Settings:
    return Settings.model_validate({"model": {"path": model_path}, "engine": {"device": "cpu", "threads": 1, **engine}})


@pytest.fixture(autouse=True)
def unfrozen() -> object:
    """`load_engine` freezes everything alive, which is right for a rank and not for a test process."""
    yield
    gc.unfreeze()


def test_the_engine_generates_and_reuses_its_pages(model_path: Path) -> None:
    engine = load_engine(settings(model_path, num_pages=64, page_size=8), HOOKS)
    assert (engine.num_pages, engine.page_size) == (64, 8)
    assert engine.bytes_per_page > 0
    assert len(engine.weights_digest) == len(engine.layout_digest) == 32
    prompt = np.arange(1, 30, dtype=np.int32).tobytes()
    sampling = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
    first, again = (engine.loop.generate([Request(name, prompt, sampling)])[0] for name in ("first", "again"))
    assert len(first.token_ids) == 6
    assert first.token_ids == again.token_ids
    assert again.stats is not None
    assert again.stats.num_cached_tokens == 24


def test_pages_come_from_the_memory_that_is_given(model_path: Path) -> None:
    engine = load_engine(settings(model_path, kv_memory_gb=0.01, page_size=16), HOOKS)
    assert engine.num_pages == int(0.01 * 2**30) // engine.bytes_per_page


def test_memory_for_too_few_pages_is_refused(model_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kv_memory_gb"):
        load_engine(settings(model_path, kv_memory_gb=1e-6), HOOKS)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_engine(settings(tmp_path / "nothing"), HOOKS)
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_engine(Settings(), HOOKS)


def test_naming_the_scheduler_imports_no_torch() -> None:
    """The replica that owns a scheduler names its class; it must stay small."""
    import subprocess
    import sys

    code = "import sys; import actors.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
