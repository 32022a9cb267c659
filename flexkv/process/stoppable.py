"""Work that is stopped: in a thread, soon after its task is cancelled; or when its time is up.

Memory is touched and files are allocated in C. On the loop's own thread neither ctrl-C nor SIGTERM
would be noticed until all of that is done.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

from flexkv.common.errors import ClosedError, FlexKVError
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


async def failure_within(
    limit_s: float, work: Awaitable[object], faults: type[FlexKVError] = FlexKVError
) -> str:
    """Wait for work, and return why it failed; empty if it is done within `limit_s`.

    Args:
        limit_s: how long the work may take; then it is cancelled.
        work: what to wait for.
        faults: the errors that are returned as text; others are raised.
    """
    try:
        async with asyncio.timeout(limit_s):
            await work
    except (faults, TimeoutError) as error:
        return str(error) or f"it was not finished within {limit_s} s"
    return ""
