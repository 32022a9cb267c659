"""What a far tier must bring about once nothing fails any more, for a simulation.

requests, faults ──▶ nothing fails, nothing is asked ──▶ what host memory has is known far
                                                     ──▶ what is far is offered, and loaded
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random

from flexkv.actors.health import BACKOFF_MAX_S
from flexkv.common.errors import TransferError
from flexkv.common.request import Operation, Request
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey, Tier
from flexkv.engine.durability import FlushReport
from flexkv.engine.engine import Engine
from flexkv.index.keys import block_keys, leaf_keys
from flexkv.index.residency import READY
from flexkv.testing.fake_backend import FakeBackend
from flexkv.testing.simulated_crashes import Survival
from flexkv.testing.simulated_groups import SimulatedGroups

SHIPPED_S = 5.0
"""How long the spans of host memory take to be far, on a virtual clock, with nothing else to do."""


class FarLiveness:
    """Checks one engine that nobody uses any more."""

    def __init__(
        self,
        random: Random,
        engine: Engine,
        backend: FakeBackend,
        survival: Survival,
        groups: SimulatedGroups,
        move: Callable[[Request], Awaitable[int]],
    ) -> None:
        """Take the parts of a simulation.

        `move` performs a get or put with a slot for each block; it returns how many blocks of the
        chain a get loaded.
        """
        self._random, self._engine, self._backend = random, engine, backend
        self._survival, self._groups, self._move = survival, groups, move
        assert backend.far is not None
        self._far, self._ship = backend.far, backend.ship

    async def check(self, prompts: Sequence[list[int]]) -> None:
        """Check that what is here becomes far, and what is far can be had."""
        faults = self._backend.faults
        has_failed = faults.failure_probability > 0
        faults.failure_probability = faults.flip_probability = faults.hang_probability = 0.0
        faults.delay_max_s = 0.001  # far below every deadline
        await asyncio.sleep(BACKOFF_MAX_S)
        requests = [self._request(Operation.PREFETCH, prompt) for prompt in prompts]
        if self._ship is not None and not self._ship.reused_only:
            await self._shipped()
            if not has_failed:  # otherwise some may have been given up
                self._check_shipped(requests, self._far.dropped)
            await self._flushed(has_failed)
            self._check_shipped(requests)
        if len(prompt := self._random.choice(prompts)) and requests:
            await self._check_load(prompt)

    def _request(self, operation: Operation, prompt: list[int]) -> Request:
        return self._engine.requests.intake(operation, prompt)

    # -- from here to there -----------------------------------------------------------------

    async def _shipped(self) -> None:
        """Wait until nothing is owed to the far tier."""
        await asyncio.sleep(SHIPPED_S)
        owed = self._engine.statistics().write_behind[self._far.tier.label]
        assert owed.owed_blocks + owed.writing_blocks == 0, "spans wait, and are not written"

    async def _flushed(self, has_failed: bool) -> FlushReport:
        """Flush; what has failed before may make the first attempt fail."""
        try:
            report = await self._survival.flushed()
        except TransferError:
            assert has_failed, "a flush failed without a reason"
            report = await self._survival.flushed()
        lacking = report.lacking_blocks.get(self._far.tier.label, 0)
        assert not lacking, f"a flush has left {lacking} blocks that are not far"
        return report

    def _check_shipped(
        self, requests: Sequence[Request], but: Sequence[BlockKey] | set[BlockKey] = ()
    ) -> None:
        for request in requests:
            lacking = self._lacking(request.keys, request.block_count) - set(but)
            assert not lacking, f"{len(lacking)} spans in host memory are not far"

    def _lacking(self, keys: bytes, end: int) -> set[BlockKey]:
        """Return the spans of a prompt's first blocks that host memory has, and that are not far.

        Leaves are among them.
        """
        residency, size = self._engine.residency, self._far.span_blocks
        here = {
            position
            for alike in residency.survey(keys, 0, end, use=False)
            if alike.states[0] == READY
            for position in alike.positions
        }
        chain, spans = block_keys(keys), set[BlockKey]()
        for last in range(size - 1, end, size):
            if here.issuperset(range(last + 1 - size, last + 1)):
                spans.add(chain[last])
        for space in self._groups.spaces:
            leaves = block_keys(leaf_keys(keys, space.group))
            for alike in residency.survey(keys, 0, end, False, space.group):
                if alike.states[0] == READY:
                    spans.update(leaves[position] for position in alike.positions)
        return spans - self._far.hinted

    # -- from there to here -----------------------------------------------------------------

    async def _check_load(self, prompt: list[int]) -> None:
        """Check that a load brings what is held, even if it is less than what is promised."""
        far, groups, random = self._far, self._groups, self._random
        request = self._request(Operation.GET, prompt)
        keys, blocks = request.keys, request.block_count
        self._make_room()
        cache = self._engine.cache
        room = int(len(self._backend.memory) * cache.evict_start_threshold)
        last = next(end for end in range(blocks, -1, -1) if len(groups.needed(keys, end)) <= room)
        request, keys = request.narrowed(0, last), keys[: (last + 1) * BLOCK_KEY_BYTES]
        in_spans = block_keys(keys)[: last // far.span_blocks * far.span_blocks]
        every = [*in_spans, *groups.leaves_of(keys, last)]
        far.hold(every)
        here = self._here(keys)
        promised = groups.longest(keys, here | far.hinted & set(every))
        if (needed := groups.needed(keys, promised)) and random.random() < 0.5:
            far.held.discard(random.choice(needed))
        right = groups.longest(keys, here | far.held & set(every))
        found, behind, _, coming = self._engine.requests.find_apart(keys)
        offered = found.last + sum(behind.values())
        assert (offered, coming) == (promised, 0), f"{offered} of {promised} blocks were promised"
        if random.random() < 0.5:
            prefetch = self._request(Operation.PREFETCH, prompt).narrowed(0, last)
            await self._engine.requests.perform(prefetch)
            found, _, _, coming = self._engine.requests.find_apart(keys)
            assert (found.last, coming) == (right, 0), (
                f"{found.last} of {right} blocks were fetched"
            )
        loaded = await self._move(request)
        assert loaded == right, f"{loaded} of {right} blocks were loaded"
        if self._ship is not None:
            await self._check_ships_again(request, right, every)
            if not self._ship.reused_only:
                await self._check_clear(prompt, every)

    async def _check_ships_again(
        self, request: Request, end: int, every: Sequence[BlockKey]
    ) -> None:
        """Check that what was loaded becomes far again once the store has lost it."""
        assert self._ship is not None
        self._far.forget(every)
        if self._ship.reused_only:
            assert await self._move(request) == end, "what was loaded is not here"
        else:
            await self._flushed(False)
        await self._shipped()
        lacking = self._lacking(request.keys, end) & set(every)
        assert not lacking, f"{len(lacking)} spans that were used again are not far"

    async def _check_clear(self, prompt: list[int], every: Sequence[BlockKey]) -> None:
        """Clear everything while spans are on their way; what is put then must become far."""
        self._far.forget(every)
        flush = asyncio.create_task(self._engine.flush())
        await asyncio.sleep(self._random.uniform(0.0, 0.002))
        self._survival.about_to_clear(True)
        self._engine.retention.clear()
        request = self._request(Operation.PUT, prompt)
        await self._move(request)
        await flush
        await self._shipped()
        assert not self._lacking(request.keys, request.block_count), (
            "what was put after a clear is not far"
        )

    def _make_room(self) -> None:
        """Remove bounds and pins; empty host memory, and an SSD that may have wrong blocks."""
        retention, backend = self._engine.retention, self._backend
        for owner in "ab":
            retention.pins.unpin_owner(owner)
        blocks = {Tier.HOST: len(backend.memory)}
        if backend.port is not None:
            blocks[Tier.DISK] = backend.port.num_blocks
        for tier, capacity_blocks in blocks.items():
            retention.set_quota(None, tier, None)
            retention.resize(tier, capacity_blocks)
            if tier is Tier.HOST or not self._survival.is_trusted:
                self._survival.about_to_clear(False)
                retention.clear(tier)

    def _here(self, keys: bytes) -> set[BlockKey]:
        """Return the keys of a prompt's blocks that are READY in some tier."""
        residency = self._engine.residency
        chain = block_keys(keys)[: residency.find(keys).chain]
        return {*chain, *[key for _, key in self._groups.there(residency, keys)]}
