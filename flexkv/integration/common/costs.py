"""What a load costs, and what computing the same again: a load that takes longer is not offered.

Both are learnt from what goes by: long loads, by the tiers that their blocks come from, and steps
that prefill. Nothing is held back before several of both are known, and a tier that was too slow
gets better by and by until it is tried again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from flexkv.common.terms import Tier

WEIGHT = 0.2
"""Of what is new in an average; an outlier counts as twice the average."""
FIRST = 3
"""Of so many values that come first the least is taken."""
FORGIVEN = 0.9
"""What is left of a tier's cost whenever it was the reason not to load."""
STEPS_MAX = 4
"""That an engine has under way: with asynchronous scheduling two."""
TOKENS_MIN, BLOCKS_MIN = 64, 16
"""Of a step that tells what a token costs, and of a load that tells what a block costs."""


class _Average:
    """Of what something took."""

    __slots__ = ("seconds", "values")

    def __init__(self) -> None:
        self.seconds, self.values = 0.0, 0

    @property
    def is_known(self) -> bool:
        """Tell whether it means something."""
        return self.values >= FIRST

    def add(self, fresh: float) -> None:
        """Take one more value."""
        if self.values < FIRST:
            self.seconds = min(self.seconds, fresh) if self.values else fresh
        else:
            self.seconds += WEIGHT * (min(fresh, 2 * self.seconds) - self.seconds)
        self.values += 1


class Costs:
    """The averages of one engine."""

    def __init__(self) -> None:
        self._token = _Average()
        self._block = {name: _Average() for name in _ORDER}
        self._steps = deque[tuple[float, int]](maxlen=STEPS_MAX)
        self._ended_s = 0.0

    def step_begins(self, tokens: int) -> None:
        """Take that a step is scheduled, which prefills so many tokens."""
        self._steps.append((time.monotonic(), tokens))

    def step_ends(self) -> None:
        """Take that the oldest step under way is done; it began when the one before had ended."""
        if not self._steps:
            return
        begin_s, tokens = self._steps.popleft()
        begin_s, self._ended_s = max(begin_s, self._ended_s), time.monotonic()
        if tokens >= TOKENS_MIN:
            self._token.add((self._ended_s - begin_s) / tokens)

    def loaded(self, by_tier: Mapping[str, int], seconds: float) -> None:
        """Take what a load took, of so many blocks from each tier.

        What it took beyond what the nearer tiers usually take is the farthest one's.
        """
        tiers = [name for name in _ORDER if by_tier.get(name)]
        if not tiers or by_tier[tiers[-1]] < BLOCKS_MIN:
            return  # another request was bringing them, or what is fixed weighs too much
        *nearer, farthest = tiers
        known = sum(by_tier[name] * self._block[name].seconds for name in nearer)
        self._block[farthest].add(max(0.0, seconds - known) / by_tier[farthest])

    def is_worth_it(self, by_tier: Mapping[str, int], tokens: int) -> bool:
        """Tell whether to load blocks from these tiers is faster than to compute the tokens."""
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
