"""Requests of one engine: from a caller's arguments to tickets, and what tickets need to run."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from msgspec import structs

from flexkv.actors.flight import Flight
from flexkv.common.errors import ClosedError, ConfigError
from flexkv.common.request import KVResponse, KVResponseStatus, Operation, Request
from flexkv.engine.core import Core
from flexkv.engine.devices import Devices
from flexkv.engine.pins import Holds
from flexkv.engine.runner import ALONE, RequestOwner, RequestRunner
from flexkv.engine.tickets import PREPARED, RequestSpec, Ticket, nothing_moved
from flexkv.engine.tracing import Tracing
from flexkv.graph.far import SetApart
from flexkv.index.found import Found, PrefixMatch, prefix_match
from flexkv.index.intake import Intake
from flexkv.index.keys import KeyChain, Namespace


class Requests:
    """Makes the requests of an open engine, and runs them.

    Attributes:
        holds: the holds of matches, which keep blocks from eviction.
        runner: runs requests; a server uses it to turn away those of an instance.
    """

    def __init__(
        self, intake: Intake, core: Core, runner: RequestRunner, devices: Devices, tracing: Tracing
    ) -> None:
        """Compose the parts of an engine."""
        self.runner = runner
        self.holds = Holds(core.scheduler, core.residency)
        self._intake, self._core, self._devices, self._tracing = intake, core, devices, tracing
        self._last_id = self._rekeyed_at = 0

    def rekey(self, keys: KeyChain) -> None:
        """Use other keys for later requests; requests made before can use no device any more."""
        self._intake.rekey(keys)
        self._rekeyed_at = self._last_id

    def next_id(self) -> int:
        """Return a new request id; `intake` takes its own ids from here."""
        self._last_id += 1
        return self._last_id

    # -- tickets --------------------------------------------------------------------------------

    def submit(self, spec: RequestSpec) -> Ticket:
        """Check a caller's arguments, and return the ticket that takes the request to its response.

        Raises:
            ConfigError: an argument breaks a rule.
        """
        operation = spec.operation
        request = self.intake(operation, spec.token_ids, spec.token_mask, spec.namespace)
        if spec.watch is not None:
            self._check_layerwise()
            request = structs.replace(request, watch=spec.watch)
        if operation is Operation.PREFETCH:
            return Ticket(request, self)
        return self.ready(request, spec.slot_mapping)

    def prepare(self, spec: RequestSpec) -> Ticket:
        """Return the ticket of what a get would load, or a put would have to store.

        A get keeps what it found from eviction until it is planned, its ticket ends, or the hold
        expires (see `Holds`). To run the request, run the ticket that `with_slots` returns.

        Raises:
            ConfigError: an argument breaks a rule.
        """
        request = self.intake(spec.operation, spec.token_ids, spec.token_mask, spec.namespace)
        if spec.operation is Operation.GET:
            found = self._core.residency.find(request.keys, request.span.first_block)
            self.holds.hold(PREPARED, request.request_id, found.holdings)
            return Ticket(request.narrowed(found.first, found.last), self)
        return Ticket(request.narrowed(self.lacking_from(request), request.span.last_block), self)

    def lacking_from(self, request: Request) -> int:
        """Return the first block that a put would have to store: see `Planner.lacking_from`."""
        return self._core.planner.lacking_from(request)

    def made(self, request: Request) -> Ticket:
        """Return the ticket of a request that was made elsewhere."""
        return Ticket(request, self)

    def ready(self, request: Request, slot_mapping: Any) -> Ticket:
        """Return the ticket of a request with its slots; it may be over: see `unready`.

        Raises:
            ConfigError: the slots break a rule.
        """
        ready = self.with_slots(request, slot_mapping)
        return Ticket(ready or request, self, None if ready else self.unready(request))

    def _check_layerwise(self) -> None:
        """Check that the model's requests can be moved layer by layer.

        Raises:
            ConfigError: it has several KV groups.
        """
        if (groups := self._core.planner.groups) > 1:
            why = "a model with several KV groups is not moved layer by layer: use get and put"
            raise ConfigError("layer_groups", f"{groups} KV groups", why)

    # -- parts of tickets -----------------------------------------------------------------------

    def intake(
        self,
        operation: Operation,
        token_ids: Any,
        token_mask: Any = None,
        namespace: Namespace = None,
    ) -> Request:
        """Check a caller's arguments and return the request, still without device blocks."""
        number = self.next_id()
        request = self._intake.request(operation, number, token_ids, token_mask, namespace)
        self._tracing.asked(number, token_ids)
        return request

    def with_slots(self, request: Request, slot_mapping: Any) -> Request | None:
        """Return the request with its device blocks; None if it can use no device."""
        if self._devices.missing is not None or request.request_id <= self._rekeyed_at:
            return None
        return self._intake.with_slots(request, slot_mapping, self._devices.num_blocks)

    def unready(self, request: Request) -> KVResponse:
        """Return the response to a request that needs a device and can use none."""
        why = self._devices.missing or ClosedError(
            "the request was made before the device was registered"
        )
        response = nothing_moved(request, KVResponseStatus.UNREADY, why)
        self._core.observer.refused(request, response)
        return response

    def perform(self, request: Request, turn: RequestOwner = ALONE) -> Coroutine[Any, Any, Flight]:
        """Run a request to its answer: see `RequestRunner.perform`."""
        return self.runner.perform(request, self._devices.use, turn)

    def occupy_device(self, occupies: bool) -> None:
        """Count one more or one less user of the device, for which suspending it waits."""
        if occupies:
            self._devices.use.enter()
        else:
            self._devices.use.leave()

    def release(self, request: Request) -> None:
        """End the hold of a prepared request, if it has one."""
        self.holds.release(PREPARED, request.request_id)

    # -- matches --------------------------------------------------------------------------------

    def match(self, token_ids: Any, namespace: Namespace) -> PrefixMatch:
        """Return how much of a prompt is resident, and how much behind that is said to be far.

        It waits for no I/O, and changes only the blocks' recency.
        """
        request = self.intake(Operation.PREFETCH, token_ids, None, namespace)
        apart, tiers = self.find_apart(request.keys, with_coming=True), self._core.residency.tiers
        return prefix_match(apart.found, tiers, request.tokens_per_block, apart.far)

    def find(self, keys: bytes, first: int = 0, drop: int = 0) -> Found:
        """Return where a prompt's blocks from `first` on are: see `Planner.find`."""
        self._core.scheduler.update_avoid()
        return self._core.planner.find(keys, first, drop)

    def find_apart(
        self, keys: bytes, first: int = 0, drop: int = 0, with_coming: bool = False
    ) -> SetApart:
        """Return where a prompt's blocks are, and what is far: see `Planner.find_apart`."""
        self._core.scheduler.update_avoid()
        return self._core.planner.find_apart(keys, first, drop, with_coming)
