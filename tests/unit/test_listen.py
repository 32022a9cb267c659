"""Laws of the server's address: private, held by one server, and freed by no removed file."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from flexkv.common.errors import ConfigError
from flexkv.server import address, handshake, listen
from flexkv.server.address import check_folder, own_folders, socket_path, socket_paths
from flexkv.server.listen import Listener, is_same_user, peer_of
from flexkv.server.wire import PROTOCOL_VERSION, Hello

STRANGER = 65_533


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Return the path for a socket, in a directory that is private under any umask."""
    folder = tmp_path / "address"
    folder.mkdir(0o700)
    return folder / "socket"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory that replaces the real locations of our own server."""
    monkeypatch.setattr(address, "RUNTIME", tmp_path / "run")
    monkeypatch.setattr(address, "SHARED", tmp_path)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return tmp_path


def refusal(path: Path) -> str:
    """Return why an address cannot be taken, and check that no descriptor is left."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError) as caught:
        Listener(path)
    assert os.listdir("/proc/self/fd") == before
    assert (caught.value.field, caught.value.value) == ("server_recv_port", str(path))
    return caught.value.why


def answers(path: Path) -> bool:
    """Return whether a server listens at a path."""
    with socket.socket(socket.AF_UNIX) as ours:
        try:
            ours.connect(str(path))
        except OSError:
            return False
        return True


def without_witness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers use directory locks only, as if each had its own network namespace."""
    monkeypatch.setattr(Listener, "_bind_witness", lambda self: None)


def test_an_address_is_free_again_when_its_server_closes(path: Path) -> None:
    """A server that closes leaves no file, descriptor or lock."""
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        listener = Listener(path)
        listener.listen()
        assert answers(path)
        assert f"in use by another server (process {os.getpid()})" in refusal(path)
        listener.close()
        listener.close()
        assert list(path.parent.iterdir()) == []
    assert os.listdir("/proc/self/fd") == before


def test_a_second_close_removes_no_file(path: Path) -> None:
    """A second close keeps a file at the address, even one with the inode of the old socket."""
    listener, other = Listener(path), path.with_name("other")
    other.hardlink_to(path)
    listener.close()
    other.rename(path)
    listener.close()
    assert path.exists()


def _remove_socket(path: Path) -> None:
    path.unlink()


def _remove_all(path: Path) -> None:
    for each in path.parent.iterdir():
        each.unlink()


def _remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.mkdir(0o700)


def _replace(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))


@pytest.mark.parametrize("is_listening", [False, True])
@pytest.mark.parametrize("sweep", [_remove_socket, _remove_all, _remove_folder, _replace])
def test_nothing_that_is_removed_frees_the_address_of_a_server_that_lives(
    path: Path, sweep: Callable[[Path], None], is_listening: bool
) -> None:
    """Removing files frees no address of a live server, listening or not; the error has its pid."""
    listener = Listener(path)
    if is_listening:
        listener.listen()
    sweep(path)
    assert f"process {os.getpid()}" in refusal(path)
    listener.close()
    Listener(path).close()


@pytest.mark.parametrize("sweep", [_remove_socket, _remove_all, _replace])
def test_the_lock_of_the_directory_alone_keeps_others_out(
    path: Path, sweep: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory's lock alone protects the address, as it must between network namespaces."""
    without_witness(monkeypatch)
    listener, other = Listener(path), Listener(path.with_name("other"))
    sweep(path)
    assert f"process {os.getpid()}" in refusal(path)
    listener.close()
    other.close()
    Listener(path).close()


def test_who_answers_keeps_others_out_where_directories_cannot_be_locked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without directory locks, a socket that is listening is kept, even if it accepts nothing."""

    def cannot(*_: object) -> None:
        raise OSError(37, "No locks available")

    without_witness(monkeypatch)
    monkeypatch.setattr(listen, "_set_lock", cannot)
    listener = Listener(path)
    listener.socket.listen(0)
    assert f"process {os.getpid()}" in refusal(path)
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        for each in (first, second):
            each.setblocking(False)
            each.connect_ex(str(path))
        assert "accepts no connection" in refusal(path)
    listener.close()
    Listener(path).close()


def test_a_directory_that_a_stranger_locks_is_named(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock by another user is reported: whoever can read a directory can lock it."""
    import fcntl

    without_witness(monkeypatch)
    path.parent.chmod(0o755)
    fd = os.open(path.parent, os.O_RDONLY)
    listen._set_lock(fd, fcntl.F_RDLCK, 0, 0)
    assert "another user who may read its directory" in refusal(path)
    os.close(fd)
    Listener(path).close()


def test_who_only_has_the_name_that_is_no_file_keeps_nobody_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The abstract name protects an address only if our user or root listens at it."""
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(listen._witness_name(path))
        Listener(path).close()
        squatter.listen()
        assert "in use" in refusal(path)
        monkeypatch.setattr(listen, "is_trusted", lambda peer: False)
        Listener(path).close()


SERVER = """
import os, sys
from pathlib import Path
from flexkv.server.listen import Listener

listener = Listener(Path(sys.argv[1]))
listener.listen()
ready, tell = os.pipe()
child = os.fork()
if child == 0:
    listener.close()  # as an exit handler of the child would
    os.write(tell, b"x")
    sys.stdin.read()  # lives until the test lets it go
    os._exit(0)
os.read(ready, 1)
if sys.argv[2] == "closes":
    listener.close()
print(child, flush=True)
if sys.argv[2] == "dies":
    os.kill(os.getpid(), 9)
os.waitpid(child, 0)
"""


@pytest.mark.parametrize("server", ["lives", "closes", "dies"])
def test_a_forked_child_keeps_no_address(path: Path, server: str) -> None:
    """A forked child neither keeps an address that its parent closes, nor frees its parent's."""
    command = [sys.executable, "-c", SERVER, str(path), server]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        child = int(process.stdout.readline())
        if server == "dies":
            assert process.wait(60) == -signal.SIGKILL
        if server == "lives":
            assert f"process {process.pid}" in refusal(path)
            assert answers(path)
        else:
            listener = Listener(path)
            listener.listen()
            assert answers(path)
            listener.close()
        os.kill(child, 0)  # the child is still alive
        process.stdin.close()
        process.wait(60)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_the_socket_is_private_whatever_the_umask(path: Path, umask: int) -> None:
    """The socket has mode 0600 under any umask, and the process keeps its umask."""
    before = os.umask(umask)
    try:
        listener = Listener(path)
        assert os.umask(umask) == umask
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        listener.listen()
        assert answers(path)
        listener.close()
    finally:
        os.umask(before)


def test_a_socket_that_was_removed_is_bound_anew(path: Path) -> None:
    """A removed socket is bound anew, also in a new directory; another file there is kept."""
    listener = Listener(path)
    listener.listen()
    assert not listener.renew()
    for sweep in (_remove_socket, _remove_folder):
        before = listener.socket
        sweep(path)
        assert not answers(path)
        assert listener.renew()
        assert listener.socket is not before
        before.close()
        assert answers(path)
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        assert not listener.renew()
    path.unlink()
    path.write_text("dear")
    assert not listener.renew()
    listener.close()
    assert path.read_text() == "dear"


def test_an_address_that_another_has_taken_is_not_taken_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address that another server has taken is not taken back, even if only a lock shows it."""
    without_witness(monkeypatch)
    listener = Listener(path)
    listener.listen()
    _remove_folder(path)
    other = Listener(path)
    assert not listener.renew()
    path.unlink()
    for _ in range(2):
        assert not listener.renew()  # the other server has the lock
    assert not path.exists()
    listener.close()
    other.close()


def test_directories_that_strangers_may_change_are_refused_by_name(path: Path) -> None:
    """A socket below a directory that others may write to is refused, unless that one is sticky."""
    folder = path.parent
    inner = folder / "inner"
    inner.mkdir(0o700)
    for mode, is_refused in (
        (0o702, True), (0o777, True), (0o1777, False), (0o755, False), (0o1702, False),
    ):  # fmt: skip
        folder.chmod(mode)
        for socket_at in (path, inner / "socket"):
            if is_refused:
                assert f"{folder} is writable by others" in refusal(socket_at)
            else:
                Listener(socket_at).close()
    folder.chmod(0o700)
    (folder / "link").symlink_to("inner/../inner")
    Listener(folder / "link" / "socket").close()
    (folder / "circle").symlink_to("circle")
    assert "symbolic links" in refusal(folder / "circle" / "socket")
    assert "No such file" in refusal(folder / "missing" / "socket")
    (folder / "file").touch()
    assert "not a directory" in refusal(folder / "file" / "socket")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_directories_and_links_of_strangers_are_refused_by_name(path: Path) -> None:
    """Directories and links of other users are refused by name, whatever their mode."""
    folder = path.parent
    inner = folder / "inner"
    inner.mkdir(0o700)
    link = folder / "link"
    link.symlink_to(inner)
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
    assert f"{link} belongs to user {STRANGER}" in refusal(link / "socket")
    link.unlink()
    os.chown(folder, STRANGER, STRANGER)
    for socket_at in (path, inner / "socket"):
        assert f"{folder} belongs to user {STRANGER}" in refusal(socket_at)
    os.chown(folder, 0, STRANGER)
    folder.chmod(0o770)
    assert "is writable by others" in refusal(path)
    folder.chmod(0o750)
    Listener(path).close()


def test_a_group_of_the_owners_number_is_his_alone(path: Path) -> None:
    """A directory writable by its owner's private group is accepted (umask 002)."""
    path.parent.chmod(0o770)
    if path.parent.stat().st_gid == os.geteuid():
        check_folder(path.parent)
    else:
        assert "is writable by others" in refusal(path)


def test_our_own_address_is_in_a_directory_of_ours(own: Path) -> None:
    """The directory of our own address gets mode 0700; a server in another location counts too."""
    uid = os.geteuid()
    shared = own / f"flexkv-{uid}" / "server"
    assert socket_paths("own") == socket_paths("") == (shared,)
    before = os.umask(0o777)
    try:
        first = Listener(socket_path("own"))
    finally:
        os.umask(before)
    first.listen()
    assert stat.S_IMODE(shared.parent.stat().st_mode) == 0o700
    runtime = own / "run" / str(uid)
    runtime.mkdir(0o700, parents=True)
    assert socket_paths("own") == (runtime / "flexkv" / "server", shared)
    assert f"process {os.getpid()}" in refusal(socket_path("own"))
    first.close()
    shared.parent.chmod(0o755)
    Listener(shared).close()
    assert stat.S_IMODE(shared.parent.stat().st_mode) == 0o700
    listener = Listener(socket_path("own"))
    shutil.rmtree(runtime / "flexkv")
    before = listener.socket
    assert listener.renew()
    before.close()
    assert stat.S_IMODE((runtime / "flexkv").stat().st_mode) == 0o700
    listener.close()


def test_the_runtime_directory_is_used_if_it_is_ours(own: Path) -> None:
    """XDG_RUNTIME_DIR is used only if it is a private directory with a short, absolute path."""
    told = own / "told"
    shared = own / f"flexkv-{os.geteuid()}"
    assert own_folders({"XDG_RUNTIME_DIR": str(told)}) == (shared,)
    told.mkdir(0o700)
    assert own_folders({"XDG_RUNTIME_DIR": str(told)}) == (told / "flexkv", shared)
    told.chmod(0o770)
    assert own_folders({"XDG_RUNTIME_DIR": str(told)}) == (shared,)
    told.chmod(0o700)
    (own / "link").symlink_to(told)
    assert own_folders({"XDG_RUNTIME_DIR": str(own / "link")}) == (shared,)
    long = own / ("x" * 90)
    long.mkdir(0o700)
    assert own_folders({"XDG_RUNTIME_DIR": str(long)}) == (shared,)
    assert own_folders({"XDG_RUNTIME_DIR": "told"}) == (shared,)


def test_clients_look_in_each_place_where_our_own_server_may_be(own: Path) -> None:
    """Clients try each location of our own server, which may have begun without XDG_RUNTIME_DIR."""
    shared = own / f"flexkv-{os.geteuid()}" / "server"
    with pytest.raises(FileNotFoundError, match=str(shared)):
        handshake._reached("own", 1.0)
    listener = Listener(shared)
    with pytest.raises(ConnectionRefusedError, match=str(shared)):
        handshake._reached("own", 1.0)
    listener.listen()
    runtime = own / "run" / str(os.geteuid())
    runtime.mkdir(0o700, parents=True)
    for _ in range(2):
        ours, path = handshake._reached("own", 1.0)
        ours.close()
        assert path == shared
        (runtime / "flexkv").mkdir(exist_ok=True)
    listener.close()
    other = Listener(runtime / "flexkv" / "server")
    other.listen()
    ours, path = handshake._reached("", 1.0)
    ours.close()
    assert path == other.path
    other.close()


def _squatted(kind: str, folder: Path, elsewhere: Path) -> None:
    elsewhere.mkdir(0o700)
    if kind == "link":
        folder.symlink_to(elsewhere)
    elif kind == "file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777)


@pytest.mark.parametrize("kind", ["link", "file", "writable"])
def test_our_own_directory_is_never_what_somebody_put_there(own: Path, kind: str) -> None:
    """A link, a file or a writable directory in place of our own directory is refused by name."""
    folder, elsewhere = own / f"flexkv-{os.geteuid()}", own / "elsewhere"
    _squatted(kind, folder, elsewhere)
    assert str(folder) in refusal(socket_path("own"))
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["tcp://127.0.0.1:5", "relative", "ipc://relative", f"/{'x' * 100}", "/a\0b"]
)
def test_what_is_no_unix_socket_is_refused(text: str) -> None:
    """An address that is not an absolute, short path of a Unix socket is refused by name."""
    with pytest.raises(ConfigError, match="server_recv_port"):
        socket_paths(text)


@pytest.mark.parametrize(
    ("uid", "is_same"), [(os.geteuid(), True), (0, True), (STRANGER, False), (2**32 - 2, False)]
)
def test_only_our_user_and_root_are_trusted(uid: int, is_same: bool) -> None:
    """Only our user and root are trusted as peers."""

    class Connected:
        def getsockopt(self, level: int, option: int, size: int) -> bytes:
            assert (level, option) == (socket.SOL_SOCKET, socket.SO_PEERCRED)
            return struct.pack("iII", 77, uid, 5)[:size]

    connected = cast("socket.socket", Connected())
    assert peer_of(connected) == (77, uid)
    assert is_same_user(connected) is is_same


def test_nothing_is_said_to_who_is_not_trusted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is not trusted is sent nothing; the error names its path, process and user."""
    monkeypatch.setattr(handshake, "is_same_user", lambda peer: False)
    listener = Listener(path)
    listener.socket.listen()
    with pytest.raises(ConfigError, match=f"{path}.*served by user.*process {os.getpid()}"):
        handshake.connect(f"ipc://{path}", Hello(PROTOCOL_VERSION, "client", 1))
    theirs, _ = listener.socket.accept()
    assert theirs.recv(1) == b""
    theirs.close()
    listener.close()


def test_credentials_are_those_of_who_listens(path: Path) -> None:
    """A client sees the listener's credentials before the server accepts or sends anything."""
    listener = Listener(path)
    listener.listen()
    with socket.socket(socket.AF_UNIX) as ours:
        ours.connect(str(path))
        assert peer_of(ours) == (os.getpid(), os.geteuid())
    listener.close()


def test_as_many_links_are_followed_as_the_kernel_follows(path: Path) -> None:
    """A directory behind forty symbolic links is accepted, and one behind forty-one is refused."""
    at = path.parent
    for number in range(41):
        check_folder(at)
        at.stat()
        link = path.parent / f"link-{number}"
        link.symlink_to(at)
        at = link
    for look in (check_folder, Path.stat):
        with pytest.raises(OSError, match="symbolic links"):
            look(at)
