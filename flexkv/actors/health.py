"""Decides whether a tier may be used: a breaker for each direction, which also covers hung I/O.

    UP ── FAILURES_MAX failures in a row ──▶ DOWN for a while ──▶ on trial ── success ──▶ UP
     ╲                                          ▲        (one op)     │
      ╲                                         ╰── failure, ×2 ──────╯
       ── I/O past its deadline ──▶ HUNG ── no I/O late any more ──▶ on trial

A tier that is lost is DOWN for good, however its I/O ends.

Pure: each call takes the time, in seconds from an arbitrary start.
"""

from __future__ import annotations

from enum import Enum

FAILURES_MAX = 3
"""Failures in a row after which a direction is DOWN."""
BACKOFF_MIN_S, BACKOFF_MAX_S = 1.0, 60.0


class Health(Enum):
    """The state of one direction of a tier."""

    UP = "up"
    DOWN = "down"
    HUNG = "hung"


class Breaker:
    """The breaker of one direction of one tier, or of one of many sources of a tier.

    Attributes:
        health: its state.
        down_until_s: when DOWN ends, unless a trial succeeds before that.
    """

    def __init__(
        self, failures_max: int = FAILURES_MAX, backoff_max_s: float = BACKOFF_MAX_S
    ) -> None:
        """Begin UP.

        Args:
            failures_max: failures in a row after which it is DOWN.
            backoff_max_s: the longest time for which it is DOWN without a trial.
        """
        self.health = Health.UP
        self._failures_max, self._backoff_max_s = failures_max, backoff_max_s
        self._failures = 0
        self._backoff_s = BACKOFF_MIN_S
        self.down_until_s = 0.0
        self._on_trial = False
        self._is_lost = False

    def lose(self) -> None:
        """Take the direction down for good."""
        self.health, self._is_lost = Health.DOWN, True

    def usable(self, now_s: float) -> bool:
        """Return whether the direction may be used: it is UP, or due for a trial."""
        if self._is_lost:
            return False
        if self.health is Health.DOWN:
            return now_s >= self.down_until_s
        return self.health is Health.UP

    @property
    def is_failing(self) -> bool:
        """Return whether the direction is not UP, and may be UP again."""
        return self.health is not Health.UP and not self._is_lost

    def try_now(self, now_s: float) -> None:
        """Make a direction that is DOWN due for a trial, since it seems to work again."""
        self.down_until_s = min(self.down_until_s, now_s)

    def begun(self, now_s: float) -> None:
        """Record that an op begins; in a direction that is DOWN, this op alone is the trial."""
        if self.health is Health.DOWN:
            self._on_trial = True
            self.down_until_s = now_s + self._backoff_s

    def succeeded(self) -> bool:
        """Record a success; return whether the state changed.

        A direction that hangs is not UP as soon as one of its I/Os ends: see `came_back`.
        """
        if self._is_lost or self.health is Health.HUNG:
            return False
        changed = self.health is not Health.UP
        self.health, self._failures, self._backoff_s = Health.UP, 0, BACKOFF_MIN_S
        self._on_trial = False
        return changed

    def failed(self, now_s: float) -> bool:
        """Record a failure; return whether the direction went DOWN because of it."""
        if self._is_lost or self.health is Health.HUNG:
            return False
        self._failures += 1
        if self.health is Health.UP and self._failures < self._failures_max:
            return False
        if self.health is Health.DOWN and not self._on_trial:
            return False  # the op began before the direction went down
        if self._on_trial:
            self._backoff_s = min(self._backoff_s * 2, self._backoff_max_s)
        self.health, self._on_trial = Health.DOWN, False
        self.down_until_s = now_s + self._backoff_s
        return True

    def hung(self) -> bool:
        """Record that I/O does not end in time; return whether that is new."""
        if self._is_lost:
            return False
        changed = self.health is not Health.HUNG
        self.health = Health.HUNG
        return changed

    def came_back(self, now_s: float) -> bool:
        """Put a HUNG direction on trial, since its I/O has ended; return whether it was HUNG."""
        if self.health is not Health.HUNG:
            return False
        self.health, self.down_until_s, self._on_trial = Health.DOWN, now_s, False
        return True
