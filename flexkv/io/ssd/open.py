"""Opens the files, superblocks and journals of each directory of the SSD tier.

If a directory cannot be used, only its part of the tier is lost.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from errno import EISDIR
from pathlib import Path
from typing import NamedTuple

from flexkv.common.errors import ConfigError
from flexkv.io.private import Folder, new_name, open_directory, open_file
from flexkv.io.ssd import missed_clears, superblock
from flexkv.io.ssd.file_calls import KernelCalls
from flexkv.io.ssd.files import FileOptions, StripedFiles
from flexkv.io.ssd.folders import refusal
from flexkv.io.ssd.journal import NAME as JOURNAL_NAME
from flexkv.io.ssd.journal import NEW_NAME as JOURNAL_NEW_NAME
from flexkv.io.ssd.journal import Journal
from flexkv.io.ssd.paths import expanded, shown
from flexkv.io.ssd.superblock import Superblock
from flexkv.observe.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SsdRequest:
    """The SSD tier that is asked for.

    Attributes:
        directories: absolute paths, all different.
        num_blocks: the number of blocks in all directories.
        superblock: what the blocks are.
        options: how the files get their space.
        keeps_journal: whether the tier survives a restart.
        is_strict: whether a directory that cannot be used is an error.
    """

    directories: tuple[Path, ...]
    num_blocks: int
    superblock: Superblock
    options: FileOptions
    keeps_journal: bool = True
    is_strict: bool = False


class TakenSsd(NamedTuple):
    """The usable part of the tier: open files, and journals if it is to survive a restart."""

    files: StripedFiles
    journals: list[Journal] | None


def distinct(directories: Sequence[Path]) -> tuple[Path, ...]:
    """Return directories as absolute paths, with `~` and variables expanded.

    Raises:
        ConfigError: one cannot be expanded, or two are the same directory.
    """
    found: dict[object, Path] = {}
    for directory in map(expanded, directories):
        names: list[object] = [os.path.realpath(directory)]
        with suppress(OSError):
            status = os.stat(directory)
            names.append((status.st_dev, status.st_ino))
        for name in names:
            if (other := found.setdefault(name, directory)) is not directory:
                why = f"is the same directory as {shown(other)}"
                raise ConfigError("ssd_cache_dir", shown(directory), why)
    return tuple(dict.fromkeys(found.values()))


def take_ssd(
    request: SsdRequest, lose: Callable[[str, str], None], undo: ExitStack
) -> TakenSsd | None:
    """Lock and open the directories that can be used; return None if there are none. Blocks.

    Args:
        request: what is asked for.
        lose: called with the path and the reason of each directory that is left out.
        undo: the stack that closes the rest.

    Raises:
        ConfigError: there is too little space for the files; or a directory cannot be used, and
            `is_strict` is set.
    """
    left = list(request.directories)
    while left:
        with ExitStack() as taking:
            try:
                taken = _take(request, left, taking)
            except ConfigError as error:
                directory = _blamed(error, left)
                if directory is None or request.is_strict:
                    raise
                left.remove(directory)
                at = shown(directory)
                lose(at, error.why if at == error.value else f"{error.value} {error.why}")
                continue
            undo.push(taking.pop_all())
            return taken
    return None


def _take(request: SsdRequest, directories: list[Path], taking: ExitStack) -> TakenSsd:
    stride, rows = request.superblock.block_stride_bytes, request.superblock.rows_per_file
    files = StripedFiles.open(
        directories,
        # Each directory keeps its own part, even if others are left out.
        request.num_blocks * len(directories) // len(request.directories) or 1,
        stride,
        None if rows is None else rows * stride,
        replace(request.options, check=lambda folder: check_names(folder, request)),
    )
    taking.callback(files.close)
    if request.keeps_journal:
        return TakenSsd(files, open_journals(files.folders, request.superblock, taking))
    forget_earlier(files.folders)
    return TakenSsd(files, None)


def _blamed(error: ConfigError, directories: list[Path]) -> Path | None:
    """Return the directory that caused an error, or None."""
    if error.field != "ssd_cache_dir":
        return None
    path = Path(str(error.value))
    holders = [each for each in directories if Path(shown(each)) in (path, *path.parents)]
    return max(holders, key=lambda each: len(each.parts), default=None)


def refuse(folders: Sequence[Path], wanted: Superblock) -> None:
    """Refuse directories that hold blocks of another kind, before anything in them is touched.

    Raises:
        ConfigError: a directory does.
    """
    for path in folders:
        try:
            fd = open_directory(path)
        except OSError:
            continue  # opening it for use creates or refuses it
        try:
            differences = _differences(Folder(path, fd), wanted)
        except (ConfigError, OSError):
            continue  # likewise
        finally:
            os.close(fd)
        if differences:
            why = f"holds blocks of another kind: {'; '.join(differences)}"
            raise ConfigError("ssd_cache_dir", shown(path), why)


def check_names(folder: Folder, request: SsdRequest) -> None:
    """Refuse a directory whose superblock or journal cannot be used; change nothing in it.

    Raises:
        ConfigError: one of them can be changed by others, or cannot be opened or replaced.
    """
    is_kept = request.keeps_journal and superblock.read(folder) == request.superblock
    names = [JOURNAL_NAME]
    if request.keeps_journal:
        names += [JOURNAL_NEW_NAME] if is_kept else [JOURNAL_NEW_NAME, new_name(superblock.NAME)]
    for name in names:
        try:
            if is_kept and name == JOURNAL_NAME:
                os.close(open_file(folder.fd, name, os.O_RDWR | os.O_APPEND))
            elif stat.S_ISDIR(os.lstat(name, dir_fd=folder.fd).st_mode):
                raise IsADirectoryError(EISDIR, "it is a directory")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise refusal(folder.path / name, error) from error


def forget_earlier(folders: list[Folder]) -> None:
    """Remove the journals of earlier runs: this run keeps none, and will overwrite their blocks.

    Raises:
        ConfigError: a journal cannot be removed.
    """
    for folder in folders:
        try:
            _forget(folder)
        except OSError as error:
            why = f"its journal cannot be removed ({error.strerror})"
            raise ConfigError("ssd_cache_dir", str(folder.path), why) from error


_MISSED = "the tier was cleared while this directory was not in use"


def open_journals(folders: list[Folder], wanted: Superblock, undo: ExitStack) -> list[Journal]:
    """Open the journals, emptied where blocks are of another kind or a clear was missed.

    Raises:
        ConfigError: a journal cannot be read or written.
    """
    journals = []
    late = missed_clears.behind(folders)
    for folder in folders:
        try:
            _admit(folder, wanted)
            if folder in late:
                log.warning("ssd_emptied", directory=str(folder.path), differences=[_MISSED])
                _forget(folder)
                missed_clears.catch_up(folder, folders)
            journals.append(Journal(folder.path, KernelCalls(folder)))
        except OSError as error:
            why = f"its journal cannot be used ({error.strerror})"
            raise ConfigError("ssd_cache_dir", str(folder.path), why) from error
        undo.callback(journals[-1].close)
    return journals


def _admit(folder: Folder, wanted: Superblock) -> None:
    """Empty a directory whose blocks are of another kind, and write the wanted superblock."""
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
    """Return the ways in which a directory's blocks differ from the wanted ones."""
    found = superblock.read(folder)
    if found is not None:
        return superblock.differences(found, wanted)
    has_journal = JOURNAL_NAME in os.listdir(folder.fd)
    return ["the superblock is missing or cannot be read"] if has_journal else []
