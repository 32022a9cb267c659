"""Tests of the SSD tier across restarts: warm, checked, and never of another kind."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from structlog.testing import capture_logs
from typer.testing import CliRunner, Result

from flexkv.cli.main import commands
from flexkv.common.config import ModelConfig
from flexkv.common.errors import ConfigError, FlexKVError, StorageError
from flexkv.common.request import KVResponseStatus
from flexkv.common.terms import Tier
from flexkv.engine.durability import FlushReport
from flexkv.io.ssd import file_calls, journal
from flexkv.kvmanager import KVManager
from flexkv.server.backend import ServerBackend
from flexkv.tiers.backend import LocalBackend
from tests.system.conftest import MODEL, PER_BLOCK, bytes_of, cache_config, kv_caches, slots_of

PROMPT = np.arange(16 * PER_BLOCK)
OTHER = PROMPT + 10_000


async def put(directory: Path, *prompts: Any, **changes: Any) -> Any:
    """Store prompts in one life of the tier; return the bytes of sixteen device blocks."""
    async with KVManager(MODEL, cache_config(directory, **changes)) as manager:
        caches = kv_caches()
        manager.register_kv_caches(caches)
        for prompt in prompts:
            await manager.put(prompt, slots_of(range(len(prompt) // PER_BLOCK)))
            await manager.flush()
        return bytes_of(caches, range(16))


async def got(directory: Path, prompt: Any = PROMPT, **changes: Any) -> tuple[int, Any, int]:
    """Get a prompt in the next life; return the blocks that came, their bytes, and corrupt ones."""
    async with KVManager(MODEL, cache_config(directory, **changes)) as manager:
        caches = kv_caches(seed=9)
        manager.register_kv_caches(caches)
        response = await manager.get(prompt, slots_of(range(16, 16 + len(prompt) // PER_BLOCK)))
        assert response.status in (KVResponseStatus.SUCCESS, KVResponseStatus.NOTFOUND)
        blocks = int(response.return_mask.sum()) // PER_BLOCK
        corrupt = manager.statistics().corrupt_blocks
        return blocks, bytes_of(caches, range(16, 16 + blocks)), corrupt


async def test_a_tier_comes_back_warm(tmp_path: Path) -> None:
    """The next process finds at its first request what was put."""
    wanted = await put(tmp_path, PROMPT)
    blocks, found, corrupt = await got(tmp_path)
    assert (blocks, corrupt) == (16, 0)
    assert np.array_equal(found, wanted)


async def test_namespaces_and_branches_come_back(tmp_path: Path) -> None:
    """Restored prompts share their prefix again, each namespace under its own root."""
    branch = np.concatenate([PROMPT[: 8 * PER_BLOCK], OTHER[: 4 * PER_BLOCK]])
    await put(tmp_path, PROMPT, branch)
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        assert manager.statistics().restored_blocks == 20
        assert manager.match(branch).tokens == 12 * PER_BLOCK
        assert manager.match(PROMPT).tokens == 16 * PER_BLOCK
        assert manager.match(PROMPT, "tenant").tokens == 0
        assert manager.namespace_blocks(None)[Tier.DISK] == 20


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokens_per_block": 8}, "tokens_per_block was 4, is now 8"),
        ({"key_secret": "other"}, "key_secret_digest"),
        ({"max_file_size_gb": 0.0001}, "rows_per_file was None"),
    ],
)
async def test_another_kind_of_blocks_starts_empty_or_refuses(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    """A tier of another kind of blocks starts empty and names the difference, or is refused."""
    await put(tmp_path, PROMPT)
    with pytest.raises(ConfigError, match="another kind") as caught:
        async with KVManager(MODEL, cache_config(tmp_path, ssd_on_mismatch="refuse", **change)):
            pass
    assert told in caught.value.why
    assert (await got(tmp_path))[0] == 16
    with capture_logs() as logs:
        async with KVManager(MODEL, cache_config(tmp_path, **change)) as manager:
            assert manager.statistics().restored_blocks == 0
    assert any(told in str(entry.get("differences")) for entry in logs)


async def test_another_model_starts_empty(tmp_path: Path) -> None:
    """A model of another shape finds nothing."""
    await put(tmp_path, PROMPT)
    other = ModelConfig(num_layers=3, num_kv_heads=4, head_size=8, dtype="float16")
    async with KVManager(other, cache_config(tmp_path)) as manager:
        assert manager.statistics().restored_blocks == 0


async def test_cleared_blocks_do_not_come_back(tmp_path: Path) -> None:
    """Blocks that were cleared, by namespace or all, do not come back after a restart."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        manager.register_kv_caches(kv_caches())
        for namespace in (None, "tenant"):
            await manager.put(PROMPT, slots_of(range(16)), namespace=namespace)
            await manager.flush()
        manager.clear(namespace="tenant")
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        assert manager.match(PROMPT, "tenant").tokens == 0
        assert manager.match(PROMPT).tokens == len(PROMPT)
        manager.reset()
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        assert manager.statistics().restored_blocks == 0


@pytest.mark.parametrize(("before", "after", "fits"), [(64, 8, 8), (16, 128, 16)])
async def test_another_size_keeps_what_fits(
    tmp_path: Path, before: int, after: int, fits: int
) -> None:
    """Rows beyond a smaller tier are lost, and stay lost when it grows again."""
    wanted = await put(tmp_path, PROMPT, num_ssd_blocks=before)
    blocks, found, corrupt = await got(tmp_path, num_ssd_blocks=after)
    assert (blocks, corrupt) == (fits, 0)
    assert np.array_equal(found, wanted[:, :, :fits])
    again, found, corrupt = await got(tmp_path, num_ssd_blocks=before + after)
    assert (again, corrupt) == (fits, 0)
    assert np.array_equal(found, wanted[:, :, :fits])


async def test_another_set_of_directories_keeps_what_fits(tmp_path: Path) -> None:
    """Each directory keeps its blocks when others are added, reordered or missing."""
    names = [str(tmp_path / name) for name in "abc"]
    wanted = await put(tmp_path, PROMPT, ssd_cache_dir=names[:2], num_ssd_blocks=64)
    more = {"ssd_cache_dir": [names[2], names[1], names[0]], "num_ssd_blocks": 96}
    blocks, found, corrupt = await got(tmp_path, **more)
    assert (blocks, corrupt) == (16, 0)
    assert np.array_equal(found, wanted)
    (tmp_path / "a").rename(tmp_path / "gone")
    missing = str(tmp_path / "nowhere" / "a")
    with capture_logs() as logs:
        blocks, _, corrupt = await got(
            tmp_path, ssd_cache_dir=[missing, names[1]], num_ssd_blocks=64
        )
    assert (blocks, corrupt) == (0, 0), "the first block is in the directory that is missing"
    assert any(entry["event"] == "ssd_directory_not_used" for entry in logs)


async def test_without_any_directory_the_engine_goes_on(tmp_path: Path) -> None:
    """If no directory is usable, the engine goes on with host memory, and the log says so."""
    with capture_logs() as logs:
        async with KVManager(MODEL, cache_config(tmp_path / "gone" / "ssd")) as manager:
            manager.register_kv_caches(kv_caches())
            await manager.put(PROMPT, slots_of(range(16)))
            await manager.flush()
            assert manager.match(PROMPT).tokens == len(PROMPT)
            assert list(manager.statistics().tiers) == ["host"]
    assert any(entry["event"] == "ssd_directory_not_used" for entry in logs)


async def test_a_journal_that_is_no_journal_costs_its_blocks_only(tmp_path: Path) -> None:
    """Rubbish in place of a journal empties the tier, which can be used again."""
    await put(tmp_path, PROMPT)
    (tmp_path / journal.NAME).write_bytes(os.urandom(4096))
    assert (await got(tmp_path))[0] == 0
    await put(tmp_path, PROMPT)
    assert (await got(tmp_path))[0] == 16


async def test_the_journal_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal stays bounded, however long an engine writes."""
    monkeypatch.setattr("flexkv.tiers.ledger.Ledger.journal_bytes_min", 4096)
    monkeypatch.setattr("flexkv.tiers.ledger.Ledger.snapshot_blocks", 8)
    async with KVManager(MODEL, cache_config(tmp_path, num_ssd_blocks=32)) as manager:
        manager.register_kv_caches(kv_caches())
        for number in range(60):
            await manager.put(PROMPT + 100 * number, slots_of(range(16)))
            await manager.flush()
        last = PROMPT + 100 * 59
        assert (tmp_path / journal.NAME).stat().st_size < 16 << 10
    blocks, _, corrupt = await got(tmp_path, last, num_ssd_blocks=32)
    assert (blocks, corrupt) == (16, 0)


async def test_a_run_without_a_journal_leaves_none_behind(tmp_path: Path) -> None:
    """After a run without a journal nothing is restored, since it may have overwritten blocks."""
    await put(tmp_path, PROMPT)
    await put(tmp_path, OTHER, ssd_warm_restart=False)
    assert (await got(tmp_path))[::2] == (0, 0)


async def test_a_refusal_leaves_every_file_as_it_was(tmp_path: Path) -> None:
    """A refused tier keeps every file as it was, even if the new one would be smaller."""
    wanted = await put(tmp_path, PROMPT)
    with pytest.raises(ConfigError, match="another kind"):
        await put(tmp_path, key_secret="other", num_ssd_blocks=4, ssd_on_mismatch="refuse")
    blocks, found, _ = await got(tmp_path)
    assert blocks == 16
    assert np.array_equal(found, wanted)


async def test_evicted_blocks_of_a_cleared_namespace_stay_away(tmp_path: Path) -> None:
    """Blocks that a cleared namespace had evicted do not come back from the journal."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        manager.register_kv_caches(kv_caches())
        await manager.put(PROMPT, slots_of(range(16)), namespace="tenant")
        await manager.flush()
        manager.set_quota("tenant", Tier.DISK, 0)
        manager.set_quota("tenant", Tier.HOST, 0)
        manager.clear(namespace="tenant")
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        assert manager.match(PROMPT, "tenant").tokens == 0


def fail_writes(patch: pytest.MonkeyPatch, directory: Path) -> None:
    """Make all writes to the directory's journal fail with ENOSPC."""
    write, name = os.write, str(directory / journal.NAME)

    def full(fd: int, data: Any) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") == name:
            raise OSError(28, "no space")
        return write(fd, data)

    patch.setattr(file_calls.os, "write", full)


async def test_what_a_full_journal_did_not_take_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush raises while the journal is full; the next flush that succeeds has written all."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        manager.register_kv_caches(kv_caches())
        with monkeypatch.context() as patch:
            fail_writes(patch, tmp_path)
            await manager.put(PROMPT, slots_of(range(16)))
            with pytest.raises(StorageError, match="ENOSPC"):
                await manager.flush()
            assert manager.match(PROMPT).tokens == len(PROMPT)
        await manager.flush()
    assert (await got(tmp_path))[0] == 16


async def test_a_clear_works_on_a_full_disk_or_says_that_it_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk a clear of all works, and a clear of a namespace raises."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        manager.register_kv_caches(kv_caches())
        for namespace in (None, "tenant"):
            await manager.put(PROMPT, slots_of(range(16)), namespace=namespace)
            await manager.flush()
        with monkeypatch.context() as patch:
            fail_writes(patch, tmp_path)
            with pytest.raises(StorageError):
                await manager.engine.retention.clear_durably(namespace="tenant")
            assert manager.match(PROMPT, "tenant").tokens == 0
            with pytest.raises(StorageError):
                await manager.flush()
            manager.reset()
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        assert manager.statistics().restored_blocks == 0


async def test_a_flush_ends_when_the_engine_is_closed(tmp_path: Path) -> None:
    """Flushes end when the engine is closed, with a report or an error."""
    manager = KVManager(MODEL, cache_config(tmp_path))
    async with manager:
        manager.register_kv_caches(kv_caches())
        await manager.put(PROMPT, slots_of(range(16)))
        flushes = [asyncio.ensure_future(manager.flush()) for _ in range(3)]
        await asyncio.sleep(0)
    done = await asyncio.wait_for(asyncio.gather(*flushes, return_exceptions=True), 10)
    assert all(isinstance(result, FlushReport | FlexKVError) for result in done)


@pytest.mark.parametrize(
    ("name", "changes", "warned"),
    [("", {}, 1), ("model", {}, 0), ("", {"ssd_warm_restart": False}, 0)],
)
async def test_a_warm_tier_of_a_model_without_a_name_warns(
    tmp_path: Path, name: str, changes: dict[str, Any], warned: int
) -> None:
    """A warm tier of a model without a name causes a single warning with the missing key."""
    model = ModelConfig(**{**MODEL.model_dump(), "model_id": name})
    with capture_logs() as logs:
        async with KVManager(model, cache_config(tmp_path, **changes)):
            pass
    told = [entry for entry in logs if entry["event"] == "model_id_not_given"]
    assert len(told) == warned
    assert all((entry["log_level"], entry["field"]) == ("warning", "model_id") for entry in told)


@pytest.mark.parametrize(("kind", "warned"), [(LocalBackend, 0), (ServerBackend, 1)])
def test_host_memory_of_a_model_without_a_name_warns_if_it_is_shared(
    tmp_path: Path, kind: type[LocalBackend], warned: int
) -> None:
    """Shared host memory of a model without a name causes a warning; an engine's own does not."""
    cache = cache_config(tmp_path, num_ssd_blocks=0, enable_ssd=False)
    with capture_logs() as logs, ExitStack() as undo:
        kind(cache, cache.sized(MODEL)).open(undo, None)
    assert [entry["event"] for entry in logs].count("model_id_not_given") == warned


# -- offline --------------------------------------------------------------------------------------


async def test_the_command_looks_at_a_stopped_tier(tmp_path: Path) -> None:
    """inspect counts blocks, verify drops corrupt ones, clear empties; all refuse a tier in use."""
    await put(tmp_path, PROMPT)
    inspected = json.loads(flexkv("inspect", tmp_path, "--json").stdout)
    assert (inspected["blocks"], inspected["namespaces"], inspected["dtype"]) == (16, 1, "float16")
    assert flexkv("verify", tmp_path).exit_code == 0
    with (tmp_path / "blocks-0000.flexkv").open("r+b") as content:
        content.seek(7 * 4096)
        content.write(b"other bytes")
    result = flexkv("verify", tmp_path, "--drop", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["rows of corrupt blocks"] == [7]
    assert (await got(tmp_path))[::2] == (7, 0), "known before it is read"
    assert flexkv("clear", tmp_path, "--yes").exit_code == 0
    assert (await got(tmp_path))[0] == 0
    async with KVManager(MODEL, cache_config(tmp_path)):
        with pytest.raises(ConfigError, match="in use"):
            flexkv("inspect", tmp_path)
    with pytest.raises(ConfigError, match=r"superblock\.flexkv is missing"):
        flexkv("inspect", tmp_path.parent)


def flexkv(verb: str, directory: Path, *options: str) -> Result:
    """Run `flexkv ssd`, and raise what it raises."""
    result = CliRunner().invoke(commands, ["ssd", verb, str(directory), *options])
    structlog.reset_defaults()  # the command's log stream is closed by now
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# -- bytes that changed --------------------------------------------------------------------------


async def test_a_flipped_bit_is_a_miss(tmp_path: Path) -> None:
    """A corrupt block is dropped, counted and logged with its place; the prefix is returned."""
    wanted = await put(tmp_path, PROMPT)
    file = tmp_path / "blocks-0000.flexkv"
    with file.open("r+b") as content:
        content.seek(5 * 4096 + 77)
        byte = content.read(1)
        content.seek(-1, os.SEEK_CUR)
        content.write(bytes([byte[0] ^ 4]))
    with capture_logs() as logs:
        blocks, found, corrupt = await got(tmp_path, chunk_mb=4096 / 2**20)
    assert (blocks, corrupt) == (5, 1)
    assert np.array_equal(found, wanted[:, :, :5])
    (entry,) = [entry for entry in logs if entry["event"] == "corrupt_block"]
    assert (entry["path"], entry["offset_bytes"]) == (str(file), 5 * 4096)
    assert (await got(tmp_path))[0] == 5, "dropped for good"


def empty(directory: Path) -> None:
    """Remove every file."""
    for leftover in directory.iterdir():
        leftover.unlink()


async def until_scrubbed(manager: KVManager, blocks: int) -> None:
    """Wait until the scrubber has checked this many blocks."""
    backend = manager.engine._backend
    assert isinstance(backend, LocalBackend)
    scrubber = backend.ssd.scrubber
    assert scrubber is not None
    async with asyncio.timeout(20):
        while scrubber.checked_blocks < blocks:  # noqa: ASYNC110 -- the scrubber has no event
            await asyncio.sleep(0.005)


async def test_what_rests_is_read_in_idle_time(tmp_path: Path) -> None:
    """The scrubber drops a corrupt block before anybody asks for it, and keeps sound ones."""
    await put(tmp_path, PROMPT)
    with (tmp_path / "blocks-0000.flexkv").open("r+b") as content:
        content.seek(9 * 4096 + 5)
        content.write(b"changed")
    async with KVManager(MODEL, cache_config(tmp_path, ssd_scrub_mb_per_s=4000)) as manager:
        await until_scrubbed(manager, 40)
        assert manager.match(PROMPT).tokens == 9 * PER_BLOCK
        assert manager.statistics().corrupt_blocks == 1
    assert (await got(tmp_path))[::2] == (9, 0)


DAMAGES = int(os.environ.get("DAMAGES", "300"))


async def test_damaged_files_never_give_wrong_bytes(tmp_path: Path) -> None:
    """After DAMAGES flips, swaps and cuts no get has a wrong byte, and each counts the damage.

    The bytes behind a block in its place belong to no block: a change there is no damage.
    """
    random = np.random.default_rng(1)
    file, stride = tmp_path / "blocks-0000.flexkv", 4096
    size = MODEL.spaces(PER_BLOCK)[0].block_bytes
    damaged = read_damaged = told = 0
    while damaged < DAMAGES:
        empty(tmp_path)
        wanted = await put(tmp_path, PROMPT, num_ssd_blocks=16)
        content = bytearray(file.read_bytes())
        before = bytes(content)
        for _ in range(random.integers(1, 20)):
            kind, row = random.integers(4), int(random.integers(16)) * stride
            if kind < 2:
                for _ in range(random.integers(1, 4)):
                    content[row + int(random.integers(stride))] ^= 1 << int(random.integers(8))
            elif kind == 2:
                other = int(random.integers(16)) * stride
                content[row : row + stride], content[other : other + stride] = (
                    content[other : other + stride],
                    content[row : row + stride],
                )
            else:
                cut = row + int(random.integers(stride))
                content[cut:] = bytes(len(content) - cut)
            damaged += 1
        file.write_bytes(content)
        bad = [
            row
            for row in range(16)
            if content[row * stride :][:size] != before[row * stride :][:size]
        ]
        blocks, found, corrupt = await got(tmp_path, num_ssd_blocks=16, chunk_mb=stride / 2**20)
        assert np.array_equal(found, wanted[:, :, :blocks]), "wrong bytes"
        assert blocks == (min(bad) if bad else 16)
        read_damaged += bool(bad)
        told += bool(corrupt)
    assert told == read_damaged
