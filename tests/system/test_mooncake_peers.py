"""Engines that share host memory by Mooncake's TransferEngine, and what becomes of its faults."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexkv.common.errors import BackendUnavailableError, ConfigError
from flexkv.io.memory.arena import Arena
from flexkv.io.peer import mooncake
from flexkv.io.peer.mooncake import MooncakeCounts
from flexkv.mover.installed import check_installed
from flexkv.mover.life import MoverLife
from flexkv.tiers.backend import LocalBackend

from .test_peers import Node, peer_tokens, until
from .test_remote import TOKENS, WHOLE


@pytest.fixture
def own(shared: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of nodes that share with each other by connections of their own."""
    return {**shared, "enable_remote": False, "node_ttl_seconds": 3.0, "io_deadline_s": 30.0}


@pytest.fixture
def keys(own: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return the keys of nodes that share with each other by Mooncake."""
    return {**own, "mooncake_config_path": config_file(tmp_path)}


def config_file(folder: Path, **changes: Any) -> str:
    """Write a configuration file, and return its path."""
    path = folder / "mooncake.json"
    path.write_text(json.dumps({"engine_ip": "127.0.0.1", "protocol": "tcp", **changes}))
    return str(path)


def counts(node: Node) -> MooncakeCounts:
    """Return what a node has read by Mooncake."""
    told = node.cluster.mooncake
    assert told is not None
    return told


def life(node: Node) -> MoverLife:
    """Return the life of a node's mover."""
    backend = node.manager.engine._backend
    assert isinstance(backend, LocalBackend)
    (parts,) = backend.tiers()
    found: MoverLife = parts.port._transport._mooncake._mover.life()  # type: ignore[attr-defined]
    return found


async def until_lent(*nodes: Node) -> None:
    """Wait until the engines of some nodes run."""
    for node in nodes:
        await until(lambda: counts(node).endpoint != "")  # noqa: B023 -- called at once


async def until_read_by_mooncake(owner: Node, reader: Node, seeds: Iterator[int]) -> None:
    """Have a reader get new prompts until one of them comes by Mooncake."""
    for seed in seeds:
        before = counts(reader).blocks
        await owner.put(seed)
        await until(lambda: peer_tokens(reader, seed) > 0)  # noqa: B023 -- called at once
        assert await reader.get(seed) == WHOLE
        if counts(reader).blocks == before + WHOLE:
            return


async def test_a_node_gets_what_another_one_has(keys: dict[str, Any]) -> None:
    """Blocks of another node come by Mooncake, with the right bytes, and nothing stays held."""
    async with Node(keys) as first, Node(keys) as second:
        await until_lent(first, second)
        await first.put(1)
        await until(lambda: peer_tokens(second, 1) == WHOLE * TOKENS)
        assert await second.get(1) == WHOLE
        assert second.manager.statistics().hit_blocks["peer"] == WHOLE
        found = counts(second)
        assert (found.lives, found.blocks, found.failed, found.fallbacks) == (1, WHOLE, 0, 0)
        assert found.reads > 0
        assert (found.spoiled, found.spoiled_bytes) == (0, 0)
        (read,) = second.cluster.read.values()
        assert (read.blocks, read.failed, read.wrong) == (WHOLE, 0, 0)
        await until(lambda: first.cluster.grants.grants == 0)
        assert first.manager.statistics().claims == 0


async def test_a_node_without_mooncake_uses_connections_of_its_own(
    own: dict[str, Any], keys: dict[str, Any]
) -> None:
    """Two nodes of which one has no Mooncake share all the same, in both directions."""
    async with Node(keys) as with_it, Node(own) as without:
        await until_lent(with_it)
        assert without.cluster.mooncake is None
        await with_it.put(1)
        await without.put(2)
        for node, seed in ((without, 1), (with_it, 2)):
            await until(lambda: peer_tokens(node, seed) > 0)  # noqa: B023 -- called at once
            assert await node.get(seed) == WHOLE
        assert counts(with_it).blocks == counts(with_it).failed == 0


@pytest.mark.parametrize("side", ["owner", "reader"])
async def test_a_mover_that_is_killed_is_replaced(
    keys: dict[str, Any], side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a mover is away, blocks come by TCP; then a new life serves. Nothing stays held."""
    monkeypatch.setattr(mooncake, "PAUSE_S", 0.01)
    seeds = iter(range(1, 1000))
    async with Node(keys) as owner, Node(keys) as reader:
        await until_lent(owner, reader)
        await until_read_by_mooncake(owner, reader, seeds)
        killed = owner if side == "owner" else reader
        for _ in range(3):
            seed = next(seeds)
            await owner.put(seed)
            await until(lambda: peer_tokens(reader, seed) > 0)  # noqa: B023 -- called at once
            os.kill(life(killed).pid, signal.SIGKILL)
            assert await reader.get(seed) == WHOLE
            await until_read_by_mooncake(owner, reader, seeds)
        assert counts(killed).lives == 4
        await until(lambda: owner.cluster.grants.grants == 0)
        for node in (owner, reader):
            assert node.manager.statistics().claims == 0


async def test_a_mover_that_is_stopped_costs_a_bounded_time(keys: dict[str, Any]) -> None:
    """An engine that hangs is given up long before the deadline, and then left out."""
    keys["io_deadline_s"] = 8.0
    async with Node(keys) as owner, Node(keys) as reader:
        await until_lent(owner, reader)
        stopped = life(owner).pid
        for seed in (1, 2):
            await owner.put(seed)
            await until(lambda: peer_tokens(reader, seed) > 0)  # noqa: B023 -- called at once
        os.kill(stopped, signal.SIGSTOP)
        try:
            async with asyncio.timeout(keys["io_deadline_s"]):
                assert await reader.get(1) == WHOLE
            before = counts(reader)
            assert before.failed > 0
            assert before.fallbacks >= before.failed
            assert await reader.get(2) == WHOLE
            assert counts(reader).failed == before.failed
            assert counts(reader).fallbacks > before.fallbacks
        finally:
            os.kill(stopped, signal.SIGCONT)


@pytest.mark.parametrize("is_reading", [False, True])
async def test_a_mover_ends_by_itself_and_leaves_nothing(
    keys: dict[str, Any], is_reading: bool
) -> None:
    """No mover has to be killed at a close, not even while it reads from a node that hangs."""
    async with Node(keys) as owner:
        async with Node(keys) as reader:
            await until_lent(owner, reader)
            lending, reading = life(owner), life(reader)
            await owner.put(1)
            await until(lambda: peer_tokens(reader, 1) > 0)
            getting = None
            if is_reading:
                os.kill(lending.pid, signal.SIGSTOP)
                getting = asyncio.ensure_future(reader.get(1))
                await until(lambda: counts(reader).reads > 0)
        if getting is not None:
            await asyncio.wait([getting])
            os.kill(lending.pid, signal.SIGCONT)
        assert reading._process.returncode == 0
    assert lending._process.returncode == 0
    for each in (lending, reading):
        with pytest.raises(ProcessLookupError):
            os.kill(each.pid, 0)


async def test_a_wrong_configuration_is_named(own: dict[str, Any], tmp_path: Path) -> None:
    """An engine does not start with a configuration of Mooncake that it cannot use."""
    for changes, match in (
        ({"engine_ip": "nowhere"}, "mooncake_config_path: engine_ip"),
        ({"protocol": "rdma"}, "p2p_trusted_network"),
    ):
        node = Node({**own, "mooncake_config_path": config_file(tmp_path, **changes)})
        with pytest.raises(ConfigError, match=match):
            await node.__aenter__()


async def test_what_is_not_installed_is_named_with_its_extra(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Mooncake the error says what to install: the engine was asked to use it."""
    (tmp_path / "mooncake").mkdir()
    missing = "raise ModuleNotFoundError(\"No module named 'mooncake'\")"
    (tmp_path / "mooncake/__init__.py").write_text(missing)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    check_installed.cache_clear()
    try:
        with pytest.raises(BackendUnavailableError, match=r"TransferEngine.*flexkv\[mooncake\]"):
            await Node(keys).__aenter__()
    finally:
        check_installed.cache_clear()


async def test_the_documented_metadata_server_is_not_used(
    keys: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file with a Redis for Mooncake works, though no such Redis is there."""
    changes = {"metadata_backend": "redis", "metadata_server": "redis://127.0.0.1:1"}
    keys["mooncake_config_path"] = config_file(tmp_path, **changes)
    with caplog.at_level(logging.INFO):
        async with Node(keys) as first, Node(keys) as second:
            await until_lent(first, second)
            await until_read_by_mooncake(first, second, iter(range(1, 100)))
    assert "mooncake_metadata_server_not_used" in caplog.text


async def test_host_memory_is_mapped_by_movers_only_where_they_lend_it(
    own: dict[str, Any], keys: dict[str, Any]
) -> None:
    """Without Mooncake host memory is private (ADR 4); a mover cannot write to what it lends."""
    plain = {"use_hugepage_cpu_buffer": False}
    async with Node(own, **plain) as private, Node(keys, **plain) as lending:
        await until_lent(lending)
        assert "private memory" in arena(private).why
        assert "shared memory" in arena(lending).why
        assert rights(life(lending).pid, "flexkv-arena") == ["r--s"]


def arena(node: Node) -> Arena:
    """Return a node's host memory."""
    backend = node.manager.engine._backend
    assert isinstance(backend, LocalBackend)
    return backend.arena


def rights(pid: int, name: str) -> list[str]:
    """Return with which rights a process maps memory of a name."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split()[1] for line in maps if name in line]
