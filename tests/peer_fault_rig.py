"""Nodes with the real peers' tier and fake engines, behind a proxy that fails.

The bytes of a block depend on its key, its KV group, and the generation in which it was put, so
that a block that is taken for another one is seen.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from contextlib import ExitStack, suppress
from itertools import count
from random import Random
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from flexkv.actors.supervisor import Supervisor
from flexkv.cluster.generations import RANDOM_BITS, Heard
from flexkv.cluster.grants import Held
from flexkv.cluster.records import Beat, NodeRecord
from flexkv.common.config import CacheConfig
from flexkv.common.errors import CorruptBlockError, FlexKVError
from flexkv.common.layout import KVShape
from flexkv.common.space import BlockSpace, CacheSizes, GivenSize, Kind, in_one_pool
from flexkv.common.terms import (
    BLOCK_KEY_BYTES,
    BlockIds,
    BlockNames,
    Positions,
    Route,
    Tier,
    Transfer,
)
from flexkv.index.change_hub import ChangeHub
from flexkv.index.hints import Hints
from flexkv.index.keys import leaf_keys
from flexkv.index.residency import Residency
from flexkv.io.checksums.sums import sum_maps
from flexkv.io.memory.arena import Arena
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.peer.port import Wish
from flexkv.io.peer.transport import Part
from flexkv.testing.faulty_tcp import FaultyTcp
from flexkv.tiers.parts import TierHooks
from flexkv.tiers.peer import PeerTier, _Node
from flexkv.tiers.unavailable import Unavailable

OWN, LANDING = 160, 96
"""Places for what a node has, and then those to which it reads."""
PLACES = OWN + LANDING
PROMPTS, PROMPT_BLOCKS = 4, 32
RATIOS = (1, 1, 4)
"""Of each KV group. The blocks of the first two have the same size."""
GENERATIONS = 32
"""The last one stands for what a node puts that was cleared alone."""
ROUTE = Route(Tier.PEER, Tier.HOST)
SENT_BYTES = 64 << 10
"""What a node sends waits in its memory beyond about twice this, so that much is being sent while
other things happen."""
END_S, REALLY_S = 300.0, 30.0
"""When a request must have ended at the latest."""


class Patience:
    """How long something is waited for on a hurried clock, and some real time at least.

    On a busy machine the clock may jump while a thread of ours waits for a CPU.
    """

    def __init__(self, most_s: float) -> None:
        self._until_s = asyncio.get_running_loop().time() + most_s
        self._really_until_s = time.monotonic() + REALLY_S

    @property
    def is_over(self) -> bool:
        """Return whether it was waited for long enough."""
        now_s = asyncio.get_running_loop().time()
        return now_s > self._until_s and time.monotonic() > self._really_until_s


def _space(tokens: int, kind: Kind, head_bytes: int) -> BlockSpace:
    shape = KVShape(tokens, 1, head_bytes, 1, 1)
    return BlockSpace(tokens, (shape,), ("uint8",), 1, 1, {"model": "tiny"}, kind=kind, window=64)


SPACES = in_one_pool(
    _space(16, Kind.FULL, 750), _space(16, Kind.WINDOW, 750), _space(64, Kind.WINDOW, 50)
)
SIZES = CacheSizes(SPACES, PLACES, 0, None, GivenSize("", 0), GivenSize("", 0))
STRIDE_BYTES = SIZES.block_stride_bytes


class Name(NamedTuple):
    """A block: its group, prompt and position."""

    group: int
    prompt: int
    position: int


class Truth:
    """The bytes of all blocks in all generations, and their sums.

    Attributes:
        keys: the root and keys of each prompt.
        names: of all blocks.
    """

    def __init__(self) -> None:
        random = np.random.default_rng(7)
        size = (1 + PROMPT_BLOCKS) * BLOCK_KEY_BYTES
        self.keys = [random.bytes(size) for _ in range(PROMPTS)]
        self.names = [
            Name(group, prompt, position)
            for group, ratio in enumerate(RATIOS)
            for prompt in range(PROMPTS)
            for position in range(ratio - 1, PROMPT_BLOCKS, ratio)
        ]
        self._rows = {name: row for row, name in enumerate(self.names)}
        self._by_key = {
            (name.group, self.keys[name.prompt][16 * (name.position + 1) :][:16]): name
            for name in self.names
        }
        shape = len(self.names), max(SIZES.block_bytes)
        self._bytes = random.integers(0, 256, shape, np.uint8)
        self._sums = np.zeros((GENERATIONS, len(self.names)), np.uint64)

    async def sum_all(self) -> None:
        """Sum all blocks."""
        arena, copier = Arena.open(len(self.names), STRIDE_BYTES), Copier(1)
        copier.connect()
        groups = np.array([name.group for name in self.names])
        for generation in range(GENERATIONS):
            arena.array[:, : self._bytes.shape[1]] = self._bytes ^ np.uint8(generation)
            sums = self._sums[generation]
            for group, pages in enumerate(sum_maps(arena, sums, SIZES.block_bytes)):
                await copier.checksum(pages, np.flatnonzero(groups == group))
        copier.close()
        del pages
        arena.close()

    def name(self, group: int, key: bytes) -> Name | None:
        """Return the block that has a key of its prompt's chain."""
        return self._by_key.get((group, key))

    def block(self, generation: int, name: Name) -> NDArray[np.uint8]:
        """Return the bytes of a block."""
        own = self._bytes[self._rows[name], : SIZES.block_bytes[name.group]]
        return own ^ np.uint8(generation)

    def sum_of(self, generation: int, name: Name) -> int:
        """Return its checksum."""
        return int(self._sums[generation, self._rows[name]])


class FaultyOwner:
    """An engine's blocks: they come and go, but what is held stays where it is.

    Attributes:
        pins: how many holds keep each place.
        on_disk: blocks that a prefetch brings.
    """

    def __init__(self, host: HostBlocks, truth: Truth, random: Random) -> None:
        self._host, self._truth, self._random = host, truth, random
        self.generation = 0
        self.pins: Counter[int] = Counter()
        self.on_disk: set[Name] = set()
        self._there: dict[Name, int] = {}
        self._free = list(range(OWN))
        self._leaving: set[int] = set()

    # -- what grants need -----------------------------------------------------------------------

    def hold(self, keys: bytes, first: int, last: int, group: int) -> Held:
        """Hold the leading blocks: see `Owner`."""
        found, on_disk = [], 0
        for position in range(first, last if group < len(RATIOS) else first):
            if (position + 1) % RATIOS[group]:
                found.append(-1)
                continue
            name = self._truth.name(group, keys[BLOCK_KEY_BYTES * (position + 1) :][:16])
            if name is None or name not in self._there:
                on_disk = int(name in self.on_disk)
                break
            found.append(self._there[name])
        ids = np.array(found, np.int64)
        pins = [place for place in found if place >= 0]
        self.pins.update(pins)
        return Held(ids, on_disk, pins)

    def release(self, held: Held) -> None:
        """End a hold; ending it twice fails."""
        for place in cast("list[int]", held.pins):
            assert self.pins[place] > 0
            self.pins[place] -= 1
            if not self.pins[place]:
                del self.pins[place]
                if place in self._leaving:
                    self._leaving.discard(place)
                    self._reuse(place)

    async def prefetch(self, keys: bytes, first: int, last: int, group: int) -> None:
        """Bring blocks from disk, after a while."""
        await asyncio.sleep(self._random.random() * 4)
        for position in range(first, last):
            name = self._truth.name(group, keys[BLOCK_KEY_BYTES * (position + 1) :][:16])
            if name in self.on_disk:
                self.put(name)

    # -- what happens to the blocks -------------------------------------------------------------

    def put(self, name: Name) -> None:
        """Put a block where there is room, of the present generation."""
        if name not in self._there and self._free:
            place = self._free.pop(self._random.randrange(len(self._free)))
            block = self._truth.block(self.generation, name)
            self._host.arena.array[place, : len(block)] = block
            self._host.sums[place] = self._truth.sum_of(self.generation, name)
            self._there[name] = place

    def put_prompt(self, prompt: int, blocks: int) -> None:
        """Put the leading blocks of a prompt, of all groups."""
        for name in self._truth.names:
            if name.prompt == prompt and name.position < blocks:
                self.put(name)

    def evict(self, share: float) -> None:
        """Forget some blocks, and put others in their places; those that are held stay."""
        for name in [each for each in self._there if self._random.random() < share]:
            self._forget(name)
        for name in self._random.sample(self._truth.names, len(self._free)):
            self.put(name)

    def clear(self, generation: int) -> None:
        """Forget all blocks; what is put from now on is of another generation."""
        for name in list(self._there):
            self._forget(name)
        self.generation = generation

    def _forget(self, name: Name) -> None:
        place = self._there.pop(name)
        if self.pins[place]:
            self._leaving.add(place)
        else:
            self._reuse(place)

    def _reuse(self, place: int) -> None:
        """Let something else be at a place at once."""
        self._host.arena.array[place] = self._random.randrange(256)
        self._free.append(place)

    def check(self) -> None:
        """Check that nobody has written to what is there."""
        for name, place in self._there.items():
            block = self._truth.block(self.generation, name)
            assert np.array_equal(self._host.arena.array[place, : len(block)], block), name


class Request(NamedTuple):
    """Blocks that a node wants, and where they are to be."""

    names: list[Name]
    places: BlockIds
    generation: int


class FaultyNode:
    """One life of a node.

    Attributes:
        tier: its peers' tier.
        address: at which it is reached through the proxy.
        fetches: those under way, which may be cancelled.
        filled: how many blocks it has got.
        error: of the get that has ended last.
        wrong: how many fetches have brought blocks with other sums than their owners said.
    """

    def __init__(self, wire: FaultyTcp, truth: Truth, random: Random) -> None:
        self._truth, self._random = truth, random
        self.failures: list[BaseException] = []
        self.supervisor = Supervisor(self.failures.append)
        self.arena = Arena.open(PLACES, STRIDE_BYTES)
        self.host = HostBlocks(self.arena, np.zeros(PLACES, np.uint64), tuple(SIZES.block_bytes))
        self.owner = FaultyOwner(self.host, truth, random)
        self._undo = ExitStack()
        cache = CacheConfig(enable_p2p_cpu=True, redis_port=1, cluster_secret="of the cluster")
        tier = PeerTier(cache, SIZES, Unavailable(), Hints(100, 8), None)  # type: ignore[arg-type]
        parts = tier.open(self.arena, self.host.sums, self._undo)
        assert parts is not None
        self._parts, self.port = parts, parts.port
        self.tier = cast("_Node", parts.cluster)
        self.tier._listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENT_BYTES)
        self._woken = asyncio.Event()
        self._ops, self._requests = count(1), dict[int, Request]()
        self.fetches: list[asyncio.Task[None]] = []
        self._free = list(range(OWN, PLACES))
        self._expected = self.arena.array.copy()
        self.filled = self.wrong = 0
        self.error: Exception | None = None
        self._next_generation = 0
        own = self.tier._membership.own
        self.record = NodeRecord(own.id, own.life, wire.before(own.address))

    async def start(self) -> None:
        """Serve others."""
        await self.supervisor.start()
        self.port.connect(self._woken.set)
        spawn = self.supervisor.spawn
        hooks = TierHooks(
            lambda: True, lambda _: None, lambda _: None, spawn, spawn, lambda: False,
            lambda: None, self.owner, ChangeHub(Residency({Tier.HOST: 1})), self._clear, _nothing,
        )  # fmt: skip
        for name, work in self._parts.work(hooks).items():
            if name == "peers":
                self.supervisor.keep(name, work)
            else:
                work.close()

    def meet(self, others: list[FaultyNode]) -> None:
        """Know these nodes from now on, and no others."""
        beats = [Beat(other.record) for other in others if other is not self]
        self.tier._membership.saw(beats, asyncio.get_running_loop().time())

    def holder_of(self, other: FaultyNode) -> int | None:
        """Return the number of another node, if it is known."""
        member = self.tier._membership.member_of(other.record.life)
        return None if member is None else member.holder

    @property
    def generation(self) -> int:
        """Return which generation of blocks this node may believe."""
        own = self.tier.generation
        return own.number >> RANDOM_BITS if own.is_sharing else GENERATIONS - 1

    # -- requests -------------------------------------------------------------------------------

    def request(self, group: int, prompt: int, first: int, last: int) -> Request | None:
        """Return a request for some blocks, if there is room for them."""
        ratio = RATIOS[group]
        positions = [at for at in range(first, last) if not (at + 1) % ratio]
        if not 0 < len(positions) <= len(self._free):
            return None
        self._random.shuffle(self._free)
        places = np.array([self._free.pop() for _ in positions])
        self.arena.array[places] = self._random.randrange(256)
        self._expected[places] = self.arena.array[places]
        names = [Name(group, prompt, at) for at in positions]
        return Request(names, places, self.generation)

    def get(self, request: Request, holders: list[int]) -> None:
        """Start to get blocks of holders: one for each."""
        (group, prompt, first), op_id = request.names[0], next(self._ops)
        positions = np.array([name.position for name in request.names])
        blocks = Positions(first, len(positions), positions if group else None)
        names = BlockNames(leaf_keys(self._truth.keys[prompt], group), blocks)
        ids = np.array(holders)
        self._requests[op_id] = request
        self.port.submit(
            Transfer(op_id, op_id, ROUTE, ids, request.places, names=names, group=group)
        )

    def fetch(self, request: Request, holder: int) -> None:
        """Start a fetch that may be cancelled."""
        work = self._fetch(request, holder)
        self.fetches.append(asyncio.get_running_loop().create_task(work))

    async def _fetch(self, request: Request, holder: int) -> None:
        """Fetch up to 8 blocks of a grant, as the port does."""
        filled = 0
        try:
            filled = await self._fetched(request, holder)
        except (FlexKVError, OSError):
            pass
        finally:
            self._ended(request, filled)

    async def _fetched(self, request: Request, holder: int) -> int:
        group, prompt, first = request.names[0]
        keys, last = self._truth.keys[prompt], request.names[-1].position + 1
        wish = Wish(keys[: (last + 1) * BLOCK_KEY_BYTES], first, last, group)
        allowed = await self.tier._reader.want(holder, wish)
        try:
            blocks = min(8, -(-allowed.positions // RATIOS[group]))
            if not blocks or self.generation != request.generation:
                return 0
            part = Part(holder, allowed.number, first, request.places[:blocks], group, 0)
            filled, error = await self.tier.transports.transport.fetch(part)
            self.wrong += isinstance(error, CorruptBlockError)
            return filled
        finally:
            self.tier._reader.release(holder, allowed.number)

    async def until_ended(self) -> None:
        """Return when all requests have ended, and check what they say."""
        patience = Patience(END_S)
        while self._requests:
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._woken.wait()
            self._reap()
            assert not patience.is_over, self._requests
        while self.fetches and (await asyncio.wait(self.fetches, timeout=1))[1]:
            assert not patience.is_over, self.fetches
        for task in self.fetches:
            assert task.cancelled() or task.exception() is None, task.exception()
        self.fetches.clear()

    def _reap(self) -> None:
        self._woken.clear()
        for end in self.port.reap():
            request = self._requests.pop(end.op_id)
            assert (end.error is None) == (end.filled == len(request.names)), end
            self.wrong += isinstance(end.error, CorruptBlockError)
            self.error = end.error
            self._ended(request, end.filled)

    def _ended(self, request: Request, filled: int) -> None:
        """Check what is said to be there, and remember that all places stay as they are now."""
        array, places = self.arena.array, request.places
        for name, place in zip(request.names[:filled], places.tolist(), strict=False):
            block = self._truth.block(request.generation, name)
            assert np.array_equal(array[place, : len(block)], block), f"{name} is wrong"
            assert self.host.sums[place] == self._truth.sum_of(request.generation, name)
        size = SIZES.block_bytes[request.names[0].group]
        assert np.array_equal(array[places, size:], self._expected[places, size:])
        self._expected[places] = array[places]
        self.filled += filled

    def check(self) -> None:
        """Check that nothing was written that should not be; then all places are free."""
        self.owner.check()
        assert np.array_equal(self.arena.array[OWN:], self._expected[OWN:])
        self._free = list(range(OWN, PLACES))

    @property
    def kept(self) -> dict[str, int]:
        """Return how much is kept of what others have asked for; nothing once they are quiet."""
        tier = self.tier
        kept = {
            "grants": tier._grants.counts.grants,
            "data connections": len(tier._ring._places),
            "sessions": len(tier._sessions),
            "connections": len(tier._listener),
        }
        return {name: count for name, count in kept.items() if count}

    # -- clears, and the end --------------------------------------------------------------------

    def clear_alone(self) -> None:
        """Clear this node only: what it puts then is not for others."""
        self.tier.generation.clear(None)
        self.owner.clear(GENERATIONS - 1)

    def adopt(self, generation: int) -> None:
        """Let this node hear of a generation of the cluster: it clears itself for a new one."""
        self._next_generation = generation
        heard = Heard(generation << RANDOM_BITS, made=1, book=1)
        self.tier.plane.follower.generations.take(heard)

    def _clear(self) -> None:
        self.owner.clear(self._next_generation)

    async def stop(self) -> None:
        """End this life, as an engine does; nothing of it may be left."""
        self._parts.stop()
        await self.until_ended()
        await self.supervisor.stop()
        await self._parts.leave()
        self._undo.close()
        counts = self.tier._grants.counts
        assert (counts.grants, counts.pinned_blocks, +self.owner.pins) == (0, 0, Counter())
        assert not self.failures, self.failures
        assert not self.port.reap()
        assert self.arena.close()


async def _nothing() -> None:
    """Return at once."""
