"""Tells clients that watch what became resident, and what is so no more."""

from __future__ import annotations

import asyncio

from flexkv.common.request import Operation
from flexkv.common.terms import BLOCK_KEY_BYTES
from flexkv.index.keys import key_list
from flexkv.index.residency import READY, Residency
from flexkv.server.link import Link
from flexkv.server.wire import Changed, Done, Start, ToServer

EVERY_S = 0.01
"""How long a change may wait until it is told."""
CHANGES_MAX = 1 << 16
"""In between; of more it is only told that there were some."""
UNREAD_BYTES_MAX = 256 << 10
"""A client with this many unread bytes gets no changes until it has read them."""


class ChangeFeed:
    """The clients that watch the index."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._is_behind: dict[Link[ToServer], bool] = {}
        self._some = asyncio.Event()
        self._blocks_max = sum(residency.counts(tier).capacity for tier in residency.tiers)

    def add(self, link: Link[ToServer]) -> None:
        """Tell a client every change from now on."""
        if not self._is_behind:
            self._residency.watch(CHANGES_MAX)
        self._is_behind[link] = False
        self._some.set()

    def discard(self, link: Link[ToServer]) -> None:
        """Tell a client nothing any more."""
        if self._is_behind.pop(link, None) is not None and not self._is_behind:
            self._residency.watch(0)
            self._some.clear()

    async def run(self) -> None:
        """Tell changes as they come, for ever."""
        while True:
            await self._some.wait()
            self.tell()
            await asyncio.sleep(EVERY_S)

    def tell(self) -> None:
        """Tell what has changed. An engine that is idle reads nothing: it loses track."""
        if not self._is_behind:
            return
        changes = self._residency.changes()
        told = tuple((key, tier.label, there) for key, tier, there in changes or ())
        for link, is_behind in self._is_behind.items():
            lost = is_behind or changes is None
            if link.unsent_bytes > UNREAD_BYTES_MAX:
                self._is_behind[link] = lost or bool(told)
            elif lost or told:
                self._is_behind[link] = False
                link.send(Changed(told, lost))

    def tell_of(self, link: Link[ToServer], keys: bytes) -> None:
        """Tell a client where the blocks of a prompt are: it may never have heard of them."""
        self.tell()
        keys = keys[: (self._blocks_max + 1) * BLOCK_KEY_BYTES]  # no tier can hold more
        count, rest = divmod(len(keys), BLOCK_KEY_BYTES)
        if rest or not count or self._is_behind.get(link, True):  # they may be no keys
            return
        if link.unsent_bytes > UNREAD_BYTES_MAX:
            self._is_behind[link] = True  # it is told that it has missed something
            return
        residency = self._residency
        there = [
            (key, tier.label, True)
            for group in residency.survey(keys, 0, count - 1, use=False)
            for tier, state, ids in zip(residency.tiers, group.states, group.block_ids, strict=True)
            if state == READY and ids is not None
            for key in key_list(residency.keys_of(tier, ids))
        ]
        for begin in range(0, len(there), CHANGES_MAX):
            link.send(Changed(tuple(there[begin : begin + CHANGES_MAX])))

    def answer(self, link: Link[ToServer], start: Start, keys: bytes, done: Done) -> None:
        """Tell a client the end of a request, behind what has changed by it."""
        self.tell()
        if not done.moved and start.operation == Operation.PUT.label:  # another has stored them
            self.tell_of(link, keys)
        link.send(done)
