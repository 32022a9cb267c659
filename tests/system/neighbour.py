"""A well-behaved instance that works on beside hostile peers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Neighbour:
    """An instance that puts and gets and compares every byte, in its own thread."""

    def __init__(self, work: Callable[[int], bool]) -> None:
        """Take the work of a round, given its number: it returns whether right bytes came back."""
        self._work, self._stop = work, threading.Event()
        self.right = self.rounds = 0
        self._threads = ThreadPoolExecutor(1)
        self._running = self._threads.submit(self._run)

    @property
    def goes_on(self) -> bool:
        """Return whether nothing has gone wrong."""
        return not self._running.done()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.right += self._work(self.rounds)
            self.rounds += 1

    def end(self) -> None:
        """Stop, and raise what went wrong."""
        self._stop.set()
        self._running.result(60)
        self._threads.shutdown()
