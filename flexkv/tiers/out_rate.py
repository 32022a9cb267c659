"""Bounds how many bytes a node sends to others, so that its own requests keep their network.

    want ──▶ room: what can be sent soon ──▶ grant      no room: the reader asks again
    read ──▶ each message begins once the bytes before it could have passed at the rate

The first keeps the queue of what is to be sent short, so that no reader gives up an answer that
stands still. The second holds whatever readers do, over connections of our own; Mooncake reads by
itself what is granted.

In any interval of T seconds, messages of at most `rate x T` bytes and one message more begin. A
message that ends early counts with the bytes that were sent of it, or as a whole if these are not
known, because the connection was reset.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress

from flexkv.actors.write_rate import WriteRate

AHEAD_S, AHEAD_SHARE = 1.0, 0.5
"""All that is granted can be sent within this time, or within this share of the time for which a
reader lets an answer stand still, if that is shorter."""


class OutRate:
    """What may be granted and sent to other nodes now."""

    def __init__(
        self,
        bytes_per_s: float | None,
        block_bytes: Sequence[int],
        time: Callable[[], float],
        stall_s: float = math.inf,
    ) -> None:
        """Allow so many bytes a second; None: any number.

        Args:
            bytes_per_s: the rate.
            block_bytes: the bytes of a block of each KV group.
            time: returns the time of the loop in seconds.
            stall_s: for how long readers wait for the next bytes of an answer.
        """
        self._ahead_s = min(AHEAD_S, AHEAD_SHARE * stall_s)
        self._per_s, self._block_bytes, self._time = bytes_per_s, block_bytes, time
        self._granted = WriteRate(bytes_per_s)
        self._line, self._sooner = asyncio.Lock(), asyncio.Event()
        self._begun_s = self._free_s = -math.inf
        """When the latest message has begun, and when the next one may."""

    def room(self, group: int) -> int | None:
        """Return how many blocks of a KV group may be granted now; None: any number.

        One block may be granted whenever nothing is to be sent, however long it takes.
        """
        if self._per_s is None or group >= len(self._block_bytes):
            return None
        due_s = self._granted.wait_s(self._time())
        blocks = int(max(0.0, self._ahead_s - due_s) * self._per_s / self._block_bytes[group])
        return blocks if due_s else max(1, blocks)

    def granted(self, group: int, blocks: int) -> None:
        """Count blocks that are granted."""
        if blocks:
            self._granted.began(blocks * self._block_bytes[group], self._time())

    async def turn(self, nbytes: int) -> float:
        """Wait until a message may begin, in the order of the calls, and return the time.

        The message must begin at once, or be given back by `unsent`.

        Cancellation: the others wait as if there had been no call.
        """
        if self._per_s is None:
            return self._time()
        async with self._line:
            while (wait_s := self._free_s - self._time()) > 0:
                self._sooner.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._sooner.wait()
            self._begun_s = self._time()
            self._free_s = self._begun_s + nbytes / self._per_s
            return self._begun_s

    def unsent(self, begun_s: float, sent_bytes: int) -> None:
        """Take note that only so many bytes were sent of the message that had a turn then.

        Once another message has begun, the time of this one is over.
        """
        if self._per_s is not None and begun_s == self._begun_s:
            self._free_s = begun_s + sent_bytes / self._per_s
            self._sooner.set()
