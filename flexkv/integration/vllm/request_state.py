"""What the scheduler's side knows about each of vLLM's requests."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from flexkv import _ext
from flexkv.common.terms import BlockIds
from flexkv.integration.vllm.events import KVEvents
from flexkv.integration.vllm.prompt import Scopes, features_of
from flexkv.server.client import Client
from flexkv.server.prompts import Prompt, PromptPart
from flexkv.server.wire import Matched

ROOM_S = 2.0
"""How long a load for which host memory has no room is retried."""


class Load:
    """A load that is wanted, or whose get is under way."""

    __slots__ = ("again_s", "block_ids", "first", "found", "held", "keys", "number", "until_s")

    def __init__(self, keys: PromptPart, first: int, block_ids: list[int], found: Matched) -> None:
        self.keys, self.first, self.block_ids = keys, first, block_ids
        self.found, self.held = found, found.number
        self.number: int | None = None
        self.again_s, self.until_s = 0.0, time.monotonic() + ROOM_S


class Put(NamedTuple):
    """A put under way.

    Attributes:
        first: the first block of the prompt that it stores.
        block_ids: the device blocks that it reads.
        generation: the generation of the cache when computing the blocks began.
    """

    first: int
    block_ids: BlockIds
    generation: int


class RequestState:
    """What is known about one of vLLM's requests."""

    __slots__ = (
        "block_ids", "by_layer", "features", "finished", "found", "generation", "has_loaded",
        "is_stale",
        "is_told", "load", "local_blocks", "may_load", "noted", "parts", "prompt", "puts",
        "request", "scope", "stored_blocks", "was_put_off",
    )  # fmt: skip

    def __init__(self, request: Any, scopes: Scopes, generation: int, prompt: Prompt) -> None:
        self.prompt = prompt
        """The keys of its blocks, as far as they have been needed."""
        self.request, self.parts = request, scopes.parts_of(request)
        self.scope = scopes.scope_of(request, self.parts)
        self.features = features_of(request)
        self.block_ids: list[int] = []
        self.local_blocks = 0
        """How many of its blocks the device had when a load was offered."""
        self.stored_blocks = 0
        self.may_load = True
        self.was_put_off = False
        """Whether it was put off because too many matches were under way."""
        self.load: Load | None = None
        self.by_layer = False
        """Whether the step loads what was found for it, layer by layer."""
        self.found: Matched | None = None
        """The match that is offered to it, with a hold on its blocks."""
        self.is_told = False
        """Whether the server was asked to report its blocks' tiers, for KV events."""
        self.noted = 0
        """How many of its blocks the KV events know."""
        self.puts: dict[int, Put] = {}
        self.finished = False
        self.generation = generation
        """The generation of the cache when its blocks began to be computed or looked up."""
        self.is_stale = False
        """Whether the cache was cleared since then, so that none of its blocks are stored."""
        self.has_loaded = False
        """Whether it has loaded blocks, which are no newer than that generation."""

    def begins_anew(self, generation: int) -> None:
        """Record that it has new blocks, computed from now on, unless some were loaded."""
        if not self.has_loaded:
            self.generation, self.is_stale = generation, False
        self.has_loaded = False


class RequestStates:
    """The requests that the scheduler's side knows, and the keys of their blocks.

    Attributes:
        by_id: all of them, by vLLM's id.
    """

    def __init__(
        self, client: Client, scopes: Scopes, events: KVEvents | None, tokens_per_block: int
    ) -> None:
        self._client, self._scopes, self._events = client, scopes, events
        self._per_block = tokens_per_block
        self.by_id: dict[str, RequestState] = {}

    def track(self, request: Any) -> RequestState:
        """Return the state of a request; create it if the request is new."""
        state = self.by_id.get(request.request_id)
        if state is None:
            client = self._client
            state = self.by_id[request.request_id] = RequestState(
                request, self._scopes, client.generation, client.new_prompt()
            )
        return state

    def forget(self, request_id: str) -> None:
        """Forget a request that is over."""
        state = self.by_id.pop(request_id)
        self._forget_keys(state)

    def _forget_keys(self, state: RequestState) -> None:
        self._client.forget(state.prompt)
        if self._events is not None:
            self._events.forget(state.request, bytes(state.prompt.keys), state.noted)

    def has_keys(self, state: RequestState) -> bool:
        """Return whether a request's blocks have keys; streamed input may change or end that."""
        if state.features != (features := features_of(state.request)):
            # Streamed input has brought an image: the keys behind it change.
            self._forget_keys(state)
            state.features = features
            state.scope = self._scopes.scope_of(state.request, state.parts)
            state.prompt, state.noted = self._client.new_prompt(), 0
        return state.scope is not None

    def part(self, state: RequestState, blocks: int) -> PromptPart:
        """Return the first blocks of a request's prompt, and make the keys that are missing.

        The tokens of these blocks must not change any more.
        """
        prompt, scope = state.prompt, state.scope
        if (known := prompt.blocks) < blocks:
            request, end = state.request, blocks * self._per_block
            assert scope is not None
            if prompt.keys and not scope.extra_keys:
                # A slice of vLLM's tokens is a list.
                self._client.extend(prompt, request.all_token_ids[known * self._per_block : end])
            else:
                prompt.keys[:] = self._client.keys(_first_tokens(request, end), scope)
            if self._events is not None:
                state.noted = self._events.note(request, bytes(prompt.keys), state.noted)
        return PromptPart(prompt, blocks)


def _first_tokens(request: Any, end: int) -> list[int]:
    """Return a request's tokens, up to `end` at least: its prompt, uncopied, if long enough."""
    prompt = getattr(request, "prompt_token_ids", None)
    if type(prompt) is list and len(prompt) >= end:
        return prompt
    tokens: list[int] = request.all_token_ids[:end]
    return tokens


def ids_of(ids: list[int]) -> BlockIds:
    """Return block ids as an int64 array, in a fifth of the time that numpy needs for a list."""
    return np.frombuffer(_ext.pack_int64(ids), np.int64)
