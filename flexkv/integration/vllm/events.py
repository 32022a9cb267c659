"""KV events: what FlexKV holds of this engine's prompts, in vLLM's terms, for routers.

A block is announced under vLLM's own hash, in the medium of its tier, once its bytes are there and
its parent has been announced. It is withdrawn when it is gone. If this engine has never seen a
block's tokens (another engine or an earlier run stored it), it is announced when a prompt with it
is looked up.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Any, NamedTuple

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, maybe_convert_block_hash

from flexkv.index.keys import block_keys
from flexkv.server.wire import Changed

# Later versions of vLLM tag extra keys for hashing, but not in events.
_untagged = getattr(
    sys.modules[generate_block_hash_extra_keys.__module__], "to_event_extra_keys", list
)

MEDIA = {"host": "CPU", "disk": "STORAGE"}
"""vLLM's names of FlexKV's tiers."""
TAKEN_MAX = 8192
"""Maximum number of a lost server's blocks that are withdrawn in one step."""


class _Facts(NamedTuple):
    """What an event says about a block."""

    block_hash: Any
    parent_hash: Any
    tokens: array[int]
    extra_keys: Any
    lora_id: int | None
    lora_name: str | None


class _Block:
    """A block of a prompt that this engine has seen.

    Attributes:
        source: the request that made it known, and its number there; None once there are facts.
        there: the media in which it is.
        announced: the media in which it has been announced.
        children: the keys of the blocks that continue it.
        requests: how many running requests have it.
        facts: what an event says about it; None until that is needed.
    """

    __slots__ = ("announced", "children", "facts", "parent", "requests", "source", "there")

    def __init__(self, source: tuple[Any, int], parent: bytes | None) -> None:
        self.source: tuple[Any, int] | None = source
        self.facts: _Facts | None = None
        self.parent = parent
        self.there: tuple[str, ...] = ()
        self.announced: tuple[str, ...] = ()
        self.children: set[bytes] | None = None
        self.requests = 0


def _facts(request: Any, number: int, block_size: int) -> _Facts:
    convert = maybe_convert_block_hash
    first, last = number * block_size, (number + 1) * block_size
    extra_keys, _ = generate_block_hash_extra_keys(request, first, last, 0)
    untagged = _untagged([extra_keys])
    lora = request.lora_request
    return _Facts(
        convert(request.block_hashes[number]),
        convert(request.block_hashes[number - 1]) if number else None,
        array("q", request.all_token_ids[first:last]),
        untagged[0] if untagged else None,
        None if lora is None else lora.adapter_id,
        None if lora is None else lora.name,
    )


class KVEvents:
    """vLLM's events, made from the changes that the server reports."""

    def __init__(self, block_size: int) -> None:
        """Start without blocks; `block_size` is vLLM's, in tokens."""
        self._block_size = block_size
        self._blocks: dict[bytes, _Block] = {}
        self._events: list[Any] = []
        self._stale: dict[tuple[Any, str], None] = {}
        """Announced blocks of a lost server, yet to be withdrawn: hash and medium."""

    def note(self, request: Any, keys: bytes, known: int) -> int:
        """Add the blocks of a request from the `known`-th on; return how many are known then.

        Args:
            request: vLLM's request.
            keys: FlexKV's keys of the request, the root first.
            known: how many of its blocks were known before.
        """
        names = block_keys(keys)[: len(request.block_hashes)]
        for number in range(known, len(names)):
            key, parent = names[number], names[number - 1] if number else None
            block = self._blocks.get(key)
            if block is None:
                block = self._blocks[key] = _Block((request, number), parent)
                if parent is not None:
                    above = self._blocks[parent]
                    above.children = above.children or set()
                    above.children.add(key)
            block.requests += 1
        return max(known, len(names))

    def forget(self, request: Any, keys: bytes, noted: int) -> None:
        """Record that a request is over, of which `noted` blocks are known."""
        for key in reversed(block_keys(keys)[:noted]):
            block = self._blocks[key]
            block.requests -= 1
            self._settle(key)
            if block.source is not None and block.source[0] is request and key in self._blocks:
                self._facts_of(block)  # it outlives the request

    def hear(self, changed: Changed) -> None:
        """Apply the changes that the server has reported."""
        if changed.lost:
            self._lose_all()
        for key, tier, is_there, group in changed.changes:
            block = self._blocks.get(key)
            if block is None or group:  # the prefix is told of by its chain
                continue
            medium = MEDIA.get(tier, tier.upper())  # a tier that is new has a medium of its own
            if is_there:
                if medium not in block.there:
                    block.there += (medium,)
                    self._announce(block)
                continue
            block.there = tuple(other for other in block.there if other != medium)
            if medium in block.announced:
                block.announced = tuple(other for other in block.announced if other != medium)
                self._tell_removed(self._facts_of(block).block_hash, medium)
            self._settle(key)

    def take(self) -> Iterable[Any]:
        """Return the events since the last call."""
        for _ in range(min(TAKEN_MAX, len(self._stale))):
            block_hash, medium = next(iter(self._stale))
            del self._stale[block_hash, medium]
            self._tell_removed(block_hash, medium)
        events, self._events = self._events, []
        return events

    # -- inside ---------------------------------------------------------------------------------

    def _facts_of(self, block: _Block) -> _Facts:
        if block.facts is None:
            assert block.source is not None
            block.facts, block.source = _facts(*block.source, self._block_size), None
        return block.facts

    def _announce(self, block: _Block) -> None:
        """Announce a block in its media if its parent is announced, then children that waited."""
        waiting = [block]
        while waiting:
            block = waiting.pop()
            if block.parent is not None and not self._blocks[block.parent].announced:
                continue
            fresh = [medium for medium in block.there if medium not in block.announced]
            if not block.announced:
                waiting += [self._blocks[child] for child in block.children or ()]
            for medium in fresh:
                block.announced += (medium,)
                self._tell_stored(self._facts_of(block), medium)

    def _tell_stored(self, facts: _Facts, medium: str) -> None:
        if self._stale.pop((facts.block_hash, medium), self) is None:
            return  # it is still announced
        last = self._events[-1] if self._events else None
        if (
            isinstance(last, BlockStored)
            and last.block_hashes[-1] == facts.parent_hash
            and (last.medium, last.lora_name) == (medium, facts.lora_name)
        ):
            last.block_hashes.append(facts.block_hash)
            last.token_ids.extend(facts.tokens)
            last.extra_keys.append(facts.extra_keys)
            return
        self._events.append(
            BlockStored(
                block_hashes=[facts.block_hash],
                parent_block_hash=facts.parent_hash,
                token_ids=list(facts.tokens),
                block_size=self._block_size,
                lora_id=facts.lora_id,
                medium=medium,
                lora_name=facts.lora_name,
                extra_keys=[facts.extra_keys],
            )
        )

    def _tell_removed(self, block_hash: Any, medium: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved) and last.medium == medium:
            last.block_hashes.append(block_hash)
        else:
            self._events.append(BlockRemoved(block_hashes=[block_hash], medium=medium))

    def _lose_all(self) -> None:
        """Withdraw all blocks, a limited number in each step, since there may be very many."""
        for block in self._blocks.values():
            for medium in block.announced:
                self._stale[self._facts_of(block).block_hash, medium] = None
            block.announced = block.there = ()
        for key in list(self._blocks):
            if key in self._blocks:
                self._settle(key)

    def _settle(self, key: bytes) -> None:
        """Forget a block that is nowhere and that nothing needs, then likewise its parents."""
        while not ((block := self._blocks[key]).requests or block.there or block.children):
            del self._blocks[key]
            if block.parent is None:
                return
            children = self._blocks[block.parent].children
            assert children is not None
            children.remove(key)
            key = block.parent
