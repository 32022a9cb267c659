"""Requests, which are in whole blocks, and the responses to them, which are over tokens."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from flexkv.common.config_keys import kind_of
from flexkv.common.errors import ConfigError, FlexKVError
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, Labelled, LayerWatch, Positions

TokenMask = NDArray[np.bool_]
_INT64 = np.dtype(np.int64)


class Operation(Labelled):
    """The kind of a request."""

    GET = 0
    PUT = 1
    PREFETCH = 2


class KVResponseStatus(Enum):
    """How a request ended. A request that was served in part is a SUCCESS with a shorter mask."""

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is slow Python code

    SUCCESS = "success"
    NOTFOUND = "notfound"
    UNREADY = "unready"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    FAILED = "failed"


class KVResponse(msgspec.Struct, frozen=True, eq=False):
    """The response to one request.

    `return_mask` is bool[tokens]: the tokens whose KV was moved; only whole blocks are. For a get,
    the slots passed for other tokens have undefined content. `error` is the first failure, or the
    lack of room, that cut the request short; it is None if a tier that is down cut it short.
    """

    status: KVResponseStatus
    task_id: int
    return_mask: TokenMask
    error: FlexKVError | None = None

    def __repr__(self) -> str:
        told = f": {self.error}" if self.error is not None else ""
        moved, asked = np.count_nonzero(self.return_mask), np.size(self.return_mask)
        return f"KVResponse({self.status.value}, {moved} of {asked} tokens{told})"


class Span(NamedTuple):
    """The run of tokens that a mask selects, and the whole blocks inside it."""

    first_block: int
    last_block: int
    """Exclusive."""
    first_token: int
    """Where the mask's run begins: the first slot of the slot mapping belongs to this token."""
    last_token: int
    """Exclusive."""


class LeafBlocks(NamedTuple):
    """The device blocks that a request has for the leaves of one KV group.

    There may be fewer than the group could have: a get loads the longest prefix for which it has
    all, and a put stores those that it has.
    """

    group: int
    positions: Positions
    """The positions of the leaves, which are those of their parents in the chain, ascending."""
    device_ids: BlockIds
    """int64, one for each position; NO_BLOCK where the caller has none."""

    def ids_at(self, positions: Positions) -> BlockIds:
        """Return the device blocks of some of the positions: int64[n]."""
        return self.device_ids[np.searchsorted(self.positions.array, positions.array)]


NO_BLOCK = -1
"""Stands in `LeafBlocks.device_ids` for a block that the caller does not have."""


class Request(msgspec.Struct, frozen=True):
    """A caller's request, as the core handles it.

    `keys` has 16 bytes for the namespace's root, then 16 for each whole block up to
    `span.last_block`; those of a load go on for `drop` blocks more. `device_ids` is int64, one per
    block of the span, or None for a prefetch. `watch` observes a request that is moved layer by
    layer.
    """

    operation: Operation
    request_id: int
    token_count: int
    tokens_per_block: int
    span: Span
    keys: bytes
    device_ids: BlockIds | None = None
    namespace_hash: str = ""
    """Identifies the namespace in traces without revealing it."""
    watch: LayerWatch | None = None
    generation: int = 0
    """The engine's generation when the request began: see `flexkv.index.clears`."""
    leaves: tuple[LeafBlocks, ...] = ()
    """The device blocks of the other KV groups, at most one entry for each, by ascending group."""
    drop: int = 0
    """How many blocks of the chain behind a prefix must be resident as well, for a draft model that
    drops the last ones of a hit."""

    @property
    def block_count(self) -> int:
        """Return the number of whole blocks of the prompt, up to the end of the span."""
        return len(self.keys) // BLOCK_KEY_BYTES - 1

    def narrowed(self, first_block: int, last_block: int) -> Request:
        """Return the request for fewer blocks; its slots begin and end with them."""
        per_block = self.tokens_per_block
        span = Span(first_block, last_block, first_block * per_block, last_block * per_block)
        keys = self.keys[: (last_block + 1) * BLOCK_KEY_BYTES]
        return structs.replace(self, span=span, keys=keys)


def as_int64(field: str, values: Any) -> NDArray[np.int64]:
    """Return `values` as a contiguous int64[n], without a copy if it is one already.

    Args:
        field: the argument's name, for the error.
        values: 1-D numpy array, torch CPU tensor or sequence, of any integer dtype.

    Raises:
        ConfigError: `values` is not one-dimensional, not integers, or not in host memory.
    """
    if type(values) is np.ndarray and values.dtype == _INT64 and values.ndim == 1:
        return np.ascontiguousarray(values)
    array = _array_of(field, values, "integers in host memory")
    if array.ndim != 1:
        raise ConfigError(field, f"shape {array.shape}", "must have one dimension")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise ConfigError(field, f"dtype {array.dtype}", "must have an integer dtype")
    if array.dtype.kind == "u" and array.itemsize == 8 and int(array.max()) >= 1 << 63:
        raise ConfigError(field, int(array.max()), "must fit in 63 bits")
    return np.ascontiguousarray(array, dtype=np.int64)


def _array_of(field: str, values: Any, what: str) -> NDArray[Any]:
    """Return `values` as an array, whatever the type of its elements.

    Raises:
        ConfigError: `values` is ragged, or its library refuses to convert it.
    """
    try:
        return np.asarray(values)
    except (
        TypeError, ValueError, RuntimeError, AttributeError, LookupError, OverflowError,
        BufferError, MemoryError,
    ) as error:  # fmt: skip
        raise ConfigError(field, kind_of(values), f"must be {what}: {error}") from error


def whole_blocks(token_mask: Any, token_count: int, tokens_per_block: int) -> Span:
    """Return the whole blocks inside the one run of True in `token_mask`.

    A block that the run covers only in part is not moved. A mask of None selects every token.

    Raises:
        ConfigError: the length differs from `token_count`, the dtype is not bool, or the mask has
            a hole (False between two True).
    """
    first_token, last_token = 0, token_count
    if token_mask is not None:
        mask = _array_of("token_mask", token_mask, "booleans in host memory")
        first_token, last_token = _run_of_true(mask, token_count)
    first_block = -(-first_token // tokens_per_block)
    last_block = last_token // tokens_per_block
    return Span(first_block, max(first_block, last_block), first_token, last_token)


def _run_of_true(mask: NDArray[Any], token_count: int) -> tuple[int, int]:
    """Return where the mask's run of True begins and ends."""
    if mask.dtype != np.bool_:
        raise ConfigError("token_mask", f"dtype {mask.dtype}", "must be bool")
    if mask.shape != (token_count,):
        raise ConfigError(
            "token_mask", f"shape {mask.shape}", f"must have the length of token_ids, {token_count}"
        )
    count = int(np.count_nonzero(mask))
    if count == 0:
        return token_count, token_count
    first = int(mask.argmax())
    run = mask[first : first + count]
    if not run.all():
        hole = first + int(run.argmin())
        raise ConfigError(
            "token_mask", f"False at {hole}", "must select one unbroken run of tokens"
        )
    return first, first + count
