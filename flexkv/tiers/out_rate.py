"""Bounds how many bytes a node sends to others, so that its own requests keep their network.

    want ──▶ room: what can be sent soon ──▶ grant      no room: the reader asks again
    read ──▶ each message begins once the bytes before it could have passed at the rate

The first keeps the queue of what is to be sent short, so that no reader gives up an answer that
stands still. The second holds whatever readers do, over connections of our own; Mooncake reads by
itself what is granted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
            time: returns the time in seconds.
            stall_s: for how long readers wait for the next bytes of an answer.
        """
        self._ahead_s = min(AHEAD_S, AHEAD_SHARE * stall_s)
        self._per_s, self._block_bytes, self._time = bytes_per_s, block_bytes, time
        self._granted, self._sent = WriteRate(bytes_per_s), WriteRate(bytes_per_s)

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

    def turn_s(self, nbytes: int) -> float:
        """Return how many seconds these bytes must wait, and count them as sent after that."""
        now_s = self._time()
        wait_s = self._sent.wait_s(now_s)
        self._sent.began(nbytes, now_s)
        return wait_s
