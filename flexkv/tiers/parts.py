"""What a tier below host memory is made of. A backend lists its tiers; the engine names none.

To add a tier: write a module that opens it and returns its parts, and list it in a backend.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import msgspec

from flexkv.actors.actor import Window
from flexkv.actors.checks import BlockChecks
from flexkv.actors.shares import Shares
from flexkv.actors.write_behind import ShipLimits
from flexkv.cluster.grants import GrantCounts, Owner
from flexkv.cluster.plane import ClusterState
from flexkv.common.errors import CorruptBlockError, StorageError
from flexkv.common.terms import BlockIds, Tier
from flexkv.index.catalogue import Sought
from flexkv.index.change_hub import ChangeHub
from flexkv.index.residency import Residency
from flexkv.io.peer.mooncake import MooncakeCounts
from flexkv.io.peer.port import PeerReads
from flexkv.io.ports import DurablePort
from flexkv.io.remote.counts import RemoteCounts
from flexkv.process.spawning import Spawn
from flexkv.tiers.remote_gc.collector import CollectionCounts
from flexkv.tiers.remote_gc.touches import TouchCounts


class Persistence(Protocol):
    """What makes the blocks of a tier survive the process."""

    def restore(self, residency: Residency) -> int:
        """Fill the tier of an empty index with what survived; return how many blocks."""
        ...

    def stored(self, block_ids: BlockIds) -> None:
        """Record blocks that became READY, except those that were forgotten meanwhile."""
        ...

    def erased(self, block_ids: BlockIds) -> None:
        """Record blocks that must not come back."""
        ...

    def clear(self, root: bytes | None) -> None:
        """Record that all blocks, or those of a namespace, are about to be cleared."""
        ...

    async def written(self) -> None:
        """Return once no crash of this process undoes what was recorded.

        Raises:
            TransferError: it may be undone.
        """
        ...

    async def flush(self) -> None:
        """Return once what was recorded is on stable storage.

        Raises:
            StorageError: it cannot be recorded, or the device refused.
            ClosedError: the engine was closed meanwhile.
        """
        ...

    def begin_sync(self) -> BlockIds:
        """Return the blocks stored since the last sync; call it right before a sync."""
        ...

    def sync_failed(self, unsynced: BlockIds) -> BlockIds:
        """Return the blocks that a failed sync may have lost; a later run will not restore them."""
        ...

    async def finish(self) -> None:
        """Record what is left, for a bounded time: the engine is being closed."""
        ...


class PresenceCheck(Protocol):
    """The check that what a tier is stored in is still in place."""

    lost: StorageError | None

    async def look(self) -> StorageError | None:
        """Look now; return the error of a tier that is lost."""
        ...


class TierHooks(NamedTuple):
    """What the background work of a tier may ask of its engine, or report to it."""

    is_idle: Callable[[], bool]
    """Whether the tier has no transfers to make."""
    drop_corrupt: Callable[[CorruptBlockError], None]
    """Forgets blocks whose bytes have changed."""
    lose: Callable[[str], None]
    """Takes the tier down for good, for a reason."""
    spawn: Spawn
    """Starts a task, which has a name, for a client that is asynchronous; it must end by itself,
    and an exception from it ends the engine."""
    spawn_session: Spawn
    """Starts a task that serves another node; what it raises is logged, and ends only this task."""
    is_failing: Callable[[], bool]
    """Returns whether the tier is not used now, because its I/O failed."""
    try_now: Callable[[], None]
    """Makes the next request a trial of a tier that is not used, since it seems to work again."""
    owner: Owner
    """Lends blocks of the engine to other nodes."""
    changes: ChangeHub
    """Passes on which blocks became READY, or are not any more."""
    clear: Callable[[], object]
    """Forgets all blocks of the engine."""
    ssd_cleared: Callable[[], Coroutine[Any, Any, None]]
    """Returns once neither a crash nor a loss of power can bring back what was cleared of the SSD
    tier.

    Raises TransferError if its journals cannot be written, and ClosedError."""


class StoreStatistics(msgspec.Struct, frozen=True):
    """What a far tier knows of its store, and has asked of it.

    Attributes:
        where: names the store, without credentials.
        is_joined: whether the store has answered, so that the tier is in use.
        generation: of the pool in use; 0 until a clear.
        known_spans: how many spans the store is said to have.
        lost_spans: how many hints were displaced by others since the start.
        listed_rounds: how often the whole pool was listed.
        requests: what was asked of the store since the start.
        collection: what was deleted from the pool, and whether this engine does that.
        touches: what was done for spans that were read and old.
        refused: why the store refuses what collecting or touching needs, so that it pauses; empty
            if it does not.
    """

    where: str
    is_joined: bool
    generation: int
    known_spans: int
    lost_spans: int
    listed_rounds: int
    requests: RemoteCounts
    collection: CollectionCounts
    touches: TouchCounts
    refused: str = ""


class ClusterStatistics(msgspec.Struct, frozen=True):
    """What a node knows of its cluster, and does for the other nodes.

    Attributes:
        address: where this node answers others.
        shared_generation: the generation in which it shares blocks; None if it is apart.
        state: what it knows of the others.
        grants: what others have asked of it.
        connections: how many connections of others there are.
        lent_bytes: how many bytes others were let read since the start. What they have read
            by Mooncake is not counted, since the owner does not see that.
        down: addresses of nodes that are not asked now, because they did not answer.
        read: what was read of each node since the start, by its address.
        read_in_all: what was read of all nodes, also of those that have left.
        mooncake: what was read by Mooncake; None if it is not configured.
    """

    address: str
    shared_generation: int | None
    state: ClusterState
    grants: GrantCounts
    connections: int
    lent_bytes: int
    down: tuple[str, ...]
    read: dict[str, PeerReads]
    read_in_all: PeerReads
    mooncake: MooncakeCounts | None = None


class Cluster(Protocol):
    """The nodes that share blocks with this one."""

    async def reset(self) -> int:
        """Begin a new generation, for which all nodes clear their tiers; return its number.

        Raises:
            ClusterStoreError: Redis did not do it, or it is not known whether it did.
        """
        ...

    def address_of(self, holder: int) -> str:
        """Return the address of the node of a number; the number if it has left."""
        ...

    def statistics(self) -> ClusterStatistics:
        """Return what is known of the cluster now."""
        ...


Work = Mapping[str, Coroutine[Any, Any, None]]
"""Tasks that run as long as the engine does, by name."""


def no_work(hooks: TierHooks) -> Work:
    """Return no background work."""
    return {}


async def _nothing_goes_on() -> None:
    """Return at once."""


@dataclass(frozen=True)
class TierParts:
    """One tier below host memory.

    Attributes:
        tier: which.
        capacity_blocks: how many blocks it was opened with; None for a far tier, whose blocks are
            not this engine's: only the backend's catalogue says what it has.
        port: moves blocks between the tier and host memory; closed by whoever opened it.
        inbound: bound on the bytes in flight from the tier.
        outbound: bound on the bytes in flight to the tier.
        persistence: what makes its blocks survive; None if nothing does.
        presence: the check that it is in place; None if there is none.
        work: returns the tasks that the engine has to run for the tier.
        checks: what sums its blocks and compares them; None if they are not checked. The
            checksummers of all tiers share one array of sums, which are those of host memory.
        ship: how a far tier is written to; None for other tiers, or if it is only read.
        stop: ends all transfers soon, because the engine is being closed; does nothing where
            hardware may go on with them.
        leave: called once nothing is asked of the tier any more, before the port is closed: returns
            once nothing goes on there, after some seconds at most.
        waiting_since_s: see `TransferActor`.
        store: returns what a far tier knows of its store; None for other tiers.
        cluster: the nodes with which the tier shares blocks; None for other tiers.
        look_up: asks a far tier what its catalogue does not know of some prefixes. It returns what
            ends with the answer, or after a moment without it; None if there is nothing to wait
            for. None for tiers without lookups.
        shares: bounds the bytes in flight from each source of the tier; None if it has only one.
    """

    tier: Tier
    capacity_blocks: int | None
    port: DurablePort
    inbound: Window
    outbound: Window
    persistence: Persistence | None = None
    presence: PresenceCheck | None = None
    work: Callable[[TierHooks], Work] = no_work
    checks: BlockChecks | None = None
    ship: ShipLimits | None = None
    store: Callable[[], StoreStatistics] | None = None
    cluster: Cluster | None = None
    stop: Callable[[], None] = lambda: None
    leave: Callable[[], Awaitable[None]] = _nothing_goes_on
    waiting_since_s: Callable[[int], float] | None = None
    look_up: Callable[[Sought], Awaitable[None] | None] | None = None
    shares: Shares | None = None
