"""Which prompts may load at the same time, so that each of them can go on to its end.

vLLM takes no blocks back from a prompt that loads, or has loaded and is not running yet. If several
such prompts hold blocks, none gets the rest that it needs, and nothing runs, vLLM stands still for
ever. Therefore it admits a load only if the load leaves the blocks that earlier ones still need.
But it counts too few of them if layers give blocks back (sliding windows, chunks), and with
priorities a later load may overtake the earlier ones. Older versions lack this rule and admit any
load.

The law here depends neither on the free blocks nor on an order: **all prompts that load, or are
being computed, fit into the device together**, each with what it needs up to its end. Any other
request that holds blocks is running, so it ends or is preempted. A load that would break the law
waits, and so does every prompt behind it that might load, as in vLLM's own queue. If nothing moves
for `WAIT_S`, the prompt is computed: then it holds blocks only while it runs.

    new ──match──▶ fits? ──yes──▶ loads ──▶ is computed ──▶ leaves
                    └─no─▶ asked again in the next step … computed
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from flexkv.observe.logs import get_logger

log = get_logger(__name__)

WAIT_S = 5.0
"""If no prompt has begun, gone on or ended for this long, loads wait no longer."""


class Pool(NamedTuple):
    """The blocks of an engine's device.

    Attributes:
        blocks: how many blocks a prompt can get at most.
        groups: for each KV group, the tokens of a block, and how many blocks one request can hold
            at most.
        more_tokens: how many tokens beyond its own a request needs blocks for, because of drafts.
    """

    blocks: int
    groups: tuple[tuple[int, int], ...]
    more_tokens: int = 0

    def needed(self, tokens: int) -> int:
        """Return how many blocks a request of this many tokens holds at most at one time."""
        tokens += self.more_tokens
        return sum(min(-(-tokens // per_block), most) for per_block, most in self.groups)


class Room:
    """The prompts that load or are being computed.

    Attributes:
        is_full: whether a load has found no room in the step that is being scheduled.
    """

    def __init__(self, pool: Pool, now_s: Callable[[], float] = time.monotonic) -> None:
        """Begin with an empty device; `now_s` returns the time in seconds."""
        self._pool, self._now_s = pool, now_s
        self._needs: dict[str, int] = {}
        """The blocks that each prompt needs in all."""
        self._moved_s = now_s()
        """When one of them last began, went on or ended."""
        self._is_told = False
        self.is_full = False

    def __contains__(self, request_id: str) -> bool:
        """Return whether a prompt loads or is being computed."""
        return request_id in self._needs

    def __len__(self) -> int:
        """Return how many prompts load or are being computed."""
        return len(self._needs)

    def fits(self, tokens: int) -> bool:
        """Return whether a prompt of this many tokens can load now; alone, any prompt can."""
        others = sum(self._needs.values())
        return not others or others + self._pool.needed(tokens) <= self._pool.blocks

    def may_wait(self) -> bool:
        """Return whether a load that does not fit may wait; if so, this step's room is full."""
        self.is_full = self._now_s() < self._moved_s + WAIT_S
        if not self._is_told:
            self._is_told = True
            log.warning(
                "loads_wait_for_blocks", blocks=self._pool.blocks, loading=len(self._needs),
                reason="prompts that load at the same time need more blocks than the device has",
                remedy="more memory for the KV cache, or fewer requests at a time (max_num_seqs)",
            )  # fmt: skip
        return self.is_full

    def enter(self, request_id: str, tokens: int) -> None:
        """Record that a prompt of this many tokens gets blocks before it is computed."""
        self._needs[request_id] = self._pool.needed(tokens)
        self._moved_s = self._now_s()

    def runs(self, request_id: str, tokens: int, computed: int) -> None:
        """Record that a step computes a prompt of `tokens` tokens up to `computed`."""
        self.enter(request_id, tokens)
        if computed >= tokens:
            self.leave(request_id)

    def leave(self, request_id: str) -> None:
        """Record that a prompt has been computed, or holds no blocks any more."""
        if self._needs.pop(request_id, None) is not None:
            self._moved_s = self._now_s()

    def step_is_made(self) -> None:
        """Record that a step has been scheduled: there may be room in the next one."""
        self.is_full = False
