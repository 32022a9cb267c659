"""Writes trace records as JSON lines, in a thread of its own, with rotation.

The loop queues a record and wakes nobody: the thread checks the queue at intervals, and encodes few
records at a time, because the loop waits for the interpreter lock meanwhile. The queue is bounded;
a record that finds it full is dropped and counted. Every file, and every run that appends to one,
begins with a header that has the time of both clocks.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from errno import EPERM
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import msgspec
from msgspec import structs

from flexkv import __version__
from flexkv.common.errors import ConfigError
from flexkv.observe.logs import get_logger
from flexkv.observe.records import SCHEMA_VERSION, DropRecord, HeaderRecord, Record
from flexkv.process import forks

log = get_logger(__name__)

QUEUE_RECORDS_MAX = 1 << 18
BATCH_RECORDS = 64
"""Records encoded at once: this holds the interpreter lock for some 0.1 ms."""
LOOK_S_MAX = 0.05
"""Longest time between two checks of the queue."""


def header(**facts: Any) -> HeaderRecord:
    """Return the header of a file that begins now."""
    return HeaderRecord(SCHEMA_VERSION, __version__, time.time_ns(), time.monotonic_ns(), **facts)


class Recorder:
    """A trace file and its rotated predecessors: `path`, `path.1`, `path.2`, …

    Attributes:
        path: path of the current file.
    """

    def __init__(
        self,
        path: str,
        max_file_size_bytes: int,
        max_files: int,
        flush_interval_ms: int,
        make_header: Callable[[], HeaderRecord] | None = None,
    ) -> None:
        """Open the file and start the writer. `make_header` returns the first record of each file.

        Raises:
            ConfigError: the file cannot be written.
        """
        self.path = path
        self._path = Path(path)
        self._make_header = make_header or header
        self._run, self._part = uuid4().hex, 0
        self._max_bytes, self._max_files = max_file_size_bytes, max_files
        self._look_s = min(flush_interval_ms / 1000, LOOK_S_MAX)
        self._queue: deque[Record] = deque()
        self._closing = threading.Event()
        self._dropped = 0
        self._broken = False
        self._encoder = msgspec.json.Encoder()
        try:
            self._file = self._open(self._path)
        except (OSError, ValueError) as error:
            raise ConfigError("trace_file_path", path, f"cannot be written: {error}") from error
        forks.on_fork(self._let_go_in_child)
        self._thread = threading.Thread(target=self._write, name="flexkv-trace", daemon=True)
        self._thread.start()

    def record(self, record: Record) -> None:
        """Queue a record without blocking; drop and count it if the queue is full."""
        if self._broken or len(self._queue) >= QUEUE_RECORDS_MAX:
            self._dropped += 1
        else:
            self._queue.append(record)

    def close(self) -> None:
        """Write all queued records, and close the file. Idempotent."""
        if self._thread.is_alive():
            self._closing.set()
            self._thread.join()
        with suppress(OSError):  # what could not be written is lost, and the log says so
            self._file.close()

    def _let_go_in_child(self) -> None:
        """Release the file and its lock, and write nothing of what is buffered."""
        self._broken = True
        if not self._file.closed:
            forks.replace(self._file.fileno())

    def _open(self, path: Path, more_flags: int = 0) -> BinaryIO:
        descriptor = _open_ours(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | more_flags)
        file = os.fdopen(descriptor, "ab")
        try:
            _take_alone(descriptor)
        except OSError:
            file.close()
            raise
        if file.tell() and os.pread(descriptor, 1, file.tell() - 1) != b"\n":
            file.write(b"\n")  # a crash cut the last line short: ours must not continue it
        first = structs.replace(self._make_header(), run=self._run, part=self._part)
        self._part += 1
        file.write(self._encoder.encode(first) + b"\n")
        return file

    def _write(self) -> None:
        """Write records until closed; a file that cannot be written ends only the trace."""
        try:
            while not self._closing.wait(self._look_s):
                self._write_all()
            self._write_all()
        except OSError as error:
            self._broken = True
            self._queue.clear()
            log.warning("trace_ended", path=self.path, reason=str(error))

    def _write_all(self) -> None:
        """Write all queued records, and flush them to the kernel."""
        queue = self._queue
        while queue:
            self._tell_drops()
            batch = [queue.popleft() for _ in range(min(BATCH_RECORDS, len(queue)))]
            self._file.write(self._lines(batch))
            if self._file.tell() >= self._max_bytes:
                self._rotate()
        self._tell_drops()
        self._file.flush()

    def _lines(self, batch: list[Record]) -> bytes:
        try:
            return self._encoder.encode_lines(batch)
        except UnicodeEncodeError:  # an error may quote a path that is not UTF-8
            return self._encoder.encode_lines([_as_text(record) for record in batch])

    def _tell_drops(self) -> None:
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._file.write(self._encoder.encode(DropRecord(dropped)) + b"\n")

    def _rotate(self) -> None:
        """Begin a new file, and delete the oldest one beyond the limit.

        The new file is locked before it gets the name, and a file always has the name, so no other
        engine can take it meanwhile.
        """
        numbered = [Path(f"{self._path}.{n}") for n in range(1, self._max_files)]
        for older, newer in zip(reversed(numbered), reversed(numbered[:-1]), strict=False):
            if newer.exists():
                newer.replace(older)
        if numbered:
            numbered[0].unlink(missing_ok=True)
            os.link(self._path, numbered[0])
        fresh = Path(f"{self._path}.new")
        fresh.unlink(missing_ok=True)
        file = self._open(fresh, os.O_EXCL)
        fresh.replace(self._path)
        self._file.close()
        self._file = file


def _open_ours(path: Path, flags: int) -> int:
    """Open a file that no other user owns or may write to.

    A symbolic link is followed only if this user or root made it.

    Raises:
        PermissionError: the file or link belongs to another user, or others may write to the file.
        OSError: the file cannot be opened.
    """
    ours = (0, os.geteuid())
    if path.is_symlink():
        if path.lstat().st_uid not in ours:
            raise PermissionError(EPERM, "is a symbolic link that another user made", str(path))
        path = path.resolve()
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    found = os.fstat(descriptor)
    is_device = stat.S_ISCHR(found.st_mode)  # such as /dev/null
    if not is_device and (
        found.st_uid not in ours or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        os.close(descriptor)
        why = "belongs to another user, or others may write to it"
        raise PermissionError(EPERM, why, str(path))
    return descriptor


def _take_alone(descriptor: int) -> None:
    """Lock a file against other engines; where files cannot be locked, trust the user.

    Raises:
        BlockingIOError: another engine writes to it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another engine is writing its trace there") from error
    except OSError:
        return


def _as_text(record: Record) -> Record:
    """Return a record whose strings can all be encoded as UTF-8."""
    strings = {
        name: value.encode(errors="backslashreplace").decode()
        for name, value in structs.asdict(record).items()
        if isinstance(value, str)
    }
    return structs.replace(record, **strings)
