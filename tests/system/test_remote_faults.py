"""The remote tier over a store whose answers are spoiled: never wrong bytes, always an end.

A failure names its seed: `REMOTE_FAULT_FIRST=seed REMOTE_FAULT_SEEDS=1 pytest …` replays it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from random import Random

import pytest

from flexkv.common.errors import (
    CorruptBlockError,
    MissingBlockError,
    RemoteError,
)
from flexkv.io.remote.open import join_pool, open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.testing.faulty_http import FAULTS, FaultyProxy
from tests.moto import Moto, running
from tests.remote_rigs import (
    HOST_BLOCKS,
    POOL,
    SPAN_BLOCKS,
    PortRig,
)

G, SPANS = SPAN_BLOCKS, 5
SEEDS = int(os.environ.get("REMOTE_FAULT_SEEDS", "12"))
FIRST = int(os.environ.get("REMOTE_FAULT_FIRST", "0"))
OPTIONS = RemoteOptions(deadline_s=2.0)
"""For faults that only a deadline ends."""
PATIENT = RemoteOptions(deadline_s=20.0)
Ways = tuple[PortRig, PortRig, FaultyProxy]
SURVIVED = ("busy", "fail", "reset", "cut", "delay")
HURRIED = sorted(set(FAULTS) - {"hang"})


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    """Yield a real S3 server."""
    with running() as server:
        yield server


@asynccontextmanager
async def two_ways(moto: Moto, seed: int, *faults: str) -> AsyncIterator[Ways]:
    """Yield a port to a new bucket, one to the same bucket through a proxy, and the proxy."""
    options = OPTIONS if "hang" in faults else PATIENT
    url = f"s3://{moto.new_bucket()}/kv"
    clean = PortRig(open_store(url, moto.custom, PATIENT), PATIENT)
    await join_pool(clean.requests.store, POOL)
    async with FaultyProxy(moto.port, seed, faults, 0.0) as proxy:
        store = open_store(url, moto.custom_at(proxy.port), options)
        spoiled = PortRig(store, options, seed)
        try:
            yield clean, spoiled, proxy
        finally:
            await spoiled.close(puts_failed=True)
            await clean.close()


def check(rig: PortRig, first: int, last: int, filled: int, error: Exception | None) -> None:
    """Check that what a get says it has filled is right, byte for byte, with right sums."""
    arrived = filled if error else last - first
    assert all(rig.right(first, first + arrived))
    assert rig.sums_are_right(arrived)
    if error is not None:
        assert isinstance(error, CorruptBlockError | MissingBlockError | RemoteError)
        assert error.blames_tier == isinstance(error, RemoteError)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
async def test_no_fault_gives_wrong_bytes(moto: Moto, seed: int) -> None:
    """Under random faults every transfer ends; what it has filled is right, and so is the rest.

    Afterwards each object of the store is right or gone, and what is gone can be stored again.
    """
    random = Random(seed)
    async with two_ways(moto, seed, *FAULTS) as (clean, spoiled, proxy):
        await clean.store_spans(*range(SPANS))
        proxy.share = random.choice([0.2, 0.5, 0.9])
        for _ in range(5):
            if random.random() < 0.25:
                await put(spoiled, random.randrange(SPANS))
                continue
            first = random.randrange(SPANS * G)
            last = random.randint(first + 1, SPANS * G)
            spoiled.arena.array[:] = random.randrange(256)
            (end,) = await spoiled.run(spoiled.get(first, last))
            check(spoiled, first, last, end.filled, end.error)
        proxy.share = 0.0
        (end,) = await clean.run(clean.get(0, SPANS * G))
        check(clean, 0, SPANS * G, end.filled, end.error)
        assert end.error is None or isinstance(end.error, MissingBlockError)
        await clean.store_spans(*range(SPANS))
        for _ in range(100):  # the machine may be too slow for the short deadline
            (end,) = await spoiled.run(spoiled.get(0, SPANS * G))
            check(spoiled, 0, SPANS * G, end.filled, end.error)
            if end.error is None:
                return
        raise AssertionError("it did not recover by itself")


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
        ("hang", {RemoteError}),
        ("miss", {MissingBlockError}),
        ("other", {CorruptBlockError}),
        ("flip", {CorruptBlockError}),
        ("shorten", {CorruptBlockError, RemoteError}),
    ],
)
async def test_a_fault_of_every_answer(moto: Moto, fault: str, errors: set[type]) -> None:
    """If all answers suffer one fault, the get fails with its kind of error, and fills no gap.

    A fault of answers, other than another object, deletes nothing: the span is there afterwards.
    """
    async with two_ways(moto, 1, fault) as (clean, spoiled, proxy):
        await clean.store_spans(0, 1)
        await spoiled.run(spoiled.get(0, G), spoiled.get(G, 2 * G, at=G))
        proxy.share = 1.0
        (end,) = await spoiled.run(spoiled.get(0, 2 * G))
        check(spoiled, 0, 2 * G, end.filled, end.error)
        assert type(end.error) in errors
        assert proxy.met[fault] > 0
        (end,) = await clean.run(clean.get(0, 2 * G))
        assert (end.error is None) == (fault != "other"), end.error
        counts = spoiled.requests.counts()
        assert (counts.deleted > 0) == (fault == "other")
        assert (counts.busy > 0) == (fault == "busy")


async def test_a_put_whose_answer_is_lost_is_done(moto: Moto) -> None:
    """It is repeated, finds its own object, and succeeds."""
    async with two_ways(moto, 1, "lose") as (clean, spoiled, proxy):
        proxy.share = 1.0
        await put(spoiled, 0)
        proxy.share = 0.0
        (end,) = await clean.run(clean.get(0, G))
        assert end.error is None
        assert all(clean.right(0, G))


async def test_some_faults_are_survived(moto: Moto) -> None:
    """If a third of the answers fail, repeating them brings nearly every span."""
    ends: Counter[bool] = Counter()
    async with two_ways(moto, 5, *SURVIVED) as (clean, spoiled, proxy):
        await clean.store_spans(*range(SPANS))
        proxy.share = 0.33
        for _ in range(4):
            gets = (spoiled.get(at * G, (at + 1) * G, at * G) for at in range(SPANS))
            for end in await spoiled.run(*gets):
                ends[end.error is None] += 1
    assert ends[True] >= 16, ends
    assert spoiled.requests.counts().retries["get"] > 0


async def test_no_credentials_are_in_what_is_told(moto: Moto) -> None:
    """Errors of every fault have neither the access key nor the secret."""
    async with two_ways(moto, 1, *HURRIED) as (clean, spoiled, proxy):
        await clean.store_spans(0)
        proxy.share = 1.0
        for fault in HURRIED:
            proxy.faults = [fault]
            for end in await spoiled.run(spoiled.get(0, G), spoiled.put(1)):
                told = repr(end) + str(end.error) + repr(end.error.__cause__ if end.error else "")
                assert "access-key" not in told
                assert "secret" not in told


async def test_a_bucket_that_is_gone_blames_the_tier(moto: Moto) -> None:
    """A get and a put of a bucket that does not exist are failures of the tier, and no misses."""
    rig = PortRig(open_store("s3://no-such-bucket/kv", moto.custom, PATIENT), PATIENT)
    ends = await rig.run(rig.get(0, G), rig.put(1, at=10))
    assert all(isinstance(end.error, RemoteError) for end in ends), ends
    assert rig.requests.counts().retries == {}
    assert rig.news == []
    await rig.close()
