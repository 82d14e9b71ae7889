"""The checksum that ties a page's bytes to the one entry under which they were committed (holes H13, H15).

It is seeded with key, slot, generation, epoch, drop number and birth. So an entry mixed of two, one that was written
half when its writer died, and one whose slot was given to another page all fail the same test as a flipped bit.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from cache.arena import PageView

#: a chunk is hashed while it is still in the processor's cache. With 1 MiB of L2, 128 to 256 KiB reach 0.78 to 0.84 of
#: memcpy's speed for writing and 0.72 to 0.74 for reading (medians of three runs on a busy machine); 64 KiB lose 0.07
#: to the calls, whole pages of 1.8 MB 0.1 to memory. Copies are numpy's because they release the GIL; through
#: memoryviews they would gain 0.02 and stop decoding meanwhile.
_CHUNK_BYTES = 192 * 1024
_SEED = struct.Struct("<7Q")


class PageEntry(NamedTuple):
    """A page in a slot, as its writer commits it and readers check it."""

    slot: int
    #: of the slot; rises at each lease
    generation: int
    #: 16 bytes, `cache.keys`
    key: bytes
    epoch: int
    #: of the lease it was written under
    drop: int
    #: CLOCK_BOOTTIME in ns of the oldest page of its chain
    birth_ns: int
    #: xxh3_64 of the page's bytes, seeded with all of the above
    checksum: int = 0

    def seed(self) -> int:
        """64 bits that stand for everything but the checksum."""
        slot, generation, key, epoch, drop, birth_ns, _ = self
        return entry_seed(*key_words(key), slot, generation, epoch, drop, birth_ns)


def entry_seed(key_low: int, key_high: int, slot: int, generation: int, epoch: int, drop: int, birth_ns: int) -> int:
    """`PageEntry.seed` from the words of a slot's row."""
    return xxhash.xxh3_64_intdigest(_SEED.pack(key_low, key_high, slot, generation, epoch, drop, birth_ns))


def key_words(key: bytes) -> tuple[int, int]:
    """The two words of a key, low one first."""
    return int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")


def key_of_words(low: int, high: int) -> bytes:
    """The key of two words."""
    return low.to_bytes(8, "little") + high.to_bytes(8, "little")


def page_checksum(page: PageView, seed: int) -> int:
    """xxh3_64 over `page`. Reads it once, copies nothing."""
    return xxhash.xxh3_64_intdigest(page.data, seed)


def copy_page(source: PageView, target: PageView, *, hashed: PageView, seed: int) -> int:
    """Copy `source` to `target` and return the checksum of `hashed`, which is one of the two.

    Hash the source when writing: it is owned, while the target may be overwritten by a stray process (hole H13). Hash
    the target when reading: those are the bytes that will be used (hole H16). Releases the GIL in each chunk.
    """
    if len(source) <= _CHUNK_BYTES:
        target[:] = source
        return page_checksum(hashed, seed)
    digest = xxhash.xxh3_64(seed=seed)
    for begin in range(0, len(source), _CHUNK_BYTES):
        end = begin + _CHUNK_BYTES
        target[begin:end] = source[begin:end]
        digest.update(hashed[begin:end].data)
    return digest.intdigest()
