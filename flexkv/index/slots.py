"""Reads slot mappings: which device blocks the blocks of a prompt are in.

A model with one KV group has one array of slots. A model with several has one array for each group,
in group order. A slot is the id of a device block, times the tokens of the group's own block,
plus an offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv import _ext
from flexkv.common.arguments import is_integer
from flexkv.common.config_keys import kind_of
from flexkv.common.errors import ConfigError
from flexkv.common.request import NO_BLOCK, LeafBlocks, Span, as_int64
from flexkv.common.terms import BlockIds, positions_of

_FIELD = "slot_mapping"
_WHY = {
    "range": "is not a slot of the device, which has {slots} slots",
    "alignment": "must be the first slot of a device block: a multiple of {per_block}",
    "contiguity": "must follow the slot before it: the tokens of a block are contiguous",
}
_ALL_OR_NONE = f"must be {NO_BLOCK} for every token of a block, or for none"
FEW = 32
"""Up to this many block ids, a set finds a duplicate faster than an array does."""


class SlotReader:
    """Reads the slot mappings of one model."""

    def __init__(self, tokens_per_block: Sequence[int]) -> None:
        """Take the tokens of a block of each KV group."""
        self._tokens_per_block = tuple(tokens_per_block)
        self._named_by = np.zeros(0, np.int64)

    def read(
        self, slot_mapping: Any, span: Span, device_blocks: int
    ) -> tuple[BlockIds, tuple[LeafBlocks, ...]]:
        """Return the device blocks of a span: the chain's, int64[blocks], and the other groups'.

        Args:
            slot_mapping: one slot for each token from `span.first_token` to `span.last_token`; with
                several KV groups, a sequence of such arrays. A group other than the first has -1
                for each token of a block that the caller does not have.
            span: the tokens that the mask selects.
            device_blocks: how many blocks the device has in each group.

        Raises:
            ConfigError: the number of arrays or a length differs, or a slot breaks a rule.
        """
        groups = len(self._tokens_per_block)
        if groups == 1:
            if type(slot_mapping) in (list, tuple) and slot_mapping:
                _check_one(slot_mapping)
            return self.chain(slot_mapping, span, device_blocks), ()
        chain, *others = _arrays(slot_mapping, groups)
        ids = self.chain(chain, span, device_blocks, f"{_FIELD}[0]")
        leaves = [
            self._leaves(slots, group, span, device_blocks)
            for group, slots in enumerate(others, start=1)
        ]
        return ids, tuple([each for each in leaves if len(each.device_ids)])

    def chain(
        self, slot_mapping: Any, span: Span, device_blocks: int, field: str = _FIELD
    ) -> BlockIds:
        """Return the device block of every whole block of a span: int64[blocks].

        Raises:
            ConfigError: the length differs, or a slot breaks a rule; `field` names the array.
        """
        slots = _of_length(field, slot_mapping, span)
        per_block = self._tokens_per_block[0]
        skip = min(span.first_block * per_block - span.first_token, len(slots))
        if skip:
            _blocks_of(field, slots[:skip], 1, device_blocks * per_block)
        ids = _blocks_of(field, slots[skip:], per_block, device_blocks, skip)
        ids = ids[: span.last_block - span.first_block]
        if len(ids) > 1:
            starts = range(skip, skip + len(ids) * per_block, per_block)
            self._check_once(field, ids, per_block, device_blocks, starts)
        return ids

    def _leaves(self, slots: Any, group: int, span: Span, device_blocks: int) -> LeafBlocks:
        """Return those device blocks of one of the other groups that the caller has."""
        field, per_block = f"{_FIELD}[{group}]", self._tokens_per_block[group]
        slots = _of_length(field, slots, span)
        first = -(-span.first_token // per_block)
        count = max(0, span.last_token // per_block - first)
        begin = min(first * per_block - span.first_token, len(slots))
        end = begin + count * per_block
        for offset, part in ((0, slots[:begin]), (end, slots[end:])):  # blocks that are not whole
            given = np.flatnonzero(part != NO_BLOCK)
            _blocks_of(field, part[given], 1, device_blocks * per_block, given + offset)
        blocks = slots[begin:end].reshape(count, per_block)
        is_none = blocks == NO_BLOCK
        mixed = np.flatnonzero(is_none != is_none[:, :1])
        if len(mixed):
            at = begin + int(mixed[0])
            raise ConfigError(f"{field}[{at}]", int(slots[at]), _ALL_OR_NONE)
        given = np.flatnonzero(~is_none[:, 0])
        starts = begin + given * per_block
        each = (starts[:, None] + np.arange(per_block)).reshape(-1)
        ids = _blocks_of(field, blocks[given].reshape(-1), per_block, device_blocks, each)
        if len(ids) > 1:
            self._check_once(field, ids, per_block, device_blocks, starts)
        ratio = per_block // self._tokens_per_block[0]
        return LeafBlocks(group, positions_of((first + given + 1) * ratio - 1), ids)

    def _check_once(
        self,
        field: str,
        ids: BlockIds,
        per_block: int,
        device_blocks: int,
        starts: Sequence[int] | NDArray[np.int64],
    ) -> None:
        """Check that no device block is named twice, as its content would be undefined.

        `starts` has the index of each block's first slot.
        """
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
            one, other = int(starts[first]), int(starts[int(last[first])])
            why = f"is in device block {ids[first]}, which {field}[{one}] already names"
            raise ConfigError(f"{field}[{other}]", int(ids[first]) * per_block, why)


def _of_length(field: str, slot_mapping: Any, span: Span) -> NDArray[np.int64]:
    """Return slots as int64[n], if there is one for each selected token."""
    slots, wanted = as_int64(field, slot_mapping), span.last_token - span.first_token
    if len(slots) != wanted:
        why = f"must have one slot per selected token: {wanted}"
        raise ConfigError(field, f"{len(slots)} slots", why)
    return slots


def _blocks_of(
    field: str,
    slots: NDArray[np.int64],
    per_block: int,
    blocks: int,
    indices: int | NDArray[np.int64] = 0,
) -> BlockIds:
    """Return each block's device block; `indices` are those of the slots, or of the first one."""
    try:
        return np.frombuffer(_ext.block_slots(slots, per_block, blocks), np.int64)
    except ValueError as error:
        index, slot, rule = error.args
        at = index + indices if isinstance(indices, int) else int(indices[index])
        why = _WHY[rule].format(slots=blocks * per_block, per_block=per_block)
        raise ConfigError(f"{field}[{at}]", slot, why) from error


def _check_one(slot_mapping: Sequence[Any]) -> None:
    """Check that a list is one array of slots, and not a list of arrays."""
    first: Any = slot_mapping[0]
    is_array = isinstance(first, Sequence) or bool(getattr(first, "ndim", False))
    if is_array and not is_integer(first):
        why = "must be one array of slots: the model has one KV group"
        raise ConfigError(_FIELD, kind_of(slot_mapping), why)


def _arrays(slot_mapping: Any, groups: int) -> list[Any]:
    """Return the arrays of several groups."""
    why = f"must be a list of {groups} arrays of slots, one for each KV group of the model"
    is_one = isinstance(slot_mapping, str | bytes | Mapping) or getattr(slot_mapping, "ndim", 2) < 2
    if is_one or not isinstance(slot_mapping, Iterable):
        raise ConfigError(_FIELD, kind_of(slot_mapping), why)
    arrays = list(slot_mapping)
    if len(arrays) != groups or any(is_integer(each) for each in arrays):
        raise ConfigError(_FIELD, kind_of(arrays), why)
    return arrays
