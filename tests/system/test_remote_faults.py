"""The remote tier over a store whose answers are spoiled: never wrong bytes, always an end.

A failure names its seed: `REMOTE_FAULT_FIRST=seed pytest … -x` replays it, with the same number of
faults in all. `-s` shows how many there were of each kind.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from random import Random

import numpy as np
import pytest

from flexkv.common.errors import (
    CorruptBlockError,
    MissingBlockError,
    RemoteError,
)
from flexkv.common.terms import Tier, Transfer
from flexkv.io.ports import Completion
from flexkv.io.remote.open import join_pool, open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.testing.faulty_http import FAULTS, FaultyProxy
from tests.remote_rigs import (
    HOST_BLOCKS,
    POOL,
    SPAN_BLOCKS,
    PortRig,
)
from tests.s3 import S3Server

G, SPANS = SPAN_BLOCKS, 5
PLACES = HOST_BLOCKS - G
"""The places to which gets bring blocks; puts take theirs from the others."""
WANTED = int(os.environ.get("REMOTE_FAULTS", "480"))
"""How many requests suffer a fault in all lives of a port."""
LIVES = max(12, WANTED // 250)
FIRST = int(os.environ.get("REMOTE_FAULT_FIRST", "0"))
OPTIONS = RemoteOptions(deadline_s=0.6)
"""For faults that only a deadline ends."""
PATIENT = RemoteOptions(deadline_s=20.0)
Ways = tuple[PortRig, PortRig, FaultyProxy]
SURVIVED = ("busy", "fail", "reset", "cut", "delay")
HURRIED = sorted(set(FAULTS) - {"hang"})


@asynccontextmanager
async def two_ways(s3: S3Server, seed: int, *faults: str) -> AsyncIterator[Ways]:
    """Yield a port to a new bucket, one to the same bucket through a proxy, and the proxy."""
    options = OPTIONS if "hang" in faults else PATIENT
    url = f"s3://{s3.new_bucket()}/kv"
    clean = PortRig(open_store(url, s3.custom, PATIENT), PATIENT)
    await join_pool(clean.requests.store, POOL)
    async with FaultyProxy(s3.port, seed, faults, 0.0, s3.signed) as proxy:
        store = open_store(url, s3.custom_at(proxy.port), options)
        spoiled = PortRig(store, options, seed)
        try:
            yield clean, spoiled, proxy
        finally:
            await spoiled.close()
            await clean.close()


def check(rig: PortRig, get: Transfer, end: Completion) -> None:
    """Check that what a get says it has filled is right, byte for byte, with right sums."""
    assert get.names is not None
    error, first, at = end.error, get.names.positions.first, int(get.target_ids[0])
    arrived = end.filled if error else get.block_count
    assert all(rig.right(first, first + arrived, at))
    assert rig.sums_are_right(arrived, at)
    if error is not None:
        assert isinstance(error, CorruptBlockError | MissingBlockError | RemoteError)
        assert error.blames_tier == isinstance(error, RemoteError)


@pytest.fixture(scope="module")
def met() -> Iterator[Counter[str]]:
    """Yield the faults by kind, and print them in the end."""
    counts: Counter[str] = Counter()
    yield counts
    print(f"\n{counts.total()} faults: {dict(counts.most_common())}")  # noqa: T201 -- for a soak


@pytest.mark.parametrize("seed", range(FIRST, FIRST + LIVES))
async def test_no_fault_gives_wrong_bytes(s3: S3Server, seed: int, met: Counter[str]) -> None:
    """Under random faults every transfer ends; what it has filled is right, with right sums.

    Nothing arrives after its end. Afterwards each object of the store is right or gone, and what is
    gone can be stored again.
    """
    random = Random(seed)
    async with two_ways(s3, seed, *FAULTS) as (clean, spoiled, proxy):
        while proxy.met.total() < WANTED // LIVES:
            proxy.share = random.choice([0.2, 0.5, 0.9])
            await clean.store_spans(*range(SPANS))
            for _ in range(4):
                await suffer(spoiled, random)
        met += proxy.met
        proxy.share = 0.0
        whole = clean.get(0, SPANS * G)
        (end,) = await clean.run(whole)
        check(clean, whole, end)
        assert end.error is None or isinstance(end.error, MissingBlockError)
        await clean.store_spans(*range(SPANS))
        for span in range(SPANS):
            await recover(spoiled, span)


async def recover(rig: PortRig, span: int) -> None:
    """Get a span; the machine may be too slow for the short deadline a few times."""
    for _ in range(100):
        get = rig.get(span * G, (span + 1) * G)
        (end,) = await rig.run(get)
        check(rig, get, end)
        if end.error is None:
            return
    raise AssertionError("it did not recover by itself")


async def suffer(rig: PortRig, random: Random) -> None:
    """Make some transfers at once, and check all that they bring and all that they must not."""
    rig.arena.array[:] = random.randrange(256)
    transfers, at = [], 0
    while at < PLACES:
        first = random.randrange(SPANS * G)
        last = random.randint(first + 1, min(SPANS * G, first + PLACES - at))
        transfers.append(rig.get(first, last, at))
        at += last - first
    if random.random() < 0.25:
        span = random.randrange(SPANS)
        await rig.fill(*((span * G + each, PLACES + each) for each in range(G)))
        transfers.append(rig.put(span, PLACES))
    ends = await rig.run(*transfers)
    for transfer, end in zip(transfers, ends, strict=True):
        if transfer.route.target is Tier.HOST:
            check(rig, transfer, end)
        else:
            assert end.error is None or isinstance(end.error, RemoteError)
    after = rig.arena.array.copy()
    await asyncio.sleep(random.uniform(0, 0.02))
    assert np.array_equal(rig.arena.array, after), "something arrived after its end"


async def put(rig: PortRig, span: int) -> None:
    """Store a span, which may fail, from right bytes in host memory."""
    at = HOST_BLOCKS - G
    await rig.fill(*((span * G + each, at + each) for each in range(G)))
    (end,) = await rig.run(rig.put(span, at))
    assert end.error is None or isinstance(end.error, RemoteError)


@pytest.mark.parametrize(
    ("fault", "errors"),
    [
        ("busy", {RemoteError}),
        ("fail", {RemoteError}),
        ("deny", {RemoteError}),
        ("reset", {RemoteError}),
        ("cut", {RemoteError}),
        ("whole", {RemoteError}),
        ("lengthen", {RemoteError}),
        ("hang", {RemoteError}),
        ("miss", {MissingBlockError}),
        ("other", {CorruptBlockError, MissingBlockError}),  # one of two may be deleted first
        ("flip", {CorruptBlockError}),
        ("shorten", {CorruptBlockError, RemoteError}),
    ],
)
async def test_a_fault_of_every_answer(s3: S3Server, fault: str, errors: set[type]) -> None:
    """If all answers suffer one fault, the get fails with its kind of error, and fills no gap.

    A fault of answers, other than another object, deletes nothing: the span is there afterwards.
    """
    async with two_ways(s3, 1, fault) as (clean, spoiled, proxy):
        await clean.store_spans(0, 1)
        await spoiled.run(spoiled.get(0, G), spoiled.get(G, 2 * G, at=G))
        proxy.share = 1.0
        both = spoiled.get(0, 2 * G)
        (end,) = await spoiled.run(both)
        check(spoiled, both, end)
        assert type(end.error) in errors
        assert proxy.met[fault] > 0
        (end,) = await clean.run(clean.get(0, 2 * G))
        assert (end.error is None) == (fault != "other"), end.error
        counts = spoiled.requests.counts()
        assert (counts.deleted > 0) == (fault == "other")
        assert (counts.busy > 0) == (fault == "busy")


async def test_a_put_whose_answer_is_lost_is_done(s3: S3Server) -> None:
    """The put is repeated, finds its own object, and succeeds."""
    async with two_ways(s3, 1, "lose") as (clean, spoiled, proxy):
        proxy.share = 1.0
        await put(spoiled, 0)
        proxy.share = 0.0
        (end,) = await clean.run(clean.get(0, G))
        assert end.error is None
        assert all(clean.right(0, G))


async def test_some_faults_are_survived(s3: S3Server) -> None:
    """If a third of the answers fail, repeating them brings nearly every span."""
    ends: Counter[bool] = Counter()
    async with two_ways(s3, 5, *SURVIVED) as (clean, spoiled, proxy):
        await clean.store_spans(*range(SPANS))
        proxy.share = 0.33
        for _ in range(4):
            gets = (spoiled.get(at * G, (at + 1) * G, at * G) for at in range(SPANS))
            for end in await spoiled.run(*gets):
                ends[end.error is None] += 1
    assert ends[True] >= 16, ends
    assert spoiled.requests.counts().retries["get"] > 0


async def test_no_credentials_are_in_what_is_told(s3: S3Server) -> None:
    """Errors of every fault have neither the access key nor the secret."""
    async with two_ways(s3, 1, *HURRIED) as (clean, spoiled, proxy):
        await clean.store_spans(0)
        proxy.share = 1.0
        for fault in HURRIED:
            proxy.faults = [fault]
            for end in await spoiled.run(spoiled.get(0, G), spoiled.put(1)):
                told = repr(end) + str(end.error) + repr(end.error.__cause__ if end.error else "")
                assert "access-key" not in told
                assert "secret" not in told


async def test_a_bucket_that_is_gone_blames_the_tier(s3: S3Server) -> None:
    """A get and a put of a bucket that does not exist are failures of the tier, and no misses."""
    rig = PortRig(open_store("s3://no-such-bucket/kv", s3.custom, PATIENT), PATIENT)
    ends = await rig.run(rig.get(0, G), rig.put(1, at=10))
    assert all(isinstance(end.error, RemoteError) for end in ends), ends
    assert rig.requests.counts().retries == {}
    assert rig.news == []
    await rig.close()
