"""Blocks that a lower tier is owed: in which order they are taken, and which may be evicted."""

from __future__ import annotations

from flexkv.common.terms import Tier
from flexkv.index.owed import OwedBlocks
from tests.unit.prompts import filled, residency


def test_what_finds_no_room_stays_kept_from_eviction() -> None:
    """Blocks of a batch for which the tier has no place are still kept, once the others go."""
    tiers = residency(host=4, disk=2)
    host_ids = filled(tiers, Tier.HOST, 0, 1, 2, 3)
    owed = OwedBlocks(tiers, Tier.DISK, batch_blocks_max=4)
    owed.add(host_ids, room_blocks=4)
    taken = owed.take()
    assert taken is not None
    assert taken.hold is not None
    assert taken.host_ids.tolist() == host_ids[:2].tolist()
    tiers.claims.settle(taken.hold, filled=False)
    assert (owed.blocks, owed.kept_blocks, tiers.counts(Tier.HOST).pinned) == (2, 2, 2)
    owed.unkeep(2)
    assert (owed.blocks, owed.kept_blocks, tiers.counts(Tier.HOST).pinned) == (2, 0, 0)


def test_no_more_blocks_may_be_evicted_than_is_asked_for() -> None:
    """Kept blocks are given up batch by batch, the last first, until there are enough."""
    tiers = residency(host=6, disk=6)
    owed = OwedBlocks(tiers, Tier.DISK, batch_blocks_max=2)
    owed.add(filled(tiers, Tier.HOST, *range(6)), room_blocks=6)
    for asked, kept in ((0, 6), (1, 4), (2, 2), (3, 0)):
        owed.unkeep(asked)
        assert (owed.kept_blocks, tiers.counts(Tier.HOST).pinned) == (kept, kept)
        assert tiers.evict(Tier.HOST, 6) == (2 if asked else 0)
    assert owed.blocks == 6


def test_nothing_is_owed_after_a_clear() -> None:
    """A clear forgets every batch, and lets all their blocks be evicted."""
    tiers = residency(host=4, disk=4)
    owed = OwedBlocks(tiers, Tier.DISK, batch_blocks_max=2)
    owed.add(filled(tiers, Tier.HOST, *range(4)), room_blocks=4)
    assert (owed.blocks, owed.kept_blocks) == (4, 4)
    owed.clear()
    assert (owed.blocks, owed.kept_blocks, tiers.counts(Tier.HOST).pinned) == (0, 0, 0)


def test_blocks_are_unwritten_until_the_tier_has_them() -> None:
    """Blocks that a tier is owed, or for which it has only a place, count as unwritten."""
    tiers = residency(host=6, disk=6)
    owed = OwedBlocks(tiers, Tier.DISK, batch_blocks_max=4)
    owed.add(filled(tiers, Tier.HOST, *range(4)), room_blocks=4)
    assert (len(owed.lacking(0, 6)), owed.count_unwritten(0, 6)) == (0, 4)
    taken = owed.take()
    assert taken is not None
    assert owed.count_unwritten(0, 6) == 4
    assert owed.count_unwritten(0, 3) + owed.count_unwritten(3, 6) == 4
    tiers.commit(Tier.DISK, taken.target_ids[:3])
    assert owed.count_unwritten(0, 6) == 1
    tiers.abort(Tier.DISK, taken.target_ids[3:])
    assert (len(owed.lacking(0, 6)), owed.count_unwritten(0, 6)) == (1, 1)
