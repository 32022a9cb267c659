"""Tries a store: writes an object, reads, lists and touches it, and deletes it."""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from flexkv.common.errors import RemoteError
from flexkv.io.remote.store import Store

ROUND_TRIP_BYTES = 16 << 20
_FOLDER = "doctor/"
TIDY_S = 1.0
"""How long an object is tried to be deleted after a failure."""


class RoundTrip(NamedTuple):
    """How fast a store was for one object of some size."""

    put_mb_per_s: float
    get_mb_per_s: float
    head_ms: float


async def round_trip(store: Store, nbytes: int = ROUND_TRIP_BYTES) -> RoundTrip:
    """Write, read, list, touch and delete an object of its own, and return how fast that was.

    So all that an engine asks of a store is tried once.

    Raises:
        RemoteError: the store failed, or returned other bytes than were written.
    """
    name = f"{_FOLDER}{secrets.token_hex(16)}"
    wanted = np.random.default_rng().bytes(nbytes)
    try:
        begin_s = time.perf_counter()
        await store.put(name, [wanted])
        put_s = time.perf_counter() - begin_s
        begin_s = time.perf_counter()
        found = await _found(store, name)
        get_s = time.perf_counter() - begin_s
        begin_s = time.perf_counter()
        await store.head(name)
        head_s = time.perf_counter() - begin_s
        async for _ in store.pages(_FOLDER):
            break
        await store.touch(name)
    except BaseException as error:  # cancelled, too; its own error tells more than the deletion's
        with suppress(RemoteError, TimeoutError):
            async with asyncio.timeout(TIDY_S):
                await store.delete(name)
        if isinstance(error, FileNotFoundError):
            why = "what was written cannot be found"
            raise RemoteError(store.where, "get", why) from None
        raise
    await store.delete(name)
    if found != wanted:
        raise RemoteError(store.where, "get", "it returned other bytes than were written")
    return RoundTrip(nbytes / put_s / 1e6, nbytes / get_s / 1e6, head_s * 1e3)


async def _found(store: Store, name: str) -> bytes:
    """Return an object that was just written."""
    try:
        return await store.read(name)
    except FileNotFoundError:
        why = "what was written cannot be found"
        raise RemoteError(store.where, "get", why) from None
