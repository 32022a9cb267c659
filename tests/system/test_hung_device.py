"""Tests of a device of this process that hangs: nobody but its own callers waits for it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from flexkv.common.errors import ClosedError, DeadlineError
from flexkv.common.request import KVResponse, KVResponseStatus, Operation
from flexkv.common.terms import Tier
from flexkv.engine.engine import Engine
from flexkv.engine.runner import RequestOwner
from flexkv.testing.faults import FaultPlan
from tests.system.test_keeping import A, B, on_engine, put, resident

HANG_S, DEADLINE_S = 30.0, 2.0


def hang(engine: Engine, seconds: float) -> None:
    """Make each device copy that begins from now on take `seconds`."""
    port: Any = engine.devices._by_rank[0].port
    port._faults = FaultPlan(1, 0.0, seconds, seconds)


async def begun(
    engine: Engine, operation: Operation, tokens: Any, group: int = 0
) -> asyncio.Task[KVResponse]:
    """Start a request, and return its task."""

    async def perform() -> KVResponse:
        made = engine.requests.intake(operation, tokens, None)
        request = engine.requests.with_slots(made, np.arange(len(tokens)))
        assert request is not None
        response = (await engine.requests.perform(request, RequestOwner(group))).response
        assert response is not None
        return response

    task = asyncio.ensure_future(perform())
    await asyncio.sleep(0)
    return task


def test_a_flush_tells_of_a_device_that_hangs_and_nobody_waits_for_its_blocks() -> None:
    """A flush reports a hung device; its put succeeds when its copies end; nobody else waits."""

    async def work(engine: Engine) -> None:
        await put(engine, B)
        hang(engine, HANG_S)
        putting = await begun(engine, Operation.PUT, A)
        async with asyncio.timeout(2 * DEADLINE_S):
            with pytest.raises(DeadlineError, match="device"):
                await engine.flush()
            await engine.requests.perform(engine.requests.intake(Operation.PREFETCH, A, None))
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
    """A device is not hung if each copy ends within the deadline, even if all take longer."""

    async def work(engine: Engine) -> None:
        hang(engine, DEADLINE_S * 0.8)
        for number in range(4):
            await put(engine, A + 1000 * number)
        await engine.flush()

    on_engine(work, host=32, disk=64, io_deadline_s=DEADLINE_S)


def test_requests_of_a_stuck_group_give_their_places_back_and_are_answered_later() -> None:
    """A stuck group's requests leave admission and are answered later; waiting ones fail."""

    async def work(engine: Engine) -> None:
        admission = engine.requests.runner.admission
        hang(engine, DEADLINE_S)
        stuck = [await begun(engine, Operation.PUT, A + 1000 * n, group=1) for n in range(2)]
        late = await begun(engine, Operation.PUT, B + 9000, group=1)
        assert admission.waiting == 1
        engine.requests.runner.turn_away(1, "its devices do not answer")
        with pytest.raises(ClosedError, match="do not answer"):
            await late
        assert [admission.enter_nowait(2) for _ in range(3)] == [True, True, False]
        for _ in range(2):
            admission.leave(2)
        responses = [await each for each in stuck]
        assert {each.status for each in responses} == {KVResponseStatus.SUCCESS}
        engine.requests.runner.take_back(1)
        assert [admission.enter_nowait(1) for _ in range(3)] == [True, True, False]
        for _ in range(2):
            admission.leave(1)

    on_engine(work, host=32, requests_max=2, io_deadline_s=100.0)
