"""The journal of one directory of the SSD tier: which block is in which row, and its checksum.

    file  = frame*                      journal.flexkv, appended to
    frame = length, crc32 of the payload (uint32 each, little-endian), payload
    payload = msgpack of a record: Stored, Erased or Cleared

The last record about a row counts. Replay ends at the first frame that is not whole; the rest of
the file is cut off. A journal that has grown too large is rewritten in a new file beside it, which
then replaces it by a rename.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from errno import EDQUOT, EIO, ENOSPC
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from flexkv.common.decoding import decoded
from flexkv.common.errors import ConfigError, MalformedError, StorageError
from flexkv.common.terms import BLOCK_RECORD_BYTES
from flexkv.io.ssd.file_calls import KERNEL, FileCalls

NAME, NEW_NAME = "journal.flexkv", "journal.new.flexkv"
RECORD_BYTES = BLOCK_RECORD_BYTES
"""The bytes of one block's record, as the index exports it."""
_GROUP_AT = 33
"""Where in a record the KV group is: the second byte of its flags, which are a uint32."""
FRAME_ROWS_MAX = 1 << 20

_HEAD = struct.Struct("<II")
_INT64_MAX = (1 << 63) - 1


def groups_of(blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the KV groups of blocks, uint8[n], from their records, uint8[n, 36]."""
    return blocks[:, _GROUP_AT]


class Stored(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """These rows hold these blocks."""

    rows: bytes
    """uint32[n]."""
    sums: bytes
    """uint64[n], the checksum of each row's bytes (`io/checksums/sums.py`)."""
    blocks: bytes
    """uint8[n, 36], the record of each block."""
    sequence: Annotated[int, msgspec.Meta(ge=0, le=_INT64_MAX)] = 0
    """Increases over all journals of a tier; if two rows have the same key, the later counts."""

    @property
    def is_whole(self) -> bool:
        """Return whether the three lists have the same length."""
        count = len(self.rows) // 4
        lengths = (len(self.rows), len(self.sums), len(self.blocks))
        return lengths == (4 * count, 8 * count, RECORD_BYTES * count)


class Erased(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """These rows hold nothing any more."""

    rows: bytes

    @property
    def is_whole(self) -> bool:
        """Return whether the bytes are a list of rows."""
        return len(self.rows) % 4 == 0


class Cleared(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """No row holds anything any more."""

    @property
    def is_whole(self) -> bool:
        """Return True: nothing can be missing."""
        return True


Record: TypeAlias = Stored | Erased | Cleared

_DECODER = msgspec.msgpack.Decoder(Record)
_ENCODER = msgspec.msgpack.Encoder()


class Live(NamedTuple):
    """What a journal says: the rows that hold blocks, and what is in each."""

    rows: NDArray[np.int64]
    """int64[n], all different, in the order in which they were stored."""
    sums: NDArray[np.uint64]
    blocks: NDArray[np.uint8]
    """uint8[n, 36]."""
    sequences: NDArray[np.int64]


def frame(record: Record) -> bytes:
    """Return a record as a frame of the file."""
    payload = _ENCODER.encode(record)
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def stored(
    rows: NDArray[np.int64],
    sums: NDArray[np.uint64],
    blocks: NDArray[np.uint8],
    sequence: int = 0,
) -> bytes:
    """Return the frames that say what rows hold."""
    names, sums, blocks = rows.astype("<u4"), sums.astype("<u8"), blocks.reshape(-1, RECORD_BYTES)
    return b"".join(
        frame(Stored(names[at].tobytes(), sums[at].tobytes(), blocks[at].tobytes(), sequence))
        for at in _parts(len(rows))
    )


def erased(rows: NDArray[np.int64]) -> bytes:
    """Return the frames that say that rows hold nothing."""
    names = rows.astype("<u4")
    return b"".join(frame(Erased(names[at].tobytes())) for at in _parts(len(rows)))


def _parts(count: int) -> list[slice]:
    return [slice(at, at + FRAME_ROWS_MAX) for at in range(0, count, FRAME_ROWS_MAX)]


def records(content: bytes | memoryview) -> Iterator[tuple[Record, int]]:
    """Yield each record of a journal and where it ends, up to the first that is not whole."""
    view, at = memoryview(content), 0
    while at + _HEAD.size <= len(view):
        length, crc = _HEAD.unpack_from(view, at)
        payload = view[at + _HEAD.size : at + _HEAD.size + length]
        if len(payload) < length or zlib.crc32(payload) != crc:
            return
        try:
            record = decoded(_DECODER, payload)
        except MalformedError:
            return
        if not record.is_whole:
            return
        at += _HEAD.size + length
        yield record, at


def replay(content: bytes | memoryview) -> tuple[Live, int]:
    """Return what a journal says, and how many of its bytes are whole frames."""
    rows, sums, blocks = [_none(np.int64)], [_none(np.uint64)], [_none(np.uint8)]
    sequences = [_none(np.int64)]
    end = 0
    for record, end in records(content):  # noqa: B007 -- the last end counts
        if isinstance(record, Cleared):
            for each in (rows, sums, blocks, sequences):
                del each[1:]
            continue
        named = np.frombuffer(record.rows, "<u4").astype(np.int64)
        if isinstance(record, Stored):
            rows.append(named)
            sums.append(np.frombuffer(record.sums, "<u8").astype(np.uint64))
            blocks.append(np.frombuffer(record.blocks, np.uint8))
            sequences.append(np.full(len(named), record.sequence))
        else:  # like a store of nothing, marked by the complement of the row
            rows.append(~named)
            sums.append(np.zeros(len(named), np.uint64))
            blocks.append(np.zeros(len(named) * RECORD_BYTES, np.uint8))
            sequences.append(np.zeros(len(named), np.int64))
    all_rows, all_sums = np.concatenate(rows), np.concatenate(sums)
    all_blocks = np.concatenate(blocks).reshape(-1, RECORD_BYTES)
    named = np.where(all_rows < 0, ~all_rows, all_rows)
    # The last record about each row is the first one from the end.
    _, from_behind = np.unique(named[::-1], return_index=True)
    last = np.sort(len(named) - 1 - from_behind)
    last = last[all_rows[last] >= 0]
    all_sequences = np.concatenate(sequences)
    return Live(all_rows[last], all_sums[last], all_blocks[last], all_sequences[last]), end


def _none(kind: type[np.generic]) -> NDArray[np.generic]:
    return np.zeros(0, kind)


class Journal:
    """The open journal of one directory. Its calls block: make them in a thread."""

    def __init__(self, folder: Path, calls: FileCalls = KERNEL) -> None:
        """Open or create the file; `live` is its content.

        `is_suspect` is set once a sync has failed. The kernel then treats what it could not write
        as written, so a later sync that succeeds proves nothing: only a journal that is written
        anew is trusted again.

        Raises:
            ConfigError: the file cannot be opened, or others may write to it.
            OSError: it cannot be read or cut.
        """
        self.folder = folder
        self.path = folder / NAME
        self._calls = calls
        self._new_bytes = 0
        calls.remove(folder / NEW_NAME)
        self._fd = calls.open(self.path)
        self._new_fd: int | None = None
        self._fd_lock = threading.Lock()
        """Held while the file is synced or replaced, which happens in two different threads."""
        self.is_suspect = False
        try:
            self.live, self.bytes = replay(calls.read(self._fd))
            if calls.size(self._fd) > self.bytes:
                calls.cut(self._fd, self.bytes)
            self._sync_names()
        except BaseException:
            calls.close(self._fd)
            raise

    def _sync_names(self) -> None:
        """Sync the directory, which holds the names of this file and of the block files."""
        try:
            self._calls.sync_folder(self.folder)
        except OSError as error:
            if error.errno not in (EDQUOT, ENOSPC):
                raise
            self.is_suspect = True  # a full disk can be used, but no flush trusts these names

    def is_in_place(self) -> bool:
        """Return whether the file is still at its path, so that a restart would read it."""
        return self._calls.is_at(self.path, self._fd)

    def forget_live(self) -> None:
        """Drop what the journal said when it was opened."""
        self.live = replay(b"")[0]

    def append(self, frames: bytes) -> None:
        """Append frames, also to the new journal if one is being written.

        Raises:
            StorageError: the file cannot be written.
        """
        self._write(self._fd, self.bytes, frames)
        self.bytes += len(frames)
        self.append_new(frames)

    def append_new(self, frames: bytes) -> None:
        """Append frames to the new journal alone; drop it if it cannot be written."""
        if self._new_fd is None:
            return
        try:
            self._write(self._new_fd, self._new_bytes, frames)
            self._new_bytes += len(frames)
        except StorageError:
            self.drop_new()

    def clear(self) -> None:
        """Empty the journal. Works on a full disk.

        Raises:
            StorageError: the file cannot be cut.
        """
        self.drop_new()
        try:
            self._calls.cut(self._fd, 0)
        except OSError as error:
            raise StorageError(str(self.path), 0, error.errno or 0) from error
        self.bytes = 0

    @property
    def has_new(self) -> bool:
        """Return whether a new journal is being written."""
        return self._new_fd is not None

    def _write(self, fd: int, at: int, frames: bytes) -> None:
        """Write frames after the first `at` bytes, which are whole."""
        view = memoryview(frames)
        try:
            if self._calls.size(fd) > at:  # a torn frame would hide those behind it
                self._calls.cut(fd, at)
            while view:
                view = view[self._calls.write(fd, view) :]
        except OSError as error:
            raise StorageError(str(self.path), at, error.errno or 0) from error

    def begin_new(self) -> None:
        """Start a new journal beside this one, if its file can be created."""
        self.drop_new()
        with suppress(ConfigError):
            self._new_fd, self._new_bytes = self._calls.open(self.folder / NEW_NAME), 0

    def drop_new(self) -> None:
        """Drop the new journal, if there is one."""
        if self._new_fd is not None:
            fd, self._new_fd = self._new_fd, None
            with suppress(OSError):
                self._calls.close(fd)
            with suppress(OSError):
                self._calls.remove(self.folder / NEW_NAME)

    def take_new(self) -> None:
        """Replace this journal by the new one, or drop the new one if that fails.

        If the rename cannot be synced, the new journal is suspect.
        """
        if self._new_fd is None:
            return
        try:
            self._calls.sync(self._new_fd)
            self._calls.rename(self.folder / NEW_NAME, self.path)
        except OSError:
            self.drop_new()
            return
        is_named = True
        try:
            self._calls.sync_folder(self.folder)
        except OSError:
            is_named = False
        with self._fd_lock:
            fd, self._fd, self._new_fd = self._fd, self._new_fd, None
            self.bytes, self.is_suspect = self._new_bytes, not is_named
            with suppress(OSError):
                self._calls.close(fd)

    def sync(self) -> None:
        """Return once everything that was appended is on stable storage.

        Raises:
            StorageError: a sync failed, now or before: the journal has to be written anew.
        """
        with self._fd_lock:
            if self.is_suspect:
                raise StorageError(str(self.path), 0, EIO)
            try:
                self._calls.sync(self._fd)
            except OSError as error:
                self.is_suspect = True
                raise StorageError(str(self.path), 0, error.errno or 0) from error

    def close(self) -> None:
        """Close the files. Idempotent."""
        self.drop_new()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with suppress(OSError):
                self._calls.close(fd)


def cleared() -> bytes:
    """Return the frame that says that no row holds anything."""
    return frame(Cleared())
