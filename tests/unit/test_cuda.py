"""The CUDA device without a GPU: errors, ids, registration, measurement and order of copies."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.actors.actor import TransferActor, Window
from flexkv.actors.checks import BlockChecks
from flexkv.common.errors import BackendUnavailableError, ConfigError, DeviceError
from flexkv.common.layout import KVShape, infer_layout
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.checksums.sums import PoolChecksummer
from flexkv.io.cuda.choice import CopyMethod, CopyPreference
from flexkv.io.cuda.copy_stream import IDS_MAX
from flexkv.io.cuda.driver import BoundDriver
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.cuda.port import CudaDevicePort
from flexkv.io.device.tensors import describe
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Completion
from flexkv.testing.fake_cuda import FakeCuda

BLOCKS = 16
SHAPE = KVShape(4, 2, 8, 1, item_bytes=2)
TO = {True: Route(Tier.DEVICE, Tier.HOST), False: Route(Tier.HOST, Tier.DEVICE)}


class Rig:
    """A port over the fake driver, connected to the running loop."""

    def __init__(self, choice: CopyPreference) -> None:
        self.layers = [np.zeros((BLOCKS, 4, 2, 8), np.int16) for _ in range(2)]
        layout = infer_layout([describe(layer) for layer in self.layers], [SHAPE])
        self.block_bytes = layout.block_bytes
        self.driver = FakeCuda(self.layers)
        self.arena = Arena.open(BLOCKS, 4096)
        self.port = CudaDevicePort(
            [layout], Pinned(self.arena), self.layers, self.driver, (choice, choice)
        )
        self.woken = asyncio.Event()
        self.port.connect(self.woken.set)

    def submit(self, op_id: int, to_host: bool = True, blocks: int = BLOCKS) -> None:
        """Start a transfer of the first blocks."""
        ids = np.arange(blocks)
        self.port.submit(Transfer(op_id, 1, TO[to_host], ids, ids))

    async def reap(self, count: int) -> list[Completion]:
        """Wait for `count` completions, and return them."""
        ended = self.port.reap()
        async with asyncio.timeout(10):
            while len(ended) < count:
                await self.woken.wait()
                self.woken.clear()
                ended += self.port.reap()
        return ended

    def close(self) -> None:
        """Close the port, and check that it released everything."""
        self.port.close()
        self.arena.close()
        assert self.driver.left == 0


ENGINE, KERNEL = CopyPreference(use_engine=True), CopyPreference(use_engine=False, thread_blocks=4)
every_way = pytest.mark.parametrize("choice", [ENGINE, KERNEL], ids=["engine", "kernel"])


@every_way
async def test_a_call_that_is_refused_fails_its_own_transfer(choice: CopyPreference) -> None:
    """A refused driver call fails its own transfer only, in order, with call and code."""
    rig = Rig(choice)
    rig.submit(1)
    rig.driver.refuses = {"cuMemcpyBatchAsync": 1, "cuLaunchKernel": 1}
    rig.submit(2)
    rig.driver.refuses = {}
    rig.submit(3)
    ended = await rig.reap(3)
    assert [(op_id, error is None) for op_id, error, *_ in ended] == [
        (1, True),
        (2, False),
        (3, True),
    ]
    error = ended[1].error
    assert isinstance(error, DeviceError)
    assert (error.call.startswith("cu"), error.code) == (True, 1)
    assert rig.port.failure is None
    rig.close()


@every_way
async def test_a_device_that_breaks_fails_all_that_is_under_way(
    choice: CopyPreference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken device fails all transfers under way, and later ones at once.

    The driver makes no callback then, so the port checks the streams.
    """
    monkeypatch.setattr("flexkv.io.cuda.port.CHECK_S", 0.01)
    rig = Rig(choice)
    rig.driver.broken = 719
    with pytest.MonkeyPatch.context() as patch:  # the device breaks after the work was queued
        patch.setattr(rig.driver, "_call", lambda name: None)
        rig.submit(1)
        rig.submit(2, to_host=False)
    assert {
        (c.op_id, c.error.code) for c in await rig.reap(2) if isinstance(c.error, DeviceError)
    } == {
        (1, 719),
        (2, 719),
    }
    rig.submit(3)
    ((op_id, error, _),) = await rig.reap(1)
    assert op_id == 3
    assert error is rig.port.failure
    rig.close()


async def test_a_device_that_cannot_tell_of_an_end_is_waited_for() -> None:
    """If the callback of an end is refused, the port waits for the stream; nothing ends early."""
    rig = Rig(ENGINE)
    rig.driver.takes_s = {"cuMemcpyBatchAsync": 3.0}
    rig.layers[0][:] = 5
    rig.submit(1, to_host=False, blocks=1)
    rig.driver.takes_s = {"cuMemcpyBatchAsync": 0.3}  # ends long before the first one
    rig.driver.refuses = {"cuLaunchHostFunc": 900}
    rig.submit(2)
    assert [(c.op_id, c.error) for c in rig.port.reap()] == [(2, None)]
    assert (rig.arena.array[1:, : rig.block_bytes // 2].view(np.int16) == 5).all()
    rig.driver.refuses = {}
    assert [c.op_id for c in await rig.reap(1)] == [1]
    assert rig.port.failure is None
    rig.close()


async def test_a_broken_device_leaves_the_loop_alone() -> None:
    """A broken device's unread eventfd does not wake the loop again and again."""
    rig = Rig(ENGINE)
    rig.submit(1)
    rig.driver.synchronize(rig.port._streams[0].stream)
    rig.driver.broken = 719
    rig.submit(2)
    assert {c.op_id for c in await rig.reap(2)} == {1, 2}
    woken = []
    rig.port._wake = lambda: woken.append(None)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not woken
    rig.close()


async def test_a_measurement_that_fails_leaves_nothing_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A measurement that fails ends before its memory is released."""
    monkeypatch.setattr("flexkv.io.cuda.copier.MEASURED_S_MAX", 0.01)
    layers = [np.zeros((BLOCKS, 4, 2, 8), np.int16)]
    layout = infer_layout([describe(layers[0])], [SHAPE])
    driver, arena = FakeCuda(layers), Arena.open(BLOCKS, 4096)
    driver.takes_s = {"cuMemcpyBatchAsync": 0.2}
    with pytest.raises(DeviceError, match="a measurement copy"):
        CudaDevicePort([layout], Pinned(arena), layers, driver)
    assert (driver.left, driver.broken) == (0, None)
    arena.close()


async def test_an_open_that_is_refused_leaves_nothing() -> None:
    """Whichever driver call fails during open, nothing stays allocated or open."""
    rig = Rig(ENGINE)
    rig.close()
    opening = dict.fromkeys(rig.driver.calls[: rig.driver.calls.index("cuStreamDestroy")])
    for call in opening:
        layers = [np.zeros((BLOCKS, 4, 2, 8), np.int16)]
        layout = infer_layout([describe(layers[0])], [SHAPE])
        driver, arena = FakeCuda(layers), Arena.open(BLOCKS, 4096)
        before = len(os.listdir("/proc/self/fd"))
        driver.refuses = {call: 3}
        with pytest.raises(DeviceError, match=f"{call} failed with code 3"):
            CudaDevicePort([layout], Pinned(arena), layers, driver)
        assert driver.left == 0
        assert len(os.listdir("/proc/self/fd")) == before
        arena.close()


async def test_ids_of_many_launches_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch's ids stay until it has run; without room for more, the copy engine copies."""
    monkeypatch.setattr("flexkv.io.cuda.copy_stream.IDS_MAX", 100)
    rig = Rig(KERNEL)
    random = np.random.default_rng(0)
    for round_number in range(30):
        for layer in rig.layers:
            layer[:] = random.integers(0, 1000, layer.shape)
        for op_id in range(6):
            rig.submit(10 * round_number + op_id, blocks=BLOCKS - (op_id * 7) % BLOCKS)
        await rig.reap(6)
        host = rig.arena.array[:, : rig.block_bytes].view(np.int16)
        assert np.array_equal(host[:, :64], rig.layers[0].reshape(BLOCKS, -1))
    assert {"cuLaunchKernel", "cuMemcpyBatchAsync"} <= set(rig.driver.calls)
    assert IDS_MAX > 100
    rig.close()


async def test_an_arena_is_registered_in_parts_where_it_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An arena may be registered in parts; no copy spans two, which would break the fake."""
    layer = np.arange(BLOCKS * 256, dtype=np.int64).view(np.int16).reshape(BLOCKS, 4, 2, 128)
    layout = infer_layout([describe(layer)], [SHAPE._replace(head_size=128)])
    driver, arena = FakeCuda([layer]), Arena.open(BLOCKS, layout.block_bytes)
    driver.registers_at_most = 5 * layout.block_bytes
    monkeypatch.setattr("flexkv.io.cuda.copy_stream.IDS_MAX", 16)
    port = CudaDevicePort([layout], Pinned(arena), layer, driver, (ENGINE, ENGINE))
    assert driver.calls.count("cuMemHostRegister") >= 4 + 2
    woken = asyncio.Event()
    port.connect(woken.set)
    ids = np.arange(BLOCKS)
    port.submit(Transfer(1, 1, TO[True], ids, ids))
    assert await reaped(port, woken) == [Completion(1, None)]
    assert np.array_equal(arena.array.ravel(), layer.reshape(-1).view(np.uint8))
    port.close()
    assert driver.left == 0
    driver.registers_at_most = 100
    with pytest.raises(ConfigError, match="ulimit -l"):
        CudaDevicePort([layout], Pinned(arena), layer, driver)
    assert driver.left == 0
    arena.close()


async def reaped(port: Any, woken: asyncio.Event) -> list[Any]:
    """Wait for the next completions, and return them."""
    async with asyncio.timeout(10):
        while not (ended := port.reap()):
            await woken.wait()
            woken.clear()
    return list(ended)


async def test_what_a_device_brings_is_summed() -> None:
    """The checksums of blocks from the device are those that a checksummer computes afterwards."""
    rig = Rig(ENGINE)
    for layer in rig.layers:
        layer[:] = np.random.default_rng(1).integers(0, 1000, layer.shape)
    sizes = [rig.block_bytes]
    checksummer = PoolChecksummer(rig.arena, block_bytes=sizes)
    checks = BlockChecks(PoolChecksummer(rig.arena, 1, checksummer.sums, sizes))
    window, ended, over = Window(1 << 30, 1 << 30), list[Completion](), asyncio.Event()

    def report(ends: list[Completion]) -> None:
        ended.extend(ends)
        over.set()

    actor = TransferActor(Tier.DEVICE, rig.port, (window, window), 1, sizes, checks)
    actor.attach(report)
    checksummer.connect(rig.woken.set)
    ids = np.arange(BLOCKS)
    actor.post(Transfer(1, 1, TO[True], ids, ids))
    running = asyncio.create_task(actor.run())
    async with asyncio.timeout(10):
        await over.wait()
    running.cancel()
    assert ended == [Completion(1, None)]
    found = checksummer.sums.copy()
    checksummer.submit(2, ids, urgent=True)
    assert await reaped(checksummer, rig.woken) == [2]
    assert found.all()
    assert np.array_equal(checksummer.sums, found)
    checksummer.close()
    actor.close()
    checks.checksummer.close()
    rig.close()


async def test_what_is_faster_is_measured_and_the_device_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The faster of engine and kernel is chosen by measuring, and no byte changes meanwhile."""
    monkeypatch.setattr("flexkv.io.cuda.copier.MEASURED_BYTES", 8192)
    for slow, by_engine in (("cuMemcpyBatchAsync", False), ("cuLaunchKernel", True)):
        layers = [
            np.random.default_rng(n).integers(0, 99, (BLOCKS, 4, 2, 8), np.int16) for n in range(2)
        ]
        before = [layer.copy() for layer in layers]
        layout = infer_layout([describe(layer) for layer in layers], [SHAPE])
        arena, driver = Arena.open(BLOCKS, 4096), FakeCuda(layers, delay_max_s=0.0)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / slow))
        driver.takes_s = {slow: 0.02}
        port = CudaDevicePort([layout], Pinned(arena), layers, driver)
        assert [c.of(1 << 20).method is CopyMethod.ENGINE for c in port.choices.values()] == [
            by_engine
        ] * 2
        assert all(np.array_equal(*pair) for pair in zip(layers, before, strict=True))
        assert not arena.array.any()
        port.close()
        arena.close()
        assert driver.left == 0


async def test_a_put_reads_what_the_engine_has_written() -> None:
    """Copies to the host wait for work on the engine's stream; copies to the device do not."""
    rig = Rig(ENGINE)
    stream = rig.driver.open_stream(urgent=False)
    written = threading.Event()

    def write() -> None:
        written.wait(10)
        for layer in rig.layers:
            layer[:] = 7

    rig.driver._streams[stream].work.put(write)
    rig.driver.current = stream
    rig.port.order_after(to_device=False)
    rig.submit(1)
    rig.submit(2, to_host=False)
    assert [c.op_id for c in await rig.reap(1)] == [2]
    written.set()
    assert [c.op_id for c in await rig.reap(1)] == [1]
    assert (rig.arena.array[:, : rig.block_bytes].view(np.int16) == 7).all()
    rig.driver.close_stream(stream)
    rig.close()


async def test_a_device_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement is kept and reused by the next port; a damaged one is measured anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("flexkv.io.cuda.copier.MEASURED_BYTES", 8192)
    calls = []
    for damaged in (False, False, True):
        layers = [np.zeros((BLOCKS, 4, 2, 8), np.int16)]
        layout = infer_layout([describe(layers[0])], [SHAPE])
        driver, arena = FakeCuda(layers, delay_max_s=0.0), Arena.open(BLOCKS, 4096)
        if damaged:
            next((tmp_path / "flexkv").glob("choices-*")).write_bytes(b"[[")
        port = CudaDevicePort([layout], Pinned(arena), layers, driver)
        calls.append(driver.calls.count("cuMemcpyBatchAsync") > 0)
        port.close()
        arena.close()
    assert calls == [True, False, True]


async def test_devices_of_one_process_register_the_arena_once() -> None:
    """The first device of a process registers the arena, and the last one unregisters it."""
    registered: dict[int, int] = {}
    arena = Arena.open(BLOCKS, 4096)
    pinned, ports = Pinned(arena), []
    for _ in range(3):
        layers = [np.zeros((BLOCKS, 4, 2, 8), np.int16)]
        layout = infer_layout([describe(layers[0])], [SHAPE])
        driver = FakeCuda(layers, registered=registered)
        ports.append(CudaDevicePort([layout], pinned, layers, driver, (ENGINE, ENGINE)))
    for port in ports:
        assert arena.address in registered
        port.close()
    assert not registered
    arena.close()


def test_without_a_driver_the_device_is_not_available() -> None:
    """Without a CUDA driver, opening a device raises BackendUnavailableError."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a driver")
    with pytest.raises(BackendUnavailableError, match="cuda"):
        BoundDriver(0)
