"""Laws of standing threads: each ends once they are shut down, in whichever way."""

from __future__ import annotations

import threading

from flexkv.process.workers import Workers

PATIENCE_S = 20.0


def test_calls_may_be_cancelled_after_the_shutdown() -> None:
    """Calls may be cancelled after a shutdown: they never run, and every thread still ends."""
    workers, healed, begun = Workers(2, "test"), threading.Event(), threading.Barrier(3)
    under_way = [workers.submit(lambda: (begun.wait(), healed.wait())) for _ in range(2)]
    begun.wait(PATIENCE_S)
    waiting = [workers.submit(lambda: None) for _ in range(3)]
    workers.shutdown(wait=False)
    for _ in range(3):
        workers.shutdown(wait=False, cancel_futures=True)
    assert all(each.cancelled() for each in waiting)
    healed.set()
    for thread in workers._threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert all(each.done() for each in under_way)
