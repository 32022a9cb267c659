"""Managers whose engine is in a server's process, for models with several KV groups."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.common.errors import ConfigError
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager

from .clients import started_client
from .groups import DEVICE_BLOCKS, MODEL, PER_BLOCK, GroupCaches, Ids, cache_config

PROMPT = np.arange(1000, 1040)
"""Ten blocks of the chain, five of the state."""
SEEDS = 6
STEPS = 40
SIZES = {"num_cpu_blocks": 512, "enable_ssd": False}


class GroupUser:
    """A user of a manager, with KV caches."""

    def __init__(self, manager: KVManager) -> None:
        self.manager, self.caches = manager, GroupCaches()
        manager.register_kv_caches(self.caches.tensors)

    def slots(self, tokens: int, places: list[Ids], first: int = 0) -> list[Any]:
        """Return the slots of a prompt's tokens from `first` on."""
        return [slots[first:] for slots in self.caches.slots(tokens, *places)]

    def wait(self, task: int) -> tuple[str, list[bool]]:
        """Return how a task has ended."""
        response = self.manager.wait(task)[task]
        return response.status.value, response.return_mask.tolist()

    def content(self) -> list[bytes]:
        """Return all bytes of the device."""
        return [tensor.tobytes() for tensor in self.caches.tensors]


@contextmanager
def library(folder: Path, **changes: Any) -> Iterator[KVManager]:
    """Yield a started manager with an engine of its own."""
    manager = KVManager(MODEL, cache_config(folder, **changes))
    manager.start()
    try:
        yield manager
    finally:
        manager.shutdown()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_client_does_what_the_library_does(tmp_path: Path, seed: int) -> None:
    """The same calls have the same matches, statuses and masks, and leave the same device bytes."""
    (tmp_path / "own").mkdir()
    with (
        library(tmp_path / "own", **SIZES) as own,
        started_client(tmp_path, MODEL, **SIZES) as client,
    ):
        users = [GroupUser(own), GroupUser(client)]
        chance = random.Random(seed)
        for step in range(STEPS):
            act = _act(chance)
            mine, theirs = [_outcome(act, user) for user in users]
            assert mine == theirs, (seed, step)
        assert users[0].content() == users[1].content()


def _outcome(act: Any, user: GroupUser) -> Any:
    """Return what a call returns, or the error that says why its arguments are wrong."""
    try:
        return act(user)
    except ConfigError as error:
        return str(error)


def _act(chance: random.Random) -> Any:
    """Return a function that makes one call, the same for every user."""
    tokens = chance.randrange(1, 49)
    prompt = np.arange(tokens) + 1000 * chance.choice((0, 1, 2))
    prompt[chance.randrange(1, 49) :] += 500
    first = chance.choice((0, 0, 0, 4, 8, 9, 16))
    mask = None if not first else np.arange(tokens) >= min(first, tokens)
    begin = 0 if mask is None else min(first, tokens)
    start, groups = chance.randrange(DEVICE_BLOCKS - 12), [0]
    groups += [group for group in (1, 2, 3) if chance.random() < 0.85]

    def places(user: GroupUser) -> list[Ids]:
        return user.caches.places(tokens, start, groups)

    def put(user: GroupUser) -> Any:
        slots = user.slots(tokens, places(user), begin)
        return user.wait(user.manager.put_async(prompt, slots, mask))

    def get(user: GroupUser) -> Any:
        slots = user.slots(tokens, places(user), begin)
        return user.wait(user.manager.get_async(prompt, slots, mask))

    def match(user: GroupUser) -> Any:
        return user.manager.match(prompt)

    def prefetch(user: GroupUser) -> Any:
        return user.wait(user.manager.prefetch_async(prompt))

    def prepared(name: str) -> Any:
        def run(user: GroupUser) -> Any:
            task, wanted = getattr(user.manager, name)(prompt, mask)
            which = np.flatnonzero(wanted)
            at = (int(which[0]), int(which[-1]) + 1) if len(which) else (0, 0)
            slots = [each[at[0] : at[1]] for each in user.caches.slots(tokens, *places(user))]
            user.manager.launch(task, slots)
            return wanted.tolist(), user.wait(task)

        return run

    calls = [put, put, get, get, match, prefetch, prepared("get_match"), prepared("put_match")]
    return chance.choice(calls)


def test_put_match_asks_for_what_any_group_lacks(tmp_path: Path) -> None:
    """If only leaves are missing, a client is asked for the tokens from the first of them on."""
    with started_client(tmp_path, MODEL, **SIZES) as manager:
        user = GroupUser(manager)
        places = user.caches.places(40, 0, [0])
        user.wait(manager.put_async(PROMPT, user.slots(40, places)))
        task, wanted = manager.put_match(PROMPT)
        begin = int(np.flatnonzero(wanted)[0])
        assert begin == 24  # the window of ten tokens begins in block 7, and a state's before it
        manager.launch(task, user.slots(40, user.caches.places(40, 0), begin))
        user.wait(task)
        assert manager.match(PROMPT).tokens == 40
        assert not manager.put_match(PROMPT)[1].any()


def test_what_a_client_gets_wrong_is_named(tmp_path: Path) -> None:
    """Slots of one group only, wrong slots and layers are refused as by the library."""
    with started_client(tmp_path, MODEL, **SIZES) as manager:
        user = GroupUser(manager)
        with pytest.raises(ConfigError, match=r"slot_mapping.*4 arrays"):
            manager.put_async(PROMPT, np.arange(40))
        slots = user.slots(40, user.caches.places(40, 0))
        slots[1][4:8] = DEVICE_BLOCKS * PER_BLOCK + np.arange(4)
        with pytest.raises(ConfigError, match=r"slot_mapping\[1\]\[4\].*not a slot"):
            manager.get_async(PROMPT, slots)
        with pytest.raises(ConfigError, match="layer by layer"):
            manager.get_layerwise(PROMPT, slots)
        ok = user.slots(40, user.caches.places(40, 0))
        assert user.wait(manager.put_async(PROMPT, ok))[0] == "success"
        assert manager.statistics().tiers["host"].ready_blocks > 10
        assert manager.clear(Tier.HOST) > 10
        assert manager.match(PROMPT).tokens == 0
