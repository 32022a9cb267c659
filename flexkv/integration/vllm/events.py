"""KV events: what FlexKV holds of this engine's prompts, in vLLM's terms, for routers.

A block is announced under vLLM's own hash, in the medium of its tier, once its bytes are there and
its parent has been announced; and taken back when it is gone. Blocks of which this engine has never
seen the tokens (another's, or an earlier run's) are announced when a prompt asks for them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, maybe_convert_block_hash

from flexkv.index.keys import block_keys
from flexkv.server.wire import Changed

# Later vLLMs tag them for their hashes, and do not in events.
_untagged = getattr(
    sys.modules[generate_block_hash_extra_keys.__module__], "to_event_extra_keys", list
)

MEDIA = {"host": "CPU", "disk": "STORAGE"}
"""vLLM's names of FlexKV's tiers."""


class _Facts(NamedTuple):
    """What an event tells of a block."""

    block_hash: Any
    parent_hash: Any
    tokens: list[int]
    extra_keys: Any
    lora_id: int | None
    lora_name: str | None


class _Block:
    """A block of a prompt that this engine has seen.

    Attributes:
        there: the media in which it is.
        announced: those of which that was told.
        children: the blocks that continue it.
        requests: how many that are running have it.
    """

    __slots__ = ("_facts", "_source", "announced", "children", "parent", "requests", "there")

    def __init__(self, request: Any, number: int, block_size: int, parent: bytes | None) -> None:
        self._source: tuple[Any, int, int] | None = (request, number, block_size)
        self._facts: _Facts | None = None
        self.parent = parent
        self.there, self.announced = dict[str, None](), set[str]()
        self.children = dict[bytes, None]()
        self.requests = 0

    @property
    def facts(self) -> _Facts:
        """Give what there is to tell; asked for once at least while a request has the block."""
        if self._facts is None:
            assert self._source is not None
            self._facts, self._source = _facts(*self._source), None
        return self._facts


def _facts(request: Any, number: int, block_size: int) -> _Facts:
    convert = maybe_convert_block_hash
    first, last = number * block_size, (number + 1) * block_size
    extra_keys, _ = generate_block_hash_extra_keys(request, first, last, 0)
    untagged = _untagged([extra_keys])
    lora = request.lora_request
    return _Facts(
        convert(request.block_hashes[number]),
        convert(request.block_hashes[number - 1]) if number else None,
        list(request.all_token_ids[first:last]),
        untagged[0] if untagged else None,
        None if lora is None else lora.adapter_id,
        None if lora is None else lora.name,
    )


class KVEvents:
    """Makes vLLM's events of what the server tells."""

    def __init__(self, block_size: int) -> None:
        """Take vLLM's block size, in tokens."""
        self._block_size = block_size
        self._blocks: dict[bytes, _Block] = {}
        self._events: list[Any] = []

    def note(self, request: Any, keys: bytes, known: int) -> int:
        """Take the blocks of a request from the `known`-th on; gives how many are known then.

        Args:
            request: vLLM's.
            keys: FlexKV's, of its blocks, the root first.
            known: how many blocks of it have been noted.
        """
        names = block_keys(keys)[: len(request.block_hashes)]
        for number in range(known, len(names)):
            key, parent = names[number], names[number - 1] if number else None
            block = self._blocks.get(key)
            if block is None:
                block = _Block(request, number, self._block_size, parent)
                self._blocks[key] = block
                if parent is not None:
                    self._blocks[parent].children[key] = None
            block.requests += 1
        return max(known, len(names))

    def forget(self, keys: bytes, noted: int) -> None:
        """Take that a request is over which has noted so many blocks."""
        for key in reversed(block_keys(keys)[:noted]):
            self._blocks[key].requests -= 1
            self._drop_if_nowhere(key)

    def hear(self, changed: Changed) -> None:
        """Take what the server has told."""
        if changed.lost:
            self._take_all_back()
        for key, tier, is_there in changed.changes:
            block = self._blocks.get(key)
            if block is None:
                continue
            medium = MEDIA[tier]
            if is_there:
                block.there[medium] = None
                self._announce(block)
                continue
            block.there.pop(medium, None)
            if medium in block.announced:
                block.announced.remove(medium)
                self._tell_removed(block.facts, medium)
            self._drop_if_nowhere(key)

    def take(self) -> Iterable[Any]:
        """Give the events since the last call."""
        events, self._events = self._events, []
        return events

    # -- inside ---------------------------------------------------------------------------------

    def _announce(self, block: _Block) -> None:
        """Announce a block where it is, if its parent is announced; then what waited for that."""
        waiting = [block]
        while waiting:
            block = waiting.pop()
            if block.parent is not None and not self._blocks[block.parent].announced:
                continue
            fresh = [medium for medium in block.there if medium not in block.announced]
            if fresh and not block.announced:
                waiting += [self._blocks[child] for child in block.children]
            for medium in fresh:
                block.announced.add(medium)
                self._tell_stored(block.facts, medium)

    def _tell_stored(self, facts: _Facts, medium: str) -> None:
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

    def _tell_removed(self, facts: _Facts, medium: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved) and last.medium == medium:
            last.block_hashes.append(facts.block_hash)
        else:
            self._events.append(BlockRemoved(block_hashes=[facts.block_hash], medium=medium))

    def _take_all_back(self) -> None:
        for block in self._blocks.values():
            for medium in block.announced:
                self._tell_removed(block.facts, medium)
            block.announced.clear()
            block.there.clear()
        for key in list(self._blocks):
            if key in self._blocks:
                self._drop_if_nowhere(key)

    def _drop_if_nowhere(self, key: bytes) -> None:
        """Forget a block that is nowhere and that nothing needs, and so its parents."""
        while not ((block := self._blocks[key]).requests or block.there or block.children):
            del self._blocks[key]
            if block.parent is None:
                return
            del self._blocks[block.parent].children[key]
            key = block.parent
        if not block.requests:
            _ = block.facts  # its request goes
