"""Opens the SSD tier: files, superblocks and journals of each directory, and the port over them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from flexkv.common.errors import ConfigError
from flexkv.io import superblock
from flexkv.io.arena import Arena
from flexkv.io.checked import CheckedDiskPort
from flexkv.io.disk import open_disk
from flexkv.io.file_calls import KernelCalls
from flexkv.io.files import StripedFiles
from flexkv.io.journal import NAME as JOURNAL_NAME
from flexkv.io.journal import Journal
from flexkv.io.private import Folder, open_directory
from flexkv.io.sums import Summer
from flexkv.io.superblock import Superblock
from flexkv.io.uring import RingOptions
from flexkv.logs import get_logger

log = get_logger(__name__)


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
        ConfigError: one does, or others may write to it.
    """
    for path in folders:
        try:
            fd = open_directory(path)
        except OSError:
            continue  # opening it for use makes or refuses it
        try:
            differences = _differences(Folder(path, fd), wanted)
        finally:
            os.close(fd)
        if differences:
            why = f"holds blocks of another kind: {'; '.join(differences)}"
            raise ConfigError("ssd_cache_dir", str(path), why)


def forget_earlier(folders: list[Folder]) -> None:
    """Let no later run believe in what this one, which keeps no journal, will write over."""
    for folder in folders:
        _forget(folder)


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


def open_journals(folders: list[Folder], wanted: Superblock, undo: ExitStack) -> list[Journal]:
    """Give the journal of each directory, empty where the blocks in it are of another kind.

    Raises:
        ConfigError: a journal cannot be read or written.
    """
    journals = []
    for folder in folders:
        try:
            _admit(folder, wanted)
            journals.append(Journal(folder.path, KernelCalls(folder)))
        except OSError as error:
            why = f"its journal cannot be used ({error.strerror})"
            raise ConfigError("ssd_cache_dir", str(folder.path), why) from error
        undo.callback(journals[-1].close)
    return journals


def _admit(folder: Folder, wanted: Superblock) -> None:
    """Empty a directory whose blocks are of another kind, and say which it holds from now on."""
    if superblock.read(folder) == wanted:
        return
    if differences := _differences(folder, wanted):
        log.warning("ssd_emptied", directory=str(folder.path), differences=differences)
    _forget(folder)
    superblock.write(folder, wanted)


def _forget(folder: Folder) -> None:
    with suppress(FileNotFoundError):
        os.unlink(JOURNAL_NAME, dir_fd=folder.fd)


def _differences(folder: Folder, wanted: Superblock) -> list[str]:
    """Say in what the blocks of a directory differ from those that are wanted."""
    found = superblock.read(folder)
    if found is not None:
        return superblock.differences(found, wanted)
    has_journal = JOURNAL_NAME in os.listdir(folder.fd)
    return ["no superblock that can be read"] if has_journal else []
