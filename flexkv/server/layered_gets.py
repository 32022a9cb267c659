"""The gets that go layer by layer, as the agent of one rank has seen them.

    server ──GetPlanned──▶ which copies move it ──┐
           ──Copy──▶ pieces begin and end ────────┼──▶ LayerProgress ◀──wait── worker
           ──GetEnded──▶ no layer will come ──────┘

All three arrive over one connection, in this order, so a worker waits without asking the server. A
worker may wait for a get before the agent has heard of it. The end of a connection ends every
get, known or not, because it ends the epoch of the instance's devices that the gets are for. While
the agent is not connected, a worker can only name gets of an earlier epoch: such a wait ends at
once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from flexkv.common.terms import Layers
from flexkv.front.layerwise import LayerProgress
from flexkv.server.wire import GetEnded, GetPlanned

ENDED_MAX = 1 << 14
"""How many gets are remembered after their end, for workers that ask late."""


class _Get(LayerProgress):
    """One get, as far as this rank is concerned."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers, num_layers)
        self.op_ids: tuple[int, ...] = ()
        self.moved_blocks = 0

    def wait_end(self, timeout_s: float) -> int:
        """Wait in this thread for the end; return how many blocks were moved.

        Raises:
            TimeoutError: there was no end in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.over, timeout_s):
                raise TimeoutError(f"the get did not end within {timeout_s} s")
            return self.moved_blocks


class LayeredGets:
    """The gets of one rank that go layer by layer. The agent writes, workers' threads wait."""

    def __init__(self, num_layers: int, tp_rank: int) -> None:
        self._num_layers, self._tp_rank = num_layers, tp_rank
        self._lock = threading.Lock()
        self._gets: dict[int, _Get] = {}
        self._ended = deque[int]()
        self._of_op: dict[int, _Get] = {}
        self._is_connected = False

    # -- the agent's side, on its loop ----------------------------------------------------------

    def connected(self) -> None:
        """Record that gets may be moved from now on."""
        with self._lock:
            self._is_connected = True

    def disconnected(self) -> None:
        """End every get: no copy is under way any more, and none will come."""
        with self._lock:
            self._is_connected = False
            left = [number for number, get in self._gets.items() if not get.over]
        for number in left:
            self.end(GetEnded(number))

    def plan(self, message: GetPlanned) -> None:
        """Record which copies will move a get."""
        with self._lock:
            get = self._get(message.number)
        self._forget_ops(get)
        get.op_ids = message.op_ids
        self._of_op.update(dict.fromkeys(get.op_ids, get))
        get.expect(get.op_ids)

    def end(self, message: GetEnded) -> None:
        """Record the end of a get."""
        with self._lock:
            get = self._get(message.number)
        if get.over:
            return
        self._forget_ops(get)
        get.moved_blocks = message.moved
        get.end()
        with self._lock:
            self._ended.append(message.number)
            if len(self._ended) > ENDED_MAX:
                del self._gets[self._ended.popleft()]

    def watch_of(self, layers: Layers) -> LayerProgress | None:
        """Return the progress of the get that a piece is of; None if that is unknown or over."""
        return self._of_op.get(layers.whole)

    def _forget_ops(self, get: _Get) -> None:
        for op_id in get.op_ids:
            self._of_op.pop(op_id, None)

    # -- the worker's side, from any thread -----------------------------------------------------

    def wait(
        self, numbers: Sequence[int], layer: int, timeout_s: float, stream: int | None
    ) -> bool:
        """Wait for a layer of these gets: see `Agent.wait_for_layer`."""
        until_s, are_there = time.monotonic() + timeout_s, True
        for number in numbers:  # all of them, even if one has ended without the layer
            get, left_s = self._awaited(number), max(0.0, until_s - time.monotonic())
            if stream is None:
                are_there &= get.wait(layer, left_s)
            else:
                are_there &= get.hold_back(stream, self._tp_rank, layer, left_s)
        return are_there

    def wait_end(self, number: int, timeout_s: float) -> int:
        """Wait for the end of a get: see `Agent.wait_for_end`."""
        return self._awaited(number).wait_end(timeout_s)

    def _awaited(self, number: int) -> _Get:
        with self._lock:
            if number in self._gets or self._is_connected:
                return self._get(number)
        never = _Get(self._num_layers)
        never.end()
        return never

    def _get(self, number: int) -> _Get:
        """Return what is known of a get, which may be nothing yet. The lock is held."""
        get = self._gets.get(number)
        if get is None:
            get = self._gets[number] = _Get(self._num_layers)
        return get
