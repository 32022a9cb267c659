"""Spans that a far tier is owed: which, in which order, and what happens to those that are gone."""

from __future__ import annotations

import numpy as np
import pytest

from flexkv.common.space import GroupRule, Kind
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey, Positions, Route, Tier
from flexkv.graph.draft import ONWARD, chunked_by_span
from flexkv.index.keys import leaf_keys
from flexkv.index.owed import EVICTED, Taken
from flexkv.index.owed_spans import OwedSpans
from flexkv.index.residency import Residency
from tests.unit.prompts import filled, keys, residency

SPAN = 2


def owed_by(tiers: Residency, *known: BlockKey) -> OwedSpans:
    """Return an empty queue for a remote tier that is said to have spans with these keys."""
    return OwedSpans(tiers, Tier.REMOTE, SPAN, lambda tier, key: key in known)


def taken_from(tiers: Residency, owed: OwedSpans) -> Taken:
    """Return the next span, whose blocks are held no longer."""
    taken = owed.take()
    assert taken is not None
    assert taken.hold is not None
    assert tiers.counts(Tier.HOST).pinned == SPAN
    tiers.claims.settle(taken.hold, filled=False)
    return taken


def test_whole_spans_are_taken_in_order_with_their_parents_keys() -> None:
    """Five blocks owe two spans; each comes with its own keys and that of the block before it."""
    tiers = residency(host=8)
    ids = filled(tiers, Tier.HOST, *range(5))
    owed = owed_by(tiers)
    owed.add(ids, 0)
    assert owed.blocks == 2 * SPAN
    for first in (0, 2):
        taken = taken_from(tiers, owed)
        assert taken.host_ids.tolist() == ids[first : first + SPAN].tolist()
        prompt = keys(*range(5))
        assert taken.keys == prompt[first * BLOCK_KEY_BYTES : (first + 3) * BLOCK_KEY_BYTES]
    assert owed.blocks == 0


def test_a_span_is_owed_once_its_last_block_is_there() -> None:
    """The first half of a span owes nothing, and the second half owes the whole span."""
    tiers = residency(host=8)
    owed = owed_by(tiers)
    owed.add(filled(tiers, Tier.HOST, 0), 0)
    assert owed.blocks == 0
    owed.add(filled(tiers, Tier.HOST, 0, 1, first=1), 0)
    assert owed.blocks == SPAN


def test_a_span_is_owed_although_its_first_half_came_last() -> None:
    """Halves may arrive in any order: what arrives last completes the span."""
    tiers = residency(host=8)
    ids = tiers.reserve(Tier.HOST, keys(0, 1, 2, 3), Positions(0, 4))
    owed = owed_by(tiers)
    for some, blocks in ((ids[1:3], 0), (ids[3:], SPAN), (ids[:1], 2 * SPAN)):
        tiers.commit(Tier.HOST, some)
        owed.add(some, 0)
        assert owed.blocks == blocks


def test_what_is_far_waiting_or_being_written_is_not_owed_again() -> None:
    """A span is owed at most once, and not at all if the tier is said to have it."""
    tiers = residency(host=8)
    ids, prompt = filled(tiers, Tier.HOST, *range(4)), keys(*range(4))
    owed = owed_by(tiers, prompt[2 * BLOCK_KEY_BYTES : 3 * BLOCK_KEY_BYTES])
    for _ in range(2):
        owed.add(ids, 0)
        assert owed.blocks == SPAN
    assert len(owed.lacking(0, 8)) == 0
    taken = taken_from(tiers, owed)
    owed.add(ids, 0)
    assert owed.blocks == 0
    owed.add(taken.host_ids, 0, attempts=1, epoch=taken.epoch)  # writing it has failed
    owed.ended(taken)
    again = taken_from(tiers, owed)
    assert (again.attempts, again.epoch, again.keys) == (1, taken.epoch, taken.keys)


def test_what_others_have_stored_meanwhile_is_not_written() -> None:
    """A span that the tier is said to have when its turn comes is dropped, and is not given up."""
    tiers, known = residency(host=8), set[BlockKey]()
    owed = OwedSpans(tiers, Tier.REMOTE, SPAN, lambda tier, key: key in known)
    owed.add(filled(tiers, Tier.HOST, 0, 1), 0)
    known.add(keys(0, 1)[-BLOCK_KEY_BYTES:])
    assert owed.take() is None
    assert (owed.blocks, owed.given_up.total(), owed.epochs.left_of(0)) == (0, 0, 0)
    assert tiers.counts(Tier.HOST).pinned == 0


def test_writes_of_an_older_generation_do_not_count() -> None:
    """After a clear, a span is owed although it is on its way, and then once until it is written.

    The end of the earlier write says nothing about the later one.
    """
    tiers = residency(host=8)
    ids = filled(tiers, Tier.HOST, 0, 1)
    owed = owed_by(tiers)
    owed.add(ids, 0)
    earlier = taken_from(tiers, owed)
    owed.forget_writes()
    assert sorted(owed.lacking(0, 8).tolist()) == sorted(ids.tolist())
    owed.add(ids, 0)
    later = taken_from(tiers, owed)
    owed.ended(earlier)
    owed.add(ids, 0)
    assert (owed.blocks, len(owed.lacking(0, 8))) == (0, 0)
    owed.ended(later)
    owed.add(ids, 0)
    assert owed.blocks == SPAN


def test_evicted_spans_are_given_up() -> None:
    """A span without all its blocks is not written, whatever is at their places now."""
    tiers = residency(host=4)
    owed = owed_by(tiers)
    owed.add(filled(tiers, Tier.HOST, *range(4)), 0)
    tiers.evict(Tier.HOST, 4)
    filled(tiers, Tier.HOST, 90, 91, 92, 93)
    assert owed.take() is None
    assert (owed.blocks, owed.given_up[EVICTED]) == (SPAN, SPAN)
    owed.drop_gone(EVICTED)
    assert (owed.blocks, owed.given_up[EVICTED]) == (0, 2 * SPAN)
    assert owed.epochs.left_of(0) == 0


def test_epochs_end_with_their_last_span() -> None:
    """What was owed before an epoch began counts until it is written, given up or cleared."""
    tiers = residency(host=8)
    owed = owed_by(tiers)
    owed.add(filled(tiers, Tier.HOST, 0, 1, 2, 3), 0)
    before = owed.epochs.next()
    owed.add(filled(tiers, Tier.HOST, 10, 11), 0)
    assert (owed.epochs.left_of(before), owed.epochs.left_of(owed.epochs.epoch)) == (4, 6)
    owed.ended(taken_from(tiers, owed))
    assert owed.epochs.left_of(before) == SPAN
    owed.give_up_next("failed")
    assert owed.epochs.left_of(before) == 0
    owed.clear()
    assert (owed.blocks, owed.epochs.left_of(owed.epochs.epoch)) == (0, 0)


def test_what_lacks_is_found_by_place() -> None:
    """Blocks of host memory whose spans are neither far nor owed are lacking."""
    tiers = residency(host=8)
    ids = filled(tiers, Tier.HOST, *range(4))
    owed = owed_by(tiers)
    assert sorted(owed.lacking(0, 8).tolist()) == sorted(ids.tolist())
    owed.add(ids[:2], 0)
    assert sorted(owed.lacking(0, 8).tolist()) == sorted(ids[2:].tolist())


def test_spans_are_unwritten_until_the_tier_is_said_to_have_them() -> None:
    """Spans that the tier is owed, and spans on their way, count as well, each block once."""
    tiers = residency(host=8)
    ids, prompt = filled(tiers, Tier.HOST, *range(5)), keys(*range(5))
    owed = owed_by(tiers, prompt[2 * BLOCK_KEY_BYTES : 3 * BLOCK_KEY_BYTES])
    assert owed.count_unwritten(0, 8) == SPAN
    owed.add(ids, 0)
    taken_from(tiers, owed)
    assert owed.count_unwritten(0, 8) == SPAN
    assert sum(owed.count_unwritten(place, place + 1) for place in range(8)) == SPAN


STATE = 1


def with_leaves() -> tuple[Residency, bytes]:
    """Return host memory with three blocks of a chain and the states behind two of them."""
    tiers = Residency({Tier.HOST: 8}, rules=(GroupRule(STATE, Kind.STATE, 0, 1, 1),))
    prompt = keys(0, 1, 2)
    filled(tiers, Tier.HOST, 0, 1, 2)
    places = np.array([1, 2])
    positions = Positions(1, 2, places)
    tiers.commit(Tier.HOST, tiers.reserve(Tier.HOST, prompt, positions, group=STATE))
    return tiers, leaf_keys(prompt, STATE)


def test_each_leaf_is_owed_as_a_span_of_its_own() -> None:
    """A leaf is taken alone, with its group, its own key and its parent's."""
    tiers, leaves = with_leaves()
    owed = owed_by(tiers)
    owed.add(np.arange(8), 0)
    assert owed.blocks == SPAN + 2
    assert owed.epochs.left_of(owed.epochs.epoch) == SPAN + 2
    taken = [owed.take() for _ in range(3)]
    assert [each.group for each in taken if each] == [0, STATE, STATE]
    parents = keys(0, 1, 2)
    for at, each in zip((1, 2), taken[1:], strict=True):
        assert each is not None
        assert each.hold is not None
        one = slice((at + 1) * BLOCK_KEY_BYTES, (at + 2) * BLOCK_KEY_BYTES)
        assert (each.keys, len(each.host_ids)) == (parents[one] + leaves[one], 1)
        tiers.claims.settle(each.hold, filled=False)
        owed.ended(each)
    assert owed.blocks == 0
    assert owed.epochs.left_of(owed.epochs.epoch) == SPAN


def test_leaves_that_the_tier_lacks_are_counted() -> None:
    """Leaves count as unwritten, and as lacking, until the tier is known to have them."""
    tiers, leaves = with_leaves()
    far = {leaves[2 * BLOCK_KEY_BYTES : 3 * BLOCK_KEY_BYTES]}
    owed = OwedSpans(tiers, Tier.REMOTE, SPAN, lambda tier, key: key in far)
    assert owed.count_unwritten(0, 8) == len(owed.lacking(0, 8)) == SPAN + 1
    owed.add(np.arange(8), 0)
    assert (owed.count_unwritten(0, 8), len(owed.lacking(0, 8))) == (SPAN + 1, 0)


def test_leaves_that_are_evicted_are_given_up() -> None:
    """A leaf that host memory has dropped is counted as given up, and not written."""
    tiers, _ = with_leaves()
    owed = owed_by(tiers)
    owed.add(np.arange(8), 0)
    (found,) = tiers.survey(keys(0, 1, 2), 2, 3, False, STATE)
    assert found.block_ids[0] is not None
    tiers.forget(Tier.HOST, found.block_ids[0])
    owed.drop_gone(EVICTED)
    assert (owed.blocks, owed.given_up[EVICTED]) == (SPAN + 1, 1)


@pytest.mark.parametrize("first", range(9))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 40, 100, 1000])
@pytest.mark.parametrize("span_blocks", [1, 2, 8])
def test_no_chunk_divides_a_span(first: int, count: int, span_blocks: int) -> None:
    """Chunks of a far leg begin where spans begin, the first one where the leg does."""
    hops = (Route(Tier.REMOTE, Tier.HOST), *ONWARD)
    leg, bounds = chunked_by_span(hops, Positions(first, count), 4, span_blocks)
    assert len(bounds) == leg.chunks + 1
    assert (bounds[0], bounds[-1]) == (0, count)
    assert (np.diff(bounds) > 0).all()
    assert all((first + bound) % span_blocks == 0 for bound in bounds[1:-1])
    assert count <= 8 or leg.chunks > 1
