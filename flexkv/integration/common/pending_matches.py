"""What the server is asked of prompts: a step waits for the answers briefly, the next one again.

An answer holds blocks and grows old, and vLLM may not come back to a request for minutes. So few
questions are under way at once, and none for long.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from flexkv.server.client import Client
from flexkv.server.prompts import PromptPart
from flexkv.server.wire import Matched

ASKED_MAX = 16
"""Questions under way at once. vLLM goes through all that wait when each is put off."""
EARLY_MAX = ASKED_MAX // 2
"""Those of them that are made on arrival. The rest is for prompts that vLLM has come to."""
KEPT_S = 1.0
"""How long a question is kept that is not come back to."""


class _Asked(NamedTuple):
    number: int
    blocks: int
    first: int
    seen_s: float
    is_early: bool
    """Whether it was made on arrival, and vLLM has not come to its prompt since."""


class PendingMatches:
    """The questions under way, at most one of each request."""

    def __init__(self, client: Client, wait_ms: float) -> None:
        """Take whom to ask, and how long a step waits for it, all in all."""
        self._client = client
        self._wait_s = self._wait_left_s = wait_ms / 1e3
        self._asked: dict[str, _Asked] = {}

    @property
    def has_early_room(self) -> bool:
        """Return whether a prompt that has just arrived may be asked for."""
        early = sum(each.is_early for each in self._asked.values())
        return early < EARLY_MAX and len(self._asked) < ASKED_MAX

    def make_room(self) -> bool:
        """Return whether a prompt that vLLM has come to may be asked for.

        If too many questions are under way, the youngest one that was made on arrival is given up:
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
        """Return the block from which a request's question asks for tiers; None without a question.

        Args:
            request_id: vLLM's.
            blocks: how many blocks the question must be about.
        """
        asked = self._asked.get(request_id)
        return asked.first if asked is not None and asked.blocks == blocks else None

    def ask(
        self, request_id: str, part: PromptPart, first: int, tell: bool, is_early: bool
    ) -> None:
        """Ask what is resident, and hold that.

        Args:
            request_id: vLLM's. It has no question, and there is room for one.
            part: the blocks that are meant.
            first: as for `Client.ask`.
            tell: as for `Client.ask`.
            is_early: whether the prompt has just arrived, and vLLM has not come to it yet.
        """
        assert request_id not in self._asked
        assert len(self._asked) < ASKED_MAX
        number = self._client.ask(part, first, hold=True, tell=tell)
        self._asked[request_id] = _Asked(number, part.blocks, first, time.monotonic(), is_early)

    def answer(self, request_id: str) -> Matched | None:
        """Return the answer to a request's question, once; None if there is none in this step."""
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
        """Let go of a request's question, if there is one, and of what its answer holds."""
        asked = self._asked.pop(request_id, None)
        if asked is not None:
            self._client.release([asked.number])

    def give_up_all(self) -> None:
        """Let go of every question."""
        for request_id in list(self._asked):
            self.give_up(request_id)

    def step_is_made(self) -> None:
        """Hear that a step is scheduled: the next one may wait again."""
        self._wait_left_s = self._wait_s
        until_s = time.monotonic() - KEPT_S
        for request_id in [name for name, each in self._asked.items() if each.seen_s < until_s]:
            self.give_up(request_id)
