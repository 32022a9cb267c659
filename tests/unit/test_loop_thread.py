"""Laws of a loop in its own thread: stopping it ends, and answers every waiting caller."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from flexkv.common.errors import ClosedError
from flexkv.front.loop_thread import LoopThread


def test_a_loop_that_hangs_does_not_hold_who_stops_it() -> None:
    """Stopping a loop that hangs returns without its thread; later calls raise ClosedError."""
    thread, begun, healed = LoopThread(), threading.Event(), threading.Event()
    thread.start()
    thread.post(lambda: (begun.set(), healed.wait()))
    begun.wait()
    try:
        thread.stop(0.0)
        with pytest.raises(ClosedError):
            thread.post(lambda: None)
    finally:
        healed.set()


async def test_a_call_that_cannot_begin_leaves_nobody_unanswered() -> None:
    """A call to a loop that has just ended raises ClosedError, and is not kept as unanswered."""
    thread = LoopThread()
    thread.start()
    loop = thread._loop
    thread.stop()
    thread._loop = loop
    with pytest.raises(ClosedError):
        await thread.call_async(lambda: asyncio.sleep(0))
    assert not thread._unanswered


def test_a_caller_whose_loop_is_closed_does_not_fail_who_stops() -> None:
    """Stop answers all calls, even if the loop of one caller was closed meanwhile."""
    thread, healed = LoopThread(), threading.Event()
    thread.start()
    thread.post(healed.wait)
    callers = asyncio.new_event_loop()
    call = thread.call_async(lambda: asyncio.sleep(0))
    calling: Any = callers.create_task(call)
    calling._log_destroy_pending = False  # a closed loop cannot end it
    callers.call_soon(callers.stop)
    callers.run_forever()
    callers.close()
    (outcome,) = thread._unanswered
    try:
        thread.stop(0.0)
    finally:
        healed.set()
    assert isinstance(outcome.exception(0), ClosedError)
    call.close()
    assert not thread._unanswered
