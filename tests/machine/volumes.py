"""Helpers that mount file systems of every kind for a test, from a file or from memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOSPC
from pathlib import Path

import pytest

MB = 1 << 20
SIZE_MB = 400
"""XFS needs at least 300 MB."""
MAKERS = {
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "ext4": ["mkfs.ext4", "-q", "-m", "0"],
    "vfat": ["mkfs.vfat"],
    "ntfs": ["mkfs.ntfs", "-F", "-q", "-Q"],
}
MOUNTERS = {"ntfs": "ntfs-3g"}
"""Programs that mount a loop device for file systems that the kernel does not mount itself."""
OPTIONS = {"tmpfs": "mode=0700,size=400m", "ramfs": "mode=0700", "tmpfs-unbounded": "size=0"}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command and return its result; a missing program counts as failed, with status 127."""
    if shutil.which(command[0]) is None:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=False)


def loop_device(image: Path) -> str:
    """Return a new loop device over a file; skip the test where that is not possible."""
    made = run("losetup", "-f", "--show", str(image))
    if made.returncode:
        pytest.skip(f"no loop device can be had: {made.stderr.strip()}")
    return made.stdout.strip()


@contextmanager
def volume(kind: str, folder: Path, size_mb: int = SIZE_MB, options: str = "") -> Iterator[Path]:
    """Mount an empty file system below a folder; skip the test where that is not possible."""
    mounted, image = folder / kind, folder / f"{kind}.img"
    mounted.mkdir()
    if kind in MAKERS:
        if shutil.which(MAKERS[kind][0]) is None:
            pytest.skip(f"{MAKERS[kind][0]} is not installed")
        with image.open("wb") as file:
            file.truncate(size_mb * MB)
        made = run(*MAKERS[kind], str(image))
        assert made.returncode == 0, made.stderr
        command = ["mount", "-o", ",".join(filter(None, ["loop", options])), str(image)]
        if kind in MOUNTERS:
            command = [MOUNTERS[kind], "-o", options or "umask=022", loop_device(image)]
    else:
        name = kind.removesuffix("-unbounded")
        command = ["mount", "-t", name, "-o", options or OPTIONS[kind], name]
    done = run(*command, str(mounted))
    if kind in MOUNTERS:
        run("losetup", "-d", command[-1])  # detached once it is unmounted
    if done.returncode:
        pytest.skip(f"{kind} cannot be mounted: {done.stderr.strip()}")
    try:
        yield mounted
    finally:
        # Lazily, since the kernel releases an io_uring's files a little after the ring is closed.
        run("umount", "--lazy", str(mounted))


@contextmanager
def read_only(folder: Path, at: Path) -> Iterator[Path]:
    """Mount a directory a second time, for reading only."""
    at.mkdir()
    if (done := run("mount", "--bind", str(folder), str(at))).returncode:
        pytest.skip(f"nothing can be mounted: {done.stderr.strip()}")
    try:
        assert run("mount", "-o", "remount,bind,ro", str(at)).returncode == 0
        yield at
    finally:
        run("umount", "--lazy", str(at))


def fill(folder: Path) -> None:
    """Write files until not even a small file fits any more."""
    for name, size in (("large", 8 * MB), ("middle", 64 << 10), ("small", 4096), ("tiny", 1)):
        try:
            descriptor = os.open(folder / f"filler-{name}", os.O_CREAT | os.O_WRONLY)
        except OSError as error:
            assert error.errno == ENOSPC  # noqa: PT017 -- the disk is full
            return
        try:
            with suppress(OSError):
                while os.write(descriptor, bytes(size)) == size:
                    pass
            with suppress(OSError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for number in range(20_000):
        try:
            (folder / f"filler-{number}").write_bytes(b"1")
        except OSError as error:
            assert error.errno == ENOSPC  # noqa: PT017 -- the disk is full, which ends the loop
            return
