"""Reads spans: what a store answers is believed only as far as it proves itself.

    an answer that is wrong ──ask again──▶ right: the answer was at fault, not the object
                                         ▶ wrong in the same way: the object is; it is deleted
                                         ▶ wrong in another way: nobody knows; nothing is deleted

Deleting a right object would do no harm: somebody who still has the span stores it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from flexkv.common.errors import CorruptBlockError, RemoteError, TransferError
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.remote.landing import Landing
from flexkv.io.remote.names import Pool
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.seal import SEAL_BYTES, sealed_blocks, sums_in
from flexkv.io.remote.spans import SpanPart
from flexkv.io.remote.until import Until


class Brought(NamedTuple):
    """The end of a read.

    Attributes:
        filled: how many leading blocks are in the arena, and right.
        error: why not all are: FileNotFoundError if there is no such object.
        is_deleted: whether the object was wrong, and was deleted.
    """

    filled: int
    error: TransferError | FileNotFoundError | None = None
    is_deleted: bool = False


def failed(error: TransferError | FileNotFoundError) -> Brought:
    """Return the end of a read or write that brought nothing.

    The error outlives it, and the frames of its traceback would hold on to host memory.
    """
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return Brought(0, error)


def _nothing() -> None:
    """Do nothing."""


class _Evidence(NamedTuple):
    """What an answer was like; if those of two requests are equal, the object is like that."""

    filled: int
    nbytes: int
    seals: bytes
    sums: bytes


class SpanReader:
    """Reads parts of spans into the arena."""

    def __init__(
        self, span_blocks: int, landing: Landing, host: HostBlocks, requests: Requests
    ) -> None:
        self._span_blocks, self._landing = span_blocks, landing
        self._host, self._requests = host, requests

    async def read(
        self, pool: Pool, part: SpanPart, until: Until, arrived: Callable[[], None]
    ) -> Brought:
        """Read a part of a span, and return how that ended; it ends by `until`, or soon after.

        `arrived` is called once the store has answered, before the blocks are copied or summed.
        """
        name = pool.object_name(part.span_key)
        try:
            first = await self._answer(part, name, until, arrived)
            if first.filled == part.blocks:
                return Brought(part.blocks)
            second = await self._answer(part, name, until)
        except (RemoteError, FileNotFoundError) as error:
            return failed(error)  # what the first answer brought may be overwritten
        if second.filled == part.blocks:
            return Brought(part.blocks)
        proved = first == second and await self._is_stored(part, second, name, until)
        is_deleted = proved and await self._delete(name, until)
        return Brought(second.filled, self._corrupt(part, name, second.filled), is_deleted)

    async def _answer(
        self, part: SpanPart, name: str, until: Until, arrived: Callable[[], None] = _nothing
    ) -> _Evidence:
        """Ask for a part, land what proves itself, and return what the answer was like."""
        block_bytes = self._host.block_bytes[part.group]
        nbytes, seals, land = await self._landing.fetch(part, name, until)
        arrived()
        sealed = sealed_blocks(seals, part.names, block_bytes)
        found = np.zeros(0, np.uint64)
        filled = 0
        if sealed:
            await land(sealed)
            found = self._host.sums[part.host_ids[:sealed]]
            wrong = np.flatnonzero(found != sums_in(seals[:sealed]))
            filled = int(wrong[0]) if len(wrong) else sealed
        if filled < part.blocks:
            self._requests.counting.other["wrong"] += 1
        return _Evidence(filled, nbytes, seals.tobytes(), found.tobytes())

    async def _is_stored(self, part: SpanPart, wrong: _Evidence, name: str, until: Until) -> bool:
        """Return whether the object itself is wrong, after two answers that were wrong alike.

        An answer that is too short proves that only if the object has too few bytes, too.
        """
        record_bytes = self._host.block_bytes[part.group] + SEAL_BYTES
        if wrong.nbytes >= (wrong.filled + 1) * record_bytes:
            return True
        span_blocks = 1 if part.group else self._span_blocks
        try:
            return (await self._requests.head(name, until)).size_bytes != span_blocks * record_bytes
        except (RemoteError, FileNotFoundError):
            return False

    async def _delete(self, name: str, until: Until) -> bool:
        try:
            await self._requests.delete(name, until)
        except RemoteError:
            return False
        self._requests.counting.other["deleted"] += 1
        return True

    def _corrupt(self, part: SpanPart, name: str, filled: int) -> CorruptBlockError:
        record_bytes = self._host.block_bytes[part.group] + SEAL_BYTES
        offset_bytes = (part.first_record + filled) * record_bytes
        where = f"{self._requests.store.where}/{name}"
        return CorruptBlockError(where, offset_bytes, part.outer_ids[filled : filled + 1].tolist())
