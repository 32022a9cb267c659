"""What the scheduler's side knows about each of vLLM's requests."""

from __future__ import annotations

from typing import Any

from flexkv.integration.common.request_transfers import RequestTransfers
from flexkv.integration.vllm.deadlines import accepted_deadline_s
from flexkv.integration.vllm.events import KVEvents
from flexkv.integration.vllm.prompt import Scopes, features_of
from flexkv.server.client import Client
from flexkv.server.prompts import PromptPart


class RequestState:
    """What is known about one of vLLM's requests."""

    __slots__ = ("ends", "features", "kept", "noted", "parts", "request", "scope", "transfers")

    def __init__(self, request: Any, scopes: Scopes, transfers: RequestTransfers) -> None:
        self.request, self.parts = request, scopes.parts_of(request)
        self.scope = scopes.scope_of(request, self.parts)
        self.features = features_of(request)
        self.transfers = transfers
        """Its keys, blocks, load and puts."""
        self.noted = 0
        """How many of its blocks the KV events know."""
        self.ends: tuple[int, ...] = ()
        """The boundaries, in blocks, whose leaves it stores when a step reaches them."""
        self.kept: set[tuple[int, int]] = set()
        """Group and position of the leaves that it has stored or loaded: most are there still."""


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
        state = self.by_id.get(request_id := request.request_id)
        if state is None:
            client = self._client
            transfers = RequestTransfers(request_id, client.new_prompt(), client.generation)
            transfers.load_deadline_s = accepted_deadline_s(request)
            state = self.by_id[request_id] = RequestState(request, self._scopes, transfers)
        return state

    def forget(self, request_id: str) -> None:
        """Forget a request that is over."""
        state = self.by_id.pop(request_id)
        self._forget_keys(state)

    def _forget_keys(self, state: RequestState) -> None:
        prompt = state.transfers.prompt
        self._client.forget(prompt)
        if self._events is not None:
            self._events.forget(state.request, bytes(prompt.keys), state.noted)

    def has_keys(self, state: RequestState) -> bool:
        """Return whether a request's blocks have keys; streamed input may change or end that."""
        if state.features != (features := features_of(state.request)):
            # Streamed input has brought an image: the keys behind it change.
            self._forget_keys(state)
            state.features = features
            state.scope = self._scopes.scope_of(state.request, state.parts)
            state.transfers.prompt, state.noted = self._client.new_prompt(), 0
        return state.scope is not None

    def part(self, state: RequestState, blocks: int) -> PromptPart:
        """Return the first blocks of a request's prompt, and make the keys that are missing.

        The tokens of these blocks must not change any more.
        """
        prompt, scope = state.transfers.prompt, state.scope
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
