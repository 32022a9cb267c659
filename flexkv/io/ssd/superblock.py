"""The superblock of one directory of the SSD tier: what its blocks are, and how they are laid out.

The blocks of a directory whose superblock differs cannot be used: they are of another model,
layout, secret or version. `differences` says which fields differ.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Annotated, Any

import msgspec

from flexkv.common.decoding import decoded
from flexkv.common.errors import ConfigError, MalformedError
from flexkv.io.private import Folder, NotPrivateError, open_file, replace_file

NAME = "superblock.flexkv"
_BYTES_MAX = 1 << 20
"""The most bytes that a superblock may have."""
FORMAT_VERSION = 3
"""3: a checksum is over the bytes of a block; before, it was over its whole place."""


_Count = Annotated[int, msgspec.Meta(ge=1)]


class Superblock(msgspec.Struct, frozen=True):
    """What the blocks in a directory are. They can be used only if every field is equal."""

    version: int
    block_identity: dict[str, Any] = msgspec.field(name="blocks_are")
    """Model, tokens per block, version of the keys, digest of the secret."""
    block_stride_bytes: _Count
    rows_per_file: _Count | None
    """None: all rows are in one file."""
    block_bytes: tuple[_Count, ...] = ()
    """Bytes of a block of each KV group, which checksums cover; before version 3: whole places."""


_DECODER = msgspec.json.Decoder(Superblock)


def read(folder: Folder) -> Superblock | None:
    """Return a directory's superblock; None if it has none that can be read.

    Raises:
        ConfigError: it is a link or not a file, or others may write to it.
    """
    try:
        fd = open_file(folder.fd, NAME, os.O_RDONLY)
    except NotPrivateError as error:
        raise ConfigError("ssd_cache_dir", str(folder.path / NAME), str(error.strerror)) from error
    except OSError:
        return None
    with open(fd, "rb") as file, suppress(OSError, MalformedError):
        return decoded(_DECODER, file.read(_BYTES_MAX))
    return None


def is_there(folder: Folder) -> bool:
    """Return whether a directory still has a superblock; True if that cannot be checked."""
    try:
        os.stat(NAME, dir_fd=folder.fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def write(folder: Folder, superblock: Superblock) -> None:
    """Replace a directory's superblock atomically, and sync it to stable storage.

    Raises:
        OSError: the file cannot be written.
    """
    replace_file(folder, NAME, msgspec.json.format(msgspec.json.encode(superblock)))


def differences(found: Superblock, wanted: Superblock) -> list[str]:
    """Return a text for each field that differs, with the found and the wanted value."""
    before, now = _flat(found), _flat(wanted)
    return [
        f"{name} was {before.get(name)!r}, is now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _flat(superblock: Superblock) -> dict[str, Any]:
    fields = msgspec.structs.asdict(superblock)
    del fields["block_identity"]
    return {**superblock.block_identity, **fields}
