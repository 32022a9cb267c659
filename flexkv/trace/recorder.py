"""Writes trace records as JSON lines, in a thread of its own, with rotation.

The loop hands a record over and goes on: the queue is bounded, and a record that finds it full is
dropped and counted. Every file, and every run that adds to one, begins with a header that has both
clocks.
"""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec
import structlog

from flexkv import __version__
from flexkv.common.errors import ConfigError
from flexkv.trace.records import SCHEMA_VERSION, DropRecord, HeaderRecord, Record

log = structlog.get_logger(__name__)

QUEUE_RECORDS_MAX = 1 << 16


class Recorder:
    """A trace file and its rotated predecessors: `path`, `path.1`, `path.2`, …"""

    def __init__(
        self, path: str, max_file_size_bytes: int, max_files: int, flush_interval_ms: int
    ) -> None:
        """Open the file and start the writer.

        Raises:
            ConfigError: the file cannot be written.
        """
        self._path = Path(path)
        self._max_bytes, self._max_files = max_file_size_bytes, max_files
        self._flush_s = flush_interval_ms / 1000
        self._queue: queue.Queue[Record | None] = queue.Queue(QUEUE_RECORDS_MAX)
        self._dropped = 0
        self._broken = False
        self._encoder = msgspec.json.Encoder()
        try:
            self._file = self._open()
        except OSError as error:
            raise ConfigError("trace_file_path", path, f"cannot be written: {error}") from error
        self._thread = threading.Thread(target=self._write, name="flexkv-trace", daemon=True)
        self._thread.start()

    def record(self, record: Record) -> None:
        """Take a record; never blocks. Without room in the queue it is dropped and counted."""
        if self._broken:
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what is queued, and close the file. Idempotent."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
            with suppress(OSError):  # what could not be written is lost, and the log says so
                self._file.close()

    def _open(self) -> BinaryIO:
        file = self._path.open("ab")
        header = HeaderRecord(SCHEMA_VERSION, __version__, time.time_ns(), time.monotonic_ns())
        file.write(self._encoder.encode(header) + b"\n")
        return file

    def _write(self) -> None:
        """Write until the end mark comes; a file that cannot be written ends the trace only."""
        try:
            self._write_all()
        except OSError as error:
            self._broken = True
            log.warning("trace_ended", path=str(self._path), reason=str(error))
            while self._queue.get() is not None:
                self._dropped += 1

    def _write_all(self) -> None:
        """Write each record; flush whenever the interval has passed or the queue is empty."""
        flushed_s = time.monotonic()
        while (record := self._queue.get()) is not None:
            self._write_one(record)
            now_s = time.monotonic()
            if self._queue.empty() or now_s - flushed_s > self._flush_s:
                self._file.flush()
                flushed_s = now_s
            if self._file.tell() >= self._max_bytes:
                self._rotate()
        self._tell_drops()
        self._file.flush()

    def _write_one(self, record: Record) -> None:
        self._tell_drops()
        self._file.write(self._encoder.encode(record) + b"\n")

    def _tell_drops(self) -> None:
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._file.write(self._encoder.encode(DropRecord(dropped)) + b"\n")

    def _rotate(self) -> None:
        """Begin a new file; the oldest one beyond the limit goes."""
        self._file.close()
        numbered = [self._path, *(Path(f"{self._path}.{n}") for n in range(1, self._max_files))]
        for older, newer in zip(reversed(numbered), reversed(numbered[:-1]), strict=False):
            if newer.exists():
                newer.replace(older)
        if self._max_files == 1:
            self._path.unlink()
        self._file = self._open()
