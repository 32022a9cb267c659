"""Directories that were not used while their tier was cleared: they must not bring blocks back.

A clear that finds a directory of the tier left out notes its time in all the others. A directory
whose own note is older, or that has none, has missed that clear: what it holds is forgotten when it
is used again beside one that knows. A directory that is used alone cannot know.
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
    """Note in directories that their tier is being cleared, and that others miss it. Blocks.

    Raises:
        OSError: one takes no file; the others have the note.
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
    """Return the directories that have missed a clear of which others know."""
    newest = max(map(_read, folders), default=0)
    return [folder for folder in folders if _read(folder) < newest]


def catch_up(folder: Folder, folders: Sequence[Folder]) -> None:
    """Note in a directory that holds nothing any more the last clear of which others know.

    Raises:
        OSError: it takes no file.
    """
    _write(folder, max(map(_read, folders)))


def _write(folder: Folder, at_ns: int) -> None:
    replace_file(folder, NAME, str(at_ns).encode())


def _read(folder: Folder) -> int:
    with suppress(OSError, ValueError), open(open_file(folder.fd, NAME, os.O_RDONLY), "rb") as file:
        return int(file.read(_BYTES_MAX))
    return 0
