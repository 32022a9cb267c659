"""The matches under way: a step waits briefly for their answers, and the next step waits again.

An answer holds blocks and becomes outdated, and an engine may not return to a request for minutes.
So few matches are under way at once, and none for long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from flexkv.integration.common.request_transfers import RequestTransfers
from flexkv.server.client import Client
from flexkv.server.prompts import PromptPart
from flexkv.server.wire import Matched

ASKED_MAX = 16
"""Maximum number of matches under way: an engine tries all waiting requests if each is put off."""
EARLY_MAX = ASKED_MAX // 2
"""Maximum number of those made on arrival; the rest are for prompts that are tried."""
KEPT_S = 1.0
"""How long a match is kept after it was made or its answer was last asked for."""


class _Asked(NamedTuple):
    number: int
    blocks: int
    first: int
    seen_s: float
    is_early: bool
    """Whether it was made on arrival, and its prompt was not tried since."""
    answer: Matched | None = None
    """Its answer, if that was looked at before the prompt was tried."""


class PendingMatches:
    """The matches under way, at most one for each request."""

    def __init__(self, client: Client, wait_ms: float, tells: bool, drop: int = 0) -> None:
        """Send matches by `client`; one step waits at most `wait_ms` in all for answers.

        If `tells`, the server reports the tiers of the blocks that a request asks for first.
        `drop` is how many blocks behind a hit must be there as well: see `KVGroups`.
        """
        self._client, self._tells, self._drop = client, tells, drop
        self._wait_s = self._wait_left_s = wait_ms / 1e3
        self._asked: dict[str, _Asked] = {}

    @property
    def _has_far(self) -> bool:
        """Return whether the server has far tiers."""
        return bool(self._client.welcome.far_tiers)

    @property
    def has_early_room(self) -> bool:
        """Return whether there is room for the match of a prompt that has just arrived."""
        early = sum(each.is_early for each in self._asked.values())
        return early < EARLY_MAX and len(self._asked) < ASKED_MAX

    def _make_room(self) -> bool:
        """Return whether there is room for the match of a prompt that is being scheduled.

        If too many matches are under way, the youngest one that was made on arrival is given up:
        otherwise prompts that arrive would keep older ones from being scheduled.
        """
        if len(self._asked) < ASKED_MAX:
            return True
        for request_id, asked in reversed(self._asked.items()):
            if asked.is_early:
                self._give_up(request_id)
                return True
        return False

    def ask(
        self, request: RequestTransfers, part: PromptPart, first: int, is_early: bool = False
    ) -> None:
        """Send a match that holds the blocks it finds.

        Args:
            request: has no match under way; there must be room for one.
            part: the blocks to match.
            first: as for `Client.match`.
            is_early: whether the prompt has just arrived, and was not tried yet.
        """
        assert request.request_id not in self._asked
        assert len(self._asked) < ASKED_MAX
        tell, request.is_told = self._tells and not request.is_told, True
        apart = self._has_far
        number = self._client.ask(part, first, True, tell, self._drop, apart=apart)
        asked = _Asked(number, part.blocks, first, time.monotonic(), is_early)
        self._asked[request.request_id] = asked

    def found(
        self, request: RequestTransfers, blocks: int, part_of: Callable[[int], PromptPart]
    ) -> Matched | None:
        """Return which of a request's first blocks are resident; None if not known in this step.

        The tiers of the answer count the blocks after those that the device has. If too many
        matches are under way, a request is put off once in its life; then nothing is found.

        Args:
            request: a request that is tried, whose `local_blocks` the device has. Its
                `junction_blocks` are set.
            blocks: how many blocks the match must be about.
            part_of: returns a part of its prompt: this many of the first blocks.
        """
        found = self._found(request, blocks, part_of)
        if found is not None:
            request.junction_blocks = found.chain if found.chain > found.blocks else 0
        return found

    def _found(
        self, request: RequestTransfers, blocks: int, part_of: Callable[[int], PromptPart]
    ) -> Matched | None:
        asked, first = self._asked.get(request.request_id), request.local_blocks
        if asked is not None and asked.blocks == blocks:
            found = self._answer(request.request_id, asked)
            if found is None or asked.first == first or max(found.blocks, found.chain) <= first:
                return found
            # The match was sent before the device's own blocks were known.
            request.found = found
        self.release(request)
        if self._make_room():
            self.ask(request, part_of(blocks), first)
            return self._answer(request.request_id, self._asked[request.request_id])
        was_put_off, request.was_put_off = request.was_put_off, True
        return Matched(0, 0, {}) if was_put_off else None

    def early_answers(self) -> list[tuple[str, int, Matched]]:
        """Return the new answers with far blocks about prompts that were not tried yet.

        Each comes with the prompt's request id, and how many blocks the match was about. Without
        far tiers, nothing is looked at.
        """
        if not self._has_far:
            return []
        told = []
        for request_id, asked in self._asked.items():
            if not asked.is_early or asked.answer is not None:
                continue
            if (answer := self._client.answer(asked.number)) is not None:
                self._asked[request_id] = asked._replace(answer=answer)
                told += [(request_id, asked.blocks, answer)] if answer.far else []
        return told

    def take_over(self, request: RequestTransfers) -> None:
        """Forget a request's match, whose hold another message ends."""
        self._asked.pop(request.request_id, None)
        request.found = None

    def _answer(self, request_id: str, asked: _Asked) -> Matched | None:
        begin_s = time.monotonic()
        found = asked.answer or self._client.answer(asked.number, self._wait_left_s)
        self._wait_left_s = max(0.0, self._wait_left_s - (time.monotonic() - begin_s))
        if found is not None:
            del self._asked[request_id]
        else:
            self._asked[request_id] = asked._replace(seen_s=begin_s, is_early=False)
        return found

    def release(self, request: RequestTransfers) -> None:
        """Give up a request's match, or the offer that it has, and the hold."""
        self._give_up(request.request_id)
        found, request.found = request.found, None
        if found is not None and found.blocks:
            self._client.release([found.number])

    def _give_up(self, request_id: str) -> None:
        asked = self._asked.pop(request_id, None)
        if asked is not None:
            self._client.release([asked.number])

    def give_up_all(self) -> None:
        """Give up every match."""
        for request_id in list(self._asked):
            self._give_up(request_id)

    def step_is_made(self) -> None:
        """Record that a step is scheduled: the next one may wait again. Give up old matches."""
        self._wait_left_s = self._wait_s
        until_s = time.monotonic() - KEPT_S
        for request_id in [name for name, each in self._asked.items() if each.seen_s < until_s]:
            self._give_up(request_id)
