"""Which holders are read from: one whose read has failed is left out for a while, then on trial.

    up ──a read fails──▶ left out ──pause──▶ on trial: one request ──blocks arrive──▶ up
                            ▲                     │
                            └───── fails, ×2 ─────┘      the pauses: 1 s at first, 30 s at most

A link that fails has a breaker of its own: see `PeerBreaker`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from flexkv.actors.health import Breaker
from flexkv.common.errors import PeerError

PAUSE_MAX_S = 30.0
"""The longest pause; the first is that of every `Breaker`."""


@dataclass
class _Failing:
    """A holder that has failed, and has sent nothing since.

    Attributes:
        trial: which request is on trial.
        timer: calls when it may be tried.
    """

    breaker: Breaker = field(default_factory=lambda: Breaker(1, PAUSE_MAX_S))
    trial: int | None = None
    timer: asyncio.TimerHandle | None = None


class HolderHealth:
    """The breakers of all holders whose latest reads have failed."""

    def __init__(self, changed: Callable[[int], None]) -> None:
        """`changed` is called with a holder that may be read from again, or may not any more."""
        self._changed = changed
        self._failing: dict[int, _Failing] = {}
        self._is_closed = False

    def is_usable(self, holder: int) -> bool:
        """Return whether a new request may read from a holder."""
        failing = self._failing.get(holder)
        return failing is None or failing.breaker.usable(asyncio.get_running_loop().time())

    def begin(self, holder: int, request: int) -> None:
        """Record that a request reads from a holder; if that has failed, this is its trial.

        Raises:
            PeerError: the holder is left out now, or another request is its trial.
        """
        failing = self._failing.get(holder)
        if failing is None:
            return
        now_s = asyncio.get_running_loop().time()
        if failing.breaker.usable(now_s):
            failing.breaker.begun(now_s)
            failing.trial = request
            self._await_pause(holder, failing)
        elif failing.trial != request:
            raise PeerError(str(holder), "asking", "it has failed a moment ago")

    def failed(self, holder: int) -> None:
        """Record that a holder did not send what was asked of it."""
        if self._is_closed:
            return
        failing = self._failing.setdefault(holder, _Failing())
        if failing.breaker.failed(asyncio.get_running_loop().time()):
            failing.trial = None
            self._await_pause(holder, failing)

    def arrived(self, holder: int) -> None:
        """Record that blocks of a holder have arrived."""
        if holder in self._failing:
            self.forget(holder)
            self._changed(holder)

    def forget(self, holder: int) -> None:
        """Forget the failures of a holder."""
        failing = self._failing.pop(holder, None)
        if failing is not None and failing.timer is not None:
            failing.timer.cancel()

    def clear(self) -> None:
        """Forget all failures."""
        for holder in list(self._failing):
            self.forget(holder)

    def close(self) -> None:
        """Forget all failures, and those that come."""
        self._is_closed = True
        self.clear()

    def _await_pause(self, holder: int, failing: _Failing) -> None:
        """Say that a holder is left out, and say when it may be tried."""
        if failing.timer is not None:
            failing.timer.cancel()
        loop = asyncio.get_running_loop()
        failing.timer = loop.call_at(failing.breaker.down_until_s, self._is_due, holder, failing)
        self._changed(holder)

    def _is_due(self, holder: int, failing: _Failing) -> None:
        failing.breaker.try_now(asyncio.get_running_loop().time())  # a timer may be a bit early
        self._changed(holder)
