"""Names of pages that hold over processes and restarts: a chain of keyed blake2b-128 (protocol.md section 5).

A key stands for everything that decides a page's KV: whose log (lineage), which model shape and weights, which
namespace and how often it was flushed, the epoch, all tokens up to the page's end. Keys of two of these never meet, so
a flush or new weights make old pages unreachable without touching them. blake2b rather than xxh3: a tenant must not be
able to search for two prompts with one key (hole H22). About 1 us a page; the device tier needs no keys.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TypeAlias

from cache.types import TOKEN_BYTES, Epoch, Namespace, TokenBytes

#: keys of consecutive pages, 16 bytes each, side by side
PageKeys: TypeAlias = bytes
KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class KeyRoot:
    """What all pages of a request have in common. `digest()` is where its chain begins."""

    lineage: str
    layout_digest: str
    #: digest of the weights that compute the pages, not of those that are current
    weights_digest: str
    namespace: Namespace
    #: epoch of the request's admission
    epoch: Epoch
    #: raised by every scoped flush of the namespace or adapter
    namespace_sub_epoch: int = 0
    #: raised by every scoped flush of this namespace and first page
    prefix_sub_epoch: int = 0

    def digest(self) -> bytes:
        """16 bytes. Two roots that differ in any field have different ones."""
        texts = [text.encode() for text in (self.lineage, self.layout_digest, self.weights_digest, self.namespace)]
        # each text with its length in front: ("ab", "c") must not read like ("a", "bc")
        parts = [part for text in texts for part in (struct.pack("<I", len(text)), text)]
        numbers = struct.pack("<QQQ", self.epoch, self.namespace_sub_epoch, self.prefix_sub_epoch)
        secret = hashlib.blake2b(self.lineage.encode()).digest()
        return hashlib.blake2b(b"".join(parts) + numbers, digest_size=KEY_BYTES, key=secret).digest()


def page_keys(root: bytes, tokens: TokenBytes, page_size: int, parent: bytes | None = None) -> PageKeys:
    """Keys of the whole pages of `tokens`; a rest that fills no page has none.

    root: `KeyRoot.digest()`.  parent: key of the page before `tokens`; None: they begin the sequence.
    """
    page_bytes = page_size * TOKEN_BYTES
    key = root if parent is None else parent
    keys: list[bytes] = []
    for begin in range(0, len(tokens) - page_bytes + 1, page_bytes):
        key = hashlib.blake2b(key + tokens[begin : begin + page_bytes], digest_size=KEY_BYTES, key=root).digest()
        keys.append(key)
    return b"".join(keys)
