"""The matches under way: a step waits briefly for their answers, and the next step waits again.

An answer holds blocks and becomes outdated, and an engine may not return to a request for minutes.
So few matches are under way at once, and none for long.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from flexkv.server.client import Client
from flexkv.server.prompts import PromptPart
from flexkv.server.wire import Matched

ASKED_MAX = 16
"""Maximum number of matches under way. An engine tries all waiting requests if each is put off."""
EARLY_MAX = ASKED_MAX // 2
"""Maximum number of those made on arrival; the others are for prompts that the engine tries
to schedule."""
KEPT_S = 1.0
"""How long a match is kept after it was made or the engine last asked for its answer."""


class _Asked(NamedTuple):
    number: int
    blocks: int
    first: int
    seen_s: float
    is_early: bool
    """Whether it was made on arrival, and the engine has not tried to schedule its prompt since."""


class PendingMatches:
    """The matches under way, at most one for each request."""

    def __init__(self, client: Client, wait_ms: float) -> None:
        """Send matches by `client`; one step waits at most `wait_ms` in all for answers."""
        self._client = client
        self._wait_s = self._wait_left_s = wait_ms / 1e3
        self._asked: dict[str, _Asked] = {}

    @property
    def has_early_room(self) -> bool:
        """Return whether there is room for the match of a prompt that has just arrived."""
        early = sum(each.is_early for each in self._asked.values())
        return early < EARLY_MAX and len(self._asked) < ASKED_MAX

    def make_room(self) -> bool:
        """Return whether there is room for the match of a prompt that the engine tries to schedule.

        If too many matches are under way, the youngest one that was made on arrival is given up:
        otherwise prompts that arrive would keep older ones from being scheduled.
        """
        if len(self._asked) < ASKED_MAX:
            return True
        for request_id, asked in reversed(self._asked.items()):
            if asked.is_early:
                self.give_up(request_id)
                return True
        return False

    def first_of(self, request_id: str, blocks: int) -> int | None:
        """Return the block from which a request's match counts tiers; None if it has no match.

        Args:
            request_id: the engine's id of the request.
            blocks: how many blocks the match must be about.
        """
        asked = self._asked.get(request_id)
        return asked.first if asked is not None and asked.blocks == blocks else None

    def ask(
        self, request_id: str, part: PromptPart, first: int, tell: bool, is_early: bool
    ) -> None:
        """Send a match that holds the blocks it finds.

        Args:
            request_id: the engine's id of a request without a match; there must be room for one.
            part: the blocks to match.
            first: as for `Client.match`.
            tell: as for `Client.match`.
            is_early: whether the prompt has just arrived, and no step has tried to schedule it.
        """
        assert request_id not in self._asked
        assert len(self._asked) < ASKED_MAX
        number = self._client.ask(part, first, hold=True, tell=tell)
        self._asked[request_id] = _Asked(number, part.blocks, first, time.monotonic(), is_early)

    def answer(self, request_id: str) -> Matched | None:
        """Return the answer to a request's match, once; None if there is none in this step."""
        asked = self._asked.get(request_id)
        if asked is None:
            return None
        begin_s = time.monotonic()
        found = self._client.answer(asked.number, self._wait_left_s)
        self._wait_left_s = max(0.0, self._wait_left_s - (time.monotonic() - begin_s))
        if found is not None:
            del self._asked[request_id]
        else:
            self._asked[request_id] = asked._replace(seen_s=begin_s, is_early=False)
        return found

    def give_up(self, request_id: str) -> None:
        """Give up a request's match, if there is one, and end its hold."""
        asked = self._asked.pop(request_id, None)
        if asked is not None:
            self._client.release([asked.number])

    def give_up_all(self) -> None:
        """Give up every match."""
        for request_id in list(self._asked):
            self.give_up(request_id)

    def step_is_made(self) -> None:
        """Record that a step is scheduled: the next one may wait again. Give up old matches."""
        self._wait_left_s = self._wait_s
        until_s = time.monotonic() - KEPT_S
        for request_id in [name for name, each in self._asked.items() if each.seen_s < until_s]:
            self.give_up(request_id)
