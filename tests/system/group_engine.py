"""A small engine whose KV groups share one pool of device blocks, with real loads and puts.

It computes chunks of prompts: a forward writes the bytes that follow from each block's key. Blocks
behind a window are freed and given away at once, also to another group of the same request, and
states are kept only where a step ends. So a put that reads a block too late stores another block's
bytes, and a load that writes too early or too late spoils a block that is checked afterwards.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.common.config import Settings
from flexkv.common.space import BlockSpace
from flexkv.integration.common.kv_groups import KVGroups
from flexkv.integration.common.request_transfers import RequestTransfers
from flexkv.integration.common.transfers import StepTransfers, TransferRules, Transfers
from flexkv.server.agent import Agent
from flexkv.server.client import Client
from flexkv.server.prompts import PromptPart

from .group_serving import CHAIN, GROUP_MODEL, LEAVES, STATE, keys_at
from .serving import PER_BLOCK, eventually

UNIT = 2
"""Hits and steps end on multiples of this many blocks of the chain."""


class SharedPages:
    """Device memory in which a page has one block of any group; page 0 is the null block."""

    def __init__(self, spaces: tuple[BlockSpace, ...], num_blocks: int) -> None:
        """Cut the tensors of all layers from one allocation; those of all groups begin alike."""
        page_bytes = max(space.part_bytes for space in spaces) + 64
        self._pages = np.zeros((num_blocks, page_bytes), np.uint8)
        self._sizes = [space.part_bytes for space in spaces]
        layers: dict[int, NDArray[Any]] = {}
        for space in spaces:
            begin = 0
            for layer, shape, dtype in zip(space.layers, space.shapes, space.dtypes, strict=True):
                part = self._pages[:, begin : begin + shape.block_bytes]
                begin += shape.block_bytes
                if space.group == STATE:
                    layers[layer] = part.view(np.int8)[:, None, None]
                    continue
                each = shape.kv_dim, shape.tokens, shape.heads, shape.head_size
                layers[layer] = np.lib.stride_tricks.as_strided(
                    part.view(dtype),
                    (num_blocks, *each),
                    (page_bytes, *np.zeros(each, dtype).strides),
                )
        self.tensors = [layers[layer] for layer in sorted(layers)]

    def write(self, group: int, block: int, key: bytes) -> None:
        """Write the bytes of a group's block that has this key."""
        assert block > 0, "a null block is written"
        self._pages[block, : self._sizes[group]] = self._content(group, key)

    def has(self, group: int, block: int, key: bytes) -> bool:
        """Return whether a page has the bytes of the block that has this key."""
        page = self._pages[block, : self._sizes[group]]
        return bool((page == self._content(group, key)).all())

    def _content(self, group: int, key: bytes) -> NDArray[np.uint8]:
        seed = int.from_bytes(key, "little")
        return np.random.default_rng(seed).integers(0, 256, self._sizes[group], np.uint8)


class Running:
    """A request of the engine.

    Attributes:
        ids: device blocks by group and own position; 0 where there is none.
        computed: how many blocks of the chain are computed or loaded.
    """

    def __init__(self, name: str, keys: bytes, transfers: RequestTransfers) -> None:
        self.name, self.keys, self.transfers = name, keys, transfers
        self.blocks = len(keys) // 16 - 1
        self.ids: list[list[int]] = [[] for _ in range(1 + len(LEAVES))]
        self.computed = 0
        self.is_loading = False


class GroupEngine:
    """The engine.

    Attributes:
        counts: what has happened.
        wrong: blocks that were loaded with other bytes than theirs.
    """

    def __init__(self, settings: Settings, num_blocks: int, seed: int) -> None:
        """Connect to a server."""
        self._chance, self.counts = random.Random(seed), Counter[str]()
        self._spaces = GROUP_MODEL.spaces(PER_BLOCK)
        self._ratio = [each.tokens_per_block // PER_BLOCK for each in self._spaces]
        self._groups = KVGroups(self._spaces, UNIT * PER_BLOCK)
        self._pages = SharedPages(self._spaces, num_blocks)
        self._agent = Agent(settings.server_recv_port, GROUP_MODEL, settings.cache_config)
        self._agent.start(self._pages.tensors)
        self._client = Client(settings, GROUP_MODEL)
        self.wait_ready()
        self._transfers = Transfers[StepTransfers](
            self._client, TransferRules(True, False, 5.0, self._groups),
            StepTransfers, lambda name, by: self.counts.update({name: by}), self._forget, None,
        )  # fmt: skip
        self._free = list(range(1, num_blocks))
        """The last one freed is given away first."""
        self._num_blocks, self._made = num_blocks, 0
        self.requests: dict[str, Running] = {}
        self._held: dict[str, Running] = {}
        """Requests that are over, and whose blocks puts or a load may still use."""
        self.wrong: list[tuple[str, int, int]] = []

    def wait_ready(self) -> None:
        """Return once the server knows the device, taking the ends of what was under way."""
        eventually(lambda: (self._client.match(bytes(16)), self._client.is_ready)[1])

    def arrive(self, keys: bytes) -> None:
        """Add a request for a prompt."""
        self._made += 1
        prompt = self._client.new_prompt()
        prompt.keys[:] = keys
        name = str(self._made)
        transfers = RequestTransfers(name, prompt, self._client.generation)
        self.requests[name] = Running(name, keys, transfers)

    def keys(self, tokens: NDArray[np.int64]) -> bytes:
        """Return the keys of a prompt."""
        return self._client.keys(tokens)

    def step(self) -> None:
        """Schedule one step, and run it."""
        self._transfers.poll()
        computing = [
            (request, end)
            for request in list(self.requests.values())
            if not request.is_loading and (end := self._schedule(request)) is not None
        ]
        for request, end in computing:
            self._put(request, end)
        step = self._transfers.make_step()
        for request, end in computing:
            self._forward(request, end)
        self._agent.ready(step.loads, to_device=True)
        self._agent.ready(step.puts)
        self._agent.settle(step.settle)
        self._report(step)
        if self.requests and self._chance.random() < 0.03:
            self._abort(self._chance.choice(list(self.requests.values())))
        self._preempt_one()

    # -- scheduling -----------------------------------------------------------------------------

    def _schedule(self, request: Running) -> int | None:
        """Allocate blocks to a request; return where its chunk ends, None if it has none."""
        if not request.computed and request.transfers.may_load and self._load(request):
            return None
        self._free_unneeded(request)
        end = min(request.blocks, request.computed + UNIT * self._chance.randint(1, 4))
        if self._wanted(request.computed, end) > len(self._free):
            return None
        fresh: list[int] = []
        for group, ids in enumerate(request.ids):
            for own in range(len(ids), end // self._ratio[group]):
                is_last = own == end // self._ratio[group] - 1
                ids.append(self._free.pop() if group != STATE or is_last else 0)
                fresh += ids[-1:] if group else []
        request.transfers.block_ids = list(request.ids[CHAIN])
        self._transfers.written(request.transfers, request.computed, fresh)
        return end

    def _wanted(self, begin: int, end: int) -> int:
        counts = [end // ratio - begin // ratio for ratio in self._ratio]
        return sum(counts) - counts[STATE] + 1

    def _free_unneeded(self, request: Running) -> None:
        """Free the leaves that nothing to be computed needs."""
        for group in LEAVES:
            needed = self._groups.needed(group, request.computed)
            own = {at // self._ratio[group] for at in needed}
            for number, block in enumerate(request.ids[group]):
                if block and number not in own:
                    request.ids[group][number] = 0
                    self._free.append(block)

    def _load(self, request: Running) -> bool:
        """Begin a load, if there is something to load and room for it."""
        wanted = self._groups.wanted(request.blocks * PER_BLOCK)
        part = PromptPart(request.transfers.prompt, wanted)
        found = self._client.match(part, hold=True)
        request.transfers.junction_blocks = found.chain if found.chain > found.blocks else 0
        needed = {group: self._groups.needed(group, found.blocks) for group in LEAVES}
        count = found.blocks + sum(map(len, needed.values()))
        if not found.blocks or count > len(self._free):
            self._client.release([found.number])
            request.transfers.may_load = bool(found.blocks)
            return bool(found.blocks)
        request.ids[CHAIN] = [self._free.pop() for _ in range(found.blocks)]
        for group, positions in needed.items():
            ratio = self._ratio[group]
            request.ids[group] = [0] * (found.blocks // ratio)
            for at in positions:
                request.ids[group][at // ratio] = self._free.pop()
        request.transfers.found, request.is_loading = found, True
        request.computed = found.blocks
        self._transfers.load(request.transfers, request.ids, found.blocks)
        self.counts["offered"] += 1
        return True

    def _put(self, request: Running, end: int) -> None:
        """Store what the step completes, and the leaves of the boundaries that it passes."""
        transfers = request.transfers
        tokens = request.blocks * PER_BLOCK
        ends = self._groups.boundaries(tokens, transfers.junction_blocks)
        leaves = [
            leaf
            for boundary in ends
            if request.computed < boundary <= end
            for leaf in self._groups.to_store(request.ids, boundary)
        ]
        if end in ends:
            leaves += self._groups.state(STATE, end * PER_BLOCK, request.ids[STATE][end - 1])
        if self._transfers.may_put(transfers, end, leaves):
            self._transfers.put(transfers, PromptPart(transfers.prompt, end), leaves)

    def _forward(self, request: Running, end: int) -> None:
        """Compute blocks: write their bytes. What a prefix needs must be right before."""
        for group, ids in enumerate(request.ids):
            first, last = request.computed // self._ratio[group], end // self._ratio[group]
            for own in range(first, last):
                if ids[own]:
                    position = (own + 1) * self._ratio[group] - 1
                    self._pages.write(group, ids[own], *keys_at(request.keys, group, [position]))
        request.computed = end
        if end == request.blocks:
            self._over(request)

    # -- ends -----------------------------------------------------------------------------------

    def _report(self, step: StepTransfers) -> None:
        """Take what the workers report of a step."""
        assert not step.failed_blocks
        for name in step.received:
            request = self.requests.get(name)
            if request is None:
                self._release(self._held.pop(name))
                continue
            request.is_loading = False
            if name in step.failed:
                self.counts["failed"] += 1
                self._restart(request)
            else:
                self._check(request)
        for name in step.sent:
            self._release(self._held.pop(name))

    def _check(self, request: Running) -> None:
        """Check every byte that a load has brought."""
        self.counts["loaded"] += 1
        for group in (CHAIN, *LEAVES):
            end, ratio = request.computed, self._ratio[group]
            positions = range(end) if group == CHAIN else self._groups.needed(group, end)
            names = keys_at(request.keys, group, positions)
            for at, key in zip(positions, names, strict=True):
                if not self._pages.has(group, request.ids[group][at // ratio], key):
                    self.wrong.append((request.name, group, at))

    def _preempt_one(self) -> None:
        """Take all blocks from a request now and then, and whenever none can go on."""
        running = [each for each in self.requests.values() if each.computed and not each.is_loading]
        is_stuck = running and not self._free_enough(running)
        if not running or not (is_stuck or self._chance.random() < 0.05):
            return
        self.counts["preempted"] += 1
        self._restart(running[-1])
        running[-1].transfers.begins_anew(self._client.generation)

    def _free_enough(self, running: list[Running]) -> bool:
        """Return whether the next blocks of some request would find room."""
        least = min(self._wanted(each.computed, each.computed + UNIT) for each in running)
        return least <= len(self._free)

    def _restart(self, request: Running) -> None:
        self._release(request)
        request.computed, request.transfers.block_ids = 0, []
        request.transfers.stored_blocks = 0

    def _abort(self, request: Running) -> None:
        self.counts["aborted"] += 1
        self._over(request)

    def _over(self, request: Running) -> None:
        del self.requests[request.name]
        keeps = request.is_loading or bool(request.transfers.puts)
        if keeps:
            self._held[request.name] = request
        self._transfers.finish(request.transfers)
        if not keeps:
            self._release(request)

    def _release(self, request: Running) -> None:
        self._free += [block for ids in request.ids for block in ids if block]
        request.ids = [[] for _ in request.ids]

    def _forget(self, name: str) -> None:
        """Do nothing: a request is kept only as long as its blocks."""

    @property
    def is_idle(self) -> bool:
        """Return whether no request is left, and all blocks are free."""
        return not (self.requests or self._held) and len(self._free) == self._num_blocks - 1

    def close(self) -> None:
        """Disconnect."""
        self._client.close()
        self._agent.close()
