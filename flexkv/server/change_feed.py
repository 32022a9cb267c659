"""Reports to clients that watch which blocks became resident, and which no longer are."""

from __future__ import annotations

import asyncio

from flexkv.common.request import Operation
from flexkv.common.terms import BLOCK_KEY_BYTES
from flexkv.index.change_hub import ChangeHub, ChangeReader
from flexkv.index.keys import key_list, leaf_keys
from flexkv.index.residency import READY, Residency
from flexkv.links.link import Link
from flexkv.server.wire import Changed, Done, Start, ToServer

EVERY_S = 0.01
"""How long a change may wait until it is reported."""
CHANGES_MAX = 1 << 16
"""Maximum number of changes between two reports; beyond it only their loss is reported."""
UNREAD_BYTES_MAX = 256 << 10
"""A client with more unread bytes than this gets no changes until it catches up."""


class ChangeFeed:
    """The clients that want to know of changes of the index."""

    def __init__(self, residency: Residency, hub: ChangeHub) -> None:
        self._residency, self._hub = residency, hub
        self._reader: ChangeReader | None = None
        self._is_behind: dict[Link[ToServer], bool] = {}
        self._some = asyncio.Event()
        self._blocks_max = sum(residency.counts(tier).capacity for tier in residency.tiers)

    def add(self, link: Link[ToServer]) -> None:
        """Report every change to a client from now on."""
        if self._reader is None:
            self._reader = self._hub.reader(CHANGES_MAX)
        self._is_behind[link] = False
        self._some.set()

    def discard(self, link: Link[ToServer]) -> None:
        """Report nothing to a client any more."""
        self._is_behind.pop(link, None)
        if self._reader is not None and not self._is_behind:
            self._reader.close()
            self._reader = None
            self._some.clear()

    async def run(self) -> None:
        """Report changes as they come, until cancelled."""
        while True:
            await self._some.wait()
            self.tell()
            await asyncio.sleep(EVERY_S)

    def tell(self) -> None:
        """Report what has changed. A client that does not read is later told that it lost some."""
        if self._reader is None:
            return
        changes = self._reader.take()
        told = tuple(
            (_chain_key(each.key, each.group), each.tier.label, each.is_ready, each.group)
            for each in changes or ()
        )
        for link, is_behind in self._is_behind.items():
            lost = is_behind or changes is None
            if link.unsent_bytes > UNREAD_BYTES_MAX:
                self._is_behind[link] = lost or bool(told)
            elif lost or told:
                self._is_behind[link] = False
                link.send(Changed(told, lost))

    def tell_of(self, link: Link[ToServer], keys: bytes) -> None:
        """Report where the blocks of a prompt are: the client may never have been told."""
        self.tell()
        keys = keys[: (self._blocks_max + 1) * BLOCK_KEY_BYTES]  # no tier can hold more
        count, rest = divmod(len(keys), BLOCK_KEY_BYTES)
        if rest or not count or self._is_behind.get(link, True):  # `keys` may be malformed
            return
        if link.unsent_bytes > UNREAD_BYTES_MAX:
            self._is_behind[link] = True  # it will be told that it has missed something
            return
        residency = self._residency
        there = [
            (_chain_key(key, group), tier.label, True, group)
            for group in range(residency.groups)
            for each in residency.survey(keys, 0, count - 1, use=False, group=group)
            for tier, state, ids in zip(residency.tiers, each.states, each.block_ids, strict=True)
            if state == READY and ids is not None
            for key in key_list(residency.keys_of(tier, ids))
        ]
        for begin in range(0, len(there), CHANGES_MAX):
            link.send(Changed(tuple(there[begin : begin + CHANGES_MAX])))

    def answer(self, link: Link[ToServer], start: Start, keys: bytes, done: Done) -> None:
        """Send a client the end of a request, after the changes that it made."""
        self.tell()
        if not done.moved and start.operation == Operation.PUT.label:  # another put stored them
            self.tell_of(link, keys)
        link.send(done)


def _chain_key(key: bytes, group: int) -> bytes:
    """Return the key of a leaf's parent, or a chain block's own key."""
    if not group:
        return key
    return leaf_keys(_NO_ROOT + key, group)[BLOCK_KEY_BYTES:]  # XOR undoes itself


_NO_ROOT = bytes(BLOCK_KEY_BYTES)
