"""The start of each connection between nodes: proofs of the key, then introductions.

    reader                                        owner
      magic, version, nonce  ────────────────▶                      (12 + 32 bytes)
                             ◀────────────────    magic, version, nonce
      proof                  ────────────────▶                      (32 bytes)
                             ◀────────────────    proof, Introduction
      Introduction           ────────────────▶    then the connection is for control or for data

A proof is HMAC-SHA256(key, role ‖ SHA-256 of everything that was said before it), so what was
recorded or sent the other way proves nothing: both nonces are fresh. The owner proves nothing
before the reader has: a stranger learns the version and no more. Up to the reader's proof the owner
reads at most 76 bytes, of fixed lengths; there is nothing to parse. The first 12 bytes are the same
in all versions, so that two versions can tell each other apart.

Everything is read in its exact length, so that what follows is still in the socket: an owner hands
a data connection over as a bare socket.

What the handshake does not do: the bytes that follow are neither encrypted nor signed. Whoever
controls the network between two nodes can read and change them.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

from flexkv.cluster.wire import (
    FRAMING,
    INTRODUCTION,
    INTRODUCTION_BYTES_MAX,
    Introduction,
    PeerId,
    PeerProtocolError,
    Purpose,
    framed,
    length_of,
    understood,
)
from flexkv.common.errors import ConfigError

VERSION = 1
HANDSHAKE_S = 5.0
"""How long the proofs may take, and the introductions again."""
NONCE_BYTES = PROOF_BYTES = 32
_MAGIC = b"FlexKV\xf1\n"
_HEAD = struct.Struct("<8sI")
HELLO_BYTES = _HEAD.size + NONCE_BYTES
_REST_BYTES_MAX = 256


class Identity(NamedTuple):
    """What a node says about itself; `generation` returns that of now."""

    peer_id: PeerId
    pool: str
    facts: Mapping[str, int | str]
    generation: Callable[[], int]

    def introduction(self, purpose: Purpose) -> Introduction:
        """Return what to send at the start of a connection."""
        node_id, life = self.peer_id
        return Introduction(node_id, life, purpose, self.pool, self.generation(), self.facts)


async def prove_to_owner(peer: socket.socket, key: bytes) -> None:
    """Prove to an owner that we know the key, and check that it does.

    Raises:
        OSError: the connection broke.
        ConfigError: it speaks another version.
        PeerProtocolError: it is no node of this cluster.
    """
    loop = asyncio.get_running_loop()
    hello = _HEAD.pack(_MAGIC, VERSION) + secrets.token_bytes(NONCE_BYTES)
    await loop.sock_sendall(peer, hello)
    head = await read(peer, _HEAD.size)
    _check_version(head)
    said = hello + head + await read(peer, NONCE_BYTES)
    proof = _proof(key, b"reader", said)
    await loop.sock_sendall(peer, proof)
    try:
        theirs = await read(peer, PROOF_BYTES)
    except PeerProtocolError as error:
        raise PeerProtocolError("it did not accept our proof: are the secrets equal?") from error
    if not hmac.compare_digest(theirs, _proof(key, b"owner", said + proof)):
        raise PeerProtocolError("it does not know our secret")


async def prove_to_reader(peer: socket.socket, key: bytes) -> None:
    """Let a reader prove that it knows the key, then prove it to the reader.

    Raises:
        OSError: the connection broke.
        ConfigError: it speaks another version, which it is told.
        PeerProtocolError: it is no node of this cluster.
    """
    loop = asyncio.get_running_loop()
    head = await read(peer, _HEAD.size)
    try:
        _check_version(head)
    except ConfigError:
        await loop.sock_sendall(peer, _HEAD.pack(_MAGIC, VERSION))
        await _end(peer)
        raise
    hello = head + await read(peer, NONCE_BYTES)
    challenge = _HEAD.pack(_MAGIC, VERSION) + secrets.token_bytes(NONCE_BYTES)
    await loop.sock_sendall(peer, challenge)
    theirs = await read(peer, PROOF_BYTES)
    said = hello + challenge
    if not hmac.compare_digest(theirs, _proof(key, b"reader", said)):
        raise PeerProtocolError("it does not know our secret")
    await loop.sock_sendall(peer, _proof(key, b"owner", said + theirs))


async def introduce_to_owner(peer: socket.socket, ours: Introduction, wanted: PeerId) -> None:
    """Check that an owner is who it should be, with blocks like ours, and introduce ourselves.

    Raises:
        OSError: the connection broke.
        ConfigError: its blocks are not like ours; the error names the field.
        PeerProtocolError: it is another node, or a later life of it.
    """
    theirs = await _introduction(peer)
    check_alike(ours, theirs)
    if theirs.peer_id != wanted:
        has = "another life of it" if theirs.node_id == wanted.node_id else "another node"
        raise PeerProtocolError(f"{has} has its address now")
    await asyncio.get_running_loop().sock_sendall(peer, framed(ours))


async def introduce_to_reader(peer: socket.socket, ours: Introduction) -> Introduction:
    """Introduce ourselves to a reader, and return who it is; the caller checks what it says.

    Raises:
        OSError: the connection broke.
        PeerProtocolError: it sent something else.
    """
    await asyncio.get_running_loop().sock_sendall(peer, framed(ours))
    return await _introduction(peer)


def check_alike(ours: Introduction, theirs: Introduction) -> None:
    """Check that the blocks of two nodes are the same, and that they are two.

    Raises:
        ConfigError: they are not; the error names the field.
    """
    if theirs.node_id == ours.node_id:
        raise ConfigError("node_id", theirs.node_id.hex(), "is that of this node itself")
    for name in (*ours.facts, *theirs.facts):
        _check_equal(name, ours.facts.get(name), theirs.facts.get(name))
    _check_equal("pool", ours.pool, theirs.pool)
    _check_equal("generation", ours.generation, theirs.generation)


def _check_equal(field: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise ConfigError(field, theirs, f"is {ours!r} on this node: such nodes share no blocks")


async def read(peer: socket.socket, count: int) -> bytes:
    """Read exactly `count` bytes.

    Raises:
        OSError: the connection broke.
        PeerProtocolError: the peer closed the connection first.
    """
    loop = asyncio.get_running_loop()
    got = bytearray()
    while len(got) < count:
        more = await loop.sock_recv(peer, count - len(got))
        if not more:
            raise PeerProtocolError("it closed the connection")
        got += more
    return bytes(got)


def _check_version(head: bytes) -> None:
    magic, version = _HEAD.unpack(head)
    if magic != _MAGIC:
        raise PeerProtocolError("it is not a FlexKV node")
    if version != VERSION:
        why = f"this node speaks version {VERSION}: use the same FlexKV everywhere"
        raise ConfigError("peer_protocol_version", version, why)


def _proof(key: bytes, role: bytes, said: bytes) -> bytes:
    return hmac.digest(key, role + hashlib.sha256(said).digest(), "sha256")


async def _introduction(peer: socket.socket) -> Introduction:
    head = await read(peer, FRAMING.head_bytes)
    body = await read(peer, length_of(head, INTRODUCTION_BYTES_MAX))
    FRAMING.check(head, body)
    return understood(INTRODUCTION, body)


async def _end(peer: socket.socket) -> None:
    """Send the end of the stream and drop what is unread, so that what was sent does arrive."""
    with suppress(OSError, PeerProtocolError):
        peer.shutdown(socket.SHUT_WR)
        await read(peer, _REST_BYTES_MAX)
