"""Requests that are moved layer by layer: the caller's handles, and the progress behind them.

    get   layer 0 of every block, then layer 1, …   wait_for_layer(0), compute layer 0, …
    put   compute layer 0, layer_written(0), …      each goes as soon as it is written

Threads wait on a condition, coroutines on an asyncio event, streams on a stream event behind the
layer's copies.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any

from msgspec import structs

from flexkv.common.arguments import index, integer, seconds
from flexkv.common.errors import DeviceError
from flexkv.common.request import KVResponse, Operation
from flexkv.common.terms import StreamEvent
from flexkv.engine.tickets import RequestSpec
from flexkv.front.loop_bridge import LoopBridge

TIMEOUT_S = 20.0


class LayerProgress:
    """The progress of a request, over all ops that move it. Written on the engine's loop."""

    def __init__(self, num_layers: int, ready: int) -> None:
        """Start with `ready` layers that may be moved at once."""
        self.num_layers, self.ready = num_layers, ready
        self.over = False
        self._changed = threading.Condition()
        self._moved: dict[int, int] = {}
        """For each transfer, how many of its first layers have arrived."""
        self._ahead: dict[tuple[int, int], int] = {}
        """Layers that arrived before an earlier one: (transfer, first layer) to last, exclusive."""
        self._queued: dict[tuple[int, int], list[tuple[int, StreamEvent]]] = {}
        self._callbacks: list[Callable[[], None]] = []

    # -- the engine's side ----------------------------------------------------------------------

    def expect(self, op_ids: Sequence[int]) -> None:
        """Record which transfers will move the bytes; those of an earlier try are void."""
        with self._changed:
            self._drop_events()
            self._ahead.clear()
            self._moved = dict.fromkeys(op_ids, 0)

    def queued(self, rank: int, op_id: int, last: int, event: StreamEvent) -> None:
        """Record that the layers before `last` of a transfer are queued on a rank's stream."""
        with self._changed:
            self._queued.setdefault((rank, op_id), []).append((last, event))
            self._changed.notify_all()

    def moved(self, op_id: int, first: int, last: int) -> None:
        """Record that layers of a transfer have arrived: from `first` to `last`, exclusive."""
        with self._changed:
            if op_id not in self._moved:  # of an earlier try
                return
            self._ahead[op_id, first] = last
            reached = before = self._moved[op_id]
            while (op_id, reached) in self._ahead:
                reached = self._ahead.pop((op_id, reached))
            if reached > before:
                self._moved[op_id] = reached
                self._tell()

    def end(self) -> None:
        """Record that no more layers will arrive, since the request has its response."""
        with self._changed:
            self.over = True
            self._drop_events()
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for callback in list(self._callbacks):
            try:
                callback()
            except RuntimeError:  # the loop of the waiting coroutine is closed
                self._callbacks.remove(callback)

    def _drop_events(self) -> None:
        for events in self._queued.values():
            for _, event in events:
                event.close()
        self._queued.clear()

    # -- the caller's side ----------------------------------------------------------------------

    def let_go(self, layers: int) -> None:
        """Allow the first `layers` layers to be moved."""
        with self._changed:
            self.ready = max(self.ready, layers)

    def has(self, layer: int) -> bool:
        """Return whether a layer of every block has arrived."""
        return bool(self._moved) and min(self._moved.values()) > layer

    def wait(self, layer: int, timeout_s: float) -> bool:
        """Wait in this thread; return True once a layer is there, False if it never will be.

        Raises:
            TimeoutError: neither happened in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.over or self.has(layer), timeout_s):
                raise TimeoutError(f"layer {layer} did not arrive within {timeout_s} s")
            return self.has(layer)

    def hold_back(self, stream: int, rank: int, layer: int, timeout_s: float) -> bool:
        """Make a stream wait for a layer once its copies are queued; return False if they won't be.

        Raises:
            TimeoutError: they were not queued in time.
            DeviceError: the driver refused.
        """

        def events() -> list[StreamEvent] | None:
            found = []
            for op_id, moved in self._moved.items():
                queued = self._queued.get((rank, op_id), [])
                event = next((event for last, event in queued if last > layer), None)
                if event is not None:
                    found.append(event)
                elif moved <= layer:
                    return None
            return found

        with self._changed:
            ready = self._changed.wait_for(
                lambda: self.over or (self._moved and events() is not None), timeout_s
            )
            if not ready:
                raise TimeoutError(
                    f"the copies of layer {layer} were not queued within {timeout_s} s"
                )
            if not self.over:
                for event in events() or ():
                    event.hold_back(stream)
                return True
            return self.has(layer)

    async def reached(self, layer: int) -> bool:
        """Return True once a layer is there, or False if it never will be."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def callback() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._callbacks.append(callback)
        try:
            while not self._decided(layer):
                await changed.wait()
                changed.clear()
            with self._changed:
                return self.has(layer)
        finally:
            with self._changed, suppress(ValueError):
                self._callbacks.remove(callback)

    def _decided(self, layer: int) -> bool:
        with self._changed:
            return self.over or self.has(layer)


class Layerwise:
    """A request that is moved layer by layer. Await it for its response, once.

    Attributes:
        task_id: for `KVManager.wait`, `try_wait` and `cancel`.
    """

    def __init__(self, bridge: LoopBridge, spec: RequestSpec) -> None:
        """Start the request."""
        layers = bridge.door.model.num_layers
        self._bridge = bridge
        self._progress = LayerProgress(layers, layers if spec.operation is Operation.GET else 0)
        self.task_id = bridge.start_task(structs.replace(spec, watch=self._progress))

    def __await__(self) -> Generator[Any, None, KVResponse]:
        """Return the response.

        Cancellation: the request is cancelled, and CancelledError raised once it is over.
        """
        return self._bridge.task_response(self.task_id).__await__()

    def _check(self, layer: int) -> None:
        self._bridge.check_process()
        index("layer", layer, self._progress.num_layers)


class LayerwiseGet(Layerwise):
    """A get whose first layers may be used while the others are on their way.

    Only the response says what could not be loaded after all: the slots of tokens outside its mask
    have undefined content.
    """

    def wait_for_layer(
        self,
        layer: int,
        timeout: float = TIMEOUT_S,
        stream: int | None = None,
        tp_rank: int = 0,
    ) -> bool:
        """Wait in this thread until a layer is in the slots, or make a stream wait for that.

        Do not call this on the loop that runs the engine; use `layer` there.

        Args:
            layer: from 0.
            timeout: in seconds.
            stream: handle of a CUDA stream of the rank's device. Work that is queued on it later
                waits for the layer; this thread waits only until the layer's copies are queued.
            tp_rank: the rank of the device.

        Returns:
            True if the layer is in the slots of every token that was planned, or will be when the
            stream goes on; False if the get ended without it, as its response says.

        Raises:
            ConfigError: no such layer.
            TimeoutError: the layer was not there, or queued, in time. The get goes on.
            DeviceError: the driver refused.
        """
        self._check(layer)
        wait_s = seconds("timeout", timeout)
        if stream is None:
            return self._progress.wait(layer, wait_s)
        number, rank = integer("stream", stream), integer("tp_rank", tp_rank)
        return self._progress.hold_back(number, rank, layer, wait_s)

    async def layer(self, layer: int) -> bool:
        """Return True once a layer is in the slots, or False if the get ended without it.

        Raises:
            ConfigError: no such layer.
        """
        self._check(layer)
        return await self._progress.reached(layer)


class LayerwisePut(Layerwise):
    """A put whose layers are stored as they are written. Cancel it if not all of them will be."""

    def layer_written(self, layer: int) -> None:
        """Allow the layers up to this one to be stored: this thread has queued their writes.

        From any thread. The copies wait for the thread's current stream on each rank's device; so
        in a process with several ranks, call it once all of them have queued their writes.

        Raises:
            ConfigError: no such layer.
            DeviceError: the copies could not be made to wait. The put is cancelled.
            ClosedError: the manager is shut down.
        """
        self._check(layer)
        try:
            self._bridge.order_after(Operation.PUT)
        except DeviceError:
            self._bridge.cancel_soon(self.task_id)
            raise
        self._progress.let_go(layer + 1)
        self._bridge.nudge_device()
