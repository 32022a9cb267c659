"""A device of our own process that hangs: nobody but its own callers waits for it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from flexkv.common.errors import DeadlineError
from flexkv.common.request import KVResponse, KVResponseStatus, Operation
from flexkv.common.terms import Tier
from flexkv.engine import Engine
from flexkv.testing.faults import FaultPlan
from tests.system.test_keeping import A, B, on_engine, put, resident

HANG_S, DEADLINE_S = 30.0, 2.0


def hang(engine: Engine, seconds: float) -> None:
    """Let each copy of the device that begins from now on take so long."""
    port: Any = engine.devices._by_rank[0].port
    port._faults = FaultPlan(1, 0.0, seconds, seconds)


async def begun(engine: Engine, operation: Operation, tokens: Any) -> asyncio.Task[KVResponse]:
    """Return the task of a request that has begun."""

    async def perform() -> KVResponse:
        made = engine.intake(operation, tokens, None)
        request = engine.with_slots(made, np.arange(len(tokens)))
        assert request is not None
        response = (await engine.perform(request)).response
        assert response is not None
        return response

    task = asyncio.ensure_future(perform())
    await asyncio.sleep(0)
    return task


def test_a_flush_tells_of_a_device_that_hangs_and_nobody_waits_for_its_blocks() -> None:
    """Its put is answered when the device lets go, with success: its bytes are there then."""

    async def work(engine: Engine) -> None:
        await put(engine, B)
        hang(engine, HANG_S)
        putting = await begun(engine, Operation.PUT, A)
        async with asyncio.timeout(2 * DEADLINE_S):
            with pytest.raises(DeadlineError, match="device"):
                await engine.flush()
            await engine.perform(engine.intake(Operation.PREFETCH, A, None))
        assert engine.match(A).tokens == 0
        assert engine.match(B).tokens
        assert engine.residency.counts(Tier.HOST).reserved == 4
        assert not putting.done()
        hang(engine, 0.001)
        response = await putting
        assert response.status is KVResponseStatus.SUCCESS
        assert resident(engine, A) == 4
        await engine.flush()

    on_engine(work, host=32, disk=64, io_deadline_s=DEADLINE_S)


def test_a_device_that_is_slow_but_ends_its_copies_is_no_fault() -> None:
    """Each takes less than the deadline, all of them together more."""

    async def work(engine: Engine) -> None:
        hang(engine, DEADLINE_S * 0.8)
        for number in range(4):
            await put(engine, A + 1000 * number)
        await engine.flush()

    on_engine(work, host=32, disk=64, io_deadline_s=DEADLINE_S)
