"""The progress of a request that moves layer by layer, and what waits for its layers."""

from __future__ import annotations

import asyncio
import threading
from itertools import pairwise
from random import Random

import pytest

from flexkv.front.layerwise import LayerProgress


class Event:
    """A point on a stream that records which streams wait for it."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.closed = False

    def hold_back(self, stream: int) -> None:
        """Record that a stream waits for this point."""
        assert not self.closed
        self.held.append(stream)

    def close(self) -> None:
        """Record that this point was released."""
        self.closed = True


def test_layers_may_be_told_of_in_any_order() -> None:
    """A released layer stays released, even if a lower layer is reported after it."""
    random = Random(1)
    for _ in range(20):
        progress, told = LayerProgress(8, 0), random.sample(range(1, 9), 8)
        for count, layers in enumerate(told, 1):
            progress.let_go(layers)
            assert progress.ready == max(told[:count])


def test_a_layer_is_there_when_every_transfer_has_moved_it() -> None:
    """A layer has arrived once every transfer moved it; none has while transfers are unknown."""
    progress = LayerProgress(4, 4)
    assert not progress.has(0)
    progress.expect([1, 2])
    progress.moved(1, 0, 4)
    for layer in range(4):
        assert not progress.has(layer)
        progress.moved(2, layer, layer + 1)
        assert progress.has(layer)


def test_layers_may_arrive_in_any_order() -> None:
    """A layer has arrived once all before it have, whatever order the pieces end in."""
    random = Random(2)
    for _ in range(50):
        bounds = sorted({0, 12, *random.sample(range(1, 12), random.randrange(12))})
        pieces = [(op_id, *piece) for op_id in (1, 2) for piece in pairwise(bounds)]
        random.shuffle(pieces)
        progress, there = LayerProgress(12, 12), {1: set[int](), 2: set[int]()}
        progress.expect([1, 2])
        for op_id, first, last in pieces:
            progress.moved(op_id, first, last)
            there[op_id] |= set(range(first, last))
            for layer in range(12):
                are_there = all(set(range(layer + 1)) <= each for each in there.values())
                assert progress.has(layer) == are_there


def test_a_stream_does_not_go_ahead_of_what_is_not_queued() -> None:
    """A stream waits for the first event behind a layer, and for none if the layer has arrived.

    It cannot wait (TimeoutError) before the transfers are known, nor while the layer of one of them
    is neither queued nor there.
    """
    progress = LayerProgress(4, 4)
    with pytest.raises(TimeoutError):
        progress.hold_back(9, 0, 0, 0.001)
    progress.expect([1, 2])
    progress.moved(1, 0, 2)
    progress.moved(2, 0, 4)
    for layer, is_there in ((1, True), (2, False)):
        if is_there:
            assert progress.hold_back(9, 0, layer, 0.001)
        else:
            with pytest.raises(TimeoutError):
                progress.hold_back(9, 0, layer, 0.001)
    other_rank, events = Event(), [Event() for _ in range(3)]
    progress.queued(1, 1, 4, other_rank)
    with pytest.raises(TimeoutError):
        progress.hold_back(9, 0, 2, 0.001)
    for last, event in zip((2, 3, 4), events, strict=True):
        progress.queued(0, 1, last, event)
    assert progress.hold_back(9, 0, 2, 0.001)
    assert progress.hold_back(8, 0, 3, 0.001)
    assert [event.held for event in (*events, other_rank)] == [[], [9], [8], []]
    progress.end()
    assert all(event.closed for event in (*events, other_rank))
    assert not progress.hold_back(9, 0, 3, 0.001), "it ended without"


def test_a_loop_that_is_closed_is_told_no_more() -> None:
    """A waiter on a closed loop is skipped; waiters on other loops are still notified."""
    progress = LayerProgress(2, 2)
    progress.expect([1])
    gone = asyncio.new_event_loop()
    abandoned = gone.create_task(progress.reached(0))
    gone.run_until_complete(asyncio.sleep(0))
    gone.close()

    async def wait() -> bool:
        waits = asyncio.create_task(progress.reached(1))
        await asyncio.sleep(0)
        progress.moved(1, 0, 1)
        await asyncio.sleep(0)
        assert not waits.done()
        progress.moved(1, 1, 2)
        return await waits

    assert asyncio.run(wait())
    assert not abandoned.done()
    assert not progress._callbacks
    abandoned.get_coro().close()


def test_threads_are_told_that_a_layer_will_never_come() -> None:
    """A thread's wait ends with False when the request ends without the layer."""
    progress = LayerProgress(2, 2)
    told: list[bool] = []
    waiter = threading.Thread(target=lambda: told.append(progress.wait(1, 20.0)))
    waiter.start()
    progress.expect([1])
    progress.moved(1, 0, 1)
    progress.end()
    waiter.join(20.0)
    assert told == [False]
