"""DeviceCache against a naive model under random requests, evictions, swaps, drops and reaping."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache import DeviceCache, Dropped, Epoch, Namespace
from tests.property.cache.model import PAGE_BYTES, PAGE_SIZE, Model, Prefix, Running, cached_prefixes

some_namespace = st.sampled_from([Namespace(""), Namespace(""), Namespace("tenant")])
#: up to 8 pages of two kinds and an odd token: prefixes meet, part and meet again all the time
some_tokens = st.builds(
    lambda kinds, num_odd: b"".join(struct.pack("<i", kind) * PAGE_SIZE for kind in kinds) + bytes(4 * num_odd),
    st.lists(st.integers(0, 1), max_size=8),
    st.integers(0, 1),
)
#: picks a running request by its index, modulo their number
some_pick = st.integers(0, 5)


class DeviceCacheMachine(RuleBasedStateMachine):
    """Every rule does the same to the cache and to the model; the invariants compare them after every rule."""

    @initialize(num_pages=st.sampled_from([8, 16, 48]))
    def start(self, num_pages: int) -> None:
        self.cache = DeviceCache(num_pages, PAGE_SIZE)
        self.model = Model()
        self.running: list[Running] = []
        self.now_s = 0.0

    # ------------------------------------------------------------------------------------------------------ requests
    @rule(namespace=some_namespace, tokens=some_tokens, spare=st.integers(0, 2))
    def serve(self, namespace: Namespace, tokens: bytes, spare: int) -> None:
        """A whole request."""
        request = self.admit(namespace, tokens, spare)
        if self.compute(request, len(tokens) // 4):
            self.publish(request)
        self.finish(request)

    @rule(namespace=some_namespace, tokens=some_tokens, spare=st.integers(0, 2), num_steps=st.integers(0, 20))
    def begin(self, namespace: Namespace, tokens: bytes, spare: int, num_steps: int) -> None:
        """A request that goes on running, its prefill done in part."""
        request = self.admit(namespace, tokens, spare)
        self.compute(request, min(request.num_computed + num_steps, len(tokens) // 4))

    @precondition(lambda self: self.running)
    @rule(pick=some_pick, more=some_tokens, spare=st.integers(0, 2), is_published=st.booleans())
    def begin_alike(self, pick: int, more: bytes, spare: int, is_published: bool) -> None:
        """A request that begins like one that runs."""
        other = self.running[pick % len(self.running)]
        request = self.admit(other.namespace, other.tokens[:48] + more, spare)
        if self.compute(request, len(request.tokens) // 4) and is_published:
            self.publish(request)

    @precondition(lambda self: self.running)
    @rule(pick=some_pick, more=some_tokens, is_published=st.booleans())
    def go_on(self, pick: int, more: bytes, is_published: bool) -> None:
        """Prefill the rest, decode some more."""
        request = self.running[pick % len(self.running)]
        if len(request.tokens) < 80:
            request.tokens += more
        self.compute(request, len(request.tokens) // 4)
        if is_published:
            self.publish(request)

    @precondition(lambda self: self.running)
    @rule(pick=some_pick, is_published=st.booleans())
    def end(self, pick: int, is_published: bool) -> None:
        request = self.running[pick % len(self.running)]
        if is_published:
            self.publish(request)
        self.finish(request)

    def admit(self, namespace: Namespace, tokens: bytes, spare: int) -> Running:
        self.now_s += 1.0
        limit = max(0, len(tokens) // 4 - spare)
        hold = self.cache.open(namespace, tokens, limit, self.now_s)
        num_cached = self.model.longest(namespace, tokens, limit)
        assert hold.num_cached_tokens == num_cached
        assert hold.kv_epoch == (self.cache.epoch if num_cached else None)
        request = Running(hold, namespace, tokens, self.now_s, num_cached)
        self.remember(request)
        self.running.append(request)
        return request

    def compute(self, request: Running, target: int) -> bool:
        """Write the KV of the tokens up to `target` into the request's pages, if there are enough."""
        before, counts = cached_prefixes(self.cache), self.cache.counts()
        num_missing = max(0, -(-target // PAGE_SIZE) - len(request.hold.page_table))
        if not self.cache.try_extend(request.hold, target):
            assert num_missing > counts.free + counts.cached
            assert self.cache.counts() == counts
            assert cached_prefixes(self.cache) == before
            return False
        self.check_eviction(before, max(0, num_missing - counts.free))
        for token in range(request.num_computed, target):  # a partly written page spoils what lay there
            page = int(request.hold.page_table[token // PAGE_SIZE])
            self.model.content[page] = request.namespace, request.tokens[: 4 * token + 4]
        request.num_computed = max(request.num_computed, target)
        self.remember(request)
        return True

    def publish(self, request: Running) -> None:
        self.now_s += 1.0
        self.cache.publish(request.hold, request.tokens, request.num_computed, self.now_s)
        if request.is_tainted:
            return
        for prefix, page in zip(request.prefixes, request.hold.page_table.tolist(), strict=False):
            assert self.model.cached.setdefault(prefix, page) == page, "a page that the index had was replaced"
            birth_s = self.model.birth_s.get(prefix, request.opened_s)
            self.model.birth_s[prefix] = min(birth_s, request.opened_s)

    def finish(self, request: Running) -> None:
        self.cache.close(request.hold)
        self.running.remove(request)

    # --------------------------------------------------------------------------------------------------------- flush
    @rule(
        kind=st.sampled_from(["swap", "namespace", "prefix", "older"]),
        namespace=some_namespace, tokens=some_tokens, number=st.integers(0, 10),
    )  # fmt: skip
    def flush(self, kind: str, namespace: Namespace, tokens: bytes, number: int) -> None:
        """One rule for all kinds, or flushes would be half of what happens."""
        if kind == "swap":
            self.swap(number % 3)
        elif kind == "namespace":
            self.drop_namespace(namespace)
        elif kind == "prefix":
            self.drop_prefix(namespace, tokens)
        else:
            self.drop_older(number)

    def swap(self, advance: int) -> None:
        counts, generation = self.cache.counts(), self.cache.generation
        swapped = self.cache.swap(Epoch(self.cache.epoch + advance))
        assert swapped.freed_pages == counts.cached
        assert swapped.carried_pages == counts.pinned + counts.private + counts.fenced
        assert self.cache.generation == generation + 1
        self.model.forget(set(self.model.cached))
        for request in self.running:
            request.is_tainted = True

    def drop_namespace(self, namespace: Namespace) -> None:
        gone = {prefix for prefix in self.model.cached if prefix[0] == namespace}
        planned = self.cache.count_namespace(namespace)
        dropped = self.cache.drop_namespace(namespace)
        self.check_drop(planned, dropped, gone, lambda request: request.namespace == namespace)

    def drop_prefix(self, namespace: Namespace, tokens: bytes) -> None:
        first = tokens[:PAGE_BYTES]
        gone = {prefix for prefix in self.model.cached if prefix[0] == namespace and prefix[1].startswith(first)}
        planned = self.cache.count_prefix(namespace, tokens)
        dropped = self.cache.drop_prefix(namespace, tokens)
        self.check_drop(
            planned, dropped, gone,
            lambda request: request.namespace == namespace and request.hold.has_first_page(first),
        )  # fmt: skip

    def drop_older(self, age_s: int) -> None:
        """May drop more than asked, never less: here everything that has the first page of something too old."""
        birth_s = self.now_s - age_s
        first_pages = {(prefix[0], prefix[1][:PAGE_BYTES]) for prefix in self.model.older(birth_s)}
        allowed = {prefix for prefix in self.model.cached if (prefix[0], prefix[1][:PAGE_BYTES]) in first_pages}
        planned, before = self.cache.count_older(birth_s), cached_prefixes(self.cache)
        dropped = self.cache.drop_older(birth_s)
        gone = set(before) - set(cached_prefixes(self.cache))
        assert gone >= self.model.older(birth_s)
        assert gone >= allowed
        sharing = [
            request for request in self.running if gone.intersection(request.prefixes[: request.hold.num_shared_pages])
        ]
        self.check_drop(planned, dropped, gone, lambda request: request.opened_s < birth_s or request in sharing)

    @rule(budget=st.integers(1, 9))
    def reap(self, budget: int) -> None:
        counts = self.cache.counts()
        self.cache.reap(budget)
        assert self.cache.counts() == counts

    # ---------------------------------------------------------------------------------------------------- invariants
    @invariant()
    def is_sound(self) -> None:
        assert self.cache.sanity_check() == []

    @invariant()
    def index_holds_what_the_model_holds(self) -> None:
        assert cached_prefixes(self.cache) == self.model.cached
        assert all(self.model.content[page] == prefix for prefix, page in self.model.cached.items())

    @invariant()
    def running_requests_still_have_what_they_computed(self) -> None:
        """Nobody wrote into a page of a running request, whatever was flushed, evicted or dropped meanwhile."""
        for request in self.running:
            pages = request.hold.page_table.tolist()
            assert [self.model.content[page] for page in pages[: len(request.prefixes)]] == request.prefixes

    def teardown(self) -> None:
        for request in list(self.running):
            self.finish(request)
        while self.cache.reap(3):
            assert self.cache.sanity_check() == []
        counts = self.cache.counts()
        assert counts.free + counts.cached == self.cache.num_pages

    # ------------------------------------------------------------------------------------------------------- details
    def remember(self, request: Running) -> None:
        """Which prefix lies in each full page of the request."""
        for index in range(len(request.prefixes), request.num_computed // PAGE_SIZE):
            request.prefixes.append((request.namespace, request.tokens[: (index + 1) * PAGE_BYTES]))

    def check_eviction(self, before: dict[Prefix, int], num_evicted: int) -> None:
        """Exactly as many pages went as were missing."""
        after = cached_prefixes(self.cache)
        assert after.items() <= before.items()
        assert len(before) - len(after) == num_evicted
        self.model.forget(set(before) - set(after))

    def check_drop(
        self, planned: Dropped, dropped: Dropped, gone: set[Prefix], covers: Callable[[Running], bool]
    ) -> None:
        """What is gone is free or fenced, exactly the covered requests are fenced, and the plan said so."""
        assert planned == dropped
        fresh = [request for request in self.running if not request.is_tainted and covers(request)]
        owned = {page for request in fresh for page in request.hold.page_table.tolist()}
        num_gone_or_private = len(gone) + sum(request.hold.num_private_pages for request in fresh)
        assert dropped.fenced_pages >= len(owned)
        assert dropped.freed_pages + dropped.fenced_pages == num_gone_or_private
        for request in fresh:
            request.is_tainted = True
        assert all(request.hold.is_fenced == request.is_tainted for request in self.running)
        self.model.forget(gone)


class TestDeviceCache(DeviceCacheMachine.TestCase):
    settings = settings(max_examples=250, stateful_step_count=60, deadline=None)


@pytest.mark.deep
class TestDeviceCacheDeep(DeviceCacheMachine.TestCase):
    """The same, long."""

    settings = settings(max_examples=3_000, stateful_step_count=80, deadline=None)
