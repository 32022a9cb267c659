"""Which engine collects a pool, and the store's time. Machines' clocks are not compared.

    <pool>/gc/1  ──▶  gc/2  ──▶  gc/3        each created by whoever collects, to go on doing so
                                  └── no gc/4 for LEASE_S: any engine may create it, one succeeds

The lease saves requests. It is no lock: an engine that is late, and deletes while another one has
the lease, does no harm, since each object is looked at right before it is deleted.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable

from flexkv.io.remote.names import Pool
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.until import Until

LEASE_S = 300.0
"""An engine that has not renewed its lease for this long is taken to be gone."""
RENEW_S = LEASE_S / 3
REQUEST_S, RELEASE_S = 10.0, 1.0
GRAIN_S = 1.0
"""Stores may know times by the second only."""


def within(seconds: float) -> Until:
    """Return the end of a request that may take some seconds."""
    return Until(asyncio.get_running_loop().time() + seconds)


class StoreClock:
    """The store's clock, as the times of objects show it.

    An object that was just written has the store's time, but for the time that the request took.
    So there are two answers: what is to be deleted is judged by the earlier one, and what is to be
    touched by the later one.
    """

    def __init__(self) -> None:
        self._early_s = self._late_s = math.nan
        """By how much the store's time is ahead of the loop's."""

    @property
    def is_known(self) -> bool:
        """Return whether the time was read at all."""
        return not math.isnan(self._early_s)

    def read(self, begin_s: float, end_s: float, modified_s: float) -> None:
        """Take the time of an object that was written between two times of the loop."""
        self._early_s = modified_s - end_s
        self._late_s = modified_s + GRAIN_S - begin_s

    def early_s(self) -> float:
        """Return the store's time, or a little less."""
        return asyncio.get_running_loop().time() + self._early_s

    def late_s(self) -> float:
        """Return the store's time, or a little more."""
        return asyncio.get_running_loop().time() + self._late_s


def folder_of(pool: Pool) -> str:
    """Return what the names of a pool's leases begin with."""
    return f"{pool.name}/gc/"


async def numbers_in(requests: Requests, folder: str) -> dict[int, float]:
    """Return when each object below `folder` was last modified whose name is a number.

    Raises:
        RemoteError: the store failed, or did not answer in time.
    """
    return {
        int(number): each.modified_s
        async for page in requests.pages(folder, REQUEST_S)
        for each in page
        if (number := each.name.removeprefix(folder)).isdecimal()
    }


class Lease:
    """The right to collect a pool.

    Attributes:
        clock: set whenever the lease is looked at.
    """

    def __init__(self, requests: Requests) -> None:
        """Take the store's requests; nothing is sent."""
        self.clock = StoreClock()
        self._requests = requests
        self._me = secrets.token_hex(16)
        self._folder, self._number = "", 0
        """Of the lease that this engine has; 0 if it has none."""
        self._begin_s = -math.inf
        """When it was created, or before."""
        self._now_s: Callable[[], float] = time.monotonic
        """The time of the loop on which it was created."""

    def is_held(self, pool: Pool) -> bool:
        """Return whether this engine may collect a pool now. Any thread may call this."""
        if not self._number or self._folder != folder_of(pool):
            return False
        return self._now_s() < self._begin_s + LEASE_S

    async def hold(self, pool: Pool) -> bool:
        """Take the lease of a pool, or renew it if that is due; return whether it is held.

        Raises:
            RemoteError: the store failed, or did not answer in time.
        """
        self._enter(pool)
        now_s = asyncio.get_running_loop().time()
        if self.is_held(pool) and now_s < self._begin_s + RENEW_S:
            return True
        found = await numbers_in(self._requests, self._folder)
        latest = max(found, default=0)
        if self._number and self._number != latest:
            self._number = 0  # another engine has taken over
        is_new = not self._number
        if is_new and latest and not await self._is_over(pool, found[latest]):
            return False
        if not await self._create(latest + 1):
            return False
        if is_new and await self._latest() != self._number:
            self._number = 0  # another engine was faster, and has renewed its lease since
            return False
        for number in found:
            await self._requests.delete(f"{self._folder}{number}", within(REQUEST_S))
        return True

    async def _latest(self) -> int:
        return max(await numbers_in(self._requests, self._folder), default=0)

    def _enter(self, pool: Pool) -> None:
        """Turn to another pool, unless it is the same."""
        if self._folder != folder_of(pool):
            self._folder, self._number = folder_of(pool), 0

    async def _is_over(self, pool: Pool, modified_s: float) -> bool:
        """Return whether another engine's lease is over; the clock is read if it may be."""
        if self.clock.is_known and self.clock.early_s() - modified_s <= LEASE_S:
            return False
        await self.read_clock(pool)
        return self.clock.early_s() - modified_s > LEASE_S

    async def read_clock(self, pool: Pool) -> None:
        """Read the store's time, from an object that is made for that.

        Raises:
            RemoteError: the store failed, or did not answer in time.
        """
        self._enter(pool)
        name = f"{self._folder}now-{secrets.token_hex(8)}"
        begin_s = asyncio.get_running_loop().time()
        await self._requests.put(name, [b"\n"], within(REQUEST_S))
        try:
            await self._read_clock(name, begin_s)
        finally:
            await self._requests.delete(name, within(REQUEST_S))

    async def _read_clock(self, name: str, begin_s: float) -> None:
        end_s = asyncio.get_running_loop().time()
        try:
            found = await self._requests.head(name, within(REQUEST_S))
        except FileNotFoundError:
            return  # somebody else tidied up; the next time is read from another object
        self.clock.read(begin_s, end_s, found.modified_s)

    async def _create(self, number: int) -> bool:
        """Create a lease; return False if another engine was first."""
        self._now_s = asyncio.get_running_loop().time
        name, begin_s = f"{self._folder}{number}", self._now_s()
        is_new = await self._requests.put(name, [self._me.encode()], within(REQUEST_S))
        # It may be this engine's own all the same: a put is repeated if its answer is lost.
        if not is_new and not await self._is_mine(name):
            self._number = 0
            return False
        self._number, self._begin_s = number, begin_s
        await self._read_clock(name, begin_s)
        return True

    async def _is_mine(self, name: str) -> bool:
        read = self._requests.store.read
        try:
            owner = await self._requests.tried("get", lambda: read(name), within(REQUEST_S))
        except FileNotFoundError:
            return False
        return owner == self._me.encode()

    async def release(self) -> None:
        """Release the lease, if this engine has it: others may collect at once.

        Raises:
            RemoteError: the store failed, or did not answer in time.
        """
        number, self._number = self._number, 0
        if number:
            await self._requests.delete(f"{self._folder}{number}", within(RELEASE_S))

    async def tidy(self) -> None:
        """Delete what engines left here when they were killed while reading the time.

        Raises:
            RemoteError: the store failed, or did not answer in time.
        """
        before_s = self.clock.early_s() - LEASE_S
        async for page in self._requests.pages(self._folder, REQUEST_S):
            for each in page:
                name = each.name.removeprefix(self._folder)
                if not name.isdecimal() and each.modified_s < before_s:
                    await self._requests.delete(each.name, within(REQUEST_S))
