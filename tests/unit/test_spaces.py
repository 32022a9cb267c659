"""Several kinds of blocks in one pool: each KV group has its own bytes, layout and identity."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from flexkv.actors.actor import TransferActor, Window
from flexkv.actors.supervisor import Supervisor
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.errors import InvariantError
from flexkv.common.layout import infer_layout
from flexkv.common.request import Operation, Request, Span
from flexkv.common.space import BlockSpace, in_one_pool
from flexkv.common.terms import Layers, Route, Tier, Transfer
from flexkv.graph.compile import compile_shape
from flexkv.graph.ops import Leg, Shape
from flexkv.graph.plan import LegFill, Plan
from flexkv.index.keys import KeyChain, block_identity, fingerprint
from flexkv.index.residency import Positions, Residency
from flexkv.io.checksums.sums import PoolChecksummer, Sums
from flexkv.io.cuda.choice import Choices, CopyMethod, CopyPreference
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.cuda.port import CudaDevicePort
from flexkv.io.device.cpu import CpuDevicePort
from flexkv.io.device.tensors import describe
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Completion, DevicePort
from flexkv.observe.observer import Observer
from flexkv.observe.records import OpRecord, SampleRecord
from flexkv.observe.tracer import Tracer
from flexkv.testing.fake_cuda import FakeCuda

TO_DEVICE, TO_HOST = Route(Tier.HOST, Tier.DEVICE), Route(Tier.DEVICE, Tier.HOST)
DEVICE_BLOCKS, HOST_BLOCKS, PER_BLOCK = 40, 96, 16
ATTENTION = ModelConfig(num_layers=3, num_kv_heads=2, head_size=16, dtype="float16")
LATENT = ModelConfig(num_layers=1, num_kv_heads=1, head_size=24, dtype="int8", use_mla=True)
SPACES = in_one_pool(*ATTENTION.spaces(PER_BLOCK), *LATENT.spaces(4 * PER_BLOCK))
MODES = ("cpu-inline", "cpu-pooled", "cuda-engine", "cuda-staged", "cuda-kernel")
ORDERS = {"group 0": [0], "group 1": [1], "mixed": [0, 1, 1, 0, 1, 0]}


class Device:
    """KV caches of both groups with random bytes, and a host pool that holds other bytes."""

    def __init__(self, with_sums: bool = False) -> None:
        random = np.random.default_rng(7)
        full, short = SPACES
        self.caches: list[list[NDArray[Any]]] = [
            [np.zeros((2, DEVICE_BLOCKS, PER_BLOCK, 2, 16), np.float16) for _ in full.shapes],
            [np.zeros((DEVICE_BLOCKS, 4 * PER_BLOCK, 24), np.int8) for _ in short.shapes],
        ]
        for layer in self.layers:
            layer.view(np.uint8)[:] = random.integers(0, 256, layer.view(np.uint8).shape, np.uint8)
        self.layouts = [
            infer_layout([describe(layer) for layer in layers], space.shapes)
            for layers, space in zip(self.caches, SPACES, strict=True)
        ]
        self.arena = Arena.open(HOST_BLOCKS, full.stride_bytes)
        self.arena.array[:] = random.integers(0, 256, self.arena.array.shape, np.uint8)
        self.sums: Sums | None = np.zeros(HOST_BLOCKS, np.uint64) if with_sums else None

    @property
    def layers(self) -> list[NDArray[Any]]:
        """Return the tensors of all groups."""
        return [layer for layers in self.caches for layer in layers]

    def blocks(self, group: int) -> NDArray[np.uint8]:
        """Return a copy of a group's blocks as they should lie in host memory."""
        full, short = self.caches
        parts = (
            [half.view(np.uint8).reshape(DEVICE_BLOCKS, -1) for layer in full for half in layer]
            if group == 0
            else [layer.view(np.uint8).reshape(DEVICE_BLOCKS, -1) for layer in short]
        )
        return np.concatenate(parts, axis=1)

    def port(self, mode: str, undo: ExitStack) -> DevicePort:
        """Return a port of a kind to both groups."""
        if mode.startswith("cpu"):
            cpu = CpuDevicePort(self.layouts, self.arena, self.layers, sums=self.sums)
            undo.callback(cpu.close)
            return cpu
        driver = FakeCuda(self.layers)
        undo.callback(lambda: _nothing_left(driver))
        preference = CopyPreference(use_engine=True)
        port = CudaDevicePort(
            self.layouts, Pinned(self.arena), self.layers, driver, (preference, preference)
        )
        undo.callback(port.close)
        for way in port._streams:
            way.choose(Choices.always(CopyMethod(mode.removeprefix("cuda-"))))
        return port


def _nothing_left(driver: FakeCuda) -> None:
    assert driver.left == 0


@pytest.fixture
def device() -> Iterator[Device]:
    """Yield a device with two groups, and close its arena afterwards."""
    device = Device(with_sums=True)
    yield device
    device.arena.close()


class Bench:
    """An actor over a port, with the ends of what was posted."""

    def __init__(self, port: DevicePort, piece_bytes: int) -> None:
        window = Window(4 * piece_bytes, piece_bytes)
        block_bytes = [space.block_bytes for space in SPACES]
        self.actor = TransferActor(Tier.DEVICE, port, (window, window), 64, block_bytes)
        self.ends: dict[int, Completion] = {}
        self._ended = asyncio.Event()

    def _report(self, ends: list[Completion]) -> None:
        self.ends |= {each.op_id: each for each in ends}
        if self.actor.is_idle():
            self._ended.set()

    async def run(self, transfers: Sequence[Transfer]) -> None:
        """Run transfers to their ends, and check that all succeeded."""
        self.actor.attach(self._report)
        supervisor = Supervisor(lambda error: self._ended.set())
        await supervisor.start()
        supervisor.keep("actor", self.actor.run())
        for transfer in transfers:
            self.actor.post(transfer)
        async with asyncio.timeout(30):
            await self._ended.wait()
        await supervisor.stop()
        assert {op_id: end.error for op_id, end in self.ends.items()} == {
            transfer.op_id: None for transfer in transfers
        }


def _lots(order: Sequence[int]) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Return a group, device blocks and host blocks for each transfer; none is in two."""
    random = np.random.default_rng(3)
    hosts = iter(np.array_split(random.permutation(HOST_BLOCKS), len(order)))
    shares = {
        group: iter(np.array_split(random.permutation(DEVICE_BLOCKS), order.count(group)))
        for group in set(order)
    }
    lots = []
    for group in order:
        device, host = next(shares[group]), next(hosts)
        count = min(len(device), len(host))
        lots.append((group, device[:count], host[:count]))
    return lots


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("mode", MODES)
async def test_each_group_is_copied_by_its_own_layout(
    device: Device, mode: str, order: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both groups' bytes go to their host places and come back, in one pool, alone and mixed.

    A shorter block leaves the rest of its place as it was, and no other block changes.
    """
    if mode == "cpu-inline":
        monkeypatch.setattr("flexkv.io.device.cpu.INLINE_BYTES_MAX", 1 << 30)
    lots, before, host = _lots(order), [device.blocks(group) for group in (0, 1)], device.arena
    expected = host.array.copy()
    for group, blocks, places in lots:
        expected[places, : SPACES[group].block_bytes] = before[group][blocks]
    with ExitStack() as undo:
        await Bench(device.port(mode, undo), 3 * SPACES[0].block_bytes).run(
            [
                Transfer(number, number, TO_HOST, blocks, places, group=group)
                for number, (group, blocks, places) in enumerate(lots)
            ]
        )
    assert np.array_equal(host.array, expected)
    for layer in device.layers:
        layer.fill(0)
    wanted = [np.zeros_like(blocks) for blocks in before]
    for group, blocks, _ in lots:
        wanted[group][blocks[::-1]] = before[group][blocks]
    with ExitStack() as undo:
        await Bench(device.port(mode, undo), 3 * SPACES[0].block_bytes).run(
            [
                Transfer(number, number, TO_DEVICE, places, blocks[::-1].copy(), group=group)
                for number, (group, blocks, places) in enumerate(lots)
            ]
        )
    assert all(np.array_equal(device.blocks(group), wanted[group]) for group in (0, 1))
    assert np.array_equal(host.array, expected)


@pytest.mark.parametrize("mode", MODES[1:])
async def test_layers_are_those_of_the_group(device: Device, mode: str) -> None:
    """A piece of some layers copies the layers of its own group."""
    with ExitStack() as undo:
        port = device.port(mode, undo)
        woken = asyncio.Event()
        port.connect(woken.set)
        ids, before, host = np.arange(8), device.arena.array.copy(), device.arena
        for group, layers in enumerate((Layers(1, 2, 1), Layers(0, 1, 2))):
            places = ids + 10 * group
            port.submit(Transfer(group, 1, TO_HOST, ids, places, None, layers, group=group))
        ended = port.reap()
        while len(ended) < 2:
            await woken.wait()
            woken.clear()
            ended += port.reap()
        size = SPACES[0].block_bytes // 3
        before[:8, size : 2 * size] = device.blocks(0)[:8, size : 2 * size]
        before[10:18, : SPACES[1].block_bytes] = device.blocks(1)[:8]
        assert np.array_equal(host.array, before)


async def test_sums_cover_the_bytes_of_a_block_alone(device: Device) -> None:
    """A short block's checksum leaves out what another block left behind it in its place."""
    ids, sizes = np.arange(20), [space.block_bytes for space in SPACES]
    with ExitStack() as undo:
        checksummer = PoolChecksummer(device.arena, block_bytes=sizes)
        undo.callback(checksummer.close)
        woken = asyncio.Event()
        checksummer.connect(woken.set)
        for group, size in enumerate(sizes):
            port = device.port("cpu-pooled", undo)
            await Bench(port, 1 << 30).run([Transfer(group, 1, TO_HOST, ids, ids, group=group)])
            device.arena.array[ids, size:] += 1
            checksummer.submit(1, ids, urgent=True, group=group)
            while not checksummer.reap():
                await woken.wait()
                woken.clear()
            expected = [xxhash.xxh3_64_intdigest(block) for block in device.blocks(group)[ids]]
            assert checksummer.sums[ids].tolist() == expected
            assert device.sums is not None
            assert device.sums[ids].tolist() == expected


@pytest.mark.parametrize("mode", ["cpu-pooled", "cuda-engine"])
async def test_a_group_without_a_layout_is_refused(device: Device, mode: str) -> None:
    """A transfer of a group that the device does not have raises InvariantError."""
    with ExitStack() as undo:
        port, ids = device.port(mode, undo), np.arange(2)
        port.connect(lambda: None)
        with pytest.raises(InvariantError):
            port.submit(Transfer(1, 1, TO_HOST, ids, ids, group=2))
        assert port.reap() == []


@pytest.mark.parametrize("mode", ["cpu-pooled", "cuda-engine"])
async def test_a_device_sleeps_and_wakes_with_all_groups(device: Device, mode: str) -> None:
    """After suspend and resume, blocks of every group are copied as before."""
    with ExitStack() as undo:
        port = device.port(mode, undo)
        port.suspend()
        port.resume(device.layouts, device.layers)
        assert port.num_blocks == DEVICE_BLOCKS
        ids = np.arange(4)
        transfers = [Transfer(g, g, TO_HOST, ids, ids + 10 * g, group=g) for g in (0, 1)]
        await Bench(port, 1 << 20).run(transfers)
        for group, space in enumerate(SPACES):
            rows = device.arena.array[10 * group :][:4, : space.block_bytes]
            assert np.array_equal(rows, device.blocks(group)[:4])


# -- what is counted ------------------------------------------------------------------------------


class Slow:
    """A port that ends nothing before it is asked to."""

    def __init__(self) -> None:
        self.submitted: list[Transfer] = []

    def connect(self, wake: Callable[[], None]) -> None:
        """Do nothing: nothing ends."""

    def submit(self, transfer: Transfer) -> None:
        """Keep a transfer."""
        self.submitted.append(transfer)

    def reap(self) -> list[Completion]:
        """Return nothing."""
        return []

    def close(self) -> None:
        """Release nothing."""


@pytest.mark.parametrize(("group", "blocks"), [(0, 3), (1, 12)])
async def test_windows_count_the_bytes_of_the_group(group: int, blocks: int) -> None:
    """A window and its pieces hold as many blocks as the group's block size allows."""
    sizes, port = [400, 100], Slow()
    window = Window(1200, 1200)
    actor = TransferActor(Tier.DEVICE, port, (window, window), 8, sizes)
    actor.attach(lambda _: None)
    ids = np.arange(100)
    actor.post(Transfer(1, 1, TO_DEVICE, ids, ids, group=group))
    actor._turn()
    (piece,) = port.submitted
    assert (piece.block_count, piece.group) == (blocks, group)
    assert actor.in_flight_bytes[True] == 1200


class Records(list[Any]):
    """A trace's records."""

    record = list.append


class Untimed:
    """An actor that does not know when its ops began."""

    name = "device"

    def take_begun(self, op_id: int) -> float | None:
        """Return nothing."""
        return None


def test_moved_bytes_are_those_of_the_group() -> None:
    """The bytes that an op has moved are counted and traced with the size of its group's blocks."""
    observer, records, sizes = Observer([400, 100]), Records(), [400, 100]
    actors, index = {Tier.DEVICE: Untimed()}, Residency({Tier.HOST: 4})
    observer.tracer = Tracer(
        [records], sizes, actors, index, lambda now_ns: SampleRecord(now_ns, {}, {}, 0, 0)
    )
    keys = bytes(16 * 3)
    request = Request(Operation.GET, 1, 32, 16, Span(0, 2, 0, 32), keys)
    for group in (0, 1):
        plan = _plan(group)
        observer.op_issued(plan.op_id(plan.template.ops[0]))
        observer.op_ended(request, plan, plan.template.ops[0], 2, None)
    assert observer.routes[TO_DEVICE].bytes == 2 * 400 + 2 * 100
    assert [each.bytes for each in records if isinstance(each, OpRecord)] == [2 * 400, 2 * 100]


# -- legs, plans and identities -------------------------------------------------------------------


def _plan(group: int) -> Plan:
    """Return a plan that loads two blocks of a group."""
    template = compile_shape(Shape(Operation.GET, (Leg((TO_DEVICE,), 1, group=group),)))
    ids = {Tier.HOST: np.arange(2), Tier.DEVICE: np.arange(2)}
    return Plan(template, 1, (LegFill(b"", Positions(0, 2), ids, (0, 2)),))


@pytest.mark.parametrize("group", [0, 1])
def test_a_transfer_has_the_group_of_its_leg(group: int) -> None:
    """A plan's transfers, and all parts of them, have the group of their leg."""
    plan = _plan(group)
    transfer = plan.transfer(plan.template.ops[0])
    assert transfer.group == transfer.part(0, 1).group == group


def test_spaces_of_one_pool_have_its_stride() -> None:
    """Spaces are numbered in order, and all have the aligned stride of the largest block."""
    sizes = [space.block_bytes for space in SPACES]
    assert sizes == [3 * 2 * 16 * 2 * 16 * 2, 64 * 24]
    assert [(space.group, space.stride_bytes) for space in SPACES] == [(0, 8192), (1, 8192)]
    assert in_one_pool(*reversed(SPACES)) == (
        replace(SPACES[1], group=0),
        replace(SPACES[0], group=1),
    )


def test_a_group_has_an_identity_of_its_own() -> None:
    """Group 0 has the identity of a model with one group; another group shares it with none."""
    first, second = SPACES
    (alone,) = ATTENTION.spaces(PER_BLOCK)
    assert fingerprint(first) == fingerprint(alone)
    others = [second, replace(second, group=2), *LATENT.spaces(4 * PER_BLOCK)]
    assert len({fingerprint(space) for space in others}) == 3
    prompt = np.arange(64)
    assert KeyChain(first).keys(prompt) == KeyChain(alone).keys(prompt)
    assert KeyChain(second).keys(prompt) != KeyChain(others[-1]).keys(prompt)
    one, two = block_identity([alone], ""), block_identity(SPACES, "")
    assert two == {**one, "group_1": fingerprint(second).decode()}


def test_an_engine_has_one_space() -> None:
    """A model of today has one space, whose stride is that of every pool."""
    sizes = CacheConfig(num_cpu_blocks=4).sized(ATTENTION)
    (space,) = sizes.spaces
    assert isinstance(space, BlockSpace)
    assert (space.group, space.stride_bytes) == (0, sizes.block_stride_bytes)
    assert sizes.block_bytes == [space.block_bytes]
