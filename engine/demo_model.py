"""A small random-weight Llama in Hugging Face format, written offline: for tests, demos and benchmarks.

Everything is a pure function of this file, `data/corpus.txt` and the installed libraries: the same call writes the
same bytes. The text it generates means nothing; its shape (config, safetensors, byte-level BPE tokenizer, chat
template, generation config) is that of a real checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

DemoSize = Literal["tiny", "small"]

CORPUS = Path(__file__).parent / "data" / "corpus.txt"
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
#: their ids are their places: the trainer numbers special tokens first
_SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class _Shape:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_len: int


#: tiny: 0.1M parameters, for tests. small: 20M, for demos and benchmarks.
_SHAPES: dict[DemoSize, _Shape] = {
    "tiny": _Shape(512, 64, 128, 2, 4, 2, 2048),
    "small": _Shape(768, 512, 1536, 6, 8, 4, 4096),
}


def write_demo_model(directory: Path, size: DemoSize) -> None:
    """Write the demo model of this size into `directory`, which is made when absent.

    Files of the same names are replaced one by one, each at once, config.json last: who finds it finds a whole
    model. Takes about a second for `small`. The caller's torch generator is not touched.
    """
    shape = _SHAPES[size]
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".partial-") as name:
        partial = Path(name)
        tokenizer = _build_tokenizer(shape)
        tokenizer.save_pretrained(partial)
        model = _build_model(shape, tokenizer)
        model.config.save_pretrained(partial)
        model.generation_config.save_pretrained(partial)
        save_file(model.state_dict(), partial / "model.safetensors", metadata={"format": "pt"})
        files = sorted(partial.iterdir(), key=lambda path: (path.name == "config.json", path.name))
        for path in files:
            os.replace(path, directory / path.name)


def fill_weights(model: PreTrainedModel, seed: int) -> None:
    """Replace all weights by seeded noise that makes the model behave like a trained one in size.

    Matrices get a standard deviation of fan_in^-0.5, so that every layer and its attention move the logits (with the
    usual 0.02 a random model echoes its last token); vectors (norms) lie around 1, biases around 0. The noise of a
    weight depends on its name and `seed` only.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
            noise = np.random.Generator(np.random.PCG64(int.from_bytes(key, "little"))).standard_normal(
                weight.shape, dtype=np.float32
            )
            if weight.ndim > 1:
                noise *= weight.shape[-1] ** -0.5
            else:
                noise = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
            weight.copy_(torch.from_numpy(noise))


def _build_model(shape: _Shape, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    end_ids = [_SPECIAL_TOKENS.index(token) for token in (TURN_END, END_OF_TEXT)]
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_len,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end_ids,
        pad_token_id=end_ids[1],
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    fill_weights(model, seed=0)
    model.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=end_ids[1])
    return model


def _build_tokenizer(shape: _Shape) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(CORPUS.read_text(encoding="utf-8").splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=shape.max_len,
        clean_up_tokenization_spaces=False,
    )
