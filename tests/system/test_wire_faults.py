"""Nodes that share over a wire that fails at any byte: never wrong bytes, always an end, no leaks.

A failure names its seed: `PEER_FAULT_FIRST=seed pytest … -x` replays it, with the same number of
faults in all. `-s` shows how many there were of each kind.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest

from flexkv.common.errors import CorruptBlockError, PeerError
from flexkv.io.peer import port as port_module
from flexkv.io.peer import receiver as receiver_module
from flexkv.testing import faulty_tcp
from flexkv.testing.faulty_tcp import CONNECT, CONTROL, DATA, FAULTS, GREETING, Fault, FaultyTcp
from flexkv.testing.hurried_time import run_hurried
from flexkv.tiers import peer as peer_module
from tests.cluster_rigs import open_descriptors
from tests.peer_fault_rig import (
    GENERATIONS,
    PROMPT_BLOCKS,
    PROMPTS,
    RATIOS,
    SIZES,
    FaultyNode,
    Patience,
    Request,
    Truth,
)

WANTED = int(os.environ.get("PEER_FAULTS", "240"))
"""How many faults strike in all lives of a cluster."""
LIVES = max(4, WANTED // 50)
FIRST = int(os.environ.get("PEER_FAULT_FIRST", "0"))
NODES_MAX = 4
RECOVERS_S = 90.0
"""A node that failed is tried again after 30 s at the latest."""
QUIET_S = 150.0
"""Grants that nobody reads end after 30 s, and unused connections after 60 s, or twice that."""
PASSING = sorted(set(FAULTS) - faulty_tcp.SPOILS)
SPOILING = sorted(faulty_tcp.SPOILS)
AFTER_BYTES = {
    (CONNECT, True): (1,),
    (GREETING, True): (120, 300),
    (GREETING, False): (120, 300),
    (CONTROL, True): (400, 4000),
    (CONTROL, False): (30, 300),
    (DATA, True): (40, 400),
    (DATA, False): (100, 20_000, 400_000),
}
"""How many bytes pass at most, of connections and directions, before a fault strikes."""

STRUCK = {
    "refuse": (CONNECT, True, 0),
    "hang": (CONNECT, True, 0),
    "garble": (CONTROL, True, 0),
    "replay": (DATA, False, 0),
}
"""Where a single fault strikes; others do so in the middle of the blocks."""
ENDED, SPOILED = (PeerError,), (PeerError, CorruptBlockError)
ERRORS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("cut", "half", "reset", "lose", "stall", "freeze"), ENDED),
    **dict.fromkeys(("refuse", "hang", "garble", "replay"), ENDED),
    **dict.fromkeys(("flip", "drop", "insert", "repeat", "swallow"), SPOILED),
    **dict.fromkeys(("delay", "slow"), (type(None), PeerError)),
}
"""How a get may end that a fault strikes."""


class Life:
    """A cluster, from its start to its end, and what happens to it, from a seed."""

    def __init__(self, seed: int, truth: Truth) -> None:
        self._truth = truth
        self.random = random = Random(seed)
        self.wire = FaultyTcp(Random(seed))
        self.wire.events = {
            "evict": self._evict,
            "reset cluster": self._reset_cluster,
            "clear alone": self._clear_alone,
            "cancel": self._cancel,
            "stop reads": self._stop_reads,
            "leave": self._leave,
            "restart": self._restart,
        }
        self.wire.on_stall = self._stalled
        self._is_spoiled = random.random() < 0.7
        self.nodes: list[FaultyNode] = []
        self._restarts: dict[FaultyNode, asyncio.Task[None]] = {}
        self._generation = 0
        self.filled = 0

    async def run(self) -> None:
        """Let everything happen."""
        for _ in range(self.random.randint(2, NODES_MAX)):
            self.nodes.append(await self.new())
        self.meet()
        while self.wire.met.total() < WANTED // LIVES:
            await self._round()
        await self.recover()
        for _ in range(4):
            self._request(self.random.choice(self.nodes))
        await asyncio.sleep(self.random.choice((0, 0.001, 0.01)))
        for node in self.nodes:
            await self._end(node)
        await self.wire.close()
        self.wire.heal()

    # -- nodes ----------------------------------------------------------------------------------

    async def new(self) -> FaultyNode:
        """Return a new node."""
        node = FaultyNode(self.wire, self._truth, self.random)
        await node.start()
        node.adopt(self._generation)
        self._fill(node)
        return node

    def _fill(self, node: FaultyNode) -> None:
        for prompt in self.random.sample(range(PROMPTS), PROMPTS):
            node.owner.put_prompt(prompt, self.random.randint(0, PROMPT_BLOCKS))
        node.owner.on_disk = set(self.random.sample(self._truth.names, 40))

    def meet(self) -> None:
        """Let all nodes know each other."""
        for node in self.nodes:
            node.meet(self.nodes)

    async def _end(self, node: FaultyNode) -> None:
        await node.stop()
        self.filled += node.filled
        assert self._is_spoiled or not node.wrong, "a sum was wrong, though no byte was changed"

    # -- a round --------------------------------------------------------------------------------

    async def _round(self) -> None:
        """Make some requests while some faults strike, and check all that they did."""
        is_apart = any(node.tier.generation.is_apart for node in self.nodes)
        if is_apart and self.random.random() < 0.5:
            self._adopt_all()
        for _ in range(self.random.randint(1, 6)):
            self.wire.arm(self._fault())
        for node in self.nodes:
            for _ in range(self.random.randint(1, 4)):
                self._request(node)
        for node in list(self.nodes):
            await node.until_ended()
        self.wire.heal()
        for ended in list(self._restarts.values()):
            await ended
        await asyncio.sleep(0.02)  # what was held up arrives
        for node in self.nodes:
            node.check()
            if self.random.random() < 0.5:
                node.tier._reader.forget_failures()
        await asyncio.sleep(self.random.choice((0, 3, 20)))  # those that failed are tried again
        self.meet()

    def _fault(self) -> Fault:
        random = self.random
        purpose, is_up = random.choice([*AFTER_BYTES, (DATA, False), (DATA, False)])
        names = PASSING + (SPOILING if self._is_spoiled else [])
        if (purpose, is_up) != (CONTROL, True):
            names = [name for name in names if name != "garble"]
        elif self._is_spoiled and random.random() < 0.3:
            names = ["garble"]
        if (purpose, is_up) != (DATA, False):
            names = [name for name in names if name != "replay"]
        if purpose is CONNECT:
            names = ["refuse", "hang"]
        elif purpose is not GREETING and random.random() < 0.35:
            names = list(self.wire.events)
        after_bytes = random.randrange(random.choice(AFTER_BYTES[purpose, is_up]))
        return Fault(random.choice(names), purpose, is_up, after_bytes, random.getrandbits(32))

    def _request(self, node: FaultyNode) -> None:
        """Have a node ask for blocks of one or two others."""
        random = self.random
        known = [number for each in self.nodes if (number := node.holder_of(each)) is not None]
        first = random.choice((0, 0, random.randrange(PROMPT_BLOCKS)))
        last = random.randint(first + 1, PROMPT_BLOCKS)
        request = node.request(
            random.randrange(len(RATIOS)), random.randrange(PROMPTS), first, last
        )
        if request is None or not known:
            return
        if random.random() < 0.3:
            node.fetch(request, random.choice(known))
        else:
            node.get(request, self._holders(request, known))

    def _holders(self, request: Request, known: list[int]) -> list[int]:
        count = len(request.names)
        before = self.random.choice((count, self.random.randint(0, count)))
        one, other = self.random.choice(known), self.random.choice(known)
        return [one] * before + [other] * (count - before)

    def _stalled(self, random: Random) -> None:
        """Let something else happen while bytes are held up in the middle."""
        what = random.randrange(4)
        if what == 0 and self._may_clear:
            self._adopt_all()
        elif what == 1:
            random.choice((self._evict, self._clear_alone))(random)

    # -- events ---------------------------------------------------------------------------------

    def _evict(self, random: Random) -> None:
        """Let a node forget some blocks, and put others."""
        random.choice(self.nodes).owner.evict(random.choice((0.1, 0.5, 1.0)))

    def _reset_cluster(self, random: Random) -> None:
        """Begin a new generation; one node hears of it at once, the others soon."""
        if self._may_clear:
            self._generation += 1
            for number, node in enumerate(random.sample(self.nodes, len(self.nodes))):
                delay_s = random.random() * number
                asyncio.get_running_loop().call_later(delay_s, self._adopt, node, self._generation)

    def _adopt_all(self) -> None:
        self._generation += 1
        for node in self.nodes:
            self._adopt(node, self._generation)

    def _adopt(self, node: FaultyNode, generation: int) -> None:
        if node in self.nodes and generation == self._generation:
            node.adopt(generation)
            self._fill(node)

    def _clear_alone(self, random: Random) -> None:
        if self._may_clear:
            node = random.choice(self.nodes)
            node.clear_alone()
            self._fill(node)

    @property
    def _may_clear(self) -> bool:
        return self._generation + 4 < GENERATIONS

    def _cancel(self, random: Random) -> None:
        """Cancel some fetches of a node."""
        for task in random.choice(self.nodes).fetches:
            if random.random() < 0.7:
                task.cancel()

    def _stop_reads(self, random: Random) -> None:
        """Let a node end what it reads of another one."""
        one, other = random.sample(self.nodes, 2)
        if (holder := one.holder_of(other)) is not None:
            one.tier.transports.transport.stop(holder)

    def _leave(self, random: Random) -> None:
        """Let a node hear that another one has left; in the next round it knows it again."""
        one, other = random.sample(self.nodes, 2)
        one.tier._membership.farewell(other.record.life)

    def _restart(self, random: Random) -> None:
        """End a node's life in the middle of everything, and begin another one."""
        node = random.choice(self.nodes)
        if node not in self._restarts and len(self._restarts) < 1:
            work = self._restarted(node)
            self._restarts[node] = asyncio.get_running_loop().create_task(work)

    async def _restarted(self, node: FaultyNode) -> None:
        at = self.nodes.index(node)
        self.nodes[at] = await self.new()
        self.meet()
        try:
            await self._end(node)
        finally:
            del self._restarts[node]

    # -- the end --------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Check that nodes get what others have, once nothing fails any more."""
        self._adopt_all()
        for node in self.nodes:
            node.owner.clear(self._generation)
            node.owner.put_prompt(0, 4)
        for node in self.nodes:
            for other in self.nodes:
                patience = Patience(RECOVERS_S)
                while other is not node and not await self.gets(node, other, 4):
                    assert not patience.is_over, "it did not recover by itself"
                    await asyncio.sleep(1)
            node.check()
        patience = Patience(QUIET_S)
        for node in self.nodes:
            while node.kept:
                assert not patience.is_over, node.kept
                await asyncio.sleep(5)

    async def gets(self, node: FaultyNode, other: FaultyNode, blocks: int) -> bool:
        """Return whether a node gets the first blocks of a prompt of another one."""
        before, holder = node.filled, node.holder_of(other)
        node.check()
        request = node.request(0, 0, 0, blocks)
        assert request is not None
        assert holder is not None
        node.get(request, [holder] * blocks)
        await node.until_ended()
        return node.filled == before + blocks


async def meet_one(fault: str, truth: Truth) -> None:
    """Have one fault strike a get, and get the same again once that is over."""
    own = Life(0, truth)
    reader, other = own.nodes = [await own.new(), await own.new()]
    own.meet()
    other.owner.clear(0)
    other.owner.put_prompt(0, 8)
    patience = Patience(RECOVERS_S)
    while not await own.gets(reader, other, 8):  # the clock may be too fast for it
        assert not patience.is_over
        reader.tier._reader.forget_failures()
    if fault in ("refuse", "hang"):
        reader.tier.transports.transport.stop(reader.holder_of(other))
    purpose, is_up, after_bytes = STRUCK.get(fault, (DATA, False, 50_000))
    own.wire.arm(Fault(fault, purpose, is_up, after_bytes, 7))
    has_all = True
    while not own.wire.met:
        assert not patience.is_over
        reader.tier._reader.forget_failures()
        has_all = await own.gets(reader, other, 8)
    assert own.wire.met == {fault: 1}
    assert not has_all or fault in ("delay", "slow")
    assert isinstance(reader.error, ERRORS[fault]), reader.error
    own.wire.heal()
    await own.recover()
    for node in (reader, other):
        await node.stop()
    await own.wire.close()


@pytest.fixture(scope="module")
def truth() -> Truth:
    """Return the blocks of all nodes."""
    made = Truth()
    run_hurried(made.sum_all())
    return made


@pytest.fixture(scope="module")
def met() -> Iterator[Counter[str]]:
    """Yield the faults by kind, and print them in the end."""
    counts: Counter[str] = Counter()
    yield counts
    filled = counts.pop("filled", 0)
    kinds = dict(counts.most_common())
    print(f"\n{counts.total()} faults, {filled} blocks read: {kinds}")  # noqa: T201 -- for a soak


async def life(seed: int, truth: Truth, met: Counter[str]) -> None:
    """Let a cluster live; no descriptor and no task may be left."""
    before = open_descriptors()
    own = Life(seed, truth)
    await own.run()
    await asyncio.sleep(0.01)
    assert open_descriptors() == before
    assert len(asyncio.all_tasks()) <= 2, asyncio.all_tasks()
    met += own.wire.met
    met["filled"] += own.filled


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a transfer of a few blocks have several reads, and each read several messages."""
    monkeypatch.setattr(peer_module, "SOCKETS_MAX", 64)
    monkeypatch.setattr(port_module, "READ_BYTES", 6 * max(SIZES.block_bytes))
    monkeypatch.setattr(receiver_module, "MESSAGE_BYTES", 2 * max(SIZES.block_bytes))


@pytest.mark.parametrize("fault", ERRORS)
def test_a_fault_of_every_kind(fault: str, truth: Truth) -> None:
    """A get that one fault strikes fails with its kind of error; what it has filled is right."""
    assert set(ERRORS) == {*FAULTS, "refuse", "hang"}
    run_hurried(meet_one(fault, truth))


@pytest.mark.parametrize("seed", range(FIRST, FIRST + LIVES))
def test_no_fault_gives_wrong_bytes(seed: int, truth: Truth, met: Counter[str]) -> None:
    """Under random faults every request ends; what it has filled is right, with right sums.

    Nothing else changes in host memory, nor does anything arrive after an end. Once nothing fails,
    everything works; nothing is held for others any more, and no node leaves anything behind. A
    checksum is wrong only if a byte was changed on its way.
    """
    run_hurried(life(seed, truth, met))
