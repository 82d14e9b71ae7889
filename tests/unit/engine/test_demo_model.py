"""The demo model: the same bytes each time, a real tokenizer, a shape that the engine serves."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.demo_model import CORPUS, write_demo_model
from engine.models import load_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "tiny"
    write_demo_model(directory, "tiny")
    return directory


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny, local_files_only=True)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_the_same_bytes_on_repeat(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    write_demo_model(tmp_path, "tiny")

    assert digests(tmp_path) == digests(tiny)
    assert set(digests(tiny)) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_broken_directory_is_repaired(tiny: Path, tmp_path: Path) -> None:
    write_demo_model(tmp_path, "tiny")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    (tmp_path / "tokenizer.json").unlink()
    write_demo_model(tmp_path, "tiny")

    assert digests(tmp_path) == digests(tiny)


def test_the_tokenizer_gives_back_any_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in (CORPUS.read_text(encoding="utf-8"), "naïve ☃ 水門 🌊\u200d\r\n\t end  ", "\x00\x7f�"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(CORPUS.read_text(encoding="utf-8"))) < 0.6 * CORPUS.stat().st_size


def test_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How high?"}]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow high?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text)

    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    assert tokenizer.convert_ids_to_tokens(ids).count("<|im_start|>") == 3
    assert tokenizer.convert_ids_to_tokens(ids).count(str(tokenizer.eos_token)) == 2


def test_tiny_is_served(tiny: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    facts = load_model(tiny, "cpu", "auto", None).facts

    assert facts.name == "tiny"
    assert facts.architecture == "LlamaForCausalLM"
    assert facts.dtype == "float32"
    assert facts.max_len == 2048
    assert facts.vocab_size == len(tokenizer) == 512
    assert list(facts.eos_token_ids) == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def test_small_has_twenty_million_parameters(tmp_path: Path) -> None:
    write_demo_model(tmp_path, "small")
    facts = load_model(tmp_path, "cpu", "auto", None).facts

    assert 19e6 < facts.num_parameters < 21e6
    assert facts.max_len == 4096
    assert facts.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path, local_files_only=True))
