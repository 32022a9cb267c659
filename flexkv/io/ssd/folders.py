"""Opens and locks directories of the SSD tier, opens files in them; says why one is unusable."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from flexkv.common.errors import ConfigError
from flexkv.io.private import Folder, NotPrivateError, make_directory, open_directory, open_file
from flexkv.io.ssd.locks import NOTE_NAME, lock_open_directory
from flexkv.io.ssd.paths import shown


def open_folder(path: Path, closing: ExitStack, make: bool = False) -> Folder:
    """Open a directory of the SSD tier until `closing` ends.

    Args:
        path: the path of the directory.
        closing: the stack that closes it.
        make: whether to create it if it is missing (its last component only).

    Raises:
        ConfigError: it is missing, it is not a directory, or others may write to it.
    """
    try:
        fd = make_directory(path) if make else open_directory(path)
    except OSError as error:
        raise refusal(path, error) from error
    closing.callback(os.close, fd)
    return Folder(Path(shown(path)), fd)


def lock_folder(folder: Folder, closing: ExitStack) -> None:
    """Lock a directory until `closing` ends.

    Raises:
        ConfigError: another process holds it, or it cannot be locked.
    """
    try:
        lock = lock_open_directory(folder.fd, folder.path)
    except BlockingIOError as error:
        raise ConfigError("ssd_cache_dir", str(folder.path), str(error.strerror)) from error
    except OSError as error:
        raise refusal(folder.path / NOTE_NAME, error, is_made=True) from error
    closing.callback(lock.release)


def open_ours(folder: Folder, name: str, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open or create a file of ours; refuse a link, a pipe or a directory in its place.

    Raises:
        ConfigError: it cannot be opened, or others may write to it.
    """
    try:
        return open_file(folder.fd, name, flags)
    except OSError as error:
        raise refusal(folder.path / name, error, bool(flags & os.O_CREAT)) from error


def refusal(path: Path, error: OSError, is_made: bool = False) -> ConfigError:
    """Return an error that says what is wrong with a directory or a file of the SSD tier."""
    why = f"cannot be used ({error.strerror})"
    if isinstance(error, NotPrivateError):
        why = str(error.strerror)
    elif isinstance(error, NotADirectoryError):
        why = "is not a directory" if _exists(path) else f"{shown(path.parent)} is not a directory"
    elif isinstance(error, FileNotFoundError) and not is_made:
        parent = path.parent
        why = "does not exist" if _exists(parent) else f"{shown(parent)} does not exist"
    return ConfigError("ssd_cache_dir", shown(path), why)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False
