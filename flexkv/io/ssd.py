"""Opens the SSD tier: files, superblocks and journals of each directory, and the port over them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import structlog

from flexkv.common.errors import ConfigError
from flexkv.io import superblock
from flexkv.io.arena import Arena
from flexkv.io.checked import CheckedDiskPort
from flexkv.io.disk import open_disk
from flexkv.io.files import StripedFiles
from flexkv.io.journal import NAME as JOURNAL_NAME
from flexkv.io.journal import Journal
from flexkv.io.sums import Summer
from flexkv.io.superblock import Superblock
from flexkv.io.uring import RingOptions

log = structlog.get_logger(__name__)


def present(folders: Iterable[Path]) -> list[Path]:
    """Give the directories that are there, or can be made.

    A directory that is missing costs its part of the tier, or all of it, but not the engine.
    """
    found = []
    for folder in folders:
        if _is_there(folder):
            found.append(folder)
        else:
            log.error("ssd_directory_missing", directory=str(folder))
    return found


def _is_there(folder: Path) -> bool:
    try:
        return folder.is_dir() or folder.parent.is_dir()
    except OSError:  # a mount whose device is gone
        return False


def refuse(folders: list[Path], wanted: Superblock) -> None:
    """Refuse directories that hold blocks of another kind, before anything in them is touched.

    Raises:
        ConfigError: one does.
    """
    for folder in folders:
        if differences := _differences(folder, wanted):
            why = f"holds blocks of another kind: {'; '.join(differences)}"
            raise ConfigError("ssd_cache_dir", str(folder), why)


def forget_earlier(folders: list[Path]) -> None:
    """Let no later run believe in what this one, which keeps no journal, will write over."""
    for folder in folders:
        (folder / JOURNAL_NAME).unlink(missing_ok=True)


def open_ssd(
    arena: Arena, files: StripedFiles, options: RingOptions, summer: Summer, undo: ExitStack
) -> CheckedDiskPort:
    """Give the port to open files, which closes the summer too; `undo` gets what closes it."""

    def place_of(block_id: int) -> tuple[str, int]:
        index, offset = files.locate_one(block_id)
        return files.paths[index], offset

    undo.callback(summer.close)
    inner = open_disk(arena, files, options)
    port = CheckedDiskPort(inner, summer, files.num_blocks, place_of)
    undo.callback(port.close)
    return port


def open_journals(folders: list[Path], wanted: Superblock, undo: ExitStack) -> list[Journal]:
    """Give the journal of each directory, empty where the blocks in it are of another kind.

    Raises:
        ConfigError: a journal cannot be read or written.
    """
    journals = []
    for folder in folders:
        try:
            _admit(folder, wanted)
            journals.append(Journal(folder))
        except OSError as error:
            why = f"its journal cannot be used ({error.strerror})"
            raise ConfigError("ssd_cache_dir", str(folder), why) from error
        undo.callback(journals[-1].close)
    return journals


def _admit(folder: Path, wanted: Superblock) -> None:
    """Empty a directory whose blocks are of another kind, and say which it holds from now on."""
    if superblock.read(folder) == wanted:
        return
    if differences := _differences(folder, wanted):
        log.warning("ssd_emptied", directory=str(folder), differences=differences)
    (folder / JOURNAL_NAME).unlink(missing_ok=True)
    superblock.write(folder, wanted)


def _differences(folder: Path, wanted: Superblock) -> list[str]:
    """Say in what the blocks of a directory differ from those that are wanted."""
    found = superblock.read(folder)
    if found is not None:
        return superblock.differences(found, wanted)
    return ["no superblock that can be read"] if (folder / JOURNAL_NAME).exists() else []
