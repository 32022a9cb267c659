"""A directory that several machines share (NFS, Lustre, a FUSE mount) as a store.

An object is a file. A put writes a temporary file, syncs it and gives it its name by a hard link,
which fails if the name exists: so an object appears whole, once. Where there are no hard links, the
file is renamed, which may replace another one, but by one with the same bytes. A process that is
killed leaves at most a temporary file, which no listing shows and a sweep removes.

Calls on files block, some of them for long, so each runs in a thread: reads, writes and all other
calls in threads of their own, so that one kind does not wait for another that hangs. Reads go
straight to the caller's memory, in one system call for many buffers.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from typing_extensions import Buffer

from flexkv.common.errors import RemoteError
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.remote.landing import FileLanding, Landing
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.store import Listed
from flexkv.process.background import in_background
from flexkv.process.workers import Workers

T = TypeVar("T")

_TEMPORARY = "."
"""What the names of temporary files begin with; no object's name does."""
_BUFFERS_MAX = 512
"""Buffers of one system call; the kernel's limit (IOV_MAX) is 1024."""
_PIECE_BYTES = 8 << 20
"""Bytes of one system call, after which a reader looks whether it is to stop."""
_NO_LINKS = {errno.EPERM, errno.EROFS, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}
_LASTING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
_PAGE = 1000


class _Stop:
    """Tells a thread that nobody waits for its work any more."""

    __slots__ = ("is_set",)

    def __init__(self) -> None:
        self.is_set = False


class DirectoryStore:
    """A store in a directory, which is created with its first object."""

    kind = "directory"

    def __init__(self, root: Path, readers: int = 8, writers: int = 4) -> None:
        """Start the threads.

        Raises:
            OSError: they cannot be started.
        """
        self.where = f"directory {root}"
        self._root = root
        self._home: tuple[Path, int] | None = None
        """The folder below the root that was written to last, and its file system's number."""
        counts = {"read": readers, "write": writers, "name": 2}
        self._pools = in_background(
            lambda: {
                name: Workers(count, f"flexkv-remote-{name}") for name, count in counts.items()
            }
        )

    def doubts(self) -> str:
        """Return why others may change what is in the directory; "" if only we and root may.

        Checksums find damage, but whoever may write here can forge blocks that have right ones.
        """
        try:
            found = self._root.stat()
        except OSError:
            return ""  # it is not there yet: it will be ours
        if found.st_uid not in (0, os.geteuid()):
            return f"it belongs to user {found.st_uid}"
        if found.st_mode & 0o022:
            return f"others may write to it: mode {found.st_mode & 0o7777:o}"
        return ""

    # -- bytes ----------------------------------------------------------------------------------

    async def read_into(self, name: str, first: int, buffers: Sequence[memoryview]) -> int:
        """Read the bytes of an object from `first` on into buffers in turn; return how many."""
        stop = _Stop()

        def read() -> int:
            try:
                fd = os.open(self._root / name, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if not (self._root / name.partition("/")[0]).is_dir():
                    raise OSError(errno.ESTALE, "the pool's directory is gone") from None
                raise
            try:
                return _moved(os.preadv, fd, buffers, first, stop)
            finally:
                os.close(fd)

        return await self._run("read", "get", read, stop)

    async def put(self, name: str, buffers: Sequence[Buffer]) -> bool:
        """Create an object whose bytes are the buffers' in turn; return False if it exists."""
        path, stop = self._root / name, _Stop()
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        folder = self._root / name.partition("/")[0]

        def write() -> bool:
            if path.exists():
                return False
            temporary = path.with_name(f"{_TEMPORARY}{path.name}.{secrets.token_hex(8)}")
            fd = self._created(temporary)
            try:
                try:
                    wanted = sum(view.nbytes for view in views)
                    if _moved(os.pwritev, fd, views, 0, stop) < wanted:
                        raise TimeoutError(errno.ETIMEDOUT, "nobody waits for it any more")
                    os.fdatasync(fd)
                finally:
                    os.close(fd)
                self._home = folder, path.parent.stat().st_dev
                return _named(temporary, path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)

        try:
            return await self._run("write", "put", write, stop)
        except FileNotFoundError as error:
            why = "its directory was removed meanwhile"
            raise RemoteError(self.where, "put", why) from error

    def _created(self, path: Path) -> int:
        """Return a descriptor of a new private file; missing directories are made.

        Raises:
            OSError: it cannot be created, or what was written last is gone with its file system.
                Otherwise an unmounted directory would be made again, on the disk below it.
        """
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            if self._is_unmounted():
                raise OSError(errno.ESTALE, "its file system is not mounted any more") from None
            _make_private(path.parent)
            return os.open(path, flags, 0o600)

    def _is_unmounted(self) -> bool:
        """Return whether what was written last is gone, and another file system is in its place."""
        if self._home is None or self._home[0].exists():
            return False
        there = next(folder for folder in (self._root, *self._root.parents) if folder.exists())
        return there.stat().st_dev != self._home[1]

    async def read(self, name: str) -> bytes:
        """Return a small object's bytes."""
        return await self._run("name", "get", (self._root / name).read_bytes)

    def landing(self, requests: Requests, host: HostBlocks, copier: Copier) -> Landing:
        """Return the landing that brings spans from here."""
        return FileLanding(self, requests, host, copier)

    # -- names ----------------------------------------------------------------------------------

    async def head(self, name: str) -> Listed:
        """Return an object's size and age."""
        found = await self._run("name", "head", (self._root / name).stat)
        return Listed(name, found.st_size, found.st_mtime)

    async def pages(self, prefix: str) -> AsyncIterator[list[Listed]]:
        """Yield the objects whose names begin with `prefix`, which ends in a slash, by pages."""
        folders = [prefix]
        while folders:
            folder = folders.pop()
            scan = _entries(self._root / folder)

            def page(scan: Iterator[os.DirEntry[str]] = scan, at: str = folder) -> list[Listed]:
                found: list[Listed] = []
                for entry in scan:
                    with suppress(FileNotFoundError):
                        if entry.is_dir():
                            folders.append(f"{at}{entry.name}/")
                        else:
                            status = entry.stat()
                            found.append(
                                Listed(f"{at}{entry.name}", status.st_size, status.st_mtime)
                            )
                    if len(found) == _PAGE:
                        break
                return found

            while found := await self._run("name", "list", page):
                yield found

    async def delete(self, name: str) -> None:
        """Delete an object; one that is not there is no error."""
        with suppress(FileNotFoundError):
            await self._run("name", "delete", (self._root / name).unlink)

    async def touch(self, name: str) -> None:
        """Make an object as new as if it were written now, by the file server's clock."""
        await self._run("name", "touch", lambda: os.utime(self._root / name))

    async def sweep(self, prefix: str, age_s: float) -> int:
        """Remove temporary files below `prefix` that are older than `age_s`; return how many."""
        return await self._run("name", "sweep", lambda: self._sweep(prefix, age_s))

    def _sweep(self, prefix: str, age_s: float) -> int:
        removed, now_s = 0, self._server_time_s(prefix)
        if now_s is None:
            return 0
        for folder, _, files in os.walk(self._root / prefix):
            for name in files:
                path = Path(folder, name)
                with suppress(FileNotFoundError):
                    if name.startswith(_TEMPORARY) and now_s - path.stat().st_mtime > age_s:
                        path.unlink()
                        removed += 1
        return removed

    def _server_time_s(self, prefix: str) -> float | None:
        """Return the file server's time, from a file that is made for that; None if it cannot."""
        path = self._root / prefix / f"{_TEMPORARY}now.{secrets.token_hex(8)}"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except FileNotFoundError:
            return None
        try:
            return path.stat().st_mtime
        finally:
            path.unlink()

    # -- threads --------------------------------------------------------------------------------

    async def _run(
        self, pool: str, what: str, call: Callable[[], T], stop: _Stop | None = None
    ) -> T:
        """Run a blocking call in a thread, and return its result once it has ended."""
        running = asyncio.get_running_loop().run_in_executor(self._pools[pool], call)
        try:
            if stop is None:
                return await running
            await _ended(running, stop)
            return running.result()
        except OSError as error:
            error.__traceback__ = None  # its frames hold on to the caller's memory
            if isinstance(error, FileNotFoundError):
                raise
            is_lasting = error.errno in _LASTING
            why = error.strerror or type(error).__name__
            raise RemoteError(self.where, what, why, is_lasting=is_lasting) from error

    async def leave(self) -> None:
        """Do nothing: whoever has read or written has waited for the end of the call."""

    def close(self) -> None:
        """End the threads once the calls under way have ended. Idempotent."""
        for name, pool in self._pools.items():
            pool.shutdown(wait=name != "name", cancel_futures=True)


async def _ended(running: asyncio.Future[T], stop: _Stop) -> None:
    """Return once a call that uses the caller's memory has ended, even if cancelled meanwhile."""
    try:
        await asyncio.wait([running])
    except asyncio.CancelledError:
        stop.is_set = True
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        running.exception()
        raise


def _moved(
    call: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    buffers: Sequence[memoryview],
    first: int,
    stop: _Stop,
) -> int:
    """Read or write buffers in turn from byte `first` of a file on; return how many bytes."""
    left, moved = list(buffers), 0
    while left and not stop.is_set:
        count = call(fd, _leading(left), first + moved)
        if not count:
            break
        moved += count
        while left and count >= left[0].nbytes:
            count -= left.pop(0).nbytes
        if count:
            left[0] = left[0][count:]
    return moved


def _leading(buffers: list[memoryview]) -> list[memoryview]:
    """Return the first of some buffers, as many as one system call is to move."""
    total = 0
    for number, buffer in enumerate(buffers[:_BUFFERS_MAX]):
        total += buffer.nbytes
        if total > _PIECE_BYTES:
            return buffers[: max(1, number)]
    return buffers[:_BUFFERS_MAX]


def _make_private(folder: Path) -> None:
    """Make a directory and those above it that are missing, for us only."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:
        _make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def _named(temporary: Path, path: Path) -> bool:
    """Name a finished file; return False if another file has the name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.rename(temporary, path)
    return True


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a directory, which need not exist, except temporary files."""
    try:
        with os.scandir(folder) as scan:
            yield from (each for each in scan if not each.name.startswith(_TEMPORARY))
    except FileNotFoundError:
        return
