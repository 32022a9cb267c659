"""Laws of private files: what others may write to is refused by name, and no link is followed."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from errno import EBADF, EINVAL, EIO, ENOSYS
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from flexkv.common.errors import ConfigError
from flexkv.io import private
from flexkv.io.private import NotPrivateError, make_directory, open_directory, open_file
from flexkv.io.ssd import file_calls, journal, superblock
from flexkv.io.ssd.files import StripedFiles
from flexkv.io.ssd.folders import open_folder
from flexkv.io.ssd.locks import NOTE_NAME
from flexkv.io.ssd.offline import OfflineSsd
from flexkv.io.ssd.open import open_journals, refuse
from flexkv.io.ssd.superblock import Superblock

STRIDE = 4096
WANTED = Superblock(1, {"dtype": "float16"}, STRIDE, None)
STRANGER = 4321
FILES = [NOTE_NAME, superblock.NAME, journal.NAME, "blocks-0000.flexkv"]


@pytest.fixture
def umask() -> Iterator[None]:
    """Restore the umask after a test that sets it."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def belongs_to_a_stranger(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Give a file to another user: really if we are root, else in what `private` sees."""
    if os.geteuid() == 0:
        os.chown(path, STRANGER, -1, follow_symlinks=False)
        return
    number = path.lstat().st_ino

    def seen(call: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def look(*args: object, **options: object) -> os.stat_result:
            found = call(*args, **options)
            if found.st_ino != number:
                return found
            return os.stat_result((*found[:4], STRANGER, *found[5:]))

        return look

    for name in ("stat", "lstat", "fstat"):
        monkeypatch.setattr(private.os, name, seen(getattr(os, name)))


def open_tier(folder: Path) -> None:
    """Open and close everything that an engine keeps in a directory."""
    with ExitStack() as undo:
        files = StripedFiles.open([folder], 4, STRIDE)
        undo.callback(files.close)
        (one,) = open_journals(files.folders, WANTED, undo)
        one.append(journal.stored(np.arange(2), np.zeros(2, np.uint64), np.ones((2, 36), np.uint8)))
        one.sync()


def inspect(folder: Path) -> None:
    """Open a directory as `flexkv ssd` does, and read every block."""
    with OfflineSsd(folder) as tier:
        list(tier.verify())


def refusal(call: Callable[[Path], None], folder: Path) -> ConfigError:
    """Return the error that refuses a directory, and check that no descriptor is left."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError) as caught:
        call(folder)
    assert os.listdir("/proc/self/fd") == before
    return caught.value


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    """Return a directory that an engine has used."""
    folder = tmp_path / "tier"
    open_tier(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return folder


# -- files ---------------------------------------------------------------------------------------


def make_link(place: Path, other: Path) -> None:
    """Put a link to another file at the place."""
    place.symlink_to(other)


def make_dangling_link(place: Path, other: Path) -> None:
    """Put a link at the place that would create a file if it were followed."""
    place.symlink_to(other.with_name("made"))


def make_hard_link(place: Path, other: Path) -> None:
    """Put a hard link to another file at the place."""
    place.hardlink_to(other)


def make_pipe(place: Path, _: Path) -> None:
    """Put a pipe at the place, which nobody reads from or writes to."""
    os.mkfifo(place)


def make_socket(place: Path, _: Path) -> None:
    """Put a socket at the place."""
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(place.parent)  # a socket's address has to be short
        listener.bind(place.name)


def make_directory_there(place: Path, _: Path) -> None:
    """Put a directory at the place."""
    place.mkdir()


@pytest.mark.parametrize("call", [open_tier, inspect])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("put", "why"),
    [
        (make_link, "is a symbolic link"),
        (make_dangling_link, "is a symbolic link"),
        (make_hard_link, "hard link"),
        (make_pipe, "not a regular file"),
        (make_socket, "not a regular file"),
        (make_directory_there, "not a regular file"),
    ],
)
def test_what_stands_in_place_of_a_file_is_refused(
    tier: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[Path], None],
    name: str,
    put: Callable[[Path, Path], None],
    why: str,
) -> None:
    """Anything in place of a regular file is refused by path, and not read, written or followed."""
    monkeypatch.chdir(tier)
    other, place = tier.parent / "other", tier / name
    other.write_text("precious")
    other.chmod(0o640)
    place.unlink()
    put(place, other)
    error = refusal(call, tier)
    assert (error.value, why in error.why) == (str(place), True)
    assert other.read_text() == "precious"
    assert stat.S_IMODE(other.stat().st_mode) == 0o640
    assert sorted(path.name for path in tier.parent.iterdir()) == ["other", "tier"]


@pytest.mark.parametrize("call", [open_tier, inspect])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o777])
def test_a_file_that_others_may_write_to_is_refused(
    tier: Path, call: Callable[[Path], None], name: str, mode: int
) -> None:
    """A file that others may write to is refused, as a chmod now would not undo their writes."""
    (tier / name).chmod(mode)
    error = refusal(call, tier)
    assert error.value == str(tier / name)
    assert error.why.startswith(f"is writable by others (mode {mode:04o}): run chmod go-w")


@pytest.mark.parametrize("call", [open_tier, inspect])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_user_is_refused(
    tier: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[Path], None], name: str
) -> None:
    """A file of another user is refused."""
    belongs_to_a_stranger(monkeypatch, tier / name)
    error = refusal(call, tier)
    assert error.value == str(tier / name)
    assert error.why.startswith(f"belongs to user {STRANGER}, not to us")


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o277, 0o777])
@pytest.mark.usefixtures("umask")
def test_modes_do_not_follow_the_umask(tmp_path: Path, mask: int) -> None:
    """A new directory has mode 0700 and its files 0600, under any umask."""
    os.umask(mask)
    open_tier(tmp_path / "tier")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "tier").iterdir()}
    assert modes == dict.fromkeys(FILES, 0o600)
    assert stat.S_IMODE((tmp_path / "tier").stat().st_mode) == 0o700


@pytest.mark.parametrize("call", [open_tier, inspect])
def test_files_that_others_may_read_are_made_private(
    tier: Path, call: Callable[[Path], None]
) -> None:
    """Files that others may read, as earlier releases left them, become private."""
    for name in FILES:
        (tier / name).chmod(0o644)
    call(tier)
    assert {stat.S_IMODE((tier / name).stat().st_mode) for name in FILES} == {0o600}


@pytest.mark.parametrize("put", [make_link, make_dangling_link, make_hard_link, make_pipe])
def test_a_half_written_superblock_is_never_followed(
    tier: Path, put: Callable[[Path, Path], None]
) -> None:
    """Whatever stands at the superblock's temporary name is removed, never written through."""
    other = tier.parent / "other"
    other.write_text("precious")
    (tier / superblock.NAME).unlink()
    put(tier / f"{superblock.NAME}.new", other)
    with capture_logs():
        open_tier(tier)
    assert other.read_text() == "precious"
    assert sorted(path.name for path in tier.iterdir()) == sorted(FILES)
    assert sorted(path.name for path in tier.parent.iterdir()) == ["other", "tier"]
    with ExitStack() as undo:
        assert superblock.read(open_folder(tier, undo)) == WANTED


@pytest.mark.parametrize("put", [make_link, make_hard_link, make_pipe])
def test_a_new_journal_is_never_written_through_a_link(
    tier: Path, put: Callable[[Path, Path], None]
) -> None:
    """A journal is not rewritten if something else stands at its temporary name."""
    other = tier.parent / "other"
    other.write_text("precious")
    opened = journal.Journal(tier)
    put(tier / journal.NEW_NAME, other)
    opened.begin_new()
    assert not opened.has_new
    opened.close()
    assert other.read_text() == "precious"


# -- directories ---------------------------------------------------------------------------------

CALLS = [open_tier, inspect, lambda folder: refuse([folder], WANTED)]


@pytest.mark.parametrize("call", CALLS[:2])
@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o775, 0o770, 0o707, 0o2775])
def test_a_directory_that_others_may_write_to_is_refused(
    tier: Path, call: Callable[[Path], None], mode: int
) -> None:
    """A directory that others may write to is refused with its mode, even if it is sticky."""
    tier.chmod(mode)
    error = refusal(call, tier)
    assert error.value == str(tier)
    assert error.why.startswith(f"is writable by others (mode {mode:04o}): run chmod go-w")


@pytest.mark.parametrize("call", CALLS[:2])
def test_a_directory_of_another_user_is_refused(
    tier: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[Path], None]
) -> None:
    """A directory of another user is refused."""
    belongs_to_a_stranger(monkeypatch, tier)
    error = refusal(call, tier)
    assert error.value == str(tier)
    assert error.why.startswith(f"belongs to user {STRANGER}, not to us")


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_a_directory_that_others_may_read_stays_as_it_is(tier: Path, mode: int) -> None:
    """A directory that others may read keeps its owner's mode; its files are private."""
    tier.chmod(mode)
    for call in CALLS:
        call(tier)
    assert stat.S_IMODE(tier.stat().st_mode) == mode


def test_a_linked_directory_of_ours_is_followed(tier: Path) -> None:
    """A link of ours to a directory is followed, and its target is checked."""
    link = tier.parent / "link"
    link.symlink_to(tier)
    for call in CALLS:
        call(link)
    tier.chmod(0o777)
    for each in CALLS[:2]:
        assert "is writable by others" in refusal(each, link).why


def test_a_link_of_another_user_is_refused(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link of another user is refused, since it could lead to any directory of ours."""
    link = tier.parent / "link"
    link.symlink_to(tier)
    belongs_to_a_stranger(monkeypatch, link)
    for call in CALLS[:2]:
        assert refusal(call, link).why == f"is a symbolic link made by user {STRANGER}"


def test_another_directory_of_the_same_name_is_not_used(tmp_path: Path) -> None:
    """An open tier stays in its directory when that is renamed and another takes its name."""
    folder, moved = tmp_path / "tier", tmp_path / "moved"
    with ExitStack() as undo:
        files = StripedFiles.open([folder], 4, STRIDE)
        undo.callback(files.close)
        (one,) = open_journals(files.folders, WANTED, undo)
        folder.rename(moved)
        folder.mkdir()
        one.begin_new()
        one.append(journal.cleared())
        one.take_new()
        one.sync()
    assert list(folder.iterdir()) == []
    assert (moved / journal.NAME).read_bytes() == journal.cleared()


@pytest.mark.parametrize("number", [EINVAL, ENOSYS, EIO, EBADF])
def test_a_directory_that_cannot_be_synced_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A directory without support for sync is used; one whose device fails is refused."""

    def refuse(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    with ExitStack() as undo:
        files = StripedFiles.open([tmp_path / "tier"], 4, STRIDE)
        undo.callback(files.close)
        monkeypatch.setattr(os, "fsync", refuse)
        if number == EIO:
            with pytest.raises(ConfigError, match="journal cannot be used"):
                open_journals(files.folders, WANTED, undo)
        else:
            assert len(open_journals(files.folders, WANTED, undo)) == 1


def test_a_directory_is_not_looked_into_before_it_is_checked(tier: Path) -> None:
    """A directory's mode is checked before its content: blocks of another kind are not reported."""
    tier.chmod(0o777)
    refuse([tier], Superblock(2, {}, STRIDE, None))
    assert "is writable by others" in refusal(open_tier, tier).why


@pytest.mark.usefixtures("umask")
def test_descriptors_do_not_leak_on_refusal(tmp_path: Path) -> None:
    """Refused directories and files leave no descriptor open."""
    before = os.listdir("/proc/self/fd")
    fd = make_directory(tmp_path / "made")
    tmp_path.chmod(0o777)
    with pytest.raises(NotPrivateError):
        open_directory(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_file(fd, "missing", os.O_RDONLY)
    (tmp_path / "made" / "file").touch(0o666)
    os.chmod(tmp_path / "made" / "file", 0o666)
    with pytest.raises(NotPrivateError):
        open_file(fd, "file", os.O_RDONLY)
    os.close(fd)
    assert os.listdir("/proc/self/fd") == before


def test_calls_stay_in_their_directory(tier: Path) -> None:
    """Calls over an open directory refuse paths in any other."""
    with ExitStack() as undo:
        calls = file_calls.KernelCalls(open_folder(tier, undo))
        with pytest.raises(AssertionError):
            calls.open(tier.parent / "elsewhere")
