"""What a client waits for: the answers to its matches, and the ends of its requests."""

from __future__ import annotations

import time
from collections.abc import Sequence

from flexkv.common.errors import FlexKVError
from flexkv.common.request import KVResponseStatus
from flexkv.server.wire import Done, Matched, ProtocolError, failed


class Awaited:
    """The matches and requests of one client that are under way, and what has come of others.

    Attributes:
        requests: the numbers of the requests under way.
    """

    def __init__(self) -> None:
        """Begin with nothing under way."""
        self.requests: set[int] = set()
        self._asked: dict[int, float] = {}
        """For each match without an answer, the time from which its timeout counts."""
        self._blocks: dict[int, int] = {}
        """How many blocks each match and request under way names; an answer may not have more."""
        self._matched: dict[int, Matched] = {}
        self._ended: list[Done] = []

    # -- matches --------------------------------------------------------------------------------

    def ask(self, number: int, blocks: int) -> None:
        """Record that a match was sent that names `blocks` blocks."""
        self._asked[number] = time.monotonic()
        self._blocks[number] = blocks

    def asked_s(self, number: int) -> float | None:
        """Return the time from which a match's timeout counts; None if it awaits no answer."""
        return self._asked.get(number)

    def restart(self) -> None:
        """Restart the timeouts of all matches."""
        self._asked = dict.fromkeys(self._asked, time.monotonic())

    def answer(self, number: int) -> Matched | None:
        """Return the answer to a match, and forget it; None if there is none."""
        return self._matched.pop(number, None)

    def release(self, number: int) -> None:
        """Forget a match, answered or not."""
        for kept in (self._asked, self._matched, self._blocks):
            kept.pop(number, None)

    # -- requests -------------------------------------------------------------------------------

    def begin(self, number: int, blocks: int) -> None:
        """Record the begin of a request that names `blocks` blocks."""
        self.requests.add(number)
        self._blocks[number] = blocks

    def fail(self, numbers: Sequence[int], error: FlexKVError) -> None:
        """End requests that moved nothing."""
        self.requests.difference_update(numbers)
        self._ended += [failed(number, error) for number in numbers]

    def ended(self) -> list[Done]:
        """Return the ends since the last call, each once."""
        ended, self._ended = self._ended, []
        return ended

    # -- what arrives ---------------------------------------------------------------------------

    def take_matched(self, message: Matched) -> None:
        """Keep the answer to a match, if it is awaited.

        Raises:
            ProtocolError: it has more blocks than were asked for.
        """
        if self._asked.pop(message.number, None) is not None:
            there = message.blocks + sum(message.far.values())
            counts = there, message.chain, *message.by_tier.values()
            self._check_blocks(message.number, *counts)
            self._matched[message.number] = message

    def take_done(self, message: Done) -> None:
        """Keep the end of a request, if it is under way.

        Raises:
            ProtocolError: it has more blocks than were asked for, or an unknown status.
        """
        if message.number in self.requests:
            if message.status not in _STATUSES:
                raise ProtocolError(f"a request cannot end with status {message.status!r}")
            self._check_blocks(message.number, message.moved)
            self.requests.discard(message.number)
            self._ended.append(message)

    def disconnected(self, error: FlexKVError) -> None:
        """Forget the matches, and fail the requests under way."""
        for kept in (self._asked, self._matched, self._blocks):
            kept.clear()
        self.fail(list(self.requests), error)

    def _check_blocks(self, number: int, *blocks: int) -> None:
        """Check that an answer has no more blocks than were asked for.

        Raises:
            ProtocolError: the answer has more.
        """
        asked = self._blocks.pop(number, 0)
        if any(count > asked for count in blocks):
            raise ProtocolError(f"it answered {max(blocks)} blocks, but {asked} were asked for")


_STATUSES = frozenset(status.value for status in KVResponseStatus)
