"""Tests with three users on one machine: a server's, its engines', and a hostile stranger.

What a stranger put at the SSD tier's files is neither adopted nor written to.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv.common.errors import ConfigError
from flexkv.server.agent import Agent
from flexkv.server.client import Client
from flexkv.server.operator import command

from .conftest import MODEL, kv_caches
from .serving import BLOCKS, eventually
from .users import (
    OTHER,
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


@pytest.fixture
def own_folder() -> Iterator[Path]:
    """Yield the default directory of the owner's server, which does not exist before and after."""
    folder = Path(outcome(OWNER, "places")["folder"])
    assert str(OWNER) in folder.name
    _remove(folder)
    yield folder
    _remove(folder)


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def test_no_stranger_reaches_what_a_server_and_its_engine_share(
    own_folder: Path, home: Path, shared: Path
) -> None:
    """A stranger reaches no socket, directory, file or process; the owner gets the right bytes."""
    settings = settings_at("own", home)
    with process(OWNER, "serve", settings) as server:
        eventually(lambda: (own_folder / "server").exists(), 30.0)
        used = outcome(OWNER, "use", settings)
        assert used == {"put": BLOCKS, "got": BLOCKS, "same": True}
        assert stat.S_IMODE(own_folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((own_folder / "server").stat().st_mode) == 0o600
        assert (own_folder / "server").stat().st_uid == OWNER
        fds = sorted(map(int, os.listdir(f"/proc/{server.pid}/fd")))
        files = [home / "trace.log", home / "ssd", *(home / "ssd").iterdir()]
        assert len(files) >= 4
        told = {
            "folder": str(own_folder), "witness": outcome(OWNER, "places")["witness"],
            "pid": server.pid, "fds": fds, "files": list(map(str, files)), "shared": str(shared),
        }  # fmt: skip
        assert outcome(STRANGER, "steal", told) == []
        assert outcome(OWNER, "use", settings)["same"]
        assert server.end() == "ended"


def test_a_server_answers_no_stranger_even_if_its_socket_is_open_to_all(
    own_folder: Path, home: Path, shared: Path
) -> None:
    """A server answers no other user, even if its socket is open to all by mistake."""
    settings = settings_at("own", home)
    told = {"folder": str(own_folder), "witness": "", "fds": [], "files": [], "shared": str(shared)}
    with process(OWNER, "serve", settings) as server:
        eventually(lambda: answers(settings), 30.0)
        own_folder.chmod(0o755)
        (own_folder / "server").chmod(0o666)
        assert "connect" not in outcome(STRANGER, "steal", {**told, "pid": server.pid})
        assert outcome(OWNER, "use", settings)["same"]


@pytest.mark.parametrize("uid", [OWNER, 0])
@pytest.mark.parametrize("address", ["own", "custom"])
def test_nothing_is_said_to_a_server_of_another_user(
    uid: int, address: str, shared: Path, home: Path, own_folder: Path
) -> None:
    """No client, agent or operator, even of root, sends anything to another user's server."""
    folder, path = shared, str(shared / "socket")
    aside = shared / "aside"
    if address == "own":
        folder = Path(outcome(uid, "places")["folder"])
        if folder.exists():  # a server that has ended leaves its directory
            assert not (folder / "server").exists(), "a server of root's runs on this machine"
            shutil.move(folder, aside)
        folder.mkdir()
        folder.chmod(0o777)
        path = str(folder / "server")
    settings = settings_at("own" if address == "own" else f"ipc://{path}", home)
    try:
        with process(STRANGER, "impersonate", path) as impostor:
            with process(uid, "speak", settings) as peer:
                spoken, log = peer.result(), peer.log
            heard = impostor.result()
    finally:
        if address == "own":
            _remove(folder)
        if aside.exists():
            shutil.move(aside, folder)
    assert (spoken["found"], spoken["ready"]) == (0, False)
    assert f"served by user {STRANGER}" in spoken["operator"]
    assert path in spoken["operator"]
    assert heard["connections"] >= 3
    assert heard["heard"] == ""
    refusals = [line for line in log.splitlines() if f"served by user {STRANGER}" in line]
    assert any("refused_by_server" in line for line in refusals), log
    assert any("no_server" in line for line in refusals), log


def test_a_real_server_of_another_user_is_not_used_either(shared: Path, home: Path) -> None:
    """Another user's real server is not used: its socket is closed, and root sends it nothing."""
    settings = settings_at(f"ipc://{shared}/socket", home)
    with process(OTHER, "listen", settings.server_recv_port):
        assert "Permission denied" in outcome(OWNER, "speak", settings)["operator"]
        with pytest.raises(ConfigError, match=f"served by user {OTHER}"):
            command(settings.server_recv_port, "status")
        assert Client(settings, MODEL).match(b"x" * 32).blocks == 0
        agent = Agent(settings.server_recv_port, MODEL, settings.cache_config)
        agent.start(kv_caches())
        agent.settle([1])
        agent.close()


def test_a_server_of_root_is_trusted_and_serves_root_only(shared: Path, home: Path) -> None:
    """A server of root serves only root."""
    settings = settings_at(f"ipc://{shared}/socket", home)
    with process(0, "serve", settings):
        eventually(lambda: answers(settings, 0), 30.0)
        assert outcome(0, "use", settings)["same"]
        (shared / "socket").chmod(0o666)
        said = outcome(OWNER, "speak", settings)["operator"]
        # It may close before or after it reads the request.
        ends = ("closed the connection", "reset by peer", "Broken pipe")
        assert any(end in said for end in ends), said


SQUATS = ["directory", "writable", "link to a directory of the owner's", "file", "dangling link"]


@pytest.mark.parametrize("squat", SQUATS)
def test_who_makes_the_owners_directory_first_is_named(
    squat: str, own_folder: Path, home: Path
) -> None:
    """What a stranger made at the owner's directory is named, not adopted, and not followed."""
    if squat in ("directory", "writable"):
        own_folder.mkdir()
        own_folder.chmod(0o777 if squat == "writable" else 0o755)
    elif squat == "file":
        own_folder.touch()
    else:
        own_folder.symlink_to(home if "owner" in squat else home / "nothing")
    os.chown(own_folder, STRANGER, STRANGER, follow_symlinks=False)
    why = outcome(OWNER, "listen", "own")
    assert str(own_folder) in why
    assert any(each in why for each in (f"user {STRANGER}", "File exists", "Not a directory"))
    assert list(home.iterdir()) == []


def test_a_stranger_cannot_keep_an_address_from_its_owner(shared: Path, own_folder: Path) -> None:
    """A stranger's socket in a shared directory is named; the owner's own address stays usable."""
    custom = f"ipc://{shared}/socket"
    with process(STRANGER, "impersonate", f"{shared}/socket"):
        assert f"served by user {STRANGER}" in outcome(OWNER, "listen", custom)
    assert "Operation not permitted" in outcome(OWNER, "listen", custom)  # the file stays
    witness = outcome(OWNER, "places")["witness"]
    with process(STRANGER, "impersonate", witness), process(OWNER, "listen", "own") as server:
        assert "in use by another server" in outcome(OWNER, "listen", "own")
        assert server.result() == "listened"


# -- the SSD tier's files ----------------------------------------------------------------------


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
