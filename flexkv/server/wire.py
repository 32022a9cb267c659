"""What goes between the server and its clients and agents, over a unix socket.

    client (an engine's scheduler) ──match, start, cancel──▶ server ──copy──▶ agent (its workers)
                                   ◀──matched, state, done──        ◀─copied, ready, settle──

A frame is four bytes of length, little-endian, and a message in MessagePack. The first message is
`Hello`, the answer to it `Welcome`; agents get the descriptor of the host memory along with it.
A request is named by its instance and a number that the client gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import msgspec

from flexkv.common.errors import ConfigError, FlexKVError

PROTOCOL_VERSION = 3
FRAME_BYTES_MAX = 64 << 20
LENGTH_BYTES = 4

Role: TypeAlias = Literal["client", "agent", "control"]


class ProtocolError(FlexKVError):
    """A peer sent what it may not."""


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Anything that is sent."""


class Hello(Message, tag="hello", frozen=True):
    """Who connects, and what it takes blocks to be."""

    version: int
    role: Role
    pid: int
    facts: Mapping[str, int | str] = {}
    """As of `blocks_are`: who means other blocks is refused. Nothing for control."""
    instance: int = 0
    tp_rank: int = 0
    num_blocks: int = 0
    """Of an agent's device."""
    order: str = ""
    """Of the elements of its blocks."""
    watches: bool = False
    """Of a client: whether it wants to be told what is `Changed`."""


class Welcome(Message, tag="welcome", frozen=True):
    """The server's answer: who it is, and to agents where the host memory is."""

    version: int
    pid: int
    refusal: tuple[str, str, str] | None = None
    """Field, value, and rule that was broken: nothing follows."""
    num_host_blocks: int = 0
    block_stride_bytes: int = 0
    fd_offset_bytes: int = 0


class State(Message, tag="state", frozen=True):
    """Whether an instance's devices are all there, and how their blocks are."""

    ready: bool
    num_blocks: int
    order: str
    slot: int = 0
    """Names this state: a `Start` that was made in another one is refused."""
    generation: int = 0
    """Grows with each clear: see `flexkv.index.clears`."""


class Match(Message, tag="match", frozen=True):
    """How much is resident of a prompt: its root and block keys, 16 bytes each."""

    number: int
    keys: bytes
    first: int = 0
    """Who asks has the blocks before: of where they are nothing is told."""
    hold: bool = False
    """Keep what is found from eviction, until a `Start` or a `Release` names this number."""
    tell: bool = False
    """Tell where each block is, too, by `Changed`."""


class Release(Message, tag="release", frozen=True):
    """Let go of what matches hold."""

    numbers: tuple[int, ...]


class Matched(Message, tag="matched", frozen=True):
    """The answer, in blocks."""

    number: int
    blocks: int
    by_tier: Mapping[str, int]
    """Of those from `first` on."""


class Start(Message, tag="start", frozen=True):
    """Begin a get, put or prefetch of the blocks from `first` to the end of `keys`."""

    number: int
    operation: str
    keys: bytes
    first: int
    device_ids: bytes
    """int64, one for each block."""
    slot: int
    when_ready: bool = False
    """Wait until every rank has said `Ready`: what is put has to be written first."""
    held: int = 0
    """The match whose hold ends when this request is planned."""
    namespace_hash: str = ""
    generation: int | None = None
    """When what is put was computed: of a clear since then nothing is stored. None: now."""


class Done(Message, tag="done", frozen=True):
    """A request has ended: no device touches its blocks any more."""

    number: int
    status: str
    moved: int
    """Blocks: for a get, so many from `first` on are there."""
    error: str = ""
    took_s: float = 0.0
    """From when it could begin."""
    is_stale: bool = False
    """Whether a put stored nothing because the cache was cleared after what it reads was made."""


class Changed(Message, tag="changed", frozen=True):
    """What became resident, or is so no more, in that order; a `Done` comes after its blocks."""

    changes: tuple[tuple[bytes, str, bool], ...]
    """Block key, tier, whether it is there now."""
    lost: bool = False
    """Some changes before these are unknown: what was told means nothing any more."""


class Cancel(Message, tag="cancel", frozen=True):
    """Give requests up; each is answered all the same, with `Done`."""

    numbers: tuple[int, ...]


class Copy(Message, tag="copy", frozen=True):
    """Copy blocks between host memory and a rank's device; ids are int64."""

    token: int
    to_device: bool
    host_ids: bytes
    device_ids: bytes


class Lent(Message, tag="lent", frozen=True):
    """A rank's device is set up: copies may be asked for."""


class Copied(Message, tag="copied", frozen=True):
    """A copy has ended."""

    token: int
    error: str = ""


class Ready(Message, tag="ready", frozen=True):
    """What these puts read is written, on this rank."""

    numbers: tuple[int, ...]


class Settle(Message, tag="settle", frozen=True):
    """Tell when no device touches the blocks of these requests any more."""

    number: int
    requests: tuple[int, ...]


class Settled(Message, tag="settled", frozen=True):
    """None does."""

    number: int


class Command(Message, tag="command", frozen=True):
    """What an operator wants: see `flexkv.server.control`."""

    number: int
    verb: str
    arguments: Mapping[str, Any] = {}


class Answer(Message, tag="answer", frozen=True):
    """The outcome of a command."""

    number: int
    value: Any = None
    error: str = ""


ToServer: TypeAlias = (
    Hello | Match | Release | Start | Cancel | Lent | Copied | Ready | Settle | Command
)  # fmt: skip
FromServer: TypeAlias = Welcome | State | Matched | Done | Changed | Copy | Settled | Answer

_ENCODER = msgspec.msgpack.Encoder()
TO_SERVER: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)
FROM_SERVER: msgspec.msgpack.Decoder[FromServer] = msgspec.msgpack.Decoder(FromServer)


def framed(message: Message) -> bytes:
    """Give a message as it is sent.

    Raises:
        ConfigError: it is longer than anybody takes.
    """
    body = _ENCODER.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        raise ConfigError("message", f"{len(body)} bytes", f"at most {FRAME_BYTES_MAX} can be sent")
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def length_of(head: bytes) -> int:
    """Give the length of the message that follows a frame's head.

    Raises:
        ProtocolError: nobody sends that much.
    """
    length = int.from_bytes(head, "little")
    if length > FRAME_BYTES_MAX:
        raise ProtocolError(f"a frame of {length} bytes")
    return length
