"""Laws of a loop in a thread of its own: stopping it ends, and answers everybody who waits."""

from __future__ import annotations

import threading

import pytest

from flexkv.common.errors import ClosedError
from flexkv.loop_thread import LoopThread


def test_a_loop_that_hangs_does_not_hold_who_stops_it() -> None:
    """Its thread is left alone; a later call says that it is stopped."""
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
