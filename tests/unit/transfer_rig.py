"""The transfers of an engine over a client that the test speaks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from flexkv.common.request import LeafBlocks
from flexkv.integration.common.costs import Costs
from flexkv.integration.common.kv_groups import GroupIds, KVGroups
from flexkv.integration.common.request_transfers import RequestTransfers
from flexkv.integration.common.transfers import StepTransfers, TransferRules, Transfers
from flexkv.server.prompts import Prompt, PromptPart
from flexkv.server.wire import Done, Matched

HELD = 90
"""The number of the match whose blocks are offered."""


class FakeClient:
    """A client that records what it is asked for; requests end as the test says."""

    num_blocks = 100
    is_ready = True

    def __init__(self) -> None:
        self.begun: list[tuple[Any, ...]] = []
        self.cancelled: list[int] = []
        self.released: list[int] = []
        self.ends: list[Done] = []
        self.given_up = 0

    def get(
        self, keys: PromptPart, first: int, ids: Any, held: int, gated: bool,
        leaves: Sequence[LeafBlocks] = (),
    ) -> int:  # fmt: skip
        """Begin a get."""
        self.begun.append(("get", first, list(ids), held, gated, *_told(leaves)))
        return len(self.begun)

    def get_by_layer(self, keys: PromptPart, first: int, ids: Any, held: int, gated: bool) -> int:
        """Begin a get that goes layer by layer."""
        self.begun.append(("get by layer", first, list(ids), held, gated))
        return len(self.begun)

    def put(
        self, keys: PromptPart, first: int, ids: Any, generation: int,
        leaves: Sequence[LeafBlocks] = (),
    ) -> int:  # fmt: skip
        """Begin a put."""
        self.begun.append(("put", first, list(ids), keys.blocks, generation, *_told(leaves)))
        return len(self.begun)

    def cancel(self, numbers: list[int]) -> None:
        """Record the numbers."""
        self.cancelled += numbers

    def release(self, numbers: list[int]) -> None:
        """Record the numbers."""
        self.released += numbers

    def flush(self) -> None:
        """Do nothing."""

    def give_up(self, reason: str) -> None:
        """End every put that was cancelled."""
        self.given_up += 1
        self.ends += [Done(number, "failed", 0, reason) for number in self.cancelled]

    def poll(self) -> list[Done]:
        """Return the ends that the test has set."""
        ended, self.ends = self.ends, []
        return ended


def _told(leaves: Sequence[LeafBlocks]) -> list[tuple[int, dict[int, int]]]:
    """Return leaves as (group, {position: device block})."""
    return [
        (group, dict(zip(positions, ids.tolist(), strict=True))) for group, positions, ids in leaves
    ]


class Rig:
    """The transfers of an engine, and what they have reported."""

    def __init__(
        self,
        gates_loads: bool = False,
        by_layer: bool = False,
        groups: KVGroups | None = None,
        grace_s: float = 0.0,
    ) -> None:
        self.client, self.counts = FakeClient(), Counter[str]()
        self.over: list[str] = []
        self.transfers = Transfers[StepTransfers](
            self.client,  # type: ignore[arg-type]
            TransferRules(gates_loads, by_layer, 0.0, groups, grace_s),
            StepTransfers, self._count, self.over.append, Costs(),
        )  # fmt: skip

    def _count(self, name: str, by: int) -> None:
        self.counts[name] += by

    def step(self, *ends: Done) -> StepTransfers:
        """Handle these ends, and make a step."""
        self.client.ends += ends
        self.transfers.poll()
        return self.transfers.make_step()

    def put(self, request: RequestTransfers, blocks: int) -> int:
        """Begin a put of a request's first blocks, in a step, and return its number."""
        assert self.transfers.may_put(request, blocks)
        self.transfers.put(request, PromptPart(request.prompt, blocks))
        (number,) = self.step().puts
        return number

    def load(self, request: RequestTransfers, ids: list[int], by_layer: bool = False) -> None:
        """Begin the load of all blocks but those that the device has."""
        request.found = Matched(HELD, len(ids), {"host": len(ids) - request.local_blocks})
        request.by_layer = by_layer
        self.transfers.load(request, [ids], len(ids))

    def load_groups(
        self, request: RequestTransfers, ids: GroupIds, blocks: int,
        leaves: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        """Begin the load of the first blocks but those that the device has, with their leaves.

        `leaves` is how many leaves the match has found in each tier.
        """
        by_tier = {"host": blocks - request.local_blocks}
        request.found = Matched(HELD, blocks, by_tier, leaves=leaves or {})
        self.transfers.load(request, ids, blocks)


def request_with(*ids: int, name: str = "a") -> RequestTransfers:
    """Return a request that has these device blocks."""
    return RequestTransfers(name, Prompt(1), generation=5, block_ids=list(ids))
