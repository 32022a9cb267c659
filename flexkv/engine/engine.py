"""The engine: composes index, scheduler, actors and adapters on one event loop, and owns them.

    caller ──▶ Intake ──▶ Admission ──▶ Scheduler ──▶ an actor for each tier ──▶ its port

Life: `open` → (`register_kv_caches`) → requests → `close`. Closing stops admission, cancels what
runs, waits for hardware to let go, and checks that nothing is left.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from flexkv.actors.scheduler import Scheduler
from flexkv.actors.supervisor import Supervisor
from flexkv.common.config import CacheConfig, CacheSizes, ModelConfig
from flexkv.common.errors import ClosedError, ConfigError, InternalError, InvariantError
from flexkv.common.layout import Order, is_natural
from flexkv.common.request import Operation
from flexkv.common.space import rules_of
from flexkv.common.terms import Tier
from flexkv.engine.admission import Admission
from flexkv.engine.core import Core
from flexkv.engine.departure import Departure
from flexkv.engine.devices import Devices
from flexkv.engine.durability import Durability, FlushReport
from flexkv.engine.lending import Lending
from flexkv.engine.pins import Pins
from flexkv.engine.requests import Requests
from flexkv.engine.retention import Retention
from flexkv.engine.runner import RequestRunner
from flexkv.engine.statistics import Sources, Statistics, snapshot
from flexkv.engine.tickets import RequestSpec, Ticket
from flexkv.engine.tracing import Tracing
from flexkv.graph.explain import Explanation, explain
from flexkv.graph.planner import Planner
from flexkv.index.change_hub import ChangeHub
from flexkv.index.clears import ClearHistory
from flexkv.index.found import Found, PrefixMatch
from flexkv.index.intake import Intake
from flexkv.index.keys import KeyChain, Namespace
from flexkv.index.residency import Residency
from flexkv.io.device.tensors import KVCaches
from flexkv.observe.logs import get_logger
from flexkv.process.forks import HomeProcess
from flexkv.tiers.backend import Backend, LocalBackend, Progress
from flexkv.tiers.limits import device_window

log = get_logger(__name__)

DRAIN_TIMEOUT_S = 60.0
"""How long closing waits for hardware to give buffers back."""


class Engine:
    """Moves KV blocks between device, host memory and SSD, on the loop that opened it."""

    def __init__(
        self, model: ModelConfig, cache: CacheConfig, backend: Backend | None = None
    ) -> None:
        model.require_built()
        cache.require_built()
        self.model, self.cache = model, cache
        self.sizes: CacheSizes = cache.sized(model)
        self._backend = backend or LocalBackend(cache, self.sizes)
        self.tokens_per_block = cache.tokens_per_block
        self.clears = ClearHistory(time.time_ns())
        self._intake = Intake(self._key_chain(), self.clears, self.sizes.spaces)
        self._admission = Admission(cache.requests_max)
        self._resources = ExitStack()
        self._devices = Devices(
            self._backend.ranks, cache.io_deadline_s, self._backend, self._resources
        )
        self.streams = self._devices.streams
        self._failure: InternalError | None = None
        self.on_failure: Callable[[], None] | None = None
        self._open = self._used = self._closed = False
        self._home: HomeProcess | None = None

    # -- life -----------------------------------------------------------------------------------

    async def open(self, progress: Progress | None = None) -> None:
        """Acquire memory and files, and start the actors; on failure nothing is left behind.

        Raises:
            ConfigError: memory, a directory or disk space is missing.
            ClosedError: it was opened before.

        Cancellation: ends soon, even while memory is touched; nothing is left behind.
        """
        if self._used:
            raise ClosedError("an engine can be opened only once: create a new one")
        self._supervisor = Supervisor(self._failed)
        with ExitStack() as undo:
            await self._backend.take(undo, progress)
            self._compose(undo, progress)
            await self._supervisor.start()
            lending = Lending(
                self._core, self._requests, self.clears, self.tokens_per_block,
                rules_of(self.sizes.spaces),
            )  # fmt: skip
            self._core.start(self._supervisor, lending, self._retention.clear)
            self._resources.push(undo.pop_all())
        self._open = self._used = True
        self._home = HomeProcess("the engine")
        backing = {tier.label: name for tier, name in self._core.backing.items()}
        facts = {
            "block_bytes": self.sizes.block_bytes[0],
            "restored_blocks": self._core.restored_blocks,
        }
        log.info("engine_open", **backing, **facts)

    def _compose(self, undo: ExitStack, progress: Progress | None) -> None:
        cache, sizes, backend = self.cache, self.sizes, self._backend
        backend.open(undo, progress)
        core = self._core = Core(cache, sizes, backend, self.clears, self._admission.requests_most)
        self._residency = core.residency
        self._scheduler, self._observer, self._behind = core.scheduler, core.observer, core.behind
        self._actors = core.actors
        for actor in self._actors.values():
            undo.callback(actor.close)
        self._durability = Durability(
            self._scheduler, self._behind, backend.tiers(), backend.unavailable, self._supervisor,
            cache.io_deadline_s,
        )  # fmt: skip
        self._sources = Sources(
            self._residency, self._scheduler, self._admission, self._actors, core.backing,
            self._behind, core.restored_blocks, backend.unavailable, core.stores, core.cluster,
        )  # fmt: skip
        self._tracing = Tracing(cache, sizes, self._observer, self._sources)
        undo.callback(self._tracing.stop)
        runner = RequestRunner(
            self._admission, self._scheduler, self._observer, self._behind, core.look_up
        )
        self._requests = Requests(self._intake, core, runner, self._devices, self._tracing)
        if cache.enable_trace:
            self._tracing.start()
        self._retention = Retention(
            self._intake, self._residency, core.capacities, core.persistence, Pins(self._scheduler)
        )
        close = (
            self._admission.close, self._retention.pins.close, self._requests.holds.close,
            self._behind.abandon, self._behind.close, self._scheduler.watch.close,
            self._durability.close,
        )  # fmt: skip
        self._departure = Departure(
            self._scheduler.fail, close, self._supervisor.abandon, self._resources
        )
        self._retention.about_to_clear = self._behind.about_to_clear
        self._retention.on_clear = core.cleared

    def register_kv_caches(
        self, kv_caches: KVCaches, layout: str | None = None, tp_rank: int = 0
    ) -> None:
        """Register a rank's per-layer KV tensors; the caller owns them, and keeps them alive.

        Raises:
            ConfigError: the tensors do not fit the model, or their layout is ambiguous.
            ClosedError: not open.
        """
        self._check_open()
        joined = self._devices.register(kv_caches, layout, tp_rank)
        if joined is not None:
            self._take_order(self._devices.order)
            window = device_window(self.cache, self._devices.kind)
            windows, block_bytes = (window, window), self.sizes.block_bytes
            actor = self._core.add_actor(
                Tier.DEVICE, joined.port, windows, block_bytes, joined.checks
            )
            self._resources.callback(actor.close)
            actor.note_begins(self._tracing.is_on)
            self._scheduler.watch.watches_device = self._devices.kind != "agents"
            self._core.start_actor(actor, self._supervisor)

    def _take_order(self, order: Order) -> None:
        """Make later requests' keys depend on a block's element order, unless it is natural."""
        if is_natural(order):
            return
        self._requests.rekey(self._key_chain(order))

    def _key_chain(self, order: Order = "") -> KeyChain:
        return KeyChain(self.sizes.spaces[0], self.cache.key_secret.get_secret_value(), order)

    @property
    def devices(self) -> Devices:
        """Return the registered devices.

        Raises:
            ClosedError: not open.
        """
        self._check_open()
        return self._devices

    async def close(self) -> None:
        """Stop admitting, cancel what runs, wait for hardware, release everything. Idempotent.

        Raises:
            InvariantError: something was left behind, which is a bug of ours.
            InternalError: hardware did not give its buffers back in time; they stay mapped.
        """
        if self.is_closed:
            return
        self._check_process()
        try:
            await self._close()
        finally:
            if not self._closed:  # interrupted: nobody else will release it
                self.abandon()

    async def _close(self) -> None:
        self._open = False
        self._admission.close()
        self._retention.pins.close()
        self._requests.holds.close()
        if self._failure is None:
            self._scheduler.cancel_unanswered()
            await self._durability.finish(self.cache.shutdown_flush_s)
        self._behind.close()
        self._scheduler.cancel_all()
        if self._failure is None:
            self._core.stop_transfers()
            await self._drain()
        self._scheduler.watch.close()
        self._durability.close()
        if self._failure is None:
            for persistence in self._core.persistence.values():
                await persistence.finish()
        await self._supervisor.stop()
        await self._core.leave_tiers()
        self._note_closed()
        self._devices.detach()
        self._resources.close()
        if self._failure is None:
            self._check_nothing_left()
        log.info("engine_closed")

    def abandon(self) -> bool:
        """Release everything at once, for an engine that its loop can no longer close.

        Waiting callers get a ClosedError. Blocks that are owed to the SSD are not written.

        Returns:
            Whether there was anything to release.
        """
        if self.is_closed:
            return False
        self._open, self._closed = False, True
        self._devices.detach()
        return self._departure.abandon()

    def _note_closed(self) -> None:
        self._closed = True
        self._departure.note_closed()

    def _check_process(self) -> None:
        if self._home is not None:
            self._home.check()

    async def _drain(self) -> None:
        """Wait until no run is left, or the engine has failed."""
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                await self._scheduler.wait_idle()
        except TimeoutError as error:
            self._scheduler.watch.close()
            self._durability.close()
            await self._supervisor.stop()
            self._tracing.stop()
            self._note_closed()  # except for memory that hardware may still write to
            depths = {actor.name: actor.depth for actor in self._actors.values()}
            raise InternalError(
                f"transfers still in flight after {DRAIN_TIMEOUT_S} s: {depths}"
            ) from error

    def _check_nothing_left(self) -> None:
        self._residency.validate()
        if self._residency.claims or any(actor.depth for actor in self._actors.values()):
            raise InvariantError(
                f"transfers or claims are left: {self._residency.claims.stories()}"
            )

    def _failed(self, cause: BaseException) -> None:
        """Fail all requests and admit no more, since a task raised. The first failure stands."""
        if self._failure is not None:
            return
        self._failure = InternalError(f"the engine failed: {cause!r}")
        self._failure.__cause__ = cause
        self._admission.close()
        self._behind.abandon()
        self._scheduler.fail(self._failure)
        if self.on_failure is not None:
            self.on_failure()

    def _check_open(self) -> None:
        if self._home is not None and not self._home.is_here:
            self._home.check()
        if self._failure is not None:
            raise self._failure
        if not self._open:
            raise ClosedError("the engine is not open: not started yet, or shut down")

    def check_sound(self) -> None:
        """Raise the InternalError that has ended the engine, if one has."""
        if self._failure is not None:
            raise self._failure

    @property
    def is_open(self) -> bool:
        """Return whether requests are accepted."""
        self._check_process()
        return self._open and self._failure is None

    @property
    def is_closed(self) -> bool:
        """Return whether everything was released, or nothing was ever acquired."""
        return self._closed or not self._used

    @property
    def has_device(self) -> bool:
        """Return whether get and put can move bytes; otherwise they answer UNREADY."""
        return self._devices.missing is None

    # -- requests -------------------------------------------------------------------------------

    @property
    def requests(self) -> Requests:
        """Return the part of the engine that makes requests and runs them."""
        return self._requests

    @property
    def _checked(self) -> Requests:
        self._check_open()
        return self._requests

    def submit(self, spec: RequestSpec) -> Ticket:
        """Check a caller's arguments, and return the ticket that takes the request to its response.

        Raises:
            ConfigError: an argument breaks a rule.
            ClosedError: not open.
        """
        self._check_open()
        return self._requests.submit(spec)

    def prepare(self, spec: RequestSpec) -> Ticket:
        """Return the ticket of a request without slots: see `Requests.prepare`."""
        return self._checked.prepare(spec)

    def match(self, token_ids: Any, namespace: Namespace = None) -> PrefixMatch:
        """Return how much of a prompt is resident, and how much behind that is said to be far."""
        return self._checked.match(token_ids, namespace)

    def find(self, keys: bytes, first: int = 0, drop: int = 0) -> Found:
        """Return where a prompt's blocks from `first` on are: see `Planner.find`."""
        return self._checked.find(keys, first, drop)

    def next_request_id(self) -> int:
        """Return a new request id, for a request that neither `submit` nor `prepare` makes."""
        return self._checked.next_id()

    def explain(self, operation: str, token_ids: Any, namespace: Namespace) -> Explanation:
        """Return the plan of a request, if all tiers were up and had room, without running it."""
        kind = {each.label: each for each in Operation}.get(operation)
        if kind is None:
            names = ", ".join(each.label for each in Operation)
            raise ConfigError("operation", operation, f"must be one of {names}")
        request = self._checked.intake(kind, token_ids, None, namespace)
        return explain(request, self._core.planner)

    def nudge_device(self) -> None:
        """Check again whether transfers that wait for layers may go on."""
        if Tier.DEVICE in self._actors:
            self._actors[Tier.DEVICE].nudge()

    def order_after(self, operation: Operation) -> None:
        """Make copies of later requests wait for what the calling thread's streams have queued.

        From any thread. The queued work may write what a put reads, or use what a get overwrites.

        Raises:
            DeviceError: a driver refused. The device is down from then on.
        """
        if operation is not Operation.PREFETCH:
            self._devices.order_after(operation is Operation.GET)

    async def flush(self) -> FlushReport:
        """Return once everything resident that was put before is on stable storage.

        Returns:
            What is not, because the SSD has no place for it or refuses it.

        Raises:
            TransferError: a block could not be written, or the disk refused to sync; what could be
                written is safe.
        """
        self._check_open()
        return await self._durability.flush()

    # -- looking --------------------------------------------------------------------------------

    @property
    def tracing(self) -> Tracing:
        """Return what turns the trace on and off.

        Raises:
            ClosedError: not open.
        """
        self._check_open()
        return self._tracing

    def trace_start(self, path: str | None = None, with_tokens: bool | None = None) -> None:
        """Record to a file from now on: see `Tracing.start`."""
        self.tracing.start(path, with_tokens)

    def trace_stop(self) -> str | None:
        """Stop recording; return the file's path, or None if no trace was on."""
        return self.tracing.stop()

    def clear(self, tier: Tier | None = None, namespace: Namespace = None) -> int:
        """Forget blocks at once: see `Retention.clear`."""
        return self.retention.clear(tier, namespace)

    async def clear_durably(self, tier: Tier | None = None, namespace: Namespace = None) -> int:
        """Forget blocks, and return once no crash can bring them back."""
        return await self.retention.clear_durably(tier, namespace)

    async def reset_cluster(self) -> int:
        """Make all nodes that share blocks forget them: see `KVManager.reset_cluster`."""
        self._check_open()
        if self._core.cluster is None:
            why = "this node shares no blocks: set enable_p2p_cpu or enable_p2p_ssd"
            raise ConfigError("cluster", None, why)
        return await self._core.cluster.reset()

    @property
    def retention(self) -> Retention:
        """Return what clears, resizes, sets quotas, and pins.

        Raises:
            ClosedError: not open.
        """
        self._check_open()
        return self._retention

    @property
    def scheduler(self) -> Scheduler:
        """Return the scheduler, for tests."""
        return self._scheduler

    @property
    def planner(self) -> Planner:
        """Return the planner, for tests and tools; only the scheduler plans with it."""
        return self._core.planner

    @property
    def residency(self) -> Residency:
        """Return the index, for tests and tools; only the scheduler writes it."""
        return self._residency

    @property
    def changes(self) -> ChangeHub:
        """Return what passes the changes of the index on to readers."""
        return self._core.changes

    @property
    def supervisor(self) -> Supervisor:
        """Return what owns the engine's tasks."""
        return self._supervisor

    def statistics(self) -> Statistics:
        """Return a frozen snapshot of every counter."""
        self._check_open()
        return snapshot(self._sources, self._observer)
