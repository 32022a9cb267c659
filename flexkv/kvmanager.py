"""KVManager: the façade that engines and programs use.

Two forms over the same core. The async form runs on the caller's loop (`async with`), or is
awaited from any loop after `start()`. The task-id form, for synchronous engines, needs `start()`,
which runs the engine's loop in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from flexkv.common.arguments import flag, integer, text
from flexkv.common.config import CacheConfig, ModelConfig, Settings
from flexkv.common.config_keys import kind_of
from flexkv.common.errors import ConfigError
from flexkv.common.request import KVResponse, Operation, TokenMask
from flexkv.common.terms import Tier
from flexkv.engine.durability import FlushReport
from flexkv.engine.engine import Engine
from flexkv.engine.statistics import Statistics
from flexkv.engine.tickets import RequestSpec
from flexkv.front.door import Door
from flexkv.front.layerwise import LayerwiseGet, LayerwisePut
from flexkv.front.loop_bridge import LoopBridge
from flexkv.front.task_form import TaskForm
from flexkv.graph.explain import Explanation
from flexkv.index.found import PrefixMatch
from flexkv.index.keys import Namespace
from flexkv.io.device.tensors import KVCaches
from flexkv.observe.logs import obey_environment
from flexkv.server.doors import door_of
from flexkv.tiers.backend import Backend, Progress

T = TypeVar("T")


class KVManager:
    """Stores KV blocks in host memory and lower tiers, and loads them back by token prefix.

    In a forked child of the process that has started it, calls raise ClosedError.
    """

    def __init__(
        self,
        model: ModelConfig,
        cache: CacheConfig | None = None,
        *,
        settings: Settings | None = None,
        progress: Progress | None = None,
        backend: Backend | None = None,
    ) -> None:
        """Check the configuration; nothing is allocated before `start` or `async with`.

        With `server_client_mode` in `settings`, the engine is that of a server in another process:
        see docs/server.md for what differs.

        Args:
            model: the shape of the KV cache.
            cache: the tiers and their sizes; by default those of `settings`.
            settings: of this process. By default, the file and the environment decide about
                `server_client_mode`, and about `cache` if that is not given.
            progress: called with (done, total) bytes while host memory is touched, in a thread.
            backend: what to use in place of this machine's memory, files and devices.

        Raises:
            ConfigError: a part is enabled that is not built, or a size does not fit.
        """
        obey_environment()
        if progress is not None and not callable(progress):
            raise ConfigError("progress", kind_of(progress), "must be callable")
        self._door: Door = door_of(model, cache, settings, backend)
        self._bridge = LoopBridge(self._door, type(self).__name__, progress)
        self._tasks = TaskForm(self._bridge)

    # -- life -----------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self._bridge.enter()
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        await self._bridge.leave(error)

    def start(self) -> None:
        """Run the engine's loop in a thread of its own, for callers that are not async.

        While the manager is open, this does nothing.

        Raises:
            ConfigError: memory, a directory or disk space is missing.
            ClosedError: it was shut down, or this is a forked child of the process that started it.
        """
        self._bridge.start()

    def shutdown(self) -> None:
        """Close the manager: cancel what runs, and release everything. Idempotent.

        Works from any thread, in a signal handler, and at exit. A manager that runs on the caller's
        own loop is released at once, without the flush that leaving its `async with` does.
        """
        self._bridge.shutdown()

    def is_ready(self) -> bool:
        """Return whether get and put would move bytes: it is open, and its devices can be used."""
        self._bridge.check_process()
        return self._door.is_open and self._door.has_device

    def register_kv_caches(
        self, kv_caches: KVCaches, layout: str | None = None, tp_rank: int = 0
    ) -> None:
        """Register one rank's per-layer KV tensors; get and put need those of all ranks.

        Args:
            kv_caches: a dict (in layer order) or list of one tensor per layer: numpy, or torch in
                CPU or CUDA memory.
            layout: one of `flexkv.common.layout.LAYOUT_NAMES`, when the shape is ambiguous.
            tp_rank: the rank that they belong to, from 0 to `tp_size` - 1.

        Raises:
            ConfigError: the tensors do not fit the model, or the layout must be given.
            BackendUnavailableError: there is no adapter, or no driver, for where they are.
            DeviceError: the device refused.
            ClosedError: not started.
        """
        self.on_loop(lambda: self._door.register_kv_caches(kv_caches, layout, tp_rank))

    async def suspend_device(self) -> None:
        """Release all KV tensors, so that the inference engine can free their memory.

        Requests under way are finished first; later ones are answered UNREADY, but `match` and
        `prefetch` go on. The host memory stays registered with the device.

        Raises:
            ClosedError: no device is registered, or it is suspended already.
            DeadlineError: requests did not end within `io_deadline_s`; the devices stay in use.
        """
        await self._bridge.call_async(lambda: self.engine.devices.suspend())

    def suspend_device_blocking(self) -> None:
        """Do what `suspend_device` does, waiting in this thread; needs `start()`."""
        thread = self._bridge.blocking("suspend_device_blocking", "use `await suspend_device()`")
        thread.call(lambda: self.engine.devices.suspend())

    def resume_device(
        self, kv_caches: KVCaches, layout: str | None = None, tp_rank: int = 0
    ) -> None:
        """Register a suspended rank's KV tensors again: see `register_kv_caches` for arguments.

        Raises:
            ConfigError: the tensors do not fit the model, or the rank is not suspended.
            DeviceError: the device refused.
        """
        self.on_loop(lambda: self.engine.devices.resume(kv_caches, layout, tp_rank))

    # -- async form -----------------------------------------------------------------------------

    def match(self, token_ids: Any, namespace: Namespace = None) -> PrefixMatch:
        """Return how much of a prompt is resident, and how much behind that is said to be far.

        It waits for no I/O, and changes only the blocks' recency.

        Args:
            token_ids: integer[tokens], numpy, torch or list.
            namespace: a string or list of strings; prompts of different ones share nothing.

        Raises:
            ConfigError: a token is negative, or not an integer.
        """
        return self.on_loop(lambda: self._door.match(token_ids, namespace))

    async def get(
        self, token_ids: Any, slot_mapping: Any, token_mask: Any = None, namespace: Namespace = None
    ) -> KVResponse:
        """Load the longest resident prefix into the device; return once the slots hold it.

        Args:
            token_ids: integer[tokens].
            slot_mapping: integer[selected tokens]: block_id * tokens_per_block + offset, contiguous
                within a block; with several KV groups, a list of such arrays (docs/library.md).
            token_mask: bool[tokens], no holes; a leading False means already on the device.
            namespace: as for `match`.

        Returns:
            SUCCESS with the mask of what was loaded (a part is normal: docs/operating.md says
            why), NOTFOUND, UNREADY (no device, or no room in host memory), or FAILED.

        Raises:
            ConfigError: an argument breaks a rule; nothing has been done.
            ClosedError: not started, or shut down.

        Cancellation: raised once no hardware touches the slots; their content is undefined.
        """
        return await self._bridge.run(Operation.GET, token_ids, slot_mapping, token_mask, namespace)

    async def put(
        self, token_ids: Any, slot_mapping: Any, token_mask: Any = None, namespace: Namespace = None
    ) -> KVResponse:
        """Store the blocks that host memory lacks; return once device memory may be reused.

        Writing to lower tiers goes on in the background. The arguments are as for `get`; the mask's
        True tokens are those that may be stored. `return_mask` has those that were stored. It is
        all False if everything was there already, with SUCCESS, and if there was no room for any,
        with UNREADY and a CapacityError as `error`.

        Raises:
            ConfigError: an argument breaks a rule; nothing has been done.
            ClosedError: not started, or shut down.

        Cancellation: raised once no hardware reads the slots; nothing is stored.
        """
        return await self._bridge.run(Operation.PUT, token_ids, slot_mapping, token_mask, namespace)

    async def prefetch(self, token_ids: Any, namespace: Namespace = None) -> KVResponse:
        """Bring the resident prefix from lower tiers to host memory; return once it is there.

        Raises:
            ConfigError: an argument breaks a rule.
            ClosedError: not started, or shut down.

        Cancellation: what is under way is finished in the background and kept.
        """
        return await self._bridge.run(Operation.PREFETCH, token_ids, None, None, namespace)

    # -- task-id form ---------------------------------------------------------------------------

    def get_match(
        self, token_ids: Any, token_mask: Any = None, namespace: Namespace = None
    ) -> tuple[int, TokenMask]:
        """Find what a get would load, and keep it from eviction until `launch` or `cancel`.

        Returns:
            A task id, and bool[tokens]: the tokens that `launch` needs slots for.
        """
        return self._tasks.prepare(Operation.GET, token_ids, token_mask, namespace)

    def put_match(
        self, token_ids: Any, token_mask: Any = None, namespace: Namespace = None
    ) -> tuple[int, TokenMask]:
        """Find what a put would have to store; for the rest see `get_match`."""
        return self._tasks.prepare(Operation.PUT, token_ids, token_mask, namespace)

    def get_async(
        self, token_ids: Any, slot_mapping: Any, token_mask: Any = None, namespace: Namespace = None
    ) -> int:
        """Start a get, and return its task id."""
        return self._tasks.start(Operation.GET, token_ids, slot_mapping, token_mask, namespace)

    def put_async(
        self, token_ids: Any, slot_mapping: Any, token_mask: Any = None, namespace: Namespace = None
    ) -> int:
        """Start a put, and return its task id."""
        return self._tasks.start(Operation.PUT, token_ids, slot_mapping, token_mask, namespace)

    def prefetch_async(self, token_ids: Any, namespace: Namespace = None) -> int:
        """Start a prefetch, and return its task id."""
        return self._tasks.start(Operation.PREFETCH, token_ids, None, None, namespace)

    def get_layerwise(
        self, token_ids: Any, slot_mapping: Any, token_mask: Any = None, namespace: Namespace = None
    ) -> LayerwiseGet:
        """Start a get whose first layers may be used while the others are on their way.

        The arguments are as for `get`. Await it for the response, or `wait` for its `task_id`.
        """
        spec = RequestSpec(Operation.GET, token_ids, slot_mapping, token_mask, namespace)
        return LayerwiseGet(self._bridge, spec)

    def put_layerwise(
        self, token_ids: Any, slot_mapping: Any, token_mask: Any = None, namespace: Namespace = None
    ) -> LayerwisePut:
        """Start a put that stores each layer once the caller has written it, as in a prefill.

        The arguments are as for `put`; for the rest see `get_layerwise`. It holds places in host
        memory until every layer is written: `cancel` it if that will not happen.
        """
        spec = RequestSpec(Operation.PUT, token_ids, slot_mapping, token_mask, namespace)
        return LayerwisePut(self._bridge, spec)

    def launch(self, task_ids: int | Sequence[int], slot_mappings: Any | Sequence[Any]) -> None:
        """Start tasks that a match prepared; launching a launched one is a no-op.

        Raises:
            ConfigError: an id was never issued, or slots break a rule; no task was launched.
        """
        self._tasks.launch(task_ids, slot_mappings)

    def cancel(self, task_ids: int | Sequence[int]) -> None:
        """Cancel tasks; when this returns, no hardware touches their slots any more.

        On the engine's own loop, where nothing may block, it returns at once; use `try_wait` there
        to find out when a task is over.

        Raises ConfigError for an id that was never issued.
        """
        self._tasks.cancel(task_ids)

    def wait(
        self, task_ids: int | Sequence[int], timeout: float | None = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """Return tasks' responses, waiting in this thread; tasks not over in time are cancelled.

        Args:
            task_ids: one or several.
            timeout: in seconds, for all; None = as long as it takes. Their status is TIMEOUT then.
            completely: wait until the write-behind of puts is done too.

        Raises:
            ConfigError: an id was never issued, or is collected already, or an argument has the
                wrong type.
            ClosedError: not started with `start()`: on the engine's own loop, await instead.
        """
        return self._tasks.wait(task_ids, timeout, completely)

    def try_wait(self, task_ids: int | Sequence[int]) -> dict[int, KVResponse]:
        """Return the responses of those tasks that are over; never wait for the others."""
        return self._tasks.try_wait(task_ids)

    # -- upkeep ---------------------------------------------------------------------------------

    async def flush(self) -> FlushReport:
        """Return once everything resident that was put before is on stable storage.

        Returns:
            What is not, because the SSD has no place for it or refuses it as worth less than what
            it has.

        Raises:
            TransferError: a block could not be written, or the disk refused (StorageError); what
                could be written is safe.
        """
        return await self._bridge.call_async(self._door.flush)

    def reset(self, cluster: bool = False) -> int:
        """Forget every block of every tier, and return their number: see `clear`.

        With `cluster`, wait in this thread for `reset_cluster`, and return what that does.
        """
        if not flag("cluster", cluster):
            return self.clear()
        thread = self._bridge.blocking("reset(cluster=True)", "use `await reset_cluster()`")
        return thread.call(self._door.reset_cluster)

    async def reset_cluster(self) -> int:
        """Make all nodes that share blocks forget them; return the cluster's new generation.

        Each node does so when it hears of it, soon; nodes of two generations share nothing.

        Raises:
            ConfigError: this node shares no blocks with others.
            ClusterStoreError: Redis did not do it, or it is not known whether it did.
        """
        return await self._bridge.call_async(self._door.reset_cluster)

    def clear(self, tier: Tier | None = None, namespace: Namespace = None) -> int:
        """Forget the blocks of one tier, of one namespace, or all; traffic may go on.

        Puts that began earlier store nothing any more: they end as CANCELLED. Called on the
        engine's own loop, this returns before the clear is in the journal of the SSD tier, and
        `flush` waits for that. Called elsewhere, it returns once no crash can bring blocks back.

        Returns:
            How many places the blocks had, in all tiers.

        Raises:
            ConfigError: both arguments are given, or there is no such tier.
            StorageError: everything is cleared, but the next run may find blocks on SSD: the
                journal could not be written.
        """
        if (thread := self._bridge.thread) is not None:
            return thread.call(lambda: self._door.clear_durably(tier, namespace))
        return self.on_loop(lambda: self._door.clear(tier, namespace))

    def resize(self, tier: Tier, capacity_blocks: int) -> int:
        """Change how many blocks a tier may hold, and return how many it may hold now.

        That is more than asked for if too many blocks are pinned or under way. The memory or files
        stay allocated.

        Raises:
            ConfigError: there is no such tier, or it was opened with fewer.
        """
        return self.on_loop(lambda: self.engine.retention.resize(tier, capacity_blocks))

    def set_quota(self, namespace: Namespace, tier: Tier, blocks: int | None) -> None:
        """Bound how many blocks of a tier a namespace may have; None removes the bound.

        Blocks beyond the quota are dropped at once, unless they are in use. What the namespace
        stores beyond it evicts only its own blocks, by the tier's policy. A quota reserves nothing:
        other namespaces may take what this one does not use.

        Args:
            namespace: as for `match`; None is the namespace of prompts that name none.
            tier: HOST or DISK.
            blocks: 0 or more.

        Raises:
            ConfigError: an argument breaks a rule, or 64 namespaces have quotas.
        """
        self.on_loop(lambda: self.engine.retention.set_quota(namespace, tier, blocks))

    def namespace_blocks(self, namespace: Namespace) -> dict[Tier, int]:
        """Return the number of a namespace's blocks by tier, including those being filled."""
        return self.on_loop(lambda: self.engine.retention.namespace_blocks(namespace))

    def pin(
        self,
        token_ids: Any = None,
        namespace: Namespace = None,
        ttl_s: float = 3600.0,
        owner: str = "",
    ) -> int:
        """Keep the resident blocks of a prompt from eviction, and return the pin's id.

        Args:
            token_ids: integer[tokens]; None for everything that the namespace has now.
            namespace: as for `match`.
            ttl_s: the seconds after which the pin ends by itself.
            owner: names who pins, for `unpin_owner`.

        Raises:
            ConfigError: an argument breaks a rule.
        """
        return self.on_loop(lambda: self.engine.retention.pin(token_ids, namespace, ttl_s, owner))

    def unpin(self, pin_id: int) -> bool:
        """End a pin; return whether it still existed."""
        number = integer("pin_id", pin_id)
        return self.on_loop(lambda: self.engine.retention.pins.unpin(number))

    def unpin_owner(self, owner: str) -> int:
        """End every pin of an owner that is gone, and return how many there were."""
        name = text("owner", owner)
        return self.on_loop(lambda: self.engine.retention.pins.unpin_owner(name))

    def statistics(self) -> Statistics:
        """Return a frozen snapshot: tiers, routes and their failures, queues, requests, hits."""
        return self.on_loop(self._door.statistics)

    @contextmanager
    def trace(
        self, path: str | Path | None = None, *, tokens: bool | None = None
    ) -> Iterator[None]:
        """Record every request and transfer to a file while the block runs: see `trace_start`."""
        self.trace_start(path, tokens=tokens)
        try:
            yield
        finally:
            self.trace_stop()

    def trace_start(self, path: str | Path | None = None, *, tokens: bool | None = None) -> None:
        """Record every request and transfer to a file from now on.

        Args:
            path: the file, to which records are appended; by default `trace_file_path`.
            tokens: whether prompts are recorded in clear; by default as `trace_tokens` says.

        Raises:
            ConfigError: a trace is on already, or the file cannot be written.
        """
        if not isinstance(path, str | Path | None):
            raise ConfigError("path", kind_of(path), "must be a path")
        name = None if path is None else str(path)
        clear = None if tokens is None else flag("tokens", tokens)
        self.on_loop(lambda: self._door.trace_start(name, clear))

    def trace_stop(self) -> str | None:
        """Stop recording; return the path of the complete file, or None if no trace was on.

        This waits until the last records are written: some milliseconds, on the loop.
        """
        return self.on_loop(self._door.trace_stop)

    def explain(self, operation: str, token_ids: Any, namespace: Namespace = None) -> Explanation:
        """Return the plan of a request, if all tiers were up and had room, without running it."""
        return self.on_loop(lambda: self.engine.explain(operation, token_ids, namespace))

    # -- inside, and for tools ------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """Return the engine, for tools; it lives on its own loop.

        Raises:
            ConfigError: the manager is a client, and the engine is in a server's process.
        """
        if isinstance(self._door, Engine):
            return self._door
        why = "cannot do this: call it where the engine runs, in the server's process"
        raise ConfigError("manager", "a client of a server", why)

    def on_loop(self, work: Callable[[], T]) -> T:
        """Return the result of synchronous work on the engine's loop, for tools.

        Raises:
            ClosedError: not started, or shut down.
        """
        return self._bridge.call(work)
