"""An engine with several KV groups at a real server; each block's bytes follow from its key."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.common.config import ModelConfig, Settings
from flexkv.common.config_model import LayerGroup
from flexkv.common.request import LeafBlocks, Operation
from flexkv.common.space import BlockSpace
from flexkv.common.terms import BLOCK_KEY_BYTES, positions_of
from flexkv.index.keys import leaf_keys
from flexkv.integration.common.kv_groups import KVGroups
from flexkv.server.agent import Agent
from flexkv.server.client import Client
from flexkv.server.wire import Done, Matched

from .serving import PER_BLOCK, eventually

DEVICE_BLOCKS = 96
STATE_BYTES, PADDING = 100, 28
"""The padding behind a state is not part of a block."""
CHAIN, WINDOW, STATE, CHUNK = range(4)
"""The model's KV groups."""
LEAVES = WINDOW, STATE, CHUNK
GROUP_MODEL = ModelConfig(
    num_layers=5,
    num_kv_heads=2,
    head_size=8,
    dtype="float16",
    layer_groups=(
        LayerGroup(num_layers=2, num_kv_heads=2, head_size=8, layer_indices=(1, 4)),
        LayerGroup(
            num_layers=1, num_kv_heads=1, head_size=8, layer_indices=(0,), kv_group=WINDOW,
            kind="sliding_window", window=10,
        ),
        LayerGroup(
            num_layers=1, layer_indices=(2,), kv_group=STATE, kind="state", state_bytes=STATE_BYTES
        ),
        LayerGroup(
            num_layers=1, num_kv_heads=2, head_size=4, layer_indices=(3,), kv_group=CHUNK,
            kind="chunked", window=24, tokens_per_block=2 * PER_BLOCK, dtype="float32",
        ),
    ),
)  # fmt: skip
"""Hits end on whole blocks of 8 tokens, which are two blocks of the chain."""


class GroupDevice:
    """The KV caches of one rank, whose blocks are filled and checked by their keys."""

    def __init__(self, spaces: Sequence[BlockSpace], rank: int = 0) -> None:
        """Allocate the tensors of all layers."""
        self._parts = [space.part_of(rank).number for space in spaces]
        by_layer: dict[int, NDArray[Any]] = {}
        self._rows: list[list[NDArray[np.uint8]]] = []
        """For each group and layer, the bytes of each block: uint8[blocks, planes, bytes]."""
        for space in spaces:
            rows = []
            for layer, shape, dtype in zip(space.layers, space.shapes, space.dtypes, strict=True):
                if space.group == STATE:
                    pages = np.full((DEVICE_BLOCKS, STATE_BYTES + PADDING), 0x5A, np.uint8)
                    part = pages[:, :STATE_BYTES]
                    by_layer[layer] = part.view(np.int8)[:, None, None]
                    rows.append(part[:, None])
                    self.pages = pages
                    continue
                planes = np.zeros(
                    (shape.kv_dim, DEVICE_BLOCKS, shape.tokens, shape.heads, shape.head_size), dtype
                )
                by_layer[layer] = planes
                raw = planes.view(np.uint8).reshape(shape.kv_dim, DEVICE_BLOCKS, -1)
                rows.append(raw.transpose(1, 0, 2))
            self._rows.append(rows)
        self.caches = [by_layer[layer] for layer in sorted(by_layer)]

    def fill(self, group: int, blocks: Iterable[int], keys: Iterable[bytes]) -> None:
        """Write the bytes of these keys into device blocks of a group."""
        for block, key in zip(blocks, keys, strict=True):
            for layer, rows in enumerate(self._rows[group]):
                rows[block] = self._content(group, key, layer)

    def wrong(self, group: int, blocks: Iterable[int], keys: Iterable[bytes]) -> int:
        """Return how many blocks have other bytes than those of their key."""
        return sum(
            any(
                (rows[block] != self._content(group, key, layer)).any()
                for layer, rows in enumerate(self._rows[group])
            )
            for block, key in zip(blocks, keys, strict=True)
        )

    def _content(self, group: int, key: bytes, layer: int) -> NDArray[np.uint8]:
        """Return the bytes of this rank's part of a layer of the block that has a key."""
        seed = int.from_bytes(key, "little"), layer, self._parts[group]
        shape = self._rows[group][layer][0].shape
        return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)

    def wipe(self) -> None:
        """Overwrite all blocks."""
        for rows in (each for group in self._rows for each in group):
            rows[:] = 0xEE

    @property
    def has_whole_padding(self) -> bool:
        """Return whether nothing was ever copied into the padding behind states."""
        return bool((self.pages[:, STATE_BYTES:] == 0x5A).all())


class GroupInstance:
    """An engine's scheduler and its workers, in this process."""

    def __init__(
        self,
        settings: Settings,
        number: int = 0,
        drops_last: bool = False,
        model: ModelConfig = GROUP_MODEL,
    ) -> None:
        """Create them; they connect with `begin`."""
        cache, spaces, ranks = settings.cache_config, model.spaces(PER_BLOCK), range(model.tp_size)
        self.devices = [GroupDevice(spaces, rank) for rank in ranks]
        self.groups = KVGroups(spaces, 2 * PER_BLOCK, drops_last)
        address = settings.server_recv_port
        self.agents = [Agent(address, model, cache, number, rank) for rank in ranks]
        self.client = Client(settings, model, number)
        self._ends: dict[int, Done] = {}

    def begin(self) -> None:
        """Lend the caches, and wait until requests can be served."""
        for agent, device in zip(self.agents, self.devices, strict=True):
            agent.start(device.caches)
        self.wait_ready()

    def wipe(self) -> None:
        """Overwrite all device blocks."""
        for device in self.devices:
            device.wipe()

    def ready(self, number: int) -> None:
        """Report on every rank that a put's blocks are written."""
        for agent in self.agents:
            agent.ready([number])

    def _fill(self, group: int, blocks: NDArray[np.int64], keys: Sequence[bytes]) -> None:
        for device in self.devices:
            device.fill(group, blocks, keys)

    def wait_ready(self) -> None:
        """Return once requests can be served."""
        eventually(lambda: (self.client.poll(), self.client.is_ready)[1])

    def keys(self, prompt: int, blocks: int, shared: int = 0) -> bytes:
        """Return the keys of a prompt that shares its first `shared` blocks with all others."""
        tokens = np.arange(blocks * PER_BLOCK) + 10_000 * prompt
        tokens[: shared * PER_BLOCK] = np.arange(shared * PER_BLOCK)
        return self.client.keys(tokens)

    def begin_put(self, keys: bytes, blocks: int, ends: Iterable[int] = (), at: int = 0) -> int:
        """Begin a put of the first blocks, with what prefixes that end at `ends` need.

        It reads device blocks from `at` on; they are filled before.
        """
        ids = np.arange(blocks) + at
        self._fill(CHAIN, ids, keys_at(keys, CHAIN, range(blocks)))
        leaves = []
        for group in LEAVES:
            needed = {place for end in ends for place in self.groups.needed(group, end)}
            if needed:
                places = np.array(sorted(needed))
                self._fill(group, places + at, keys_at(keys, group, places))
                leaves.append(LeafBlocks(group, positions_of(places), places + at))
        part = keys[: (blocks + 1) * BLOCK_KEY_BYTES]
        return self.client.put(part, 0, ids, self.client.generation, leaves=leaves)

    def put(self, keys: bytes, blocks: int, ends: Iterable[int] = (), at: int = 0) -> Done:
        """Run such a put, and return its end."""
        number = self.begin_put(keys, blocks, ends, at)
        self.ready(number)
        return self.end_of(number)

    def begin_get(self, keys: bytes, matched: Matched, first: int = 0, at: int = 40) -> int:
        """Begin a get of what was matched, into device blocks from `at` on."""
        end = matched.blocks
        leaves = []
        for group in LEAVES:
            needed = self.groups.needed(group, end, first)
            if needed:
                places = np.array(needed)
                leaves.append(LeafBlocks(group, positions_of(places), places % 40 + at))
        ids = np.arange(first, end) % 40 + at
        part = keys[: (end + 1) * BLOCK_KEY_BYTES]
        return self.client.get(part, first, ids, matched.number, False, leaves)

    def get(self, keys: bytes, matched: Matched, first: int = 0, at: int = 40) -> Done:
        """Run such a get, compare every byte if it moved anything, and return its end."""
        done = self.end_of(self.begin_get(keys, matched, first, at))
        end = matched.blocks
        assert done.moved in (0, end - first), done
        if done.moved:
            for group in (CHAIN, *LEAVES):
                needed: Sequence[int] = range(first, end)
                if group != CHAIN:
                    needed = self.groups.needed(group, end, first)
                blocks = [place % 40 + at for place in needed]
                wanted = keys_at(keys, group, needed)
                for rank, device in enumerate(self.devices):
                    assert device.wrong(group, blocks, wanted) == 0, (group, rank)
        assert all(device.has_whole_padding for device in self.devices)
        return done

    def match(self, keys: bytes, first: int = 0) -> Matched:
        """Return what is found of a prompt, with a hold on it."""
        return self.client.match(keys, first, hold=True, drop=self.groups.drop)

    def end_of(self, number: int) -> Done:
        """Wait for the end of a request, and return it."""

        def look() -> bool:
            self._ends |= {done.number: done for done in self.client.poll()}
            return number in self._ends

        eventually(look)
        return self._ends[number]

    def run(self, operation: Operation, keys: bytes, first: int = 0) -> Done:
        """Run a request without device blocks, and return its end."""
        return self.end_of(self.client.start(operation, keys, first, None))

    def close(self) -> None:
        """Disconnect."""
        self.client.close()
        for agent in self.agents:
            agent.close()


def keys_at(keys: bytes, group: int, positions: Iterable[int]) -> list[bytes]:
    """Return the keys of a group's blocks at some positions of the chain."""
    own = leaf_keys(keys, group)
    return [own[(at + 1) * 16 : (at + 2) * 16] for at in positions]
