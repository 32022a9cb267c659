"""What a node does when it hears of its cluster's generation, or is cleared alone.

heard first   blocks of an earlier run stay if they are of it; else all tiers are cleared
reset         all tiers are cleared, and the node shares again
cleared alone, or started after another node was   the node is apart
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple

from flexkv.actors.supervisor import Bell
from flexkv.cluster.generations import RANDOM_BITS, Joined, Noted
from flexkv.cluster.plane import MetadataPlane
from flexkv.common.errors import ClosedError, TransferError
from flexkv.observe.logs import get_logger
from flexkv.process.stoppable import run_stoppable
from flexkv.tiers.generation import Generation
from flexkv.tiers.remote import RemoteTier

log = get_logger(__name__)


class NodeActions(NamedTuple):
    """What a node can be made to do."""

    clear: Callable[[], object]
    """Forgets all blocks of the engine."""
    ssd_cleared: Callable[[], Coroutine[Any, Any, None]]
    """Returns once nothing brings back what was cleared of the SSD tier: see `TierHooks`."""
    end_reads: Callable[[], None]
    """Ends what other nodes read here, and what is read of them."""
    avoid_peers: Callable[[], None]
    """Leaves peers out of runs, or not, as the generation says now."""
    end_links: Callable[[], None]
    """Ends the links over which others ask this node."""


class GenerationChanges:
    """Keeps a node in the generation of its cluster."""

    def __init__(
        self,
        generation: Generation,
        plane: MetadataPlane,
        remote: RemoteTier | None,
        actions: NodeActions,
    ) -> None:
        """Take what is changed; nothing was heard yet.

        Args:
            generation: of this node's blocks, once what an earlier run has left is restored.
            plane: hears of the cluster's.
            remote: goes from generation to generation with the cluster.
            actions: of this node.
        """
        self._generation, self._plane, self._remote = generation, plane, remote
        self._actions, self._changed = actions, Bell()
        self._generations = plane.follower.generations
        if generation.has_restored:
            self._generations.noted = generation.noted
            if remote is not None:
                name, is_apart = generation.noted.name, generation.noted.is_apart
                number = name if name >> RANDOM_BITS else 0  # a book is no generation
                remote.stay(number, is_apart, self._start_anew)
        self._generations.on_joined = self._joined
        self._generations.on_reset = self._reset
        self._generations.on_renamed = self._renamed
        generation.on_apart = self._parted
        plane.registration.is_apart = lambda: generation.is_apart
        plane.follower.may_ask = lambda: generation.is_sharing

    def _joined(self, joined: Joined) -> None:
        """Begin to share, unless a node was cleared alone that may be this one."""
        generation, number = self._generation, self._generations.number
        is_apart = generation.is_apart or (
            generation.noted.is_apart if joined.is_noted else joined.is_closed
        )
        if not joined.is_noted and (number or generation.has_restored):
            self._clear(number)
        generation.adopt(number, self._generations.name)
        if is_apart:
            log.warning(
                "peers_not_shared",
                reason="a node was cleared alone, maybe this one before a restart; "
                "`flexkv cluster reset` makes all nodes share again",
            )
            generation.part()
        self._begin_to_share()

    def _reset(self, number: int) -> None:
        """Begin a new generation, because the cluster was reset: nothing of an older one stays."""
        log.warning("cluster_was_reset", generation=number, before=self._generation.number)
        self._clear(number)
        self._generation.adopt(number, self._generations.name)
        self._begin_to_share()

    def _clear(self, number: int) -> None:
        """Forget all blocks for a generation of the cluster."""
        self._clear_blocks()
        if self._remote is not None:
            self._remote.follow(number or None)

    def _start_anew(self) -> None:
        """Forget all blocks, and go on sharing: what others have of this generation is right."""
        self._clear_blocks()
        self._plane.follower.resync()  # what others have was forgotten, too

    def _clear_blocks(self) -> None:
        """Forget all blocks, but not as a clear of this node alone."""
        self._generation.is_adopting = True
        try:
            self._actions.clear()
        finally:
            self._generation.is_adopting = False
        self._actions.end_reads()

    def _begin_to_share(self) -> None:
        self._actions.avoid_peers()
        self._plane.follower.resync()
        self._changed.ring()

    def _renamed(self) -> None:
        """Note another name of the same generation: Redis had lost it before the first reset."""
        self._generation.rename(self._generations.name)
        self._changed.ring()

    def _parted(self) -> None:
        """End all sharing: this node is apart.

        Others are refused when they connect again, and so avoid it. It may still have what they
        know of: a clear of one namespace leaves the blocks of the others.
        """
        self._actions.end_reads()
        self._actions.avoid_peers()
        self._actions.end_links()
        self._plane.registration.look_soon()
        self._changed.ring()

    # -- notes ----------------------------------------------------------------------------------

    async def note(self) -> None:
        """Note each change beside the SSD; if that fails, the next run clears that again.

        The end of the engine waits for neither the disk nor the note. That this node is apart is
        noted at once: what it stores from now on must not be taken for blocks of the generation.
        """
        try:
            while True:
                await self._changed.wait()
                change, noted = self._generation.to_note
                self._generation.was_noted(change, await self._note(noted))
        finally:
            self._generation.stop()

    async def _note(self, noted: Noted) -> Exception | None:
        """Note a generation; return why that failed."""
        if not noted.is_apart:
            try:
                await self._actions.ssd_cleared()
            except (TransferError, ClosedError) as error:
                log.warning("cluster_generation_not_noted", generation=noted.name, error=str(error))
                return error
        write = partial(_write, self._generation, noted)
        return await run_stoppable("generation", write)


def _write(generation: Generation, noted: Noted, _: Callable[[], None]) -> Exception | None:
    return generation.note(noted)
