"""Engines that share host memory and SSD: several nodes in one process, over a real Redis."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from errno import EMFILE
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexkv.cluster import tcp
from flexkv.cluster.grants import Grants, Held
from flexkv.common.errors import ConfigError
from flexkv.common.terms import Tier
from flexkv.engine.lending import Lending
from flexkv.observe.logs import configure_logging
from flexkv.testing.redis_server import RedisServer
from flexkv.tiers.parts import ClusterStatistics
from flexkv.tiers.peer import _Node
from flexkv.trace.breakdown import lane_of
from flexkv.trace.chrome import chrome
from flexkv.trace.load import load
from flexkv.trace.summary import Summary
from flexkv.trace.view import data

from . import test_remote
from .test_remote import BLOCKS, SPAN, TOKENS, WHOLE, prompt

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


async def until(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(patience_s):
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
        await until(lambda: second.cluster.read == {})
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


async def test_nodes_share_through_both_far_tiers(keys: dict[str, Any], tmp_path: Path) -> None:
    """What no peer has any more comes from the remote tier, behind what peers have."""
    remote: dict[str, Any] = {"enable_remote": True, "remote_cache_path": f"file://{tmp_path}"}
    remote["remote_list_per_s"] = 1000.0
    async with Node({**keys, **remote}) as first, Node({**keys, **remote}) as second:
        await first.until_stores(1)
        await until(lambda: peer_tokens(second, 1) == WHOLE * TOKENS)
        assert await second.get(1) == WHOLE
        assert second.manager.statistics().hit_blocks["peer"] == WHOLE
        rounds, spans = second.store.listed_rounds, WHOLE // SPAN
        await until(lambda: second.store.listed_rounds > rounds + 1)
        assert second.store.known_spans == spans, "those of peers do not count"
        assert [node.spans for node in second.cluster.state.nodes] == [spans]
        generation = await first.manager.reset_cluster()
        for node in (first, second):
            await until(lambda: node.store.generation == generation << 20)  # noqa: B023
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


async def test_a_node_without_descriptors_blames_no_other(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A get is answered without the blocks, and the next one has them: the owner was not left out.

    The log has the reason, and nothing against the owner.
    """
    configure_logging("info", as_json=True)
    async with Node(keys) as owner, Node(keys) as reader:
        await owner.put(1)
        await owner.put(2)
        await until(lambda: peer_tokens(reader, 2) == WHOLE * TOKENS)
        assert await reader.get(1) == WHOLE
        cluster = reader.manager.engine._core.cluster
        assert isinstance(cluster, _Node)
        cluster.transports.transport.stop(1)
        with monkeypatch.context() as patch:
            none_left = {**vars(socket), "socket": _no_descriptor}
            patch.setattr(tcp, "socket", SimpleNamespace(**none_left))
            assert await reader.get(2) == 0
        assert reader.cluster.down == ()
        await until(lambda: peer_tokens(reader, 2) == WHOLE * TOKENS)
        assert await reader.get(2) == WHOLE
    told = capfd.readouterr().err
    assert "peer_not_connected" in told
    assert "Too many open files" in told
    assert "peer_read_failed" not in told


def _no_descriptor(*_: object) -> None:
    raise OSError(EMFILE, os.strerror(EMFILE))
