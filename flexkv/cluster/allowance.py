"""How much another process may use: an amount at once, and so much a second later on. Pure."""

from __future__ import annotations

from typing import NamedTuple

_ROUNDING = 1e-6
"""A lack smaller than this counts as none, since times are rounded."""


class Allowance(NamedTuple):
    """An amount that may be used at once, and how much a second is added until it is full again.

    In any interval of T seconds, at most `burst + per_s x T` is used.
    """

    burst: float
    per_s: float


class Account:
    """What is left of an allowance."""

    __slots__ = ("_at_s", "_left", "allowance")

    def __init__(self, allowance: Allowance, now_s: float) -> None:
        self.allowance, self._left, self._at_s = allowance, allowance.burst, now_s

    def _level(self, now_s: float) -> float:
        gained = (now_s - self._at_s) * self.allowance.per_s
        return min(self.allowance.burst, self._left + gained)

    def take(self, amount: float, now_s: float) -> None:
        """Use an amount; what is left may become negative."""
        self._left, self._at_s = self._level(now_s) - amount, now_s

    def give_back(self, amount: float) -> None:
        """Add an amount that was taken and not used."""
        self._left += amount

    def lacks_s(self, amount: float, now_s: float) -> float:
        """Return in how many seconds an amount can be used; 0 if it can be used now."""
        lacking = amount - self._level(now_s)
        return lacking / self.allowance.per_s if lacking > _ROUNDING else 0.0

    def is_full(self, now_s: float) -> bool:
        """Return whether all of the burst can be used."""
        return self._level(now_s) >= self.allowance.burst
