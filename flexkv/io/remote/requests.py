"""Requests to a store: repeated if they fail, hedged if they are slow, counted, ended in time.

    until ─────────────────────────────────────────────────────────────────────▶ deadline
    get    try 1 ──────────────×   try 2 ──────×   try 3 ────────────────────────┤
               └ hedge ────────×      half of the time that is left, the last try all of it

A store repeats nothing itself, so these are all requests that it gets.
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
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.pacing import Hedging, Limit
from flexkv.io.remote.store import BodyStore, FileStore, Listed

if TYPE_CHECKING:
    from flexkv.io.remote.landing import OpenStore

T = TypeVar("T")

_BACKOFF_S = 0.05
"""The longest pause before the first repetition; it doubles for each further one."""


class Until:
    """When something must have ended: at its deadline, or as soon as it is stopped.

    Attributes:
        deadline_s: by the loop's clock.
        is_stopped: whether nobody waits for it any more.
    """

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.is_stopped = False
        self._waits: set[asyncio.Timeout] = set()

    @property
    def left_s(self) -> float:
        """Return how many seconds are left: 0 or less if none are."""
        return self.deadline_s - asyncio.get_running_loop().time()

    def stop(self) -> None:
        """End it now, because nobody waits for it any more."""
        self.is_stopped = True
        now_s = asyncio.get_running_loop().time()
        self.deadline_s = min(self.deadline_s, now_s)
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(now_s)

    async def wait(self, work: Awaitable[T], share: float = 1.0) -> T:
        """Return the result of work that may take a share of the time that is left.

        Raises:
            TimeoutError: it took longer, and was cancelled.
        """
        now_s = asyncio.get_running_loop().time()
        async with asyncio.timeout_at(now_s + share * (self.deadline_s - now_s)) as timeout:
            self._waits.add(timeout)
            try:
                return await work
            finally:
                self._waits.remove(timeout)


class Requests:
    """A store's requests, for everything that the tier does with it.

    Attributes:
        store: where they go.
        gets, puts: how many may be in flight; callers must keep to that.
    """

    def __init__(
        self, store: OpenStore, options: RemoteOptions, random: Random | None = None
    ) -> None:
        """Take a store, which stays the caller's, and what pauses are drawn from."""
        self.store = store
        self.gets, self.puts = Limit(options.gets_max), Limit(options.puts_max)
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
        limit = {"get": self.gets, "put": self.puts}.get(kind)
        for number in range(self._retries + 1):
            if until.left_s <= 0:
                raise RemoteError(self.store.where, kind, "there was no time left for it")
            is_last = number == self._retries
            self.counting.requests[kind] += 1
            try:
                result = await self._answered(kind, request, until, 1.0 if is_last else 0.5)
            except RemoteError as error:
                if not until.is_stopped:
                    self._failed(kind, error, limit)
                pause_s = self._random.uniform(0, _BACKOFF_S * 2**number)
                if is_last or error.is_lasting or until.left_s <= pause_s:
                    raise
            else:
                if limit is not None:
                    limit.succeeded()
                return result
            self.counting.retries[kind] += 1
            await asyncio.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    async def once(self, kind: str, request: Callable[[], Awaitable[T]], until: Until) -> T:
        """Return the result of a request that is not repeated.

        Raises:
            FileNotFoundError: there is no such object.
            RemoteError: the store failed, or did not answer in time.
        """
        self.counting.requests[kind] += 1
        try:
            return await self._answered(kind, request, until, 1.0)
        except RemoteError as error:
            self._failed(kind, error, None)
            raise

    async def _answered(
        self, kind: str, request: Callable[[], Awaitable[T]], until: Until, share: float
    ) -> T:
        before_s = until.left_s
        try:
            return await until.wait(request(), share)
        except TimeoutError as error:
            why = f"no answer within {before_s * share:.3g} s"
            raise RemoteError(self.store.where, kind, why) from error

    def _failed(self, kind: str, error: RemoteError, limit: Limit | None) -> None:
        self.counting.failures[kind] += 1
        if error.is_busy:
            self.counting.other["busy"] += 1
            if limit is not None:
                limit.is_too_high(asyncio.get_running_loop().time())


def _drop(get: Future[Any]) -> None:
    """Cancel a get that nobody waits for any more; if it has failed, its error is known."""
    if not get.cancel() and not get.cancelled():
        get.exception()
