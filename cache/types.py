"""Ids and small values of the cache, shared by all of its parts and by the engine."""

from __future__ import annotations

from typing import NewType, TypeAlias

#: index of a page in a rank's device pool, 0 <= page_id < num_pages
PageId = NewType("PageId", int)
#: token ids as contiguous little-endian int32 bytes; 4 bytes a token. Stays in this form from the tokenizer to the
#: index: turning a list of 8k ints into a key costs 64-150 us, the match of 8k cached tokens 1.5.
TokenBytes: TypeAlias = bytes
#: isolation string of a request (tenant salt, adapter). Keys of two namespaces never meet. "" is the common one.
Namespace = NewType("Namespace", str)
#: generation of valid KV = index of its record in the controller's log; only rises
Epoch = NewType("Epoch", int)
#: local number of a rank's prefix index; every swap advances it
TreeGeneration = NewType("TreeGeneration", int)

TOKEN_BYTES = 4

DEFAULT_NAMESPACE = Namespace("")
