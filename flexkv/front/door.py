"""What a manager needs of an engine: one in this process, or a client of one in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from flexkv.actors.supervisor import Supervisor
from flexkv.common.config import ModelConfig
from flexkv.common.errors import FlexKVError
from flexkv.common.request import KVResponse, Operation, Request
from flexkv.common.terms import Tier
from flexkv.engine.durability import FlushReport
from flexkv.engine.runner import RequestOwner
from flexkv.engine.statistics import Statistics
from flexkv.engine.tickets import RequestSpec
from flexkv.index.found import PrefixMatch
from flexkv.index.keys import Namespace
from flexkv.io.device.tensors import KVCaches
from flexkv.tiers.backend import Progress


class AnyTicket(Protocol):
    """A request whose arguments were checked: see `flexkv.engine.tickets.Ticket`."""

    @property
    def request(self) -> Request:
        """Return what is asked for."""
        ...

    @property
    def response(self) -> KVResponse | None:
        """Return the response, if there is one."""
        ...

    def with_slots(self, slot_mapping: Any) -> AnyTicket:
        """Return the ticket of a prepared request with its slots."""
        ...

    def begin(self) -> None:
        """Bind the request to the device; call it in the step that checked the slots."""
        ...

    async def run(self, turn: RequestOwner = ...) -> KVResponse:
        """Take the request to its response, and return that."""
        ...

    def release(self) -> None:
        """End the hold on the blocks that a prepared ticket has found."""
        ...

    def end(self) -> None:
        """Release what the ticket holds. Idempotent."""
        ...

    async def wait_written(self) -> None:
        """Return once what the request writes to lower tiers is written, or has failed."""
        ...

    def write_error(self) -> FlexKVError | None:
        """Return why something is not written to a lower tier; None if all of it is."""
        ...


class Door(Protocol):
    """An engine, or a client of one. All calls but `order_after` are made on its loop."""

    @property
    def model(self) -> ModelConfig:
        """Return the model."""
        ...

    @property
    def supervisor(self) -> Supervisor:
        """Return what owns its tasks."""
        ...

    @property
    def is_open(self) -> bool:
        """Return whether requests are accepted."""
        ...

    @property
    def is_closed(self) -> bool:
        """Return whether everything was released, or nothing was ever acquired."""
        ...

    @property
    def has_device(self) -> bool:
        """Return whether get and put can move bytes; otherwise they answer UNREADY."""
        ...

    @property
    def streams(self) -> Sequence[object]:
        """Return the ports or agents whose copies may have to wait for the caller's streams."""
        ...

    async def open(self, progress: Progress | None = None) -> None:
        """Acquire what is needed; on failure nothing is left behind."""
        ...

    async def close(self) -> None:
        """Cancel what runs, and release everything. Idempotent."""
        ...

    def abandon(self) -> bool:
        """Release everything at once; return whether there was anything to release."""
        ...

    def register_kv_caches(self, kv_caches: KVCaches, layout: str | None, tp_rank: int) -> None:
        """Register a rank's per-layer KV tensors."""
        ...

    def order_after(self, operation: Operation) -> None:
        """Make copies of later requests wait for what the calling thread's streams have queued."""
        ...

    def nudge_device(self) -> None:
        """Check again whether transfers that wait for layers may go on."""
        ...

    def submit(self, spec: RequestSpec) -> AnyTicket:
        """Check a caller's arguments, and return the ticket of the request."""
        ...

    def prepare(self, spec: RequestSpec) -> AnyTicket:
        """Return the ticket of what a get would load, or a put would have to store."""
        ...

    def match(self, token_ids: Any, namespace: Namespace = None) -> PrefixMatch:
        """Return how much of a prompt is resident, and how much behind that is said to be far."""
        ...

    def statistics(self) -> Statistics:
        """Return a frozen snapshot of every counter."""
        ...

    async def flush(self) -> FlushReport:
        """Return once everything resident that was put before is on stable storage."""
        ...

    def clear(self, tier: Tier | None, namespace: Namespace) -> int:
        """Forget blocks, and return how many places they had."""
        ...

    async def clear_durably(self, tier: Tier | None, namespace: Namespace) -> int:
        """Forget blocks, and return once no crash can bring them back."""
        ...

    async def reset_cluster(self) -> int:
        """Make all nodes that share blocks forget them; return the new generation."""
        ...

    def trace_start(self, path: str | None, with_tokens: bool | None) -> None:
        """Record to a file from now on."""
        ...

    def trace_stop(self) -> str | None:
        """Stop recording; return the file's path, or None if no trace was on."""
        ...
