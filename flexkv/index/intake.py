"""Turns a caller's arguments into a request, or raises an error that says what is wrong with them.

Everything is checked before anything is planned, so that bad input changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Any

from msgspec import structs

from flexkv.common.errors import ConfigError
from flexkv.common.request import Operation, Request, Span, as_int64, whole_blocks
from flexkv.common.space import BlockSpace
from flexkv.common.terms import BLOCK_KEY_BYTES
from flexkv.index.clears import ClearHistory
from flexkv.index.keys import KeyChain, Namespace
from flexkv.index.slots import SlotReader


class Intake:
    """Checks arguments and makes requests for one model."""

    def __init__(
        self,
        keys: KeyChain,
        clears: ClearHistory | None = None,
        spaces: Sequence[BlockSpace] = (),
    ) -> None:
        """Derive keys with `keys`; `spaces` are those of all KV groups, by default of one."""
        self.tokens_per_block = keys.tokens_per_block
        self._keys = keys
        per_block = [space.tokens_per_block for space in spaces] or [keys.tokens_per_block]
        self._slots = SlotReader(per_block)
        self._unit_tokens = lcm(*per_block)
        self._clears = clears or ClearHistory()

    def rekey(self, keys: KeyChain) -> None:
        """Use other keys from now on."""
        self._keys = keys

    def request(
        self,
        operation: Operation,
        request_id: int,
        token_ids: Any,
        token_mask: Any = None,
        namespace: Namespace = None,
    ) -> Request:
        """Return the request, without its device ids.

        Raises:
            ConfigError: an argument breaks a rule.
        """
        # A list is hashed as it is: converting it to an array would cost more than the hashing.
        tokens = token_ids if type(token_ids) is list else as_int64("token_ids", token_ids)
        per_block = self.tokens_per_block
        span = whole_blocks(token_mask, len(tokens), per_block)
        if operation is Operation.GET and self._unit_tokens > per_block:
            self._check_mask(span)
        keys = self._keys.keys(tokens, namespace)
        return Request(
            operation,
            request_id,
            len(tokens),
            per_block,
            span,
            keys[: (span.last_block + 1) * BLOCK_KEY_BYTES],
            None,
            self._keys.namespace_hash(namespace),
            None,
            self._clears.generation,
        )

    def _check_mask(self, span: Span) -> None:
        """Check that a get's mask begins where blocks of all KV groups do.

        The prefix may need a larger block that begins before the mask, which has no slots for it.

        Raises:
            ConfigError: it begins elsewhere.
        """
        first, unit = span.first_token, self._unit_tokens
        if first % unit and first < span.last_token:
            why = f"must begin on a multiple of {unit} tokens, where blocks of all KV groups begin"
            raise ConfigError("token_mask", f"True from token {first} on", why)

    def root(self, namespace: Namespace) -> bytes:
        """Return the root of a namespace."""
        return self._keys.root(namespace)

    def with_slots(self, request: Request, slot_mapping: Any, device_blocks: int) -> Request:
        """Return a request with its device blocks.

        Args:
            request: a request without device blocks.
            slot_mapping: one slot for each selected token, or a list of such arrays, one for each
                KV group: see `SlotReader.read`.
            device_blocks: how many blocks the device has in each group.

        Raises:
            ConfigError: the number of arrays or a length differs, or a slot breaks a rule.
        """
        ids, leaves = self._slots.read(slot_mapping, request.span, device_blocks)
        return structs.replace(request, device_ids=ids, leaves=leaves)
