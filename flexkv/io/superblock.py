"""The superblock of one directory of the SSD tier: what its blocks are, and how they lie.

A directory whose superblock differs holds blocks that mean nothing here: another model, layout,
secret or version. It says which field differs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from flexkv.io.file_calls import KERNEL

NAME = "superblock.flexkv"
FORMAT_VERSION = 2


class Superblock(msgspec.Struct, frozen=True):
    """What the blocks in a directory are. All of it must be equal for them to be of use."""

    version: int
    blocks_are: dict[str, Any]
    """Model, tokens per block, version of the keys, digest of the secret."""
    block_stride_bytes: int
    rows_per_file: int | None
    """None: all rows are in one file."""


def read(folder: Path) -> Superblock | None:
    """Give a directory's superblock; None when it has none that can be read."""
    try:
        return msgspec.json.decode((folder / NAME).read_bytes(), type=Superblock)
    except (OSError, msgspec.DecodeError, RecursionError):
        return None


def write(folder: Path, superblock: Superblock) -> None:
    """Replace a directory's superblock, at once and for good.

    Raises:
        OSError: the directory takes no file.
    """
    new = folder / f"{NAME}.new"
    with new.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(superblock)))
        file.flush()
        os.fdatasync(file.fileno())
    new.rename(folder / NAME)
    KERNEL.sync_folder(folder)


def differences(found: Superblock, wanted: Superblock) -> list[str]:
    """Say each field that differs, with what was found and what is wanted."""
    before, now = _flat(found), _flat(wanted)
    return [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _flat(superblock: Superblock) -> dict[str, Any]:
    fields = msgspec.structs.asdict(superblock)
    del fields["blocks_are"]
    return {**superblock.blocks_are, **fields}
