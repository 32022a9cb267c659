"""The messages of a control link between two nodes.

    reader ──want, release, snapshot wanted, ping──▶ owner
           ◀──grant, busy, refused, snapshot part, pong──

The *owner* has blocks, the *reader* asks for them; two nodes that read from each other have two
links.

    Want(7, root + keys, first=16, last=48)
    Grant(7, first=16, count=24)              the owner keeps these 24 in host memory, and says
                                              where they are if that was asked
    …                                         the reader reads them over data connections
    Release(7)

Numbers are the reader's, and unique during its life. Each Want is answered by one Grant, Busy or
Refused, unless a Release or the end of the link overtakes the answer. A Release of something that
has ended already is ignored: the two may cross.

Messages have checksums. A bit that flips unnoticed in a Want could name another KV group or another
grant, whose blocks would then arrive with the right checksums of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple, TypeAlias

import msgspec

from flexkv.cluster.records import TAG_BYTES
from flexkv.common.errors import FlexKVError
from flexkv.common.space import GROUPS_MAX
from flexkv.common.terms import BLOCK_KEY_BYTES
from flexkv.links.framing import Framing

WANT_BLOCKS_MAX = 65_536
"""The longest prompt whose keys fit in a Want."""
KEYS_BYTES_MAX = (WANT_BLOCKS_MAX + 1) * BLOCK_KEY_BYTES
PART_TAGS = 65_536
"""How many tags one SnapshotPart may have."""
FRAME_BYTES_MAX = KEYS_BYTES_MAX + 4096
INTRODUCTION_BYTES_MAX = 64 << 10
TEXT_MAX = 512
NODE_ID_BYTES = 16
WITHIN_MS_MAX = 60_000
"""The largest `Want.within_ms`."""

Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Position: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=WANT_BLOCKS_MAX)]
ShortText: TypeAlias = Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
Tags: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=PART_TAGS * TAG_BYTES)]
Facts: TypeAlias = Annotated[Mapping[ShortText, int | str], msgspec.Meta(max_length=64)]
Purpose: TypeAlias = Literal["control", "data"]


class PeerProtocolError(FlexKVError):
    """Another node sent something that the protocol does not allow."""


class PeerId(NamedTuple):
    """One life of a node: it gets another one when it restarts."""

    node_id: bytes
    life: int

    def __str__(self) -> str:
        return self.node_id.hex()[:8]


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Any message."""


class Introduction(Message, tag="introduction", frozen=True):
    """Who is at this end of a connection, and what its blocks are; sent after the handshake."""

    node_id: Annotated[bytes, msgspec.Meta(min_length=NODE_ID_BYTES, max_length=NODE_ID_BYTES)]
    life: Annotated[int, msgspec.Meta(ge=0)]
    purpose: Purpose
    pool: ShortText
    generation: Number
    facts: Facts
    """What determines blocks and their keys, by name. All must be equal at both ends."""

    @property
    def peer_id(self) -> PeerId:
        """Return whose life this is."""
        return PeerId(self.node_id, self.life)


class Want(Message, tag="want", frozen=True):
    """Ask the owner to keep blocks of a prompt in host memory, so that they can be read."""

    number: Number
    keys: Annotated[bytes, msgspec.Meta(max_length=KEYS_BYTES_MAX)]
    """The root, and the keys of the prompt's blocks from the first one on."""
    first: Position
    last: Position
    """Exclusive."""
    group: Annotated[int, msgspec.Meta(ge=0, lt=GROUPS_MAX)] = 0
    """The KV group. Of a group other than 0, these are the leaves with parents in that range."""
    generation: Number = 0
    """That of the reader; an owner of another one refuses."""
    with_places: bool = False
    """Whether the reader can use `Grant.places`."""
    within_ms: Annotated[int, msgspec.Meta(ge=0, le=WITHIN_MS_MAX)] = WITHIN_MS_MAX
    """How long the reader waits for the answer."""


class Release(Message, tag="release", frozen=True):
    """End a grant, or a Want that is not answered yet."""

    number: Number


class SnapshotWanted(Message, tag="snapshot", frozen=True):
    """Ask for everything that the owner has, or for the next part if the number is in use."""

    number: Number
    generation: Number = 0


class Ping(Message, tag="ping", frozen=True):
    """Ask whether the owner still answers, and show that the reader is alive."""

    number: Number


class GrantedPlaces(Message, frozen=True):
    """Where the owner's TransferEngine has the blocks of a grant; it may get another endpoint."""

    endpoint: ShortText
    addresses: Annotated[bytes, msgspec.Meta(max_length=WANT_BLOCKS_MAX * 8)]
    """int64, little-endian, one a position; -1 where there is no block."""
    sums: Annotated[bytes, msgspec.Meta(max_length=WANT_BLOCKS_MAX * 8)]
    """Their checksums: uint64, little-endian."""


class Grant(Message, tag="grant", frozen=True):
    """The owner keeps these blocks in host memory until the grant ends."""

    number: Number
    first: Position
    count: Position
    """How many, from `first` on; 0 if they are not there any more."""
    is_cut: bool = False
    """Whether a limit of the owner made it shorter; else what follows is not there."""
    places: GrantedPlaces | None = None
    """Where they are; None if it was not asked, or there is no TransferEngine."""


class Busy(Message, tag="busy", frozen=True):
    """The owner keeps too much for others already."""

    number: Number
    after_ms: Annotated[int, msgspec.Meta(ge=0, le=60_000)]


class Refused(Message, tag="refused", frozen=True):
    """The owner refuses a connection (number 0) or a request, because of a named field."""

    number: Number
    field: ShortText
    value: ShortText
    why: ShortText


def refused(number: int, field: str, value: object, why: str) -> Refused:
    """Return a refusal, with texts that are cut to what a message may have."""
    return Refused(number, *(text[:TEXT_MAX] for text in (field, str(value), why)))


class SnapshotPart(Message, tag="part", frozen=True):
    """Some of the spans that the owner has: `SpanTags`."""

    number: Number
    seq: Number
    """The last entry of the owner's log that the part includes."""
    on_host: Tags
    on_disk: Tags
    """Those that are only on disk."""
    is_last: bool


class Pong(Message, tag="pong", frozen=True):
    """The answer to a Ping."""

    number: Number


ToOwner: TypeAlias = Want | Release | SnapshotWanted | Ping
FromOwner: TypeAlias = Grant | Busy | Refused | SnapshotPart | Pong

TO_OWNER: msgspec.msgpack.Decoder[ToOwner] = msgspec.msgpack.Decoder(ToOwner)
FROM_OWNER: msgspec.msgpack.Decoder[FromOwner] = msgspec.msgpack.Decoder(FromOwner)
INTRODUCTION: msgspec.msgpack.Decoder[Introduction] = msgspec.msgpack.Decoder(Introduction)

FRAMING = Framing(FRAME_BYTES_MAX, PeerProtocolError, has_sums=True)
framed, length_of, understood = FRAMING.framed, FRAMING.length_of, FRAMING.understood
