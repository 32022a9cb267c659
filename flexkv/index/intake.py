"""Turns a caller's arguments into a request, or raises an error that says what is wrong with them.

Everything is checked before anything is planned, so that bad input changes nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv import _ext
from flexkv.common.errors import ConfigError
from flexkv.common.request import Operation, Request, Span, as_int64, whole_blocks
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds
from flexkv.index.clears import ClearHistory
from flexkv.index.keys import KeyChain, Namespace

_WHY = {
    "range": "is not a slot of the device, which has {slots} slots",
    "alignment": "must be the first slot of a device block: a multiple of {per_block}",
    "contiguity": "must follow the slot before it: the tokens of a block are contiguous",
}
FEW = 32
"""Up to this many block ids, a set finds a duplicate faster than an array does."""


class Intake:
    """Checks arguments and makes requests for one block space."""

    def __init__(self, keys: KeyChain, clears: ClearHistory | None = None) -> None:
        self.tokens_per_block = keys.tokens_per_block
        self._keys = keys
        self._named_by = np.zeros(0, np.int64)
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

    def root(self, namespace: Namespace) -> bytes:
        """Return the root of a namespace."""
        return self._keys.root(namespace)

    def device_ids(self, slot_mapping: Any, span: Span, device_blocks: int) -> BlockIds:
        """Return the device block of every whole block of a span: int64[blocks].

        Args:
            slot_mapping: one slot for each token from `span.first_token` to `span.last_token`.
            span: the tokens that the mask selects.
            device_blocks: how many blocks the device has.

        Raises:
            ConfigError: the length differs, or a slot breaks a rule.
        """
        slots = as_int64("slot_mapping", slot_mapping)
        wanted = span.last_token - span.first_token
        if len(slots) != wanted:
            why = f"must have one slot per selected token: {wanted}"
            raise ConfigError("slot_mapping", f"{len(slots)} slots", why)
        per_block = self.tokens_per_block
        skip = min(span.first_block * per_block - span.first_token, wanted)
        if skip:
            self._blocks_of(slots[:skip], 1, device_blocks * per_block, 0)
        ids = self._blocks_of(slots[skip:], per_block, device_blocks, skip)
        ids = ids[: span.last_block - span.first_block]
        if len(ids) > 1:
            self._check_once(ids, device_blocks, skip)
        return ids

    def _check_once(self, ids: BlockIds, device_blocks: int, skip: int) -> None:
        """Check that no device block is named twice, as its content would be undefined."""
        if len(ids) <= FEW and len(set(ids.tolist())) == len(ids):
            return
        if len(self._named_by) < device_blocks:
            self._named_by = np.zeros(device_blocks, np.int64)
        positions = np.arange(len(ids))
        # Each block's entry has the last position that names it.
        self._named_by[ids] = positions
        last = self._named_by[ids]
        if (last != positions).any():
            first = int((last != positions).argmax())
            one, other = (skip + int(at) * self.tokens_per_block for at in (first, last[first]))
            why = f"is in device block {ids[first]}, which slot_mapping[{one}] already names"
            raise ConfigError(
                f"slot_mapping[{other}]", int(ids[first]) * self.tokens_per_block, why
            )

    def _blocks_of(
        self, slots: NDArray[np.int64], per_block: int, blocks: int, offset: int
    ) -> BlockIds:
        try:
            return np.frombuffer(_ext.block_slots(slots, per_block, blocks), np.int64)
        except ValueError as error:
            index, slot, rule = error.args
            why = _WHY[rule].format(slots=blocks * per_block, per_block=per_block)
            raise ConfigError(f"slot_mapping[{index + offset}]", slot, why) from error
