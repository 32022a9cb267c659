"""Tests of the SSD tier on file systems of every kind, full ones included."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from flexkv.common.errors import ConfigError, StorageError
from flexkv.io.memory.host_memory import headroom
from flexkv.io.ssd.allocation import gaps
from flexkv.kvmanager import KVManager
from tests.machine.volumes import MB, fill, read_only, run, volume
from tests.system.conftest import MODEL, cache_config, kv_caches, slots_of
from tests.system.mounted import Disk, mounted_disk
from tests.system.test_warm import PROMPT, got, put

pytestmark = pytest.mark.machine

TIER_MB = 220
"""More than what the tier leaves free: XFS has 320 MB, ext4 370."""
BLOCKS = TIER_MB * MB // 4096
KINDS = ["xfs", "ext4", "btrfs", "tmpfs"]


@pytest.fixture(params=KINDS)
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of each kind."""
    with volume(request.param, tmp_path) as path:
        yield path


def files_of(mounted: Path) -> list[Path]:
    """Return the block files in the directories of a volume."""
    return list(mounted.glob("*/blocks-*"))


def free_bytes(path: Path) -> int:
    """Return how many bytes this process may still allocate."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


async def test_an_allocated_tier_needs_no_room_to_start_again(mounted: Path) -> None:
    """A tier restarts warm, repeatedly, on a volume with less free room than the tier's size."""
    tier = mounted / "kv"
    await put(tier, PROMPT, num_ssd_blocks=BLOCKS)
    assert free_bytes(mounted) < TIER_MB * MB
    for _ in range(2):
        assert (await got(tier, num_ssd_blocks=BLOCKS))[::2] == (16, 0)


async def test_several_directories_and_files_need_no_room_to_start_again(mounted: Path) -> None:
    """With several directories and files, a restart allocates none of them again."""
    changes: dict[str, Any] = {
        "ssd_cache_dir": [str(mounted / name) for name in "abc"],
        "num_ssd_blocks": BLOCKS,
        "max_file_size_gb": 20 / 1024,
    }
    await put(mounted, PROMPT, **changes)
    assert len(files_of(mounted)) == 12
    assert (await got(mounted, **changes))[::2] == (16, 0)


async def test_a_full_disk_starts_warm(mounted: Path) -> None:
    """A tier on a disk without a free byte starts warm, also with a smaller size."""
    tier = mounted / "kv"
    await put(tier, PROMPT, num_ssd_blocks=BLOCKS)
    fill(mounted)
    assert (await got(tier, num_ssd_blocks=BLOCKS))[::2] == (16, 0)
    assert (await got(tier, num_ssd_blocks=BLOCKS // 2))[::2] == (16, 0), "smaller"


async def test_a_tier_that_grows_asks_for_what_it_lacks(mounted: Path) -> None:
    """Growing needs only the difference; a size that does not fit is refused and loses nothing."""
    tier = mounted / "kv"
    await put(tier, PROMPT, num_ssd_blocks=BLOCKS)
    more = BLOCKS + 20 * MB // 4096
    assert (await got(tier, num_ssd_blocks=more))[::2] == (16, 0)
    with pytest.raises(ConfigError, match=r"ssd_cache_gb=0.5: needs [\d.]+ MB more in") as caught:
        await got(tier, num_ssd_blocks=None, ssd_cache_gb=0.5)
    assert "set ssd_cache_gb lower" in caught.value.why
    assert (await got(tier, num_ssd_blocks=BLOCKS // 2))[::2] == (16, 0)
    assert sum(path.stat().st_size for path in tier.glob("blocks-*")) == BLOCKS // 2 * 4096


async def test_a_tier_that_was_allocated_in_part_gets_the_rest(mounted: Path) -> None:
    """Files that an earlier run left sparse are allocated where they have gaps."""
    tier = mounted / "kv"
    await put(tier, PROMPT, num_ssd_blocks=BLOCKS, ssd_preallocate=False)
    assert (await got(tier, num_ssd_blocks=BLOCKS))[::2] == (16, 0)
    (path,) = tier.glob("blocks-*")
    with path.open("rb") as file:
        assert gaps(file.fileno(), path.stat().st_size) == []
    assert path.stat().st_blocks * 512 >= TIER_MB * MB


@pytest.mark.parametrize("kind", ["ramfs", "tmpfs-unbounded"])
async def test_a_file_system_that_says_nothing_of_its_room_is_used(
    kind: str, tmp_path: Path
) -> None:
    """If the file system's statistics are all zeros, the machine's memory bounds the tier."""
    with volume(kind, tmp_path) as mounted:
        mounted.chmod(0o700)
        await put(mounted / "kv", PROMPT)
        assert (await got(mounted / "kv"))[::2] == (16, 0)
        with pytest.raises(ConfigError, match=r"ssd_cache_gb=1000: needs .* has"):
            await got(mounted / "kv", num_ssd_blocks=None, ssd_cache_gb=1000)
        assert (await got(mounted / "kv"))[::2] == (16, 0)


async def test_files_in_memory_leave_room_for_host_memory(tmp_path: Path) -> None:
    """Files in memory that do not fit beside host memory are refused before any allocation."""
    gb = headroom().available_bytes * 0.6 / (1 << 30)
    with volume("tmpfs-unbounded", tmp_path, options="size=0,mode=0700") as mounted:
        with pytest.raises(ConfigError, match=r"ssd_cache_gb=.*: needs .* more in"):
            await got(mounted / "kv", num_ssd_blocks=None, ssd_cache_gb=gb,
                      num_cpu_blocks=None, cpu_cache_gb=gb)  # fmt: skip
        assert os.statvfs(mounted).f_blocks == 0
        assert sum(path.stat().st_blocks for path in files_of(mounted)) == 0


@pytest.mark.parametrize("kind", ["vfat", "ntfs"])
async def test_a_volume_whose_mount_sets_the_modes_is_used(kind: str, tmp_path: Path) -> None:
    """A mount that sets the modes is used if others may only read, with a warning; else refused."""
    other = tmp_path / "other"
    other.mkdir()
    with volume(kind, tmp_path, options="umask=022") as mounted:
        with capture_logs() as logs:
            await put(mounted / "kv", PROMPT, strict=True)
            assert (await got(mounted / "kv", strict=True))[::2] == (16, 0)
        assert "file_readable_by_others" in [entry["event"] for entry in logs]
    with (
        volume(kind, other, options="umask=0") as mounted,
        pytest.raises(ConfigError, match="is writable by others"),
    ):
        await put(mounted / "kv", PROMPT, strict=True)


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[Disk]:
    """Mount a file system in user space."""
    with mounted_disk(tmp_path) as disk:
        yield disk


async def test_a_volume_that_refuses_chmod_is_used(fuse: Disk) -> None:
    """A volume that refuses chmod, as FAT and CIFS do, is used; a warning says others may read."""
    fuse.suffers_from("chmod modes mute")
    with capture_logs() as logs:
        await put(fuse.mounted / "kv", PROMPT)
        assert (await got(fuse.mounted / "kv"))[::2] == (16, 0)
    assert "file_readable_by_others" in [entry["event"] for entry in logs]
    assert "ssd_directory_not_used" not in [entry["event"] for entry in logs]


async def test_a_volume_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    """A volume that everybody may write to is refused by name."""
    with (
        volume("tmpfs", tmp_path, options="mode=0777,size=16m") as mounted,
        pytest.raises(ConfigError, match="is writable by others"),
    ):
        await put(mounted, PROMPT, strict=True)


async def test_a_read_only_volume_costs_the_tier_alone(tmp_path: Path) -> None:
    """On a read-only volume the engine starts without the SSD tier, and says why."""
    await put(tmp_path / "kv", PROMPT)
    with read_only(tmp_path / "kv", tmp_path / "ro") as path:
        async with KVManager(MODEL, cache_config(path)) as manager:
            statistics = manager.statistics()
    assert list(statistics.tiers) == ["host"]
    assert "Read-only file system" in statistics.missing_tiers["disk"]


@pytest.mark.parametrize("how", ["unmounted", "hidden"])
async def test_an_unmount_under_a_running_engine_is_noticed(tmp_path: Path, how: str) -> None:
    """After an unmount, where nobody will find the files, flush raises and the tier is down."""
    with volume("ext4", tmp_path) as mounted:
        async with KVManager(MODEL, cache_config(mounted / "kv")) as manager:
            manager.register_kv_caches(kv_caches())
            await manager.put(PROMPT, slots_of(range(16)))
            assert not (await manager.flush()).missing_tiers
            if how == "unmounted":
                assert run("umount", "--lazy", str(mounted)).returncode == 0
            else:
                assert run("mount", "-t", "tmpfs", "tmpfs", str(mounted)).returncode == 0
            with pytest.raises(StorageError):
                await manager.flush()
            assert str(mounted) in manager.statistics().missing_tiers["disk"]
        run("umount", "--lazy", str(mounted))
