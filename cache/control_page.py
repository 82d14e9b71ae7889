"""The first 4 KiB of a node's shared file: what every rank of the node reads once in each step.

One process per node writes it (holder of `WriterLock`), all others map it read-only. With the words below a flush
reaches every rank of a node by one store, and a node that the controller cannot reach stops using its cache by itself
(protocol.md sections 2, 4 and 5). Exists without a host tier too; then the file is this page alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, NamedTuple

from cache.shared_words import MAX_WORD, Fence, Store, Words, store_word
from configs.errors import InvariantError

CONTROL_PAGE_BYTES = 4096
NUM_CONTROL_WORDS = CONTROL_PAGE_BYTES // 8
#: floor of a retired file: above every epoch, so nobody who still maps the file matches anything (hole H20)
RETIRED_FLOOR = MAX_WORD

MAGIC: Final = int.from_bytes(b"TIDEGATE", "little")
#: rises with every change of what lies where in the file
FORMAT_VERSION: Final = 1

# Fixed for the life of a file: written before it has its name.
_MAGIC, _VERSION, _LINEAGE, _LAYOUT, _NONCE, _NUM_SLOTS, _PAGE_BYTES = 0, 1, 2, 4, 6, 7, 8
# Written while others read: a cache line of their own.
_TERM, _FLOOR, _WEIGHTS_FLOOR, _LEASE_END, _DROP, _BIRTH_FLOOR = 64, 65, 66, 67, 68, 69


class NodeWords(NamedTuple):
    """One reading of the words that change. Valid for the step it was read in, and for no other."""

    #: CLOCK_BOOTTIME of this machine, nanoseconds; past it a rank matches nothing and publishes nothing
    lease_end_ns: int
    #: lowest epoch that may still be matched or committed
    floor: int
    #: record of the last decided weight update; a rank whose weights are older admits nothing
    weights_floor: int
    #: of the last controller that was obeyed
    term: int
    #: advanced by a flush of the host tier alone; pages and leases of an older drop are void
    drop: int
    #: CLOCK_BOOTTIME in ns; host pages whose chain is older are void
    birth_floor_ns: int

    @property
    def is_retired(self) -> bool:
        """The file is no longer the node's: treat the lease as over and attach anew."""
        return self.floor == RETIRED_FLOOR

    def is_lease_over(self, now_ns: int) -> bool:
        """now_ns: CLOCK_BOOTTIME of this machine."""
        return self.is_retired or now_ns >= self.lease_end_ns


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Whose cache a file holds and in which shape. Any difference makes the bytes useless to the attacher."""

    #: random id in the first record of the controller's log
    lineage: str
    #: digest of shape, dtype and page size of a KV page; "" without a host tier
    layout_digest: str = ""
    #: slots of the arena and bytes of a page; 0 without a host tier
    num_slots: int = 0
    page_bytes: int = 0

    def has_lineage_of(self, page: ControlPage) -> bool:
        """The file of `page` is of this version and of this lineage; its layout may be another."""
        return (page.magic, page.version) == (MAGIC, FORMAT_VERSION) and page.lineage_words == _digest_words(
            self.lineage
        )

    def difference(self, page: ControlPage) -> str | None:
        """What keeps this identity from using the file of `page`, in words; None: nothing."""
        if (page.magic, page.version) != (MAGIC, FORMAT_VERSION):
            return f"it is no file of this version of Tidegate (format {page.version}, this is {FORMAT_VERSION})"
        if page.lineage_words != _digest_words(self.lineage):
            return "it belongs to another lineage, that is, to a controller log other than this one"
        if page.layout_words != _digest_words(self.layout_digest):
            return "its pages have another layout (model shape, dtype or page size)"
        if (page.num_slots, page.page_bytes) != (self.num_slots, self.page_bytes):
            return (
                f"it has {page.num_slots:,} slots of {page.page_bytes:,} bytes, "
                f"not {self.num_slots:,} of {self.page_bytes:,}"
            )
        return None


class ControlPage:
    """A reader's view. Changes nothing.

    words: the first 512 words of the file, read-only or not.  fence: of this machine, `fence_for`.
    """

    def __init__(self, words: Words, fence: Fence) -> None:
        assert len(words) == NUM_CONTROL_WORDS
        self._words = words
        self._load = words.item
        self._fence = fence

    def read(self) -> NodeWords:
        """The words that change. The lease end is loaded before the floors: who sees a lease sees its floor.

        The writer stores them the other way round, so a lease that still runs never comes with an older floor.
        """
        load = self._load
        lease_end_ns = load(_LEASE_END)
        self._fence()
        return NodeWords(lease_end_ns, load(_FLOOR), load(_WEIGHTS_FLOOR), load(_TERM), load(_DROP), load(_BIRTH_FLOOR))

    @property
    def magic(self) -> int:
        return self._load(_MAGIC)

    @property
    def version(self) -> int:
        return self._load(_VERSION)

    @property
    def nonce(self) -> int:
        """Random number of this very file: two files of one name differ in it."""
        return self._load(_NONCE)

    @property
    def lineage_words(self) -> tuple[int, int]:
        return self._load(_LINEAGE), self._load(_LINEAGE + 1)

    @property
    def layout_words(self) -> tuple[int, int]:
        return self._load(_LAYOUT), self._load(_LAYOUT + 1)

    @property
    def num_slots(self) -> int:
        return self._load(_NUM_SLOTS)

    @property
    def page_bytes(self) -> int:
        return self._load(_PAGE_BYTES)


class ControlPageWriter(ControlPage):
    """The one writer's view. Term, floors, lease end and drop only rise; a lower value leaves them as they are."""

    def __init__(self, words: Words, fence: Fence, store: Store = store_word) -> None:
        super().__init__(words, fence)
        self._store = store

    def initialise(self, identity: FileIdentity, nonce: int) -> None:
        """Fill the page of a file that nobody else can open yet. Its lease is over, its floor 0.

        nonce: random, 0 <= nonce < 2**63.
        """
        fixed = {
            _VERSION: FORMAT_VERSION,
            _NONCE: nonce,
            _NUM_SLOTS: identity.num_slots,
            _PAGE_BYTES: identity.page_bytes,
            _MAGIC: MAGIC,
        }
        self._store_pair(_LINEAGE, _digest_words(identity.lineage))
        self._store_pair(_LAYOUT, _digest_words(identity.layout_digest))
        for index, value in fixed.items():
            self._store(self._words, index, value)

    def grant(self, term: int, floor: int, weights_floor: int, lease_end_ns: int) -> bool:
        """Take over what the controller of `term` granted: floors first, then the lease that vouches for them.

        lease_end_ns: CLOCK_BOOTTIME, counted from the moment the renewal was sent.
        False, and nothing changes, if a higher term was obeyed before. Raises InvariantError on a retired file.
        """
        if not self.raise_floor(term, floor, weights_floor):
            return False
        self._fence()
        self._raise_word(_LEASE_END, lease_end_ns)
        return True

    def raise_floor(self, term: int, floor: int, weights_floor: int = 0) -> bool:
        """Nothing of an epoch below `floor` is matched or committed from the return on. Failures as in `grant`."""
        if self._load(_FLOOR) == RETIRED_FLOOR:
            raise InvariantError("a retired control page was written to")
        if term < self._load(_TERM):
            return False
        self._raise_word(_TERM, term)
        self._raise_word(_WEIGHTS_FLOOR, weights_floor)
        self._raise_word(_FLOOR, floor)
        return True

    def raise_birth_floor(self, birth_floor_ns: int) -> None:
        """Host pages whose chain was begun before this are void from the return on. CLOCK_BOOTTIME in ns."""
        self._raise_word(_BIRTH_FLOOR, birth_floor_ns)

    def raise_drop(self, drop: int) -> None:
        """Host pages and leases of slots of a lower drop number are void from the return on."""
        self._raise_word(_DROP, drop)

    def retire(self) -> None:
        """Make everybody who maps this file stop using it, before its name goes to another one."""
        self._store(self._words, _FLOOR, RETIRED_FLOOR)
        self._fence()
        self._store(self._words, _LEASE_END, 0)

    def _raise_word(self, index: int, value: int) -> None:
        if value > self._load(index):
            self._store(self._words, index, value)

    def _store_pair(self, index: int, pair: tuple[int, int]) -> None:
        for offset, value in enumerate(pair):
            self._store(self._words, index + offset, value)


def _digest_words(text: str) -> tuple[int, int]:
    """128 bits that stand for `text`; written before the file has a name, so the pair is never seen half."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
