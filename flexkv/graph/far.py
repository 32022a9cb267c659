"""Extends what is found in this engine's own tiers by the blocks that are said to lie far.

A load takes far blocks along. An engine that asks what it may load must not be offered any that
could still fail to arrive, so a match tells them apart:

    here, or coming from here │ far, or coming from there │ unknown
    ──────── found ──────────▶│◀───────── far ───────────▶│
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from msgspec import structs

from flexkv.common.terms import Positions, Tier
from flexkv.index.catalogue import Catalogue, FarRun
from flexkv.index.claims import Holding
from flexkv.index.found import Found, LeafFound, Placement
from flexkv.index.residency import ABSENT, Residency


class Extended(NamedTuple):
    """What a load finds with its far blocks, and what to pin so that host memory can take these."""

    found: Found
    above: Sequence[Holding] = ()


def with_far(
    keys: bytes,
    end: int,
    found: Found,
    residency: Residency,
    catalogue: Catalogue,
    avoid: Set[Tier],
) -> Extended:
    """Return what was found, and behind it the far blocks that host memory may take.

    Host memory takes a block that it lacks if the block before it is resident or coming.

    Args:
        keys: root and keys of the prompt's blocks.
        end: where the load ends.
        found: what it finds in this engine's own tiers, up to what is to be avoided.
        residency: where these blocks are.
        catalogue: what lies far.
        avoid: tiers that are down.
    """
    at = found.last
    if at >= end or catalogue.is_empty:
        return Extended(found)
    runs = catalogue.far(keys, at, end, avoid)
    above = residency.parent(keys, at) if runs and at == found.first else []
    if not runs or above is None:
        return Extended(found)
    ready = dict(found.ready)
    for tier, ids in _absent(runs, keys, at, end, residency):
        assert tier not in ready, f"{tier.label} has two runs, or places"
        ready[tier] = Placement(Positions(at, len(ids)), ids)
        at += len(ids)
    return Extended(structs.replace(found, last=at, ready=ready), above)


def _absent(
    runs: Sequence[FarRun], keys: bytes, at: int, end: int, residency: Residency
) -> list[FarRun]:
    """Return runs from position `at` on, up to the first block that host memory does not lack."""
    for states, positions, _ in residency.survey(keys, at, end, use=False):
        if states[0] != ABSENT:
            end = min(end, positions.first)
    absent = []
    for tier, ids in runs:
        if len(ids := ids[: end - at]):
            absent.append(FarRun(tier, ids))
            at += len(ids)
    return absent


class SetApart(NamedTuple):
    """What a match finds here, and what a load could bring behind that.

    Attributes:
        found: what is here.
        far: how many blocks of the chain longer the prefix could be, by the tier where they are.
        fetched: how many blocks of all KV groups a prefetch waits for to make it so long, by the
            tier that sends them.
        coming: how many of `fetched` are on their way from far tiers already.
    """

    found: Found
    far: Mapping[Tier, int] = {}
    fetched: Mapping[Tier, int] = {}
    coming: int = 0


def set_apart(
    here: Found, whole: Found, drop: int, residency: Residency, pending: Placement | None = None
) -> SetApart:
    """Return what is here, and what a load could bring behind that.

    Args:
        here: what is found without blocks that are coming from far.
        whole: what a load brings, with these and with blocks that are far.
        drop: how many of the last blocks of both are to be left out, though they must be there.
        residency: where these blocks are.
        pending: blocks behind `whole` that must be there, too, and are being filled.
    """
    first, kept = here.last, here.before(max(here.first, here.last - drop))
    # What is far has to make up for blocks to drop that are not here.
    last = max(first, whole.last - (drop - (here.last - kept.last)))
    if last == first:
        return SetApart(kept)
    cut = whole.before(last)
    far, _ = _behind(first, [LeafFound(0, cut.ready, cut.pending)], residency)
    chain, dropped = LeafFound(0, whole.ready, whole.pending), LeafFound(0, whole.dropped, pending)
    fetched, coming = _behind(first, [chain, dropped, *whole.leaves], residency)
    fetched.pop(Tier.HOST, None)
    return SetApart(kept, far, fetched, coming)


def _behind(
    first: int, groups: Sequence[LeafFound], residency: Residency
) -> tuple[dict[Tier, int], int]:
    """Return how many blocks are at position `first` or behind it, by tier, and how many coming.

    Blocks that are coming from far count for the tier that sends them, others for host memory.
    """
    own, counts, coming = {Tier.DEVICE, None, *residency.tiers}, Counter[Tier](), 0
    for group in groups:
        for tier, placed in group.ready.items():
            counts[tier] += placed.behind(first).block_count
        if group.pending is None:
            continue
        ids = group.pending.behind(first).block_ids
        for source in residency.claims.sources(Tier.HOST, ids):
            sender = Tier.HOST if source is None or source in own else source
            counts[sender] += 1
            coming += sender is not Tier.HOST
    return dict(+counts), coming
