"""What nodes tell each other through the cluster's store: who they are, and what they have.

    beat     who a node is, and the seq of its latest entry      replaced every few seconds
    entry    life │ seq │ added │ moved │ dropped                 one per publish interval at most
                          └──────── tags of spans ────────┘

A life's entries are numbered from 1 without gaps, so a reader notices a lost one by the next. The
beat has the latest number, so a reader notices also if no next one comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, NamedTuple, TypeAlias

import msgspec
import numpy as np

from flexkv.common.decoding import decoded
from flexkv.common.errors import MalformedError
from flexkv.index.spans import rows_of

TAG_BYTES: Final = 8
"""A span's tag is the beginning of its key, as long as hints need it."""
VERSION: Final = 1
STREAMS: Final = 8
"""Few, since each poll of a reader costs the store some time for every stream."""
ENTRY_SPANS_MAX: Final = 2048
"""How many tags an entry has at most: 16 KiB."""
FAREWELL: Final = (1 << 64) - 1
"""The seq of what a node says when it leaves."""

_U64 = Annotated[int, msgspec.Meta(ge=0)]
_Text = Annotated[str, msgspec.Meta(max_length=255)]


class NodeRecord(msgspec.Struct, frozen=True, array_like=True):
    """Who a node is.

    Attributes:
        id: of the node, 16 bytes. It may be the same after a restart.
        life: 64 random bits, other ones after each start.
        address: where it answers other nodes.
        zone: nodes of one zone are near each other.
        version: of what it says.
    """

    id: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    life: _U64
    address: _Text
    zone: _Text = ""
    version: int = VERSION

    @property
    def stream(self) -> int:
        """Return the stream that has the entries of this life."""
        return self.life % STREAMS


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """What the registry has of a node.

    Attributes:
        node: who it is.
        seq: of its latest entry that the store has accepted.
        count: how many beats there were before, so that no two of a life are the same.
    """

    node: NodeRecord
    seq: _U64 = 0
    count: _U64 = 0


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What changed on a node in one publish interval: tags of spans, joined.

    Attributes:
        life: of the node.
        seq: the number of the entry.
        added: spans that are in host memory.
        moved: spans that are only on its disk.
        dropped: spans that it has no longer.
    """

    life: _U64
    seq: _U64
    added: bytes = b""
    moved: bytes = b""
    dropped: bytes = b""

    @property
    def spans(self) -> int:
        """Return how many spans it tells of."""
        return (len(self.added) + len(self.moved) + len(self.dropped)) // TAG_BYTES


class SpanTags(NamedTuple):
    """Some of the spans that a node has: a part of its snapshot.

    Attributes:
        seq: of the latest entry when the snapshot began. All later entries must be applied to it.
        on_host: tags of spans in host memory.
        on_disk: tags of spans that are only on disk.
        is_last: whether the snapshot is whole with this part.
    """

    seq: int
    on_host: bytes
    on_disk: bytes
    is_last: bool


Told: TypeAlias = tuple[bytes, bytes, bytes]
"""Tags of spans that were added, moved and dropped."""

_ENCODER = msgspec.msgpack.Encoder()
_BEATS = msgspec.msgpack.Decoder(Beat)
_ENTRIES = msgspec.msgpack.Decoder(Entry)


def encoded(what: Beat | Entry) -> bytes:
    """Return the bytes that a store keeps."""
    return _ENCODER.encode(what)


def beat_from(data: bytes) -> Beat:
    """Return a beat.

    Raises:
        MalformedError: it is none.
    """
    return decoded(_BEATS, data)


def entry_from(data: bytes) -> Entry:
    """Return an entry.

    Raises:
        MalformedError: it is none.
    """
    entry = decoded(_ENTRIES, data)
    if (len(entry.added) | len(entry.moved) | len(entry.dropped)) % TAG_BYTES:
        raise MalformedError(len(data), "a tag of a span is cut")
    return entry


def entries_of(life: int, first_seq: int, told: Told) -> list[Entry]:
    """Return the entries that tell of these spans, one at least; none of them is too large."""
    entries: list[Entry] = []
    rest = list(told)
    while not entries or any(rest):
        room_bytes, taken = ENTRY_SPANS_MAX * TAG_BYTES, []
        for number, tags in enumerate(rest):
            taken.append(tags[:room_bytes])
            rest[number] = tags[room_bytes:]
            room_bytes -= len(taken[-1])
        entries.append(Entry(life, first_seq + len(entries), *taken))
    return entries


def tags_of(keys: Sequence[bytes] | bytes) -> bytes:
    """Return the tags of spans, joined, from their keys, joined or not."""
    joined = keys if isinstance(keys, bytes) else b"".join(keys)
    return np.ascontiguousarray(rows_of(joined)[:, :TAG_BYTES]).tobytes()
