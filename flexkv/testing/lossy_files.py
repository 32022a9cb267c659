"""Files of one directory that fail by a fault plan, and lose in a crash what was not synced.

A sync that fails loses what it should have written, as on Linux: readers of the file still see it,
but no later sync makes it durable.

The files stand in for the kernel under a real `Journal`; a contract test runs both.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EIO, ENOSPC
from itertools import count
from pathlib import Path
from random import Random

from flexkv.testing.faults import FaultPlan


class _File:
    """A file: what readers see, what the device has, and what it will have after a sync."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        self.durable = content
        self.dirty = bytearray(content)

    def append(self, data: bytes | memoryview) -> None:
        """Write at the end."""
        self.dirty = self.dirty.ljust(len(self.content), b"\0")
        self.content += data
        self.dirty += data

    def cut(self, size: int) -> None:
        """Drop everything behind the first `size` bytes."""
        del self.content[size:]
        del self.dirty[size:]

    def sync(self, fails: bool) -> None:
        """Make what was written since the last sync durable; if the sync fails, lose it."""
        if fails:
            self.dirty = bytearray(self.durable[: len(self.content)])
        else:
            self.durable = bytes(self.dirty)


class LossyFiles:
    """The file calls that a journal makes, over files in memory."""

    def __init__(self, faults: FaultPlan, contents: dict[str, bytes] | None = None) -> None:
        """Begin with some files, all of them durable."""
        self.on_io: Callable[[], None] = lambda: None
        self.faulty = True
        self._faults = faults
        self._names = {name: _File(content) for name, content in (contents or {}).items()}
        self._durable_names = dict(self._names)
        self._dirty_names = dict(self._names)
        """The files by name, without the changes of names that a failed sync has lost."""
        self._open: dict[int, _File] = {}
        self._fds = count(3)

    def _call(self, errno: int | None = None) -> None:
        self.on_io()
        if errno is not None and self._fails():
            raise OSError(errno, f"injected by {self._faults!r}")

    def _fails(self) -> bool:
        return self.faulty and self._faults.fails()

    def open(self, path: Path) -> int:
        """Open a file, which is created if it is missing, and return its descriptor."""
        self._call()
        fd = next(self._fds)
        self._open[fd] = self._names.setdefault(path.name, _File())
        self._dirty_names[path.name] = self._open[fd]
        return fd

    def read(self, fd: int) -> bytes:
        """Return the whole content of a file."""
        return bytes(self._open[fd].content)

    def write(self, fd: int, data: memoryview) -> int:
        """Append `data`, or only its first part, and return how many bytes were written."""
        self._call(ENOSPC)
        written = len(data)
        if self._faults.fails():
            written = 1 + self._faults.bit(written)
        self._open[fd].append(data[:written])
        return written

    def size(self, fd: int) -> int:
        """Return the size of a file in bytes."""
        self._call(EIO)
        return len(self._open[fd].content)

    def cut(self, fd: int, size: int) -> None:
        """Drop everything behind the first `size` bytes."""
        self._call(EIO)
        self._open[fd].cut(size)

    def sync(self, fd: int) -> None:
        """Make the content of a file durable."""
        self._call()
        fails = self._fails()
        self._open[fd].sync(fails)
        if fails:
            raise OSError(EIO, f"injected by {self._faults!r}")

    def close(self, fd: int) -> None:
        """Close a file, even if the call then reports an error."""
        del self._open[fd]
        self._call(EIO)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file, and replace any file of the new name."""
        self._call(EIO)
        file = self._names.pop(old.name)
        self._dirty_names.pop(old.name, None)
        self._names[new.name] = self._dirty_names[new.name] = file

    def remove(self, path: Path) -> None:
        """Remove a file, if it exists."""
        self._call(EIO)
        self._names.pop(path.name, None)
        self._dirty_names.pop(path.name, None)

    def sync_folder(self, folder: Path) -> None:
        """Make the names durable; if that fails, lose their changes since the last sync."""
        self._call()
        if self._fails():
            self._dirty_names = dict(self._durable_names)
            raise OSError(EIO, f"injected by {self._faults!r}")
        self._durable_names = dict(self._dirty_names)

    def is_at(self, path: Path, fd: int) -> bool:
        """Return whether an open file is the one at a path."""
        return self._names.get(path.name) is self._open[fd]

    @property
    def open_files(self) -> int:
        """Return how many descriptors are open."""
        return len(self._open)

    def remains(self, random: Random, power_loss: bool) -> dict[str, bytes]:
        """Return the content of each file, by name, that a crash at this moment leaves.

        After a loss of power the names are the old or the new ones, the length of a file is
        anything between the old and the new one, and each sector that was not synced is old or
        new. Without a loss of power, only what a failed sync has lost is missing.
        """
        if not power_loss:
            return {name: bytes(file.dirty) for name, file in self._names.items()}
        names = random.choice([self._dirty_names, self._durable_names])
        return {name: _lose(file, random) for name, file in names.items()}


def _lose(file: _File, random: Random) -> bytes:
    old, new = file.durable, bytes(file.dirty)
    kept = random.choice([0.0, 0.5, 0.9, 1.0])
    length = random.randint(min(len(old), len(new)), max(len(old), len(new)))
    left, sector = bytearray(), random.choice([1, 16, 512])
    for at in range(0, length, sector):
        end = min(at + sector, length)
        source = new if at < len(new) and random.random() < kept else old
        left += source[at:end].ljust(end - at, b"\0")
    return bytes(left)
