"""Words shared between processes: 8 bytes, aligned, little-endian, stored and loaded as one numpy scalar each.

Such a word is never seen half-written; nothing wider is trusted (protocol.md section 5, hole H21: 0 torn of 6 to 13
million reads, against 230,083 of 9.9 million for a packed big-endian one).
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError

#: uint64, 1-D, contiguous, 8-byte aligned, over memory that other processes map
Words: TypeAlias = NDArray[np.uint64]
#: orders the stores (or loads) before it against those after it
Fence: TypeAlias = Callable[[], None]

WORD_BYTES = 8
#: largest value of a word that other parts compare as a signed number
MAX_WORD = 2**63 - 1

_SEQ_CST = 5


class Store(Protocol):
    """How a writer stores one word. Tests inject one that ends the writer between two stores."""

    def __call__(self, words: Words, index: int, value: int) -> None: ...


def store_word(words: Words, index: int, value: int) -> None:
    """One aligned 8-byte store. value: 0 <= value < 2**64, else OverflowError."""
    words[index] = value


def words_at(buffer: mmap.mmap | memoryview | bytearray, offset: int, num_words: int) -> Words:
    """View of `num_words` words that begin at byte `offset`. Read-only exactly if the buffer is."""
    words: Words = np.frombuffer(buffer, dtype="<u8", count=num_words, offset=offset)
    assert words.ctypes.data % WORD_BYTES == 0, "shared words must be 8-byte aligned"
    return words


def fence_for(machine: str) -> Fence:
    """The fence that keeps two words in order on `machine` (`platform.machine()`).

    x86-64 shows stores in program order and loads in program order, so there it does nothing. Elsewhere it is
    libatomic's; ConfigError if that library is not there, because then the order cannot be promised.
    """
    if machine in ("x86_64", "AMD64"):
        return _no_fence
    try:
        fence = ctypes.CDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError) as error:
        raise ConfigError(
            f"this machine is {machine}: sharing cache words between processes needs libatomic.so.1 there ({error}); "
            "install libatomic (package libatomic1)"
        ) from error
    return lambda: fence(_SEQ_CST)


def _no_fence() -> None:
    return None
