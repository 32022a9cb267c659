"""Mooncake Store as a store of the remote tier, through a mover. (ADR 17)

    get    mover: store ──▶ slot of the window ──copy threads: copy and sum──▶ arena
    put    arena ──threads here──▶ slot ──▶ mover: store

A span is one object of Mooncake, with the same bytes as in any other store. Mooncake gets a slot,
and never host memory. It lists nothing, so what is there is known by asking for names.
"""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import cast

from typing_extensions import Buffer

from flexkv.common.errors import RemoteError
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.remote.landing import BodyLanding, Landing
from flexkv.io.remote.names import DESCRIPTION
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.store import Listed
from flexkv.mover.codes import EXISTS, NO_SPACE, NOT_FOUND, NOT_READY, reason
from flexkv.mover.life import MoverLife
from flexkv.mover.mover import Mover
from flexkv.mover.window import Slot, granted
from flexkv.mover.wire import NAMES_MAX, Done, Exist, Found, Get, Put, Remove, Request, Size
from flexkv.process.background import in_background
from flexkv.process.workers import Workers

_MISSING = {NOT_FOUND, NOT_READY}
_GENERATIONS = "/generations/"


class MooncakeStore:
    """A Mooncake Store behind a mover.

    Attributes:
        mover: the mover.
        prefix: what the names of all objects begin with, in the store.
    """

    kind, shares_bodies = "mooncake", True

    def __init__(self, mover: Mover, prefix: str = "flexkv/") -> None:
        """Start the threads that fill slots.

        Raises:
            OSError: a thread cannot be started.
        """
        self.where, self.mover = mover.where, mover
        self.prefix = prefix
        self._fillers = in_background(lambda: Workers(2, "flexkv-mover-fill"))

    def __repr__(self) -> str:
        return f"MooncakeStore({self.where})"

    # -- bytes ----------------------------------------------------------------------------------

    def get(self, name: str, first: int, last: int) -> Future[Sequence[Buffer]]:
        """Begin to read the bytes from `first` to `last` (exclusive) of an object, as one chunk.

        Mooncake reads the whole object, even for a fetch that begins inside of a span.
        """
        answer: Future[Sequence[Buffer]] = asyncio.get_running_loop().create_future()
        try:
            life = self.mover.life()
        except RemoteError as error:
            answer.set_exception(error)
            return answer
        taken = life.take()
        answer.add_done_callback(lambda _: taken.cancel())
        send = partial(self._send_get, life, answer, self.prefix + name, (first, last))
        taken.add_done_callback(send)
        return answer

    def _send_get(
        self,
        life: MoverLife,
        answer: Future[Sequence[Buffer]],
        name: str,
        extent: tuple[int, int],
        taken: Future[Slot],
    ) -> None:
        if taken.cancelled():
            return
        if error := taken.exception():
            _fail(answer, error)
            return
        slot = taken.result()
        if answer.done():
            slot.free()
            return
        reply = life.ask(lambda number: Get(number, name, slot.at, slot.nbytes), slot)
        answer.add_done_callback(lambda _: reply.cancel())
        reply.add_done_callback(partial(self._has_got, answer, slot, extent))

    def _has_got(
        self,
        answer: Future[Sequence[Buffer]],
        slot: Slot,
        extent: tuple[int, int],
        reply: Future[Done | Found],
    ) -> None:
        if reply.cancelled():
            return
        error = reply.exception()
        code = 0 if error else self._code_of(reply.result())
        if error is None and code < 0:
            error = self._error(code, "get")
        if error is not None:
            _fail(answer, error)
            return
        first, last = extent
        if first >= code or answer.done():
            slot.free()
            _fail(answer, EOFError(f"{self.where}: the object is too short"))
        else:
            answer.set_result([cast("Buffer", slot.body(first, min(last, code)))])

    def error_of(
        self, raised: BaseException, what: str
    ) -> RemoteError | FileNotFoundError | EOFError:
        """Return the error of a get that raised."""
        assert isinstance(raised, RemoteError | FileNotFoundError | EOFError), raised
        return raised

    async def put(self, name: str, buffers: Sequence[Buffer]) -> bool:
        """Create an object whose bytes are the buffers' in turn; return False if it exists."""
        views = [memoryview(buffer).cast("B") for buffer in buffers if memoryview(buffer).nbytes]
        size = sum(view.nbytes for view in views)
        life = self.mover.life()
        if size > self.mover.sizes.slot_bytes:
            why = f"{size} bytes are more than a slot has"
            raise RemoteError(self.where, "put", why, is_lasting=True)
        slot = await granted(life.take())
        try:
            await self._filled(slot, views)
        except BaseException as error:
            slot.free()
            if isinstance(error, Exception) and life.why is not None:
                raise life.error("put") from error  # as when the threads were shut down
            raise
        is_kept = _GENERATIONS in name or name.endswith(f"/{DESCRIPTION}")
        full = self.prefix + name
        code = await self._request(life, lambda n: Put(n, full, slot.at, size, is_kept), slot)
        if code == EXISTS:
            if not all(await self._exist([full])):
                raise self._unfinished()
            return False
        if code < 0:
            raise self._error(code, "put")
        return True

    def _unfinished(self) -> RemoteError:
        """Return the error of a put while another put of the same object has not ended.

        If that one was killed, the master forgets it after a while, 30 s by default.
        """
        error = RemoteError(self.where, "put", "another put of the object has not ended")
        error.blames_tier = False
        return error

    async def _filled(self, slot: Slot, views: list[memoryview]) -> None:
        """Copy buffers to a slot. They are lent until then, so a cancelled call waits as well."""
        loop = asyncio.get_running_loop()
        filling = loop.run_in_executor(self._fillers, slot.fill, views)
        try:
            await asyncio.wait([filling])
        except asyncio.CancelledError:
            while not filling.done():
                try:
                    await asyncio.wait([filling])
                except asyncio.CancelledError:
                    continue
            raise
        filling.result()

    async def read(self, name: str) -> bytes:
        """Return a small object's bytes."""
        try:
            (body,) = await self.get(name, 0, self.mover.sizes.slot_bytes)
        except EOFError:
            return b""
        return bytes(body)

    def landing(self, requests: Requests, host: HostBlocks, copier: Copier) -> Landing:
        """Return the landing that brings spans from here."""
        return BodyLanding(self, requests, host, copier)

    # -- names ----------------------------------------------------------------------------------

    async def exist(self, names: Sequence[str]) -> list[bool]:
        """Return which objects are there, as far as the master knows."""
        found = list[bool]()
        for at in range(0, len(names), NAMES_MAX):
            found += await self._exist([self.prefix + name for name in names[at : at + NAMES_MAX]])
        return found

    async def _exist(self, names: list[str]) -> list[bool]:
        reply = await self.mover.life().ask(lambda number: Exist(number, names))
        assert isinstance(reply, Found)
        if len(reply.each) != len(names):
            why = f"Mooncake answers {len(reply.each)} of {len(names)} names"
            raise RemoteError(self.where, "exist", why)
        if wrong := next((each for each in reply.each if each < 0), 0):
            raise self._error(wrong, "exist")
        return [each > 0 for each in reply.each]

    async def head(self, name: str) -> Listed:
        """Return an object's size; its age is not known."""
        full = self.prefix + name
        code = await self._request(self.mover.life(), lambda number: Size(number, full))
        if code < 0:
            raise self._error(code, "head")
        return Listed(name, code, 0.0)

    async def pages(self, prefix: str) -> AsyncIterator[list[Listed]]:
        """Yield the generations of a pool, which have no gaps; for other prefixes yield nothing."""
        if not prefix.endswith(_GENERATIONS):
            return
        first, step = 1, 16
        while True:
            names = [f"{prefix}{number}" for number in range(first, first + step)]
            there = await self.exist(names)
            yield [Listed(name, 1, 0.0) for name, it in zip(names, there, strict=True) if it]
            if not there[-1]:
                return
            first += step

    async def delete(self, name: str) -> None:
        """Delete an object; one that is not there is no error."""
        full = self.prefix + name
        code = await self._request(self.mover.life(), lambda number: Remove(number, full))
        if code < 0 and code not in _MISSING:
            raise self._error(code, "delete")

    async def touch(self, name: str) -> None:
        """Check that an object is there. The store keeps what is read by a rule of its own."""
        await self.head(name)

    async def sweep(self, prefix: str, age_s: float) -> int:
        """Remove nothing: the master discards what killed puts have left behind."""
        return 0

    async def leave(self) -> None:
        """Let the mover leave the store."""
        await self.mover.leave()

    def close(self) -> None:
        """Let the mover leave the store, and end the threads. Idempotent."""
        self.mover.close()
        self._fillers.shutdown()

    # -- answers --------------------------------------------------------------------------------

    async def _request(
        self, life: MoverLife, make: Callable[[int], Request], slot: Slot | None = None
    ) -> int:
        """Send a request to the mover, and return the code of its answer."""
        return self._code_of(await life.ask(make, slot))

    def _code_of(self, reply: Done | Found) -> int:
        assert isinstance(reply, Done), reply
        return reply.code

    def _error(self, code: int, what: str) -> RemoteError | FileNotFoundError:
        if code in _MISSING:
            return FileNotFoundError(f"{self.where}: the object is not there")
        return RemoteError(self.where, what, reason(code), is_busy=code == NO_SPACE)


def _fail(answer: Future[Sequence[Buffer]], error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)
