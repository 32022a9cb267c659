"""A file system that passes calls on to a directory, and fails or hangs on demand.

    python -m tests.system.failing_disk MOUNTPOINT DIRECTORY CONTROL

The words in the file CONTROL say what goes wrong from now on. `read`, `write` and `sync` make these
calls fail with EIO; `hang` makes all three wait until the word is gone. `chmod` refuses chmod, and
`modes` reports that others may read each file, both as FAT and CIFS do. `mute` reports all sizes
as zero.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mfusepy


class FailingDisk(mfusepy.Operations):
    """The calls that an SSD tier makes."""

    use_ns = True

    def __init__(self, directory: Path, control: Path) -> None:
        self._directory, self._control = directory, control

    def _real(self, path: str) -> Path:
        return self._directory / path.lstrip("/")

    def _suffer(self, what: str) -> None:
        while "hang" in (words := self._control.read_text().split()):
            time.sleep(0.01)
        if what in words:
            raise mfusepy.FuseOSError(errno.EIO)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        """Return the result of stat."""
        try:
            found = self._real(path).lstat()
        except OSError as error:
            raise mfusepy.FuseOSError(error.errno or errno.EIO) from error
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_ino")
        told = {name: getattr(found, name) for name in names}
        if "modes" in self._control.read_text().split():
            told["st_mode"] = told["st_mode"] & ~0o777 | 0o755
        return told

    def mkdir(self, path: str, mode: int) -> int:
        """Make a directory."""
        self._real(path).mkdir(mode)
        return 0

    def readdir(self, path: str, fh: int) -> Iterator[str]:
        """Yield the names in a directory."""
        yield from (".", "..", *os.listdir(self._real(path)))

    def open(self, path: str, flags: int) -> int:
        """Open a file."""
        return os.open(self._real(path), os.O_RDWR)

    def create(self, path: str, mode: int, fi: object = None) -> int:
        """Create a file."""
        return os.open(self._real(path), os.O_RDWR | os.O_CREAT, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Read, unless the control file demands a failure."""
        self._suffer("read")
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        """Write, unless the control file demands a failure."""
        self._suffer("write")
        return os.pwrite(fh, data, offset)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        """Sync, unless the control file demands a failure."""
        self._suffer("sync")
        os.fsync(fh)
        return 0

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        """Set the length of a file."""
        os.truncate(self._real(path), length)
        return 0

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
        """Allocate room for a file."""
        os.posix_fallocate(fh, offset, size)
        return 0

    def rename(self, old: str, new: str) -> int:
        """Rename a file, replacing any file of the new name."""
        self._real(old).rename(self._real(new))
        return 0

    def unlink(self, path: str) -> int:
        """Remove a file."""
        self._real(path).unlink()
        return 0

    def chmod(self, path: str, mode: int) -> int:
        """Change the mode of a file, or refuse."""
        if "chmod" in self._control.read_text().split():
            raise mfusepy.FuseOSError(errno.EPERM)
        self._real(path).chmod(mode)
        return 0

    def release(self, path: str, fh: int) -> int:
        """Close a file."""
        os.close(fh)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        """Return how much room there is."""
        found = os.statvfs(self._directory)
        names = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_frsize", "f_namemax")
        says = "mute" not in self._control.read_text().split()
        return {name: getattr(found, name) if says else 0 for name in names}


if __name__ == "__main__":
    disk = FailingDisk(Path(sys.argv[2]), Path(sys.argv[3]))
    mfusepy.FUSE(disk, sys.argv[1], foreground=True, nothreads=False)
