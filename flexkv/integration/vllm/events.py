"""KV events: what FlexKV holds of this engine's prompts, in vLLM's terms, for routers.

A block is announced under vLLM's own hash, in the medium of its tier, once its bytes are there and
its parent has been announced. It is withdrawn when it is gone. If this engine has never seen a
block's tokens (another engine or an earlier run stored it), it is announced when a prompt with it
is looked up.

With several KV groups, each event names its group, as vLLM's own events do. The blocks of further
groups are announced behind their parent, the block of the prefix chain at their position.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Any, NamedTuple

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, maybe_convert_block_hash

from flexkv.index.keys import block_keys
from flexkv.integration.vllm.groups import EngineGroups
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


class _Group(NamedTuple):
    """What events say about a KV group; one of its blocks covers `ratio` blocks of the chain.

    If one of vLLM's groups is several of FlexKV's, events report only the last of these.
    """

    number: int | None
    kind: str | None
    window: int | None
    ratio: int
    is_told: bool = True


Place = tuple[int, str]
"""FlexKV's KV group, and a medium."""


class _Block:
    """A block of the chain of a prompt that this engine has seen, with its leaves.

    Attributes:
        source: the request that made it known, and its number there; None once there are facts.
        there: where the block or a leaf of it is: its group, and a medium.
        announced: those in which it has been announced.
        children: the keys of the blocks that continue it.
        requests: how many running requests have it.
        facts: what an event says about it; None until that is needed.
    """

    __slots__ = ("announced", "children", "facts", "parent", "requests", "source", "there")

    def __init__(self, source: tuple[Any, int], parent: bytes | None) -> None:
        self.source: tuple[Any, int] | None = source
        self.facts: _Facts | None = None
        self.parent = parent
        self.there: tuple[Place, ...] = ()
        self.announced: tuple[Place, ...] = ()
        self.children: set[bytes] | None = None
        self.requests = 0

    @property
    def is_known(self) -> bool:
        """Return whether the block of the chain itself has been announced."""
        return any(group == 0 for group, _ in self.announced)


def _facts(request: Any, number: int, block_size: int, hashes: int) -> _Facts:
    """Return the facts of a request's block, to which belong `hashes` of vLLM's hashes."""
    convert = maybe_convert_block_hash
    first, last = number * block_size, (number + 1) * block_size
    extra_keys, _ = generate_block_hash_extra_keys(request, first, last, 0)
    untagged = _untagged([extra_keys])
    lora = request.lora_request
    return _Facts(
        convert(request.block_hashes[(number + 1) * hashes - 1]),
        convert(request.block_hashes[number * hashes - 1]) if number else None,
        array("q", request.all_token_ids[first:last]),
        untagged[0] if untagged else None,
        None if lora is None else lora.adapter_id,
        None if lora is None else lora.name,
    )


class KVEvents:
    """vLLM's events, made from the changes that the server reports."""

    def __init__(self, block_size: int, groups: EngineGroups | None = None) -> None:
        """Start without blocks.

        Args:
            block_size: of the prefix chain, in tokens.
            groups: the engine's KV groups, if it has several.
        """
        self._block_size = block_size
        self._hashes = 1 if groups is None else block_size // groups.hash_tokens
        self._groups = [_Group(None, None, None, 1)] if groups is None else _told(groups)
        self._blocks: dict[bytes, _Block] = {}
        self._events: list[Any] = []
        self._stale: dict[tuple[Any, Place], None] = {}
        """Announced blocks of a lost server, yet to be withdrawn: hash, group and medium."""

    def note(self, request: Any, keys: bytes, known: int) -> int:
        """Add the blocks of a request from the `known`-th on; return how many are known then.

        Args:
            request: vLLM's request.
            keys: FlexKV's keys of the request, the root first.
            known: how many of its blocks were known before.
        """
        names = block_keys(keys)[: len(request.block_hashes) // self._hashes]
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
            if block is None or group >= len(self._groups) or not self._groups[group].is_told:
                continue
            # A tier that is new has a medium of its own.
            place = group, MEDIA.get(tier, tier.upper())
            if is_there:
                if place not in block.there:
                    block.there += (place,)
                    self._announce(block)
                continue
            block.there = tuple(other for other in block.there if other != place)
            if place in block.announced:
                block.announced = tuple(other for other in block.announced if other != place)
                self._tell_removed(self._facts_of(block).block_hash, place)
            self._settle(key)

    def take(self) -> Iterable[Any]:
        """Return the events since the last call."""
        for _ in range(min(TAKEN_MAX, len(self._stale))):
            block_hash, place = next(iter(self._stale))
            del self._stale[block_hash, place]
            self._tell_removed(block_hash, place)
        events, self._events = self._events, []
        return events

    # -- inside ---------------------------------------------------------------------------------

    def _facts_of(self, block: _Block) -> _Facts:
        if block.facts is None:
            assert block.source is not None
            facts = _facts(*block.source, self._block_size, self._hashes)
            block.facts, block.source = facts, None
        return block.facts

    def _facts_in(self, block: _Block, ratio: int) -> _Facts:
        """Return the facts of a group's block that ends with this one and covers some before it."""
        facts = self._facts_of(block)
        tokens = [facts.tokens]
        for _ in range(ratio - 1):
            assert block.parent is not None
            block = self._blocks[block.parent]
            tokens.insert(0, self._facts_of(block).tokens)
        first = self._facts_of(block)
        all_tokens = array("q", [token for part in tokens for token in part])
        return facts._replace(parent_hash=first.parent_hash, tokens=all_tokens)

    def _announce(self, block: _Block) -> None:
        """Announce a block where it is if its parent is announced, then children that waited."""
        waiting = [block]
        while waiting:
            block = waiting.pop()
            if block.parent is not None and not self._blocks[block.parent].is_known:
                continue
            if not block.is_known:
                waiting += [self._blocks[child] for child in block.children or ()]
            for place in block.there:
                if place[0] == 0 and place not in block.announced:
                    self._tell_stored(block, place)
            for place in block.there:
                if place not in block.announced and block.is_known:
                    self._tell_stored(block, place)

    def _tell_stored(self, block: _Block, place: Place) -> None:
        block.announced += (place,)
        group = self._groups[place[0]]
        facts = self._facts_in(block, group.ratio) if group.ratio > 1 else self._facts_of(block)
        if self._stale.pop((facts.block_hash, place), self) is None:
            return  # it is still announced
        last, medium = self._events[-1] if self._events else None, place[1]
        if (
            isinstance(last, BlockStored)
            and last.block_hashes[-1] == facts.parent_hash
            and (last.medium, last.lora_name) == (medium, facts.lora_name)
            and getattr(last, "group_idx", None) == group.number
        ):
            last.block_hashes.append(facts.block_hash)
            last.token_ids.extend(facts.tokens)
            assert last.extra_keys is not None
            last.extra_keys.append(facts.extra_keys)
            return
        self._events.append(
            BlockStored(
                block_hashes=[facts.block_hash],
                parent_block_hash=facts.parent_hash,
                token_ids=list(facts.tokens),
                block_size=self._block_size * group.ratio,
                lora_id=facts.lora_id,
                medium=medium,
                lora_name=facts.lora_name,
                extra_keys=[facts.extra_keys],
                **_of_group(
                    group_idx=group.number,
                    kv_cache_spec_kind=group.kind,
                    kv_cache_spec_sliding_window=group.window,
                ),
            )
        )

    def _tell_removed(self, block_hash: Any, place: Place) -> None:
        last, index = self._events[-1] if self._events else None, self._groups[place[0]].number
        if (
            isinstance(last, BlockRemoved)
            and last.medium == place[1]
            and getattr(last, "group_idx", None) == index
        ):
            last.block_hashes.append(block_hash)
        else:
            more = _of_group(group_idx=index)
            self._events.append(BlockRemoved(block_hashes=[block_hash], medium=place[1], **more))

    def _lose_all(self) -> None:
        """Withdraw all blocks, a limited number in each step, since there may be very many."""
        for block in self._blocks.values():
            for place in block.announced:
                self._stale[self._facts_of(block).block_hash, place] = None
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


def _told(groups: EngineGroups) -> list[_Group]:
    """Return what events say about each of FlexKV's groups."""
    return [
        _Group(source.engine_id, name, groups.shape(group).window or None,
               groups.block_tokens(group) // groups.tokens_per_block,
               source.first == source.step - 1)
        for group, (source, name) in enumerate(zip(groups.sources, groups.names, strict=True))
    ]  # fmt: skip


def _of_group(**facts: Any) -> dict[str, Any]:
    """Return the facts that are known; earlier versions of vLLM have no fields for them."""
    return {name: value for name, value in facts.items() if value is not None}
