"""Tests of the status, mask and error of requests that fail in part."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest

from flexkv.common.errors import CapacityError, ConfigError, TransferError
from flexkv.common.request import KVResponse, KVResponseStatus, Operation
from flexkv.common.terms import Tier
from flexkv.engine.engine import Engine
from flexkv.index.residency import NO_QUOTA
from flexkv.io.ports import Completion
from flexkv.testing.simulated_groups import TOKENS_PER_BLOCK
from tests.system.test_degraded import disk_of
from tests.system.test_keeping import A, B, on_engine, perform, put, resident

CHUNK_MB = 2 * 4096 / 2**20
LONG = np.arange(8 * TOKENS_PER_BLOCK) + 5000


def moved(response: KVResponse) -> list[bool]:
    """Return for each block whether the response's mask has all of it."""
    return response.return_mask.reshape(-1, TOKENS_PER_BLOCK).all(axis=1).tolist()


def fail_some(port: Any, *numbers: int) -> None:
    """Make some of the next transfers of a port fail, by their numbers."""
    submit, reap, given, failing = port.submit, port.reap, count(), set()

    def submitted(transfer: Any) -> None:
        if next(given) in numbers:
            failing.add(transfer.op_id)
        submit(transfer)

    def reaped() -> list[Completion]:
        return [
            Completion(op_id, TransferError(op_id, "test", 1, "planted"))
            if op_id in failing
            else Completion(op_id, error)
            for op_id, error, *_ in reap()
        ]

    port.submit, port.reap = submitted, reaped


@pytest.mark.parametrize("numbers", [(0,), (1,), (2,), (3,), (1, 3), (2, 3)])
def test_a_put_claims_nothing_behind_a_block_that_was_not_stored(numbers: tuple[int, ...]) -> None:
    """A put's mask ends at the first failed chunk, since later blocks could never be found."""

    async def work(engine: Engine) -> None:
        port = engine.devices._by_rank[0].port
        fail_some(port, *numbers)
        number = numbers[0]
        response = await perform(engine, Operation.PUT, LONG)
        assert response.status is (KVResponseStatus.SUCCESS if number else KVResponseStatus.FAILED)
        assert isinstance(response.error, TransferError)
        assert moved(response) == [True] * 2 * number + [False] * (8 - 2 * number)
        assert resident(engine, LONG) == 2 * number

    on_engine(work, host=32, disk=64, chunk_mb=CHUNK_MB)


@pytest.mark.parametrize("operation", [Operation.GET, Operation.PREFETCH])
@pytest.mark.parametrize("number", range(4))
def test_a_load_claims_nothing_behind_a_block_that_did_not_come(
    number: int, operation: Operation
) -> None:
    """A load's mask ends at the first chunk that cannot be read; all from there on is dropped."""

    async def work(engine: Engine) -> None:
        await put(engine, LONG)
        engine.residency.clear(Tier.HOST)
        fail_some(disk_of(engine), number)
        chunk = 2 if operation is Operation.GET else 4  # one hop has larger chunks
        wanted = min(number * chunk, 8)
        response = await perform(engine, operation, LONG)
        assert moved(response) == [True] * wanted + [False] * (8 - wanted)
        assert resident(engine, LONG) == wanted
        assert (response.error is None) == (wanted == 8)

    scale = 1 if operation is Operation.GET else 0.5
    on_engine(work, host=32, disk=64, chunk_mb=CHUNK_MB * scale)


@pytest.mark.parametrize("operation", [Operation.GET, Operation.PREFETCH])
def test_a_load_for_which_there_is_no_place_is_not_ready(operation: Operation) -> None:
    """A load for which pinned blocks leave no room is UNREADY, with the numbers in its error.

    Blocks that are in no tier are still a miss.
    """

    async def work(engine: Engine) -> None:
        await put(engine, A)
        engine.residency.clear(Tier.HOST)
        await put(engine, B)
        engine.retention.pin(B, None, 10.0, "")
        response = await perform(engine, operation, A)
        assert response.status is KVResponseStatus.UNREADY
        assert not any(moved(response))
        assert isinstance(response.error, CapacityError)
        error = response.error
        assert (error.tier, error.wanted_blocks, error.free_blocks) == ("host", 4, 0)
        assert error.evictable_blocks == 0
        missed = await perform(engine, operation, LONG)
        assert (missed.status, missed.error) == (KVResponseStatus.NOTFOUND, None)

    on_engine(work, host=4, disk=64, write_behind_max_gb=1.0)


@pytest.mark.parametrize("blocks", [-1, NO_QUOTA, 1 << 40, 1.5, "1"])
def test_a_quota_that_is_none_is_refused(blocks: Any) -> None:
    """A number of blocks that cannot be a quota is refused by the name of its field."""

    async def work(engine: Engine) -> None:
        with pytest.raises(ConfigError) as caught:
            engine.retention.set_quota("tenant", Tier.HOST, blocks)
        assert caught.value.field == "blocks"

    on_engine(work)
