"""Derives the bounds of an engine's work, and its empty index, from the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flexkv.actors.actor import Window
from flexkv.actors.write_behind import WriteBehindLimits
from flexkv.common.config import GB, MB, CacheConfig, CacheSizes
from flexkv.common.errors import ConfigError
from flexkv.common.space import rules_of
from flexkv.common.terms import Tier
from flexkv.graph.draft import PlanLimits
from flexkv.index.clears import ClearHistory
from flexkv.index.eviction import Eviction
from flexkv.index.guests import GUEST_SHARE
from flexkv.index.residency import PREFIX, WORTHY, Residency

WRITE_WINDOWS = 2
"""Windows of owed blocks on their way to a tier at once: one is being written, one waits."""
KEPT_SHARE_MAX = 0.75
"""The largest part of host memory that may be kept for lower tiers; the rest is for loads."""
WRITE_SHARE_MAX = 0.125
"""The largest part of host memory in one window, since blocks being written free no room."""

DISK_READ_PIECE_BYTES, DISK_WRITE_PIECE_BYTES = 2 * MB, 8 * MB
"""The largest submissions to the disk. Reads are small, so that other reads wait briefly."""

DEVICE_PIECE_BYTES = {"cpu": 64 * MB, "cuda": 256 * MB, "agents": 64 * MB}
"""The largest submission to a device of each kind: what it copies in about 5 ms. By default a GPU
has two in flight, so that it never waits for the next."""
DEVICE_WINDOWS = {"cpu": 1, "cuda": 4, "agents": 1 << 30}
"""The window of each kind of device, in units of `device_window_mb`. For agents it is as good as
unbounded: each has a window of its own behind it, so that an instance that does not answer cannot
use up the window of the others."""


def disk_windows(cache: CacheConfig) -> tuple[Window, Window]:
    """Return the window of reads from SSD, and that of writes to it."""
    return (
        Window(int(cache.disk_read_window_mb * MB), DISK_READ_PIECE_BYTES, is_paced=True),
        Window(int(cache.disk_write_window_mb * MB), DISK_WRITE_PIECE_BYTES, is_paced=True),
    )


def device_window(cache: CacheConfig, kind: str) -> Window:
    """Return the window of devices of a kind, which holds for each direction."""
    window_bytes = int(cache.device_window_mb * MB) * DEVICE_WINDOWS[kind]
    return Window(window_bytes, DEVICE_PIECE_BYTES[kind])


def eviction_of(cache: CacheConfig) -> Eviction:
    """Return the eviction policy of the tiers, with its parameters."""
    return Eviction(
        cache.eviction_policy,
        cache.evict_ratio,
        cache.slru_protected_threshold,
        cache.hit_reward_seconds,
        cache.evict_start_threshold,
    )


def plan_limits(cache: CacheConfig, sizes: CacheSizes) -> PlanLimits:
    """Return the bounds on a plan."""
    limit_gb, stride = cache.write_behind_max_gb, sizes.block_stride_bytes
    if limit_gb < 0:
        behind_blocks = max(1, sizes.num_host_blocks // 2)
    else:
        behind_blocks = int(limit_gb * GB) // stride
    return PlanLimits(
        chunk_blocks=max(1, int(cache.chunk_mb * MB) // stride),
        write_behind_blocks_max=behind_blocks,
        peers_how=WORTHY if cache.p2p_admit == "policy" else PREFIX,
    )


def behind_limits(cache: CacheConfig, sizes: CacheSizes) -> WriteBehindLimits:
    """Return the bounds on writing owed blocks."""
    window_blocks = int(cache.disk_write_window_mb * MB) // sizes.block_stride_bytes
    window_blocks = max(1, min(window_blocks, int(WRITE_SHARE_MAX * sizes.num_host_blocks)))
    return WriteBehindLimits(
        batch_blocks=window_blocks,
        in_flight_blocks=WRITE_WINDOWS * window_blocks,
        kept_blocks_max=int(KEPT_SHARE_MAX * sizes.num_host_blocks),
        burst_wait_s=cache.write_behind_wait_s,
    )


def empty_index(
    cache: CacheConfig, sizes: CacheSizes, capacities: dict[Tier, int], clears: ClearHistory
) -> Residency:
    """Return the empty index of an engine; `capacities` are the blocks of each tier.

    Raises:
        ConfigError: it does not fit in memory.
    """
    with memory_error_named(sizes):
        index = Residency(capacities, eviction_of(cache), clears, rules_of(sizes.spaces))
    if cache.has_peers and cache.p2p_admit == "second_use":
        index.limit_guests(GUEST_SHARE)
    return index


@contextmanager
def memory_error_named(sizes: CacheSizes) -> Iterator[None]:
    """Turn a MemoryError of the code inside into an error that names the size to lower.

    Raises:
        ConfigError: there is not enough memory to keep account of the blocks.
    """
    try:
        yield
    except MemoryError as error:
        is_disk = sizes.num_disk_blocks > sizes.num_host_blocks
        given = sizes.disk_given if is_disk else sizes.host_given
        why = f"there is not enough memory to manage that many blocks: set {given.key} lower"
        raise ConfigError(*given, why) from error
