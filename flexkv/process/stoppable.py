"""Runs long work in a thread, and stops it soon after the task that waits for it is cancelled.

Memory is touched and files are allocated in C. On the loop's own thread neither ctrl-C nor SIGTERM
would be noticed until all of that is done.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from flexkv.common.errors import ClosedError
from flexkv.process.workers import Workers

T = TypeVar("T")


def no_pause() -> None:
    """Do nothing: the function to call for work that cannot be stopped."""


async def run_stoppable(name: str, work: Callable[[Callable[[], None]], T]) -> T:
    """Run `work` in a thread, and return its result.

    Args:
        name: the thread's name, without its prefix `flexkv-`.
        work: receives a function to call often, which raises ClosedError once work must stop.

    Cancellation: the work is asked to stop; CancelledError is raised once it has ended.
    """
    stop = threading.Event()

    def pause() -> None:
        if stop.is_set():
            raise ClosedError("the engine was closed while it was still opening")

    thread = Workers(1, f"flexkv-{name}")
    working = asyncio.get_running_loop().run_in_executor(thread, work, pause)
    thread.shutdown(wait=False)  # the thread ends after the work
    try:
        await asyncio.wait([working])
    except asyncio.CancelledError:
        stop.set()
        while not working.done():
            try:
                await asyncio.wait([working])
            except asyncio.CancelledError:
                continue  # what the work has taken can be released only once it has ended
        working.exception()
        raise
    return working.result()
