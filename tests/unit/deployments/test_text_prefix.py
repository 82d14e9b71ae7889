"""Of a text prefix only those tokens are taken with which every longer text begins, whatever the tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from deployments.tokenizer import Tokenizer

CORPUS = [
    "the tide turns twice a day and the gate lets the water out",
    "don't  do it twice, it's 12 345",
    "häuser 潮水",
]
#: those that merge, contract, are cut or stand for a special token
texts = st.lists(
    st.sampled_from(
        ["the", "ti", "de", " ", "  ", "\n", "'", "s", "t", "12", "3", ",", "潮", "水", "ä", "<s>", "</s>"]
    ),
    max_size=12,
).map("".join)


def byte_level() -> FastTokenizer:
    """As GPT-2: words begin with their blank."""
    made = FastTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"]))
    return made


def with_ends() -> FastTokenizer:
    """A start token before every text and an end token behind it."""
    made = byte_level()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return made


def sentencepiece() -> FastTokenizer:
    """As Llama 2: a mark before the text and in place of each blank, no words beforehand; the end strips blanks."""
    made = FastTokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    words = [word for line in CORPUS for word in line.split()]
    made.train_from_iterator(words, trainer)
    made.add_special_tokens([AddedToken("<s>", rstrip=True), AddedToken("</s>", lstrip=True)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


@pytest.fixture(scope="module", params=[byte_level, with_ends, sentencepiece])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=request.param()).save_pretrained(directory)
    return Tokenizer(directory)


def ids(tokens: bytes) -> list[int]:
    return np.frombuffer(tokens, dtype="<i4").tolist()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts, more=texts)
def test_every_longer_text_begins_with_them(tokenizer: Tokenizer, text: str, more: str) -> None:
    prefix = ids(tokenizer.encode_prefix(text))
    whole = ids(tokenizer.encode(text + more))
    rendered = ids(tokenizer.encode(text + more, add_special_tokens=False))
    assert prefix in (whole[: len(prefix)], rendered[: len(prefix)])


def test_whole_words_are_kept(tokenizer: Tokenizer) -> None:
    words = "the tide turns twice"
    sure = ids(tokenizer.encode_prefix(words + " a"))
    assert tokenizer.decode(sure).strip() == words
    assert ids(tokenizer.encode_prefix(words + "\n")) == sure
    assert tokenizer.encode_prefix("twice") == tokenizer.encode_prefix(" ") == tokenizer.encode_prefix("") == b""


def test_a_text_that_spells_its_start_gets_no_second_one(tokenizer: Tokenizer) -> None:
    sure = ids(tokenizer.encode_prefix("<s>the tide "))
    assert sure.count(tokenizer._wrapper.convert_tokens_to_ids("<s>")) == 1
