"""One request of a client, and what the ranks' agents report about it.

Agents use other sockets than the client, so their reports may come before the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeAlias

from flexkv.common.request import Operation
from flexkv.common.terms import StreamEvent
from flexkv.observe.logs import get_logger
from flexkv.server.wire import Done, GetEnded, GetPlanned, Start

log = get_logger(__name__)

Answered: TypeAlias = Callable[[Done], None]
Tell: TypeAlias = Callable[[GetPlanned | GetEnded], None]


class Reports:
    """What agents have reported about one request.

    Attributes:
        is_given_up: whether an engine has given the request up.
    """

    __slots__ = ("_layers", "_ranks", "is_given_up", "num_layers")

    def __init__(self, ranks: int, num_layers: int) -> None:
        self._ranks, self.num_layers = ranks, num_layers
        self._layers: dict[int, int] = {}
        self.is_given_up = False

    def written(self, rank: int, layers: int) -> None:
        """Record that a rank has written the first `layers` layers; a lower number is ignored."""
        self._layers[rank] = max(layers, self._layers.get(rank, 0))

    @property
    def layers(self) -> int:
        """Return how many of the first layers every rank has written; all, once all are ready."""
        return min(self._layers.values()) if len(self._layers) >= self._ranks else 0


class Job:
    """A request of a client; also the `LayerWatch` of one that goes by layer.

    Attributes:
        keys: all keys of its prompt up to its last block, even those that `start` does not carry.
        kept_bytes: what it counts against the bytes that a client may have under way.
        may_begin: set once it may be planned.
        over: set once no device touches its blocks any more.
        is_fed: whether it reads layers as they are reported.
    """

    def __init__(
        self,
        start: Start,
        keys: bytes,
        generation: int,
        reports: Reports,
        answered: Answered,
        tell: Tell,
    ) -> None:
        """Create a request; `answered` gets its end, and `tell` sends messages to its agents."""
        self.start, self.keys, self.generation = start, keys, generation
        self.reports, self._answered, self._tell = reports, answered, tell
        self.kept_bytes = bytes_of(start, keys)
        self.may_begin, self.over = asyncio.Event(), asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._starving: asyncio.TimerHandle | None = None
        self.is_fed = start.by_layer and start.operation == Operation.PUT.label
        self.reported()

    def reported(self) -> None:
        """Allow the request to begin if enough has been reported."""
        needed = 1 if self.is_fed else self.num_layers
        if not self.start.when_ready or self.reports.layers >= needed:
            self.may_begin.set()

    @property
    def is_unready(self) -> bool:
        """Return whether it waits for something that a rank has to report."""
        return not self.may_begin.is_set() or self.ready < self.num_layers

    def cancel(self) -> None:
        """Cancel the request."""
        if self.task is not None:
            self.task.cancel()

    def starve_after(self, deadline_s: float, before: int = -1) -> None:
        """Cancel the request if no layer is reported within a deadline, as it holds host memory."""
        if self.ready == before:
            log.warning("put_starved", layers=before, deadline_s=deadline_s)
            self.cancel()
        elif self.ready < self.num_layers:
            loop, args = asyncio.get_running_loop(), (deadline_s, self.ready)
            self._starving = loop.call_later(deadline_s, self.starve_after, *args)

    def answer(self, done: Done) -> None:
        """Answer the request; first tell the agents, which may wait for layers of a get."""
        tell_end(self.start, done, self._tell)
        self._answered(done)

    def end(self) -> None:
        """Record that no device touches its blocks any more."""
        if self._starving is not None:
            self._starving.cancel()
        self.over.set()

    # -- the watch ------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Return the number of layers of the model."""
        return self.reports.num_layers

    @property
    def ready(self) -> int:
        """Return how many layers may be copied by now."""
        return self.reports.layers if self.is_fed else self.num_layers

    def expect(self, op_ids: Sequence[int]) -> None:
        """Tell the agents which copies will move a get."""
        if not self.is_fed:
            self._tell(GetPlanned(self.start.number, tuple(op_ids)))

    def queued(self, rank: int, op_id: int, last: int, event: StreamEvent) -> None:
        """Do nothing: streams are in the agents' processes."""

    def moved(self, op_id: int, first: int, last: int) -> None:
        """Do nothing: agents know what they have copied."""


def tell_end(start: Start, done: Done, tell: Tell) -> None:
    """Tell the agents the end of a get by layer, whether or not it began."""
    if start.by_layer and start.operation == Operation.GET.label:
        tell(GetEnded(start.number, done.moved))


def bytes_of(start: Start, keys: bytes) -> int:
    """Return what a request counts against the bytes that a client may have under way."""
    leaves = sum(len(run.ids) for run in start.leaves)
    return len(keys) + len(start.device_ids) + leaves
