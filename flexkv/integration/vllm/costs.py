"""What a load costs, and what computing the same again: a load that takes longer is not offered.

Both are learnt from what goes by: loads by the tiers that their blocks come from, from the start to
when the scheduler hears of the end; computing from steps that prefill. Nothing is held back before
both are known, and a tier that was too slow gets better by and by until it is tried again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from flexkv.common.terms import Tier

WEIGHT = 0.2
"""Of what is new in an average; an outlier counts as twice the average."""
FORGIVEN = 0.9
"""What is left of a tier's cost whenever it was the reason not to load."""
STEPS_MAX = 4
"""That an engine has under way: with asynchronous scheduling two."""
STEP_TOKENS_MIN = 64
"""Of a step that tells what a token costs: others mostly decode."""


class Costs:
    """The averages of one engine."""

    def __init__(self) -> None:
        self._token_s: float | None = None
        self._block_s: dict[str, float] = {}
        self._steps = deque[tuple[float, int]](maxlen=STEPS_MAX)

    def step_begins(self, tokens: int) -> None:
        """Take that a step of so many tokens is scheduled."""
        self._steps.append((time.monotonic(), tokens))

    def step_ends(self) -> None:
        """Take that the oldest step under way is done."""
        if not self._steps:
            return
        begin_s, tokens = self._steps.popleft()
        if tokens >= STEP_TOKENS_MIN:
            seconds = (time.monotonic() - begin_s) / tokens
            self._token_s = _average(self._token_s, seconds)

    def loaded(self, by_tier: Mapping[str, int], seconds: float) -> None:
        """Take what a load took, of so many blocks from each tier.

        What it took beyond what the nearer tiers usually take is the farthest one's.
        """
        tiers = [name for name in _ORDER if by_tier.get(name)]
        if not tiers:  # another request was bringing them
            return
        *nearer, farthest = tiers
        known = sum(by_tier[name] * self._block_s.get(name, 0.0) for name in nearer)
        each = max(0.0, seconds - known) / by_tier[farthest]
        self._block_s[farthest] = _average(self._block_s.get(farthest), each)

    def is_worth_it(self, by_tier: Mapping[str, int], tokens: int) -> bool:
        """Tell whether to load blocks from these tiers is faster than to compute the tokens."""
        costs = {name: n * self._block_s.get(name, 0.0) for name, n in by_tier.items()}
        if self._token_s is None or sum(costs.values()) <= tokens * self._token_s:
            return True
        dearest = max(costs, key=lambda name: costs[name])
        self._block_s[dearest] *= FORGIVEN
        return False


_ORDER = [tier.label for tier in sorted(Tier)]


def _average(known: float | None, fresh: float) -> float:
    return fresh if known is None else known + WEIGHT * (min(fresh, 2 * known) - known)
