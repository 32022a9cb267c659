"""The pause after requests that a store refuses, as for want of rights: it may grant them soon.

refused ──▶ 30 s ──refused──▶ 60 s ──refused──▶ … 5 min ──granted──▶ no pause
"""

from __future__ import annotations

import asyncio
import math

from flexkv.common.errors import RemoteError

PAUSE_S, PAUSE_MAX_S = 30.0, 300.0
"""The pause after the first refusal, which doubles with each further one, and the longest."""


class Refusals:
    """The refusals of one kind of requests."""

    def __init__(self) -> None:
        self._pause_s, self._until_s, self._why = 0.0, -math.inf, ""

    @property
    def why(self) -> str:
        """Return what was refused, and why, until it is granted; empty if it was not refused."""
        return self._why

    @property
    def is_pause(self) -> bool:
        """Return whether the requests are not to be made now."""
        return asyncio.get_running_loop().time() < self._until_s

    def refused(self, error: RemoteError) -> float:
        """Record a refusal, and return how long the pause is from now on."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._until_s:  # else it was made before the pause began
            self._pause_s = min(max(PAUSE_S, 2 * self._pause_s), PAUSE_MAX_S)
            self._until_s, self._why = now_s + self._pause_s, str(error)
        return self._until_s - now_s

    def granted(self) -> None:
        """Record that such a request was granted."""
        self._pause_s, self._until_s, self._why = 0.0, -math.inf, ""
