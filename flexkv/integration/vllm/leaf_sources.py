"""Which device blocks hold the leaves that are worth storing, in each step and at a request's end.

window, chunk   in the step whose forward reaches the end of a prefix that may be hit later:
                the next step may give the blocks away, even to another group of the request
the same        when a request ends, at the last prefix that its tokens have
state           where vLLM says so (`boundary_state_offloads`), and nowhere else: these blocks
                take turns, and their position says nothing
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from flexkv.common.request import LeafBlocks
from flexkv.integration.common.kv_groups import GroupIds, KVGroups
from flexkv.integration.vllm.groups import EngineGroups
from flexkv.integration.vllm.request_state import RequestState


class LeafSources:
    """The leaves of one engine's requests that are worth storing."""

    def __init__(self, groups: KVGroups, engine: EngineGroups) -> None:
        """Take the KV groups, in FlexKV's terms and in vLLM's."""
        self._groups, self._engine = groups, engine
        self._per_block = engine.tokens_per_block
        self._of_engine = {source.engine_id: n for n, source in enumerate(engine.sources)}
        self._block_state: Any = None
        self._offers: dict[str, list[tuple[int, int, int]]] = {}

    def ids(self, ids: Sequence[Sequence[int]]) -> GroupIds:
        """Return a request's device blocks by FlexKV's groups; `ids` has them by vLLM's."""
        return [source.of(ids) for source in self._engine.sources]

    def begin(self, state: RequestState) -> None:
        """Set the boundaries at which a request that is scheduled stores its leaves."""
        request = state.request
        tokens = getattr(request, "num_prompt_tokens", request.num_tokens)
        shared = getattr(request, "shared_prefix_boundary", 0) // self._per_block
        ends = {
            *self._groups.boundaries(tokens, state.transfers.junction_blocks),
            *self._groups.boundaries(tokens, shared),
        }
        if every := self._engine.retained_tokens // self._per_block:
            ends.update(range(every, tokens // self._per_block + 1, every))
        state.ends = tuple(sorted(ends))

    def begin_step(self, output: Any) -> None:
        """Take vLLM's `SchedulerOutput` of a step that is being made."""
        self._block_state = getattr(output, "kv_connector_block_state", None)
        self._offers = dict(getattr(self._block_state, "boundary_state_offloads", None) or {})

    def of_step(self, state: RequestState, computed: int, blocks: int) -> tuple[LeafBlocks, ...]:
        """Return the leaves of a request that are worth storing, and whole after the step.

        Args:
            state: the request.
            computed: how many of its tokens were computed before the step.
            blocks: how many blocks of the chain are whole after it.
        """
        request_id = state.request.request_id
        offers = self._offers.pop(request_id, ())
        states: list[LeafBlocks] = []
        ends = {end for end in state.ends if end <= blocks}
        state.ends = tuple(end for end in state.ends if end > blocks)
        for number, block, tokens in offers:
            is_boundary = tokens % self._engine.alignment_tokens == 0
            if number in self._of_engine and is_boundary and tokens <= blocks * self._per_block:
                block_id = int(getattr(block, "block_id", block))
                states += self._groups.state(self._of_engine[number], tokens, block_id)
                ends.add(tokens // self._per_block)
        ends = {end for end in ends if end * self._per_block > computed}
        ids = self._block_state.get_block_ids(request_id) if ends and self._block_state else None
        if ids is None:
            return tuple(states)
        by_group = self.ids(ids)
        windows = [leaf for end in sorted(ends) for leaf in self._groups.to_store(by_group, end)]
        state.kept.update(_named(windows))
        return (*windows, *states)

    def loaded(self, state: RequestState, blocks: int) -> None:
        """Record the leaves that a request loads with a prefix of this many blocks."""
        local = state.transfers.local_blocks
        state.kept.update(
            (group, at)
            for group in range(1, len(self._engine.sources))
            for at in self._groups.needed(group, blocks, local)
        )

    def of_end(
        self, state: RequestState, ids: Sequence[Sequence[int]], tokens: int
    ) -> tuple[int, tuple[LeafBlocks, ...]]:
        """Return the last boundary of a request that is over, in blocks, and leaves to store.

        The leaves are those that a prefix to the boundary needs and the device still has. There are
        none if the device has lost one that the request has neither stored nor loaded before, or if
        the model has states: vLLM offers no state at such a boundary.

        Args:
            state: the request.
            ids: its device blocks, by vLLM's groups.
            tokens: how many of its tokens have KV.
        """
        ends = self._groups.boundaries(tokens)
        if not ends or self._engine.have_states:
            return 0, ()
        leaves = self._groups.to_store(self.ids(ids), ends[-1])
        has = {*_named(leaves), *state.kept}
        is_whole = all(
            (group, at) in has
            for group in range(1, len(self._engine.sources))
            for at in self._groups.needed(group, ends[-1])
        )
        return ends[-1], leaves if is_whole else ()


def _named(leaves: Iterable[LeafBlocks]) -> Iterator[tuple[int, int]]:
    """Yield group and position of each leaf."""
    for each in leaves:
        yield from ((each.group, at) for at in each.positions)
