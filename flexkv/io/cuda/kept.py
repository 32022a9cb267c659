"""A disk cache of what is computed once for a device, in $XDG_CACHE_HOME/flexkv.

If it cannot be read or written, only time is lost. A cache that others may write to is not used,
since its content is run on the device.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flexkv.io.private import make_directory, open_directory, open_file


def folder() -> Path:
    """Return the directory of the cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "flexkv"


def name_of(*facts: object) -> str:
    """Return a name that is unique to these facts."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def read(path: Path) -> bytes | None:
    """Return the content of a kept file, or None."""
    with suppress(OSError), _opened(path.parent) as folder_fd:
        fd = open_file(folder_fd, path.name, os.O_RDONLY)
        with open(fd, "rb") as file:
            return file.read()
    return None


def write(path: Path, content: bytes) -> None:
    """Keep content in a file, atomically; do nothing if that is impossible."""
    with suppress(OSError), _opened(path.parent, make=True) as folder_fd:
        new = f"{path.name}.{os.getpid()}"
        with suppress(FileNotFoundError):
            os.unlink(new, dir_fd=folder_fd)  # left by a process that was killed here
        fd = open_file(folder_fd, new, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with open(fd, "wb") as file:
            file.write(content)
        os.rename(new, path.name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)


@contextmanager
def _opened(path: Path, make: bool = False) -> Iterator[int]:
    """Open a directory of the cache; with `make`, create it if it is missing.

    Raises:
        OSError: it is missing, others may write to it, or the user has no home.
    """
    if not path.is_absolute():  # without a home "~" stays as it is
        raise FileNotFoundError(2, "the path is not absolute", str(path))
    if make:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = make_directory(path) if make else open_directory(path)
    try:
        yield fd
    finally:
        os.close(fd)
