"""A naive device tier: prefixes in a dict, and what was written into each page, so that staleness is seen directly."""

from __future__ import annotations

from dataclasses import dataclass, field

from cache import DeviceCache, Namespace, PageHold, TokenBytes

PAGE_SIZE = 2
PAGE_BYTES = 4 * PAGE_SIZE

#: (namespace, tokens up to the end of a page)
Prefix = tuple[Namespace, TokenBytes]


@dataclass(slots=True)
class Running:
    """A request: its hold, its tokens, and what it computed or reused."""

    hold: PageHold
    namespace: Namespace
    tokens: TokenBytes
    opened_s: float
    #: tokens whose KV is in its pages
    num_computed: int
    #: a flush covered it
    is_tainted: bool = False
    #: the prefix whose KV lies in each of its full pages
    prefixes: list[Prefix] = field(default_factory=list)


@dataclass(slots=True)
class Model:
    """What may be matched, and what lies in which page."""

    #: prefix -> page; closed under taking prefixes
    cached: dict[Prefix, int] = field(default_factory=dict)
    #: page -> the prefix whose KV was written into it last
    content: dict[int, Prefix] = field(default_factory=dict)
    #: cached prefix -> admission time of the oldest request that computed or shares it
    birth_s: dict[Prefix, float] = field(default_factory=dict)

    def longest(self, namespace: Namespace, tokens: TokenBytes, max_tokens: int) -> int:
        """Tokens of the longest cached prefix in whole pages."""
        end = PAGE_BYTES
        while end <= min(4 * max_tokens, len(tokens)) and (namespace, tokens[:end]) in self.cached:
            end += PAGE_BYTES
        return end // 4 - PAGE_SIZE

    def older(self, birth_s: float) -> set[Prefix]:
        """Chains with a page computed before `birth_s`: the page itself and everything below it."""
        old = [prefix for prefix in self.cached if self.birth_s[prefix] < birth_s]
        return {prefix for prefix in self.cached if any(is_below(prefix, above) for above in old)}

    def forget(self, gone: set[Prefix]) -> None:
        for prefix in gone:
            del self.cached[prefix], self.birth_s[prefix]


def is_below(prefix: Prefix, above: Prefix) -> bool:
    return prefix[0] == above[0] and prefix[1].startswith(above[1])


def cached_prefixes(cache: DeviceCache) -> dict[Prefix, int]:
    """Everything the real index would match, read out of its nodes one by one."""
    found: dict[Prefix, int] = {}
    table = cache.index.table
    waiting = [(namespace, b"", top) for namespace, top in cache.index.tops()]
    while waiting:
        namespace, above, node = waiting.pop()
        tokens = above + table.edges[node]
        for index, page in enumerate(memoryview(table.pages[node]).cast("i")):
            found[namespace, tokens[: len(above) + (index + 1) * PAGE_BYTES]] = page
        waiting.extend((namespace, tokens, child) for child in table.children[node].values())
    return found
