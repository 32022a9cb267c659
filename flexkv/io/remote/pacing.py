"""How many requests to have in flight, and when a slow one is sent again.

A store that is overloaded says so (503, SlowDown). The number of requests in flight then halves,
and grows by one for as many successes as it is (additive increase, multiplicative decrease).

Where the way to a store is slow, requests share it: the more there are, the longer each takes. So
the number is also lowered while requests take too long, and to 1 after one that was late, as TCP
does after a time-out. So on a way that is only slow, none but the first requests can be late.

Of many requests a few take far longer than the others. One that has taken longer than 95 of 100
others of its size is *hedged*: it is sent a second time, and the first answer counts. At most a
small share of requests is hedged, so a store that is slow as a whole does not get more of them.

Source: D.-M. Chiu, R. Jain: Analysis of the increase and decrease algorithms (1989); J. Dean, L. A.
Barroso: The tail at scale (2013).
"""

from __future__ import annotations

import math
from collections import deque

HALVING_S = 0.5
"""A store that is busy says so to all requests in flight; within this time that counts once."""
SAMPLES, SAMPLES_MIN = 100, 20
_PERCENT = 95


class Limit:
    """How many requests of one direction may be in flight.

    Attributes:
        moved_s: when a request last succeeded.
    """

    def __init__(self, most: int, slow_s: float = math.inf) -> None:
        """Allow `most` at first; fewer if they take longer than `slow_s`."""
        self.moved_s = -math.inf
        self._most, self._now, self._slow_s = float(most), float(most), slow_s
        self._lowered_s = -math.inf

    @property
    def now(self) -> int:
        """Return the number: at least 1."""
        return int(self._now)

    @property
    def is_lowest(self) -> bool:
        """Return whether the number was lowered to 1."""
        return self.now == 1 < self._most

    def succeeded(self, now_s: float, took_s: float) -> None:
        """Count a success."""
        self.moved_s = now_s
        if took_s <= self._slow_s:
            self._now = min(self._most, self._now + 1 / self._now)
        elif now_s - self._lowered_s >= took_s:  # it began since then
            self._lowered_s = now_s
            self._now = max(1.0, self._now * self._slow_s / took_s)

    def is_too_high(self, now_s: float) -> None:
        """Halve the number, unless that was just done."""
        if now_s - self._lowered_s >= HALVING_S:
            self._lowered_s = now_s
            self._now = max(1.0, self._now / 2)

    def was_late(self) -> None:
        """Lower the number to 1, since a request has not ended in time."""
        self._now = 1.0


class Hedging:
    """Decides when a get is slow enough to be sent again, and whether it may be."""

    def __init__(self, share_max: float) -> None:
        self._share_max = share_max
        self._took_s: dict[int, deque[float]] = {}
        """The last durations of gets, by the order of magnitude of their bytes."""
        self._gets = self._hedges = 0

    def begun(self) -> None:
        """Count a get."""
        self._gets += 1

    def took(self, nbytes: int, seconds: float) -> None:
        """Record how long a get took from its first request to its answer."""
        kept = self._took_s.setdefault(nbytes.bit_length(), deque(maxlen=SAMPLES))
        kept.append(seconds)

    def after_s(self, nbytes: int) -> float | None:
        """Return after how many seconds a get is slow; None if that is not known yet."""
        kept = self._took_s.get(nbytes.bit_length(), ())
        if len(kept) < SAMPLES_MIN:
            return None
        ordered = sorted(kept)
        return ordered[max(0, math.ceil(len(ordered) * _PERCENT / 100) - 1)]

    def take(self) -> bool:
        """Return whether one more get may be hedged; it is counted then."""
        if self._hedges + 1 > self._share_max * self._gets:
            return False
        self._hedges += 1
        return True
