"""Keeps directories that were not in use when their tier was cleared from bringing blocks back.

A clear while a directory of the tier is left out notes its time in all the others. A directory
whose own note is older or missing has missed that clear: its blocks are forgotten when it is used
again together with one that has the note. If it is used alone, a missed clear cannot be detected.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress

from flexkv.io.private import Folder, open_file, replace_file

NAME = "cleared.flexkv"
_BYTES_MAX = 32


def note(folders: Sequence[Folder]) -> None:
    """Write a note in directories that their tier is cleared now, while others miss it. Blocks.

    Raises:
        OSError: one cannot be written to; the others have the note.
    """
    at_ns = max(time.time_ns(), 1 + max(map(_read, folders), default=0))
    failure = None
    for folder in folders:
        try:
            _write(folder, at_ns)
        except OSError as error:
            failure = error
    if failure is not None:
        raise failure


def behind(folders: Sequence[Folder]) -> list[Folder]:
    """Return the directories that have missed a clear noted in others."""
    newest = max(map(_read, folders), default=0)
    return [folder for folder in folders if _read(folder) < newest]


def catch_up(folder: Folder, folders: Sequence[Folder]) -> None:
    """Copy the latest note of `folders` to a directory that has just been emptied.

    Raises:
        OSError: the file cannot be written.
    """
    _write(folder, max(map(_read, folders)))


def _write(folder: Folder, at_ns: int) -> None:
    replace_file(folder, NAME, str(at_ns).encode())


def _read(folder: Folder) -> int:
    with suppress(OSError, ValueError), open(open_file(folder.fd, NAME, os.O_RDONLY), "rb") as file:
        return int(file.read(_BYTES_MAX))
    return 0
