"""Requests to a store: repeated if they fail, hedged if they are slow, counted, ended in time.

    until ─────────────────────────────────────────────────────────────────────▶ deadline
    get    try 1 ──────────────×   try 2 ──────×   try 3 ────────────────────────┤
               └ hedge ────────×      half of the time that is left, the last try all of it

A store repeats nothing itself, so these are all requests that it gets. Each try of a get or put
keeps to the limit of its direction. One that has not ended in time lowers the limit to a single
request, which may then take all the time that is left.
"""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import Buffer

from flexkv.common.errors import RemoteError
from flexkv.io.remote.body import Body
from flexkv.io.remote.counts import Counting, RemoteCounts
from flexkv.io.remote.gate import Gate
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.pacing import Hedging, Limit
from flexkv.io.remote.store import BodyStore, FileStore, Listed
from flexkv.io.remote.until import Until

if TYPE_CHECKING:
    from flexkv.io.remote.landing import OpenStore

T = TypeVar("T")

SLOW_SHARE = 0.25
"""A get or put that takes longer than this share of the deadline shows that too many are in
flight."""
_LEAST_S = 1e-3
"""No request is made with less time than this."""
_BACKOFF_S = 0.05
"""The longest pause before the first repetition; it doubles for each further one."""


class Requests:
    """A store's requests, for everything that the tier does with it.

    Attributes:
        store: where they go.
        gets, puts: how many may be in flight; callers must keep to that.
    """

    def __init__(
        self, store: OpenStore, options: RemoteOptions, random: Random | None = None
    ) -> None:
        """Take a store, which the caller closes, and what pauses are drawn from."""
        self.store = store
        slow_s = SLOW_SHARE * options.deadline_s
        self.gets, self.puts = Limit(options.gets_max, slow_s), Limit(options.puts_max, slow_s)
        self._gates = {"get": Gate(self.gets), "put": Gate(self.puts)}
        self.counting = Counting()
        self._retries = options.retries
        self._hedging = Hedging(options.hedged_share)
        self._random = random or Random()

    def counts(self) -> RemoteCounts:
        """Return the counts as they are now."""
        return self.counting.snapshot(self.gets.now, self.puts.now)

    # -- gets and puts of spans -----------------------------------------------------------------

    async def get(self, store: BodyStore, name: str, extent: tuple[int, int], until: Until) -> Body:
        """Return bytes of an object: fewer than asked for if it ends there.

        Args:
            store: the store.
            name: the object's.
            extent: the first byte, and the last (exclusive).
            until: when to give up.

        Raises:
            FileNotFoundError: there is no such object.
            RemoteError: the store failed, or did not answer in time.
        """
        hedges = self._hedging

        async def get() -> Body:
            begin_s = asyncio.get_running_loop().time()
            hedges.begun()
            try:
                chunks = await self._first_answer(store, name, extent)
            except EOFError:
                return Body(())
            hedges.took(extent[1] - extent[0], asyncio.get_running_loop().time() - begin_s)
            return Body(chunks)

        body = await self.tried("get", get, until)
        self.counting.other["read_bytes"] += body.nbytes
        return body

    async def _first_answer(
        self, store: BodyStore, name: str, extent: tuple[int, int]
    ) -> Sequence[Buffer]:
        """Return the first answer of one request, or of two if the first is slow."""
        gets = [store.get(name, *extent)]
        try:
            after_s = self._hedging.after_s(extent[1] - extent[0])
            done, _ = await asyncio.wait(gets, timeout=after_s)
            if not done and self._hedging.take():
                self.counting.requests["get"] += 1
                self.counting.other["hedges"] += 1
                gets.append(store.get(name, *extent))
            while True:
                done, pending = await asyncio.wait(gets, return_when=asyncio.FIRST_COMPLETED)
                if not pending or any(not get.exception() for get in done):
                    break
                await asyncio.wait(pending)
            return self._answer(store, gets)
        finally:
            for get in gets:
                _drop(get)

    def _answer(self, store: BodyStore, gets: list[Future[Sequence[Buffer]]]) -> Sequence[Buffer]:
        """Return the first body among some gets, of which one has ended.

        Raises:
            FileNotFoundError: there is none, and no such object.
            RemoteError: all failed.
        """
        for number, get in enumerate(gets):
            if get.done() and not get.exception():
                self.counting.other["hedges_won"] += number
                return get.result()
        raised = gets[0].exception()
        assert raised is not None
        raise store.error_of(raised, "get") from None  # its text may contain credentials

    async def read_into(
        self, store: FileStore, name: str, first: int, buffers: Sequence[memoryview], until: Until
    ) -> int:
        """Read bytes of an object straight into buffers, and return how many: see `FileStore`.

        Raises:
            FileNotFoundError: there is no such object.
            RemoteError: the store failed, or did not answer in time.
        """
        read = await self.tried("get", lambda: store.read_into(name, first, buffers), until)
        self.counting.other["read_bytes"] += read
        return read

    async def put(self, name: str, buffers: Sequence[Buffer], until: Until) -> bool:
        """Create an object; return False if it exists.

        Raises:
            RemoteError: the store failed, or did not answer in time.
        """
        is_new = await self.tried("put", lambda: self.store.put(name, buffers), until)
        if is_new:
            nbytes = sum(memoryview(buffer).nbytes for buffer in buffers)
            self.counting.other["written_bytes"] += nbytes
        else:
            self.counting.other["existing"] += 1
        return is_new

    # -- the others -----------------------------------------------------------------------------

    async def head(self, name: str, until: Until) -> Listed:
        """Return an object's size and age.

        Raises:
            FileNotFoundError: there is no such object.
            RemoteError: the store failed, or did not answer in time.
        """
        return await self.tried("head", lambda: self.store.head(name), until)

    async def delete(self, name: str, until: Until) -> None:
        """Delete an object; one that is not there is no error.

        Raises:
            RemoteError: the store failed, or did not answer in time.
        """
        await self.tried("delete", lambda: self.store.delete(name), until)

    async def touch(self, name: str, until: Until) -> None:
        """Make an object as new as if it were written now.

        Raises:
            FileNotFoundError: there is no such object.
            RemoteError: the store failed, or did not answer in time.
        """
        await self.tried("touch", lambda: self.store.touch(name), until)

    async def pages(self, prefix: str, page_s: float) -> AsyncIterator[list[Listed]]:
        """Yield the objects below `prefix` by pages, each of which may take `page_s`.

        Raises:
            RemoteError: the store failed, or did not answer in time; nothing is repeated.
        """
        pages = self.store.pages(prefix)
        while True:
            until = Until(asyncio.get_running_loop().time() + page_s)
            self.counting.requests["list"] += 1
            try:
                page = await until.wait(anext(pages, None))
            except TimeoutError as error:
                why = f"no answer within {page_s:.3g} s"
                raise RemoteError(self.store.where, "list", why) from error
            if page is None:
                return
            yield page

    async def tried(self, kind: str, request: Callable[[], Awaitable[T]], until: Until) -> T:
        """Return the result of a request, which is repeated if it fails and there is time left.

        Raises:
            FileNotFoundError: there is no such object.
            RemoteError: the last error.
        """
        for number in range(self._retries + 1):
            if until.left_s <= _LEAST_S:
                raise RemoteError(self.store.where, kind, "there was no time left for it")
            is_last = number == self._retries
            try:
                return await self._try(kind, request, until, is_last)
            except RemoteError as error:
                pause_s = self._random.uniform(0, _BACKOFF_S * 2**number)
                if is_last or error.is_lasting or until.left_s <= pause_s + _LEAST_S:
                    raise
            self.counting.retries[kind] += 1
            await asyncio.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    async def _try(
        self, kind: str, request: Callable[[], Awaitable[T]], until: Until, is_last: bool
    ) -> T:
        """Make a request once, when its turn comes."""
        gate = self._gates.get(kind)
        if gate is None:
            return await self.once(kind, request, until, 1.0 if is_last else 0.5)
        try:
            await gate.enter(until)
        except TimeoutError as error:
            why = "no time was left for it when its turn came"
            raise RemoteError(self.store.where, kind, why) from error
        limit, begin_s = gate.limit, asyncio.get_running_loop().time()
        try:
            share = 1.0 if is_last or limit.is_lowest else 0.5
            result = await self.once(kind, request, until, share)
            now_s = asyncio.get_running_loop().time()
            limit.succeeded(now_s, now_s - begin_s)
            return result
        finally:
            gate.leave()

    async def once(
        self, kind: str, request: Callable[[], Awaitable[T]], until: Until, share: float = 1.0
    ) -> T:
        """Return the result of a request that is not repeated, in a share of the time left.

        Raises:
            FileNotFoundError: there is no such object.
            RemoteError: the store failed, or did not answer in time.
        """
        self.counting.requests[kind] += 1
        given_s = until.left_s * share
        try:
            return await until.wait(request(), share)
        except TimeoutError as error:
            raise self._late(kind, until, given_s) from error
        except RemoteError as error:
            if not until.is_stopped:
                self._failed(kind, error)
            raise

    def _late(self, kind: str, until: Until, given_s: float) -> RemoteError:
        """Return the error of a request that was late; count it unless nobody waits any more."""
        if not until.is_stopped:
            self.counting.failures[kind] += 1
            if (gate := self._gates.get(kind)) is not None:
                gate.limit.was_late()
        return RemoteError(self.store.where, kind, f"no answer within {max(0.0, given_s):.3g} s")

    def _failed(self, kind: str, error: RemoteError) -> None:
        self.counting.failures[kind] += 1
        if error.is_busy:
            self.counting.other["busy"] += 1
            if (gate := self._gates.get(kind)) is not None:
                gate.limit.is_too_high(asyncio.get_running_loop().time())


def _drop(get: Future[Any]) -> None:
    """Cancel a get that nobody waits for any more; if it has failed, its error is known."""
    if not get.cancel() and not get.cancelled():
        get.exception()
