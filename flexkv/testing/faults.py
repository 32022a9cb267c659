"""A seeded plan of failures and delays, so that a failure can be replayed."""

from __future__ import annotations

from random import Random

HANG_DELAYS = 50
"""The most time that an operation may hang, as a multiple of `delay_max_s`."""


class FaultPlan:
    """Delays and failures, drawn from one seed in the order in which they are asked for.

    Each transfer draws its own delay, so completions come out of order.
    """

    def __init__(
        self,
        seed: int,
        failure_probability: float = 0.0,
        delay_min_s: float = 0.0001,
        delay_max_s: float = 0.01,
        flip_probability: float = 0.0,
        hang_probability: float = 0.0,
    ) -> None:
        assert 0.0 <= hang_probability <= 1.0, hang_probability
        assert 0.0 <= failure_probability <= 1.0, failure_probability
        assert 0.0 <= flip_probability <= 1.0, flip_probability
        assert 0.0 <= delay_min_s <= delay_max_s, (delay_min_s, delay_max_s)
        self.seed = seed
        self.failure_probability = failure_probability
        self.flip_probability = flip_probability
        self.hang_probability = hang_probability
        self.delay_min_s = delay_min_s
        self.delay_max_s = delay_max_s
        self._random = Random(seed)

    def __repr__(self) -> str:
        return (
            f"FaultPlan(seed={self.seed}, failure_probability={self.failure_probability}, "
            f"delay_min_s={self.delay_min_s}, delay_max_s={self.delay_max_s}, "
            f"flip_probability={self.flip_probability}, hang_probability={self.hang_probability})"
        )

    def delay_s(self) -> float:
        """Return how long the next operation takes; one that hangs takes much longer."""
        if self.hang_probability > 0 and self._random.random() < self.hang_probability:
            return self._random.uniform(self.delay_max_s, HANG_DELAYS * self.delay_max_s)
        return self._random.uniform(self.delay_min_s, self.delay_max_s)

    def fails(self) -> bool:
        """Return whether the next operation fails."""
        return self._random.random() < self.failure_probability

    def flips(self) -> bool:
        """Return whether a bit of the next written block flips without an error."""
        return self.flip_probability > 0 and self._random.random() < self.flip_probability

    def bit(self, count: int) -> int:
        """Return a number below `count`."""
        return self._random.randrange(count)

    def moment_s(self, delay_s: float) -> float:
        """Return a number of seconds from 0 to `delay_s`."""
        return self._random.uniform(0.0, delay_s)

    def order(self, count: int) -> list[int]:
        """Return the numbers below `count`, shuffled."""
        return self._random.sample(range(count), count)

    def cut(self, count: int) -> int:
        """Return where to cut a sequence of `count` things in two: 0 to `count`."""
        return self._random.randint(0, count)
