"""Tests that the SSD tier lets nobody in: no other user, no link, and no second engine."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexkv.common.errors import ConfigError
from flexkv.kvmanager import KVManager
from tests.system.conftest import MODEL, cache_config
from tests.system.test_warm import PROMPT, flexkv, got, put


@pytest.fixture
async def tier(tmp_path: Path) -> Path:
    """Return the directory of a tier that holds a prompt."""
    await put(tmp_path / "tier", PROMPT)
    return tmp_path / "tier"


async def refusal(tier: Path) -> ConfigError:
    """Return why an engine refuses a directory; check that each command gives the same reason."""
    with pytest.raises(ConfigError) as caught:
        async with KVManager(MODEL, cache_config(tier, strict=True)):
            pass
    for verb in (["inspect"], ["verify"], ["clear", "--yes"]):
        with pytest.raises(ConfigError) as told:
            flexkv(verb[0], tier, *verb[1:])
        assert told.value.why == caught.value.why
    return caught.value


@pytest.mark.parametrize("name", ["superblock", "journal", "blocks-0000", "lock"])
async def test_files_that_others_may_write_to_are_refused(tier: Path, name: str) -> None:
    """Files that others may write to are refused by engines and by commands, with their name."""
    path = tier / f"{name}.flexkv"
    path.chmod(0o666)
    error = await refusal(tier)
    assert (error.value, "is writable by others" in error.why) == (str(path), True)
    path.chmod(0o600)
    assert (await got(tier))[0] == 16


@pytest.mark.parametrize("name", ["superblock", "journal", "blocks-0000", "lock"])
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
async def test_files_of_another_kind_are_refused(tier: Path, name: str, kind: str) -> None:
    """A link, a pipe or a file with a second name is not taken for one of the tier's files."""
    path, other = tier / f"{name}.flexkv", tier.parent / "other"
    path.rename(other)
    before = other.read_bytes()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        (path.symlink_to if kind == "link" else path.hardlink_to)(other)
    error = await refusal(tier)
    assert error.value == str(path)
    assert other.read_bytes() == before


async def test_a_shared_directory_is_refused(tier: Path) -> None:
    """A directory that a group or everybody may write to is refused."""
    for mode in (0o1777, 0o775):
        os.chmod(tier, mode)
        assert (await refusal(tier)).value == str(tier)


async def test_a_new_superblock_is_not_written_through_a_link(tier: Path) -> None:
    """A link at the temporary name of a new superblock is not followed."""
    other = tier.parent / "other"
    other.write_text("precious")
    (tier / "superblock.flexkv.new").symlink_to(other)
    await put(tier, PROMPT, key_secret="another")
    assert other.read_text() == "precious"
    assert (await got(tier, key_secret="another"))[0] == 16


async def test_nothing_is_readable_by_others(tmp_path: Path) -> None:
    """Directory and files are closed to others, whatever the umask is."""
    before = os.umask(0)
    try:
        await put(tmp_path / "tier", PROMPT)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "tier").iterdir()} == {0o600}
    assert (tmp_path / "tier").stat().st_mode & 0o777 == 0o700


async def test_removing_the_lock_file_lets_no_second_engine_in(tier: Path) -> None:
    """The directory itself is locked, so removing its files lets no second engine in."""
    async with KVManager(MODEL, cache_config(tier)):
        assert f"in use by process {os.getpid()}" in (await refusal(tier)).why
        (tier / "lock.flexkv").unlink()
        assert "in use by another process" in (await refusal(tier)).why
        for name in os.listdir(tier):
            os.unlink(tier / name)
        with pytest.raises(ConfigError, match="in use"):
            await put(tier, PROMPT, strict=True)
    await put(tier, PROMPT)
    assert (await got(tier))[0] == 16


FORKED = """
import os, structlog, sys
from flexkv.kvmanager import KVManager
from tests.system.conftest import MODEL, cache_config

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
manager = KVManager(MODEL, cache_config(sys.argv[1]))
manager.start()
child = os.fork()
if child == 0:
    os.close(1)
    sys.stdin.read()  # lives until the test lets it go
    os._exit(0)
if sys.argv[2] == "dies":
    print(child, flush=True)
    os.kill(os.getpid(), 9)
manager.shutdown()
again = KVManager(MODEL, cache_config(sys.argv[1]))
again.start()
again.shutdown()
print(child, flush=True)
os.waitpid(child, 0)
"""


@pytest.mark.parametrize("parent", ["shuts down", "dies"])
def test_a_forked_child_does_not_keep_the_directory(tmp_path: Path, parent: str) -> None:
    """The next engine can open at once while a forked child of the last one lives."""
    tier = tmp_path / "tier"
    asyncio.run(put(tier, PROMPT))
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(tier), parent]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        child = int(process.stdout.readline())
        if parent == "dies":
            process.wait(60)
        assert asyncio.run(got(tier))[0] == 16
        os.kill(child, 0)  # it is still alive
        process.stdin.close()
        process.wait(60)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.replace(b"float16", b"\xff\xfe\xfd\xfc"),
        lambda content: b"\xff" * 100,
        lambda content: content.replace(b"4096", b"0"),
        lambda content: b"[" * 100_000,
        lambda content: b"",
    ],
)
async def test_a_damaged_superblock_empties_the_tier(tier: Path, damage: object) -> None:
    """A superblock that cannot be decoded empties the tier, and the engine starts."""
    path = tier / "superblock.flexkv"
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    assert (await got(tier))[0] == 0
    await put(tier, PROMPT)
    assert (await got(tier))[0] == 16
