"""A loop that waits for no timer does first what can be done now."""

from __future__ import annotations

import asyncio
import time

from flexkv.testing.hurried_time import run_hurried
from tests.cluster_rigs import pair

HOUR_S = 3600.0


def test_a_wait_moves_the_clock() -> None:
    """An hour passes at once, and timers come in their order."""

    async def main() -> list[float]:
        loop, begun_s, came = asyncio.get_running_loop(), asyncio.get_running_loop().time(), []
        for due_s in (2 * HOUR_S, HOUR_S):
            loop.call_later(due_s, lambda: came.append(loop.time() - begun_s))
        await asyncio.sleep(3 * HOUR_S)
        return came

    begun_s = time.monotonic()
    first_s, second_s = run_hurried(main())
    assert HOUR_S <= first_s < 2 * HOUR_S <= second_s < 3 * HOUR_S
    assert time.monotonic() - begun_s < HOUR_S


def test_what_has_arrived_comes_first() -> None:
    """Bytes that are there are received before the clock moves."""

    async def main() -> float:
        loop, (ours, theirs) = asyncio.get_running_loop(), pair()
        begun_s = loop.time()
        for _ in range(100):
            theirs.send(b"x")
            async with asyncio.timeout(HOUR_S):
                assert await loop.sock_recv(ours, 1) == b"x"
        ours.close()
        theirs.close()
        return loop.time() - begun_s

    assert run_hurried(main()) < HOUR_S
