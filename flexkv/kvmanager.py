"""KVManager: the façade that engines and programs use.

Two forms over the same core. The async form runs on the caller's loop (`async with`), or is
awaited from any loop after `start()`. The task-id form, for synchronous engines, needs `start()`,
which runs the engine's loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from flexkv.common.arguments import flag, integer, text
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.config_keys import kind_of
from flexkv.common.errors import ClosedError, ConfigError
from flexkv.common.request import KVResponse, Operation
from flexkv.common.terms import Tier
from flexkv.engine.durability import FlushReport
from flexkv.engine.engine import Engine
from flexkv.engine.statistics import Statistics
from flexkv.engine.tickets import RequestSpec
from flexkv.front.loop_thread import LoopThread
from flexkv.front.task_form import TaskForm
from flexkv.graph.explain import Explanation, explain
from flexkv.index.keys import Namespace
from flexkv.index.residency import PrefixMatch
from flexkv.observe.logs import obey_environment
from flexkv.process import forks
from flexkv.tiers.backend import Backend, Progress

T = TypeVar("T")


class KVManager(TaskForm):
    """Stores KV blocks in host memory and on SSD, and loads them back by token prefix."""

    def __init__(
        self,
        model: ModelConfig,
        cache: CacheConfig,
        *,
        progress: Progress | None = None,
        backend: Backend | None = None,
    ) -> None:
        """Check the configuration; nothing is allocated before `start` or `async with`.

        Args:
            model: the shape of the KV cache.
            cache: the tiers and their sizes.
            progress: called with (done, total) bytes while host memory is touched, in a thread.
            backend: what to use in place of this machine's memory, files and devices.

        Raises:
            ConfigError: a part is enabled that is not built, or a size does not fit.
        """
        obey_environment()
        for field, value, kind in (("model", model, ModelConfig), ("cache", cache, CacheConfig)):
            if not isinstance(value, kind):
                raise ConfigError(field, kind_of(value), f"must be a {kind.__name__}")
        if progress is not None and not callable(progress):
            raise ConfigError("progress", kind_of(progress), "must be callable")
        super().__init__(Engine(model, cache, backend))
        self._progress = progress

    # -- life -----------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self.check_process()
        if self._thread is not None:
            why = "use either start() or `async with`, not both"
            raise ConfigError("manager", "started already", why)
        await self._engine.open(self._progress)
        self._loop = asyncio.get_running_loop()
        self._note_started()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.is_unclosed:
            return  # closed already, or a forked child, which has nothing to release
        if asyncio.get_running_loop() is self._loop:
            await self._close()
            return
        assert self._loop is not None
        if self._loop.is_running():
            closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
            await asyncio.wrap_future(closing)
            return
        self.end()
        if error is None:
            raise ClosedError(
                "the manager was closed on another event loop than its own, which no longer runs:"
                " everything is released, but blocks that were not flushed are not on SSD"
            )

    def start(self) -> None:
        """Run the engine's loop in a thread of its own, for callers that are not async.

        While the manager is open, this does nothing.

        Raises:
            ConfigError: memory, a directory or disk space is missing.
            ClosedError: it was shut down, or this is a forked child of the process that started it.
        """
        self.check_process()
        if self._thread is not None or self._engine.is_open:
            return
        thread = LoopThread()
        thread.start()
        try:
            thread.call(lambda: self._engine.open(self._progress))
        except BaseException:
            thread.stop()
            self._engine.abandon()
            raise
        self._thread = thread
        self._note_started()

    def shutdown(self) -> None:
        """Close the manager: cancel what runs, and release everything. Idempotent.

        Works from any thread, in a signal handler, and at exit. A manager that runs on the caller's
        own loop is released at once, without the flush that leaving its `async with` does.

        Raises:
            ClosedError: this is a forked child of the process that has started it.
        """
        if forks.is_exiting() and not self.is_unclosed:
            return  # such as in a forked child, by a callback that its parent has registered
        self.check_process()
        if self._home is not None:
            self.end()

    def is_ready(self) -> bool:
        """Return whether get and put would move bytes: it is open, and its devices can be used.

        Raises:
            ClosedError: this is a forked child of the process that has started it.
        """
        self.check_process()
        return self._engine.is_open and self._engine.has_device

    def register_kv_caches(
        self,
        kv_caches: Mapping[str, Any] | Sequence[Any],
        layout: str | None = None,
        tp_rank: int = 0,
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
        self._call(lambda: self._engine.register_kv_caches(kv_caches, layout, tp_rank))

    async def suspend_device(self) -> None:
        """Release all KV tensors, so that the inference engine can free their memory.

        Requests under way are finished first; later ones are answered UNREADY, but `match` and
        `prefetch` go on. The host memory stays registered with the device.

        Raises:
            ClosedError: no device is registered, or it is suspended already.
            DeadlineError: requests did not end within `io_deadline_s`; the devices stay in use.
        """
        await self._async(lambda: self._engine.devices.suspend())

    def suspend_device_blocking(self) -> None:
        """Do what `suspend_device` does, waiting in this thread.

        Raises:
            ClosedError: not started with `start()`, no device is registered, or it is suspended.
            DeadlineError: requests did not end within `io_deadline_s`; the devices stay in use.
        """
        self.check_process()
        if self._thread is None:
            raise ClosedError(
                "suspend_device_blocking() is for a manager started with start(); with `async"
                " with`, use `await suspend_device()`"
            )
        self._thread.call(lambda: self._engine.devices.suspend())

    def resume_device(
        self,
        kv_caches: Mapping[str, Any] | Sequence[Any],
        layout: str | None = None,
        tp_rank: int = 0,
    ) -> None:
        """Register a suspended rank's KV tensors again: see `register_kv_caches` for arguments.

        Raises:
            ConfigError: the tensors do not fit the model, or the rank is not suspended.
            DeviceError: the device refused.
        """
        self._call(lambda: self._engine.devices.resume(kv_caches, layout, tp_rank))

    # -- async form -----------------------------------------------------------------------------

    def match(self, token_ids: Any, namespace: Namespace = None) -> PrefixMatch:
        """Return how much of a prompt is resident. No I/O; it changes only the blocks' recency.

        Args:
            token_ids: integer[tokens], numpy, torch or list.
            namespace: a string or list of strings; prompts of different ones share nothing.

        Raises:
            ConfigError: a token is negative, or not an integer.
        """
        return self._call(lambda: self._engine.match(token_ids, namespace))

    async def get(
        self,
        token_ids: Any,
        slot_mapping: Any,
        token_mask: Any = None,
        namespace: Namespace = None,
    ) -> KVResponse:
        """Load the longest resident prefix into the device; return once the slots hold it.

        Args:
            token_ids: integer[tokens].
            slot_mapping: integer[selected tokens]: block_id * tokens_per_block + offset,
                contiguous within a block.
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
        return await self._perform(Operation.GET, token_ids, slot_mapping, token_mask, namespace)

    async def put(
        self,
        token_ids: Any,
        slot_mapping: Any,
        token_mask: Any = None,
        namespace: Namespace = None,
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
        return await self._perform(Operation.PUT, token_ids, slot_mapping, token_mask, namespace)

    async def prefetch(self, token_ids: Any, namespace: Namespace = None) -> KVResponse:
        """Bring the resident prefix from lower tiers to host memory; return once it is there.

        Raises:
            ConfigError: an argument breaks a rule.
            ClosedError: not started, or shut down.

        Cancellation: what is under way is finished in the background and kept.
        """
        return await self._perform(Operation.PREFETCH, token_ids, None, None, namespace)

    async def flush(self) -> FlushReport:
        """Return once everything resident that was put before is on stable storage.

        Returns:
            What is not, because the SSD has no place for it or refuses it as worth less than what
            it has.

        Raises:
            TransferError: a block could not be written, or the disk refused (StorageError); what
                could be written is safe.
        """
        return await self._async(self._engine.flush)

    def reset(self) -> int:
        """Forget every block of every tier, and return their number: see `clear`."""
        return self.clear()

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
        retention = self._engine.retention
        if self._thread is not None:
            return self._thread.call(lambda: retention.clear_durably(tier, namespace))
        return self._call(lambda: retention.clear(tier, namespace))

    def resize(self, tier: Tier, capacity_blocks: int) -> int:
        """Change how many blocks a tier may hold, and return how many it may hold now.

        That is more than asked for if too many blocks are pinned or under way. The memory or files
        stay allocated.

        Raises:
            ConfigError: there is no such tier, or it was opened with fewer.
        """
        return self._call(lambda: self._engine.retention.resize(tier, capacity_blocks))

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
        self._call(lambda: self._engine.retention.set_quota(namespace, tier, blocks))

    def namespace_blocks(self, namespace: Namespace) -> dict[Tier, int]:
        """Return the number of a namespace's blocks by tier, including those being filled."""
        return self._call(lambda: self._engine.retention.namespace_blocks(namespace))

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
        return self._call(lambda: self._engine.retention.pin(token_ids, namespace, ttl_s, owner))

    def unpin(self, pin_id: int) -> bool:
        """End a pin; return whether it still existed."""
        number = integer("pin_id", pin_id)
        return self._call(lambda: self._engine.retention.pins.unpin(number))

    def unpin_owner(self, owner: str) -> int:
        """End every pin of an owner that is gone, and return how many there were."""
        name = text("owner", owner)
        return self._call(lambda: self._engine.retention.pins.unpin_owner(name))

    def statistics(self) -> Statistics:
        """Return a frozen snapshot: tiers, routes and their failures, queues, requests, hits."""
        return self._call(self._engine.statistics)

    @contextmanager
    def trace(
        self, path: str | Path | None = None, *, tokens: bool | None = None
    ) -> Iterator[None]:
        """Record every request and transfer to a file, for as long as the block runs.

        Args:
            path: the file, to which records are appended; by default `trace_file_path`.
            tokens: whether prompts are recorded in clear; by default as `trace_tokens` says.

        Raises:
            ConfigError: a trace is on already, or the file cannot be written.
        """
        self.trace_start(path, tokens=tokens)
        try:
            yield
        finally:
            self.trace_stop()

    def trace_start(self, path: str | Path | None = None, *, tokens: bool | None = None) -> None:
        """Record every request and transfer to a file from now on. See `trace`."""
        if path is not None and not isinstance(path, str | Path):
            raise ConfigError("path", kind_of(path), "must be a path")
        name = None if path is None else str(path)
        clear = None if tokens is None else flag("tokens", tokens)
        self._call(lambda: self._engine.tracing.start(name, clear))

    def trace_stop(self) -> str | None:
        """Stop recording; return the path of the complete file, or None if no trace was on.

        This waits until the last records are written: some milliseconds, on the loop.
        """
        return self._call(lambda: self._engine.tracing.stop())

    def explain(self, operation: str, token_ids: Any, namespace: Namespace = None) -> Explanation:
        """Return the plan of a request, if all tiers were up and had room, without running it."""
        names = [kind.label for kind in Operation]
        if operation not in names:
            raise ConfigError("operation", operation, f"must be one of {', '.join(names)}")
        return self._call(
            lambda: explain(
                self._engine.intake(Operation[operation.upper()], token_ids, None, namespace),
                self._engine.planner,
            )
        )

    def _perform(self, *arguments: Any) -> Coroutine[Any, Any, KVResponse]:
        """Return what runs a request on the engine's loop, from there or from another."""
        spec = RequestSpec(*arguments)
        if self._thread is None:
            self._check_loop()
            self._order_after(spec.operation)
            return self._engine.submit(spec).run()
        self.check_process()
        self._order_after(spec.operation)
        return self._thread.call_async(lambda: self._engine.submit(spec).run())
