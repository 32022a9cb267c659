"""How often something happens: a rate that does not depend on who asks, or how often."""

from __future__ import annotations

import math

MEMORY_S = 10.0
"""An event that is this old counts 1/e of a new one."""


class Rate:
    """How often something happens per second: an average in which older events count less."""

    def __init__(self, now_s: float) -> None:
        """Begin to count at this time."""
        self._since_s = self._counted_s = now_s
        self._weight = 0.0

    def add(self, count: int, now_s: float) -> None:
        """Count what has happened now."""
        self._weight = self._weight_at(now_s) + count
        self._counted_s = now_s

    def per_s(self, now_s: float) -> float:
        """Return the rate; any thread may call this."""
        known_s = MEMORY_S * -math.expm1((self._since_s - now_s) / MEMORY_S)
        return self._weight_at(now_s) / max(known_s, 1.0)

    def _weight_at(self, now_s: float) -> float:
        return self._weight * math.exp((self._counted_s - now_s) / MEMORY_S)
