"""The remote tier: blocks in a store that other engines share.

    written behind, by whole spans ──▶ store ◀── listed, round after round ──▶ hints ──▶ catalogue

The store is not asked whether it has a block: hints say so, and a wrong one costs a fetch. A store
that cannot be listed (Mooncake) is asked for spans that no hint names, leaves included: see
`remote_lookups`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from flexkv.actors.actor import Window
from flexkv.actors.write_behind import ShipLimits
from flexkv.common.config import MB, CacheConfig, CacheSizes
from flexkv.common.space import rules_of
from flexkv.common.terms import BlockKey, Tier
from flexkv.index.catalogue import NOTHING_IS_FAR, Catalogue, Sought
from flexkv.index.hints import STORE, HintedCatalogue, Hints
from flexkv.index.keys import block_identity
from flexkv.io.memory.arena import Arena
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.ports import Sums
from flexkv.io.remote.landing import OpenStore
from flexkv.io.remote.mooncake import MooncakeStore
from flexkv.io.remote.names import PoolDescription
from flexkv.io.remote.open import open_mooncake, open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.port import RemotePort, SpanNews
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.seal import SEAL_BYTES
from flexkv.process.spawning import Spawn
from flexkv.tiers.far import keep_time
from flexkv.tiers.limits import WRITE_WINDOWS
from flexkv.tiers.parts import StoreStatistics, TierHooks, TierParts, Work
from flexkv.tiers.remote_gc.collector import CollectionCounts, Collector
from flexkv.tiers.remote_gc.removal import RemovalCounts
from flexkv.tiers.remote_gc.rules import Limits
from flexkv.tiers.remote_gc.touches import TouchCounts, Touches
from flexkv.tiers.remote_listing import Listing
from flexkv.tiers.remote_lookups import LookupCatalogue, Lookups
from flexkv.tiers.remote_pool import NOTE, SharedPool
from flexkv.tiers.remote_probe import Probe, TierState
from flexkv.tiers.ssd_note import SsdNote
from flexkv.tiers.unavailable import Unavailable

REQUESTS_MAX = 32
"""The most spans being read, and being written, at once, however small they are."""
DEADLINE_SHARE = 0.8
"""The share of `io_deadline_s` after which a transfer without progress ends, so that none counts as
hung."""


class RemoteTier:
    """The remote tier of one engine.

    Attributes:
        catalogue: what the store is said to have.
        requests: the requests to the store; None until it is open.
        pool: the pool there; None until then.
    """

    def __init__(
        self,
        cache: CacheConfig,
        sizes: CacheSizes,
        unavailable: Unavailable,
        hints: Hints | None,
    ) -> None:
        """Take the configuration, where to note what cannot be used, and the hints of far tiers."""
        self.catalogue: Catalogue = NOTHING_IS_FAR
        self.requests: Requests | None = None
        self.pool: SharedPool | None = None
        self._cache, self._sizes, self._unavailable = cache, sizes, unavailable
        self._hints = hints

    def open(self, arena: Arena, sums: Sums, undo: ExitStack) -> TierParts | None:
        """Open the store, to which nothing is sent yet; return None without a remote tier.

        Args:
            arena: the host memory.
            sums: of its blocks: uint64[blocks].
            undo: takes a callback that closes the port.

        Raises:
            ConfigError: the address or an option is wrong.
            BackendUnavailableError: what the store needs is not installed.
        """
        cache, sizes, hints = self._cache, self._sizes, self._hints
        ssd_directories = cache.ssd_cache_dir if cache.enable_ssd else ()
        if not cache.has_remote or hints is None:
            SsdNote(ssd_directories, NOTE).forget()
            return None
        size = hints.span_blocks
        span_bytes = size * sizes.block_stride_bytes
        read, write = (
            min(REQUESTS_MAX, max(1, int(window_mb * MB) // span_bytes))
            for window_mb in (cache.remote_read_window_mb, cache.remote_write_window_mb)
        )
        options = RemoteOptions(
            deadline_s=DEADLINE_SHARE * cache.io_deadline_s,
            gets_max=read,
            puts_max=write,
            hedged_share=RemoteOptions.hedged_share if self._can_list else 0.0,
        )
        secret = cache.key_secret.get_secret_value()
        identity = block_identity(sizes.spaces, secret)
        description = PoolDescription(identity, tuple(sizes.block_bytes), size)
        requests = self.requests = Requests(self._store(options, size), options)
        pool = self.pool = SharedPool(requests.store, description, ssd_directories)
        discover = self._by_listing if self._can_list else self._by_lookups
        discovery = discover(requests, pool, hints)
        self.catalogue = discovery.catalogue
        host = HostBlocks(arena, sums, tuple(sizes.block_bytes))
        port = RemotePort(requests, pool, host, options, discovery.news)
        undo.callback(port.close)
        return TierParts(
            Tier.REMOTE,
            None,
            port,
            Window(read * span_bytes, read * span_bytes),
            Window(write * span_bytes, span_bytes),
            pool,
            work=partial(self._work, port, hints, discovery.work),
            ship=self._ship(size, write),
            store=partial(_statistics, requests, pool, hints, discovery),
            stop=port.stop,
            leave=requests.store.leave,
            waiting_since_s=port.waiting_since_s,
            look_up=discovery.look_up,
        )

    @property
    def era(self) -> int:
        """Return the latest generation of the cluster that the store knows; 0 if there is none."""
        return 0 if self.pool is None else self.pool.era

    def follow(self, cluster_generation: int | None) -> None:
        """Go to the pool of a generation of the cluster, if there is a remote tier."""
        if self.pool is not None:
            self.pool.follow(cluster_generation)

    def stay(
        self, cluster_generation: int, is_apart: bool, clear_engine: Callable[[], object]
    ) -> None:
        """Stay in the pool of the blocks on SSD until `follow`: see `SharedPool`."""
        if self.pool is not None:
            self.pool.stay(cluster_generation, is_apart, clear_engine)

    def _work(
        self, port: RemotePort, hints: Hints, work: Callable[[Spawn], Work], hooks: TierHooks
    ) -> Work:
        """Return the tasks that the engine has to run for the tier."""
        pool = self.pool
        assert pool is not None

        def lose(why: str) -> None:
            self._unavailable.lose_tier(Tier.REMOTE, why)
            hooks.lose(why)

        port.spawn, pool.lose = hooks.spawn, lose
        pool.clear_engine, pool.ssd_cleared = hooks.clear, hooks.ssd_cleared
        state = TierState(hooks.is_failing, hooks.try_now)
        return {
            "remote pool": pool.run(),
            "remote hints": keep_time(hints),
            "remote probe": Probe(port.requests, pool).run(state),
            **work(hooks.spawn),
        }

    @property
    def _can_list(self) -> bool:
        """Return whether the store can be listed; otherwise spans have to be looked up."""
        return not self._cache.use_mooncake_store_backend

    def _store(self, options: RemoteOptions, size: int) -> OpenStore:
        """Return the store, to which nothing is sent yet."""
        cache = self._cache
        if cache.use_mooncake_store_backend:
            object_bytes = size * (max(self._sizes.block_bytes) + SEAL_BYTES)
            return open_mooncake(cache.mooncake_store_config_path, options, object_bytes)
        (address,) = cache.remote_cache_path
        return open_store(address, cache.remote_config_custom.get_secret_value(), options)

    def _by_listing(self, requests: Requests, pool: SharedPool, hints: Hints) -> _Discovery:
        """Return how an engine learns what a store has that can be listed."""
        cache, blocks = self._cache, self._cache.num_remote_blocks
        budget = None if blocks is None else max(1, blocks // hints.span_blocks)
        forget = partial(_drop, hints)
        deletes = cache.remote_delete_per_s if cache.remote_list_per_s else None
        limits = Limits(budget, cache.remote_ttl_s)
        collector = Collector(requests, pool, limits, deletes, forget)
        touches = Touches(requests, pool, collector)
        listing = Listing(requests, pool, hints, cache.remote_list_per_s, collector)

        def work(spawn: Spawn) -> Work:
            return {
                "remote listing": listing.run(spawn),
                "remote touches": touches.run(spawn),
                "remote collection": collector.run(spawn),
            }

        return _Discovery(
            HintedCatalogue(hints),
            SpanNews(partial(_note, hints, touches.used), forget),
            work,
            lambda: (listing.rounds, collector.counts(), touches.counts()),
            lambda: collector.refusals.why or touches.refusals.why,
        )

    def _by_lookups(self, requests: Requests, pool: SharedPool, hints: Hints) -> _Discovery:
        """Return how an engine learns what a Mooncake Store has."""
        store = requests.store
        assert isinstance(store, MooncakeStore)
        rules, silent_s = rules_of(self._sizes.spaces), store.mover.sizes.answer_s
        lookups = Lookups(store, requests, pool, hints, silent_s, rules)

        def work(_: Spawn) -> Work:
            return {"remote lookups": lookups.run(), "mover": store.mover.keep()}

        nothing = CollectionCounts(False, 0, None, RemovalCounts()), TouchCounts(0, 0, 0, 0)
        return _Discovery(
            LookupCatalogue(hints, lookups),
            SpanNews(partial(_note, hints, _nothing), partial(_drop, hints)),
            work,
            lambda: (0, *nothing),
            lambda: "",
            lookups.look_up,
        )

    def _ship(self, size: int, write: int) -> ShipLimits | None:
        when, mb_per_s = self._cache.remote_write, self._cache.remote_write_mb_per_s
        if when == "off":
            return None
        per_s = None if mb_per_s is None else mb_per_s * MB / self._sizes.block_stride_bytes
        assert self.requests is not None
        where = self.requests.store.where
        return ShipLimits(size, WRITE_WINDOWS * write * size, when == "reused", per_s, where)


class _Discovery(NamedTuple):
    """How an engine learns which spans a store has.

    Attributes:
        catalogue: says which.
        news: takes what the port has learnt of them.
        work: returns the tasks that learn it from the store.
        counts: returns how often the pool was listed, and what was collected and touched.
        refused: returns why the store refuses what collecting or touching needs.
        look_up: see `TierParts`.
    """

    catalogue: HintedCatalogue
    news: SpanNews
    work: Callable[[Spawn], Work]
    counts: Callable[[], tuple[int, CollectionCounts, TouchCounts]]
    refused: Callable[[], str]
    look_up: Callable[[Sought], Awaitable[None] | None] | None = None


def _statistics(
    requests: Requests, pool: SharedPool, hints: Hints, discovery: _Discovery
) -> StoreStatistics:
    current = pool.current
    listed_rounds, collection, touches = discovery.counts()
    return StoreStatistics(
        where=requests.store.where,
        is_joined=current is not None,
        generation=0 if current is None else current.description.generation,
        known_spans=hints.spans_of(STORE),
        lost_spans=hints.counts().lost,
        listed_rounds=listed_rounds,
        requests=requests.counts(),
        collection=collection,
        touches=touches,
        refused=discovery.refused(),
    )


def _note(hints: Hints, used: Callable[[BlockKey], object], key: BlockKey) -> None:
    hints.note(STORE, key)
    used(key)


def _nothing(key: BlockKey) -> None:
    """Do nothing."""


def _drop(hints: Hints, key: BlockKey) -> None:
    hints.drop(STORE, key)
