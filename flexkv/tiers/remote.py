"""The remote tier: blocks in a store that other engines share.

    written behind, by whole spans ──▶ store ◀── listed, round after round ──▶ hints ──▶ catalogue

The store is not asked whether it has a block: hints say so, and a wrong one costs a fetch.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from flexkv.actors.actor import Window
from flexkv.actors.write_behind import ShipLimits
from flexkv.common.config import MB, CacheConfig, CacheSizes
from flexkv.common.terms import BlockKey, Tier
from flexkv.index.catalogue import NOTHING_IS_FAR, Catalogue
from flexkv.index.hints import STORE, HintedCatalogue, Hints
from flexkv.index.keys import block_identity
from flexkv.index.spans import span_blocks
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Sums
from flexkv.io.remote.landing import HostBlocks
from flexkv.io.remote.names import PoolDescription
from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.port import RemotePort, SpanNews
from flexkv.io.remote.requests import Requests
from flexkv.tiers.limits import WRITE_WINDOWS
from flexkv.tiers.parts import StoreStatistics, TierHooks, TierParts, Work
from flexkv.tiers.remote_gc.collector import Collector
from flexkv.tiers.remote_gc.rules import Limits
from flexkv.tiers.remote_gc.touches import Touches
from flexkv.tiers.remote_listing import Listing
from flexkv.tiers.remote_pool import SharedPool
from flexkv.tiers.remote_probe import Probe, TierState
from flexkv.tiers.unavailable import Unavailable

SPANS_MAX = 1 << 21
"""How many spans are remembered if the tier has no size: 20 MB."""
SPARE_SPANS = 1024
"""How many more spans are remembered than the tier may hold: a pool can exceed its budget."""
DEADLINE_SHARE = 0.8
"""The share of `io_deadline_s` after which a transfer without any progress has ended, so that none
counts as hung."""


class RemoteTier:
    """The remote tier of one engine.

    Attributes:
        catalogue: what the store is said to have.
        requests: the requests to the store; None until it is open.
        pool: the pool there; None until then.
    """

    def __init__(self, cache: CacheConfig, sizes: CacheSizes, unavailable: Unavailable) -> None:
        """Take the configuration, and where to note what cannot be used."""
        self.catalogue: Catalogue = NOTHING_IS_FAR
        self.requests: Requests | None = None
        self.pool: SharedPool | None = None
        self._cache, self._sizes, self._unavailable = cache, sizes, unavailable

    def open(self, arena: Arena, sums: Sums, undo: ExitStack) -> TierParts | None:
        """Open the store, to which nothing is sent yet; return None without a remote tier.

        Args:
            arena: the host memory.
            sums: of its blocks: uint64[blocks].
            undo: gets what releases the adapters.

        Raises:
            ConfigError: the address or an option is wrong.
            BackendUnavailableError: what the store needs is not installed.
        """
        cache, sizes = self._cache, self._sizes
        if not cache.enable_remote:
            return None
        if len(sizes.spaces) > 1:
            why = "blocks of models with several KV groups are not kept there yet"
            self._unavailable.lose_tier(Tier.REMOTE, why)
            return None
        size = span_blocks(sizes.block_stride_bytes, cache.tokens_per_block)
        span_bytes = size * sizes.block_stride_bytes
        read, write = (
            max(1, int(window_mb * MB) // span_bytes)
            for window_mb in (cache.remote_read_window_mb, cache.remote_write_window_mb)
        )
        options = RemoteOptions(
            deadline_s=DEADLINE_SHARE * cache.io_deadline_s, gets_max=read, puts_max=write
        )
        secret = cache.key_secret.get_secret_value()
        identity = block_identity(sizes.spaces, secret)
        description = PoolDescription(identity, tuple(sizes.block_bytes), size)
        (address,) = cache.remote_cache_path
        custom = cache.remote_config_custom.get_secret_value()
        requests = self.requests = Requests(open_store(address, custom, options), options)
        hints = Hints(_spans_max(cache.num_remote_blocks, size), size)
        pool = self.pool = SharedPool(requests.store, description)
        self.catalogue = HintedCatalogue(hints)
        host = HostBlocks(arena, sums, tuple(sizes.block_bytes))
        budget = cache.num_remote_blocks
        limits = Limits(None if budget is None else max(1, budget // size), cache.remote_ttl_s)
        forget = partial(_drop, hints)
        deletes = cache.remote_delete_per_s if cache.remote_list_per_s else None
        collector = Collector(requests, pool, limits, deletes, forget)
        touches = Touches(requests, pool, collector)
        news = SpanNews(partial(_note, hints, touches), forget)
        port = RemotePort(requests, pool, host, options, news)
        undo.callback(port.close)
        listing = Listing(requests, pool, hints, cache.remote_list_per_s, collector)
        return TierParts(
            Tier.REMOTE,
            None,
            port,
            Window(read * span_bytes, read * span_bytes),
            Window(write * span_bytes, span_bytes),
            pool,
            work=partial(_work, port, pool, listing, touches, collector),
            ship=self._ship(size, write),
            store=partial(_statistics, pool, hints, listing, touches, collector),
            stop=port.stop,
            waiting_since_s=port.waiting_since_s,
        )

    def _ship(self, size: int, write: int) -> ShipLimits | None:
        when, mb_per_s = self._cache.remote_write, self._cache.remote_write_mb_per_s
        if when == "off":
            return None
        per_s = None if mb_per_s is None else mb_per_s * MB / self._sizes.block_stride_bytes
        return ShipLimits(size, WRITE_WINDOWS * write * size, when == "reused", per_s)


def _work(
    port: RemotePort,
    pool: SharedPool,
    listing: Listing,
    touches: Touches,
    collector: Collector,
    hooks: TierHooks,
) -> Work:
    port.spawn = hooks.spawn
    pool.lose = hooks.lose
    probe = Probe(touches.requests, pool)
    state = TierState(hooks.is_failing, hooks.try_now)
    return {
        "remote pool": pool.run(),
        "remote listing": listing.run(hooks.spawn),
        "remote hints": listing.clock(),
        "remote probe": probe.run(state),
        "remote touches": touches.run(hooks.spawn),
        "remote collection": collector.run(hooks.spawn),
    }


def _statistics(
    pool: SharedPool, hints: Hints, listing: Listing, touches: Touches, collector: Collector
) -> StoreStatistics:
    requests = touches.requests
    current = pool.current
    return StoreStatistics(
        where=requests.store.where,
        is_joined=current is not None,
        generation=0 if current is None else current.description.generation,
        known_spans=len(hints),
        lost_spans=hints.counts().lost,
        listed_rounds=listing.rounds,
        requests=requests.counts(),
        collection=collector.counts(),
        touches=touches.counts(),
    )


def _spans_max(blocks: int | None, size: int) -> int:
    return SPANS_MAX if blocks is None else blocks // size + SPARE_SPANS


def _note(hints: Hints, touches: Touches, key: BlockKey) -> None:
    hints.note(STORE, key)
    touches.used(key)


def _drop(hints: Hints, key: BlockKey) -> None:
    hints.drop(STORE, key)
