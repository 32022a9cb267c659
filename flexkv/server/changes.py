"""Tells clients that watch what became resident, and what is so no more."""

from __future__ import annotations

import asyncio

from flexkv.index.keys import key_list
from flexkv.index.residency import Residency
from flexkv.server.link import Link
from flexkv.server.wire import Changed, ToServer

EVERY_S = 0.01
"""How long a change may wait until it is told."""
CHANGES_MAX = 1 << 16
"""In between; of more it is only told that there were some."""


class Watchers:
    """The clients that watch the index."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._links: set[Link[ToServer]] = set()
        self._some = asyncio.Event()

    def add(self, link: Link[ToServer]) -> None:
        """Tell a client every change from now on."""
        if not self._links:
            self._residency.watch(CHANGES_MAX)
        self._links.add(link)
        self._some.set()

    def discard(self, link: Link[ToServer]) -> None:
        """Tell a client nothing any more."""
        if link in self._links:
            self._links.remove(link)
            if not self._links:
                self._residency.watch(0)
                self._some.clear()

    async def run(self) -> None:
        """Tell changes as they come, for ever."""
        while True:
            await self._some.wait()
            self.tell()
            await asyncio.sleep(EVERY_S)

    def tell(self) -> None:
        """Tell what has changed."""
        if not self._links:
            return
        changes = self._residency.changes()
        if changes is None:
            message = Changed((), lost=True)
        elif changes:
            message = Changed(tuple((key, tier.label, there) for key, tier, there in changes))
        else:
            return
        for link in self._links:
            link.send(message)

    def resident(self, keys: bytes) -> Changed:
        """Give where the blocks of a prompt are: who asks may never have been told."""
        there = [
            (key, tier.label, True)
            for tier, placement in self._residency.find(keys).ready.items()
            for key in key_list(self._residency.keys_of(tier, placement.block_ids))
        ]
        return Changed(tuple(there))
