"""Engines that share a Mooncake Store, and what becomes of its faults."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.cli.doctor_tiers import remote_tier
from flexkv.cli.remote_store import opened
from flexkv.common.config import CacheConfig
from flexkv.common.errors import (
    BackendUnavailableError,
    ConfigError,
    CorruptBlockError,
    MissingBlockError,
    RemoteError,
)
from flexkv.common.terms import Tier
from flexkv.io.remote.mooncake import MooncakeStore
from flexkv.io.remote.open import join_pool, open_mooncake
from flexkv.io.remote.options import RemoteOptions
from flexkv.mover.installed import check_installed
from flexkv.mover.life import END_S
from flexkv.mover.serving import LEAVE_S
from flexkv.mover.window import Slot
from flexkv.process.background import NICE_MAX, NICER_BY
from flexkv.process.polling import is_readable
from tests.mooncake import Mooncake, running
from tests.remote_rigs import MOONCAKE_OBJECT_BYTES, POOL, SPAN_BLOCKS, PortRig, rig_over, span_key
from tests.system.test_remote import SPAN, WHOLE, Node

G = SPAN_BLOCKS
PATIENCE_S = 60.0


@pytest.fixture
def remote(tmp_path: Path, mooncake: Mooncake) -> dict[str, Any]:
    """Return the keys of an engine whose pool nobody else uses."""
    return {
        "enable_remote": False,
        "use_mooncake_store_backend": True,
        "mooncake_store_config_path": mooncake.file(tmp_path),
        "key_secret": secrets.token_hex(16),
    }


async def test_what_one_engine_stores_another_loads(remote: dict[str, Any]) -> None:
    """A later engine asks for what it does not know: its first get loads all whole spans."""
    async with Node(remote) as first:
        await first.until(lambda store: store.is_joined)
        await first.put(1)
        written = first.manager.statistics().routes["host→remote"]
        assert (written.blocks, written.failed_ops) == (WHOLE, 0)
    async with Node(remote) as second:
        await second.until(lambda store: store.is_joined)
        assert second.store.known_spans == 0
        assert await second.get(1) == WHOLE
        assert await second.get(2) == 0
        await second.manager.flush()
        statistics = second.manager.statistics()
        assert statistics.hit_blocks["remote"] == WHOLE
        assert "host→remote" not in statistics.routes
        assert second.store.requests.requests["get"] == WHOLE // SPAN
        assert second.store.requests.requests["exist"] == 2
        assert second.store.where.startswith("mooncake://127.0.0.1:")


async def test_what_was_cleared_does_not_come_back(remote: dict[str, Any]) -> None:
    """A clear begins a generation, which later engines join; the clearing one goes on storing."""
    async with Node(remote) as first:
        await first.put(1)
        first.manager.clear()
        assert await first.get(1) == 0
        await first.put(2)
        assert first.store.generation == 1
    async with Node(remote) as second:
        await second.until(lambda store: store.is_joined)
        assert second.store.generation == 1
        assert await second.get(1) == 0
        assert await second.get(2) == WHOLE


async def test_a_store_that_was_restarted_empty_is_used_again(
    remote: dict[str, Any], tmp_path: Path
) -> None:
    """What is gone is not loaded, all its hints go at once, and the store takes blocks again."""
    with running() as own:
        remote["mooncake_store_config_path"] = own.file(tmp_path)
        async with Node(remote) as node:
            await node.put(1)
            assert node.store.known_spans == WHOLE // SPAN
            own.restart()
            node.manager.clear(Tier.HOST)
            await node.until_gets(1, 0)
            await node.until(lambda store: store.known_spans == 0)
            await node.until_stores(2)


# -- faults, over the port ------------------------------------------------------------------------


class Rigged:
    """A port over a store of its own, whose processes a test may stop and kill."""

    def __init__(self, own: Mooncake, rig: PortRig) -> None:
        self.own, self.rig = own, rig
        store = rig.requests.store
        assert isinstance(store, MooncakeStore)
        self.store = store

    @property
    def pid(self) -> int:
        """Return the process id of the mover."""
        return self.store.mover.life().pid

    async def until_right(self) -> None:
        """Get the first span, again and again, until it comes."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                (end,) = await self.rig.run(self.rig.get(0, G))
                if end.error is None:
                    assert all(self.rig.right(0, G))
                    return
                assert isinstance(end.error, RemoteError)
                await asyncio.sleep(self.store.mover.pause_s)


@pytest.fixture
def own() -> Iterator[Mooncake]:
    """Yield a store of this test's own."""
    with running(64 << 20) as store:
        yield store


@pytest.fixture
async def rigged(own: Mooncake, tmp_path: Path) -> AsyncIterator[Rigged]:
    """Yield a port with a short deadline, over a store that has a span."""
    options = RemoteOptions(deadline_s=4.0, retries=0)
    store = open_mooncake(own.file(tmp_path), options, MOONCAKE_OBJECT_BYTES)
    await join_pool(store, POOL)
    async with rig_over(store, options) as rig:
        await rig.store_spans(0)
        yield Rigged(own, rig)


_BEGUN = """
import sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", sys.argv[1])
print(store.batch_put_session_start([sys.argv[2]], [1000]), flush=True)
sys.stdin.read()
"""


@contextmanager
def begun_elsewhere(own: Mooncake, name: str) -> Iterator[None]:
    """Have another client begin to put an object."""
    with subprocess.Popen(
        [sys.executable, "-c", _BEGUN, own.address, name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as client:  # fmt: skip
        assert client.stdout is not None
        assert client.stdout.readline() == b"[0]\n"
        yield
        client.kill()


def stopped(pid: int, undo: ExitStack) -> None:
    """Stop a process until the test ends."""
    os.kill(pid, signal.SIGSTOP)
    undo.callback(os.kill, pid, signal.SIGCONT)


async def test_a_master_that_is_killed_blames_the_tier(rigged: Rigged) -> None:
    """Gets and puts fail, and the breaker learns it; the store is used again once it is back."""
    rigged.own.kill_master()
    await rigged.rig.fill(*((G + each, 20 + each) for each in range(G)))
    get, put = await rigged.rig.run(rigged.rig.get(0, G), rigged.rig.put(1, at=20))
    for end in (get, put):
        assert isinstance(end.error, RemoteError)
        assert end.error.blames_tier
    rigged.own.restart()
    async with asyncio.timeout(PATIENCE_S):
        while not isinstance(end.error, MissingBlockError):
            (end,) = await rigged.rig.run(rigged.rig.get(0, G))
        while put.error is not None:
            (put,) = await rigged.rig.run(rigged.rig.put(1, at=20))


@pytest.mark.parametrize("is_inbound", [True, False])
async def test_a_mover_that_is_killed_fails_its_requests_at_once(
    rigged: Rigged, is_inbound: bool
) -> None:
    """What is on its way fails when the mover dies, nothing arrives later, and a new one works."""
    rig, pid = rigged.rig, rigged.pid
    with ExitStack() as undo:
        stopped(rigged.own.memory.pid, undo)  # so that the request is on its way
        if not is_inbound:
            await rig.fill(*((G + each, 20 + each) for each in range(G)))
        rig.arena.array[:G] = 0xEE
        rig.port.submit(rig.get(0, G) if is_inbound else rig.put(1, at=20))
        async with asyncio.timeout(PATIENCE_S):
            while not rigged.store.mover.life().requests:  # noqa: ASYNC110 -- another's state
                await asyncio.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        (end,) = await rig.ended(1)
    assert isinstance(end.error, RemoteError)
    assert "its process has ended" in str(end.error)
    assert (rig.arena.array[:G] == 0xEE).all()
    await rigged.until_right()
    assert rigged.pid != pid
    await rig.fill(*((G + each, 20 + each) for each in range(G)))
    async with asyncio.timeout(PATIENCE_S):
        while (await rig.run(rig.put(1, at=20)))[0].error is not None:
            pass
    (end,) = await rig.run(rig.get(G, 2 * G))
    assert end.error is None  # what is said to be stored is there


async def test_a_put_beside_one_that_has_not_ended_fails(rigged: Rigged) -> None:
    """The span is not reported as stored, since the other put may fail; no tier is blamed."""
    rig = rigged.rig
    await rig.fill(*((G + each, 20 + each) for each in range(G)))
    name = rigged.store.prefix + POOL.object_name(span_key(1))
    with begun_elsewhere(rigged.own, name):
        (end,) = await rig.run(rig.put(1, at=20))
    assert isinstance(end.error, RemoteError)
    assert "has not ended" in str(end.error)
    assert not end.error.blames_tier
    assert ("noted", span_key(1)) not in rig.news


async def test_a_mover_that_hangs_is_killed_at_the_deadline(rigged: Rigged) -> None:
    """The transfer ends in time, the mover with it, and a new one works."""
    pid = rigged.pid
    os.kill(pid, signal.SIGSTOP)
    (end,) = await rigged.rig.run(rigged.rig.get(0, G))
    assert isinstance(end.error, RemoteError)
    await rigged.until_right()
    assert rigged.pid != pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_byte_that_changes_in_the_window_is_found_out(
    rigged: Rigged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block whose bytes change after Mooncake has reported success is not filled."""
    whole = Slot.body

    def damaged(slot: Slot, first: int, last: int) -> NDArray[np.uint8]:
        body = whole(slot, first, last)
        body[2 * (last - first) // G + 5] ^= 1
        return body

    with monkeypatch.context() as patch:
        patch.setattr(Slot, "body", damaged)
        (end,) = await rigged.rig.run(rigged.rig.get(0, G))
    assert isinstance(end.error, CorruptBlockError)
    assert end.filled == 2
    assert all(rigged.rig.right(0, 2))


async def test_a_full_store_asks_for_fewer_puts(own: Mooncake, tmp_path: Path) -> None:
    """An object that the master has no room for is refused as busy: the puts slow down."""
    options = RemoteOptions(deadline_s=4.0, retries=0)
    store = open_mooncake(own.file(tmp_path), options, 80 << 20)
    try:
        with pytest.raises(RemoteError) as refused:
            await store.put("too large", [bytes(65 << 20)])
        assert refused.value.is_busy
    finally:
        store.close()


async def test_the_mover_yields_to_its_engine(rigged: Rigged) -> None:
    """A busy mover takes no CPU from the engine: its nice value is higher."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, rigged.pid) == min(NICE_MAX, own + NICER_BY)


async def test_the_mover_ends_with_its_engine(rigged: Rigged) -> None:
    """When the engine has closed its store, the mover is gone."""
    pid = rigged.pid
    rigged.store.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


_ENGINE = """
import asyncio, sys
from flexkv.io.remote.open import open_mooncake
from flexkv.io.remote.options import RemoteOptions

async def main():
    store = open_mooncake(sys.argv[1], RemoteOptions(), 1 << 20)
    await store.put("name", [b"content"])
    print(store.mover.life().pid, flush=True)
    await asyncio.sleep(1e6)

asyncio.run(main())
"""


def test_the_mover_of_an_engine_that_is_killed_ends(tmp_path: Path, mooncake: Mooncake) -> None:
    """An engine that could not close anything leaves no mover behind."""
    command = [sys.executable, "-c", _ENGINE, mooncake.file(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as engine:
        assert engine.stdout is not None
        mover = os.pidfd_open(int(engine.stdout.readline()))
        try:
            assert not is_readable(mover)
            engine.kill()
            assert is_readable(mover, PATIENCE_S)
        finally:
            os.close(mover)


def test_doctor_tries_the_store(tmp_path: Path, mooncake: Mooncake) -> None:
    """`flexkv doctor` says how fast the store is; commands that list stores refuse it."""
    cache = CacheConfig(
        use_mooncake_store_backend=True, mooncake_store_config_path=mooncake.file(tmp_path)
    )
    (finding,) = remote_tier(cache)
    assert finding.good
    assert mooncake.address in finding.found
    with pytest.raises(ConfigError, match="has no listing"):
        opened(cache)


async def test_doctor_adds_no_memory(tmp_path: Path) -> None:
    """A command lends the store no memory that is gone with all its objects when it ends."""
    with running(0) as empty:
        path = empty.file(tmp_path, global_segment_size="64MB")
        cache = CacheConfig(use_mooncake_store_backend=True, mooncake_store_config_path=path)
        store = opened(cache, lists=False).store
        try:
            with pytest.raises(RemoteError, match="has no room"):
                await store.put("name", [b"content"])
        finally:
            store.close()


def test_the_example_shares_a_store(tmp_path: Path, mooncake: Mooncake) -> None:
    """The example of shared stores runs over Mooncake."""
    example = Path(__file__).parents[2] / "examples/shared_store.py"
    command = [sys.executable, str(example), f"mooncake:{mooncake.file(tmp_path)}"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.endswith("every byte is there\n")


async def test_what_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, mooncake: Mooncake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Mooncake, or a library or module that it needs, the error says what is missing."""
    for number, (broken, match) in enumerate((
        ("raise ModuleNotFoundError(\"No module named 'mooncake'\")", r"flexkv\[mooncake\]"),
        ("raise ImportError('libibverbs.so.1: cannot open shared object file')", "libibverbs1"),
        ("import none_such", "cannot be loaded: No module named 'none_such'"),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        (folder / "mooncake").mkdir(parents=True)
        (folder / "mooncake/__init__.py").write_text(broken)
        monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")
        check_installed.cache_clear()
        with pytest.raises(BackendUnavailableError, match=match):
            open_mooncake(mooncake.file(tmp_path), RemoteOptions(), 1 << 20)
    check_installed.cache_clear()


async def test_the_working_directory_has_nothing_that_a_mover_imports(
    tmp_path: Path, mooncake: Mooncake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules in the directory where the engine was started take the place of no others."""
    for name in ("msgspec", "mooncake", "flexkv"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('from the working directory')")
    monkeypatch.chdir(tmp_path)
    check_installed.cache_clear()
    store = open_mooncake(mooncake.file(tmp_path), RemoteOptions(), 1 << 20)
    try:
        assert await store.put(secrets.token_hex(8), [b"content"])
    finally:
        store.close()


def test_a_mover_has_time_to_leave() -> None:
    """An engine waits longer for its mover than the mover takes to leave the store."""
    assert END_S > LEAVE_S
