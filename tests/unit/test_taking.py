"""Laws of opening the SSD tier: a directory that is refused stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from flexkv.common.errors import ConfigError
from flexkv.io.ssd import journal, superblock
from flexkv.io.ssd.files import FileOptions
from flexkv.io.ssd.open import SsdRequest, take_ssd
from flexkv.io.ssd.superblock import Superblock

STRIDE = 4096
BLOCKS = 8
WANTED = Superblock(1, {"dtype": "float16"}, STRIDE, 2)
OTHER = Superblock(1, {"dtype": "bfloat16"}, STRIDE, 2)


def take(wanted: SsdRequest) -> dict[str, str]:
    """Open a tier and close it; return the directories that were left out, with the reasons."""
    lost: dict[str, str] = {}
    with ExitStack() as undo:
        take_ssd(wanted, lost.__setitem__, undo)
    return lost


def block_files(folder: Path) -> dict[str, bytes]:
    """Return the content of each block file."""
    return {path.name: path.read_bytes() for path in folder.glob("blocks-*") if path.is_file()}


@pytest.fixture
def wanted(tmp_path: Path) -> SsdRequest:
    """Return a request for two directories that a tier has used."""
    directories = (tmp_path / "a", tmp_path / "b")
    wanted = SsdRequest(directories, BLOCKS, WANTED, FileOptions())
    assert take(wanted) == {}
    for directory in directories:
        for path in directory.glob("blocks-*"):
            path.write_bytes(b"x" * path.stat().st_size)
    return wanted


def public_journal(folder: Path) -> None:
    """Make the journal writable by others."""
    (folder / journal.NAME).chmod(0o666)


def no_new_journal(folder: Path) -> None:
    """Keep the journal from being rewritten."""
    (folder / journal.NEW_NAME).mkdir()


def public_superblock(folder: Path) -> None:
    """Make the superblock writable by others."""
    (folder / superblock.NAME).chmod(0o666)


def no_new_superblock(folder: Path) -> None:
    """Keep the superblock from being replaced."""
    (folder / f"{superblock.NAME}.new").mkdir()


def no_removal(folder: Path) -> None:
    """Put a directory beside the block files, under the name of one."""
    (folder / "blocks-0900.flexkv").mkdir()


def no_journal(folder: Path) -> None:
    """Put a directory in place of the journal."""
    (folder / journal.NAME).unlink()
    (folder / journal.NAME).mkdir()


@pytest.mark.parametrize("num_blocks", [2, BLOCKS, 64])
@pytest.mark.parametrize(
    ("spoil", "changes"),
    [
        (public_journal, {}),
        (no_new_journal, {}),
        (public_superblock, {}),
        (no_new_superblock, {"superblock": OTHER}),
        (no_removal, {}),
        (no_journal, {}),
        (no_journal, {"superblock": OTHER}),
        (no_journal, {"keeps_journal": False}),
    ],
)
def test_a_directory_that_is_refused_is_left_as_it_was(
    wanted: SsdRequest, spoil: Callable[[Path], None], changes: dict[str, object], num_blocks: int
) -> None:
    """No file of a refused directory is cut, removed or grown; the tier opens without it."""
    directory = wanted.directories[1]
    spoil(directory)
    before = block_files(directory)
    assert len(before) == 2
    wanted = replace(wanted, num_blocks=num_blocks, **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=str(directory)):
        take(replace(wanted, is_strict=True))
    assert block_files(directory) == before
    assert list(take(wanted)) == [str(directory)]
    assert block_files(directory) == before


def test_what_is_not_replaced_need_not_be_replaceable(wanted: SsdRequest) -> None:
    """A superblock that fits is kept, even if it could not be replaced."""
    no_new_superblock(wanted.directories[1])
    assert take(wanted) == {}
