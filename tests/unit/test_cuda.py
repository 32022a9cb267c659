"""The CUDA device without a GPU: errors, ids, the kernel's arithmetic, its compilation."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flexkv._ext import TO_DEVICE, TO_HOST, PageMap, list_runs, notify_address
from flexkv.common.errors import BackendUnavailableError, ConfigError, DeviceError
from flexkv.common.layout import KVShape, infer_layout
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.arena import Arena
from flexkv.io.cuda import kernel
from flexkv.io.cuda.choice import Choice, How, Wish, decide
from flexkv.io.cuda.driver import BoundDriver
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.cuda.port import CudaDevicePort
from flexkv.io.cuda.way import IDS_MAX
from flexkv.io.ports import Completion
from flexkv.io.summed import SummedPort
from flexkv.io.sums import PoolSummer
from flexkv.io.tensors import describe
from flexkv.testing.fake_cuda import FakeCuda

BLOCKS = 16
SHAPE = KVShape(4, 2, 8, 1, item_bytes=2)
TO = {True: Route(Tier.DEVICE, Tier.HOST), False: Route(Tier.HOST, Tier.DEVICE)}


class Rig:
    """A port over the fake driver, connected to the running loop."""

    def __init__(self, choice: Wish) -> None:
        self.layers = [np.zeros((BLOCKS, 4, 2, 8), np.int16) for _ in range(2)]
        layout = infer_layout([describe(layer) for layer in self.layers], [SHAPE])
        self.driver = FakeCuda(self.layers)
        self.arena = Arena.open(BLOCKS, 4096)
        self.port = CudaDevicePort(
            layout, Pinned(self.arena), self.layers, self.driver, (choice, choice)
        )
        self.woken = asyncio.Event()
        self.port.connect(self.woken.set)

    def submit(self, token: int, to_host: bool = True, blocks: int = BLOCKS) -> None:
        """Start a transfer of the first blocks."""
        ids = np.arange(blocks)
        self.port.submit(Transfer(token, 1, TO[to_host], ids, ids))

    async def reap(self, count: int) -> list[Completion]:
        """Give so many completions."""
        ended = self.port.reap()
        async with asyncio.timeout(10):
            while len(ended) < count:
                await self.woken.wait()
                self.woken.clear()
                ended += self.port.reap()
        return ended

    def close(self) -> None:
        """Close the port, and check that it let go of everything."""
        self.port.close()
        self.arena.close()
        assert self.driver.left == 0


ENGINE, KERNEL = Wish(use_engine=True), Wish(use_engine=False, thread_blocks=4)
every_way = pytest.mark.parametrize("choice", [ENGINE, KERNEL], ids=["engine", "kernel"])


@every_way
async def test_a_call_that_is_refused_fails_its_own_transfer(choice: Wish) -> None:
    """Those before and after it are whole; it ends in its turn, with call and code."""
    rig = Rig(choice)
    rig.submit(1)
    rig.driver.refuses = {"cuMemcpyBatchAsync": 1, "cuLaunchKernel": 1}
    rig.submit(2)
    rig.driver.refuses = {}
    rig.submit(3)
    ended = await rig.reap(3)
    assert [(token, error is None) for token, error in ended] == [(1, True), (2, False), (3, True)]
    error = ended[1].error
    assert isinstance(error, DeviceError)
    assert (error.call.startswith("cu"), error.code) == (True, 1)
    assert rig.port.failure is None
    rig.close()


@every_way
async def test_a_device_that_breaks_fails_all_that_is_under_way(
    choice: Wish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver does not call back then: the port asks. What comes later fails at once."""
    monkeypatch.setattr("flexkv.io.cuda.port.CHECK_S", 0.01)
    rig = Rig(choice)
    rig.driver.broken = 719
    with pytest.MonkeyPatch.context() as patch:  # it breaks after the work was queued
        patch.setattr(rig.driver, "_call", lambda name: None)
        rig.submit(1)
        rig.submit(2, to_host=False)
    assert {
        (c.token, c.error.code) for c in await rig.reap(2) if isinstance(c.error, DeviceError)
    } == {
        (1, 719),
        (2, 719),
    }
    rig.submit(3)
    ((token, error),) = await rig.reap(1)
    assert token == 3
    assert error is rig.port.failure
    rig.close()


async def test_a_device_that_cannot_tell_of_an_end_is_waited_for() -> None:
    """Nothing is told to have ended while it is copied, on either stream."""
    rig = Rig(ENGINE)
    rig.driver.takes_s = {"cuMemcpyBatchAsync": 0.1}
    rig.layers[0][:] = 5
    rig.submit(1, to_host=False, blocks=1)
    rig.driver.refuses = {"cuLaunchHostFunc": 900}
    rig.submit(2)
    assert [(c.token, c.error) for c in rig.port.reap()] == [(2, None)]
    assert (rig.arena.array[1:, : rig.port.block_bytes // 2].view(np.int16) == 5).all()
    rig.driver.refuses = {}
    assert [c.token for c in await rig.reap(1)] == [1]
    assert rig.port.failure is None
    rig.close()


async def test_a_broken_device_leaves_the_loop_alone() -> None:
    """What it told before is read by nobody: the loop is not woken by it for ever."""
    rig = Rig(ENGINE)
    rig.submit(1)
    rig.driver.synchronize(rig.port._ways[0].stream)
    rig.driver.broken = 719
    rig.submit(2)
    assert {c.token for c in await rig.reap(2)} == {1, 2}
    woken = []
    rig.port._wake = lambda: woken.append(None)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not woken
    rig.close()


async def test_a_measurement_that_fails_leaves_nothing_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device is done with the memory before it goes."""
    monkeypatch.setattr("flexkv.io.cuda.copier.MEASURED_S_MAX", 0.01)
    layers = [np.zeros((BLOCKS, 4, 2, 8), np.int16)]
    layout = infer_layout([describe(layers[0])], [SHAPE])
    driver, arena = FakeCuda(layers), Arena.open(BLOCKS, 4096)
    driver.takes_s = {"cuMemcpyBatchAsync": 0.2}
    with pytest.raises(DeviceError, match="measures"):
        CudaDevicePort(layout, Pinned(arena), layers, driver)
    assert (driver.left, driver.broken) == (0, None)
    arena.close()


async def test_an_open_that_is_refused_leaves_nothing() -> None:
    """Whatever call it is that fails."""
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
            CudaDevicePort(layout, Pinned(arena), layers, driver)
        assert driver.left == 0
        assert len(os.listdir("/proc/self/fd")) == before
        arena.close()


async def test_ids_of_many_launches_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch's ids stay until it has run; where there is no room the copy engine does it."""
    monkeypatch.setattr("flexkv.io.cuda.way.IDS_MAX", 100)
    rig = Rig(KERNEL)
    random = np.random.default_rng(0)
    for round_number in range(30):
        for layer in rig.layers:
            layer[:] = random.integers(0, 1000, layer.shape)
        for token in range(6):
            rig.submit(10 * round_number + token, blocks=BLOCKS - (token * 7) % BLOCKS)
        await rig.reap(6)
        host = rig.arena.array[:, : rig.port.block_bytes].view(np.int16)
        assert np.array_equal(host[:, :64], rig.layers[0].reshape(BLOCKS, -1))
    assert {"cuLaunchKernel", "cuMemcpyBatchAsync"} <= set(rig.driver.calls)
    assert IDS_MAX > 100
    rig.close()


async def test_an_arena_is_registered_in_parts_where_it_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No copy spans two of them: the fake device would break."""
    layer = np.arange(BLOCKS * 256, dtype=np.int64).view(np.int16).reshape(BLOCKS, 4, 2, 128)
    layout = infer_layout([describe(layer)], [SHAPE._replace(head_size=128)])
    driver, arena = FakeCuda([layer]), Arena.open(BLOCKS, layout.block_bytes)
    driver.registers_at_most = 5 * layout.block_bytes
    monkeypatch.setattr("flexkv.io.cuda.way.IDS_MAX", 16)
    port = CudaDevicePort(layout, Pinned(arena), layer, driver, (ENGINE, ENGINE))
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
        CudaDevicePort(layout, Pinned(arena), layer, driver)
    assert driver.left == 0
    arena.close()


async def reaped(port: Any, woken: asyncio.Event) -> list[Any]:
    """Give what ends next."""
    async with asyncio.timeout(10):
        while not (ended := port.reap()):
            await woken.wait()
            woken.clear()
    return list(ended)


async def test_what_a_device_brings_is_summed() -> None:
    """As a summer would find it."""
    rig = Rig(ENGINE)
    for layer in rig.layers:
        layer[:] = np.random.default_rng(1).integers(0, 1000, layer.shape)
    summer = PoolSummer(rig.arena)
    port = SummedPort(rig.port, PoolSummer(rig.arena, 1, summer.sums))
    for each in (port, summer):
        each.connect(rig.woken.set)
    ids = np.arange(BLOCKS)
    port.submit(Transfer(1, 1, TO[True], ids, ids))
    assert await reaped(port, rig.woken) == [Completion(1, None)]
    found = summer.sums.copy()
    summer.submit(2, ids, urgent=True)
    assert await reaped(summer, rig.woken) == [2]
    assert found.all()
    assert np.array_equal(summer.sums, found)
    summer.close()
    port.close()
    rig.close()


async def test_what_is_faster_is_measured_and_the_device_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A device whose engine is slow gets kernels; the other way round the engine."""
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
        port = CudaDevicePort(layout, Pinned(arena), layers, driver)
        assert [c.of(1 << 20).how is How.ENGINE for c in port.choices.values()] == [by_engine] * 2
        assert all(np.array_equal(*pair) for pair in zip(layers, before, strict=True))
        assert not arena.array.any()
        port.close()
        arena.close()
        assert driver.left == 0


def test_the_way_that_costs_least_is_taken() -> None:
    """Of those that are as good as the best: the engine, then few thread blocks."""
    engine, staged = Choice(How.ENGINE), Choice(How.STAGED, 16)
    few, some, many = (Choice(How.KERNEL, count) for count in (2, 4, 8))
    assert decide({engine: 95.0, some: 100.0, many: 99.0}) == engine
    assert decide({engine: 90.0, few: 50.0, some: 96.0, many: 100.0}) == some
    assert decide({few: 1.0, some: 3.0, many: 3.0}) == some
    assert decide({engine: 7.0, staged: 48.0, some: 50.0}) == staged


async def test_a_put_reads_what_the_engine_has_written() -> None:
    """Copies to the host wait for what the engine's stream has queued; others do not."""
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
    assert [c.token for c in await rig.reap(1)] == [2]
    written.set()
    assert [c.token for c in await rig.reap(1)] == [1]
    assert (rig.arena.array[:, : rig.port.block_bytes].view(np.int16) == 7).all()
    rig.driver.close_stream(stream)
    rig.close()


def test_without_a_driver_the_device_is_not_available() -> None:
    """It says what to install; `import flexkv` needs none of it."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a driver")
    with pytest.raises(BackendUnavailableError, match="cuda"):
        BoundDriver(0)


# -- runs ----------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9)), max_size=12),
    st.sampled_from([TO_HOST, TO_DEVICE]),
    st.booleans(),
)
def test_runs_cover_a_job_and_are_few(
    sizes: list[int], pairs: list[tuple[int, int]], direction: int, dense: bool
) -> None:
    """Byte by byte the runs are the job's pieces; neighbours on both ends are never two runs."""
    stride = sum(sizes) + (0 if dense else 3)
    host = bytearray(10 * stride)
    host_at = np.frombuffer(host, np.uint8).ctypes.data
    offsets = [sum(sizes[:n]) for n in range(len(sizes))]
    rows = [
        (4096 * (n + 1), size, size, at)
        for n, (size, at) in enumerate(zip(sizes, offsets, strict=True))
    ]
    pages = PageMap(np.array(rows, np.int64), 8, host, stride, None)
    device_ids, host_ids = (np.array([pair[n] for pair in pairs], np.int64) for n in (0, 1))
    out = np.zeros((3, len(pairs) * len(rows) + 1), np.uint64)
    count = list_runs(pages, direction, device_ids, host_ids, out)
    found = [
        (int(target) + byte, int(source) + byte)
        for target, source, size in out[:, :count].T.tolist()
        for byte in range(size)
    ]
    expected = [
        (base + device * step + byte, host_at + block * stride + at + byte)
        for device, block in pairs
        for base, step, size, at in rows
        for byte in range(size)
    ]
    assert found == [(b, a) if direction == TO_HOST else (a, b) for a, b in expected]
    runs = out[:, :count].T.tolist()
    for (target, source, size), following in pairwise(runs):
        assert (target + size, source + size) != tuple(following[:2]), "two runs are one"


def test_runs_that_do_not_fit_are_refused() -> None:
    """Too little room, an id out of range, a buffer of another kind."""
    pages = PageMap(np.array([[4096, 8, 8, 0], [8192, 8, 8, 8]]), 4, bytearray(64), 16, None)
    ids = np.arange(2)
    with pytest.raises(ValueError, match="not three times 32"):
        list_runs(pages, TO_HOST, ids, ids, np.zeros((3, 3), np.uint64))
    with pytest.raises(ValueError, match="device_ids"):
        list_runs(pages, TO_HOST, ids + 3, ids, np.zeros((3, 4), np.uint64))
    with pytest.raises(BufferError):
        list_runs(pages, TO_HOST, ids, ids, bytes(96))


def test_a_foreign_thread_adds_to_an_eventfd() -> None:
    """What the driver calls, called as it would."""
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    notify = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(notify_address())
    for _ in range(3):
        notify(eventfd)
    assert os.eventfd_read(eventfd) == 3
    os.close(eventfd)


# -- the kernel ----------------------------------------------------------------------------------

SHIM = """
#define __global__
#define __device__
struct dim { int x; };
static dim blockIdx, gridDim, threadIdx, blockDim;
#include "paged_copy.cu"
extern "C" void run(const piece *pieces, const long long *parts, int piece_count,
                    const long long *ids, long long pairs, char *host, long long stride,
                    int to_host, int blocks, int threads)
{
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            paged_copy(pieces, parts, piece_count, ids, pairs, host, stride, to_host);
}
"""


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give the kernel, compiled for this CPU: its threads run one after the other."""
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "shim.cpp").write_text(SHIM)
    (folder / "paged_copy.cu").write_text(kernel.source())
    library = folder / "kernel.so"
    flags = [
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-Wno-unknown-pragmas",
        "-fsanitize=undefined",
    ]
    subprocess.run(["g++", *flags, "-o", library, folder / "shim.cpp"], check=True)
    return ctypes.CDLL(str(library)).run


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([1, 12, 16, 4096, 32768, 32784, 70_000]), min_size=1, max_size=4),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from([0, 1, 4]),
    st.integers(1, 5),
)
def test_the_kernel_moves_the_pieces_and_nothing_else(
    on_cpu: Any, sizes: list[int], pairs: int, to_host: bool, skew: int, thread_blocks: int
) -> None:
    """Its arithmetic, on any alignment: what numpy does, byte by byte."""
    random = np.random.default_rng(sum(sizes) + pairs)
    blocks, stride = 5, sum(sizes) + skew
    device = random.integers(0, 256, skew + blocks * sum(sizes), np.uint8)
    host = random.integers(0, 256, blocks * stride, np.uint8)
    starts = skew + blocks * np.cumsum([0, *sizes[:-1]])
    offsets = np.cumsum([0, *sizes[:-1]])
    pieces = np.stack([device.ctypes.data + starts, sizes, sizes, offsets], axis=1).astype(np.int64)
    parts = kernel.part_starts(np.array(sizes, np.int64))
    ids = np.stack([random.permutation(blocks)[:pairs], random.permutation(blocks)[:pairs]])
    expected_device, expected_host = device.copy(), host.copy()
    for device_id, host_id in ids.T.tolist():
        for start, size, offset in zip(starts.tolist(), sizes, offsets.tolist(), strict=True):
            page = slice(start + device_id * size, start + (device_id + 1) * size)
            block = slice(host_id * stride + offset, host_id * stride + offset + size)
            if to_host:
                expected_host[block] = device[page]
            else:
                expected_device[page] = host[block]

    def address(array: NDArray[np.generic]) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    flat = np.ascontiguousarray(ids, np.int64)
    on_cpu(
        address(pieces), address(parts), len(sizes), address(flat), ctypes.c_longlong(pairs),
        address(host), ctypes.c_longlong(stride), int(to_host), thread_blocks, 64,
    )  # fmt: skip
    assert np.array_equal(device, expected_device)
    assert np.array_equal(host, expected_host)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_the_kernel_compiles_and_is_kept(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NVRTC, without a GPU; the second time it is read."""
    pytest.importorskip("cuda.bindings.nvrtc")
    code = kernel.cubin(architecture, tmp_path)
    assert code.startswith(b"\x7fELF")
    monkeypatch.setattr(kernel, "_compile", None)
    assert kernel.cubin(architecture, tmp_path) == code


def test_an_architecture_that_is_unknown_is_named(tmp_path: Path) -> None:
    """Nothing is kept of it."""
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(BackendUnavailableError, match="sm_12: NVRTC_ERROR"):
        kernel.cubin("sm_12", tmp_path)
    assert not list(tmp_path.iterdir())
