"""Models with several KV groups for a simulation, and what their leaves must contain.

A block has 16 bytes in every group, like a key, of which its right content is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from math import lcm
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.common.config import LayerGroup, ModelConfig
from flexkv.common.request import Request
from flexkv.common.space import BlockSpace
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey
from flexkv.index.keys import block_keys, leaf_keys
from flexkv.index.residency import READY, Residency
from flexkv.testing.simulated_contents import content_of

TOKENS_PER_BLOCK = 2
GROUPS_MAX = 3
"""Most leaf groups of a simulated model."""


CHAIN: dict[str, Any] = {"num_layers": 1, "num_kv_heads": 1, "head_size": 4}
MODEL = ModelConfig(**CHAIN, dtype="int8")
"""A model with one KV group."""


def random_model(random: Random, leaf_groups: int) -> ModelConfig:
    """Return a model with this many leaf groups, of random kinds, windows and block sizes."""
    if not leaf_groups:
        return MODEL
    groups = [LayerGroup(**CHAIN)]
    for number in range(1, leaf_groups + 1):
        ratio = random.choice([1, 1, 2])
        common: dict[str, Any] = {
            "num_layers": 1,
            "kv_group": number,
            "tokens_per_block": ratio * TOKENS_PER_BLOCK,
        }
        kind = random.choice(["full", "sliding_window", "sliding_window", "chunked", "state"])
        if kind == "state":
            groups.append(LayerGroup(kind=kind, state_bytes=BLOCK_KEY_BYTES, **common))
            continue
        heads = {"num_kv_heads": 1, "head_size": 4 // ratio}
        window = 0 if kind == "full" else random.randint(1, 16)
        groups.append(LayerGroup(kind=kind, window=window, **heads, **common))
    return ModelConfig(
        **{**CHAIN, "num_layers": len(groups)}, dtype="int8", layer_groups=tuple(groups)
    )


class SimulatedGroups:
    """The leaf groups of a simulated model.

    Attributes:
        spaces: what a block of each leaf group is.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.spaces = model.spaces(TOKENS_PER_BLOCK)[1:]
        self._alignment = lcm(*(each.tokens_per_block // TOKENS_PER_BLOCK for each in self.spaces))

    def begin(self, token: int) -> int:
        """Return where a get's mask may begin, at this token or before it."""
        unit = self._alignment * TOKENS_PER_BLOCK
        return token // unit * unit if self._alignment > 1 else token

    def keys_of(self, keys: bytes) -> set[BlockKey]:
        """Return the keys of all blocks that a prompt can have, those of the chain included."""
        leaves = [block_keys(leaf_keys(keys, space.group)) for space in self.spaces]
        return {*block_keys(keys), *[key for each in leaves for key in each]}

    def leaves_of(self, keys: bytes, blocks: int) -> list[BlockKey]:
        """Return the keys of all leaves that the first blocks of a prompt can have."""
        leaves = []
        for space in self.spaces:
            ratio = space.tokens_per_block // TOKENS_PER_BLOCK
            leaves += block_keys(leaf_keys(keys, space.group))[ratio - 1 : blocks : ratio]
        return leaves

    def there(self, residency: Residency, keys: bytes) -> Iterator[tuple[int, BlockKey]]:
        """Yield each leaf of a prompt that is READY in some tier: its position and its key."""
        last = len(keys) // BLOCK_KEY_BYTES - 1
        for space in self.spaces:
            of_group = block_keys(leaf_keys(keys, space.group))
            for alike in residency.survey(keys, 0, last, False, space.group):
                if READY in alike.states:
                    yield from ((position, of_group[position]) for position in alike.positions)

    def longest(self, keys: bytes, there: Set[BlockKey], end: int = 1 << 30) -> int:
        """Return where the longest prefix ends, at `end` at most, whose blocks are all there."""
        chain = [key in there for key in block_keys(keys)]
        leaves = [
            [key in there for key in block_keys(leaf_keys(keys, space.group))]
            for space in self.spaces
        ]
        last = min(end, (*chain, False).index(False)) // self._alignment * self._alignment
        for tried in range(last, 0, -self._alignment):
            if all(
                all(of_group[at] for at in self._needed(space, tried))
                for space, of_group in zip(self.spaces, leaves, strict=True)
            ):
                return tried
        return 0

    def needed(self, keys: bytes, end: int) -> list[BlockKey]:
        """Return the keys of the blocks that the longest prefix of some chain blocks needs."""
        end -= end % self._alignment
        needed = block_keys(keys)[:end]
        for space in self.spaces:
            of_group = block_keys(leaf_keys(keys, space.group))
            needed += [of_group[at] for at in self._needed(space, end)]
        return needed

    def _needed(self, space: BlockSpace, end: int) -> list[int]:
        """Return the positions of the leaves of a group that a prefix needs."""
        ratio = space.tokens_per_block // TOKENS_PER_BLOCK
        return [(own + 1) * ratio - 1 for own in range(*space.needed(end * TOKENS_PER_BLOCK))]

    def wanted(self, space: BlockSpace, request: Request, end: int) -> range:
        """Return which of a group's blocks a request's longest prefix up to `end` needs."""
        ratio = space.tokens_per_block // TOKENS_PER_BLOCK
        begin, last = space.needed(end // self._alignment * self._alignment * TOKENS_PER_BLOCK)
        return range(max(begin, request.span.first_block // ratio), last)


def slot_mapping(request: Request, slots: list[int]) -> NDArray[np.int64]:
    """Return slots for the selected tokens; those outside whole blocks get any legal slot."""
    span = request.span
    mapping = np.zeros(span.last_token - span.first_token, np.int64)
    skip = span.first_block * TOKENS_PER_BLOCK - span.first_token
    for number, slot in enumerate(slots):
        begin = skip + number * TOKENS_PER_BLOCK
        first = slot * TOKENS_PER_BLOCK
        mapping[begin : begin + TOKENS_PER_BLOCK] = range(first, first + TOKENS_PER_BLOCK)
    return mapping


class LeafSlots:
    """The device slots of one request's leaves.

    Attributes:
        slots: those of each group, by the number of its block in the prompt.
    """

    def __init__(self, groups: SimulatedGroups, request: Request) -> None:
        self._groups, self._request = groups, request
        self.slots: list[dict[int, int]] = [{} for _ in groups.spaces]

    def choose(self, random: Random, end: int, is_put: bool, free: list[int]) -> bool:
        """Take slots for the leaves that a request is to move; return False if there are too few.

        A get mostly has all that its prefix needs. A put has all leaves, those that one of the
        prefixes needs, or any.
        """
        for space, slots in zip(self._groups.spaces, self.slots, strict=True):
            own = self._own(space)
            wanted: Iterable[int] = self._groups.wanted(space, self._request, end)
            if is_put:
                some = [number for number in own if random.random() < 0.5]
                wanted = random.choice([own, own, wanted, wanted, wanted, some])
            elif random.random() < 0.05:
                wanted = [number for number in wanted if random.random() < 0.8]
            for number in wanted:
                if not free:
                    return False
                if number in own:
                    slots[number] = free.pop()
        return True

    def choose_all(self, free: list[int]) -> bool:
        """Take a slot for every leaf of the request; return False if there are too few."""
        for space, slots in zip(self._groups.spaces, self.slots, strict=True):
            for number in self._own(space):
                if not free:
                    return False
                slots[number] = free.pop()
        return True

    def _own(self, space: BlockSpace) -> range:
        """Return the blocks of a group that are whole inside a request's span."""
        per_block, span = space.tokens_per_block, self._request.span
        first = -(-span.first_token // per_block)
        return range(first, max(first, span.last_token // per_block))

    @property
    def all_slots(self) -> list[int]:
        """Return every slot."""
        return [slot for slots in self.slots for slot in slots.values()]

    def mappings(self) -> list[NDArray[np.int64]]:
        """Return the slot mapping of each group, over the selected tokens."""
        span, mappings = self._request.span, []
        for space, slots in zip(self._groups.spaces, self.slots, strict=True):
            per_block = space.tokens_per_block
            mapping = np.full(span.last_token, -1)
            for number, slot in slots.items():
                begin = number * per_block
                mapping[begin : begin + per_block] = slot * per_block + np.arange(per_block)
            mappings.append(mapping[span.first_token :])
        return mappings

    def contents(self, generation: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield the slot of each leaf, and what it must contain in a generation."""
        for _, _, slot, key in self._each(self.slots):
            yield slot, content_of(key, generation)

    def check(
        self,
        device: NDArray[np.uint8],
        end: int,
        is_right: Callable[[BlockKey, NDArray[np.uint8]], bool],
    ) -> None:
        """Check that a device has every leaf that a prefix of `end` chain blocks needs."""
        needed: Sequence[dict[int, int]] = [
            {
                number: slots.get(number, -1)
                for number in self._groups.wanted(space, self._request, end)
            }
            for space, slots in zip(self._groups.spaces, self.slots, strict=True)
        ]
        for index, number, slot, key in self._each(needed):
            assert slot >= 0, f"block {number} of leaf group {index} was not asked for"
            assert is_right(key, device[slot]), f"wrong bytes in leaf group {index}"

    def _each(self, of: Sequence[dict[int, int]]) -> Iterator[tuple[int, int, int, BlockKey]]:
        for index, (space, slots) in enumerate(zip(self._groups.spaces, of, strict=True)):
            keys = block_keys(leaf_keys(self._request.keys, space.group))
            ratio = space.tokens_per_block // TOKENS_PER_BLOCK
            for number, slot in slots.items():
                yield index, number, slot, keys[(number + 1) * ratio - 1]
