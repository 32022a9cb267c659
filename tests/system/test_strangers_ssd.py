"""Tests that what a stranger put at the SSD tier's files is neither adopted nor written to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .serving import eventually
from .users import (
    OWNER,
    STRANGER,
    answers,
    home_in,
    outcome,
    process,
    settings_at,
    shared_folder,
    users,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")


@pytest.fixture(scope="module", autouse=True)
def _other_users() -> Iterator[None]:
    """Allow tests to start processes of other users."""
    with users():
        yield


@pytest.fixture
def shared() -> Iterator[Path]:
    """Yield a directory like /tmp."""
    with shared_folder() as folder:
        yield folder


@pytest.fixture
def home(shared: Path) -> Path:
    """Return a directory of the owner's that others may read."""
    return home_in(shared)


def _made(path: Path, uid: int, kind: str, target: Path | None = None) -> None:
    """Make what a stranger may have put in place of a file or directory."""
    if kind == "link":
        path.symlink_to(target or "/nowhere")
    elif kind == "directory":
        path.mkdir()
        path.chmod(0o777)
    else:
        path.touch()
        path.chmod(0o666)
    os.chown(path, uid, uid, follow_symlinks=False)


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_an_ssd_directory_that_a_stranger_has_made_is_refused(
    kind: str, home: Path, shared: Path
) -> None:
    """An SSD directory that a stranger made is refused by name, and nothing is written there."""
    elsewhere = shared / "elsewhere"
    _made(elsewhere, STRANGER, "directory")
    _made(home / "ssd", STRANGER, kind, elsewhere)
    why = outcome(OWNER, "serve", settings_at(f"ipc://{home}/socket", home, strict=True))
    assert str(home / "ssd") in why
    assert f"user {STRANGER}" in why
    assert list(elsewhere.iterdir()) == []


NAMES = ["blocks-0000.flexkv", "journal.flexkv", "superblock.flexkv", "lock.flexkv"]


@pytest.mark.parametrize("kind", ["file", "link"])
@pytest.mark.parametrize("name", NAMES)
def test_files_of_a_stranger_in_an_ssd_directory_are_not_adopted(
    name: str, kind: str, home: Path, shared: Path
) -> None:
    """A stranger's file or link in place of a tier's file is refused by name, and not followed."""
    settings = settings_at(f"ipc://{home}/socket", home, strict=True)
    with process(OWNER, "serve", settings) as server:
        eventually(lambda: answers(settings), 30.0)
        outcome(OWNER, "use", settings)
        assert server.end() == "ended"
    dear = shared / "dear"
    dear.write_text("dear")
    os.chown(dear, OWNER, OWNER)
    (home / "ssd" / name).unlink()
    _made(home / "ssd" / name, STRANGER, kind, dear)
    why = outcome(OWNER, "serve", settings)
    assert name in why
    assert dear.read_text() == "dear"


def test_a_file_of_a_stranger_that_is_to_be_replaced_is_not_written_through(
    home: Path, shared: Path
) -> None:
    """A new superblock is not written through a stranger's link at its temporary name."""
    dear = shared / "dear"
    dear.write_text("dear")
    os.chown(dear, OWNER, OWNER)
    (home / "ssd").mkdir()
    (home / "ssd").chmod(0o700)
    os.chown(home / "ssd", OWNER, OWNER)
    _made(home / "ssd" / "superblock.flexkv.new", STRANGER, "link", dear)
    settings = settings_at(f"ipc://{home}/socket", home)
    with process(OWNER, "serve", settings) as server:
        eventually(lambda: answers(settings) or server.has_ended, 30.0)
    assert dear.read_text() == "dear"
