"""A rank's host tier, put together from the settings: how its engine uses it, and the link to its node's agent."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from actors.detached import find_actor
from actors.end_proofs import process_name
from actors.host_link import HostLink, LinkSurroundings, map_arena, warm_arena
from actors.host_messages import HostClaim
from actors.messages import CONTROLLER_NAME, RankRecord, Registered, node_agent_name
from cache.shared_words import fence_for
from configs.schema import HostTierSettings
from engine.host_calls import HostSettings, SubEpochs, TierPlace
from engine.snapshot import EngineSnapshot

_MIB = 1024**2


def host_settings(
    tier: HostTierSettings, *, layout_digest: str, weights_digest: str, page_bytes: int
) -> HostSettings | None:
    """How the engine uses the tier; None: there is none. Raises ConfigError on what cannot work with this model."""
    if not tier.is_on:
        return None
    return HostSettings(
        layout_digest=layout_digest,
        weights_digest=weights_digest,
        page_bytes=page_bytes,
        write_policy=tier.write_policy,
        verification=tier.verification,
        max_inflight_bytes=tier.max_inflight_mb * _MIB,
        low_watermark=tier.low_watermark,
        high_watermark=tier.high_watermark,
        lease_batch=tier.lease_batch,
    )


def host_link(
    record: RankRecord,
    registered: Registered,
    attach: Callable[[TierPlace], None],
    find_tier: Callable[[str], Awaitable[Any]],
    early_sub_epochs: Callable[[], SubEpochs],
) -> HostLink:
    """The link of a registered rank. attach: gives the engine an arena.  find_tier: the agent's handle by node.
    early_sub_epochs: of scoped flushes that the rank was told of before it served.
    """
    claim = HostClaim(
        record.incarnation, process_name(record), registered.lineage, record.layout_digest, record.bytes_per_page
    )
    around = LinkSurroundings(
        find_tier=lambda: find_tier(record.node_id),
        map_file=partial(map_arena, fence_for(platform.machine())),
        attach=attach,
        warm=warm_arena,
        in_thread=asyncio.to_thread,
    )
    sub_epochs = tuple((sub_epoch.scope, sub_epoch.index) for sub_epoch in registered.sub_epochs)
    return HostLink(claim, lambda: sub_epochs + early_sub_epochs(), around)


async def find_node_agent(node_id: str) -> Any:
    """Handle of the agent of this node; None if Ray knows none."""
    return await asyncio.to_thread(find_actor, node_agent_name(CONTROLLER_NAME, node_id))


def host_facts(snapshot: EngineSnapshot, link: HostLink | None) -> dict[str, Any] | None:
    """What a rank says of its host tier, as plain data; None: it has none."""
    counters = snapshot.host
    if counters is None:
        return None
    facts: dict[str, Any] = {
        "num_lookups": counters.num_lookups,
        "num_found_pages": counters.num_found_pages,
        "num_loaded_pages": counters.num_loaded_pages,
        "loaded_bytes": counters.loaded_bytes,
        "num_written_pages": counters.num_written_pages,
        "written_bytes": counters.written_bytes,
        "load_s": round(counters.load_s, 6),
        "write_s": round(counters.write_s, 6),
        "num_known_pages": counters.num_known_pages,
        "misses": dict(counters.misses),
        "commits": dict(counters.commits),
        "drops": dict(counters.drops),
    }
    no_link = {"is_attached": False, "message": "the rank has not joined yet", "num_lost_calls": 0}
    return facts | (no_link if link is None else link.facts())
