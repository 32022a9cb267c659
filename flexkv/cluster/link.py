"""Control links between nodes: their limits."""

from __future__ import annotations

import socket
from typing import TypeVar

import msgspec

from flexkv.cluster.wire import FRAME_BYTES_MAX, FRAMING
from flexkv.links.link import Link

T = TypeVar("T")

UNSENT_BYTES_MAX = 16 * FRAME_BYTES_MAX
"""A node that leaves this much unread is cut off: nobody waits for it."""
PING_S, SILENCE_S = 1.0, 4.0
"""A reader sends a Ping this often; a link on which nothing arrives for so long is closed."""


async def control_link(connected: socket.socket, decoder: msgspec.msgpack.Decoder[T]) -> Link[T]:
    """Return a control link over a connected socket, which the link closes."""
    link = await Link.over(connected, FRAMING, decoder)
    link.unsent_bytes_max = UNSENT_BYTES_MAX
    return link
