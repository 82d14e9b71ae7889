"""Keys of the pages of an index, hashed once: a node remembers those of its edge (16 bytes a page).

Nothing is hashed before somebody asks, so an engine without a host tier pays for an empty column and nothing else.
"""

from __future__ import annotations

from cache.key_roots import KeyRoots
from cache.keys import KEY_BYTES, PageKeys, page_keys
from cache.node_table import NodeId
from cache.pages import PAGE_ID_BYTES
from cache.prefix_index import PrefixIndex
from cache.types import TOKEN_BYTES, Epoch


def node_keys(index: PrefixIndex, node: NodeId, roots: KeyRoots, epoch: Epoch) -> PageKeys:
    """Keys of the pages of the node's edge; those of all above it are remembered too. About 1 us for each new one.

    epoch: of the index. All chains of a stem have one root for the stem's life: a scoped flush ends it.
    """
    table = index.table
    path: list[NodeId] = []
    above: int = node
    while above >= 0 and len(table.keys[above]) * PAGE_ID_BYTES < len(table.pages[above]) * KEY_BYTES:
        path.append(NodeId(above))
        above = table.parents[above]
    if path:
        _complete(index, path, table.keys[above][-KEY_BYTES:] if above >= 0 else None, roots, epoch)
    return table.keys[node]


def key_before(index: PrefixIndex, node: NodeId, stop: int, roots: KeyRoots, epoch: Epoch) -> bytes:
    """Key of the last page of the sequence up to `stop`, which lies in the node's edge."""
    num_pages = (stop - index.table.starts[node]) // index.page_bytes
    keys = node_keys(index, node, roots, epoch)
    return keys[(num_pages - 1) * KEY_BYTES : num_pages * KEY_BYTES]


def path_keys(index: PrefixIndex, node: NodeId, stop: int, roots: KeyRoots, epoch: Epoch) -> PageKeys:
    """Keys of the whole sequence up to `stop`, which lies in the node's edge."""
    node_keys(index, node, roots, epoch)
    parts: list[PageKeys] = []
    above: int = node
    while above >= 0:
        parts.append(index.table.keys[above])
        above = index.table.parents[above]
    return b"".join(reversed(parts))[: stop // index.page_bytes * KEY_BYTES]


def _complete(index: PrefixIndex, path: list[NodeId], parent: bytes | None, roots: KeyRoots, epoch: Epoch) -> None:
    """Hash what is missing in the nodes of `path`, deepest first, below the page with the key `parent`."""
    table, stem = index.table, index.stem_of(path[0])
    root = roots.root(index.stems.spaces[stem].namespace, index.stems.first_pages[stem], epoch)
    for node in reversed(path):
        known = table.keys[node]
        rest = table.edges[node][len(known) // KEY_BYTES * index.page_bytes :]
        fresh = page_keys(root, rest, index.page_bytes // TOKEN_BYTES, known[-KEY_BYTES:] or parent)
        table.keys[node] = known + fresh
        parent = table.keys[node][-KEY_BYTES:]
