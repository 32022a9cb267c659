"""A note beside the SSD tier: what the next run has to know of the blocks that are left there."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from flexkv.common.errors import StorageError
from flexkv.io.private import sync_directory
from flexkv.observe.logs import get_logger

log = get_logger(__name__)


class SsdNote:
    """One line in a file of each directory of the SSD tier."""

    def __init__(self, directories: Sequence[Path], name: str) -> None:
        """Take the directories of the tier, none if there is no such tier, and the files' name."""
        self._files = [each / name for each in directories]
        self._lock = threading.Lock()
        """Held while a disk hangs, too, so that what comes later is written later."""

    def __bool__(self) -> bool:
        """Return whether there is an SSD tier."""
        return bool(self._files)

    def read(self) -> str:
        """Return the line; empty if it is not the same in all directories, or cannot be read."""
        found = {_read(file) for file in self._files}
        return found.pop() if len(found) == 1 else ""

    def write(self, line: str) -> None:
        """Make the note say this; no crash leaves a part of it.

        Raises:
            StorageError: a directory does not take it.
        """
        with self._lock:
            for file in self._files:
                try:
                    _write(file, line)
                except OSError as error:
                    raise StorageError(str(file), 0, error.errno or 0) from error

    def forget(self) -> None:
        """Remove the note, because it is not true any more, or this run will not keep it true."""
        with self._lock:
            for file in self._files:
                try:
                    file.unlink()
                    _sync(file.parent)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    log.warning("ssd_note_not_removed", path=str(file), error=str(error))


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8").strip()
    except (OSError, ValueError):
        return ""


def _write(file: Path, line: str) -> None:
    new = file.with_name(f"{file.name}.new")
    with open(new, "w", encoding="utf-8") as stream:
        stream.write(f"{line}\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(new, file)
    _sync(file.parent)


def _sync(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_directory(folder)
    finally:
        os.close(folder)
