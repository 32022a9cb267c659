"""Compares the cost of a load with that of computing its blocks again; slower loads are declined.

Both are learnt by observation: from long loads, by the tiers that their blocks come from, and from
steps that prefill. No load is declined before several of both are known. Each time that a tier was
too slow, its cost is reduced a little, until it is tried again.

The same goes for fetches of far blocks into host memory. They may be short and far tiers are slow
to answer, so a fetch costs something by itself, and something for each block:

    seconds
       │            · ╱     a: until the first block arrives
       │        ╱  ·        b: for each block that is fetched, or was asked for before
       │   · ╱
       a ╱     a + n·b, the line with the least squares; older fetches count less
       └──────────────── n blocks
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
SPREAD_MIN = 0.1
"""How much fetches must differ in length to tell the cost of a fetch from that of a block."""
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


class _Line:
    """A line through how long fetches of some blocks have taken."""

    __slots__ = ("_sums", "values")

    def __init__(self) -> None:
        self._sums, self.values = (0.0, 0.0, 0.0, 0.0, 0.0), 0

    @property
    def is_known(self) -> bool:
        """Return whether there are enough values."""
        return self.values >= FIRST

    def add(self, blocks: int, seconds: float) -> None:
        """Add how long a fetch has taken; an outlier counts as twice the expected time."""
        kept = 1.0
        if self.is_known:
            kept, seconds = 1.0 - WEIGHT, min(seconds, 2 * self.at(blocks))
        fresh = (1.0, blocks, seconds, blocks * blocks, blocks * seconds)
        weight, xs, ys, xxs, xys = [
            kept * old + new for old, new in zip(self._sums, fresh, strict=True)
        ]
        self._sums, self.values = (weight, xs, ys, xxs, xys), self.values + 1

    def at(self, blocks: int) -> float:
        """Return how long a fetch of so many blocks is expected to take."""
        weight, xs, ys, xxs, xys = self._sums
        mean, seconds = xs / weight, ys / weight
        spread, most = xxs / weight - mean * mean, seconds / mean
        slope = most  # as if a fetch by itself took no time, if all were about as long
        if spread > (SPREAD_MIN * mean) ** 2:
            slope = min(max((xys / weight - mean * seconds) / spread, 0.0), most)
        return seconds + slope * (blocks - mean)

    def forgive(self) -> None:
        """Reduce all times a little."""
        weight, xs, ys, xxs, xys = self._sums
        self._sums = weight, xs, ys * FORGIVEN, xxs, xys * FORGIVEN


class Costs:
    """The average costs of a token and of each tier's blocks, for one engine."""

    def __init__(self) -> None:
        self._token = _Average()
        self._block = {name: _Average() for name in _ORDER}
        self._fetch = {name: _Line() for name in _ORDER}
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
        """Record how long a load took; `by_tier` counts its blocks of all KV groups in each tier.

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

    # -- far blocks -----------------------------------------------------------------------------

    def computing_s(self, tokens: int) -> float | None:
        """Return how long computing some tokens takes; None if that is not known yet."""
        return tokens * self._token.seconds if self._token.is_known else None

    def fetched(self, by_tier: Mapping[str, int], ahead: int, seconds: float) -> None:
        """Record how long a fetch into host memory took.

        The time beyond what the nearer tiers usually take is charged to the farthest one.

        Args:
            by_tier: how many blocks of all KV groups came from each tier.
            ahead: how many blocks were under way when it began.
            seconds: how long it took.
        """
        tiers = [name for name in _FETCHED if by_tier.get(name)]
        if not tiers:
            return
        *nearer, farthest = tiers
        known = sum(self._fetching_s({name: by_tier[name] for name in nearer}, 0).values())
        self._fetch[farthest].add(by_tier[farthest] + ahead, max(0.0, seconds - known))

    def is_worth_fetching(self, by_tier: Mapping[str, int], ahead: int, tokens: int) -> bool:
        """Return whether fetching blocks from these tiers is faster than computing the tokens.

        `ahead` is how many other blocks are under way.
        """
        costs = self._fetching_s(by_tier, ahead)
        computing_s = self.computing_s(tokens)
        if not costs or computing_s is None or sum(costs.values()) < computing_s:
            return True
        self._fetch[max(costs, key=lambda name: costs[name])].forgive()
        return False

    def _fetching_s(self, by_tier: Mapping[str, int], ahead: int) -> dict[str, float]:
        """Return how long the fetches of these blocks take, for the tiers that are known."""
        return {
            name: line.at(count + ahead)
            for name in _FETCHED
            if (count := by_tier.get(name)) and (line := self._fetch[name]).is_known
        }


_ORDER = [tier.label for tier in sorted(Tier)]
_FETCHED = [tier.label for tier in sorted(Tier) if tier > Tier.HOST]
