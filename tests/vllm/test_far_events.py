"""Tests that KV events tell of far blocks only once they are in this engine's own tiers."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.system.serving import eventually

pytest.importorskip("vllm")

from .far_rig import ALL, BLOCKS, OP_BLOCKS, WAITS, Rig, rig

__all__ = ["rig"]


class Router:
    """Counts what the events of a rig announce and withdraw, by medium."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.stored, self.removed = Counter[str](), Counter[str]()
        self.tokens: list[int] = []

    def step(self) -> int:
        """Make a step, hear its events, and return how many blocks have been announced."""
        self.rig.step()
        for event in self.rig.side.step_ended():
            is_removal = type(event).__name__ == "BlockRemoved"
            (self.removed if is_removal else self.stored)[event.medium] += len(event.block_hashes)
            self.tokens += [] if is_removal else event.token_ids
        return self.stored.total()


@pytest.mark.parametrize("rig", [{"tells_events": True}], indirect=True)
def test_a_fetched_block_is_announced_once_it_is_in_host_memory(rig: Rig) -> None:
    """What only others hold is not announced; what arrives is, once each, as host memory's."""
    request, router = rig.request("a"), Router(rig)
    rig.served.hold(rig.keys())
    rig.served.pass_transfers(0)
    assert rig.ask(request) == WAITS
    assert not any(router.step() for _ in range(5))
    rig.served.pass_transfers(1)
    eventually(lambda: router.step() == OP_BLOCKS)
    assert all(rig.served.fetched(rig.keys())[:OP_BLOCKS])
    assert router.step() == OP_BLOCKS, "the others are still on their way"
    rig.served.pass_transfers(None)
    eventually(lambda: router.step() == BLOCKS)
    assert rig.ask(request) == (ALL, True)
    assert (router.stored, router.removed) == ({"CPU": BLOCKS}, {})
    assert router.tokens == request.all_token_ids[:ALL]
    rig.side.request_finished(request)


@pytest.mark.parametrize("rig", [{"tells_events": True}], indirect=True)
def test_what_never_arrives_is_never_announced(rig: Rig) -> None:
    """Blocks that hints promise and nobody has are in no event."""
    request, router = rig.request("a"), Router(rig)
    rig.served.hold(rig.keys())
    rig.served.lose(rig.keys(), OP_BLOCKS)
    assert rig.ask(request) == WAITS
    eventually(lambda: (router.step(), rig.ask(request) != WAITS)[1])
    assert router.step() == OP_BLOCKS
    assert (router.stored, router.removed) == ({"CPU": OP_BLOCKS}, {})
    rig.side.request_finished(request)
