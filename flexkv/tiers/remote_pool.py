"""The pool of a store that an engine shares with others, and its generations.

    opened ──▶ which generation is the latest? ──▶ join its pool ──▶ reads and writes
                         (asked again until the store answers)
    clear  ──▶ nothing is read or written ──▶ begin a later generation ──▶ join its pool

A clear makes an engine leave its pool for a new one, since others may go on storing what it has
cleared. Engines that start later join the latest generation; running ones do not follow. What older
generations hold is garbage.

An SSD tier outlives its engine, so the generation of its blocks is noted beside it: none of them
may get into the pool of a later one. An engine that starts again and finds a later generation
clears its tiers, unless it is in a cluster: the cluster says what is cleared, so it stays in the
pool that is noted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from flexkv.actors.flight import wake
from flexkv.actors.supervisor import Bell
from flexkv.common.errors import ClosedError, ConfigError, RemoteError
from flexkv.common.terms import BlockIds, Tier
from flexkv.index.residency import Residency
from flexkv.io.remote.names import Pool, PoolDescription
from flexkv.io.remote.open import join_pool
from flexkv.io.remote.store import Store
from flexkv.observe.logs import get_logger
from flexkv.process.stoppable import failure_within
from flexkv.process.workers import Workers
from flexkv.tiers.ssd_note import SsdNote

log = get_logger(__name__)

RETRY_S, RETRY_MAX_S = 0.5, 30.0
"""The first and the longest pause before a store that did not answer is asked again."""
ANSWER_S, ANSWER_MAX_S = 10.0, 160.0
"""How long the store may take to answer all requests of the first attempt, and of any. Each attempt
that was too short makes the next one twice as long, so that a slow store is joined, too."""
RENEW_S = 3600.0
"""How often it is checked that the object of the generation in use is still there."""
CLEARS_MAX = 1 << 20
"""How many generations there may be between two resets of a cluster."""
WRITTEN_S = 10.0
"""How long `written` waits for a new generation."""
NOTE_S = 3.0
"""How long the SSD tier may take to note the generation of its blocks."""
NOTE = "remote-generation"


class SharedPool:
    """The pool in use, and what makes a clear of it last. It is the tier's `Persistence`.

    Attributes:
        span_blocks: how many blocks a span has.
        base: the first generation, below which the others are numbered.
        current: the pool in use; None while it is not known: nothing is read or written then.
        clears: how often it was left for one of a new generation.
        failure: why the store let no pool be joined last; None since one was joined.
        lose: takes the tier down for good, for a reason.
        clear_engine: forgets all blocks of the engine.
        ssd_cleared: returns once nothing brings back what was cleared of the SSD tier.
    """

    def __init__(
        self, store: Store, description: PoolDescription, ssd_directories: Sequence[Path] = ()
    ) -> None:
        """Take the store, what the blocks are, and where the SSD tier is; nothing is sent."""
        self.span_blocks = description.span_blocks
        self.current: Pool | None = None
        self.clears = 0
        self.lose: Callable[[str], None] = _not_open
        self.clear_engine: Callable[[], object] = lambda: None
        self.ssd_cleared: Callable[[], Awaitable[None]] = _nothing_to_clear
        self.base = Pool(description)
        self._store = store
        self._is_new_wanted = self._is_followed = False
        self._note = SsdNote(ssd_directories, NOTE)
        self._noted = self._note.read()
        self._kept: int | None = None
        """The generation of blocks that an earlier run has left on SSD; None: there are none."""
        self._stays = False
        """Whether the engine stays in that generation, even if there is a later one."""
        self._is_known = False
        """Whether that generation is noted; otherwise it is the first one."""
        self._clear_member: Callable[[], object] | None = None
        self._era: int | None = None
        """The cluster's generation to which the one in use belongs; None: it is not known."""
        self._bell = Bell()
        self._waiters: list[asyncio.Future[None]] = []
        self.failure: RemoteError | None = None

    # -- the task -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Join a pool, and another one after each clear, until cancelled."""
        while True:
            await self._join()
            try:
                async with asyncio.timeout(RENEW_S):
                    await self._bell.wait()
            except TimeoutError:
                await self._renew()

    async def _join(self) -> None:
        """Join a pool, however often the store has to be asked."""
        pause_s, answer_s = RETRY_S, ANSWER_S
        while self.current is None:
            try:
                async with asyncio.timeout(answer_s):
                    await self._try_to_join()
            except (RemoteError, TimeoutError) as error:
                self.failure = error if isinstance(error, RemoteError) else self._silent(answer_s)
                why = str(self.failure)
                log.warning("remote_pool_not_joined", store=self._store.where, error=why)
                if isinstance(error, TimeoutError):
                    answer_s = min(2 * answer_s, ANSWER_MAX_S)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)
            except ConfigError as error:
                self.lose(str(error))
                return

    async def _try_to_join(self) -> None:
        """Join the pool, of a new generation after a clear; return without one if another came.

        Raises:
            RemoteError: the store failed.
            ConfigError: something else is in the pool's place.
        """
        is_new, is_followed, clears = self._is_new_wanted, self._is_followed, self.clears
        generation = await self._latest(self._era)
        if self._kept is not None and not is_new:
            if generation > self._kept and not self._stays:
                self._start_anew()
                return
            generation = self._kept
        if generation and (is_followed or self._kept):
            await self._begin(generation)  # others have to find it; the store may have lost it
        while is_new and not await self._begin(generation := generation + 1):
            pass  # another engine has begun it meanwhile
        pool = Pool(msgspec.structs.replace(self.base.description, generation=generation))
        await join_pool(self._store, pool)
        if self._note:
            await self._note_generation(generation)
        if clears != self.clears:
            return  # a clear came meanwhile: the caller tries again
        self.current, self._is_new_wanted, self.failure = pool, False, None
        self._is_followed, self._era = False, generation // CLEARS_MAX
        log.info("remote_pool_joined", store=self._store.where, pool=pool.name)
        wake(self._waiters)

    def _start_anew(self) -> None:
        """Forget what an earlier run has left: another engine was cleared since then.

        This engine joins the cleared one, so it counts as computing what that does now.
        """
        log.warning(
            "tiers_cleared",
            reason="the blocks on SSD may be older than a clear of another engine that shares "
            "the remote tier",
        )
        (self._clear_member or self.clear_engine)()
        self.clear(None)
        self._is_new_wanted = False

    async def _note_generation(self, generation: int) -> None:
        """Note whose blocks the SSD tier has.

        If that fails, an older note goes, too: the next run must not join a pool that was left.
        """

        async def note() -> None:
            await self.ssd_cleared()
            await _in_thread(partial(self._note.write, f"{generation} {self._place}"))

        if why := await failure_within(NOTE_S, note()):
            log.warning("remote_generation_not_noted", generation=generation, error=why)
            if why := await failure_within(NOTE_S, _in_thread(self._note.forget)):
                log.warning("ssd_note_not_removed", error=why)

    @property
    def _place(self) -> str:
        """Return what has the generations: they are numbered anew in another store or pool."""
        return f"{self._store.where} {self.base.name}"

    async def _renew(self) -> None:
        """Create the generation's object again, if a lifecycle rule of the bucket has deleted it.

        Without that object, an engine that starts later would join an older generation.
        """
        if self.current is None or not self.current.description.generation:
            return
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._begin(self.current.description.generation)
        except (RemoteError, TimeoutError) as error:
            why = str(error) or str(self._silent(ANSWER_S))
            log.warning("remote_generation_not_renewed", store=self._store.where, error=why)

    async def _latest(self, era: int | None) -> int:
        """Return the number of the latest generation: of an era, or of all."""
        prefix = self.base.generations
        latest = CLEARS_MAX * (era or 0)
        async for page in self._store.pages(prefix):
            names = [each.name.removeprefix(prefix) for each in page]
            numbers = [int(name) for name in names if name.isdecimal()]
            of_era = [each for each in numbers if era in (None, each // CLEARS_MAX)]
            latest = max([latest, *of_era])
        return latest

    async def _begin(self, generation: int) -> bool:
        return await self._store.put(f"{self.base.generations}{generation}", [b"\n"])

    def _silent(self, answer_s: float) -> RemoteError:
        return RemoteError(self._store.where, "join", f"no answer within {answer_s:g} s")

    async def joined(self) -> Pool:
        """Return the pool in use, once there is one."""
        while self.current is None:
            await self._change()
        return self.current

    async def left(self, pool: Pool) -> None:
        """Return once a pool is not in use any more."""
        while self.current is pool:
            await self._change()

    async def _change(self, timeout_s: float | None = None) -> None:
        """Return once a pool was joined or left, or after `timeout_s`."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await asyncio.wait([waiter], timeout=timeout_s)
        finally:
            if not waiter.done():
                self._waiters.remove(waiter)

    # -- persistence ----------------------------------------------------------------------------

    def restore(self, residency: Residency) -> int:
        """Restore nothing: the table does not have what is far, but it has what is on SSD.

        If no generation of this pool is noted for those, they count as older than every clear.
        """
        if Tier.DISK in residency.tiers and residency.counts(Tier.DISK).ready:
            generation, _, place = self._noted.partition(" ")
            self._is_known = place == self._place and generation.isdecimal()
            self._kept = int(generation) if self._is_known else 0
        return 0

    def stored(self, block_ids: BlockIds) -> None:
        """Do nothing: the port notes spans that were written."""

    def erased(self, block_ids: BlockIds) -> None:
        """Do nothing: far blocks have no places."""

    def clear(self, root: bytes | None) -> None:
        """Leave the pool for one of a new generation, also for the clear of one namespace."""
        self.current, self._is_new_wanted, self._is_followed = None, True, False
        self._kept, self._stays = None, False
        self.clears += 1
        wake(self._waiters)
        self._bell.ring()

    @property
    def era(self) -> int:
        """Return the cluster's generation to which the one in use belongs; 0 if unknown."""
        return self._era or 0

    def follow(self, cluster_generation: int | None) -> None:
        """Go to the generation that all engines of a cluster use after its reset.

        Each reset begins an *era* of generations of the pool: its own, and those that clears of
        single engines begin after it. If there are some already, this engine may have begun the
        latest before a restart, so it goes there. It never leaves the era, unless None says that
        the cluster knows of no reset: then it goes to the latest generation of all.
        """
        self.clear(None)
        self._is_new_wanted, self._is_followed, self._era = False, True, cluster_generation

    def stay(
        self,
        cluster_generation: int,
        is_apart: bool,
        clear_engine: Callable[[], object] | None = None,
    ) -> None:
        """Stay in the generation that is noted for the blocks on SSD, until `follow`.

        If none is noted, that is the first of the cluster's generation. Before the first reset,
        this engine may have been cleared since the first one: it joins the latest then, and clears
        its tiers if that is a later one.

        Args:
            cluster_generation: of the cluster, to which those blocks belong; 0 before the first
                reset.
            is_apart: whether the engine was cleared alone in it. If no generation of the pool that
                it has begun then is noted, it begins another one.
            clear_engine: clears the tiers, and keeps sharing; None: `clear_engine` of the pool.
        """
        if self.current is None:
            first, kept = CLEARS_MAX * cluster_generation, self._kept or 0
            if cluster_generation and kept // CLEARS_MAX != cluster_generation:
                kept = first
            self._kept, self._era = kept, kept // CLEARS_MAX
            self._stays = self._is_known or cluster_generation > 0
            self._clear_member = clear_engine
            self._is_new_wanted = is_apart and not kept % CLEARS_MAX

    async def written(self) -> None:
        """Return once the pool of a new generation is joined, if there was a clear.

        Raises:
            RemoteError: the store does not answer. A later run may read what was cleared.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + WRITTEN_S
        while self._is_new_wanted or self._is_followed:
            if loop.time() >= until_s:
                raise self.failure or self._silent(WRITTEN_S)
            await self._change(until_s - loop.time())

    async def flush(self) -> None:
        """Return once the store has recorded a clear."""
        await self.written()

    def begin_sync(self) -> BlockIds:
        """Return no blocks: what a store has taken is on stable storage."""
        return np.zeros(0, np.int64)

    def sync_failed(self, unsynced: BlockIds) -> BlockIds:
        """Return no blocks."""
        return unsynced

    async def finish(self) -> None:
        """Do nothing."""


async def _in_thread(work: Callable[[], None]) -> None:
    """Run work that may hang; its thread ends after it."""
    thread = Workers(1, "flexkv-note")
    running = asyncio.get_running_loop().run_in_executor(thread, work)
    thread.shutdown(wait=False)
    await running


async def _nothing_to_clear() -> None:
    """Return at once."""


def _not_open(why: str) -> None:
    raise ClosedError(f"the remote tier is not open: {why}")
