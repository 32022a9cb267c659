"""The reader's side of one control link: what was asked of the owner, and what it granted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import NamedTuple, TypeAlias

from flexkv.cluster.records import SpanTags
from flexkv.cluster.wire import (
    WITHIN_MS_MAX,
    Busy,
    FromOwner,
    Grant,
    Message,
    PeerProtocolError,
    Pong,
    Refused,
    Release,
    SnapshotPart,
    SnapshotWanted,
    Want,
)
from flexkv.common.errors import PeerError

Answer: TypeAlias = FromOwner | PeerError
"""What ends a request. An error is a result, so that one that nobody waits for is not reported."""


class Wish(NamedTuple):
    """Which blocks of a prompt to ask for."""

    keys: bytes
    """The root, and the keys of the prompt's blocks from the first one on."""
    first: int
    last: int
    """Exclusive."""
    group: int = 0
    with_places: bool = False


class Wants:
    """The requests of one link that are not answered yet, and the grants that are not released.

    Attributes:
        used_s: the loop's time when something was last asked or released.
        why_ended: why the link has ended; empty while it has not.
    """

    def __init__(self, peer: str, send: Callable[[Message], None], numbers: Iterator[int]) -> None:
        """Ask through `send`.

        Args:
            peer: names the owner in errors.
            send: sends a message over the link.
            numbers: never returns a number twice in the life of this node.
        """
        self._peer, self._send, self._numbers = peer, send, numbers
        self._asked: dict[int, tuple[Message, asyncio.Future[Answer]]] = {}
        self._granted: set[int] = set()
        self.used_s = asyncio.get_running_loop().time()
        self.why_ended = ""

    @property
    def is_idle(self) -> bool:
        """Return whether nothing is asked and nothing is granted."""
        return not self._asked and not self._granted

    async def want(self, wish: Wish, generation: int, within_s: float) -> Grant | Busy:
        """Ask for blocks; the grant lasts until `release`, unless the owner or the link ends it.

        Raises:
            PeerError: the owner refuses, or the link has ended.
            TimeoutError: there is no answer in time.

        Cancellation:
            The owner is told that the blocks are not wanted any more.
        """
        number = next(self._numbers)
        try:
            keys, first, last, group, with_places = wish
            within_ms = min(WITHIN_MS_MAX, int(1000 * within_s))
            want = Want(number, keys, first, last, group, generation, with_places, within_ms)
            answer = await self._ask(want, within_s)
        except (asyncio.CancelledError, TimeoutError):
            self._send(Release(number))
            raise
        assert isinstance(answer, Grant | Busy)
        return answer

    async def parts(self, generation: int, within_s: float) -> AsyncGenerator[SpanTags, None]:
        """Yield all that the owner has; it sends one part at a time, when it is asked for.

        Raises:
            PeerError: the owner refuses, or the link has ended.
            TimeoutError: there is no answer in time.
        """
        number = next(self._numbers)
        is_last = False
        try:
            while not is_last:
                part = await self._ask(SnapshotWanted(number, generation), within_s)
                assert isinstance(part, SnapshotPart)
                is_last = part.is_last
                yield SpanTags(part.seq, part.on_host, part.on_disk, part.is_last)
        finally:
            if not is_last:
                self._send(Release(number))

    def release(self, number: int) -> None:
        """End a grant, if it has not ended yet."""
        if number in self._granted:
            self._granted.discard(number)
            self._send(Release(number))
            self.used_s = asyncio.get_running_loop().time()

    def handle(self, message: FromOwner) -> None:
        """Take a message of the owner.

        Raises:
            PeerProtocolError: it is no answer to what was asked.
        """
        if isinstance(message, Pong):
            return
        request, answer = self._asked.get(message.number, (None, None))
        if request is None or answer is None:
            return  # it was given up meanwhile, and the owner has been told
        if not _answers(request, message):
            raise PeerProtocolError(f"a {type(message).__name__} that answers nothing")
        del self._asked[message.number]
        if isinstance(message, Grant) and message.count:
            self._granted.add(message.number)
        if not answer.done():
            answer.set_result(message)

    def end(self, why: str) -> None:
        """Fail everything that is not answered: the link has ended."""
        self.why_ended = self.why_ended or why
        self._granted.clear()
        for _, answer in self._asked.values():
            if not answer.done():
                answer.set_result(self._error(self.why_ended))
        self._asked.clear()

    async def _ask(self, request: Want | SnapshotWanted, within_s: float) -> FromOwner:
        if self.why_ended:
            raise self._error(self.why_ended)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._asked[request.number] = request, answer
        self.used_s = loop.time()
        self._send(request)
        try:
            async with asyncio.timeout(within_s):
                told = await answer
        except BaseException:
            # An answer that came just before the cancellation is a grant that nobody will release.
            self._asked.pop(request.number, None)
            self._granted.discard(request.number)
            raise
        if isinstance(told, PeerError):
            raise told
        if isinstance(told, Refused):
            raise self._error(f"{told.field}={told.value}: {told.why}")
        return told

    def _error(self, why: str) -> PeerError:
        return PeerError(self._peer, "asking", why)


def _answers(request: Message, message: FromOwner) -> bool:
    """Return whether a message may answer a request."""
    match request, message:
        case Want(), Grant():
            wanted = request.last - request.first
            is_range = message.first == request.first and message.count <= wanted
            return is_range and _is_located(request, message)
        case (Want(), Busy()) | (Want() | SnapshotWanted(), Refused()):
            return True
        case SnapshotWanted(), SnapshotPart():
            return True
    return False


def _is_located(want: Want, grant: Grant) -> bool:
    """Return whether a grant has places only if they were asked, and then all of them."""
    places = grant.places
    if places is None:
        return True
    each = {len(places.addresses), len(places.sums)}
    return want.with_places and each == {8 * grant.count}
