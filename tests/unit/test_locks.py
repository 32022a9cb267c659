"""Laws of a directory's lock: one holder, freed by no file, and kept by no child."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from errno import EBADF, EDQUOT, ENOLCK, ENOSPC, ENOSYS
from pathlib import Path

import pytest

from flexkv.io.ssd import locks
from flexkv.io.ssd.locks import NOTE_NAME, lock_directory


def refusal(path: Path) -> str:
    """Return why a directory cannot be locked, and check that no descriptor is left."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BlockingIOError) as caught:
        lock_directory(path)
    assert os.listdir("/proc/self/fd") == before
    assert caught.value.filename == str(path)
    return str(caught.value.strerror)


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    """A second holder is refused with the first one's pid, and accepted after the release."""
    before = os.listdir("/proc/self/fd")
    lock = lock_directory(tmp_path)
    assert refusal(tmp_path) == f"is in use by process {os.getpid()}"
    lock.release()
    lock.release()
    lock_directory(tmp_path).release()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("note", [None, "", "no number", "-1"])
def test_removing_the_note_frees_nothing(tmp_path: Path, note: str | None) -> None:
    """Deleting or overwriting the note frees no lock; only the holder's pid is unknown then."""
    lock = lock_directory(tmp_path)
    (tmp_path / NOTE_NAME).unlink()
    if note is not None:
        (tmp_path / NOTE_NAME).write_text(note)
    assert refusal(tmp_path) == "is in use by another process"
    lock.release()


def test_a_release_that_locks_the_note_only_is_kept_out(tmp_path: Path) -> None:
    """An earlier release, which locks only the note, and this one exclude each other."""
    with (tmp_path / NOTE_NAME).open("w") as note:
        fcntl.flock(note, fcntl.LOCK_EX)
        note.write("77")
        note.flush()
        assert refusal(tmp_path) == "is in use by process 77"
    lock = lock_directory(tmp_path)
    with (tmp_path / NOTE_NAME).open() as note, pytest.raises(BlockingIOError):
        fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.release()


def test_a_new_directory_of_the_same_name_is_another(tmp_path: Path) -> None:
    """The lock is on the directory, not on its name: a new one of that name is free."""
    folder = tmp_path / "folder"
    folder.mkdir()
    lock = lock_directory(folder)
    folder.rename(tmp_path / "elsewhere")
    folder.mkdir()
    other = lock_directory(folder)
    assert "in use" in refusal(tmp_path / "elsewhere")
    lock.release()
    other.release()


@pytest.mark.parametrize("kind", ["link", "directory", "pipe", "hard link"])
def test_a_note_that_is_no_file_of_ours_is_refused(tmp_path: Path, kind: str) -> None:
    """A link, directory or pipe as the note is refused, never written to, and leaves no lock."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.write_text("precious")
    note = folder / NOTE_NAME
    {
        "link": lambda: note.symlink_to(other),
        "directory": note.mkdir,
        "pipe": lambda: os.mkfifo(note),
        "hard link": lambda: note.hardlink_to(other),
    }[kind]()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(PermissionError) as caught:
        lock_directory(folder)
    assert caught.value.filename == NOTE_NAME
    assert os.listdir("/proc/self/fd") == before
    assert other.read_text() == "precious"
    note.rmdir() if kind == "directory" else note.unlink()
    lock_directory(folder).release()


@pytest.mark.parametrize("path", ["missing", "file"])
def test_only_a_directory_is_locked(tmp_path: Path, path: str) -> None:
    """Locking a missing path or a file raises an OSError."""
    (tmp_path / "file").write_text("")
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        lock_directory(tmp_path / path)


PARENT = """
import ctypes, os, sys
from pathlib import Path
from flexkv.io.ssd.locks import lock_directory

lock = lock_directory(Path(sys.argv[1]))
released, release = os.pipe()
child = os.fork() if sys.argv[3] == "python" else ctypes.PyDLL(None).fork()
if child == 0:
    lock.release()  # as an exit handler of the child would
    os.write(release, b"x")
    os.close(1)
    sys.stdin.read()  # lives until the test lets it go
    os._exit(0)
os.read(released, 1)
if sys.argv[2] == "releases":
    lock.release()
print(child, flush=True)
if sys.argv[2] == "dies":
    os.kill(os.getpid(), 9)
os.waitpid(child, 0)
"""


@pytest.mark.parametrize(
    ("parent", "fork"),
    [
        ("holds", "python"),
        ("holds", "C"),
        ("releases", "python"),
        ("releases", "C"),
        ("dies", "python"),
    ],
)
def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path, parent: str, fork: str) -> None:
    """A forked child neither keeps a lock that its parent releases, nor releases its parent's."""
    command = [sys.executable, "-c", PARENT, str(tmp_path), parent, fork]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        child = int(process.stdout.readline())
        if parent == "dies":
            assert process.wait(60) == -signal.SIGKILL
        if parent == "holds":
            assert refusal(tmp_path) == f"is in use by process {process.pid}"
        else:
            lock_directory(tmp_path).release()
        os.kill(child, 0)  # it is still alive
        process.stdin.close()
        process.wait(60)


def refuse_with(number: int) -> Callable[..., int]:
    """Return a function that fails with an errno."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [ENOSPC, EDQUOT])
def test_a_full_disk_locks_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A lock works on a full disk, without the pid or even without the note."""
    for call in ("pwrite", "ftruncate"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse_with(number))
            lock = lock_directory(tmp_path)
            with pytest.raises(BlockingIOError, match="is in use by"):
                lock_directory(tmp_path)
            lock.release()
    (tmp_path / NOTE_NAME).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(locks, "open_file", refuse_with(number))
        lock = lock_directory(tmp_path)
        with pytest.raises(BlockingIOError, match="another process"):
            lock_directory(tmp_path)
        lock.release()
    lock_directory(tmp_path).release()


@pytest.mark.parametrize("number", [EBADF, ENOSYS, ENOLCK])
def test_where_directories_cannot_be_locked_the_note_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Where directories cannot be locked (NFS), the note is; where neither can, locking fails."""
    flock = fcntl.flock

    def only_files(fd: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", only_files)
    lock = lock_directory(tmp_path)
    with pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()}"):
        lock_directory(tmp_path)
    lock.release()
    monkeypatch.setattr(fcntl, "flock", refuse_with(number))
    with pytest.raises(OSError, match="can be locked"):
        lock_directory(tmp_path)
