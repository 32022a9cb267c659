"""What is found out once for a device and kept on disk: $XDG_CACHE_HOME/flexkv.

A cache that cannot be read or written costs only what it would have saved.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path


def folder() -> Path:
    """Give where things are kept."""
    # Without a home there is no cache: "~" cannot be written to, and nothing is kept.
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "flexkv"


def name_of(*facts: object) -> str:
    """Give a name that other facts do not have."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def read(path: Path) -> bytes | None:
    """Give what is kept, or None."""
    with suppress(OSError):
        return path.read_bytes()
    return None


def write(path: Path, content: bytes) -> None:
    """Keep something, whole or not at all."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(content)
        new.rename(path)


def forget(path: Path) -> None:
    """Drop what is kept, if it is."""
    with suppress(OSError):
        path.unlink()
