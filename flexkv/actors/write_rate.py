"""Bounds how fast a far tier is written to, so that others keep their share of the network.

    ship ──span──▶ the next one begins once the span's bytes could have passed at the rate

In any interval of T seconds, ships of at most `rate x T` blocks and one span more begin. What is
sent to other nodes is bounded in the same way, in bytes.
"""

from __future__ import annotations


class WriteRate:
    """When the next span may be written. Pure: each call takes the time in seconds."""

    def __init__(self, blocks_per_s: float | None) -> None:
        """Allow so many blocks a second; None: any number."""
        self._per_s = blocks_per_s
        self._next_s = 0.0

    def wait_s(self, now_s: float) -> float:
        """Return how long the next span has to wait; 0 if it may begin now."""
        return max(0.0, self._next_s - now_s)

    def began(self, block_count: int, now_s: float) -> None:
        """Count blocks whose writing begins."""
        if self._per_s is not None:
            self._next_s = max(self._next_s, now_s) + block_count / self._per_s
