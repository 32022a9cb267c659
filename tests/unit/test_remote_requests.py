"""Requests to a store on a virtual clock: repeated, hedged, paced, and ended in time."""

from __future__ import annotations

import asyncio
import math
from asyncio import Future
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from itertools import pairwise
from random import Random
from typing import Any, TypeVar

import pytest

from flexkv.common.errors import RemoteError
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.pacing import HALVING_S, SAMPLES_MIN, Limit
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.store import Listed
from flexkv.io.remote.until import Until
from flexkv.testing.virtual_time import run_virtual

T = TypeVar("T")

FAILS = RemoteError("scripted", "get", "status 500")
BUSY = RemoteError("scripted", "get", "status 503", is_busy=True)
DENIED = RemoteError("scripted", "get", "status 403", is_lasting=True)
GONE = FileNotFoundError("gone")
HANGS_S = 1e6
DEADLINE_S = 8.0
EXTENT = (0, 5)

Work = Callable[[Requests, Until], Coroutine[Any, Any, Any]]


class ScriptedStore:
    """A store whose answers are a list: after how many seconds, and what.

    Attributes:
        asked_s: when each request came.
        gets: the futures of all gets.
    """

    kind = where = "scripted"

    def __init__(self, *script: tuple[float, object]) -> None:
        self.script = list(script)
        self.asked_s: list[float] = []
        self.gets: list[Future[Any]] = []

    def get(self, name: str, first: int, last: int) -> Future[Any]:
        """Return a future that gets the next answer of the script in its time, in two chunks."""
        return self._answer(lambda body: [body[:1], body[1:]])

    def _answer(self, shaped: Callable[[Any], Any] = lambda answer: answer) -> Future[Any]:
        loop = asyncio.get_running_loop()
        future: Future[Any] = loop.create_future()
        self.asked_s.append(loop.time())
        after_s, answer = self.script.pop(0)

        def end() -> None:
            if future.done():
                return
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(shaped(answer))

        loop.call_later(after_s, end)
        self.gets.append(future)
        return future

    async def put(self, name: str, buffers: Sequence[Any]) -> bool:
        """Return the next answer of the script."""
        return await self._answer()  # type: ignore[no-any-return]

    async def delete(self, name: str) -> None:
        """Await the next answer of the script."""
        await self._answer()

    async def pages(self, prefix: str) -> AsyncIterator[list[Listed]]:
        """Yield the answers of the script."""
        while self.script:
            yield await self._answer()

    def error_of(self, raised: BaseException, what: str) -> BaseException:
        """Return what was raised."""
        return raised


def on(
    store: ScriptedStore, work: Callable[[Requests, Until], Coroutine[Any, Any, T]], **limits: Any
) -> tuple[T, Requests, float]:
    """Return the result of work on a virtual clock, the requests, and the seconds it took."""

    async def main() -> tuple[T, Requests, float]:
        requests = Requests(store, RemoteOptions(**limits), Random(3))  # type: ignore[arg-type]
        return await work(requests, Until(DEADLINE_S)), requests, asyncio.get_running_loop().time()

    return run_virtual(main())


def one_get(store: ScriptedStore) -> Work:
    """Return work that makes one get, and returns its error if it fails."""

    async def work(requests: Requests, until: Until) -> Any:
        try:
            body = await requests.get(store, "name", EXTENT, until)  # type: ignore[arg-type]
        except (RemoteError, FileNotFoundError) as error:
            return error
        return body.read(0, body.nbytes)

    return work


def test_what_fails_is_asked_for_again() -> None:
    """A get that fails twice and then succeeds returns the body; each request is counted."""
    store = ScriptedStore((0.1, FAILS), (0.1, FAILS), (0.1, b"12345"))
    body, requests, took_s = on(store, one_get(store))
    assert body == b"12345"
    counts = requests.counts()
    assert counts.requests == {"get": 3}
    assert counts.retries == counts.failures == {"get": 2}
    assert counts.read_bytes == 5
    assert 0.3 < took_s < 1.0, "it pauses, and not for long"


def test_after_the_last_try_the_error_is_told() -> None:
    """What fails each time raises the last error, after as many requests as are allowed."""
    store = ScriptedStore(*[(0.1, FAILS)] * 9)
    error, requests, _ = on(store, one_get(store), retries=3)
    assert error is FAILS
    assert requests.counts().requests == {"get": 4}


@pytest.mark.parametrize("answer", [DENIED, GONE])
def test_what_cannot_help_is_not_repeated(answer: Exception) -> None:
    """Denied access and a missing object end a get at once; a miss is no failure."""
    store = ScriptedStore((0.1, answer), (0.1, b"12345"))
    error, requests, _ = on(store, one_get(store))
    assert error is answer
    assert requests.counts().requests == {"get": 1}
    assert requests.counts().failures == ({"get": 1} if answer is DENIED else {})


def test_a_store_that_hangs_is_left_at_the_deadline() -> None:
    """The first try gets half of the time, the next all that is left; then the get has failed."""
    store = ScriptedStore(*[(HANGS_S, b"")] * 9)
    error, _, took_s = on(store, one_get(store))
    assert isinstance(error, RemoteError)
    assert error.blames_tier
    assert took_s == pytest.approx(DEADLINE_S)
    assert store.asked_s == pytest.approx([0.0, 4.0], abs=0.2)
    assert all(get.cancelled() for get in store.gets)


def test_nothing_is_asked_after_the_deadline() -> None:
    """A get whose time is up when it begins makes no request."""
    store = ScriptedStore((0.0, b"12345"))

    async def late(requests: Requests, until: Until) -> Any:
        await asyncio.sleep(DEADLINE_S + 1)
        return await one_get(store)(requests, until)

    error, _, _ = on(store, late)
    assert isinstance(error, RemoteError)
    assert store.asked_s == []


def test_what_is_stopped_ends_at_once_and_is_no_failure() -> None:
    """A get that nobody waits for any more ends when it is stopped, and is not repeated."""
    store = ScriptedStore((HANGS_S, b""), (0.0, b"12345"))

    async def stopped(requests: Requests, until: Until) -> Any:
        asyncio.get_running_loop().call_later(1.0, until.stop)
        asyncio.get_running_loop().call_later(1.0, until.stop)
        return await one_get(store)(requests, until)

    error, requests, took_s = on(store, stopped)
    assert isinstance(error, RemoteError)
    assert took_s == pytest.approx(1.0)
    assert requests.counts().failures == {}
    assert store.gets[0].cancelled()


def gets(
    store: ScriptedStore, number: int
) -> Callable[[Requests, Until], Coroutine[Any, Any, Any]]:
    """Return work that makes gets one after the other, and returns the last body."""

    async def work(requests: Requests, _: Until) -> Any:
        for _ in range(number):
            until = Until(asyncio.get_running_loop().time() + DEADLINE_S)
            body = await one_get(store)(requests, until)
        return body

    return work


QUICK = (0.01, b"12345")
MANY = 3 * SAMPLES_MIN


def test_a_slow_get_is_hedged_and_the_first_body_wins() -> None:
    """Once it is slower than nearly all others it is sent again; the loser is cancelled."""
    store = ScriptedStore(*[QUICK] * MANY, (1.0, b"slow!"), (0.01, b"first"))
    body, requests, took_s = on(store, gets(store, MANY + 1))
    assert body == b"first"
    counts = requests.counts()
    assert (counts.hedges, counts.hedges_won, counts.retries) == (1, 1, {})
    assert counts.requests == {"get": MANY + 2}
    assert took_s == pytest.approx(0.01 * (MANY + 2))
    assert store.gets[-2].cancelled()


def test_the_first_request_may_win_too() -> None:
    """A hedge that comes later than the first answer is cancelled, and has not won."""
    store = ScriptedStore(*[QUICK] * MANY, (0.05, b"first"), (1.0, b"slow!"))
    body, requests, _ = on(store, gets(store, MANY + 1))
    assert body == b"first"
    assert (requests.counts().hedges, requests.counts().hedges_won) == (1, 0)
    assert store.gets[-1].cancelled()


@pytest.mark.parametrize(
    ("slow", "hedge"),
    [
        ((0.05, FAILS), (0.2, b"12345")),
        ((0.3, b"12345"), (0.05, FAILS)),
        ((0.3, b"12345"), (0.1, GONE)),
    ],
)
def test_an_error_does_not_win(slow: tuple[float, object], hedge: tuple[float, object]) -> None:
    """If one of the two requests fails, the other one's body counts."""
    store = ScriptedStore(*[QUICK] * MANY, slow, hedge)
    body, requests, _ = on(store, gets(store, MANY + 1))
    assert body == b"12345"
    assert requests.counts().failures == {}


def test_few_gets_are_hedged() -> None:
    """However many are slow, at most a small share is sent twice; none before sizes are known."""
    script = [(0.01, b"12345") if number % 25 else (0.5, b"12345") for number in range(400)]
    store = ScriptedStore(*script)
    _, requests, _ = on(store, gets(store, 300), hedged_share=0.02)
    assert 3 <= requests.counts().hedges <= 6
    assert requests.counts().requests["get"] == 300 + requests.counts().hedges


def test_nothing_is_hedged_before_there_is_something_to_compare() -> None:
    """The first gets of a size are sent once, however long they take."""
    store = ScriptedStore(*[(1.0, b"12345")] * SAMPLES_MIN, *[QUICK] * 5)
    _, requests, _ = on(store, gets(store, SAMPLES_MIN))
    assert requests.counts().hedges == 0


def test_a_busy_store_gets_fewer_requests() -> None:
    """Busy answers halve the limit once for all that were in flight; successes raise it again."""
    limit = Limit(8)
    limit.is_too_high(10.0)
    limit.is_too_high(10.0 + HALVING_S / 2)
    assert limit.now == 4
    limit.is_too_high(10.0 + HALVING_S)
    assert limit.now == 2
    for _ in range(9):
        limit.is_too_high(100.0)
    for second in range(200, 210):
        limit.is_too_high(float(second))
    assert limit.now == 1, "never none"
    seen = []
    for _ in range(60):
        limit.succeeded(0.0, 0.1)
        seen.append(limit.now)
    assert seen == sorted(seen)
    assert (seen[1], seen[-1]) == (2, 8)


def test_slow_answers_lower_the_limit_until_they_are_not() -> None:
    """The limit falls in proportion, once for requests in flight together, and never below one."""
    limit = Limit(8, slow_s=2.0)
    limit.succeeded(100.0, 4.0)
    limit.succeeded(101.0, 4.0)
    assert (limit.now, limit.moved_s) == (4, 101.0)
    limit.succeeded(104.0, 4.0)
    assert limit.now == 2
    limit.succeeded(105.0, 2.0)
    assert limit.now == 2
    for _ in range(2):
        limit.succeeded(106.0, 0.1)
    assert limit.now == 3
    limit.succeeded(200.0, 90.0)
    assert limit.now == 1
    assert limit.is_lowest
    assert not Limit(1).is_lowest


def test_a_late_answer_lowers_the_limit_to_one() -> None:
    """A request that was late is repeated alone, however many were in flight."""
    limit = Limit(8)
    limit.was_late()
    assert limit.is_lowest
    assert limit.moved_s == -math.inf
    limit.succeeded(5.0, 0.1)
    assert limit.now == 2


def test_retries_keep_to_a_limit_that_has_fallen() -> None:
    """Gets that fail together are repeated one after the other if the limit is 1 by then."""
    store = ScriptedStore(*[(0.1, BUSY)] * 4, *[(0.1, b"12345")] * 4)

    async def four(requests: Requests, until: Until) -> list[Any]:
        requests.gets.is_too_high(asyncio.get_running_loop().time() - 9)
        work = [one_get(store)(requests, until) for _ in range(4)]
        return list(await asyncio.gather(*work))

    bodies, _, _ = on(store, four, gets_max=8)
    assert bodies == [b"12345"] * 4
    later_s = store.asked_s[4:]
    assert len(later_s) == 4
    assert all(later - earlier < 0.1 for earlier, later in pairwise(later_s[:2]))
    assert later_s[2] - later_s[0] >= 0.099, "two at once"


def test_busy_answers_are_counted_and_slow_the_tier_down() -> None:
    """A 503 is repeated as any failure, and lowers the limit of its direction only."""
    store = ScriptedStore((0.1, BUSY), (0.1, b"12345"))
    body, requests, _ = on(store, one_get(store))
    assert body == b"12345"
    counts = requests.counts()
    assert (counts.busy, counts.gets_limit, counts.puts_limit) == (1, 4, 4)


def test_puts_are_repeated_and_counted() -> None:
    """A put that fails is repeated; bytes count if it created the object."""
    store = ScriptedStore((0.1, FAILS), (0.1, True), (0.1, False))

    async def puts(requests: Requests, until: Until) -> list[bool]:
        buffers = [b"123", memoryview(b"4567")]
        return [await requests.put("name", buffers, until) for _ in range(2)]

    created, requests, _ = on(store, puts)
    assert created == [True, False]
    counts = requests.counts()
    assert (counts.written_bytes, counts.existing) == (7, 1)
    assert (counts.requests, counts.retries) == ({"put": 3}, {"put": 1})


def test_a_listing_that_hangs_ends() -> None:
    """A page that does not come in its time raises RemoteError after the pages before it."""
    page = [Listed("name", 1, 2.0)]
    store = ScriptedStore((0.1, page), (HANGS_S, page))

    async def listed(requests: Requests, _: Until) -> tuple[list[Any], str]:
        found = []
        try:
            async for each in requests.pages("prefix/", 2.0):
                found.append(each)  # noqa: PERF401 -- what came before the error counts
        except RemoteError as error:
            return found, str(error)
        return found, ""

    (found, why), requests, took_s = on(store, listed)
    assert found == [page]
    assert "no answer within 2 s" in why
    assert requests.counts().requests == {"list": 2}
    assert took_s == pytest.approx(2.1)
