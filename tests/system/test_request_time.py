"""All tries of one request take no longer than its deadline, whatever far tiers do meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from flexkv.actors.flight import Flight
from flexkv.common.config import CacheConfig, LayerGroup, ModelConfig
from flexkv.common.errors import DeadlineError, MissingBlockError, TransferError
from flexkv.common.request import KVResponse, KVResponseStatus, Operation
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey, Transfer
from flexkv.engine.engine import Engine
from flexkv.engine.runner import AGAIN_MAX
from flexkv.index.keys import block_keys, leaf_keys
from flexkv.io.ports import Completion
from flexkv.testing.fake_backend import FakeBackend, empty
from flexkv.testing.fake_far import FakeFar
from flexkv.testing.faults import FaultPlan
from flexkv.testing.simulated_groups import CHAIN, MODEL, TOKENS_PER_BLOCK
from flexkv.testing.virtual_time import run_virtual

BLOCKS, HERE, DEADLINE_S = 8, 2, 10.0
STATE = 1
STATES = ModelConfig(
    **{**CHAIN, "num_layers": 2},
    dtype="int8",
    layer_groups=(
        LayerGroup(**CHAIN),
        LayerGroup(kind="state", state_bytes=BLOCK_KEY_BYTES, num_layers=1, kv_group=STATE,
                   tokens_per_block=TOKENS_PER_BLOCK),
    ),
)  # fmt: skip
"""A model with a state at each block of the chain."""


class Bench:
    """An engine with a far tier; each fetch takes the time that the test sets.

    Attributes:
        state_s: how long the fetch of a state takes.
        chain_s: how long that of the chain's blocks takes.
        tries: when the fetches of states began.
    """

    def __init__(self, model: ModelConfig) -> None:
        cache = CacheConfig(
            tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=64, num_ssd_blocks=0,
            evict_ratio=0.0, io_deadline_s=DEADLINE_S,
        )  # fmt: skip
        self.far, self.faults = FakeFar(), FaultPlan(1, 0.0, 0.001, 0.001)
        self.backend = FakeBackend(64, self.faults, empty(0), far=self.far)
        self.engine = Engine(model, cache, self.backend)
        self.state_s = self.chain_s = 0.001
        self.tries: list[float] = []

    def pace(self) -> None:
        """Make the far tier keep to the times of the test."""
        port = self.backend.far_port
        assert port is not None
        submit = port.submit

        def timed(transfer: Transfer) -> None:
            delay_s = self.state_s if transfer.group else self.chain_s
            self.faults.delay_min_s = self.faults.delay_max_s = delay_s
            if transfer.group:
                self.tries.append(round(asyncio.get_running_loop().time(), 1))
            submit(transfer)

        port.submit = timed  # type: ignore[method-assign]

    def keys(self, group: int = 0) -> list[BlockKey]:
        """Return the keys of the prompt's blocks in a KV group."""
        request = self.engine.requests.intake(Operation.PREFETCH, prompt(BLOCKS))
        return block_keys(leaf_keys(request.keys, group))

    async def prefetch(self, blocks: int = BLOCKS) -> KVResponse:
        """Prefetch the first blocks of the prompt."""
        request = self.engine.requests.intake(Operation.PREFETCH, prompt(blocks))
        response = (await self.engine.requests.perform(request)).response
        assert response is not None
        return response


def prompt(blocks: int) -> list[int]:
    """Return the tokens of the prompt's first blocks."""
    return list(range(blocks * TOKENS_PER_BLOCK))


def loaded(response: KVResponse) -> int:
    """Return how many blocks a response has."""
    return int(np.count_nonzero(response.return_mask)) // TOKENS_PER_BLOCK


def now_s() -> float:
    """Return the virtual time, to a tenth of a second."""
    return round(asyncio.get_running_loop().time(), 1)


def on_bench(work: Callable[[Bench], Awaitable[None]], model: ModelConfig = STATES) -> None:
    """Run something on an open engine, and close it, which checks that nothing is left.

    Of a model with states, its host memory has two blocks with their state; all others of the chain
    are far, and so are all states, by the hints: the far tier does not have them.
    """

    async def run() -> None:
        bench = Bench(model)
        await bench.engine.open()
        bench.pace()
        bench.far.hold(bench.keys())
        if model is STATES:
            bench.far.hold(bench.keys(STATE)[:HERE])
            assert loaded(await bench.prefetch(HERE)) == HERE
            bench.far.hinted.update(bench.keys(STATE))
            bench.tries.clear()
        await work(bench)
        await bench.engine.scheduler.wait_idle()
        bench.engine.residency.validate()
        assert bench.engine.statistics().claims == 0
        await bench.engine.close()

    run_virtual(run())


@pytest.mark.parametrize(
    ("state_s", "tries", "end_s"),
    [
        (0.01, [0.0] * AGAIN_MAX, 0.0),
        (2.0, [0.0, 2.0, 4.0, 6.0], 8.0),
        (3.0, [0.0, 3.0, 6.0, 9.0], DEADLINE_S),
        (8.0, [0.0, 8.0], DEADLINE_S),
    ],
)
def test_tries_of_far_blocks_end_with_the_requests_time(
    state_s: float, tries: list[float], end_s: float
) -> None:
    """A prefix whose far blocks fail slowly is given up in time for one that is here."""

    async def work(bench: Bench) -> None:
        bench.state_s = state_s
        response = await bench.prefetch()
        assert (response.status, response.error) == (KVResponseStatus.SUCCESS, None)
        assert loaded(response) == HERE
        assert (bench.tries, now_s()) == (tries, end_s)
        assert bench.engine.statistics().requests["prefetch"] == {"success": 2}

    on_bench(work)


def test_what_a_request_waits_for_no_more_arrives_for_others() -> None:
    """A fetch whose request is over in time goes on for the request that has joined it."""

    async def work(bench: Bench) -> None:
        bench.state_s = 8.0
        bench.far.hold(bench.keys(STATE)[: BLOCKS - 1])
        first = asyncio.ensure_future(bench.prefetch())
        await asyncio.sleep(9.0)
        second = asyncio.ensure_future(bench.prefetch())
        assert loaded(await first) == HERE
        assert now_s() == DEADLINE_S
        assert loaded(await second) == BLOCKS - 1
        assert (bench.tries, now_s()) == ([0.0, 8.0], 16.0)

    on_bench(work)


def test_a_request_that_is_cancelled_between_its_tries_counts_once() -> None:
    """It leaves nothing, and is counted as cancelled."""

    async def work(bench: Bench) -> None:
        bench.state_s = 3.0
        request = asyncio.ensure_future(bench.prefetch())
        await asyncio.sleep(4.0)
        request.cancel()
        with suppress(asyncio.CancelledError):
            await request
        assert (bench.tries, now_s()) == ([0.0, 3.0], 6.0)
        assert bench.engine.statistics().requests["prefetch"] == {"success": 1, "cancelled": 1}

    on_bench(work)


def test_a_request_that_is_cancelled_as_a_try_ends_counts_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A try whose end the request does not see any more is the request's end."""

    async def work(bench: Bench) -> None:
        request = asyncio.ensure_future(bench.prefetch())
        answer = Flight.answer

        def cancelling(flight: Flight, response: KVResponse) -> None:
            answer(flight, response)
            request.cancel()

        monkeypatch.setattr(Flight, "answer", cancelling)
        with pytest.raises(asyncio.CancelledError):
            await request
        assert len(bench.tries) == 1
        assert bench.engine.statistics().requests["prefetch"] == {"success": 1, "notfound": 1}

    on_bench(work)


def test_a_load_that_joins_a_fetch_that_fails_ends_in_time_too() -> None:
    """With one KV group, its second try fetches the blocks itself, within what time is left."""

    async def work(bench: Bench) -> None:
        port = bench.backend.far_port
        assert port is not None
        reap, forgets = port.reap, bench.far.doubt

        def failing() -> list[Completion]:
            error = TransferError(0, "remote→host", 1, "planted")
            return [Completion(end.op_id, error) for end in reap()]

        port.reap = failing  # type: ignore[method-assign]
        bench.far.doubt = lambda *_: None  # type: ignore[method-assign]
        bench.chain_s = 8.0
        first = asyncio.ensure_future(bench.prefetch())
        await asyncio.sleep(1.0)
        second = asyncio.ensure_future(bench.prefetch())
        ends: list[Any] = [(await each, now_s()) for each in (first, second)]
        bench.far.doubt = forgets  # type: ignore[method-assign]
        assert [end_s for _, end_s in ends] == [8.0, 1.0 + DEADLINE_S]
        assert isinstance(ends[1][0].error, DeadlineError)
        assert not isinstance(ends[0][0].error, DeadlineError | MissingBlockError)

    on_bench(work, MODEL)
