"""Laws of the cache for device code and choices: it uses only our own files, and needs none."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from flexkv.io.cuda import kept


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    """A kept file and its directory are private, and the file is found until it is forgotten."""
    path = tmp_path / "made" / "flexkv" / "code"
    kept.write(path, b"first")
    kept.write(path, b"second")
    assert kept.read(path) == b"second"
    assert os.listdir(path.parent) == ["code"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.unlink()
    assert kept.read(path) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.chmod(0o666),
        lambda path: path.parent.chmod(0o777),
        lambda path: path.parent.chmod(0o1777),
        lambda path: path.rename(path.parent / "other") and path.symlink_to("other"),
        lambda path: (path.parent / "again").hardlink_to(path),
    ],
)
def test_what_others_could_have_written_is_not_believed_in(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """A file that others could have written is ignored, since the device would run it."""
    path = tmp_path / "flexkv" / "code"
    kept.write(path, b"code")
    change(path)
    assert kept.read(path) is None


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Nothing is written through a link, neither at the temporary name nor at the final one."""
    path, other = tmp_path / "flexkv" / "code", tmp_path / "other"
    other.write_text("precious")
    path.parent.mkdir(0o700)
    path.symlink_to(other)
    path.with_name(f"code.{os.getpid()}").symlink_to(other)
    kept.write(path, b"code")
    assert other.read_text() == "precious"
    assert kept.read(path) == b"code"


def test_without_a_home_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a home directory nothing is kept, and no directory called "~" is made."""
    monkeypatch.chdir(tmp_path)
    kept.write(Path("~/.cache/flexkv/code"), b"code")
    assert os.listdir() == []
    assert kept.read(Path("~/.cache/flexkv/code")) is None
