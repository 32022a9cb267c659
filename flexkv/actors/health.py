"""Whether a tier may be used: a breaker for each direction, and a watch for I/O that does not end.

    UP ── FAILURES_MAX failures in a row ──▶ DOWN for a while ──▶ on trial ── success ──▶ UP
     ╲                                          ▲        (one op)     │
      ╲                                         ╰── failure, ×2 ──────╯
       ── I/O past its deadline ──▶ HUNG ── anything comes back ──▶ on trial

A tier that is lost is DOWN for good, whatever becomes of its I/O.

Pure: the time comes with each call, in seconds from any start.
"""

from __future__ import annotations

from enum import Enum

FAILURES_MAX = 3
"""Failures in a row after which a direction is left alone."""
BACKOFF_MIN_S, BACKOFF_MAX_S = 1.0, 60.0


class Health(Enum):
    """How one direction of a tier is."""

    UP = "up"
    DOWN = "down"
    HUNG = "hung"


class Breaker:
    """One direction of one tier."""

    def __init__(self) -> None:
        self.health = Health.UP
        self._failures = 0
        self._backoff_s = BACKOFF_MIN_S
        self._down_until_s = 0.0
        self._on_trial = False
        self._is_lost = False

    def lose(self) -> None:
        """Take the direction down for good."""
        self.health, self._is_lost = Health.DOWN, True

    def usable(self, now_s: float) -> bool:
        """Tell whether the direction may be used: when it is up, or due for a trial."""
        if self._is_lost:
            return False
        if self.health is Health.DOWN:
            return now_s >= self._down_until_s
        return self.health is Health.UP

    def begun(self, now_s: float) -> None:
        """Take that an op goes through: while it is down that is the trial, and nobody else's."""
        if self.health is Health.DOWN:
            self._on_trial = True
            self._down_until_s = now_s + self._backoff_s

    def succeeded(self) -> bool:
        """Take a success; return whether that changed anything.

        A direction that hangs is not up once one of its I/Os ends: see `came_back`.
        """
        if self._is_lost or self.health is Health.HUNG:
            return False
        changed = self.health is not Health.UP
        self.health, self._failures, self._backoff_s = Health.UP, 0, BACKOFF_MIN_S
        self._on_trial = False
        return changed

    def failed(self, now_s: float) -> bool:
        """Take a failure; tells whether the direction went down by it."""
        if self._is_lost or self.health is Health.HUNG:
            return False
        self._failures += 1
        if self.health is Health.UP and self._failures < FAILURES_MAX:
            return False
        if self.health is Health.DOWN and not self._on_trial:
            return False  # begun before it went down
        if self._on_trial:
            self._backoff_s = min(self._backoff_s * 2, BACKOFF_MAX_S)
        self.health, self._on_trial = Health.DOWN, False
        self._down_until_s = now_s + self._backoff_s
        return True

    def hung(self) -> bool:
        """Take that I/O does not end; tells whether that is news."""
        if self._is_lost:
            return False
        changed = self.health is not Health.HUNG
        self.health = Health.HUNG
        return changed

    def came_back(self, now_s: float) -> bool:
        """Take that I/O ended after all; tells whether the direction was hung."""
        if self.health is not Health.HUNG:
            return False
        self.health, self._down_until_s, self._on_trial = Health.DOWN, now_s, False
        return True
