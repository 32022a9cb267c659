"""The mover of an engine: one life after another, with pauses that grow while it cannot start."""

from __future__ import annotations

import asyncio
from asyncio import Future
from contextlib import suppress
from functools import partial

from flexkv.common.errors import RemoteError
from flexkv.mover.engine_config import EngineConfig
from flexkv.mover.life import MoverLife, MoverSizes
from flexkv.mover.store_config import StoreConfig
from flexkv.mover.wire import Lent
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

PAUSE_S, PAUSE_MAX_S = 0.2, 30.0
"""The first and the longest pause before a mover is started again."""
SOUND_S = 10.0
"""A life that was connected, and lasted for so long, does not count as a failed start."""


class Mover:
    """Starts a mover when it is needed, and again when it has ended.

    Attributes:
        where: names the store, or the engine.
        sizes: what each life has room for.
        lives: how many were started.
    """

    def __init__(
        self, config: StoreConfig | EngineConfig, sizes: MoverSizes, lent: Lent | None = None
    ) -> None:
        """Start nothing yet; for the arguments see `MoverLife`."""
        self.where, self.sizes, self.lives = config.where, sizes, 0
        self._config, self._lent = config, lent
        self._life: MoverLife | None = None
        self._failures, self._not_before_s = 0, 0.0
        self._why, self._is_closed = "", False

    def life(self) -> MoverLife:
        """Return the life that runs. If there is none, start one, unless the pause goes on.

        Raises:
            RemoteError: the pause is not over, no process can be started, or this is closed.
        """
        if self._life is not None and self._life.why is None:
            return self._life
        now_s = asyncio.get_running_loop().time()
        if self._is_closed or now_s < self._not_before_s:
            raise RemoteError(self.where, "request", f"its mover is not there: {self._why}")
        try:
            self._life = MoverLife(self._config, self.sizes, self._lent)
        except OSError as error:
            self._count_failure(now_s, f"it cannot be started: {error.strerror}")
            log.warning("mover_ended", store=self.where, reason=self._why, lives=self.lives)
            raise RemoteError(self.where, "request", self._why) from error
        self.lives += 1
        log.info("mover_started", store=self.where, pid=self._life.pid)
        self._life.ended.add_done_callback(partial(self._has_ended, self._life, now_s))
        return self._life

    @property
    def ready(self) -> MoverLife | None:
        """Return the life that runs and is ready; None while there is none."""
        life = self._life
        return life if life is not None and life.why is None and life.is_ready else None

    def _has_ended(self, life: MoverLife, begun_s: float, ended: Future[str]) -> None:
        now_s = asyncio.get_running_loop().time()
        if life.is_ready and now_s - begun_s >= SOUND_S:
            self._failures = 0
        self._count_failure(now_s, ended.result())
        if not self._is_closed:
            log.warning("mover_ended", store=self.where, reason=self._why, lives=self.lives)

    def _count_failure(self, now_s: float, why: str) -> None:
        self._why = why
        self._not_before_s = now_s + min(PAUSE_MAX_S, PAUSE_S * 2 ** min(self._failures, 16))
        self._failures += 1

    async def keep(self) -> None:
        """Keep a mover running until cancelled: other nodes use what it adds or lends."""
        while True:
            with suppress(RemoteError):
                await asyncio.wait([self.life().ended])
            await asyncio.sleep(self.pause_s)

    @property
    def pause_s(self) -> float:
        """Return how much of the pause is left before a mover may be started."""
        return max(0.0, self._not_before_s - asyncio.get_running_loop().time())

    async def leave(self) -> None:
        """Let the mover leave the store, without blocking the loop. Idempotent."""
        self._is_closed, self._why = True, "it was closed"
        if self._life is not None:
            await self._life.leave()

    def close(self) -> None:
        """Let the mover leave the store, and wait for it in this thread. Idempotent."""
        self._is_closed, self._why = True, "it was closed"
        if self._life is not None:
            self._life.close()
