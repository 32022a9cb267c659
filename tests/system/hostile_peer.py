"""A node that knows the secret of its cluster, and keeps to nothing else of the protocol.

By seed it asks for what it may have and what not, reads what it was granted, what others were
granted, and what is over, and says things that are no messages. Whatever it does, the bytes that it
hears must be those of blocks whose keys it has asked by, under a grant of its own.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec

from flexkv.cluster import tcp
from flexkv.cluster.grants import READS_EACH
from flexkv.cluster.handshake import Identity, introduce_to_owner, prove_to_owner
from flexkv.cluster.wire import (
    FRAME_BYTES_MAX,
    FRAMING,
    FROM_OWNER,
    Busy,
    FromOwner,
    Grant,
    Message,
    PeerId,
    PeerProtocolError,
    Ping,
    Purpose,
    Refused,
    Release,
    SnapshotPart,
    SnapshotWanted,
    Want,
    framed,
)
from flexkv.common.errors import ConfigError
from flexkv.common.terms import BLOCK_KEY_BYTES
from flexkv.io.peer.frames import HEADER_BYTES, SUM_BYTES, Read, Status

PATIENCE_S = 30.0
UNHEARD = 1 << 62
"""The number of messages whose answers are ignored."""
RESETS = struct.pack("ii", 1, 0)
_GONE = (OSError, asyncio.IncompleteReadError, PeerProtocolError, ConfigError)


class Target(NamedTuple):
    """The node that is attacked.

    Attributes:
        address: where it listens.
        key: the cluster's.
        identity: its own.
        prompts: root and keys of prompts, all of which it had once.
        blocks: the bytes of a block by its key.
        sums: their checksums.
    """

    address: str
    key: bytes
    identity: Identity
    prompts: Sequence[bytes]
    blocks: Mapping[bytes, bytes]
    sums: Mapping[bytes, int]

    @property
    def block_bytes(self) -> int:
        """Return the bytes of a block."""
        return len(next(iter(self.blocks.values())))


class _Given(NamedTuple):
    """A grant: the keys that were asked, and from where on how many blocks were granted.

    Attributes:
        asked: how many blocks each READ of it has asked for.
    """

    keys: bytes
    first: int
    count: int
    asked: list[int]

    def key(self, position: int) -> bytes:
        """Return the key of the block at a position."""
        return self.keys[(position + 1) * BLOCK_KEY_BYTES : (position + 2) * BLOCK_KEY_BYTES]


class _Wire(NamedTuple):
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_own: bool
    """Whether it was introduced as the attacker's own life, whose grants those are."""


class HostilePeer:
    """One attacker.

    Attributes:
        read_blocks: how many blocks it has read.
        refused: how many READs were refused.
        too_often: how many of them because of what was read before.
        ended: how many connections its target has ended.
    """

    def __init__(self, target: Target, seed: int, others: list[HostilePeer]) -> None:
        """Connect to nobody yet; `others` may be attackers whose grants it tries to read."""
        self._target, self._random, self._others = target, random.Random(seed), others
        self.id = PeerId(self._random.randbytes(16), self._random.getrandbits(63))
        self._number = self._random.getrandbits(40)
        self._control: _Wire | None = None
        self._data: _Wire | None = None
        self.given: dict[int, _Given] = {}
        self._released: dict[int, _Given] = {}
        """Grants that the target has ended: it sends nothing of them."""
        self._doubtful: dict[int, _Given] = {}
        """Grants whose link was closed: the target ends them once it notices."""
        self._recorded: list[bytes] = []
        self._by_sum = {total: key for key, total in target.sums.items()}
        self.read_blocks = self.refused = self.too_often = self.ended = 0

    async def run(self, steps: int) -> None:
        """Do so many things, one after the other."""
        does = [
            *[self._want] * 8, *[self._read] * 16, *[self._release] * 2, self._snapshot,
            self._garbage, self._end_one, self._replay, self._read_and_go,
            *[self._read_on] * 2,
        ]  # fmt: skip
        for _ in range(steps):
            try:
                async with asyncio.timeout(PATIENCE_S):
                    if self._control is not None:
                        self._control.writer.write(framed(Ping(UNHEARD)))
                    await self._random.choice(does)()
            except _GONE:
                self.ended += 1
                self._drop_control()
                self._drop_data()

    def close(self) -> None:
        """Close everything."""
        self._drop_control()
        self._drop_data()

    # -- connections ----------------------------------------------------------------------------

    async def _connected(self, purpose: Purpose) -> _Wire:
        """Return a connection; now and then it is introduced with lies."""
        target, chance = self._target, self._random
        peer = await tcp.connected(target.address)
        ours = target.identity._replace(peer_id=self.id).introduction(purpose)
        if chance.random() < 0.1:
            lies = [{"pool": "other"}, {"generation": 7}, {"facts": {"x": 1}}, {"facts": {}}]
            if purpose == "data":
                lies += [{"life": 0}, {"node_id": self._target.identity.peer_id.node_id}]
            ours = msgspec.structs.replace(ours, **chance.choice(lies))
        try:
            await prove_to_owner(peer, target.key)
            await introduce_to_owner(peer, ours, target.identity.peer_id)
        except BaseException:
            peer.close()
            raise
        reader, writer = await asyncio.open_connection(sock=peer, limit=1 << 22)
        return _Wire(reader, writer, ours.peer_id == self.id)

    async def _link(self) -> _Wire:
        if self._control is None:
            self._control = await self._connected("control")
        return self._control

    async def _lane(self) -> _Wire:
        if self._data is None:
            self._data = await self._connected("data")
        return self._data

    def _drop_control(self) -> None:
        _drop(self._control, self._random)
        self._control = None
        self._doubtful.update(self.given)
        self.given.clear()

    def _drop_data(self) -> None:
        _drop(self._data, self._random)
        self._data = None

    async def _end_one(self) -> None:
        """End one of the connections."""
        if self._random.random() < 0.3:
            self._drop_control()
        else:
            self._drop_data()

    # -- control --------------------------------------------------------------------------------

    def _say(self, message: Message) -> bytes:
        frame = framed(message)
        self._recorded = [*self._recorded[-20:], frame]
        return frame

    async def _ask(self, message: Message, number: int) -> FromOwner:
        """Send a message, and return what is answered under a number."""
        link = await self._link()
        link.writer.write(self._say(message))
        while True:
            told = await _message(link)
            if getattr(told, "number", None) == number:
                return told

    async def _want(self) -> None:
        """Ask for blocks: some that are there, and some with keys or ranges that make no sense."""
        chance, prompts = self._random, self._target.prompts
        keys, (first, last) = chance.choice(prompts), sorted(chance.sample(range(41), 2))
        group = generation = 0
        self._number += 1
        number = self._number
        lie = chance.randrange(24)
        if lie < 5:
            keys = [
                _mixed(keys, chance),
                _mixed(chance.choice(prompts) + keys, chance),
                keys[: chance.randrange(len(keys))],
                chance.randbytes(chance.randrange(2000)),
                bytes(BLOCK_KEY_BYTES) + keys[BLOCK_KEY_BYTES:],
            ][lie]
        elif lie == 5:
            first, last = chance.choice(
                [(last, first), (0, 65_536), (65_535, 65_536), (40, 41), (0, 0)]
            )
        elif lie == 6:
            group = chance.randrange(32)
        elif lie == 7:
            generation = chance.choice([1, (1 << 63) - 1])
        elif lie == 8:
            number = chance.choice([*self.given, *self._released, 0, number])
        want = Want(number, keys, first, last, group, generation, chance.random() < 0.2)
        told = await self._ask(want, number)
        assert isinstance(told, Grant | Busy | Refused), told
        if isinstance(told, Busy):
            await asyncio.sleep(told.after_ms / 1000)
        if isinstance(told, Grant):
            assert told.first == first
            assert told.count <= last - first
            assert told.places is None
            if told.count:
                self.given[number] = _Given(keys, first, told.count, [])
                self._released.pop(number, None)

    async def _release(self) -> None:
        """Release something, and wait until that has happened."""
        chance = self._random
        number = chance.choice([*self.given, *self._released, self._number + 1000])
        link = await self._link()
        for _ in range(chance.randrange(1, 3)):
            link.writer.write(self._say(Release(number)))
        given = self.given.pop(number, None)
        await self._pinged()
        if given is not None:
            self._released[number] = given

    async def _pinged(self) -> None:
        """Return once the target has done everything that was said over the control link."""
        self._number += 1
        await self._ask(Ping(self._number), self._number)

    async def _snapshot(self) -> None:
        """Read parts of snapshots, and not always to their ends."""
        for _ in range(self._random.randrange(1, 5)):
            self._number += 1
            told = await self._ask(SnapshotWanted(self._number), self._number)
            assert isinstance(told, SnapshotPart | Refused)

    async def _garbage(self) -> None:
        """Say what is no message, or only part of one, over one of the connections."""
        chance = self._random
        wire = await (self._link() if chance.random() < 0.5 else self._lane())
        length = chance.choice([0, 5, FRAME_BYTES_MAX, FRAME_BYTES_MAX + 1, (1 << 32) - 1])
        said = [
            chance.randbytes(chance.randrange(1, 200)),
            length.to_bytes(4, "little") + chance.randbytes(50),
            framed(Want(1, bytes(64), 0, 2))[: chance.randrange(1, 60)],
            _framed(["want", 1]),
            _framed(["want", -1, b"", 1 << 63, None]),
            _framed(["want", 1, bytes(64), 0, 2, 32, 0, False]),
            _framed(["snapshot", 1 << 63, 0]),
            _framed(["grant", 1, 0, 2]),
            _framed({"want": chance.random()}),
        ]
        wire.writer.write(chance.choice(said))
        self._drop_control()
        self._drop_data()

    async def _replay(self) -> None:
        """Say what was said before, by this attacker or another one."""
        chance = self._random
        frames = [*self._recorded, *chance.choice([self, *self._others])._recorded]
        self._doubtful.update(self._released)  # they may be granted again
        self._released.clear()
        link = await self._link()
        for frame in chance.choices(frames, k=3) if frames else []:
            link.writer.write(frame)
        self._drop_control()  # what it gets for them is not known

    # -- data -----------------------------------------------------------------------------------

    def _some_read(self) -> Read:
        """Return a READ of something granted, or not."""
        chance, size = self._random, self._target.block_bytes
        other = chance.choice([self, *self._others])
        nothing = {n: _Given(b"", chance.randrange(40), 40, []) for n in (0, (1 << 64) - 1)}
        wrong = [self._released, self._doubtful, other.given, nothing]
        grants = self.given if chance.random() < 0.7 else chance.choice(wrong)
        number, given = chance.choice([*grants.items()] or [*nothing.items()])
        begin = chance.randrange(given.count)
        blocks = chance.randrange(1, min(64, given.count - begin) + 1)
        first = given.first + begin
        match chance.randrange(12):
            case 0:
                first = chance.choice([0, given.first - 1, given.first + given.count, 4294967295])
            case 1:
                blocks = chance.choice([given.count + 1, 64, 65, 0, 4294967295])
            case 2:
                size = chance.choice([0, 1, size - 1, size + 1, 2 * size, 1 << 30, (1 << 64) - 1])
            case _:
                pass
        given.asked.append(min(blocks, 64))
        return Read(number, max(0, first), blocks, size)

    async def _read_on(self) -> None:
        """Read a grant over and over."""
        if self.given:
            number, given = self._random.choice([*self.given.items()])
            read = Read(number, given.first, min(64, given.count), self._target.block_bytes)
            for _ in range(READS_EACH + 1):
                given.asked.append(read.blocks)
                await self._get(read)

    async def _read(self) -> None:
        """Read something granted, or not."""
        await self._get(self._some_read())

    async def _get(self, read: Read) -> None:
        """Send a READ, and check what comes."""
        lane = await self._lane()
        lane.writer.write(read.packed())
        head = await lane.reader.readexactly(HEADER_BYTES)
        _, status, *rest = struct.unpack("<IIQIIQ", head)
        assert Read(*rest) == read
        grants = {**self._doubtful, **self.given} if lane.is_own else {}
        given = grants.get(read.number)
        if status != Status.OK:
            self.refused += 1
            if status == Status.TOO_OFTEN:
                assert given is not None
                is_often = sum(given.asked) > READS_EACH * given.count
                assert is_often or read.number in self._doubtful  # it may be of a replayed want
                self.too_often += 1
                return
            if given is not None and read.number in self.given and self._is_right(read, given):
                await self._pinged()  # or the link has ended, since nothing was said for long
                raise AssertionError(f"{read} was refused: {status}; {given.first=} {given.count=}")
            return
        assert given is not None, f"{read} is of no grant of this node"
        assert self._is_right(read, given) or read.number in self._doubtful
        sums = struct.unpack(f"<{read.blocks}Q", await _exactly(lane, SUM_BYTES * read.blocks))
        for position, total in enumerate(sums, read.first):
            key = given.key(position)
            if read.number in self._doubtful:  # an older want of this number may be replayed
                key = self._by_sum[total]
            assert total == self._target.sums[key]
            assert await _exactly(lane, read.block_bytes) == self._target.blocks[key]
            self.read_blocks += 1

    def _is_right(self, read: Read, given: _Given) -> bool:
        """Return whether a READ asks for a part of a grant."""
        is_within = (
            given.first <= read.first and read.first + read.blocks <= given.first + given.count
        )
        return is_within and read.block_bytes == self._target.block_bytes

    async def _read_and_go(self) -> None:
        """Ask for blocks and do not take them; release them, or end a connection, meanwhile."""
        chance, lane = self._random, await self._lane()
        for _ in range(chance.randrange(1, 4)):
            lane.writer.write(self._some_read().packed())
        await asyncio.sleep(0)
        if self.given and chance.random() < 0.5:
            await self._release()
        elif chance.random() < 0.5:
            self._drop_control()
        self._drop_data()


async def _exactly(wire: _Wire, count: int) -> bytes:
    return await wire.reader.readexactly(count)


async def _message(link: _Wire) -> FromOwner:
    head = await _exactly(link, FRAMING.head_bytes)
    return FROM_OWNER.decode(await _exactly(link, FRAMING.length_of(head)))


def _framed(value: object) -> bytes:
    """Return a frame with something that need not be a message."""
    body = msgspec.msgpack.encode(value)
    return FRAMING.head_of(body) + body


def _mixed(keys: bytes, chance: random.Random) -> bytes:
    """Return keys in another order, some of them twice or not at all."""
    rows = [keys[at : at + BLOCK_KEY_BYTES] for at in range(0, len(keys), BLOCK_KEY_BYTES)]
    for _ in range(chance.randrange(1, 6)):
        rows[chance.randrange(len(rows))] = chance.choice([*rows, chance.randbytes(16)])
    return b"".join(rows)


def _drop(wire: _Wire | None, chance: random.Random) -> None:
    """End a connection, in one of several ways."""
    if wire is None:
        return
    with suppress(OSError):
        if chance.random() < 0.3:
            own: socket.socket = wire.writer.get_extra_info("socket")
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
        if chance.random() < 0.5:
            wire.writer.transport.abort()
        else:
            wire.writer.close()
