"""The remote tier of whole engines: what one has stored, others load from the same store."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.errors import ConfigError, TransferError
from flexkv.common.request import KVResponseStatus
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager
from flexkv.tiers.backend import LocalBackend
from flexkv.tiers.parts import StoreStatistics

TOKENS, BLOCKS = 16, 40
MODEL: dict[str, Any] = {
    "num_layers": 2, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16,
    "model_id": "a model",
}  # fmt: skip
SPAN = 16
"""Blocks of 8 KiB are small, so a span has as many as 256 tokens have."""
WHOLE = BLOCKS // SPAN * SPAN
"""The blocks in whole spans."""


class Node:
    """An engine with a device of 64 blocks, over a store that it shares with others."""

    def __init__(self, remote: dict[str, Any], **changes: Any) -> None:
        cache = CacheConfig(
            tokens_per_block=TOKENS,
            num_cpu_blocks=256,
            **{"enable_remote": True, **remote, **changes},
        )
        self.manager = KVManager(ModelConfig(**MODEL), cache)
        shape = 2, 64, TOKENS, 2, 64
        self.caches = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2)]

    async def __aenter__(self) -> Node:
        await self.manager.__aenter__()
        self.manager.register_kv_caches(self.caches)
        return self

    async def __aexit__(self, *raised: Any) -> None:
        await self.manager.__aexit__(*raised)

    @property
    def store(self) -> StoreStatistics:
        """Return what the remote tier knows of its store."""
        return self.manager.statistics().stores["remote"]

    async def until(self, condition: Callable[[StoreStatistics], bool]) -> None:
        """Wait until the statistics of the store meet a condition."""
        async with asyncio.timeout(120):
            while not condition(self.store):  # noqa: ASYNC110 -- the state of another engine
                await asyncio.sleep(0.01)

    async def until_gets(self, seed: int, blocks: int) -> None:
        """Get a prompt, again and again, until so many blocks come."""
        async with asyncio.timeout(60):
            while await self.get(seed) != blocks:  # noqa: ASYNC110 -- the state of another engine
                await asyncio.sleep(0.01)  # a get that finds nothing lets no other task run

    async def until_stores(self, seed: int) -> None:
        """Put a prompt, and wait until the store is said to have it."""
        async with asyncio.timeout(60):
            while self.store.known_spans < WHOLE // SPAN:
                await self.put(seed)

    async def put(self, seed: int, blocks: int = BLOCKS) -> None:
        """Put a prompt whose blocks' bytes depend on the seed, and flush."""
        for cache, content in zip(self.caches, contents(seed), strict=True):
            cache.copy_(content)
        tokens = prompt(seed, blocks)
        response = await self.manager.put(tokens, np.arange(len(tokens)))
        assert response.status is KVResponseStatus.SUCCESS
        await self.manager.flush()

    async def get(self, seed: int, blocks: int = BLOCKS) -> int:
        """Get a prompt, check the bytes of what came, and return how many blocks came."""
        for cache in self.caches:
            cache.zero_()
        tokens = prompt(seed, blocks)
        response = await self.manager.get(tokens, np.arange(len(tokens)))
        count = int(np.count_nonzero(response.return_mask)) // TOKENS
        for cache, content in zip(self.caches, contents(seed), strict=True):
            assert torch.equal(cache[:, :count], content[:, :count])
        return count


def prompt(seed: int, blocks: int) -> np.ndarray:
    """Return the tokens of a prompt."""
    return np.arange(blocks * TOKENS) + 100_000 * seed


def contents(seed: int) -> list[torch.Tensor]:
    """Return what belongs into each layer's cache."""
    random = torch.Generator().manual_seed(seed)
    shape = 2, 64, TOKENS, 2, 64
    return [torch.randn(shape, generator=random).to(torch.bfloat16) for _ in range(2)]


def listed(store: StoreStatistics) -> bool:
    """Return whether the store was listed once."""
    return store.listed_rounds > 0


@pytest.fixture(params=["directory", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Return the keys of an empty remote tier."""
    if request.param == "directory":
        return {"remote_cache_path": f"file://{tmp_path}/shared"}
    s3 = request.getfixturevalue("s3")
    return {
        "remote_cache_path": f"s3://{s3.new_bucket()}/kv/",
        "remote_config_custom": s3.custom,
    }


async def test_what_one_engine_stores_another_loads(remote: dict[str, Any]) -> None:
    """An engine with empty tiers of its own loads all whole spans, and stores nothing again."""
    async with Node(remote) as first:
        await first.put(1)
        written = first.manager.statistics().routes["host→remote"]
        assert (written.blocks, written.failed_ops) == (WHOLE, 0)
    async with Node(remote) as second:
        await second.until(listed)
        assert second.store.known_spans == WHOLE // SPAN
        assert await second.get(1) == WHOLE
        assert await second.get(2) == 0
        await second.manager.flush()
        statistics = second.manager.statistics()
        assert statistics.routes["remote→host"].blocks == WHOLE
        assert statistics.hit_blocks["remote"] == WHOLE
        assert "host→remote" not in statistics.routes
        assert second.store.requests.requests["get"] == WHOLE // SPAN


async def test_a_later_listing_finds_what_others_have_stored(remote: dict[str, Any]) -> None:
    """An engine that runs already learns of new spans by listing, and forgets deleted ones."""
    async with (
        Node(remote, remote_list_per_s=1000) as first,
        Node(remote, remote_list_per_s=1000) as second,
    ):
        await second.until(listed)
        await first.put(1)
        await second.until(lambda store: store.known_spans == WHOLE // SPAN)
        assert await second.get(1) == WHOLE


async def test_nothing_from_before_a_clear_comes_back(remote: dict[str, Any]) -> None:
    """After a clear neither this engine nor a later one loads what was stored before."""
    async with Node(remote) as node:
        await node.put(1)
        node.manager.clear()
        await node.manager.flush()
        assert await node.get(1) == 0
        await node.put(2)
        node.manager.clear(Tier.HOST)
        assert await node.get(2) == WHOLE
        assert node.store.generation == 1
    async with Node(remote) as later:
        await later.until(listed)
        assert [await later.get(seed) for seed in (1, 2)] == [0, WHOLE]


async def test_blocks_of_before_a_clear_of_another_engine_do_not_come_back_from_an_ssd(
    remote: dict[str, Any], tmp_path: Path
) -> None:
    """An engine that starts again joins one that was cleared, without its older blocks on SSD."""
    ssd = {"enable_ssd": True, "num_ssd_blocks": 256, "ssd_cache_dir": str(tmp_path / "ssd")}
    async with Node({**remote, **ssd}) as away:
        await away.until_stores(1)
    async with Node({**remote, **ssd}) as away:
        assert away.manager.match(prompt(1, BLOCKS)).tokens > 0
        await away.until(lambda store: store.is_joined)
        assert await away.get(1) == BLOCKS
    async with Node(remote, remote_list_per_s=1000) as cleared:
        await cleared.until(listed)
        cleared.manager.clear()
        await cleared.until(lambda store: store.generation == 1)
        async with Node({**remote, **ssd}) as away:
            await away.until(lambda store: store.generation == 1)
            assert await away.get(1) == 0
            await away.put(2)
            await away.manager.flush()
            rounds = cleared.store.listed_rounds
            await cleared.until(lambda store: store.listed_rounds > rounds + 1)
            assert (await cleared.get(1), await cleared.get(2)) == (0, WHOLE)
        async with Node({**remote, **ssd}) as away:
            await away.until(lambda store: store.is_joined)
            assert await away.get(2) == BLOCKS


async def test_engines_of_other_models_share_nothing(remote: dict[str, Any]) -> None:
    """Blocks of a model with another id are in another pool."""
    async with Node(remote) as first:
        await first.put(1)
    other = Node(remote)
    other.manager = KVManager(
        ModelConfig(**{**MODEL, "model_id": "another"}),
        CacheConfig(tokens_per_block=TOKENS, num_cpu_blocks=256, enable_remote=True, **remote),
    )
    async with other:
        await other.until(listed)
        assert other.store.known_spans == 0
        assert await other.get(1) == 0


async def test_a_pool_that_holds_other_blocks_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If something else is described in the pool's place, the tier is given up, and that is said.

    The log and the statistics say why; the engine serves from its own tiers.
    """
    remote = {"remote_cache_path": f"file://{tmp_path}/shared/"}
    async with Node(remote) as first:
        await first.until(listed)
    (description,) = tmp_path.glob("shared/*/pool.json")  # noqa: ASYNC240 -- a small directory
    description.write_text(description.read_text().replace("a model", "another"))
    with caplog.at_level(logging.WARNING):
        async with Node(remote, shutdown_flush_s=0.1) as second:
            await second.until(lambda _: bool(second.manager.statistics().missing_tiers))
            missing = second.manager.statistics().missing_tiers
            assert "'another' there and 'a model' here" in missing["remote"]
            with pytest.raises(TransferError, match=f"directory {tmp_path}/shared"):
                await second.put(1)
            assert await second.get(1) == BLOCKS
    assert "tier_not_available" in caplog.text
    assert "'another' there and 'a model' here" in caplog.text


async def test_nothing_is_written_if_that_is_not_wanted(remote: dict[str, Any]) -> None:
    """With `remote_write: off` an engine only reads."""
    async with Node(remote) as first:
        await first.put(1)
    async with Node(remote, remote_write="off") as second:
        await second.until(listed)
        await second.put(2)
        assert "host→remote" not in second.manager.statistics().routes
        assert await second.get(1) == WHOLE


async def test_a_store_that_is_away_costs_nothing_but_its_hits(tmp_path: Path) -> None:
    """An engine starts without its store, serves from its own tiers, and says what it lacks."""
    remote = {
        "remote_cache_path": "s3://bucket/kv/",
        "remote_config_custom": {
            "endpoint": "http://127.0.0.1:9", "region": "r", "access_key_id": "k",
            "secret_access_key": "s",
        },
        "shutdown_flush_s": 0.1, "io_deadline_s": 1.0,
    }  # fmt: skip
    async with Node(remote) as node:
        with pytest.raises(TransferError, match="s3://bucket/kv"):
            await node.put(1)
        assert await node.get(1) == BLOCKS
        assert not node.store.is_joined


async def test_an_engine_closes_while_its_store_is_silent() -> None:
    """A store that takes requests and never answers does not hold up the end of an engine."""
    silent = socket.create_server(("127.0.0.1", 0))  # accepts nothing, but the kernel does
    port = silent.getsockname()[1]
    remote = {
        "remote_cache_path": "s3://bucket/kv/",
        "remote_config_custom": {
            "endpoint": f"http://127.0.0.1:{port}", "region": "r", "access_key_id": "k",
            "secret_access_key": "s",
        },
        "shutdown_flush_s": 0.1, "io_deadline_s": 600.0,
    }  # fmt: skip
    async with asyncio.timeout(30), Node(remote) as node:
        tokens = prompt(1, BLOCKS)
        await node.manager.put(tokens, np.arange(len(tokens)))
    silent.close()


async def test_a_shard_with_a_hostile_name_costs_only_its_own_spans(s3: Any) -> None:
    """A name that the client refuses keeps no round from ending, and no engine from closing."""
    bucket = s3.new_bucket()
    remote = {
        "remote_cache_path": f"s3://{bucket}/kv/", "remote_config_custom": s3.custom,
        "remote_list_per_s": 1000.0,
    }  # fmt: skip
    async with Node(remote) as first:
        await first.put(1)
        backend = first.manager.engine._backend
        assert isinstance(backend, LocalBackend)
        assert backend.remote.pool is not None
        pool = (await backend.remote.pool.joined()).name
    s3.request("PUT", f"{bucket}/kv/{pool}/07//x")
    async with Node(remote) as second:
        await second.until(listed)
        assert await second.get(1) == WHOLE


def test_a_wrong_address_is_refused_by_its_key() -> None:
    """An address of an unknown kind is refused when the engine opens."""
    with pytest.raises(ConfigError, match="remote_cache_path"):
        asyncio.run(Node({"remote_cache_path": "ftp://host/dir"}).__aenter__())
