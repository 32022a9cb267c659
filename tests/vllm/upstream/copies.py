"""Control over the copies that the server asks agents for: done, failed, or done later."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from flexkv.common.terms import Route, Tier, Transfer
from flexkv.server.agent import Agent
from flexkv.server.fleet import ids_from
from flexkv.server.wire import Copy

_ROUTE, _NOTHING = Route(Tier.HOST, Tier.DEVICE), ids_from(b"")
"""For a copy that has not begun: the agent must wait for it before it leaves."""


class Copies:
    """The copies of all agents of this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loads_fail: Callable[[set[int]], bool] = lambda blocks: False
        """A function of a load's device blocks that returns whether it fails."""
        self.holds_loads = self.holds_puts = False
        self.lasts_s: Callable[[], float] = lambda: 0.0
        """A function that returns how long the next copy takes."""
        self.held: list[tuple[Agent, Copy]] = []
        self.device_blocks: list[set[int]] = []
        """The device blocks of each load, in order."""
        self._lock = threading.Lock()
        self._copy = Agent._copy
        monkeypatch.setattr(Agent, "_copy", lambda agent, copy: self._asked(agent, copy))

    def _asked(self, agent: Agent, copy: Copy) -> None:
        agent._under_way[copy.op_id] = Transfer(copy.op_id, 0, _ROUTE, _NOTHING, _NOTHING)
        with self._lock:
            if holds := self.holds_loads if copy.to_device else self.holds_puts:
                self.held.append((agent, copy))
        if holds:
            return
        if lasts_s := self.lasts_s():
            asyncio.get_running_loop().call_later(lasts_s, self._do, agent, copy)
        else:
            self._do(agent, copy)

    def held_blocks(self) -> list[set[int]]:
        """Return the device blocks of each copy that is held."""
        return [_blocks_of(copy) for _, copy in self.held]

    def _do(self, agent: Agent, copy: Copy) -> None:
        blocks = _blocks_of(copy)
        if copy.to_device:
            self.device_blocks.append(blocks)
        if copy.to_device and self.loads_fail(blocks):
            agent._end(copy.op_id, "the copy was made to fail")
        else:
            del agent._under_way[copy.op_id]
            self._copy(agent, copy)

    def release(self) -> None:
        """Do the copies that were held, and hold no more."""
        with self._lock:
            self.holds_loads = self.holds_puts = False
            held, self.held = self.held, []
        for agent, copy in held:
            agent._thread.post(lambda agent=agent, copy=copy: self._do(agent, copy))


def _blocks_of(copy: Copy) -> set[int]:
    return set(ids_from(copy.device_ids).tolist())
