"""Opens the SSD tier: files, superblocks and journals of each directory, and the port over them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import structlog

from flexkv.common.errors import ConfigError
from flexkv.io import superblock
from flexkv.io.arena import Arena
from flexkv.io.checked import CheckedDiskPort, PoolSummer
from flexkv.io.disk import open_disk
from flexkv.io.files import StripedFiles
from flexkv.io.journal import NAME as JOURNAL_NAME
from flexkv.io.journal import Journal
from flexkv.io.superblock import Superblock
from flexkv.io.uring import RingOptions

log = structlog.get_logger(__name__)

OnMismatch = Literal["empty", "refuse"]


def present(folders: list[Path]) -> list[Path]:
    """Give the directories that are there, or can be made; all of them when none is.

    A directory that is missing costs its part of the tier, not the engine.
    """
    found = [folder for folder in folders if folder.is_dir() or folder.parent.is_dir()]
    for folder in folders:
        if found and folder not in found:
            log.error("ssd_directory_missing", directory=str(folder))
    return found or folders


def open_ssd(
    arena: Arena, files: StripedFiles, options: RingOptions, write_bytes_max: int, undo: ExitStack
) -> CheckedDiskPort:
    """Give the port to open files; `undo` gets what closes it."""

    def place_of(block_id: int) -> tuple[str, int]:
        index, offset = files.locate_one(block_id)
        return files.paths[index], offset

    inner = open_disk(arena, files, options)
    port = CheckedDiskPort(inner, PoolSummer(arena), files.num_blocks, place_of, write_bytes_max)
    undo.callback(port.close)
    return port


def open_journals(
    folders: list[Path], wanted: Superblock, on_mismatch: OnMismatch, undo: ExitStack
) -> list[Journal]:
    """Give the journal of each directory, empty where the blocks in it are of no use.

    Raises:
        ConfigError: a directory holds blocks of another kind, and `on_mismatch` is refuse; or its
            journal cannot be read or written.
    """
    journals = []
    for folder in folders:
        try:
            _admit(folder, wanted, on_mismatch)
            journals.append(Journal(folder))
        except OSError as error:
            why = f"its journal cannot be used ({error.strerror})"
            raise ConfigError("ssd_cache_dir", str(folder), why) from error
        undo.callback(journals[-1].close)
    return journals


def _admit(folder: Path, wanted: Superblock, on_mismatch: OnMismatch) -> None:
    """Empty a directory whose blocks are of another kind, and say which it holds from now on."""
    found = superblock.read(folder)
    if found == wanted:
        return
    journal = folder / JOURNAL_NAME
    if found is not None:
        differences = superblock.differences(found, wanted)
        if on_mismatch == "refuse":
            why = f"holds blocks of another kind: {'; '.join(differences)}"
            raise ConfigError("ssd_cache_dir", str(folder), why)
        log.warning("ssd_emptied", directory=str(folder), differences=differences)
    elif journal.exists():
        log.warning("ssd_emptied", directory=str(folder), differences=["no superblock"])
    journal.unlink(missing_ok=True)
    superblock.write(folder, wanted)
