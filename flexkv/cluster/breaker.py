"""Decides when a peer is tried again after its link has failed. Pure: time arrives as a value.

up ──▶ failed ──▶ pause ──▶ one trial ──▶ up, for `STEADY_S`: failures are forgotten
                    ▲           │
                    └── ×2 ─────┘
"""

from __future__ import annotations

from random import Random

PAUSE_MIN_S, PAUSE_MAX_S = 0.2, 10.0
STEADY_S = 10.0
"""A link that lived for so long proves that its peer works; shorter lives count as failures."""
UNANSWERED_MAX = 3
"""This many requests in a row without an answer in time count as a failure."""


class PeerBreaker:
    """The failures of one peer.

    Attributes:
        is_up: whether the peer may be asked.
    """

    def __init__(self, random: Random) -> None:
        """Spread the pauses by `random`, so that many nodes do not reconnect at once."""
        self._random = random
        self.is_up = True
        self._failures = self._unanswered = 0
        self._up_since_s = 0.0

    def connected(self, now_s: float) -> None:
        """Record that the peer accepted a link."""
        self.is_up, self._up_since_s, self._unanswered = True, now_s, 0

    def failed(self, now_s: float) -> float:
        """Record that the link ended or was not accepted; return how long to pause before a trial.

        A link that lived for `STEADY_S` starts the count anew.
        """
        if self.is_up and now_s - self._up_since_s >= STEADY_S:
            self._failures = 0
        self.is_up = False
        pause_s = min(PAUSE_MAX_S, PAUSE_MIN_S * 2.0 ** min(self._failures, 16))
        self._failures += 1
        return pause_s * (0.5 + self._random.random())

    def answered(self) -> None:
        """Record an answer."""
        self._unanswered = 0

    def unanswered(self) -> bool:
        """Record a request without an answer in time; return whether the link should be closed."""
        self._unanswered += 1
        return self._unanswered >= UNANSWERED_MAX
