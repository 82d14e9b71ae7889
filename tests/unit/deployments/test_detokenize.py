"""Text of a stream: the same as decoding everything at once, and never half a character on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers

from configs.errors import ConfigError, InvalidField
from deployments.detokenize import REPLACEMENT, TextStream, WindowTextStream
from deployments.tokenizer import Tokenizer
from tests.unit.deployments.api_server import Demo

token_lists = st.lists(st.lists(st.integers(0, 511), max_size=4), max_size=20)


def streamed(stream: TextStream, pieces: list[list[int]]) -> str:
    return "".join([stream.push(piece) for piece in pieces]) + stream.finish()


@given(pieces=token_lists, skip=st.booleans())
@settings(max_examples=100)
def test_byte_level_streams_equal_decoding_at_once(demo: Demo, pieces: list[list[int]], skip: bool) -> None:
    stream = demo.tokenizer.text_stream(b"", skip_special_tokens=skip)
    ids = [token for piece in pieces for token in piece]
    assert streamed(stream, pieces) == demo.tokenizer.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=60))
@settings(max_examples=100)
def test_no_half_character_is_ever_shown(demo: Demo, text: str) -> None:
    ids = list(memoryview(demo.tokenizer.encode(text)).cast("i"))
    stream = demo.tokenizer.text_stream(b"", skip_special_tokens=False)
    shown = ""
    for token in ids:
        shown += stream.push([token])
        assert text.startswith(shown)
    assert shown + stream.finish() == text


@functools.cache
def sentencepiece_like() -> FastTokenizer:
    """Byte fallback and a leading space that only the first word drops, as in Llama 2's vocabulary."""
    words = ["▁hello", "▁world", "▁a", "b", "é", "<unk>"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast


def decode(ids: list[int]) -> str:
    return sentencepiece_like().decode(ids, skip_special_tokens=False)


def byte_of(token_id: int) -> int | None:
    return token_id if token_id < 256 else None


def byte_stream(context: list[int], decoder: Callable[[list[int]], str] = decode) -> WindowTextStream:
    return WindowTextStream(decoder, context, byte_of)


@pytest.mark.parametrize("character", ["é", "€", "🌊"])
@pytest.mark.parametrize("count", [1, 60, 500])
def test_a_long_run_of_byte_tokens_is_shown_character_by_character(character: str, count: int) -> None:
    stream = byte_stream([256])
    for _ in range(count):
        assert "".join(stream.push([byte]) for byte in character.encode()) == character
    assert stream.push([257]) == " world"
    assert stream.finish() == ""


@pytest.mark.parametrize("character", ["é", "€", "🌊"])
def test_a_prompt_that_ends_in_byte_tokens_does_not_garble_the_answer(character: str) -> None:
    prompt = [256, *list((character * 9).encode())]
    assert streamed(byte_stream(prompt), [[257], list(character.encode()), [258]]) == f" world{character} a"
    assert streamed(byte_stream(prompt[:-1]), [[prompt[-1]], [257]]) == f"{character} world"


def test_one_byte_that_is_none_garbles_only_itself() -> None:
    ids = [*"€€".encode(), 0xFF, *"€".encode(), 0xE2, 257]
    assert streamed(byte_stream([256]), [[token] for token in ids]) == "€€\ufffd€\ufffd world"


def test_a_tokenizer_knows_its_byte_tokens(tmp_path: Path) -> None:
    sentencepiece_like().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    stream = tokenizer.text_stream(np.asarray([256, *"€".encode()], dtype="<i4").tobytes())
    assert streamed(stream, [[byte] for byte in ("€" * 60).encode()]) == "€" * 60
    assert tokenizer.token_bytes(0xE2) == b"\xe2"


def test_a_window_keeps_the_space_between_prompt_and_answer() -> None:
    prompt = [256]
    stream = WindowTextStream(decode, prompt)
    assert streamed(stream, [[257], [258]]) == " world a"


def test_a_window_holds_a_character_of_byte_tokens_back_until_it_is_whole() -> None:
    stream = byte_stream([256])
    euro = list("€".encode())
    assert stream.push(euro[:1]) == ""
    assert stream.push(euro[1:2]) == ""
    assert stream.push(euro[2:]) == "€"
    assert stream.push([259]) == "b"


whole_characters = st.sampled_from(
    [(256,), (257,), (259,), (260,), tuple("é".encode()), tuple("€".encode()), tuple("🌊".encode())]
)


@given(st.lists(whole_characters, max_size=90))
@settings(max_examples=100)
def test_a_window_gives_the_whole_text_of_whole_characters(parts: list[tuple[int, ...]]) -> None:
    ids = [token for part in parts for token in part]
    stream = byte_stream([256])
    assert streamed(stream, [[token] for token in ids]) == decode([256, *ids]).removeprefix("hello")


def test_a_run_that_never_decodes_stays_bounded_and_is_shown() -> None:
    sizes: list[int] = []

    def counting(ids: list[int]) -> str:
        sizes.append(len(ids))
        return decode(ids)

    for stream in (byte_stream([256], counting), WindowTextStream(counting, [256])):
        assert streamed(stream, [[0xFF]] * 500) == REPLACEMENT * 500
    assert max(sizes) < 100


def test_token_bytes_join_to_the_text(demo: Demo) -> None:
    text = "naïve 🌊 café"
    ids = memoryview(demo.tokenizer.encode(text)).cast("i").tolist()
    assert b"".join(map(demo.tokenizer.token_bytes, ids)) == text.encode()
    assert demo.tokenizer.token_bytes(10**6) == b""


def test_a_directory_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_the_template_of_the_model_writes_the_prompt(demo: Demo) -> None:
    text = demo.tokenizer.render_chat([{"role": "user", "content": "hi"}], continue_final=False, options={})
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_final_message_can_be_continued(demo: Demo) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The sea"}]
    text = demo.tokenizer.render_chat(messages, continue_final=True, options={})
    assert text.endswith("<|im_start|>assistant\nThe sea")


def test_a_template_that_refuses_names_the_messages(demo: Demo) -> None:
    with pytest.raises(InvalidField) as refused:
        demo.tokenizer.render_chat([{"role": "user"}], continue_final=True, options={})
    assert refused.value.param == "messages"
