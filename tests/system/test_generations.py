"""The generation of a cluster's blocks, over whole engines: resets, lone clears and restarts."""

from __future__ import annotations

import asyncio
import shutil
from errno import EIO
from pathlib import Path
from typing import Any

import pytest

from flexkv.cluster.generations import RANDOM_BITS, Generations, Noted
from flexkv.cluster.redis_commands import RedisCommands
from flexkv.common.errors import StorageError
from flexkv.engine.core import Core
from flexkv.tiers import ledger
from flexkv.tiers.generation import Generation
from flexkv.tiers.ledger import Ledger
from flexkv.tiers.remote_pool import SharedPool

from .test_peers import PATIENCE_S, Node, peer_tokens, until
from .test_remote import BLOCKS, TOKENS, WHOLE, prompt


@pytest.fixture
def keys(shared: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of nodes that share with each other, and with no other test's nodes."""
    return {**shared, "enable_remote": False, "node_ttl_seconds": 3.0}


def generations_of(node: Node) -> Generations:
    """Return what a node knows of the cluster's generation."""
    cluster: Any = node.manager.engine._core.cluster
    generations: Generations = cluster.plane.follower.generations
    return generations


async def until_closed(keys: dict[str, Any], node: Node) -> None:
    """Wait until Redis has heard that a node was cleared alone in its generation."""
    redis = RedisCommands("127.0.0.1", keys["redis_port"], keys["redis_password"])
    pattern = f"flexkv:*{keys['p2p_zone']}}}:generation"
    closed = None
    async with asyncio.timeout(10 * PATIENCE_S):
        while closed is None or int(float(closed)) != generations_of(node).name:
            for name in (await redis.run([("KEYS", pattern)]))[0]:
                (closed,) = await redis.run([("ZSCORE", name, "closed")])
    await redis.close()


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
            await until(lambda: Generation([tmp_path]).noted.name == other.cluster.state.generation)
        async with Node({**keys, **ssd}) as again:
            assert again.manager.match(prompt(2, BLOCKS)).tokens > 0
            await until(lambda: len(again.cluster.state.nodes) == 1)
            assert again.manager.match(prompt(2, BLOCKS)).tokens > 0


async def test_a_node_that_was_cleared_in_part_is_not_asked_any_more(keys: dict[str, Any]) -> None:
    """The node keeps most of its blocks and lends none; others stop asking it in vain."""
    async with Node(keys) as first, Node(keys) as second:
        await first.put(1)
        await until(lambda: peer_tokens(second, 1) == WHOLE * TOKENS)
        assert await second.get(1, 16) == 16, "they are connected"
        first.manager.clear(namespace="another one")
        assert first.manager.match(prompt(1, BLOCKS)).tokens > 0
        await until(lambda: peer_tokens(second, 1) == 0)


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
            await until(lambda: node.cluster.state.is_registered)
            generation = await node.manager.reset_cluster()
            await until(lambda: node.cluster.shared_generation == generation)
            await asyncio.sleep(0)
    assert Generation([tmp_path]).noted == Noted()


async def test_a_crash_after_a_reset_brings_nothing_back(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generation is noted on SSD only once no crash can bring back blocks from before it."""
    used, crashed = tmp_path / "used", tmp_path / "crashed"
    used.mkdir()
    note = Generation.note

    def note_and_copy(generation: Generation, noted: Noted) -> StorageError | None:
        error = note(generation, noted)
        if noted.name >= 1 << RANDOM_BITS:
            shutil.copytree(used, crashed)
        return error

    monkeypatch.setattr(Generation, "note", note_and_copy)
    monkeypatch.setattr(ledger, "GATHER_S", 2.0)  # a journal that is slow to be written
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256}
    async with Node({**keys, **ssd, "ssd_cache_dir": str(used)}) as node:
        await node.put(1)
        generation = await node.manager.reset_cluster()
        await until(crashed.exists)
    async with Node({**keys, **ssd, "ssd_cache_dir": str(crashed)}) as again:
        await until(lambda: again.cluster.shared_generation == generation)
        assert again.manager.match(prompt(1, BLOCKS)).tokens == 0


@pytest.mark.parametrize("is_written", [True, False])
async def test_a_generation_is_noted_once_the_ssd_is_cleared(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    """A crash in between must not make a later run believe in blocks of before the reset."""
    steps, written, note, resets = [], Ledger.written, Generation.note, []

    async def writing(self: Ledger) -> None:
        steps.append("to be written")
        await written(self)
        steps.append("written")
        if not is_written and resets and len(steps) == 2:
            raise StorageError(str(tmp_path), 0, EIO)

    def noting(self: Generation, noted: Noted) -> StorageError | None:
        if noted.name >= 1 << RANDOM_BITS:
            steps.append("noted")
        return note(self, noted)

    monkeypatch.setattr(Ledger, "written", writing)
    monkeypatch.setattr(Generation, "note", noting)
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256, "ssd_cache_dir": str(tmp_path)}
    own_zone = {"p2p_zone": f"noted_{is_written}"}
    async with Node({**keys, **ssd, **own_zone}) as node:
        await until(lambda: Generation([tmp_path]).noted != Noted())
        steps.clear()
        resets.append(1)
        generation = await node.manager.reset_cluster()
        await until(lambda: len(steps) >= 2 + is_written)
        assert node.cluster.shared_generation == generation
        assert await node.get(1) == 0, "the engine works"
    expected = ["to be written", "written", "noted"][: 2 + is_written]
    assert steps[: len(expected)] == expected
    assert ("noted" in steps) is is_written
    assert (Generation([tmp_path]).noted.name == generation) is is_written


async def test_a_node_with_blocks_of_an_earlier_run_joins_no_later_pool_by_itself(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks get into no later pool before Redis has said whether there was a reset."""
    stayed: list[int] = []
    monkeypatch.setattr(SharedPool, "stay", lambda _, number, *_rest: stayed.append(number))
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256, "ssd_cache_dir": str(tmp_path)}
    remote = {"enable_remote": True, "remote_cache_path": f"file://{tmp_path / 'remote'}"}
    (tmp_path / "remote").mkdir()
    for earlier_runs in range(2):
        async with Node({**keys, **ssd, **remote}) as node:
            assert stayed == [0] * earlier_runs
            await node.put(1)
            await until(lambda: Generation([tmp_path]).noted != Noted())


async def test_a_node_that_is_started_again_brings_no_blocks_to_a_node_that_was_cleared(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    """It keeps its SSD, and the pool of the remote tier of its blocks, not that of the other."""
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256, "ssd_cache_dir": str(tmp_path / "ssd")}
    remote = {"enable_remote": True, "remote_cache_path": f"file://{tmp_path / 'remote'}"}
    (tmp_path / "remote").mkdir()
    async with Node({**keys, **remote}) as cleared:
        async with Node({**keys, **ssd, **remote}) as member:
            await member.put(1)
            await until(lambda: Generation([tmp_path / "ssd"]).noted != Noted())
        cleared.manager.clear()
        await cleared.until(lambda store: store.is_joined and store.generation == 1)
        async with Node({**keys, **ssd, **remote}) as member:
            await member.until(lambda store: store.is_joined)
            await until(lambda: generations_of(member).is_known)
            assert await member.get(1) == BLOCKS
            await member.put(2)
            assert (member.store.generation, member.cluster.shared_generation) == (0, 0)
        assert [await cleared.get(seed) for seed in (1, 2)] == [0, 0]


async def test_a_node_that_was_cleared_alone_stays_apart_when_it_is_started_again(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    """A node that was cleared alone keeps its SSD, shares none of it, and gets no older blocks."""
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256, "ssd_cache_dir": str(tmp_path)}
    own = {**keys, **ssd, "enable_p2p_ssd": True}
    async with Node(keys) as other:
        await other.put(1)
        async with Node(own) as node:
            await until(lambda: peer_tokens(node, 1) > 0)
            assert await node.get(1) == WHOLE
            node.manager.clear()
            await node.put(2)
            await until(lambda: Generation([tmp_path]).noted.is_apart)
        async with Node(own) as again:
            await until(lambda: again.cluster.state.is_registered)
            await until(lambda: again.cluster.shared_generation is None)
            await until(lambda: len(again.cluster.state.nodes) == 1)
            assert again.manager.match(prompt(2, BLOCKS)).tokens > 0
            await other.put(3)
            await asyncio.sleep(0.3)
            assert (peer_tokens(again, 1), peer_tokens(again, 3)) == (0, 0)
            assert (peer_tokens(other, 2), await other.get(2)) == (0, 0)
            await other.manager.reset_cluster()
            await until(lambda: again.manager.match(prompt(2, BLOCKS)).tokens == 0)
            await other.put(4)
            await until(lambda: peer_tokens(again, 4) > 0)
            assert await again.get(4) == WHOLE


async def test_who_starts_after_another_node_was_cleared_alone_gets_nothing_of_before(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    """A new node may be the cleared one without an SSD; older blocks would reach their remote pool.

    Nodes that have blocks of the generation on SSD go on with it.
    """
    remote = {"enable_remote": True, "remote_cache_path": f"file://{tmp_path / 'remote'}"}
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256, "ssd_cache_dir": str(tmp_path)}
    (tmp_path / "remote").mkdir()
    async with Node({**keys, **remote}) as other, Node({**keys, **remote}) as cleared:
        async with Node({**keys, **ssd}) as member:
            await member.put(1)
            await until(lambda: Generation([tmp_path]).noted != Noted())
        await other.until_stores(1)
        await until(lambda: len(cleared.cluster.state.nodes) == 1)
        cleared.manager.clear()
        await cleared.until(lambda store: store.is_joined and store.generation == 1)
        await until(lambda: cleared.cluster.shared_generation is None)
        await until_closed(keys, cleared)
        async with Node({**keys, **remote}) as fresh, Node({**keys, **ssd}) as member:
            for node in (fresh, member):
                await until(lambda: len(node.cluster.state.nodes) == 3)  # noqa: B023
            await fresh.until(lambda store: store.is_joined and store.generation == 1)
            await until(lambda: fresh.cluster.shared_generation is None)
            assert member.cluster.shared_generation == 0
            await other.put(5)
            await until(lambda: peer_tokens(member, 5) == WHOLE * TOKENS)
            assert peer_tokens(fresh, 5) == 0
            assert [await node.get(1) for node in (fresh, cleared)] == [0, 0]


async def test_blocks_of_a_run_that_shared_nothing_are_not_shared_later(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    """A run without sharing tells nobody of its clears, so an earlier note is not true any more."""
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256, "ssd_cache_dir": str(tmp_path)}
    async with Node(keys) as other:
        async with Node({**keys, **ssd}) as node:
            await node.put(1)
            await until(lambda: Generation([tmp_path]).noted.name != 0)
        async with Node({**keys, **ssd}) as node:
            assert node.manager.match(prompt(1, BLOCKS)).tokens > 0
            await until(lambda: peer_tokens(other, 1) > 0 or len(other.cluster.state.nodes) == 1)
            assert node.manager.match(prompt(1, BLOCKS)).tokens > 0
        async with Node({**keys, **ssd, "enable_p2p_cpu": False}) as node:
            assert node.manager.match(prompt(1, BLOCKS)).tokens > 0
            node.manager.clear()
            await node.put(2)
        async with Node({**keys, **ssd}) as node:
            await until(lambda: node.manager.match(prompt(2, BLOCKS)).tokens == 0)
