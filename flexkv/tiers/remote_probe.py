"""Asks a store that has stopped answering whether it answers again, so that it is used soon after.

    tier down ──▶ asked each second ──no answer──▶ silent ──an answer──▶ the next request is a trial

A trial is the fetch of somebody's prompt, and if it fails, the pause before the next one doubles. A
probe costs nobody anything. A store that answers all probes, and fails other requests, gets its
trials after the pauses only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from flexkv.common.errors import RemoteError
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.until import Until
from flexkv.tiers.remote_pool import SharedPool

PERIOD_S = 1.0
"""The pause between two probes."""
ANSWER_S = 2.0
"""How long the store may take to answer one."""


class TierState(NamedTuple):
    """What the probe learns from the tier's health, and reports to it."""

    is_failing: Callable[[], bool]
    """Whether the tier is not used now, because its I/O failed."""
    try_now: Callable[[], None]
    """Lets the next request try the tier, whatever its pause is."""


class Probe:
    """Asks the store of one tier whether it answers."""

    def __init__(self, requests: Requests, pool: SharedPool) -> None:
        self._requests, self._pool = requests, pool

    async def run(self, state: TierState) -> None:
        """Ask while the tier is not used, until cancelled."""
        was_silent = False
        while True:
            await asyncio.sleep(PERIOD_S)
            if not state.is_failing():
                was_silent = False
            elif not await self._answers():
                was_silent = True
            elif was_silent:
                was_silent = False
                state.try_now()

    async def _answers(self) -> bool:
        """Return whether the store answers a request about the pool's description."""
        until = Until(asyncio.get_running_loop().time() + ANSWER_S)
        name = self._pool.base.description_name
        try:
            with suppress(FileNotFoundError):
                await self._requests.once("head", lambda: self._requests.store.head(name), until)
        except RemoteError:
            return False
        return True
