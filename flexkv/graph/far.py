"""Extends what is found in this engine's own tiers by the blocks that are said to lie far.

A load takes far blocks along. An engine that asks what it may load must not be offered any that
could still fail to arrive, so a match tells them apart:

    here, or coming from here │ far, or coming from there │ unknown
    ──────── found ──────────▶│◀───────── far ───────────▶│
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from msgspec import structs

from flexkv.common.terms import Positions, Tier
from flexkv.index.catalogue import Catalogue, FarRun
from flexkv.index.claims import Holding
from flexkv.index.found import Found, Placement
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
    """What a match finds here, and how many blocks behind that could be had, by tier."""

    found: Found
    far: Mapping[Tier, int]
    coming: int = 0
    """How many of these are on their way already, or are here behind such a block."""


def set_apart(here: Found, found: Found, whole: Found, residency: Residency) -> SetApart:
    """Return what is here, and what a load could bring behind that.

    Args:
        here: what is found without blocks that are coming from far.
        found: what is found with these.
        whole: what a load brings, with blocks that are far, too.
        residency: where these blocks are.
    """
    return SetApart(here, blocks_behind(whole, here.last, residency), found.last - here.last)


def blocks_behind(found: Found, first: int, residency: Residency) -> dict[Tier, int]:
    """Return how many blocks of a run are at position `first` or behind it, by tier.

    Blocks that are coming from far count for the tier that sends them, others for host memory.
    """
    behind = {tier: placed.behind(first).block_count for tier, placed in found.ready.items()}
    if found.pending is not None:
        own = {Tier.DEVICE, None, *residency.tiers}
        coming = found.pending.behind(first).block_ids
        for source in residency.claims.sources(Tier.HOST, coming):
            tier = Tier.HOST if source in own or source is None else source
            behind[tier] = behind.get(tier, 0) + 1
    return {tier: count for tier, count in behind.items() if count}
