"""Tests that KV events agree with the blocks that exist, in whatever order things happen."""

from __future__ import annotations

import gc
import random
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.core import kv_cache_utils

from flexkv import _ext
from flexkv.integration.vllm.events import MEDIA, KVEvents
from flexkv.integration.vllm.groups import EngineGroups, groups_of
from flexkv.server.wire import Changed

from .caches import engine, full, group, window

TIERS = [*MEDIA, "remote", "peer"]
"""Those that vLLM has names of, and others."""
PER_BLOCK, DEPTH = 4, 5
Path = tuple[int, ...]


def key_of(path: Path) -> bytes:
    """Return FlexKV's key of a block, given the choices up to it."""
    return _ext.hash128(repr(path).encode())


def prompt(path: Path) -> Any:
    """Return a vLLM request with a block for each choice."""
    return SimpleNamespace(
        block_hashes=[hash_of(path[: i + 1]) for i in range(len(path))],
        all_token_ids=[token for choice in path for token in [choice] * PER_BLOCK],
        lora_request=None, mm_features=[], cache_salt=None, prompt_embeds=None,
    )  # fmt: skip


def hash_of(path: Path) -> bytes:
    """Return vLLM's hash of a block."""
    return _ext.hash128(b"vllm" + repr(path).encode()) * 2


class Story:
    """A random sequence of requests and block changes, with a router that believes the events."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.events = KVEvents(PER_BLOCK)
        self.live: list[tuple[Any, Path, int]] = []
        self.there: set[tuple[Path, str]] = set()
        self.announced: dict[Any, set[str]] = {}

    def come(self) -> None:
        """Start a request, some of whose hashes may become known later."""
        path = tuple(self.chance.randrange(2) for _ in range(self.chance.randrange(DEPTH)))
        request = prompt(path)
        hashes = request.block_hashes
        request.block_hashes = hashes[: self.chance.randrange(len(path) + 1)]
        keys = bytes(16) + b"".join(key_of(path[: i + 1]) for i in range(len(path)))
        noted = self.events.note(request, keys, 0)
        if self.chance.random() < 0.5:
            request.block_hashes = hashes
            noted = self.events.note(request, keys, noted)
        self.live.append((request, path, noted))

    def go(self) -> None:
        """End a request."""
        if self.live:
            request, path, noted = self.live.pop(self.chance.randrange(len(self.live)))
            keys = bytes(16) + b"".join(key_of(path[: i + 1]) for i in range(len(path)))
            self.events.forget(request, keys, noted)

    def store(self) -> None:
        """Store blocks of a prompt in a tier, in any order, some of them again."""
        path = tuple(self.chance.randrange(2) for _ in range(DEPTH))
        tier = self.chance.choice(TIERS)
        blocks = [path[: i + 1] for i in range(self.chance.randrange(DEPTH))]
        self.chance.shuffle(blocks)
        self.there |= {(block, tier) for block in blocks}
        self.tell(*((block, tier, True) for block in blocks))

    def drop(self) -> None:
        """Drop a block from a tier; without another copy of it, the blocks behind it go too."""
        if not self.there:
            return
        path, tier = self.chance.choice(sorted(self.there))
        gone = [(path, tier)]
        if not any((path, other) in self.there for other in TIERS if other != tier):
            gone = sorted(one for one in self.there if one[0][: len(path)] == path)[::-1]
        self.there -= set(gone)
        self.tell(*((*one, False) for one in gone))

    def lose(self) -> None:
        """Lose the server."""
        self.there.clear()
        self.events.hear(Changed((), lost=True))

    def tell(self, *changes: tuple[Path, str, bool]) -> None:
        """Report changes as the server does."""
        self.events.hear(Changed(tuple((key_of(path), *rest, 0) for path, *rest in changes)))

    def check(self) -> None:
        """Process the events as a router does."""
        for event in self.events.take():
            if type(event).__name__ == "BlockRemoved":
                for name in event.block_hashes:
                    self.announced[name].remove(event.medium)
                continue
            parent = event.parent_block_hash
            for name in event.block_hashes:
                assert parent is None or self.announced[parent], "stored before its parent"
                media = self.announced.setdefault(name, set())
                assert event.medium not in media, "stored twice"
                media.add(event.medium)
                parent = name
            assert len(event.token_ids) == PER_BLOCK * len(event.block_hashes)
            assert len(event.extra_keys) == len(event.block_hashes)
        told = sum(map(len, self.announced.values()))
        assert told <= len(self.there)


@pytest.mark.parametrize("seed", range(200))
def test_a_router_believes_nothing_that_is_not_so(seed: int) -> None:
    """A router never believes in a block that is nowhere, and nothing is kept of ended requests."""
    story = Story(random.Random(seed))
    steps = [story.come, story.go, story.store, story.drop, story.lose]
    for _ in range(150):
        story.chance.choices(steps, [4, 3, 6, 4, 0.2])[0]()
        story.check()
    while story.live:
        story.go()
    while story.there:
        story.drop()
    story.check()
    assert not any(story.announced.values())
    assert story.events._blocks == {}


def test_what_was_lost_is_taken_back_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost blocks are removed in bounded steps; those that return first are not announced."""
    monkeypatch.setattr("flexkv.integration.vllm.events.TAKEN_MAX", 1)
    events, request = KVEvents(PER_BLOCK), prompt((0, 1, 0))
    keys = [key_of((0, 1, 0)[: i + 1]) for i in range(3)]
    assert events.note(request, bytes(16) + b"".join(keys), 0) == 3
    everything = Changed(tuple((key, "host", True, 0) for key in keys))
    events.hear(everything)
    (stored,) = events.take()
    assert len(stored.block_hashes) == 3
    events.hear(Changed((), lost=True))
    (removed,) = events.take()
    assert removed.block_hashes == stored.block_hashes[:1]
    events.hear(everything)
    (again,) = events.take()
    assert again.block_hashes == stored.block_hashes[:1]
    assert events.take() == []


class Held(SimpleNamespace):
    """A vLLM request that can have weak references."""


def test_a_request_that_is_over_is_not_kept_for_blocks_that_others_have() -> None:
    """Facts of shared blocks are copied when a request ends, so that the request can be freed."""
    events, path = KVEvents(PER_BLOCK), (0, 1, 0)
    keys = bytes(16) + b"".join(key_of(path[: i + 1]) for i in range(3))
    first, second = Held(**vars(prompt(path))), Held(**vars(prompt(path)))
    for request in (first, second):
        assert events.note(request, keys, 0) == 3
    third = prompt(path)
    events.note(third, keys, 0)
    events.forget(third, keys, 3)
    assert all(block.facts is None for block in events._blocks.values())
    hashes, seen = list(first.block_hashes), weakref.ref(first)
    events.forget(first, keys, 3)
    del first, request
    gc.collect()
    assert seen() is None
    events.hear(Changed(tuple((key_of(path[: i + 1]), "host", True, 0) for i in range(3))))
    (stored,) = events.take()
    assert stored.block_hashes == [kv_cache_utils.maybe_convert_block_hash(each) for each in hashes]
    events.forget(second, keys, 3)


def test_blocks_that_wait_for_their_parent_are_announced_behind_it() -> None:
    """A block that is there before its parent is announced once the parent is, and only once."""
    events, path = KVEvents(PER_BLOCK), (0, 1, 0)
    keys = [key_of(path[: i + 1]) for i in range(3)]
    request = prompt(path)
    events.note(request, bytes(16) + b"".join(keys), 0)
    events.hear(Changed(((keys[2], "disk", True, 0), (keys[1], "host", True, 0))))
    assert events.take() == []
    events.hear(Changed(((keys[0], "host", True, 0),)))
    first, second = events.take()
    convert = kv_cache_utils.maybe_convert_block_hash
    hashes = [convert(each) for each in request.block_hashes]
    assert (first.medium, first.block_hashes) == ("CPU", hashes[:2])
    assert (second.medium, second.block_hashes) == ("STORAGE", hashes[2:])
    events.hear(Changed(((keys[0], "disk", True, 0),)))
    (third,) = events.take()
    assert (third.medium, third.block_hashes) == ("STORAGE", hashes[:1])


def groups(leaf_tokens: int, hash_tokens: int = PER_BLOCK) -> EngineGroups:
    """Return groups of an engine that has windows first, and then full attention."""
    told = [
        group(window(8, block_size=leaf_tokens), "w"), group(full(block_size=PER_BLOCK), "f")
    ]  # fmt: skip
    caches = SimpleNamespace(kv_cache_groups=told, hash_block_size=hash_tokens)
    found = groups_of(caches, engine())
    assert found is not None
    return found


@pytest.mark.support("feature", "KV events", "served")
def test_events_name_the_group_as_vllm_does() -> None:
    """A leaf is announced behind its chain's block, with vLLM's index, kind and window."""
    events, path = KVEvents(PER_BLOCK, groups(PER_BLOCK)), (0, 1)
    keys = [key_of(path[: i + 1]) for i in range(2)]
    request = prompt(path)
    events.note(request, bytes(16) + b"".join(keys), 0)
    events.hear(Changed(((keys[1], "host", True, 1), (keys[1], "host", True, 0))))
    assert events.take() == []
    events.hear(Changed(((keys[0], "disk", True, 0),)))
    chain, second, leaf = events.take()
    hashes = [kv_cache_utils.maybe_convert_block_hash(each) for each in request.block_hashes]
    assert (chain.group_idx, chain.kv_cache_spec_kind) == (1, "full_attention")
    assert (second.medium, second.block_hashes, second.group_idx) == ("CPU", hashes[1:], 1)
    assert (leaf.block_hashes, leaf.parent_block_hash) == (hashes[1:], hashes[0])
    assert (leaf.group_idx, leaf.kv_cache_spec_kind) == (0, "sliding_window")
    assert (leaf.kv_cache_spec_sliding_window, leaf.medium) == (8, "CPU")
    events.hear(Changed(((keys[1], "host", False, 1), (keys[1], "host", False, 0))))
    removed = events.take()
    assert [(each.group_idx, each.block_hashes) for each in removed] == [
        (0, hashes[1:]), (1, hashes[1:])
    ]  # fmt: skip


def test_a_larger_block_has_the_tokens_of_several() -> None:
    """A leaf that covers two blocks of the chain has their tokens, and the hash of the second."""
    events, path = KVEvents(PER_BLOCK, groups(2 * PER_BLOCK)), (0, 1, 0, 1)
    keys = [key_of(path[: i + 1]) for i in range(4)]
    request = prompt(path)
    events.note(request, bytes(16) + b"".join(keys), 0)
    events.hear(Changed(tuple((key, "host", True, 0) for key in keys)))
    events.take()
    events.hear(Changed(((keys[3], "host", True, 1),)))
    (leaf,) = events.take()
    hashes = [kv_cache_utils.maybe_convert_block_hash(each) for each in request.block_hashes]
    assert (leaf.block_hashes, leaf.parent_block_hash) == (hashes[3:], hashes[1])
    assert (leaf.block_size, leaf.token_ids) == (2 * PER_BLOCK, request.all_token_ids[8:])


def test_finer_hashes_than_blocks_are_those_at_the_ends_of_blocks() -> None:
    """vLLM's hashes may cover less than a block of the chain."""
    events, path = KVEvents(PER_BLOCK, groups(PER_BLOCK, PER_BLOCK // 2)), (0, 1)
    keys = [key_of(path[: i + 1]) for i in range(2)]
    request = prompt(path)
    request.block_hashes = [bytes([number]) * 32 for number in range(5)]
    assert events.note(request, bytes(16) + b"".join(keys), 0) == 2
    events.hear(Changed(tuple((key, "host", True, 0) for key in keys)))
    (stored,) = events.take()
    convert = kv_cache_utils.maybe_convert_block_hash
    assert stored.block_hashes == [convert(request.block_hashes[at]) for at in (1, 3)]
