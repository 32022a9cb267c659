"""What the far tiers of one engine share: the size of spans, and the hints of who has which."""

from __future__ import annotations

import asyncio

from flexkv.common.config import CacheConfig, CacheSizes
from flexkv.index.hints import Hints
from flexkv.index.spans import span_blocks

SPANS_MAX = 1 << 21
"""How many spans are remembered if nothing says how many there may be: 20 MB."""
SPARE_SPANS = 1024
"""How many more spans are remembered than a store may hold: a pool can exceed its budget."""
NODES = 16
"""For this many nodes of this one's size the spans of peers are remembered."""
TICK_S = 1.0
"""How often the hints' time is set, by which doubts end."""


def hints_of(cache: CacheConfig, sizes: CacheSizes) -> Hints | None:
    """Return empty hints; None if the engine has no far tier."""
    if not (cache.has_remote or cache.has_peers):
        return None
    has_leaves = len(sizes.spaces) > 1
    size = span_blocks(sizes.block_stride_bytes, cache.tokens_per_block, has_leaves)
    pairs_max = 0
    if cache.has_remote:
        blocks = cache.num_remote_blocks
        pairs_max += SPANS_MAX if blocks is None else blocks // size + SPARE_SPANS
    if cache.has_peers:
        own = (sizes.num_host_blocks + sizes.num_disk_blocks) // size
        pairs_max += max(NODES * own, SPANS_MAX)
    return Hints(pairs_max, size)


async def keep_time(hints: Hints) -> None:
    """Set the hints' time until cancelled."""
    loop, begin_s = asyncio.get_running_loop(), asyncio.get_running_loop().time()
    while True:
        hints.tick(int((loop.time() - begin_s) / TICK_S))
        await asyncio.sleep(TICK_S)
