"""Tests of a real server for engines with several KV groups: all bytes of all groups, or none."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from flexkv.common.config import Settings
from flexkv.common.errors import ClosedError, ConfigError
from flexkv.common.request import LeafBlocks, Operation
from flexkv.common.terms import BLOCK_KEY_BYTES, Positions
from flexkv.index.keys import key_list
from flexkv.server.client import Client
from flexkv.server.launch import LaunchedServer
from flexkv.server.operator import command
from flexkv.server.wire import Changed, Copied, Copy, Done, LeafIds, Match, Matched, Start

from .forked import forked_server
from .group_serving import CHAIN, CHUNK, GROUP_MODEL, LEAVES, STATE, WINDOW, GroupInstance
from .serving import Peer, eventually, settings_in


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Return settings with room for some prompts in host memory, and for more on SSD."""
    folder = tmp_path_factory.mktemp("groups")
    return settings_in(folder, num_cpu_blocks=96, num_ssd_blocks=512)


@pytest.fixture(scope="module")
def launched(settings: Settings) -> Iterator[LaunchedServer]:
    """Yield a server of the model, for all tests that do not end it."""
    server = forked_server(settings, GROUP_MODEL)
    yield server
    server.close()
    assert server.exit_status == 0


@pytest.fixture
def instance(settings: Settings, launched: LaunchedServer) -> Iterator[GroupInstance]:
    """Yield an instance that is connected to a server that has nothing."""
    command(settings.server_recv_port, "clear")
    made = GroupInstance(settings)
    made.begin()
    yield made
    made.close()


def test_bytes_of_all_groups_come_back(instance: GroupInstance) -> None:
    """What was put comes back in other device blocks, up to the boundary whose leaves were put."""
    keys = instance.keys(1, 17)
    put = instance.put(keys, 17, ends=[12, 16])
    assert (put.status, put.moved) == ("success", 17)
    instance.wipe()
    matched = instance.match(keys)
    assert (matched.blocks, matched.chain) == (16, 17)
    assert instance.get(keys, matched).moved == 16
    shorter = instance.match(keys[: 15 * BLOCK_KEY_BYTES])
    assert (shorter.blocks, shorter.chain) == (12, 14)
    assert instance.get(keys, shorter).moved == 12
    assert instance.match(instance.keys(2, 17)).blocks == 0


def test_a_prefix_without_its_leaves_is_not_offered_until_they_are_stored(
    instance: GroupInstance,
) -> None:
    """A prompt that leaves another's chain gets nothing, stores the leaves there, and is found."""
    one, two, three = (instance.keys(number, 24, shared=10) for number in (1, 2, 3))
    instance.put(one, 24, ends=[24])
    matched = instance.match(two)
    assert (matched.blocks, matched.chain) == (0, 10)
    junction, *_ = instance.groups.boundaries(100, matched.chain)
    assert junction == 10
    instance.put(two, 24, ends=[junction, 24])
    instance.wipe()
    found = instance.match(three)
    assert (found.blocks, found.chain) == (10, 10)
    assert instance.get(three, found).moved == 10
    assert instance.get(one, instance.match(one)).moved == 24


@pytest.mark.parametrize("state_heads", [1, 2], ids=["whole states", "sliced states"])
def test_ranks_divide_each_group_in_their_own_way(tmp_path: Path, state_heads: int) -> None:
    """With two ranks, a group's block has their heads, or one copy of what both have."""
    groups = [
        group.model_copy(update={"num_kv_heads": state_heads} if group.is_state else {})
        for group in GROUP_MODEL.layer_groups or ()
    ]
    model = GROUP_MODEL.model_copy(update={"tp_size": 2, "layer_groups": tuple(groups)})
    settings = settings_in(tmp_path)
    server = forked_server(settings, model)
    instance = GroupInstance(settings, model=model)
    try:
        instance.begin()
        keys = instance.keys(1, 16)
        assert instance.put(keys, 16, ends=[16]).moved == 16
        instance.wipe()
        assert instance.get(keys, instance.match(keys)).moved == 16
    finally:
        instance.close()
        server.close()
    assert server.exit_status == 0


@pytest.mark.parametrize("first", [2, 14, 16])
def test_what_the_device_has_is_not_loaded(instance: GroupInstance, first: int) -> None:
    """A get from the middle of a prompt brings the leaves behind it, and always the state."""
    keys = instance.keys(1, 18)
    instance.put(keys, 18, ends=[18])
    instance.wipe()
    matched = instance.match(keys, first)
    assert sum(matched.by_tier.values()) == 18 - first
    needed = [instance.groups.needed(group, 18, first) for group in LEAVES]
    assert matched.leaves == {"host": sum(map(len, needed))}
    assert instance.get(keys, matched, first).moved == 18 - first


def test_leaves_may_be_put_after_their_chain(instance: GroupInstance) -> None:
    """A put of leaves alone stores them on blocks that are there; on others it stores nothing."""
    keys, client = instance.keys(1, 16), instance.client
    instance.put(keys, 16)
    assert instance.match(keys).blocks == 0
    number = instance.begin_put(keys, 16, ends=[16], at=20)
    instance.ready(number)
    assert instance.end_of(number).status == "success"
    assert instance.get(keys, instance.match(keys)).moved == 16
    other = instance.keys(2, 16)
    leaf = LeafBlocks(STATE, Positions(15, 1), np.array([3]))
    nobody = np.empty(0, np.int64)
    number = client.put(other, 16, nobody, client.generation, leaves=[leaf])
    instance.ready(number)
    assert instance.end_of(number).moved == 0
    assert instance.match(other).chain == 0


@pytest.mark.parametrize("missing", LEAVES)
def test_a_get_without_a_device_block_for_a_leaf_moves_nothing(
    instance: GroupInstance, missing: int
) -> None:
    """If one leaf that the prefix needs is left out of a get, no block of any group is moved."""
    keys, client = instance.keys(1, 16), instance.client
    instance.put(keys, 16, ends=[16])
    instance.wipe()
    leaves = []
    for group in LEAVES:
        needed = instance.groups.needed(group, 16)
        ids = np.array(needed) + 40
        if group == missing:
            ids[-1] = -1
        leaves.append(LeafBlocks(group, Positions(0, len(ids), np.array(needed)), ids))
    held = instance.match(keys)
    done = instance.end_of(client.get(keys, 0, np.arange(16), held.number, False, leaves))
    assert (done.moved, done.status in ("failed", "notfound")) == (0, True)
    blank = [rows for group in instance.devices[0]._rows for rows in group]
    assert all((rows == 0xEE).all() for rows in blank)
    # What was put may still be written to the SSD.
    eventually(lambda: command_status(instance)["pinned_blocks"] == 0)


def command_status(instance: GroupInstance) -> dict[str, Any]:
    """Return the statistics of host memory once nothing is under way."""
    address = instance.client._address
    tier: dict[str, Any] = command(address, "status")["statistics"]["tiers"]["host"]
    return tier


def test_groups_share_all_tiers(settings: Settings, instance: GroupInstance) -> None:
    """Prompts that were evicted to SSD come back whole, or are not offered; none is ever wrong."""
    prompts = [instance.keys(number, 16) for number in range(12)]
    for keys in prompts:
        instance.put(keys, 16, ends=[16])
        command(settings.server_recv_port, "flush")
    hits = 0
    for keys in prompts:
        instance.wipe()
        matched = instance.match(keys)
        if matched.blocks:
            assert instance.get(keys, matched).moved == 16
            hits += 1
    assert hits == len(prompts)
    # What was put may still be written to the SSD.
    eventually(lambda: command_status(instance)["pinned_blocks"] == 0)


@pytest.mark.parametrize("ending", ["close", "kill"])
def test_all_groups_outlive_a_restart(tmp_path: Path, ending: str) -> None:
    """What was flushed is found by the next server, chain and leaves; every byte is right."""
    settings = settings_in(tmp_path, num_cpu_blocks=96)
    server = forked_server(settings, GROUP_MODEL)
    instance = GroupInstance(settings)
    instance.begin()
    prompts = [instance.keys(number, 17, shared=4) for number in range(3)]
    for keys in prompts:
        instance.put(keys, 17, ends=[4, 16])
    command(settings.server_recv_port, "flush")
    if ending == "kill":
        os.kill(server.pid, signal.SIGKILL)
    server.close()
    server = forked_server(settings, GROUP_MODEL)
    try:
        instance.wait_ready()
        for keys in prompts:
            instance.wipe()
            matched = instance.match(keys)
            assert (matched.blocks, set(matched.by_tier)) == (16, {"disk"} | set(matched.by_tier))
            assert instance.get(keys, matched).moved == 16
        matched = instance.match(instance.keys(9, 17, shared=4))
        assert (matched.blocks, matched.chain) == (4, 4)
    finally:
        instance.close()
        server.close()
    assert server.exit_status == 0


def test_a_draft_drops_the_last_block(settings: Settings, launched: LaunchedServer) -> None:
    """A hit of an engine with a draft ends before the last block that is there."""
    command(settings.server_recv_port, "clear")
    instance = GroupInstance(settings, drops_last=True)
    instance.begin()
    try:
        keys = instance.keys(1, 17)
        instance.put(keys, 16, ends=[14, 16])
        assert instance.match(keys).blocks == 14
        instance.put(keys, 17, ends=[16])
        matched = instance.match(keys)
        assert matched.blocks == 16
        assert instance.get(keys, matched).moved == 16
    finally:
        instance.close()


def test_a_prefetch_brings_all_groups_to_host_memory(
    settings: Settings, instance: GroupInstance
) -> None:
    """After a prefetch of a prompt on SSD, its chain and leaves are in host memory."""
    prompts = [instance.keys(number, 16) for number in range(6)]
    for keys in prompts:
        instance.put(keys, 16, ends=[16])
        command(settings.server_recv_port, "flush")
    assert instance.client.match(prompts[0]).by_tier.get("disk", 0) > 0
    assert instance.run(Operation.PREFETCH, prompts[0]).status == "success"
    matched = instance.match(prompts[0])
    assert matched.by_tier == {"host": 16}
    assert instance.get(prompts[0], matched).moved == 16


# -- ends at any time -----------------------------------------------------------------------------


_numbers = count(5)
"""Each pair is another instance, as the server may still know the one before."""


@contextmanager
def peers(settings: Settings, instance: GroupInstance) -> Iterator[tuple[Peer, Peer]]:
    """Yield the agent and the client of another instance, which is ready."""
    number, order = next(_numbers), instance.client.order
    facts: dict[str, Any] = {"model": GROUP_MODEL, "instance": number, "order": order}
    with ExitStack() as opened:
        agent = opened.enter_context(closing(Peer(settings, "agent", **facts)))
        client = opened.enter_context(closing(Peer(settings, "client", **facts)))
        client.hear_ready()
        yield agent, client


def test_an_agent_that_leaves_leaves_nothing_behind(
    settings: Settings, instance: GroupInstance
) -> None:
    """A put that an agent never ends stores nothing of any group; later ones do."""
    keys = instance.keys(1, 16)
    number = instance.begin_put(keys, 16, ends=[16])  # it waits for the agent's report
    instance.agents[0].close()
    assert instance.end_of(number).status in ("failed", "cancelled")
    assert instance.client.match(keys).chain == 0
    again = GroupInstance(settings, number=1)
    again.begin()
    try:
        again.put(keys, 16, ends=[16])
        assert again.get(keys, again.match(keys)).moved == 16
        assert command_status(again)["reserved_blocks"] == 0
    finally:
        again.close()


@pytest.mark.parametrize("role", ["client", "agent"])
@pytest.mark.parametrize("operation", ["put", "get"])
def test_who_ends_in_the_middle_of_a_copy_disturbs_nobody(
    settings: Settings, instance: GroupInstance, role: str, operation: str
) -> None:
    """A peer that vanishes while leaves are copied fails its request, and everything is freed."""
    keys, theirs = instance.keys(1, 16), instance.keys(2, 16)
    instance.put(keys, 16, ends=[16])
    leaves = tuple(
        LeafIds(group, needed.start, needed.step, np.arange(len(needed)).tobytes())
        for group in LEAVES
        if (needed := instance.groups.needed(group, 16))
    )
    names, ids = keys if operation == "get" else theirs, np.arange(16).tobytes()
    with peers(settings, instance) as (agent, client):
        client.say(Start(1, operation, names, 0, ids, client.epoch, leaves=leaves))
        agent.say(Copied(agent.hear(Copy).op_id))
        agent.hear(Copy)
        (agent if role == "agent" else client).close()
        if role == "agent":
            done = client.hear(Done)
            assert "the agent is" in done.error
            assert not done.moved or operation == "put"  # the chain may have arrived
    eventually(lambda: command_status(instance)["reserved_blocks"] == 0)
    assert instance.match(theirs).blocks == 0
    instance.wipe()
    assert instance.get(keys, instance.match(keys)).moved == 16
    eventually(lambda: command_status(instance)["pinned_blocks"] == 0)


# -- what breaks a rule ---------------------------------------------------------------------------


def run(group: int, first: int, *ids: int, step: int = 1) -> LeafIds:
    """Return a run of leaves."""
    return LeafIds(group, first, step, np.array(ids, np.int64).tobytes())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"leaves": (run(4, 0, 1),)}, "leaves[0].group=4: must be less than"),
    ({"leaves": (run(WINDOW, 16, 1),)}, "positions 16 to 16"),
    ({"leaves": (run(CHUNK, 2, 1),)}, "every 2 blocks of the chain"),
    ({"leaves": (run(WINDOW, 3, 1, 1),)}, "twice"),
    ({"leaves": (run(WINDOW, 3, 96),)}, "leaves of KV group 1=96: is not a device block"),
    ({"leaves": (run(WINDOW, 3, -7),)}, "must not be negative"),
    ({"leaves": (run(STATE, 3, 5), run(WINDOW, 3, 5))}, "less than the one before"),
    ({"by_layer": True}, "by_layer=True: must be false for a model with several KV groups"),
    ({"operation": "prefetch", "device_ids": b"", "leaves": (run(1, 0, 1),)}, "must be empty"),
    ({"operation": "put", "drop": 1}, "drop=1: must be 0 for a put"),
    ({"drop": 17}, "first=0: must be from 0 to the number of blocks, -1"),
    ({"drop": 2**62}, "first=0: must be from 0"),
]
"""What is wrong with a request, and what its error says."""


def test_what_breaks_a_rule_is_refused_by_name(settings: Settings, instance: GroupInstance) -> None:
    """The request fails and says why; the client stays connected."""
    keys = instance.keys(1, 16)
    instance.put(keys, 16, ends=[16])
    with peers(settings, instance) as (_, client):
        start = Start(1, "get", keys, 0, np.arange(16).tobytes(), client.epoch)
        for more, why in WRONG:
            client.say(msgspec.structs.replace(start, **more))
            done = client.hear(Done)
            assert (done.status, done.moved) == ("failed", 0)
            assert why in done.error
        client.say(Match(2, keys, drop=2**62))
        assert client.hear(Matched).blocks == 0
        client.say(Match(3, keys))
        assert client.hear(Matched).blocks == 16


def test_leaves_of_a_plain_model_are_refused(tmp_path: Path) -> None:
    """A model with one KV group has no leaves, and says so."""
    settings = settings_in(tmp_path)
    server = forked_server(settings)
    agent, client = Peer(settings, "agent"), Peer(settings, "client")
    client.hear_ready()
    keys = os.urandom(48)
    client.say(Start(1, "put", keys, 0, np.arange(2).tobytes(), client.epoch,
                     leaves=(run(1, 0, 1),)))  # fmt: skip
    assert "leaves[0].group=1: must be less than" in client.hear(Done).error
    client.close()
    agent.close()
    server.close()


def test_a_message_with_a_group_that_no_model_has_ends_its_connection(
    settings: Settings, instance: GroupInstance
) -> None:
    """A message outside the protocol's own limits is nonsense, and its sender is hung up on."""
    client = Peer(settings, "client", model=GROUP_MODEL, instance=4)
    client.say(Start(1, "get", os.urandom(32), 0, bytes(8), 0, leaves=(LeafIds(32, 0, 1, b""),)))
    with pytest.raises((OSError, ClosedError)):
        client.hear(Done)
    client.close()
    keys = instance.keys(1, 16)
    instance.put(keys, 16, ends=[16])
    assert instance.get(keys, instance.match(keys)).moved == 16


def test_an_agent_does_not_go_by_layer(instance: GroupInstance) -> None:
    """Layers of a model with several KV groups are refused by name."""
    for call in (
        lambda: instance.agents[0].layer_written([1], 0),
        lambda: instance.agents[0].wait_for_layer([1], 0),
    ):
        with pytest.raises(ConfigError, match=r"layer=0.*several KV groups \(4\)"):
            call()


# -- changes --------------------------------------------------------------------------------------


def test_changes_name_the_group_and_the_block_of_the_chain(
    settings: Settings, instance: GroupInstance
) -> None:
    """A client that watches is told of every leaf by the key of its parent in the chain."""
    watcher = Client(settings, GROUP_MODEL, 1, watches=True)
    eventually(lambda: watcher.poll() or watcher.connection)
    keys = instance.keys(1, 16)
    there: set[tuple[bytes, str, int]] = set()

    def heard(changes: list[Changed]) -> set[tuple[bytes, str, int]]:
        for changed in changes:
            for key, tier, is_there, group in changed.changes:
                (there.add if is_there else there.discard)((key, tier, group))
        return there

    names = key_list(keys)[1:]
    wanted = {(key, "host", CHAIN) for key in names}
    for group in LEAVES:
        wanted |= {(names[at], "host", group) for at in instance.groups.needed(group, 16)}
    instance.put(keys, 16, ends=[16])
    eventually(lambda: (watcher.poll(), heard(watcher.changes()) >= wanted)[1])
    there.clear()
    watcher.match(keys, tell=True)
    eventually(lambda: (watcher.poll(), heard(watcher.changes()) >= wanted)[1])
    command(settings.server_recv_port, "clear")
    eventually(lambda: (watcher.poll(), not heard(watcher.changes()))[1])
    watcher.close()
