"""Engines that share host memory and SSD: several nodes in one process, over a real Redis."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from errno import EIO
from pathlib import Path
from typing import Any

import pytest

from flexkv.cluster.grants import Grants, Held
from flexkv.common.errors import ConfigError, StorageError
from flexkv.common.terms import Tier
from flexkv.engine.core import Core
from flexkv.engine.lending import Lending
from flexkv.testing.redis_server import RedisServer
from flexkv.tiers import ledger
from flexkv.tiers.generation import Generation
from flexkv.tiers.ledger import Ledger
from flexkv.tiers.parts import ClusterStatistics
from flexkv.tiers.remote_pool import SharedPool
from flexkv.trace.breakdown import lane_of
from flexkv.trace.chrome import chrome
from flexkv.trace.load import load
from flexkv.trace.summary import Summary
from flexkv.trace.view import data

from . import test_remote
from .test_remote import BLOCKS, TOKENS, WHOLE, prompt

PATIENCE_S = 30.0


class Node(test_remote.Node):
    """An engine that shares blocks with others."""

    @property
    def cluster(self) -> ClusterStatistics:
        """Return what it knows of its cluster."""
        cluster = self.manager.statistics().cluster
        assert cluster is not None
        return cluster


@pytest.fixture
def keys(shared: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of nodes that share with each other, and with no other test's nodes."""
    return {**shared, "enable_remote": False, "node_ttl_seconds": 3.0}


def peer_tokens(node: Node, seed: int) -> int:
    """Return how many tokens of a prompt other nodes are said to have, behind what is here."""
    far = node.manager.match(prompt(seed, BLOCKS)).far_tokens_by_tier
    return sum(count for tier, count in far.items() if tier.label == "peer")


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 -- the state of another node
            await asyncio.sleep(0.01)


async def test_a_node_gets_what_another_one_has(keys: dict[str, Any]) -> None:
    """Whole spans that one node has put are known to another one, and come with their bytes."""
    async with Node(keys) as first, Node(keys) as second:
        await first.put(1)
        await until(lambda: peer_tokens(second, 1) == WHOLE * TOKENS)
        assert await second.get(1) == WHOLE
        assert second.manager.statistics().hit_blocks["peer"] == WHOLE
        assert peer_tokens(second, 1) == 0, "it is here now"
        assert await second.get(1) == WHOLE
        assert second.manager.statistics().hit_blocks == {"peer": WHOLE, "host": WHOLE}
        (read,) = second.cluster.read.values()
        assert (read.blocks, read.failed, read.wrong) == (WHOLE, 0, 0)
        await until(lambda: first.manager.statistics().claims == 0)


async def test_a_node_that_comes_later_learns_what_the_others_have(keys: dict[str, Any]) -> None:
    """A newcomer takes snapshots of the nodes, and passes on what it has fetched."""
    async with Node(keys) as first:
        await first.put(1)
        async with Node(keys) as second:
            await until(lambda: peer_tokens(second, 1) == WHOLE * TOKENS)
            assert await second.get(1) == WHOLE
            async with Node(keys) as third:
                await until(lambda: peer_tokens(third, 1) == WHOLE * TOKENS)
                assert await third.get(1) == WHOLE


async def test_what_a_node_has_given_up_is_no_longer_asked_of_it(keys: dict[str, Any]) -> None:
    """Blocks that were evicted or cleared are dropped from the hints of others."""
    async with Node(keys) as first, Node(keys) as second:
        await first.put(1)
        await until(lambda: peer_tokens(second, 1) > 0)
        first.manager.clear()
        await until(lambda: peer_tokens(second, 1) == 0)
        assert await second.get(1) == 0


async def test_a_node_that_leaves_is_asked_no_more(keys: dict[str, Any]) -> None:
    """What a node had is unknown once it has left; what was fetched from it stays."""
    async with Node(keys) as second:
        async with Node(keys) as first:
            await first.put(1)
            await first.put(2)
            await until(lambda: peer_tokens(second, 1) > 0 and peer_tokens(second, 2) > 0)
            assert await second.get(1) == WHOLE
        await until(lambda: peer_tokens(second, 2) == 0)
        assert await second.get(1) == WHOLE
        assert await second.get(2) == 0
        assert second.cluster.read == {}
        assert second.cluster.read_in_all.blocks == WHOLE, "counters never fall"


async def test_blocks_on_ssd_alone_are_shared_if_that_is_wanted(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    """With enable_p2p_ssd the owner fetches them for its reader; without it nobody is told."""
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256}
    folders = [tmp_path / name for name in ("shared", "private")]
    for folder in folders:
        folder.mkdir()
    shared = {**keys, **ssd, "ssd_cache_dir": str(folders[0]), "enable_p2p_ssd": True}
    private = {**keys, **ssd, "ssd_cache_dir": str(folders[1])}
    async with Node(shared) as owner, Node(private) as other, Node(keys) as reader:
        for node, seed in ((owner, 1), (other, 2)):
            await node.put(seed)
            await until(lambda: peer_tokens(reader, seed) > 0)  # noqa: B023 -- called at once
            node.manager.clear(Tier.HOST)
        await until(lambda: peer_tokens(reader, 2) == 0)
        assert peer_tokens(reader, 1) == WHOLE * TOKENS
        assert await reader.get(1) == WHOLE
        assert owner.manager.statistics().routes["disk→host"].blocks >= WHOLE


async def test_a_node_that_was_cleared_alone_shares_nothing_until_the_cluster_is_reset(
    keys: dict[str, Any],
) -> None:
    """Weights may have changed on one node only: its old and new blocks stay apart from others'."""
    async with Node(keys) as first, Node(keys) as second:
        await first.put(1)
        await until(lambda: peer_tokens(second, 1) > 0)
        second.manager.clear()
        await second.put(2)
        await first.put(3)
        await asyncio.sleep(0.3)
        assert (peer_tokens(second, 1), peer_tokens(second, 3)) == (0, 0)
        assert (peer_tokens(first, 2), await second.get(1), await first.get(2)) == (0, 0, 0)
        await first.manager.reset_cluster()
        await until(lambda: first.manager.match(prompt(1, BLOCKS)).tokens == 0)
        await until(lambda: second.manager.match(prompt(2, BLOCKS)).tokens == 0)
        await first.put(4)
        await second.put(5)
        await until(lambda: peer_tokens(second, 4) > 0 and peer_tokens(first, 5) > 0)
        assert (await second.get(4), await first.get(5)) == (WHOLE, WHOLE)


async def test_a_node_that_was_away_during_a_reset_clears_its_ssd(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    """Blocks of before a reset are not believed by a node that comes back after it."""
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256, "ssd_cache_dir": str(tmp_path)}
    async with Node({**keys, **ssd}) as away:
        await away.put(1)
    async with Node(keys) as other:
        await other.manager.reset_cluster()
        async with Node({**keys, **ssd}) as back:
            await until(lambda: back.manager.match(prompt(1, BLOCKS)).tokens == 0)
            await back.put(2)
            await until(lambda: Generation([tmp_path]).number == 1)
        async with Node({**keys, **ssd}) as again:
            assert again.manager.match(prompt(2, BLOCKS)).tokens > 0
            await until(lambda: len(again.cluster.state.nodes) == 1)
            assert again.manager.match(prompt(2, BLOCKS)).tokens > 0


async def test_a_node_that_was_cleared_in_part_is_not_asked_any_more(keys: dict[str, Any]) -> None:
    """It still has most of its blocks, and lends none: others do not ask it in vain for ever."""
    async with Node(keys) as first, Node(keys) as second:
        await first.put(1)
        await until(lambda: peer_tokens(second, 1) == WHOLE * TOKENS)
        assert await second.get(1, 16) == 16, "they are connected"
        first.manager.clear(namespace="another one")
        assert first.manager.match(prompt(1, BLOCKS)).tokens > 0
        await until(lambda: peer_tokens(second, 1) == 0)


async def test_a_request_that_nobody_expected_ends_a_connection_only(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong while one node is served does not end the engine."""
    async with Node(keys) as first, Node(keys) as second:
        await first.put(1)
        await until(lambda: peer_tokens(second, 1) > 0)
        hold = Lending.hold

        def fails(*args: Any) -> Held:
            monkeypatch.setattr(Lending, "hold", hold)
            raise RuntimeError("nobody expected this")

        monkeypatch.setattr(Lending, "hold", fails)
        assert await second.get(1) == 0
        await first.put(2)
        await until(lambda: peer_tokens(second, 2) > 0)
        assert await second.get(2) == WHOLE


async def test_the_end_of_an_engine_does_not_wait_for_a_note(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that hangs while a reset is to be noted lets the engine end; the note is missing."""

    async def hangs(_: Core) -> None:
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(Core, "_ssd_cleared", hangs)
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256, "ssd_cache_dir": str(tmp_path)}
    async with asyncio.timeout(PATIENCE_S):
        async with Node({**keys, **ssd}) as node:
            await node.manager.reset_cluster()
            await until(lambda: node.cluster.shared_generation == 1)
            await asyncio.sleep(0)
    assert Generation([tmp_path]).number == 0


async def test_a_crash_after_a_reset_brings_nothing_back(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generation is noted on SSD only once no crash can bring back blocks from before it."""
    used, crashed = tmp_path / "used", tmp_path / "crashed"
    used.mkdir()
    note = Generation.note

    def note_and_copy(generation: Generation, number: int) -> None:
        note(generation, number)
        shutil.copytree(used, crashed)

    monkeypatch.setattr(Generation, "note", note_and_copy)
    monkeypatch.setattr(ledger, "GATHER_S", 2.0)  # a journal that is slow to be written
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256}
    async with Node({**keys, **ssd, "ssd_cache_dir": str(used)}) as node:
        await node.put(1)
        assert await node.manager.reset_cluster() == 1
        await until(crashed.exists)
    async with Node({**keys, **ssd, "ssd_cache_dir": str(crashed)}) as again:
        assert again.cluster.shared_generation == 1
        assert again.manager.match(prompt(1, BLOCKS)).tokens == 0


async def test_nodes_share_through_both_far_tiers(keys: dict[str, Any], tmp_path: Path) -> None:
    """What no peer has any more comes from the remote tier, behind what peers have."""
    remote = {"enable_remote": True, "remote_cache_path": f"file://{tmp_path}"}
    async with Node({**keys, **remote}) as first, Node({**keys, **remote}) as second:
        await first.until_stores(1)
        await until(lambda: peer_tokens(second, 1) == WHOLE * TOKENS)
        assert await second.get(1) == WHOLE
        assert second.manager.statistics().hit_blocks["peer"] == WHOLE
        await first.manager.reset_cluster()
        for node in (first, second):
            await until(lambda: node.store.generation == 1 << 20)  # noqa: B023 -- called at once
        await second.until_gets(1, 0)
        await first.put(2)
        await second.until_gets(2, WHOLE)


async def test_redis_may_die_and_come_back_empty(
    keys: dict[str, Any], redis_server: RedisServer
) -> None:
    """While Redis is away hints stand; when it comes back empty, everything is told anew."""
    async with Node(keys) as first, Node(keys) as second:
        await first.put(1)
        await until(lambda: peer_tokens(second, 1) > 0)
        redis_server.kill()
        await first.put(2)
        assert await second.get(1) == WHOLE
        redis_server.start()
        await until(lambda: peer_tokens(second, 2) > 0)
        assert await second.get(2) == WHOLE


async def test_nodes_with_another_secret_for_keys_share_nothing(keys: dict[str, Any]) -> None:
    """Their blocks have other keys, so they are in another pool, and do not see each other."""
    async with Node(keys) as first, Node(keys, key_secret="another") as second:
        await first.put(1)
        await until(lambda: second.cluster.state.is_registered)
        assert (len(first.cluster.state.nodes), len(second.cluster.state.nodes)) == (0, 0)
        assert await second.get(1) == 0


@pytest.mark.parametrize("admit", ["always", "second_use", "policy"])
async def test_what_was_fetched_displaces_nothing_for_long(
    keys: dict[str, Any], admit: str
) -> None:
    """Under second_use older fetches go before what this node stored, even if that is older.

    As much as one fetch stays; one that was asked for again stays, too.
    """
    rules = {"p2p_admit": admit, "evict_ratio": 0.0, "eviction_policy": "lru"}
    async with Node(keys) as first, Node(keys, **rules) as second:
        await second.put(1)
        for seed in (2, 3, 4):
            await first.put(seed)
            await until(lambda: peer_tokens(second, seed) > 0)  # noqa: B023 -- called at once
            assert await second.get(seed) == WHOLE
            assert await second.get(2) == WHOLE
        for seed, blocks in ((5, BLOCKS), (6, BLOCKS), (7, BLOCKS), (8, WHOLE)):
            await second.put(seed, blocks)  # host memory is full before the last one
        held = [second.manager.match(prompt(seed, BLOCKS)).tokens // TOKENS for seed in (1, 2, 3)]
        kept, displaced = [BLOCKS, WHOLE, 0], [BLOCKS - WHOLE, WHOLE, WHOLE]
        assert held == (kept if admit == "second_use" else displaced)


async def test_a_node_that_shares_nothing_cannot_reset_the_cluster(keys: dict[str, Any]) -> None:
    """The error names the keys that would make it share."""
    async with Node({**keys, "enable_p2p_cpu": False}) as node:
        with pytest.raises(ConfigError, match="enable_p2p_cpu"):
            await node.manager.reset_cluster()
        assert node.manager.statistics().cluster is None


async def test_a_trace_names_the_peers_and_says_that_requests_waited_for_them(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    """Each peer that was read has a lane; the time of a get is named, and nothing was wrong."""
    async with Node(keys) as first, Node(keys) as second, Node(keys) as reader:
        for node, seed in ((first, 1), (second, 2)):
            await node.put(seed)
            await until(lambda: peer_tokens(reader, seed) == WHOLE * TOKENS)  # noqa: B023
        with reader.manager.trace(tmp_path / "trace"):
            for seed in (1, 2):
                assert await reader.get(seed) == WHOLE
        addresses = first.cluster.address, second.cluster.address
    trace = load(tmp_path / "trace")
    lanes = {f"peer→host {address}" for address in addresses}
    assert {lane_of(op) for op in trace.ops} == {"host→device", *lanes}
    shown = data(Summary(trace))
    assert set(shown["lanes"]) == {"host→device", *lanes}
    names = [shown["lanes"][number] for number in shown["ops"]["lane"]]
    assert names == [lane_of(op) for op in trace.ops]
    assert "waiting for peers" in {each["what"] for each in shown["steps"]}
    assert {"peer, loaded", "host, loaded"} <= set(shown["sankey"]["labels"])
    assert all(lane.encode() in chrome(trace) for lane in lanes)


@pytest.mark.parametrize("is_written", [True, False])
async def test_a_generation_is_noted_once_the_ssd_is_cleared(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    """A crash in between must not make a later run believe in blocks of before the reset."""
    steps, written, note = [], Ledger.written, Generation.note

    async def writing(self: Ledger) -> None:
        steps.append("to be written")
        await written(self)
        steps.append("written")
        if not is_written and len(steps) == 2:
            raise StorageError(str(tmp_path), 0, EIO)

    def noting(self: Generation, *number: int) -> None:
        steps.append("noted")
        note(self, *number)

    monkeypatch.setattr(Ledger, "written", writing)
    monkeypatch.setattr(Generation, "note", noting)
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256, "ssd_cache_dir": str(tmp_path)}
    own_zone = {"p2p_zone": f"noted_{is_written}"}
    async with Node({**keys, **ssd, **own_zone}) as node:
        await node.manager.reset_cluster()
        await until(lambda: len(steps) >= 2 + is_written)
        assert node.cluster.shared_generation == 1
        assert await node.get(1) == 0, "the engine works"
    expected = ["to be written", "written", "noted"][: 2 + is_written]
    assert steps[: len(expected)] == expected
    assert ("noted" in steps) is is_written
    assert Generation([tmp_path]).number == is_written


async def test_a_connection_that_fails_ends_alone(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever another node makes go wrong here, this node's engine goes on."""

    def failing(*_: object) -> None:
        raise ValueError("a mistake")

    async with Node(keys) as first, Node(keys) as second:
        await first.put(1)
        await until(lambda: peer_tokens(second, 1) == WHOLE * TOKENS)
        monkeypatch.setattr(Grants, "want", failing)
        assert await second.get(1) == 0
        monkeypatch.undo()
        assert await first.get(1) > 0
        await first.put(2)
        await until(lambda: peer_tokens(second, 2) == WHOLE * TOKENS)
        await second.until_gets(2, WHOLE)


async def test_a_node_with_blocks_of_an_earlier_run_joins_no_later_pool_by_itself(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis says whether there was a reset; until then its blocks must not get behind that."""
    stayed: list[int] = []
    monkeypatch.setattr(SharedPool, "stay", lambda _, number: stayed.append(number))
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256, "ssd_cache_dir": str(tmp_path)}
    remote = {"enable_remote": True, "remote_cache_path": f"file://{tmp_path / 'remote'}"}
    (tmp_path / "remote").mkdir()
    for earlier_runs in range(2):
        async with Node({**keys, **ssd, **remote}) as node:
            assert stayed == [0] * earlier_runs
            await node.put(1)
