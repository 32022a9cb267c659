"""Tests that an SSD directory that is unusable or vanishes costs only its part, and is named."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.common.config import CacheConfig
from flexkv.common.errors import ConfigError, FlexKVError, StorageError
from flexkv.io.ssd.open import distinct
from flexkv.kvmanager import KVManager
from flexkv.tiers import presence
from tests.system.conftest import MODEL, PER_BLOCK, cache_config, kv_caches, open_fds, slots_of
from tests.system.forked import forked_server
from tests.system.serving import eventually, settings_in
from tests.system.test_warm import OTHER, PROMPT, put

NOBODY = 65534
Spoil = Callable[[Path], object]


def others_may_write(path: Path) -> None:
    """Make a directory with the mode of /tmp."""
    path.mkdir()
    path.chmod(0o1777)


def no_room_for_files(path: Path) -> None:
    """Make a directory that contains a directory with the name of a block file."""
    (path / "blocks-0000.flexkv").mkdir(parents=True)


def rubbish_for_a_journal(path: Path) -> None:
    """Make a directory whose journal is a directory."""
    (path / "journal.flexkv").mkdir(parents=True)


SPOILERS: dict[str, Spoil] = {
    "missing": lambda path: path.symlink_to(path.parent / "nowhere" / "kv"),
    "a file": lambda path: path.write_text("not a directory"),
    "a link to itself": lambda path: path.symlink_to(path),
    "not writable": lambda path: path.symlink_to("/sys/kernel"),
    "others may write": others_may_write,
    "no place for files": no_room_for_files,
    "no place for a journal": rubbish_for_a_journal,
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
async def test_a_directory_that_cannot_be_used_costs_its_part(tmp_path: Path, spoil: Spoil) -> None:
    """Half of the tier works; log, statistics and flush name the other half and the reason."""
    bad, good = tmp_path / "bad", tmp_path / "good"
    spoil(bad)
    before = open_fds()
    with capture_logs() as logs:
        async with KVManager(MODEL, cache_config(tmp_path, ssd_cache_dir=[bad, good])) as manager:
            manager.register_kv_caches(kv_caches())
            await manager.put(PROMPT, slots_of(range(16)))
            report = await manager.flush()
            statistics = manager.statistics()
    assert statistics.tiers["disk"].capacity_blocks == 64
    assert statistics.tiers["disk"].ready_blocks == 16
    assert list(statistics.unused_directories) == [str(bad)]
    assert report.unused_directories == statistics.unused_directories
    assert not statistics.missing_tiers
    told = [entry for entry in logs if entry["event"] == "ssd_directory_not_used"]
    assert [entry["directory"] for entry in told] == [str(bad)]
    assert open_fds() == before
    with pytest.raises(ConfigError) as caught:
        async with KVManager(MODEL, cache_config(tmp_path, ssd_cache_dir=[bad, good], strict=True)):
            pass
    assert caught.value.field == "ssd_cache_dir"
    assert str(caught.value.value).startswith(str(bad))
    assert open_fds() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o000, 0o500])
async def test_a_directory_that_is_forbidden_costs_its_part(mode: int) -> None:
    """A directory that this user may not enter or write to costs only its part."""
    with TemporaryDirectory() as folder:
        bad, good = Path(folder, "bad"), Path(folder, "good")
        for path in (Path(folder), bad, good):
            path.mkdir(exist_ok=True)
            os.chown(path, NOBODY, NOBODY)
        os.chmod(bad, mode)
        os.seteuid(NOBODY)
        try:
            async with KVManager(MODEL, cache_config(good, ssd_cache_dir=[bad, good])) as manager:
                statistics = manager.statistics()
        finally:
            os.seteuid(0)
    assert statistics.tiers["disk"].capacity_blocks == 64
    assert "Permission denied" in statistics.unused_directories[str(bad)]


async def test_a_directory_in_use_costs_its_part(tmp_path: Path) -> None:
    """A second engine uses the free directory, and names the process that has the other one."""
    both = [tmp_path / "a", tmp_path / "b"]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(KVManager(MODEL, cache_config(both[0])))
        second = await stack.enter_async_context(
            KVManager(MODEL, cache_config(tmp_path, ssd_cache_dir=both))
        )
        statistics = second.statistics()
        assert statistics.tiers["disk"].capacity_blocks == 64
        assert statistics.unused_directories == {
            str(both[0]): f"is in use by process {os.getpid()}"
        }


async def test_a_tier_that_cannot_be_had_is_loud(tmp_path: Path) -> None:
    """A missing tier is reported at the start, then regularly, in statistics and by flush.

    Reports recur each `num_log_interval_requests`; under `strict` the start fails.
    """
    nowhere = tmp_path / "nowhere" / "kv"
    with capture_logs() as logs:
        async with KVManager(MODEL, cache_config(nowhere, num_log_interval_requests=2)) as manager:
            manager.register_kv_caches(kv_caches())
            for _ in range(6):
                await manager.put(PROMPT, slots_of(range(16)))
            missing = manager.statistics().missing_tiers
            assert (await manager.flush()).missing_tiers == missing
    assert list(missing) == ["disk"]
    assert f"{nowhere.parent} does not exist" in missing["disk"]
    events = [(entry["log_level"], entry["event"]) for entry in logs]
    assert events.count(("error", "tier_not_available")) == 1
    assert events.count(("warning", "tier_still_not_available")) == 3
    with pytest.raises(ConfigError, match="does not exist"):
        async with KVManager(MODEL, cache_config(nowhere, strict=True)):
            pass


async def test_a_start_that_is_tried_again_forgets_what_the_first_one_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second start of a manager does not report a directory that exists by then."""
    both = [tmp_path / "a", tmp_path / "later" / "b"]
    manager = KVManager(MODEL, cache_config(tmp_path, ssd_cache_dir=both))
    with monkeypatch.context() as patch:
        patch.setattr("flexkv.tiers.backend.Arena.open", fail_to_open)
        with pytest.raises(ConfigError, match="planted"):
            async with manager:
                pass
    os.mkdir(both[1].parent, 0o700)
    async with manager:
        assert manager.statistics().unused_directories == {}
        assert manager.statistics().tiers["disk"].capacity_blocks == 128


def fail_to_open(*_: Any, **__: Any) -> None:
    """Raise the error of an arena that is too large."""
    raise ConfigError("cpu_cache_gb", 1, "planted")


# -- under a running engine -----------------------------------------------------------------------


def replaced(tier: Path) -> None:
    """Replace a directory by another one with the same files."""
    tier.rename(tier.parent / "before")
    shutil.copytree(tier.parent / "before", tier)


LOSSES: dict[str, Spoil] = {
    "the directory": shutil.rmtree,
    "a file of blocks": lambda tier: (tier / "blocks-0000.flexkv").unlink(),
    "the journal": lambda tier: (tier / "journal.flexkv").unlink(),
    "the superblock": lambda tier: (tier / "superblock.flexkv").unlink(),
    "moved away": lambda tier: tier.rename(tier.parent / "elsewhere"),
    "replaced": replaced,
    "a file replaced": lambda tier: shutil.copy(
        shutil.move(tier / "blocks-0000.flexkv", tier.parent / "old"), tier / "blocks-0000.flexkv"
    ),
}


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
async def test_what_is_removed_is_noticed_by_flush(
    tmp_path: Path, lose: Spoil, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a file or directory was removed, each flush raises, and the tier is down."""
    monkeypatch.setattr(presence, "LOOK_S", 3600.0)
    tier = tmp_path / "kv"
    with capture_logs() as logs:
        async with KVManager(MODEL, cache_config(tier)) as manager:
            manager.register_kv_caches(kv_caches())
            await manager.put(PROMPT, slots_of(range(16)))
            assert not (await manager.flush()).missing_tiers
            lose(tier)
            for _ in range(2):
                await manager.put(OTHER, slots_of(range(16, 32)))
                with pytest.raises(StorageError) as caught:
                    await manager.flush()
                assert caught.value.path.startswith(str(tier))
            disk = manager.statistics().tiers["disk"]
            assert (disk.reads, disk.writes) == ("down", "down")
            assert str(tier) in manager.statistics().missing_tiers["disk"]
            assert manager.match(PROMPT).tokens == len(PROMPT), "host memory serves on"
    assert [entry["event"] for entry in logs].count("tier_not_available") == 1


def test_what_is_removed_is_noticed_without_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removed directory is noticed without a flush, by regular checks."""
    monkeypatch.setattr(presence, "LOOK_S", 0.01)
    manager = KVManager(MODEL, cache_config(tmp_path / "kv"))
    manager.start()
    try:
        shutil.rmtree(tmp_path / "kv")
        eventually(lambda: manager.statistics().missing_tiers, 60)
        assert manager.statistics().tiers["disk"].writes == "down"
    finally:
        manager.shutdown()


async def test_what_is_there_is_not_taken_for_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Journals written anew, a missing lock file and a link in the path do not take a tier down."""
    monkeypatch.setattr(presence, "LOOK_S", 0.001)
    monkeypatch.setattr("flexkv.tiers.ledger.Ledger.journal_bytes_min", 100)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    async with KVManager(MODEL, cache_config(tmp_path / "link" / "kv")) as manager:
        manager.register_kv_caches(kv_caches())
        (tmp_path / "real" / "kv" / "lock.flexkv").unlink()
        for number in range(60):
            await manager.put(PROMPT + 100 * number, slots_of(range(16)))
            await manager.flush()
        assert not manager.statistics().missing_tiers


async def test_a_lost_tier_is_warm_again_where_it_is_found(tmp_path: Path) -> None:
    """A directory that was moved away and comes back holds what was stored before."""
    tier = tmp_path / "kv"
    async with KVManager(MODEL, cache_config(tier)) as manager:
        manager.register_kv_caches(kv_caches())
        await manager.put(PROMPT, slots_of(range(16)))
        await manager.flush()
        tier.rename(tmp_path / "moved")
        with pytest.raises(FlexKVError):
            await manager.flush()
    (tmp_path / "moved").rename(tier)
    async with KVManager(MODEL, cache_config(tier)) as manager:
        assert manager.statistics().restored_blocks == 16


# -- spellings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        "~/kv", "$HOME/kv", "${HOME}/kv/", "file://{home}/kv", "file:{home}/kv",
        "file://localhost{home}/kv", ["{home}/./kv"], '["{home}/kv"]', b"{home}/kv", "kv",
    ],
)  # fmt: skip
async def test_a_directory_is_found_however_it_is_written(
    tmp_path: Path, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every spelling of a directory leads to it; no directory `~`, `$HOME` or `file:` is made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if isinstance(given, list):
        given = [each.replace("{home}", str(tmp_path)) for each in given]
    elif isinstance(given, bytes):
        given = given.replace(b"{home}", os.fsencode(tmp_path))
    else:
        given = given.replace("{home}", str(tmp_path))
    async with KVManager(MODEL, CacheConfig(**cache_of(given))) as manager:
        assert "disk" in manager.statistics().tiers
    assert os.listdir(tmp_path) == ["kv"]


def cache_of(directory: Any) -> dict[str, Any]:
    """Return a small configuration with a directory as it is given."""
    return {
        "tokens_per_block": 4, "num_cpu_blocks": 8, "num_ssd_blocks": 8, "strict": True,
        "ssd_cache_dir": directory,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("s3://bucket/kv", "not a `s3:` address"),
        ("file://data/kv", "must not name a host"),
        ("file:///kv?mode=0700", "must not contain"),
        (["/data/kv", ""], "directory 2 of 2 must not be empty"),
        (["/data/kv", 7], "directory 2 of 2 must be text or a path"),
        ("/data/a,/data/b", "separate several by `;`"),
        ("/data/a:/data/b", "separate several by `;`"),
        ("[/data/a]", "JSON"),
        ("/data/\0", "NUL"),
        ("$FLEXKV_NO_SUCH/kv", "FLEXKV_NO_SUCH is not set"),
        ("~no-such-user/kv", "~no-such-user"),
        ("/data/../data/kv;/data/kv", "is the same directory as"),
        ("", "at least one directory"),
    ],
)
async def test_what_names_no_directory_is_refused_by_name(given: Any, why: str) -> None:
    """What names no directory is refused by name, even if not strict, before anything is opened."""
    values = {**cache_of(given), "enable_ssd": True, "strict": False}
    with pytest.raises(ConfigError) as caught:
        async with KVManager(MODEL, CacheConfig(**values)):
            pass
    assert caught.value.field == "ssd_cache_dir"
    assert why in caught.value.why


def test_one_directory_by_two_names_is_refused(tmp_path: Path) -> None:
    """Two paths to one directory, by a link or linked parent, are refused; the error names both."""
    (tmp_path / "kv").mkdir()
    (tmp_path / "link").symlink_to("kv")
    (tmp_path / "again").symlink_to(".")
    for other in (tmp_path / "link", tmp_path / "again" / "kv", tmp_path / "again" / "kv" / ".."):
        pair = [tmp_path / "kv", other]
        if other.name == "..":
            assert len(distinct(pair)) == 2
            continue
        with pytest.raises(ConfigError, match=r"is the same directory as .*/kv"):
            distinct(pair)


async def test_a_name_that_is_not_unicode_is_a_name(tmp_path: Path) -> None:
    """A directory's name may have spaces, quotes and bytes that are no UTF-8; reports print it."""
    name = os.fsencode(tmp_path) + b"/ \xff 'kv' \xe4"
    await put(tmp_path, PROMPT, ssd_cache_dir=name)
    assert (Path(os.fsdecode(name)) / "journal.flexkv").exists()
    async with KVManager(MODEL, cache_config(tmp_path, ssd_cache_dir=name)) as manager:
        assert manager.statistics().restored_blocks == 16
        shutil.rmtree(name)
        with pytest.raises(StorageError) as caught:
            await manager.flush()
        assert str(caught.value).encode()
        assert manager.statistics().missing_tiers["disk"].encode()


# -- flexkv doctor --------------------------------------------------------------------------------


def doctor(monkeypatch: pytest.MonkeyPatch, **variables: Any) -> tuple[int, dict[str, Any]]:
    """Run `flexkv doctor` with settings; return its exit status, and what it found, by name."""
    monkeypatch.setattr("flexkv.cli.doctor.PROBE_BYTES", 1 << 20)
    for name, value in variables.items():
        monkeypatch.setenv(f"FLEXKV_{name.upper()}", str(value))
    result = CliRunner().invoke(commands, ["doctor", "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_doctor_looks_at_what_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """doctor names each unusable directory, fails if none is usable, and leaves no files behind."""
    good, bad = tmp_path / "kv", tmp_path / "nowhere" / "kv"
    status, found = doctor(monkeypatch, ssd_cache_dir=f"{good};{bad}", num_ssd_blocks=8)
    assert (status, found["SSD tier"]["good"]) == (0, False)
    assert f"{bad.parent} does not exist" in found[f"SSD directory {bad}"]["found"]
    assert doctor(monkeypatch, strict="true")[0] == 1
    monkeypatch.delenv("FLEXKV_STRICT")
    assert doctor(monkeypatch, ssd_cache_dir=bad)[0] == 1
    assert doctor(monkeypatch, ssd_cache_dir=good)[0] == 0
    assert os.listdir(tmp_path) == []
    monkeypatch.delenv("FLEXKV_NUM_SSD_BLOCKS")
    status, found = doctor(monkeypatch, ssd_cache_gb=10**6)
    assert (status, found["SSD tier"]["advice"]) == (1, "set ssd_cache_gb lower")
    status, found = doctor(monkeypatch, ssd_cache_gb=0, cpu_cache_gb=10**6)
    assert status == 1
    assert found["host tier"]["found"].startswith("cpu_cache_gb=1000000: needs")


async def test_doctor_finds_a_directory_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """doctor names the process that uses a directory, and does not disturb it."""
    async with KVManager(MODEL, cache_config(tmp_path / "kv")) as manager:
        status, found = doctor(monkeypatch, ssd_cache_dir=tmp_path / "kv", num_ssd_blocks=8)
        assert status == 1
        assert f"is in use by process {os.getpid()}" in found["SSD tier"]["found"]
        assert not (await manager.flush()).missing_tiers


def test_the_offline_command_finds_a_directory_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command takes each spelling of a directory that `ssd_cache_dir` takes, and no others."""
    monkeypatch.setenv("HOME", str(tmp_path))
    asyncio.run(put(tmp_path / "kv", PROMPT))
    for given in ("~/kv", "$HOME/kv", f"file://{tmp_path}/kv"):
        result = CliRunner().invoke(commands, ["ssd", "inspect", given, "--json"])
        assert json.loads(result.stdout)["blocks"] == 16
    with pytest.raises(ConfigError, match="not a `s3:` address"):
        CliRunner().invoke(
            commands, ["ssd", "inspect", "s3://kv", "--json"], catch_exceptions=False
        )


def test_an_operator_s_flush_prints_what_is_not_there(tmp_path: Path) -> None:
    """A flush at a server whose SSD tier is missing says so, and exits with status 1."""
    settings = settings_in(tmp_path, ssd_cache_dir=str(tmp_path / "nowhere" / "kv"))
    server = forked_server(settings)
    try:
        flush = ["server", "flush", "--server", settings.server_recv_port]
        result = CliRunner().invoke(commands, flush)
        assert result.exit_code == 1, result.output
        assert "the disk tier is not available: none of its directories" in result.output
    finally:
        server.close()
    assert server.exit_status == 0


@pytest.mark.parametrize("namespace", [None, "tenant"])
async def test_a_directory_that_missed_a_clear_brings_nothing_back(
    tmp_path: Path, namespace: str | None
) -> None:
    """A directory that was left out while the tier was cleared brings no blocks back later."""
    folders = [tmp_path / "first", tmp_path / "second"]
    config = cache_config(tmp_path, ssd_cache_dir=folders)

    async def run(work: Callable[[KVManager], Awaitable[None]]) -> None:
        async with KVManager(MODEL, config) as manager:
            manager.register_kv_caches(kv_caches())
            await work(manager)
            await manager.flush()

    async def fill(manager: KVManager) -> None:
        for number in range(8):
            prompt = PROMPT[:PER_BLOCK] + 1000 * number
            await manager.put(prompt, slots_of([number]), namespace=namespace)

    def found(manager: KVManager) -> int:
        prompts = [PROMPT[:PER_BLOCK] + 1000 * number for number in range(8)]
        return sum(bool(manager.match(each, namespace).tokens) for each in prompts)

    async def is_there(manager: KVManager) -> None:
        assert found(manager) == 8

    async def clear(manager: KVManager) -> None:
        assert 0 < found(manager) < 8
        manager.clear(namespace=namespace)

    async def is_gone(manager: KVManager) -> None:
        assert found(manager) == 0

    await run(fill)
    await run(is_there)
    folders[1].chmod(0o777)
    await run(clear)
    folders[1].chmod(0o700)
    await run(is_gone)
    await run(fill)
    await run(is_there)
