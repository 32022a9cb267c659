"""What the scheduler's side knows of each of vLLM's requests."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from flexkv.common.terms import BlockIds
from flexkv.integration.vllm.prompt import Scopes, features_of
from flexkv.server.wire import Matched

ROOM_S = 2.0
"""How long a load is tried for which host memory has no room."""


class Load:
    """A get that is wanted, or under way."""

    __slots__ = ("again_s", "block_ids", "first", "found", "held", "keys", "number", "until_s")

    def __init__(self, keys: bytes, first: int, block_ids: list[int], found: Matched) -> None:
        self.keys, self.first, self.block_ids = keys, first, block_ids
        self.found, self.held = found, found.number
        self.number: int | None = None
        self.again_s, self.until_s = 0.0, time.monotonic() + ROOM_S


class Put(NamedTuple):
    """A put under way.

    Attributes:
        first: the first block of the prompt that it stores.
        block_ids: the device's, which it reads.
        generation: of the cache when the blocks began to be computed.
    """

    first: int
    block_ids: BlockIds
    generation: int


class Tracked:
    """What is known of one of vLLM's requests."""

    __slots__ = (
        "block_ids", "features", "finished", "found", "generation", "has_loaded", "is_stale",
        "is_told", "keys", "load", "local_blocks", "may_claim", "noted", "parts", "puts",
        "request", "scope", "stored_blocks",
    )  # fmt: skip

    def __init__(self, request: Any, scopes: Scopes, generation: int) -> None:
        self.request, self.parts = request, scopes.parts_of(request)
        self.scope = scopes.scope_of(request, self.parts)
        self.features = features_of(request)
        self.keys = b""
        self.block_ids: list[int] = []
        self.local_blocks = 0
        """That the device had when a load was offered."""
        self.stored_blocks = 0
        self.may_claim = True
        self.load: Load | None = None
        self.found: Matched | None = None
        """What is offered to it, and held."""
        self.is_told = False
        """Whether the KV events know where its blocks are."""
        self.noted = 0
        """Blocks that the KV events know."""
        self.puts: dict[int, Put] = {}
        self.finished = False
        self.generation = generation
        """The generation of the cache when its blocks began to be computed or looked for."""
        self.is_stale = False
        """Whether the cache was cleared since then, so that nothing of it is stored."""
        self.has_loaded = False
        """Whether it has loaded blocks, which are no newer than that generation."""

    def begins_anew(self, generation: int) -> None:
        """Note that it has new blocks, computed from now on, unless some were loaded."""
        if not self.has_loaded:
            self.generation, self.is_stale = generation, False
        self.has_loaded = False
