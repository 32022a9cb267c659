"""The contract of a far tier: its catalogue, and its port, which is addressed by content.

Each far tier adds a rig to `FAR`: what it holds is set up through the rig, and fetched by keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.common.errors import CorruptBlockError, MissingBlockError, TransferError
from flexkv.common.terms import (
    BLOCK_KEY_BYTES,
    BlockIds,
    BlockKey,
    BlockNames,
    Positions,
    Route,
    Tier,
    Transfer,
)
from flexkv.index.catalogue import NOT_FAR, NOTHING_IS_FAR, Catalogue
from flexkv.index.hints import STORE, HintedCatalogue, Hints
from flexkv.index.keys import block_keys, leaf_keys
from flexkv.io.ports import Completion, TransferPort
from flexkv.testing.fake_far import FakeFar, FarPort
from flexkv.testing.faults import FaultPlan

BLOCKS = 12
NOBODY: frozenset[Tier] = frozenset()


@dataclass
class FarRig:
    """A far tier that holds nothing yet.

    Attributes:
        host: uint8[blocks, bytes], the host memory into which its port fetches.
        hold: makes it hold a block, whose bytes are its key, and announces that.
        drop: makes it drop a block without a word.
        damage: changes the bytes of a block that it holds.
    """

    tier: Tier
    catalogue: Catalogue
    port: TransferPort
    host: NDArray[np.uint8]
    hold: Callable[[BlockKey], None]
    drop: Callable[[BlockKey], None]
    damage: Callable[[BlockKey], None]


def fake_rig() -> FarRig:
    """Return the far tier of the simulation, in which a block's content is its key."""
    far, host = FakeFar(), np.zeros((BLOCKS, BLOCK_KEY_BYTES), np.uint8)
    port = FarPort(far, host, FaultPlan(1, delay_max_s=0.002))
    return FarRig(
        far.tier, far, port, host, lambda key: far.hold([key]), far.held.remove, far.damage
    )


def hinted_rig() -> FarRig:
    """Return the same tier under the catalogue of hints, with a span for each block."""
    rig, hints = fake_rig(), Hints(1024, 1)

    def hold(key: BlockKey) -> None:
        held(key)
        hints.note(STORE, key)

    held = rig.hold
    return replace(rig, catalogue=HintedCatalogue(hints), hold=hold)


FAR: dict[str, Callable[[], FarRig]] = {"fake": fake_rig, "hinted": hinted_rig}

PROMPT = np.random.default_rng(3).integers(0, 256, (1 + BLOCKS, BLOCK_KEY_BYTES), np.uint8)
KEYS = [key.tobytes() for key in PROMPT[1:]]


@pytest.fixture(params=FAR.values(), ids=FAR.keys())
def rig(request: pytest.FixtureRequest) -> Iterator[FarRig]:
    """Yield each far tier; close its port afterwards."""
    made: FarRig = request.param()
    yield made
    made.port.close()


def look(catalogue: Catalogue, first: int, last: int = BLOCKS) -> int:
    """Return how many blocks from `first` on the catalogue promises, after checking the answer."""
    if catalogue.is_empty:
        return 0
    runs = catalogue.far(PROMPT.tobytes(), first, last, NOBODY)
    tiers = [tier for tier, _ in runs]
    assert len(set(tiers)) == len(tiers), "a tier has two runs"
    assert all(len(ids) and ids.dtype == np.int64 for _, ids in runs)
    assert catalogue.far(PROMPT.tobytes(), first, last, frozenset(tiers)) == ()
    promised = sum(len(ids) for _, ids in runs)
    assert promised <= last - first
    return promised


def fetch_of(rig: FarRig, first: int, last: int, op_ids: Iterator[int]) -> Transfer:
    """Return the transfer of blocks `first` to `last` to the same places of host memory."""
    names = BlockNames(PROMPT.tobytes(), Positions(0, BLOCKS))
    places = np.arange(BLOCKS)
    (run,) = rig.catalogue.far(PROMPT.tobytes(), 0, BLOCKS, NOBODY)
    ids = np.resize(run.block_ids, BLOCKS)
    route = Route(rig.tier, Tier.HOST)
    return Transfer(next(op_ids), 0, route, ids, places, names=names).part(first, last)


async def ends_of(rig: FarRig, *transfers: Transfer) -> dict[int, Completion]:
    """Submit transfers, and return their ends by op id."""
    woken, ends = asyncio.Event(), []
    rig.port.connect(woken.set)
    for transfer in transfers:
        rig.port.submit(transfer)
    async with asyncio.timeout(20):
        while len(ends) < len(transfers):
            await woken.wait()
            woken.clear()
            ends += rig.port.reap()
    return {end.op_id: end for end in ends}


def test_nothing_is_far() -> None:
    """The catalogue of an engine without far tiers is empty, and promises nothing."""
    assert NOTHING_IS_FAR.is_empty
    assert NOTHING_IS_FAR.far(PROMPT.tobytes(), 0, BLOCKS, NOBODY) == ()


def test_a_catalogue_promises_unbroken_runs(rig: FarRig) -> None:
    """A run begins where it was asked for, ends at the first unknown block or at the limit."""
    assert look(rig.catalogue, 0) == 0
    for key in (*KEYS[:5], *KEYS[6:]):
        rig.hold(key)
    assert [look(rig.catalogue, first) for first in range(7)] == [5, 4, 3, 2, 1, 0, 6]
    assert look(rig.catalogue, 1, 3) == 2
    assert look(rig.catalogue, 6, 6) == 0


async def test_blocks_come_by_their_keys(rig: FarRig) -> None:
    """Each part of a transfer brings the blocks that its keys name, and touches no other place."""
    for key in KEYS:
        rig.hold(key)
    op_ids = count()
    fetches = [fetch_of(rig, *part, op_ids) for part in ((0, 3), (5, 6), (9, 12))]
    ends = await ends_of(rig, *fetches)
    assert [ends[n].error for n in range(3)] == [None] * 3
    there = [0, 1, 2, 5, 9, 10, 11]
    expected = np.zeros_like(rig.host)
    expected[there] = PROMPT[1:][there]
    assert np.array_equal(rig.host, expected)


@pytest.mark.parametrize("lost", [0, 4, BLOCKS - 1])
async def test_a_missing_block_ends_a_transfer_in_part(rig: FarRig, lost: int) -> None:
    """The blocks before it count as filled; its promise is not repeated once it is doubted."""
    for key in KEYS:
        rig.hold(key)
    rig.drop(KEYS[lost])
    fetch = fetch_of(rig, 0, BLOCKS, count())
    end = (await ends_of(rig, fetch))[0]
    assert isinstance(end.error, MissingBlockError)
    assert not end.error.blames_tier
    assert end.filled == lost
    assert np.array_equal(rig.host[:lost], PROMPT[1 : 1 + lost])
    rig.catalogue.doubt(fetch.part(end.filled, BLOCKS), end.error)
    assert look(rig.catalogue, 0) == lost
    rig.hold(KEYS[lost])
    assert look(rig.catalogue, 0) == BLOCKS


async def test_wrong_bytes_never_count_as_filled(rig: FarRig) -> None:
    """A damaged block is found before its transfer ends, and blames no tier."""
    for key in KEYS:
        rig.hold(key)
    rig.damage(KEYS[7])
    end = (await ends_of(rig, fetch_of(rig, 2, BLOCKS, count())))[0]
    assert isinstance(end.error, CorruptBlockError)
    assert not end.error.blames_tier
    assert end.filled == 5
    assert np.array_equal(rig.host[2:7], PROMPT[3:8])


async def test_what_could_not_be_fetched_is_not_promised_at_once(rig: FarRig) -> None:
    """After an error that blames the tier none of the blocks is promised until it is announced."""
    for key in KEYS:
        rig.hold(key)
    fetch = fetch_of(rig, 4, BLOCKS, count())
    rig.catalogue.doubt(fetch, TransferError(0, "remote→host", BLOCKS, "planted"))
    assert [look(rig.catalogue, first) for first in (0, 4, 8)] == [4, 0, 0]


# -- leaves -----------------------------------------------------------------------------------

GROUP, AT = 2, np.array([1, 4, 5, 9])
LEAVES = leaf_keys(PROMPT.tobytes(), GROUP)
LEAF_KEYS = [block_keys(LEAVES)[at] for at in AT.tolist()]


def leaves_of(rig: FarRig) -> list[bool]:
    """Return which of the leaves the catalogue promises."""
    for tier, ids in rig.catalogue.leaves(b"".join(LEAF_KEYS), frozenset({rig.tier})):
        assert tier is not rig.tier or (ids == NOT_FAR).all()
    is_far: list[bool] = (leaf_ids(rig) != NOT_FAR).tolist()
    return is_far


def leaf_ids(rig: FarRig) -> BlockIds:
    """Return what the catalogue calls each leaf of the rig's tier: int64[4]."""
    found = dict(rig.catalogue.leaves(b"".join(LEAF_KEYS), NOBODY))
    return found[rig.tier]


@pytest.mark.parametrize("lost", [None, 0, 2])
async def test_leaves_come_by_their_keys(rig: FarRig, lost: int | None) -> None:
    """Each leaf is held by itself; one that is missing ends a transfer, and is promised no more."""
    for key in (*KEYS, *LEAF_KEYS[1:]):
        rig.hold(key)
    assert leaves_of(rig) == [False, True, True, True]
    rig.hold(LEAF_KEYS[0])
    if lost is not None:
        rig.drop(LEAF_KEYS[lost])
    names = BlockNames(LEAVES, Positions(1, len(AT), AT))
    ids = leaf_ids(rig)
    places, route = np.arange(len(AT)), Route(rig.tier, Tier.HOST)
    fetch = Transfer(0, 0, route, ids, places, names=names, group=GROUP)
    end = (await ends_of(rig, fetch))[0]
    filled = len(AT) if lost is None else lost
    there = [row.tobytes() for row in rig.host[:filled]]
    assert there == LEAF_KEYS[:filled]
    if lost is not None:
        assert isinstance(end.error, MissingBlockError)
        assert end.filled == filled
        rig.catalogue.doubt(fetch.part(filled, len(AT)), end.error)
        assert leaves_of(rig) == [number != lost for number in range(len(AT))]
    assert look(rig.catalogue, 0) == BLOCKS
