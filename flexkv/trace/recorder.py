"""Writes trace records as JSON lines, in a thread of its own, with rotation.

The loop hands a record over and goes on: the queue is bounded, and a record that finds it full is
dropped and counted. The first line of every file is a header with both clocks.
"""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from typing import BinaryIO

import msgspec

from flexkv import __version__
from flexkv.common.errors import ConfigError
from flexkv.trace.records import SCHEMA_VERSION, DropRecord, HeaderRecord, Record

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
        self._encoder = msgspec.json.Encoder()
        try:
            self._file = self._open()
        except OSError as error:
            raise ConfigError("trace_file_path", path, f"cannot be written: {error}") from error
        self._thread = threading.Thread(target=self._write, name="flexkv-trace", daemon=True)
        self._thread.start()

    def record(self, record: Record) -> None:
        """Take a record; never blocks. Without room in the queue it is dropped and counted."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what is queued, and close the file. Idempotent."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
            self._file.close()

    def _open(self) -> BinaryIO:
        file = self._path.open("ab")
        header = HeaderRecord(SCHEMA_VERSION, __version__, time.time_ns(), time.monotonic_ns())
        file.write(self._encoder.encode(header) + b"\n")
        return file

    def _write(self) -> None:
        """Write until the end mark comes; flush whenever the interval has passed or all is out."""
        flushed_s = time.monotonic()
        while (record := self._queue.get()) is not None:
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                self._file.write(self._encoder.encode(DropRecord(dropped)) + b"\n")
            self._file.write(self._encoder.encode(record) + b"\n")
            now_s = time.monotonic()
            if self._queue.empty() or now_s - flushed_s > self._flush_s:
                self._file.flush()
                flushed_s = now_s
            if self._file.tell() >= self._max_bytes:
                self._rotate()

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
