"""Compares the cost of a load with that of computing its blocks again; slower loads are declined.

Both are learnt by observation: from long loads, by the tiers that their blocks come from, and from
steps that prefill. No load is declined before several of both are known. Each time that a tier was
too slow, its cost is reduced a little, until it is tried again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from flexkv.common.terms import Tier

WEIGHT = 0.2
"""Weight of a new value in an average; an outlier counts as twice the average."""
FIRST = 3
"""An average begins as the least of this many first values."""
FORGIVEN = 0.9
"""Factor by which a tier's cost is reduced whenever it was the reason not to load."""
STEPS_MAX = 4
"""Maximum number of steps that an engine has under way; with asynchronous scheduling it has two."""
TOKENS_MIN, BLOCKS_MIN = 64, 16
"""Smallest step and smallest load from which the costs of a token and of a block are learnt."""


class _Average:
    """A running average of the seconds that one token or block takes."""

    __slots__ = ("seconds", "values")

    def __init__(self) -> None:
        self.seconds, self.values = 0.0, 0

    @property
    def is_known(self) -> bool:
        """Return whether there are enough values."""
        return self.values >= FIRST

    def add(self, fresh: float) -> None:
        """Add a value."""
        if self.values < FIRST:
            self.seconds = min(self.seconds, fresh) if self.values else fresh
        else:
            self.seconds += WEIGHT * (min(fresh, 2 * self.seconds) - self.seconds)
        self.values += 1


class Costs:
    """The average costs of a token and of each tier's blocks, for one engine."""

    def __init__(self) -> None:
        self._token = _Average()
        self._block = {name: _Average() for name in _ORDER}
        self._steps = deque[tuple[float, int]](maxlen=STEPS_MAX)
        self._ended_s = 0.0

    def step_begins(self, tokens: int) -> None:
        """Record that a step is scheduled that prefills `tokens` tokens."""
        self._steps.append((time.monotonic(), tokens))

    def step_ends(self) -> None:
        """Record the end of the oldest step under way, which began after the step before ended."""
        if not self._steps:
            return
        begin_s, tokens = self._steps.popleft()
        begin_s, self._ended_s = max(begin_s, self._ended_s), time.monotonic()
        if tokens >= TOKENS_MIN:
            self._token.add((self._ended_s - begin_s) / tokens)

    def loaded(self, by_tier: Mapping[str, int], seconds: float) -> None:
        """Record how long a load took; `by_tier` counts its blocks in each tier.

        The time beyond what the nearer tiers usually take is charged to the farthest one.
        """
        tiers = [name for name in _ORDER if by_tier.get(name)]
        if not tiers or by_tier[tiers[-1]] < BLOCKS_MIN:
            return  # another request was loading them, or fixed costs dominate
        *nearer, farthest = tiers
        known = sum(by_tier[name] * self._block[name].seconds for name in nearer)
        self._block[farthest].add(max(0.0, seconds - known) / by_tier[farthest])

    def is_worth_it(self, by_tier: Mapping[str, int], tokens: int) -> bool:
        """Return whether loading blocks from these tiers is faster than computing the tokens."""
        costs = {
            name: count * self._block[name].seconds
            for name, count in by_tier.items()
            if self._block[name].is_known
        }
        if not self._token.is_known or sum(costs.values()) <= tokens * self._token.seconds:
            return True
        dearest = max(costs, key=lambda name: costs[name])
        self._block[dearest].seconds *= FORGIVEN
        return False


_ORDER = [tier.label for tier in sorted(Tier)]
