"""Copies as owners of pages, beyond the life of everything else that knew of them."""

from __future__ import annotations

import numpy as np

from cache.node_table import NO_NODE
from cache.page_hold import PageHold


def orphaned_copies(holds: list[PageHold], num_pages: int) -> list[PageHold]:
    """Make the holds of copies depend on nothing but themselves, and return them.

    For a cache that begins anew and trusts nothing: a page that two copies name is the first one's, one that does not
    exist is nobody's. Copies go on reading and writing what they were told to; only who hands the pages back changes.
    """
    copies = [hold for hold in holds if hold.is_copy]
    seen = np.zeros(num_pages, np.bool_)
    for copy in copies:
        own = np.unique(copy.page_table)
        own = own[(own >= 0) & (own < num_pages)]
        own = own[~seen[own]]
        seen[own] = True
        copy.node, copy.span, copy.is_fenced = NO_NODE, None, True
        copy.num_shared_pages = 0
        copy.replace_pages(own.astype(np.int32).data)
    return copies
