"""The shared directory: writers that are killed, and file systems that lack or lose something."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv.common.errors import RemoteError
from flexkv.io.remote.directory import DirectoryStore
from flexkv.io.remote.open import join_pool, open_store
from flexkv.io.remote.options import RemoteOptions
from tests.remote_rigs import POOL, SPAN_BLOCKS, rig_over

from .mounted import mounted_disk
from .test_remote import Node

ONCE = RemoteOptions(deadline_s=60.0, retries=0)
ROOT = Path(__file__).parents[2]
NAME = POOL.object_name(b"\x07" * 16)
PARTS = [b"a" * 300_000, b"b" * 64, b"c" * 300_000, b"d" * 64]
WHOLE = b"".join(PARTS)

WRITER = """
import asyncio, os, sys, time
from pathlib import Path
from flexkv.io.remote.directory import DirectoryStore

folder, name, step = sys.argv[1:]
parts = [b"a" * 300_000, b"b" * 64, b"c" * 300_000, b"d" * 64]
real = os.pwritev

def stop(*arguments, **named):
    print("here", flush=True)
    time.sleep(1e6)

def half(fd, buffers, offset):
    if offset:
        stop()
    return real(fd, [memoryview(buffers[0])[:100_000]], offset)

setattr(os, step, half if step == "pwritev" else stop)
asyncio.run(DirectoryStore(Path(folder)).put(name, parts))
"""


def files_in(folder: Path) -> list[Path]:
    """Return all files below a directory."""
    return [path for path in folder.rglob("*") if path.is_file()]


def kill_writer(folder: Path, step: str) -> None:
    """Kill a process that puts an object when it comes to a step of that."""
    command = [sys.executable, "-c", WRITER, str(folder), NAME, step]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "here\n"
        writer.kill()


async def listed(store: DirectoryStore) -> list[str]:
    """Return the names of all objects."""
    return [each.name async for page in store.pages("") for each in page]


@pytest.mark.parametrize("step", ["pwritev", "fdatasync", "link", "unlink"])
async def test_a_writer_that_is_killed_leaves_no_part_of_an_object(
    tmp_path: Path, step: str
) -> None:
    """At whatever step it is killed the object is whole or absent, and can be written by others.

    What is left is in no listing, stays while it may be somebody's, and is swept after that.
    """
    kill_writer(tmp_path, step)
    store = DirectoryStore(tmp_path)
    is_there = step == "unlink"
    assert await listed(store) == [NAME] * is_there
    assert await store.put(NAME, PARTS) is not is_there
    assert await listed(store) == [NAME]
    assert await store.read(NAME) == WHOLE
    left = [path for path in files_in(tmp_path) if path.name != NAME[-32:]]
    assert len(left) == 1
    assert await store.sweep("", 3600.0) == 0
    os.utime(left[0], (1.0, 1.0))
    assert await store.sweep("", 3600.0) == 1
    assert [path.name for path in files_in(tmp_path)] == [NAME[-32:]]
    store.close()


async def test_without_hard_links_a_rename_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without links an object appears whole, too, and one that exists stays."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    store = DirectoryStore(tmp_path)
    assert await store.put(NAME, PARTS)
    assert not await store.put(NAME, [b"other"])
    assert await store.read(NAME) == WHOLE
    assert [path.name for path in files_in(tmp_path)] == [NAME[-32:]]
    store.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
async def test_a_put_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A full or failing disk is a RemoteError that says why; no file is left, and a retry works."""

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    store = DirectoryStore(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(RemoteError, match=os.strerror(number)) as caught:
            await store.put(NAME, PARTS)
    assert caught.value.blames_tier
    assert files_in(tmp_path) == []
    assert await store.put(NAME, PARTS)
    store.close()


async def test_a_mount_that_is_gone_is_no_miss(tmp_path: Path) -> None:
    """If the pool's directory is not there, a get fails and blames the tier."""
    store = DirectoryStore(tmp_path / "mount")
    await store.put(POOL.description_name, [b"{}"])
    with pytest.raises(FileNotFoundError):
        await store.read_into(NAME, 0, [memoryview(bytearray(9))])
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    with pytest.raises(RemoteError, match="gone") as caught:
        await store.read_into(NAME, 0, [memoryview(bytearray(9))])
    assert caught.value.blames_tier
    store.close()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Return a path at which file systems come and go."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        assert os.stat(elsewhere).st_dev != tmp_path.stat().st_dev
        yield Mount(tmp_path / "mount", Path(elsewhere))


class Mount:
    """A directory, or a link to one of another file system, which stands for a mount."""

    def __init__(self, path: Path, elsewhere: Path) -> None:
        self.path, self.elsewhere = path, elsewhere
        self.path.symlink_to(elsewhere)

    def unmount(self) -> None:
        """Leave an empty directory, as of the disk below a mount."""
        self.path.unlink()
        self.path.mkdir()

    def mount(self, folder: Path) -> None:
        """Have a folder's content there."""
        self.path.rmdir()
        self.path.symlink_to(folder)


@pytest.mark.parametrize("below", ["", "kv"])
async def test_what_is_unmounted_is_not_made_on_the_disk_below(mount: Mount, below: str) -> None:
    """A store whose file system is gone takes nothing; it does once that is back, as any device."""
    store = DirectoryStore(mount.path / below)
    assert await store.put(POOL.description_name, [b"{}"])
    mount.unmount()
    with pytest.raises(RemoteError, match="not mounted any more") as caught:
        await store.put(NAME, PARTS)
    assert caught.value.blames_tier
    assert list(mount.path.iterdir()) == []
    mount.mount(mount.elsewhere)
    assert await store.put(NAME, PARTS)
    mount.unmount()
    copy = mount.path.with_name("copy")  # it has another number, as NFS may when mounted again
    shutil.copytree(mount.elsewhere, copy)
    mount.mount(copy)
    other = POOL.object_name(b"\x08" * 16)
    assert await store.put(other, PARTS)
    assert (copy / below / other).exists()
    store.close()


async def test_what_is_deleted_is_made_again(mount: Mount) -> None:
    """A directory that somebody deletes is made again, since its file system is still there."""
    store = DirectoryStore(mount.path / "kv")
    assert await store.put(NAME, PARTS)
    shutil.rmtree(mount.elsewhere / "kv")
    assert await store.put(NAME, PARTS)
    store.close()


async def test_files_are_private(tmp_path: Path) -> None:
    """Objects and directories that the store makes can be read by their owner only."""
    store = DirectoryStore(tmp_path / "kv")
    await store.put(NAME, PARTS)
    modes = {path.stat().st_mode & 0o077 for path in (tmp_path / "kv").rglob("*")}
    assert modes == {0}
    store.close()


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_mounted_directory_that_fails_and_hangs(tmp_path: Path) -> None:
    """On a FUSE mount spans come and go; failures blame the tier; a hang ends late, never early.

    The kernel does not say when it is done with memory that it reads to, so the port waits for it,
    beyond its deadline, and nothing arrives after the end of a transfer.
    """
    with mounted_disk(tmp_path) as disk:
        store = open_store(f"file://{disk.mounted}/kv", {}, ONCE)
        await join_pool(store, POOL)
        async with rig_over(store, ONCE) as rig:
            await rig.store_spans(0, 1)
            (end,) = await rig.run(rig.get(1, 2 * SPAN_BLOCKS))
            assert end.error is None
            assert all(rig.right(1, 2 * SPAN_BLOCKS))
            disk.suffers_from("read")
            (end,) = await rig.run(rig.get(0, SPAN_BLOCKS))
            assert isinstance(end.error, RemoteError)
            disk.suffers_from("hang")
            hung = asyncio.ensure_future(rig.run(rig.get(0, SPAN_BLOCKS, at=10)))
            await settle()
            for until in next(iter(rig.port._jobs.values())).running.values():
                until.stop()  # as at its deadline
            await settle()
            assert not hung.done()
            disk.suffers_from("")
            (end,) = await hung
            assert isinstance(end.error, RemoteError)
            rig.arena.array[:] = 0
            (end,) = await rig.run(rig.get(0, SPAN_BLOCKS, at=20))
            assert end.error is None
            assert not rig.arena.array[:20].any()


async def test_a_flush_says_why_the_store_is_not_used(tmp_path: Path) -> None:
    """While no pool can be joined, the error of a flush has the reason of the last attempt."""
    (tmp_path / "kv").write_text("a file")
    keys = {"remote_cache_path": f"file://{tmp_path}/kv", "io_deadline_s": 1.0}
    async with Node(keys) as node:
        with pytest.raises(RemoteError, match="could not be joined in time: Not a directory"):
            await node.put(1)
