"""Where what lies in a node's shared file, and the views through which it is read and written.

    | control page | slot table | index | data: one page of KV per slot, contiguous |

A page is one block (page-first), so a copy from or to the device pool is one memcpy: 0.96 to 1.02 of its speed
measured, against 0.27 to 0.36 for per-layer indexing (reference: benchmarks/host_tier_bench.py).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cache.control_page import CONTROL_PAGE_BYTES, NUM_CONTROL_WORDS, ControlPage
from cache.shared_words import WORD_BYTES, Words, words_at
from configs.errors import ConfigError

#: uint8 [page_bytes], C-contiguous: the bytes of one page
PageView: TypeAlias = NDArray[np.uint8]
#: what a file is mapped into; plain memory in tests
Buffer: TypeAlias = mmap.mmap | bytearray

#: two cache lines: state, key and checksum in the first, the holder in the second
SLOT_WORDS: Final = 16
#: words of one bucket of the index: one cache line
BUCKET_WORDS: Final = 8
#: slots are numbered in the low half of an index word, 0 meaning none
MAX_SLOTS: Final = 2**31

_STRIDE_ALIGN = 64
_HUGE_PAGE_BYTES = 2 * 1024 * 1024
#: below this the data begins at the next 4 KiB: huge pages would gain nothing and small arenas would double
_HUGE_FROM_BYTES = 1024 * _HUGE_PAGE_BYTES


@dataclass(frozen=True, slots=True)
class ArenaGeometry:
    """Offsets and sizes in bytes; a pure function of the two numbers that the control page records."""

    #: 0: a file without a host tier, the control page alone
    num_slots: int = 0
    page_bytes: int = 0

    @classmethod
    def of_page(cls, page: ControlPage) -> ArenaGeometry:
        """The geometry that a file's control page records."""
        return cls(page.num_slots, page.page_bytes)

    @classmethod
    def fitting(cls, file_bytes: int, page_bytes: int) -> ArenaGeometry:
        """The largest arena whose whole file is at most `file_bytes`. ConfigError if not even one page fits."""
        if page_bytes < 1:
            raise ConfigError(f"a page of {page_bytes} bytes cannot be cached")
        low, high = 0, min(file_bytes // page_bytes, MAX_SLOTS)
        while low < high:
            middle = (low + high + 1) // 2
            if cls(middle, page_bytes).file_bytes <= file_bytes:
                low = middle
            else:
                high = middle - 1
        if low == 0:
            raise ConfigError(
                f"a host tier of {file_bytes:,} bytes holds no page of {page_bytes:,} bytes (with its index it takes "
                f"{cls(1, page_bytes).file_bytes:,}); raise configs: host_tier.size_gb"
            )
        return cls(low, page_bytes)

    @property
    def num_buckets(self) -> int:
        """Power of two with at least two words per slot: at most half full, buckets practically never overflow."""
        needed = -(-2 * self.num_slots // BUCKET_WORDS)
        return 1 << max(needed - 1, 0).bit_length()

    @property
    def page_stride(self) -> int:
        """Bytes from one slot's page to the next."""
        return _round_up(self.page_bytes, _STRIDE_ALIGN)

    @property
    def index_offset(self) -> int:
        return CONTROL_PAGE_BYTES + _round_up(self.num_slots * SLOT_WORDS * WORD_BYTES, mmap.PAGESIZE)

    @property
    def data_offset(self) -> int:
        end = self.index_offset + self.num_buckets * BUCKET_WORDS * WORD_BYTES
        is_large = self.num_slots * self.page_stride >= _HUGE_FROM_BYTES
        return _round_up(end, _HUGE_PAGE_BYTES if is_large else mmap.PAGESIZE)

    @property
    def data_bytes(self) -> int:
        return _round_up(self.num_slots * self.page_stride, mmap.PAGESIZE)

    @property
    def file_bytes(self) -> int:
        return self.data_offset + self.data_bytes if self.num_slots else CONTROL_PAGE_BYTES


class Arena:
    """Views of a mapped file. Read-only or writable as the mappings are; they stay mapped while a view lives."""

    def __init__(self, words: Buffer, data: Buffer, data_begin: int, geometry: ArenaGeometry) -> None:
        """words: the file's first `data_offset` bytes or more.  data: the data area, from byte `data_begin` of it."""
        self.geometry = geometry
        #: SLOT_WORDS for each slot
        self.slots = words_at(words, CONTROL_PAGE_BYTES, geometry.num_slots * SLOT_WORDS)
        #: BUCKET_WORDS for each bucket
        self.index = words_at(words, geometry.index_offset, geometry.num_buckets * BUCKET_WORDS)
        data_bytes = np.frombuffer(data, np.uint8, geometry.num_slots * geometry.page_stride, data_begin)
        #: uint8 [num_slots, page_bytes]
        self.pages = data_bytes.reshape(geometry.num_slots, geometry.page_stride)[:, : geometry.page_bytes]

    def prefault(self, slice_bytes: int = 8 * 1024 * 1024) -> Iterator[int]:
        """Map the data into this process, one slice for each step of the iteration; the bytes done after it.

        Reads one byte of each 4 KiB and changes none, so pages may be written meanwhile. Without it the first copy to
        or from a slot pays a fault for each 4 KiB: about 0.12 s per GiB, on a request's path.
        """
        data = np.lib.stride_tricks.as_strided(self.pages, (self.geometry.num_slots * self.geometry.page_stride,), (1,))
        for begin in range(0, len(data), slice_bytes):
            end = min(begin + slice_bytes, len(data))
            np.add.reduce(data[begin : end : mmap.PAGESIZE], dtype=np.uint64)
            yield end


def control_words(buffer: Buffer) -> Words:
    """The control page's words of a mapped file."""
    return words_at(buffer, 0, NUM_CONTROL_WORDS)


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
