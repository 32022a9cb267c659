"""Admission: bounds the requests under way, and decides which waiting request is next.

Requests belong to groups: a server's instances, or the one group of a library's caller. Each group
has a queue of its own, first come first served, and free room goes to the groups in turns. A group
that uses less than its share is admitted even if others have taken all room, so that no group waits
behind an instance that hangs. A group can be turned away as a whole.
"""

from __future__ import annotations

import asyncio
from collections import deque

from flexkv.common.errors import ClosedError, FlexKVError

SHARES = 16
"""A group's share is the bound divided by this, and at least one request."""
GROUPS_MAX = 256
"""The number of groups for which the mailboxes have room; more groups are served, too."""


class Admission:
    """A bound on requests under way; closing it turns the waiters away.

    Unlike a semaphore it can be closed, and entering costs nothing while there is room.
    """

    def __init__(self, requests_max: int) -> None:
        self._requests_max = requests_max
        self._share = max(1, requests_max // SHARES)
        self._inside = 0
        self._inside_of: dict[int, int] = {}
        self._queues: dict[int, deque[asyncio.Future[None]]] = {}
        """The waiters by group, in the order of the groups' turns."""
        self._turned_away: dict[int, FlexKVError] = {}
        self._closed = False

    @property
    def waiting(self) -> int:
        """Return how many requests wait to be admitted."""
        return sum(map(len, list(self._queues.values())))

    @property
    def requests_most(self) -> int:
        """Return how many requests can be inside when every group uses its share."""
        return self._requests_max + GROUPS_MAX * self._share

    def enter_nowait(self, group: int = 0) -> bool:
        """Enter if there is room, and return whether there was; `leave` must follow.

        Raises:
            ClosedError: closed.
            FlexKVError: the group is turned away.
        """
        if self._closed:
            raise ClosedError("the engine is shut down")
        if group in self._turned_away:
            raise self._turned_away[group]
        inside = self._inside_of.get(group, 0)
        if group in self._queues or (self._inside >= self._requests_max and inside >= self._share):
            return False
        self._inside += 1
        self._inside_of[group] = inside + 1
        return True

    async def enter(self, group: int = 0) -> None:
        """Return once admitted; `leave` must follow.

        Raises:
            ClosedError: closed, before or while waiting.
            FlexKVError: the group is turned away, before or while waiting.
        """
        if self.enter_nowait(group):
            return
        waiter = asyncio.get_running_loop().create_future()
        self._queues.setdefault(group, deque()).append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.leave(group)  # admitted and cancelled at once
            elif (queue := self._queues.get(group)) is not None and waiter in queue:
                queue.remove(waiter)
                if not queue:
                    del self._queues[group]
            raise

    def leave(self, group: int = 0) -> None:
        """Leave, and admit the next waiter."""
        self._inside -= 1
        if self._inside_of[group] == 1:
            del self._inside_of[group]
        else:
            self._inside_of[group] -= 1
        if self._queues:
            self._admit()

    def turn_away(self, group: int, reason: FlexKVError | None) -> None:
        """Refuse a group's requests, including those that wait; with None, admit it again."""
        if reason is None:
            self._turned_away.pop(group, None)
            return
        self._turned_away[group] = reason
        for waiter in self._queues.pop(group, ()):
            if not waiter.done():
                waiter.set_exception(reason)

    def close(self) -> None:
        """Stop admitting; all waiters get a ClosedError."""
        self._closed = True
        for group in list(self._queues):
            self.turn_away(group, ClosedError("the engine is shut down"))

    def _has_room(self, group: int) -> bool:
        if self._inside < self._requests_max:
            return True
        return self._inside_of.get(group, 0) < self._share

    def _take(self, group: int) -> None:
        self._inside += 1
        self._inside_of[group] = self._inside_of.get(group, 0) + 1

    def _admit(self) -> None:
        """Admit waiters, taking the groups in turns, until none may enter."""
        refused = 0
        while self._queues and refused < len(self._queues):
            group, queue = next(iter(self._queues.items()))
            del self._queues[group]
            if self._has_room(group):
                refused = 0
                waiter = queue.popleft()
                if not waiter.done():
                    self._take(group)
                    waiter.set_result(None)
            else:
                refused += 1
            if queue:
                self._queues[group] = queue
