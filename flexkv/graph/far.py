"""Extends what a load finds in this engine's own tiers by the blocks that are said to lie far."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

from msgspec import structs

from flexkv.common.request import Request
from flexkv.common.terms import Positions, Tier
from flexkv.index.catalogue import Catalogue
from flexkv.index.claims import Holding
from flexkv.index.found import Found, Placement
from flexkv.index.residency import ABSENT, Residency


class Extended(NamedTuple):
    """What a load finds with its far blocks, and what to pin so that host memory can take these."""

    found: Found
    above: Sequence[Holding] = ()


def with_far(
    request: Request, found: Found, residency: Residency, catalogue: Catalogue, avoid: Set[Tier]
) -> Extended:
    """Return what was found, and behind it the far blocks that host memory may take.

    Host memory takes a block that it lacks if the block before it is resident or coming.

    Args:
        request: the load.
        found: what it finds in this engine's own tiers, up to what is to be avoided.
        residency: where these blocks are.
        catalogue: what lies far.
        avoid: tiers that are down.
    """
    keys, (first, end, *_), at = request.keys, request.span, found.last
    runs = catalogue.far(keys, at, end, avoid) if at < end else ()
    above = residency.parent(keys, first) if runs and at == first else []
    if not runs or above is None:
        return Extended(found)
    for states, positions, _ in residency.survey(keys, at, end, use=False):
        if states[0] != ABSENT:
            end = min(end, positions.first)
    ready = dict(found.ready)
    for tier, ids in runs:
        assert tier not in ready, f"{tier.label} has two runs, or places"
        ids = ids[: end - at]
        if len(ids):
            ready[tier] = Placement(Positions(at, len(ids)), ids)
            at += len(ids)
    return Extended(structs.replace(found, last=at, ready=ready), above)
