"""Keeps this node in the registry, and reads who else is there.

    not registered ──▶ registered: a beat every third of a TTL ──▶ refused, for good
        │  ▲                                                          ▲
        ▼  └── the other life's TTL is over, or it had our address    │ another life has the id
       waiting: another life has the id ──────────────────────────────┘ and beats

An id belongs to one life at a time. A node that was killed and starts again at its old address
takes its id over at once. Elsewhere it has to wait until the old life's TTL is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

from flexkv.actors.supervisor import Bell
from flexkv.cluster.follower import Follower, scrub
from flexkv.cluster.membership import Membership
from flexkv.cluster.publisher import Publisher
from flexkv.cluster.records import Beat
from flexkv.cluster.store import ClusterStore, ClusterStoreError
from flexkv.common.errors import ConfigError
from flexkv.index.hints import Hints

BEATS_PER_TTL = 3
RETRY_S, RETRY_MAX_S = 0.1, 5.0
"""The first and the longest pause before a store that failed is asked again."""
LOOK_AGAIN_S = 0.5
"""The shortest time between two reads of the registry, however often the bell rings."""


class Registration:
    """The task that beats.

    Attributes:
        is_registered: whether this life has the node's id.
        refused: why it will not have it; None if that is not so.
        log_bytes: what the log takes in the store's memory, as last read.
        on_failure: is told what the store did not do.
        on_success: is called whenever the store has answered.
        on_refused: is told that another node has the same id.
        is_apart: returns whether this node was cleared alone.
    """

    def __init__(
        self,
        store: ClusterStore,
        membership: Membership,
        publisher: Publisher,
        follower: Follower,
        hints: Hints,
    ) -> None:
        """Register nothing yet."""
        self.is_registered, self.log_bytes = False, 0
        self.refused: ConfigError | None = None
        self.on_failure: Callable[[ClusterStoreError], None] = lambda _: None
        self.on_success: Callable[[], None] = lambda: None
        self.on_refused: Callable[[ConfigError], None] = lambda _: None
        self.is_apart: Callable[[], bool] = lambda: False
        self._store, self._membership, self._hints = store, membership, hints
        self._publisher, self._follower = publisher, follower
        self._own, self._count = membership.own, 0
        self._over: int | None = None
        self._other: Beat | None = None
        self._bell = Bell()
        self._random = Random(self._own.life)

    def look_soon(self) -> None:
        """Beat and read the registry soon: something has changed."""
        self._bell.ring()

    async def run(self) -> None:
        """Beat until cancelled, or refused."""
        interval_s = self._membership.ttl_s / BEATS_PER_TTL
        longest_s, pause_s = min(RETRY_MAX_S, interval_s / 2), RETRY_S
        while True:
            try:
                await self.beat()
                await self.look()
            except ClusterStoreError as error:
                self.on_failure(error)
                await asyncio.sleep(min(longest_s, pause_s) * self._random.uniform(0.5, 1.0))
                pause_s *= 2
            except ConfigError as error:
                self.refused = error
                self.on_refused(error)
                return
            else:
                pause_s = RETRY_S
                self.on_success()
                await self._pause(interval_s)

    async def _pause(self, interval_s: float) -> None:
        """Return after an interval, or soon after the bell has rung."""
        least_s = min(LOOK_AGAIN_S, interval_s) * self._random.uniform(0.5, 1.0)
        await asyncio.sleep(least_s)
        try:
            async with asyncio.timeout(interval_s * self._random.uniform(0.9, 1.0) - least_s):
                await self._bell.wait()
        except TimeoutError:
            pass

    async def beat(self) -> None:
        """Register this life, unless another one has the id.

        Raises:
            ClusterStoreError: the store failed.
            ConfigError: another running node has the id.
        """
        beat = Beat(self._own, self._publisher.sent_seq, self._count)
        self._count += 1
        other = await self._store.register(beat, self._over)
        if other is None or other.node.life == self._own.life:
            self.is_registered, self._over = True, self._own.life
        elif self.is_registered:
            self.is_registered = False
            raise self._duplicate(other)
        elif other.node.address == self._own.address:
            self._over = other.node.life  # nobody else can listen there
            self.look_soon()
        elif self._other is not None and self._other != other:
            raise self._duplicate(other)
        else:
            self._other = other

    def _duplicate(self, other: Beat) -> ConfigError:
        why = f"the running node at {other.node.address} has the same id"
        return ConfigError("node_id", self._own.id.hex(), why)

    async def look(self) -> None:
        """Read the registry.

        Raises:
            ClusterStoreError: the store failed.
        """
        await self._follower.generations.mend(self._store, self.is_apart())
        before = self._follower.positions
        registry = await self._store.registry()
        self.log_bytes = registry.log_bytes
        self._membership.saw(registry.beats, asyncio.get_running_loop().time())
        self._follower.registered(registry.ends, before)
        await scrub(self._hints)
        known = {member.node.id for member in self._membership.members()}
        await self._store.forget([each for each in registry.expired if each not in known])
