"""The catalogue of hints: its runs by tier, and what it believes after a fetch has failed."""

from __future__ import annotations

import numpy as np
import pytest

from flexkv.common.errors import (
    CorruptBlockError,
    DeadlineError,
    MissingBlockError,
    PeerError,
    RecalledError,
    TransferError,
    UnfilledError,
)
from flexkv.common.terms import BlockIds, BlockNames, Positions, Route, Tier, Transfer
from flexkv.index.catalogue import NOT_FAR, FarRun
from flexkv.index.hints import (
    HOLDERS_MAX,
    PEER_TICKS,
    STORE,
    HintCounts,
    HintedCatalogue,
    Hints,
    holders_of,
    on_disk,
)
from flexkv.index.keys import block_keys, leaf_keys
from flexkv.index.spans import span_keys

BLOCKS, SPAN = 14, 4
KEYS = np.random.default_rng(8).bytes(16 * (1 + BLOCKS))
NOBODY: frozenset[Tier] = frozenset()
NODE, OTHER = 7, 4095


def span(first: int, last: int) -> bytes:
    """Return the keys of the spans that end with a block from `first` up to `last`."""
    return span_keys(KEYS, first, last, SPAN)


def hints_of(**spans: tuple[int, int]) -> Hints:
    """Return hints of what the store and a node have."""
    hints = Hints(1000, SPAN)
    for name, (first, last) in spans.items():
        hints.note({"store": STORE, "node": NODE, "other": OTHER}[name], span(first, last))
    return hints


def summary(runs: object) -> list[tuple[Tier, list[int]]]:
    """Return runs as plain values."""
    assert isinstance(runs, tuple)
    return [(run.tier, run.block_ids.tolist()) for run in runs]


def fetch(hints: Hints, first: int = 0, last: int = BLOCKS) -> Transfer:
    """Return the transfer of the first run from a position on."""
    run: FarRun = hints.far_runs(KEYS, first, last, NOBODY)[0]
    ids, names = run.block_ids, BlockNames(KEYS, Positions(first, len(run.block_ids)))
    return Transfer(0, 0, Route(run.tier, Tier.HOST), ids, np.arange(len(ids)), names=names)


def test_a_run_has_one_tier() -> None:
    """What the store has and what nodes have are two runs, in the order of the blocks."""
    hints = hints_of(store=(0, 12), node=(0, 4))
    catalogue = HintedCatalogue(hints)
    assert catalogue.span_blocks == SPAN
    assert summary(catalogue.far(KEYS, 2, BLOCKS, NOBODY)) == [
        (Tier.PEER, [NODE] * 2),
        (Tier.REMOTE, [STORE] * 8),
    ]
    assert summary(catalogue.far(KEYS, 2, BLOCKS, {Tier.PEER})) == [(Tier.REMOTE, [STORE] * 10)]
    assert summary(catalogue.far(KEYS, 2, BLOCKS, {Tier.REMOTE})) == [(Tier.PEER, [NODE] * 2)]
    assert summary(catalogue.far(KEYS, 2, BLOCKS, {Tier.REMOTE, Tier.PEER})) == []
    assert summary(catalogue.far(KEYS, 2, BLOCKS, {Tier.DISK}))[0][0] is Tier.PEER
    assert summary(catalogue.far(KEYS, 12, BLOCKS, NOBODY)) == []


def test_nodes_may_follow_the_store() -> None:
    """A prefix that only the store has is continued by what nodes have; several are one run."""
    hints = hints_of(store=(0, 4))
    hints.note(NODE, span(4, 8), on_disk=True)
    hints.note(OTHER, span(8, 12))
    store, nodes = hints.far_runs(KEYS, 3, 11, NOBODY)
    assert (store.tier, nodes.tier) == (Tier.REMOTE, Tier.PEER)
    assert holders_of(store.block_ids).tolist() == [STORE]
    assert not on_disk(store.block_ids).any()
    assert holders_of(nodes.block_ids).tolist() == [NODE] * 4 + [OTHER] * 3
    assert on_disk(nodes.block_ids).tolist() == [True] * 4 + [False] * 3


def test_a_catalogue_is_empty_while_all_pairs_are_dead() -> None:
    """An engine whose hints are all dead does not ask them."""
    hints = Hints(1000, SPAN)
    catalogue = HintedCatalogue(hints)
    assert catalogue.is_empty
    hints.note(NODE, span(0, 12))
    assert not catalogue.is_empty
    hints.retire(NODE)
    assert catalogue.is_empty
    assert hints.counts() == HintCounts(3, 3, 0, hints.counts().memory_bytes)
    assert (hints.pairs_of(NODE), hints.spans_of(NODE)) == (3, 0)
    assert hints.scrub(1 << 20) == 0
    hints.revive(NODE)
    assert hints.note(NODE, span(0, 12)) == 3
    hints.clear()
    assert catalogue.is_empty


@pytest.mark.parametrize(
    "error",
    [MissingBlockError(0, "remote→host", 1), CorruptBlockError("far", 0, [5])],
    ids=["missing", "corrupt"],
)
@pytest.mark.parametrize("arrived", [0, 3, 4, 11])
def test_a_bad_span_is_dropped(error: TransferError, arrived: int) -> None:
    """A miss or wrong bytes are blamed on the span of the first block that did not arrive."""
    hints = hints_of(store=(0, 12), node=(0, 12))
    hints.avoid(NODE, True)
    transfer = fetch(hints)
    HintedCatalogue(hints).doubt(transfer.part(arrived, 12), error)
    expected = [at // SPAN != arrived // SPAN for at in (0, 4, 8)]
    assert hints.known(STORE, span(0, 12)).tolist() == expected
    assert hints.known(NODE, span(0, 12)).all()


@pytest.mark.parametrize(
    "error",
    [TransferError(0, "remote→host", 1), DeadlineError(0, "remote→host", 1)],
    ids=["failed", "late"],
)
def test_a_failing_tier_is_doubted_for_a_time(error: TransferError) -> None:
    """After a fault of the tier the spans that did not arrive are far again when time has passed.

    Until then they count as known, so that nobody ships them again.
    """
    hints = hints_of(store=(0, 12), node=(0, 12))
    hints.avoid(NODE, True)
    catalogue = HintedCatalogue(hints, doubt_ticks=20)
    hints.tick(100)
    catalogue.doubt(fetch(hints).part(5, 12), error)
    for now, blocks in ((100, 4), (119, 4), (120, 12)):
        hints.tick(now)
        assert summary(catalogue.far(KEYS, 0, BLOCKS, NOBODY)) == [(Tier.REMOTE, [STORE] * blocks)]
    catalogue.doubt(fetch(hints), error)
    assert not catalogue.far(KEYS, 0, BLOCKS, NOBODY)
    assert hints.known(STORE, span(0, 12)).all()
    hints.note(STORE, span(0, 8))
    assert summary(catalogue.far(KEYS, 0, BLOCKS, NOBODY)) == [(Tier.REMOTE, [STORE] * 8)]
    hints.avoid(NODE, False)
    assert summary(catalogue.far(KEYS, 0, BLOCKS, NOBODY)) == [(Tier.PEER, [NODE] * 12)]


def test_each_holder_of_a_transfer_is_doubted_for_its_own_spans() -> None:
    """A transfer from several nodes says nothing of what each was not asked for."""
    hints = hints_of(node=(0, 4), other=(4, 12))
    HintedCatalogue(hints).doubt(fetch(hints), TransferError(0, "peer→host", 12))
    hints.note(NODE, span(4, 8))
    hints.note(OTHER, span(0, 4))
    assert summary(hints.far_runs(KEYS, 0, BLOCKS, NOBODY)) == [
        (Tier.PEER, [OTHER] * 4 + [NODE] * 4)
    ]


@pytest.mark.parametrize("kind", [RecalledError, UnfilledError])
def test_errors_that_say_nothing_of_the_bytes_change_nothing(kind: type[TransferError]) -> None:
    """A transfer that was recalled, or had to wait in vain, casts no doubt."""
    hints = hints_of(store=(0, 12))
    HintedCatalogue(hints).doubt(fetch(hints), kind(0, "remote→host", 12))
    assert len(hints.far_runs(KEYS, 0, BLOCKS, NOBODY)[0].block_ids) == 12


def test_a_span_whose_end_is_not_named_is_passed_over() -> None:
    """A transfer of blocks of a span may be named by keys that end within it."""
    hints = hints_of(store=(0, 12))
    names = BlockNames(KEYS[: 16 * 11], Positions(6, 4))
    transfer = Transfer(
        0, 0, Route(Tier.REMOTE, Tier.HOST), np.zeros(4, np.int64), np.arange(4), names=names
    )
    HintedCatalogue(hints).doubt(transfer, TransferError(0, "remote→host", 4))
    assert len(hints.far_runs(KEYS, 0, BLOCKS, NOBODY)[0].block_ids) == 4
    assert len(hints.far_runs(KEYS, 8, BLOCKS, NOBODY)[0].block_ids) == 4


def test_a_listing_drops_what_it_did_not_see() -> None:
    """Pairs live through a listing, and through its end if a page or a write of ours noted them."""
    hints = hints_of(store=(0, 12))
    hints.begin_round(STORE)
    assert hints.known(STORE, span(0, 12)).all()
    with pytest.raises(ValueError, match="end its round"):
        hints.begin_round(STORE)
    assert hints.note(STORE, span(0, 8)) == 0
    hints.end_round(STORE)
    assert hints.known(STORE, span(0, 12)).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="scrub"):
        hints.begin_round(STORE)
    assert hints.scrub(1 << 20) == 0
    hints.begin_round(STORE)
    assert hints.note(STORE, span(8, 12)[:8], size=8) == 1
    hints.end_round(STORE)
    assert hints.known(STORE, span(0, 12)).tolist() == [False, False, True]
    assert hints.drop(STORE, span(8, 12)[:8], size=8) == 1
    assert not len(hints)


# -- leaves -----------------------------------------------------------------------------------

GROUP = 3
LEAVES = leaf_keys(KEYS, GROUP)


def leaf(*positions: int) -> bytes:
    """Return the keys of some leaves."""
    return b"".join(block_keys(LEAVES)[at] for at in positions)


def leaves_at(hints: Hints, avoid: frozenset[Tier] = NOBODY, tier: Tier = Tier.REMOTE) -> list[int]:
    """Return the positions of the leaves that a tier is said to have."""
    found = dict(HintedCatalogue(hints).leaves(leaf(*range(BLOCKS)), avoid))
    if tier not in found:
        return []
    ids = found[tier]
    assert ids.dtype == np.int64
    holders = {STORE} if tier is Tier.REMOTE else {NODE, OTHER, NODE + HOLDERS_MAX}
    assert set(ids.tolist()) <= {NOT_FAR, *holders}
    return np.flatnonzero(ids != NOT_FAR).tolist()


def fetch_leaves(*positions: int) -> Transfer:
    """Return the transfer of some leaves from the store."""
    at = np.array(positions)
    names = BlockNames(LEAVES, Positions(positions[0], len(at), at))
    ids, route = np.full(len(at), STORE), Route(Tier.REMOTE, Tier.HOST)
    return Transfer(0, 0, route, ids, np.arange(len(at)), names=names, group=GROUP)


def test_each_leaf_is_a_span_of_its_own() -> None:
    """Leaves are known by their own keys, whatever is known of the chain."""
    hints = hints_of(store=(0, 12))
    assert leaves_at(hints) == []
    hints.note(STORE, leaf(2, 3, 9))
    assert leaves_at(hints) == [2, 3, 9]
    assert leaves_at(hints, frozenset({Tier.REMOTE})) == []
    hints.note(NODE, leaf(4))
    assert leaves_at(hints, frozenset({Tier.PEER})) == [2, 3, 9]
    hints.avoid(STORE, True)
    assert leaves_at(hints) == []


def test_leaves_of_nodes_are_asked_of_one_that_may_be_asked() -> None:
    """Each leaf that a node has is found there; one that is down, or doubted, is not asked."""
    hints = hints_of(store=(0, 12))
    assert leaves_at(hints, tier=Tier.PEER) == []
    hints.note(NODE, leaf(2, 3, 4))
    hints.note(OTHER, leaf(4, 7), on_disk=False)
    assert leaves_at(hints, tier=Tier.PEER) == [2, 3, 4, 7]
    assert leaves_at(hints, frozenset({Tier.PEER}), Tier.PEER) == []
    ids = hints.nodes(leaf(4, 2, 4, 7, 4, 0)).tolist()
    assert ids[1:4] == [NODE, NODE, OTHER], "a node is kept for as long as it has the leaves"
    assert ids[4:] == [OTHER, NOT_FAR]
    hints.avoid(OTHER, True)
    assert leaves_at(hints, tier=Tier.PEER) == [2, 3, 4]
    hints.doubt(NODE, leaf(3), 5)
    assert leaves_at(hints, tier=Tier.PEER) == [2, 4]
    hints.note(NODE, leaf(9), on_disk=True)
    assert hints.nodes(leaf(9)).tolist() == [NODE + HOLDERS_MAX]


def test_blocks_that_a_peer_did_not_send_are_doubted_of_that_peer_alone() -> None:
    """After an error of a peer others are asked, and that one again soon.

    How long the peer itself is left out, its breaker decides.
    """
    hints = hints_of(node=(0, 12), other=(0, 12))
    catalogue = HintedCatalogue(hints, 5)
    (run,) = catalogue.far(KEYS, 0, BLOCKS, NOBODY)
    first = int(run.block_ids[0])

    def fetch_of(ids: BlockIds) -> Transfer:
        names, route = BlockNames(KEYS, Positions(0, 12)), Route(Tier.PEER, Tier.HOST)
        return Transfer(0, 0, route, ids, np.arange(12), names=names)

    catalogue.doubt(
        fetch_of(run.block_ids), PeerError("10.0.0.2:1", "asking", "its link has ended")
    )
    (again,) = catalogue.far(KEYS, 0, BLOCKS, NOBODY)
    assert set(again.block_ids.tolist()) == {NODE, OTHER} - {first}
    other = fetch_of(again.block_ids)
    catalogue.doubt(other, PeerError("10.0.0.3:1", "asking", "its link has ended"))
    assert catalogue.far(KEYS, 0, BLOCKS, NOBODY) == ()
    hints.tick(PEER_TICKS)
    assert len(catalogue.far(KEYS, 0, BLOCKS, NOBODY)[0].block_ids) == 12


@pytest.mark.parametrize("arrived", range(3))
def test_a_bad_leaf_is_dropped(arrived: int) -> None:
    """The leaf that is missing is forgotten, and no other one; nor is a span of the chain."""
    hints = hints_of(store=(0, 12))
    hints.note(STORE, leaf(2, 3, 9))
    transfer, error = fetch_leaves(2, 3, 9), MissingBlockError(0, "remote→host", 1)
    HintedCatalogue(hints).doubt(transfer.part(arrived, 3), error)
    assert leaves_at(hints) == [at for n, at in enumerate((2, 3, 9)) if n != arrived]
    assert hints.known(STORE, span(0, 12)).all()


def test_leaves_of_a_failing_tier_are_doubted_for_a_time() -> None:
    """Leaves that a failing tier did not send are not promised again at once, but known still."""
    hints = hints_of(store=(0, 12))
    hints.note(STORE, leaf(2, 3, 9))
    transfer, error = fetch_leaves(2, 3, 9), DeadlineError(0, "remote→host", 3)
    HintedCatalogue(hints, doubt_ticks=5).doubt(transfer.part(1, 3), error)
    assert leaves_at(hints) == [2]
    assert hints.known(STORE, leaf(2, 3, 9)).all()
    hints.tick(5)
    assert leaves_at(hints) == [2, 3, 9]
