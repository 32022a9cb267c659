"""A store in memory, with a clock of its own, that knows how its objects were used.

It has names and times, no bytes of spans. Requests take a moment of the loop's time; a listing is
not a snapshot: each page has what is there when it is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from random import Random

from typing_extensions import Buffer

from flexkv.common.errors import ClosedError
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.remote.landing import Landing
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.store import Listed

PAGE = 1000


Clock = Callable[[], float]


def _loop_time_s() -> float:
    return asyncio.get_running_loop().time()


class TimedObjects:
    """What the store holds, for all who use it.

    Attributes:
        folders: by what a name has up to its last slash, when each object was last modified.
        deleted: called with the name of each object that is deleted.
        touched: called with the name of each object that is touched.
    """

    def __init__(
        self, random: Random, ahead_s: float, clock: Clock | None = None, pace: float = 1.0
    ) -> None:
        """Hold nothing.

        Args:
            random: decides how long requests take.
            ahead_s: by how much the store's clock is ahead of `clock`.
            clock: the loop's if not given.
            pace: how many seconds the store counts in a second of `clock`.
        """
        self.random = random
        self.folders: dict[str, dict[str, float]] = {}
        self.deleted: Callable[[str], None] = lambda name: None
        self.touched: Callable[[str], None] = lambda name: None
        self._bytes: dict[str, bytes] = {}
        self._clock, self._ahead_s, self._pace = clock or _loop_time_s, ahead_s, pace

    def now_s(self) -> float:
        """Return the store's time: whole seconds, as those of real ones are."""
        return float(int(self._pace * self._clock() + self._ahead_s))

    def create(self, name: str, content: bytes = b"", age_s: float = 0.0) -> bool:
        """Create an object that is so old already; return False if it exists."""
        folder = self._folder(name)
        if name in folder:
            return False
        folder[name] = self.now_s() - age_s
        if content:
            self._bytes[name] = content
        return True

    def _folder(self, name: str) -> dict[str, float]:
        return self.folders.setdefault(name[: name.rfind("/") + 1], {})

    def modified_s(self, name: str) -> float:
        """Return when an object was last modified.

        Raises:
            FileNotFoundError: it is not there.
        """
        try:
            return self._folder(name)[name]
        except KeyError:
            raise FileNotFoundError(name) from None

    def touch(self, name: str) -> None:
        """Make an object as new as if it were written now."""
        self.modified_s(name)
        self._folder(name)[name] = self.now_s()
        self.touched(name)

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        if self._folder(name).pop(name, None) is not None:
            self._bytes.pop(name, None)
            self.deleted(name)

    def content(self, name: str) -> bytes:
        """Return an object's bytes."""
        self.modified_s(name)
        return self._bytes.get(name, b"")


class TimedStore:
    """One engine's access to the objects.

    Attributes:
        is_dead: whether the engine was killed: nothing that it sends arrives any more.
        sent: how many requests it has sent.
    """

    kind, where = "memory", "a store with a clock"

    def __init__(self, objects: TimedObjects) -> None:
        self.is_dead, self.sent = False, 0
        self._objects = objects

    async def _travel(self) -> None:
        """Let the time of a request pass, half of it at least before the store acts."""
        self.sent += 1
        await asyncio.sleep(self._objects.random.uniform(0.005, 0.05))
        if self.is_dead:
            await asyncio.get_running_loop().create_future()

    async def put(self, name: str, buffers: Sequence[Buffer]) -> bool:
        """Create an object; return False if it exists."""
        await self._travel()
        is_new = self._objects.create(name, b"".join(bytes(buffer) for buffer in buffers))
        await self._travel()
        return is_new

    async def read(self, name: str) -> bytes:
        """Return an object's bytes."""
        await self._travel()
        return self._objects.content(name)

    async def head(self, name: str) -> Listed:
        """Return an object's age."""
        await self._travel()
        return Listed(name, 0, self._objects.modified_s(name))

    async def pages(self, prefix: str) -> AsyncIterator[list[Listed]]:
        """Yield the objects below `prefix` by pages."""
        folders = self._objects.folders
        one = prefix.count("/") > 1  # shards, leases and generations have nothing below them
        below = [prefix] if one else sorted(at for at in folders if at.startswith(prefix))
        for at in below:
            folder = folders.get(at, {})
            names = list(folder)
            for begin in range(0, len(names), PAGE):
                await self._travel()
                some = names[begin : begin + PAGE]
                yield [Listed(name, 0, folder[name]) for name in some if name in folder]

    async def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        await self._travel()
        self._objects.delete(name)

    async def touch(self, name: str) -> None:
        """Make an object as new as if it were written now."""
        await self._travel()
        self._objects.touch(name)

    async def sweep(self, prefix: str, age_s: float) -> int:
        """Remove nothing."""
        return 0

    def landing(self, requests: Requests, host: HostBlocks, copier: Copier) -> Landing:
        """Refuse: there are no bytes of spans."""
        raise ClosedError("this store has no bytes of spans")

    async def leave(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
