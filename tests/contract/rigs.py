"""Real and fake transfer ports, with the memory and files they need, for one contract suite."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexkv.actors.actor import TransferActor, Window
from flexkv.actors.checks import BlockChecks, KeptSums
from flexkv.common.layout import KVShape, PagedLayout, Part, infer_layout
from flexkv.common.space import BlockSpace
from flexkv.common.terms import (
    BLOCK_KEY_BYTES,
    BlockIds,
    BlockNames,
    Positions,
    Route,
    Tier,
    Transfer,
)
from flexkv.io.cuda.choice import Choices, CopyMethod, CopyPreference
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.cuda.port import CudaDevicePort
from flexkv.io.device.cpu import CpuDevicePort
from flexkv.io.device.ranks import RanksPort
from flexkv.io.device.tensors import describe
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Completion, DevicePort, TransferPort
from flexkv.io.ssd.files import StripedFiles
from flexkv.io.ssd.posix import thread_port
from flexkv.io.ssd.uring import RingOptions, uring_port
from flexkv.testing.fake_cuda import FakeCuda
from flexkv.testing.fakes import FakeChecksummer, FakePort
from flexkv.testing.faults import FaultPlan

HOST_BLOCKS = 48
OUTER_BLOCKS = 64
DISK_STRIDE_BYTES = 8192
PATIENCE_S = 20.0


def named_by(places: BlockIds) -> BlockNames:
    """Return the names of blocks: a root of zeros, and for each a key that is made of its place."""
    keys = np.zeros((1 + len(places), BLOCK_KEY_BYTES), np.uint8)
    keys[1:, :8] = places[:, None].view(np.uint8)
    return BlockNames(keys.tobytes(), Positions(0, len(places)))


@dataclass
class Rig:
    """One port between host memory and an outer tier, and what must be closed with it."""

    port: TransferPort
    host: NDArray[np.uint8] | None
    outer: Tier
    group: int = 0
    """The KV group of the blocks that it moves."""
    resources: ExitStack = field(default_factory=ExitStack)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    tokens: count[int] = field(default_factory=count)

    def transfer(self, to_host: bool, source_ids: object, target_ids: object) -> Transfer:
        """Return a transfer with an op id of its own; each block is named by its outer place."""
        route = Route(self.outer, Tier.HOST) if to_host else Route(Tier.HOST, self.outer)
        return Transfer(
            op_id=next(self.tokens),
            owner=1,
            route=route,
            source_ids=np.array(source_ids, np.int64),
            target_ids=np.array(target_ids, np.int64),
            names=named_by(np.array(source_ids if to_host else target_ids, np.int64)),
            group=self.group,
        )

    def connect(self) -> None:
        """Attach the port to the running loop."""
        self.port.connect(self.woken.set)

    async def run(self, *transfers: Transfer) -> list[Completion]:
        """Submit all transfers at once, and return their completions in the order of their ends."""
        for transfer in transfers:
            self.port.submit(transfer)
        ended = self.port.reap()
        async with asyncio.timeout(PATIENCE_S):
            while len(ended) < len(transfers):
                await self.woken.wait()
                self.woken.clear()
                ended += self.port.reap()
        return ended

    def close(self) -> None:
        """Close the port, then the memory and files that it used."""
        self.host = None
        with self.resources:
            self.port.close()


def fake_rig(_: Path) -> Rig:
    """Return a fake port between two arrays, with delays and without failures."""
    store = np.zeros((OUTER_BLOCKS, 256), np.uint8)
    host = np.zeros((HOST_BLOCKS, 256), np.uint8)
    return Rig(FakePort(store, host, FaultPlan(1, delay_max_s=0.002), 256), host, Tier.DISK)


def other_layout() -> tuple[list[NDArray[np.int16]], PagedLayout]:
    """Return the KV caches of a group of one layer with small blocks, and their layout."""
    layers = [np.zeros((OUTER_BLOCKS, 4, 2, 8), np.int16)]
    return layers, infer_layout([describe(layers[0])], [KVShape(4, 2, 8, 1, item_bytes=2)])


def cpu_rig(tokens_per_block: int, group: int = 0) -> Rig:
    """Return a CPU device port over two layers, with blocks of 2 KiB per token.

    They are blocks of group 0, or of group 1 behind a group of other blocks.
    """
    shape = (2, OUTER_BLOCKS, tokens_per_block, 4, 64)
    layers = [np.zeros(shape, np.int16) for _ in range(2)]
    specs = [describe(layer) for layer in layers]
    layout = infer_layout(specs, [KVShape(tokens_per_block, 4, 64, 2, item_bytes=2)])
    arena = Arena.open(HOST_BLOCKS, layout.block_bytes)
    others, other = other_layout()
    layouts = [layout, other] if group == 0 else [other, layout]
    port = CpuDevicePort(layouts, arena, layers + others)
    rig = Rig(port, arena.array, Tier.DEVICE, group)
    rig.resources.callback(arena.close)
    return rig


class ActorPort:
    """An actor over a port, driven as a port is: `submit` and `reap` make its turns.

    It shows that the stages of an actor keep the contract of the port that they surround.
    """

    def __init__(self, tier: Tier, port: FakePort, checks: BlockChecks) -> None:
        window = Window(1 << 30, 1 << 30)
        self._port = port
        sizes = [port.block_bytes]
        self._actor = TransferActor(tier, port, (window, window), 1 << 10, sizes, checks)
        self._ended: list[Completion] = []
        self.sync = port.sync
        self._closed = False

    @property
    def block_bytes(self) -> int:
        """Return the bytes moved for one block."""
        return self._port.block_bytes

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach the actor; the suite makes its turns, so a ring of its bell is a wake."""
        vars(self._actor._bell)["ring"] = wake
        self._actor.attach(self._ended.extend)

    def submit(self, transfer: Transfer) -> None:
        """Post a transfer, and make a turn."""
        self._actor.post(transfer)
        self._actor._turn()

    def reap(self) -> list[Completion]:
        """Make a turn, and return every transfer that ended since the last call."""
        self._actor._turn()
        ended = self._ended.copy()
        self._ended.clear()
        return ended

    def close(self) -> None:
        """Close the actor, then the port."""
        try:
            self._port.close()
        finally:
            if not self._closed:
                self._closed = True
                self._actor.close()


def device_actor_rig(_: Path) -> Rig:
    """Return the actor of a device, which sums what it brings to the host, over the fake port."""
    rig, faults = fake_rig(_), FaultPlan(2, delay_max_s=0.002)
    assert rig.host is not None
    checks = BlockChecks(FakeChecksummer(rig.host, faults))
    return Rig(ActorPort(Tier.DEVICE, rig.port, checks), rig.host, Tier.DEVICE)


class BlindSummer(FakeChecksummer):
    """A checksummer that gives all blocks one sum, for host memory that tests write by hand."""

    def _end(self, op_id: int, host_ids: BlockIds) -> None:
        super()._end(op_id, host_ids)
        self.sums[host_ids] = 0


def tier_actor_rig(_: Path) -> Rig:
    """Return the actor of a tier, which verifies its reads, over slow fakes."""
    rig, faults = fake_rig(_), FaultPlan(2, delay_max_s=0.002)
    assert rig.host is not None
    kept = KeptSums(OUTER_BLOCKS, lambda at: ("fake", at))
    checks = BlockChecks(BlindSummer(rig.host, faults), kept)
    return Rig(ActorPort(Tier.DISK, rig.port, checks), rig.host, Tier.DISK)


def cuda_rig(preference: CopyPreference, group: int = 0) -> Rig:
    """Return a CUDA device port over a fake driver, with blocks of three pieces.

    They are blocks of group 0, or of group 1 behind a group of other blocks.
    """
    shape = (OUTER_BLOCKS, 16, 4, 24)
    layers = [np.zeros(shape, np.int16) for _ in range(3)]
    layout = infer_layout(
        [describe(layer) for layer in layers], [KVShape(16, 4, 24, 1, item_bytes=2)]
    )
    arena = Arena.open(HOST_BLOCKS, layout.block_bytes)
    others, other = other_layout()
    layouts, memory = [layout, other] if group == 0 else [other, layout], layers + others
    driver = FakeCuda(memory)
    rig = Rig(
        CudaDevicePort(layouts, Pinned(arena), memory, driver, (preference, preference)),
        arena.array,
        Tier.DEVICE,
        group,
    )
    rig.resources.callback(lambda: assert_nothing_left(driver))
    rig.resources.callback(arena.close)
    return rig


def assert_nothing_left(driver: FakeCuda) -> None:
    """Check that the port released everything that it took from the driver."""
    assert driver.left == 0


def cuda_engine_rig(_: Path) -> Rig:
    """Return a CUDA device port that copies with the copy engine."""
    return cuda_rig(CopyPreference(use_engine=True))


def cuda_staged_rig(_: Path, group: int = 0) -> Rig:
    """Return a CUDA device port that stages copies in device memory, a few blocks at a time."""
    rig = cuda_rig(CopyPreference(), group)
    for way in rig.port._streams:
        way.choose(Choices.always(CopyMethod.STAGED))
    return rig


def ranks_rig(_: Path) -> Rig:
    """Return the port over four ranks: two parts, each on one CPU and one (fake) CUDA rank."""
    shape, part_bytes = KVShape(16, 2, 24, 1, item_bytes=2), 3 * 16 * 2 * 24 * 2
    arena = Arena.open(HOST_BLOCKS, 2 * part_bytes)
    pinned, registered = Pinned(arena), {}
    ranks: list[DevicePort] = []
    drivers = []
    resources = ExitStack()
    resources.callback(arena.close)
    for part in range(2):
        layers = [np.zeros((OUTER_BLOCKS, 16, 2, 24), np.int16) for _ in range(3)]
        layout = infer_layout([describe(layer) for layer in layers], [shape], None, Part(part, 2))
        drivers.append(FakeCuda(layers, registered=registered))
        preference = CopyPreference(use_engine=bool(part), thread_blocks=4)
        cuda = CudaDevicePort([layout], pinned, layers, drivers[-1], (preference, preference))
        cpu = CpuDevicePort([layout], arena, layers)  # the ranks of a part share their KV caches
        ranks += [cuda, cpu]
        resources.callback(cpu.close)
        resources.callback(cuda.close)
    space = BlockSpace(16, (shape,) * 3, ("int16",) * 3, ranks=4, parts=2, facts={})
    rig = Rig(RanksPort(ranks, [space], HOST_BLOCKS), arena.array, Tier.DEVICE)
    rig.resources.callback(lambda: [assert_nothing_left(driver) for driver in drivers])
    rig.resources.push(resources)
    return rig


def cuda_kernel_rig(_: Path) -> Rig:
    """Return a CUDA device port that copies with the kernel."""
    return cuda_rig(CopyPreference(use_engine=False, thread_blocks=8))


def cpu_inline_rig(_: Path) -> Rig:
    """Return a CPU device port whose blocks are small enough to be copied in place."""
    return cpu_rig(tokens_per_block=2)


def cpu_pooled_rig(_: Path) -> Rig:
    """Return a CPU device port whose blocks are all copied by the copy threads."""
    return cpu_rig(tokens_per_block=64)


def disk_rig(directories: list[Path], make: Callable[[Arena, StripedFiles], TransferPort]) -> Rig:
    """Return a disk port over files of 10 blocks in the given directories."""
    with ExitStack() as resources:
        files = StripedFiles.open(
            directories, OUTER_BLOCKS, DISK_STRIDE_BYTES, 10 * DISK_STRIDE_BYTES + 1
        )
        resources.callback(files.close)
        arena = Arena.open(HOST_BLOCKS, DISK_STRIDE_BYTES)
        resources.callback(arena.close)
        return Rig(make(arena, files), arena.array, Tier.DISK, resources=resources.pop_all())


def uring_rig(folder: Path) -> Rig:
    """Return an io_uring port over one directory, with a ring smaller than the transfers."""
    return disk_rig([folder], lambda arena, files: uring_port(arena, files, RingOptions(8)))


def uring_striped_rig(folder: Path) -> Rig:
    """Return an io_uring port over three directories, on memory that is not registered."""
    options = RingOptions(entries=64, register=False)
    folders = [folder / name for name in "abc"]
    return disk_rig(folders, lambda arena, files: uring_port(arena, files, options))


def threads_rig(folder: Path) -> Rig:
    """Return a thread port over two directories."""
    return disk_rig([folder / "a", folder / "b"], thread_port)


RIGS: dict[str, Callable[[Path], Rig]] = {
    "fake": fake_rig,
    "cpu-inline": cpu_inline_rig,
    "cpu-pooled": cpu_pooled_rig,
    "device-actor": device_actor_rig,
    "tier-actor": tier_actor_rig,
    "cuda-engine": cuda_engine_rig,
    "cuda-staged": cuda_staged_rig,
    "ranks": ranks_rig,
    "cuda-kernel": cuda_kernel_rig,
    "cpu-group-1": lambda _: cpu_rig(tokens_per_block=16, group=1),
    "cuda-staged-group-1": partial(cuda_staged_rig, group=1),
    "uring": uring_rig,
    "uring-striped": uring_striped_rig,
    "threads": threads_rig,
}
