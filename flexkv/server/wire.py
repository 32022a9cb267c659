"""The messages between the server and its clients and agents, over a unix socket.

    client (an engine's scheduler) ──match, start, cancel──▶ server ──copy──▶ agent (its workers)
                                   ◀──matched, state, done──        ◀─copied, ready, settle──

The first message is `Hello`, and its answer `Welcome`, with which agents get the descriptor of the
host memory. A request is identified by its instance and a number that the client assigns.

A client also numbers its prompts. The server keeps a prompt's keys under the number for as long as
the connection lives, so that later messages carry only new keys:

    Match(keys=root, k0, k1, k2                prompt=7, known=0)
    Start(keys=              k2, k3            prompt=7, known=4)    one more block
    Start(keys=          k1                    prompt=7, known=3)    fewer: root, k0, k1

The last known key is sent again. Each key is a hash of everything before it, so the server notices
if the client means other keys than those that it has (`flexkv.server.prompts`).

A request that was started `by_layer` is copied layer by layer. For a get, each agent learns which
copies move it and when it is over, so that a worker waits for a layer without asking the server:

    GetPlanned(number=7, op_ids=(40, 41))
    Copy(op_id=90, layers=(40, 0, 1))  Copy(op_id=91, layers=(41, 0, 1))  ...
    GetEnded(number=7, moved=32)

They come over one connection, in this order. For a put, each `Ready` says how many layers are
written; the server copies those that every rank has written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from flexkv.common.errors import (
    ClosedError,
    ConfigError,
    FlexKVError,
    cause_of,
)
from flexkv.common.space import GROUPS_MAX
from flexkv.links.framing import Framing

PROTOCOL_VERSION = 9
FRAME_BYTES_MAX = 8 << 20
"""Maximum size of a message; the server accepts at most `FRAME_BYTES_OF` the peer's role."""
HELLO_BYTES_MAX = 64 << 10
NUMBERS_MAX = 4096
"""How many numbers one message may have; more are split among several messages."""
LEAVES_MAX = 1024
"""How many runs of leaves a message may have."""
PROMPTS_MAX, PROMPTS_BYTES_MAX, PROMPT_BYTES_MAX = 8192, 32 << 20, 1 << 20
"""Limits of what the server keeps per client: prompts, bytes of keys, bytes of a prompt's keys."""

Role: TypeAlias = Literal["client", "agent", "control"]
FRAME_BYTES_OF: Mapping[Role, int] = {
    "client": FRAME_BYTES_MAX,
    "agent": 1 << 20,
    "control": 64 << 10,
}

Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Numbers: TypeAlias = Annotated[tuple[Number, ...], msgspec.Meta(max_length=NUMBERS_MAX)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]
ShortText: TypeAlias = Annotated[str, msgspec.Meta(max_length=4096)]


class ProtocolError(FlexKVError):
    """A peer sent something that the protocol does not allow."""


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Any message."""


class Hello(Message, tag="hello", frozen=True):
    """Who connects, and how its blocks are defined."""

    version: int
    role: Role
    pid: int
    facts: Annotated[Mapping[str, int | str], msgspec.Meta(max_length=64)] = {}
    """From `block_identity`; a peer whose facts differ is refused. Empty for the control role."""
    instance: int = 0
    tp_rank: int = 0
    num_blocks: int = 0
    """How many blocks an agent's device has."""
    order: ShortText = ""
    """The order of the elements in a block of an agent's device."""
    watches: bool = False
    """Whether a client wants `Changed` messages."""


class Welcome(Message, tag="welcome", frozen=True):
    """The server's answer: who it is, and how the host memory is laid out."""

    version: int
    pid: int
    refusal: tuple[str, str, str] | None = None
    """Field, value, and broken rule if the peer is refused; nothing follows then."""
    tiers: tuple[ShortText, ...] = ()
    """The labels of the tiers that the server's index has."""
    num_host_blocks: Number = 0
    block_stride_bytes: Number = 0
    fd_offset_bytes: Number = 0
    far_tiers: tuple[ShortText, ...] = ()
    """The labels of the tiers that others fill: see `flexkv.index.catalogue`."""
    span_blocks: Number = 1
    """How many consecutive blocks of a prompt these tiers have, or have not, together."""


class State(Message, tag="state", frozen=True):
    """Whether all devices of an instance are connected, and what their blocks are like."""

    ready: bool
    num_blocks: Number
    order: ShortText
    epoch: Number = 0
    """Identifies this state: a `Start` that was made in another one is refused."""
    generation: Number = 0
    """Grows with each clear: see `flexkv.index.clears`."""


class Match(Message, tag="match", frozen=True):
    """Ask how much of a prompt is resident, by its root and block keys of 16 bytes each."""

    number: Number
    keys: bytes
    """The keys from the last known one on."""
    first: Number = 0
    """The client has the blocks before this one, so `Matched.by_tier` does not count them."""
    hold: bool = False
    """Whether to keep the blocks from eviction until a `Start` or `Release` names this number."""
    tell: bool = False
    """Whether to report by `Changed`, too, where each block is."""
    prompt: Number = 0
    """The number under which to keep the keys; 0 keeps nothing."""
    known: Number = 0
    """How many keys of the prompt the server has already, including the root."""
    from_first: bool = False
    """Whether the blocks before `first` need not be resident."""
    drop: Number = 0
    """How many blocks behind those found must be resident, too: see `KVGroups.drop`."""
    apart: bool = False
    """Whether to count blocks that lie far, or are coming from there, as `Matched.far`: they may
    fail to arrive. Otherwise those that are coming count as `pending`."""
    with_far: bool = False
    """Whether to count the blocks that lie far behind those found, without `apart`."""


class Forget(Message, tag="forget", frozen=True):
    """Drop the keys of these prompts."""

    prompts: Numbers


class Release(Message, tag="release", frozen=True):
    """End the holds of these matches."""

    numbers: Numbers


class Matched(Message, tag="matched", frozen=True):
    """The answer to a `Match`, in blocks."""

    number: Number
    blocks: Number
    by_tier: Mapping[str, Number]
    """How many of the blocks from `first` on each tier has."""
    pending: Number = 0
    """How many of the blocks are being filled; leaves that are being filled are not counted."""
    host_run: Number = 0
    """How many blocks, from `first` on and without a gap, host memory has. With several KV groups,
    it has the leaves of the longest prefix there, too; this is reported only with `from_first`."""
    chain: Number = 0
    """How many blocks of the chain are ready, with or without the leaves that a prefix needs."""
    far: Mapping[str, Number] = {}
    """How many blocks behind those found could be had by a prefetch, by the tier where they are
    said to be: see `Match.apart` and `Match.with_far`. With several KV groups, these are blocks of
    the chain up to the end of a prefix that is whole then; if only leaves lie far, they may be in
    host memory."""
    coming: Number = 0
    """How many of `fetched` are on their way from far tiers already."""
    fetched: Mapping[str, Number] = {}
    """How many blocks of all KV groups a prefetch waits for to bring those, by the tier that sends
    them."""
    leaves: Mapping[str, Number] = {}
    """How many leaves that the blocks from `first` on need each tier has."""


class LeafIds(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The device blocks of a run of leaves of one KV group."""

    group: Annotated[int, msgspec.Meta(ge=1, le=GROUPS_MAX - 1)]
    first: Number
    """The position of the first one in the chain."""
    step: Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]
    """From one position to the next."""
    ids: bytes
    """int64, one for each position; -1 where there is no block."""


class Start(Message, tag="start", frozen=True):
    """Begin a get, put or prefetch of the blocks from `first` to the end of `keys`."""

    number: Number
    operation: ShortText
    keys: bytes
    first: Number
    device_ids: bytes
    """int64, one for each block."""
    epoch: Number
    when_ready: bool = False
    """Whether to wait until every rank has sent `Ready` for this request."""
    held: Number = 0
    """The match whose hold ends when this request is planned."""
    namespace_hash: ShortText = ""
    generation: Number | None = None
    """In which the blocks were computed: after a later clear none is stored. None: the present."""
    prompt: Number = 0
    known: Number = 0
    """Both as in `Match`."""
    by_layer: bool = False
    """Whether to copy layer by layer; with `when_ready`, a put begins with the first layer."""
    leaves: Annotated[tuple[LeafIds, ...], msgspec.Meta(max_length=LEAVES_MAX)] = ()
    """The device blocks of other KV groups, by ascending group and then position. A get needs one
    for each leaf that its prefix needs; a put stores those that are given."""
    drop: Number = 0
    """As in `Match`, for a get or prefetch: how many of the last keys only have to be resident."""


class Done(Message, tag="done", frozen=True):
    """The end of a request: no device touches its blocks any more."""

    number: Number
    status: str
    moved: Number
    """How many blocks were moved: for a get, the first ones from `first` on."""
    error: str = ""
    took_s: Seconds = 0.0
    """How long the request took, from when it could begin."""
    is_stale: bool = False
    """Whether a put stored nothing because the cache was cleared after its blocks were computed."""
    moved_bits: bytes = b""
    """Which blocks were moved, one bit each from `first` on, if they are not the first ones."""
    cause: tuple[str, Mapping[str, Any]] | None = None
    """What kind of error it was: see `flexkv.common.errors.error_from`."""


def failed(number: int, error: FlexKVError) -> Done:
    """Return the end of a request that moved nothing, because of an error."""
    return Done(number, "failed", 0, str(error), cause=cause_of(error))


def why_unsent(blocks: int) -> FlexKVError:
    """Return why a request was not sent: 0 blocks stand for a server that is not connected."""
    if not blocks:
        return ClosedError("not connected to a server")
    why = f"must fit a message of {FRAME_BYTES_MAX} bytes, with their keys and ids"
    return ConfigError("token_ids", f"{blocks} blocks", why)


class Changed(Message, tag="changed", frozen=True):
    """What became resident or no longer is, in that order; a `Done` follows its changes."""

    changes: tuple[tuple[bytes, str, bool, int], ...]
    """Block key, tier, whether it is there now, KV group. A leaf is named by its parent's key."""
    lost: bool = False
    """Whether some changes before these are unknown, so that earlier reports are void."""


class Cancel(Message, tag="cancel", frozen=True):
    """Cancel requests; each is answered all the same, with `Done`."""

    numbers: Numbers


class Copy(Message, tag="copy", frozen=True):
    """Copy blocks between host memory and a rank's device; ids are int64."""

    op_id: Number
    to_device: bool
    host_ids: bytes
    device_ids: bytes
    group: Number = 0
    """The KV group that all the blocks are of."""
    layers: tuple[Number, Number, Number] | None = None
    """For a piece of a copy that goes layer by layer: the whole copy's id, and the piece's first
    and last layer, exclusive. None: all layers."""


class GetPlanned(Message, tag="get_planned", frozen=True):
    """These copies will move a get that goes layer by layer; those of an earlier plan are void."""

    number: Number
    op_ids: Numbers


class GetEnded(Message, tag="get_ended", frozen=True):
    """A get that goes layer by layer is over: no more of its layers will be copied."""

    number: Number
    moved: Number = 0
    """How many of its first blocks have all of their layers, on every rank."""


class DeviceReady(Message, tag="device_ready", frozen=True):
    """A rank's device is set up: copies may be requested."""


class Copied(Message, tag="copied", frozen=True):
    """A copy has ended."""

    op_id: Number
    error: ShortText = ""


class Ready(Message, tag="ready", frozen=True):
    """On this rank, what these puts read is written, and what these gets write is free."""

    numbers: Numbers
    layers: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """How many of the first layers that a put reads are written. None: all."""


class Settle(Message, tag="settle", frozen=True):
    """Ask for a `Settled` once no device touches the blocks of these requests any more."""

    number: Number
    requests: Numbers


class Settled(Message, tag="settled", frozen=True):
    """The answer to a `Settle`: no device touches those blocks any more."""

    number: Number


class Command(Message, tag="command", frozen=True):
    """A command of an operator: see `flexkv.server.control`."""

    number: Number
    verb: ShortText
    arguments: Mapping[str, Any] = {}


class Answer(Message, tag="answer", frozen=True):
    """The outcome of a command."""

    number: Number
    value: Any = None
    error: str = ""
    cause: tuple[str, Mapping[str, Any]] | None = None
    """As in `Done`."""


ToServer: TypeAlias = (
    Hello
    | Match
    | Forget
    | Release
    | Start
    | Cancel
    | DeviceReady
    | Copied
    | Ready
    | Settle
    | Command
)
FromServer: TypeAlias = (
    Welcome | State | Matched | Done | Changed | Copy | GetPlanned | GetEnded | Settled | Answer
)

TO_SERVER: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)
FROM_SERVER: msgspec.msgpack.Decoder[FromServer] = msgspec.msgpack.Decoder(FromServer)

FRAMING = Framing(FRAME_BYTES_MAX, ProtocolError)
framed, length_of, understood = FRAMING.framed, FRAMING.length_of, FRAMING.understood


def parts_of(numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """Return numbers split into parts, one for each message that is needed."""
    starts = range(0, len(numbers), NUMBERS_MAX)
    return [tuple(numbers[start : start + NUMBERS_MAX]) for start in starts]
