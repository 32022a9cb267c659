"""The devices of one engine, one for each TP rank; requests use them once all are registered.

register ──▶ awake ──suspend──▶ asleep ──resume──▶ awake
               └── a port fails ──▶ down, until the engine is closed
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack
from typing import Any

from flexkv.common.arguments import integer
from flexkv.common.errors import (
    ClosedError,
    ConfigError,
    DeadlineError,
    DeviceError,
    FlexKVError,
    TransferError,
)
from flexkv.common.layout import Order
from flexkv.io.ports import DevicePort
from flexkv.observe.logs import get_logger
from flexkv.tiers.backend import Backend, Device, JoinedDevices

log = get_logger(__name__)


class UseCount:
    """Counts the users of the devices; suspension waits until it is zero. A context manager."""

    def __init__(self) -> None:
        self.count = 0
        self._over = asyncio.Event()

    def enter(self) -> None:
        """Count one more user; `leave` must follow."""
        self.count += 1

    def leave(self) -> None:
        """Count one user less."""
        self.count -= 1
        if not self.count:
            self._over.set()

    __enter__ = enter

    def __exit__(self, *_: object) -> None:
        self.leave()

    async def wait_over(self) -> None:
        """Return once nobody uses the devices."""
        while self.count:
            self._over.clear()
            await self._over.wait()


class Devices:
    """Every registered device, by rank.

    Attributes:
        use: the count of requests that use them.
        num_blocks: the number of blocks that every device has.
        streams: the ports to GPUs, whose copies have to wait for the caller's streams.
    """

    def __init__(self, tp_size: int, deadline_s: float, backend: Backend, undo: ExitStack) -> None:
        """Take what opens devices; `undo` gets what closes them.

        `deadline_s` is how long `suspend` waits for the requests under way.
        """
        self._deadline_s = deadline_s
        self._tp_size, self._backend, self._undo = tp_size, backend, undo
        self._by_rank: dict[int, Device] = {}
        self._asleep: set[int] = set()
        self.streams: list[DevicePort] = []
        self._failure: TransferError | None = None
        self._falling_asleep = False
        self._lock = threading.Lock()
        self.use = UseCount()
        self.num_blocks = 0
        self._is_ready = False

    @property
    def kind(self) -> str:
        """Return the devices' kind: "cpu", "cuda" or "agents"; if they differ, the slowest one."""
        kinds = {device.place[0] for device in self._by_rank.values()}
        return next(kind for kind in ("agents", "cpu", "cuda") if kind in kinds)

    @property
    def missing(self) -> FlexKVError | None:
        """Return why no bytes can be moved to or from the devices; None if they can."""
        if self._is_ready and not self.streams:
            return None
        if self._failure is not None:
            return self._failure
        for port in self.streams:
            if port.failure is not None:
                return port.failure
        if len(self._by_rank) < self._tp_size:
            have = f"{len(self._by_rank)} of {self._tp_size} ranks"
            return ClosedError(f"KV caches are missing: {have} have registered theirs")
        if self._asleep:
            return ClosedError("the device is suspended: call resume_device first")
        return None

    def register(self, kv_caches: Any, layout: str | None, tp_rank: int) -> JoinedDevices | None:
        """Register a rank's KV caches; with the last rank's, return the port over all devices.

        Raises:
            ConfigError: the tensors do not fit the model, or the rank has been registered.
            BackendUnavailableError: there is no adapter for such a device.
            DeviceError: the device refused.
        """
        self._check_rank(tp_rank)
        if tp_rank in self._by_rank:
            why = "has already registered KV caches; after suspend_device, use resume_device"
            raise ConfigError("tp_rank", tp_rank, why)
        with ExitStack() as undo:
            device = self._backend.device(kv_caches, layout, tp_rank)
            undo.callback(device.port.close)
            self._check_order(device)
            by_rank = {**self._by_rank, tp_rank: device}
            joined = None
            if len(by_rank) == self._tp_size:
                joined = self._backend.joined([each for _, each in sorted(by_rank.items())])
                undo.callback(joined.port.close)
                if joined.checks is not None:
                    undo.callback(joined.checks.checksummer.close)
            self._undo.push(undo.pop_all())
        self._by_rank = by_rank
        self._look()
        log.info("device_registered", rank=tp_rank, **device.facts)
        if device.place[0] == "cuda":
            with self._lock:
                self.streams.append(device.port)
        return joined

    def order_after(self, to_device: bool) -> None:
        """Make later copies in one direction wait for what this thread's streams have queued.

        From any thread.

        Raises:
            DeviceError: a driver refused. The device is down from then on: its copies would not
                wait.
        """
        with self._lock:
            try:
                for port in self.streams:
                    port.order_after(to_device)
            except DeviceError as error:
                log.exception("device_down", call=error.call, code=error.code)
                self._failure = error
                raise

    def detach(self) -> None:
        """Stop touching streams, because the ports are about to be closed."""
        with self._lock:
            self.streams.clear()

    async def suspend(self) -> None:
        """Accept no more requests, wait for those under way, and release all KV caches.

        Raises:
            ClosedError: not all devices are registered, or they are suspended already.
            DeadlineError: requests did not end in time; the devices stay in use.
            DeviceError: a driver refused to free something; all KV caches are released anyway.
        """
        if missing := self.missing:
            raise missing
        self._asleep, self._falling_asleep = set(self._by_rank), True
        self._look()
        try:
            async with asyncio.timeout(self._deadline_s):
                await self.use.wait_over()
        except BaseException as error:
            self._asleep = set()
            self._look()
            if isinstance(error, TimeoutError):
                why = f"{self.use.count} requests did not end in time"
                raise DeadlineError(-1, "suspend_device", 0, why) from error
            raise
        finally:
            self._falling_asleep = False
        with ExitStack() as every:
            for device in self._by_rank.values():
                every.callback(device.port.suspend)
        log.info("device_suspended")

    def resume(self, kv_caches: Any, layout: str | None, tp_rank: int) -> None:
        """Register a suspended rank's KV caches again.

        Raises:
            ConfigError: the tensors do not fit the model, or the rank is not suspended.
            DeviceError: the device refused.
        """
        self._check_rank(tp_rank)
        if tp_rank not in self._asleep or self._falling_asleep:
            raise ConfigError("tp_rank", tp_rank, "is not suspended")
        device = self._by_rank[tp_rank]
        device = self._backend.resumed(device, kv_caches, layout, tp_rank)
        self._by_rank[tp_rank] = device
        log.info("device_resumed", rank=tp_rank, **device.facts)
        self._asleep.discard(tp_rank)
        self._look()

    def _look(self) -> None:
        """Update what depends on which devices are registered and which are suspended."""
        self._is_ready = len(self._by_rank) == self._tp_size and not self._asleep
        self.num_blocks = min(device.num_blocks for device in self._by_rank.values())

    @property
    def order(self) -> Order:
        """Return the order of a block's elements in host memory, which all ranks share."""
        return next(iter(self._by_rank.values())).order

    def _check_order(self, device: Device) -> None:
        """Check that a rank's blocks have the same order of elements as those of other ranks."""
        if self._by_rank and device.order != self.order:
            why = f"must have the same element order as the other ranks: {self.order}"
            raise ConfigError("kv_caches", f"element order {device.order}", why)

    def _check_rank(self, tp_rank: int) -> None:
        if not 0 <= integer("tp_rank", tp_rank) < self._tp_size:
            why = f"must be from 0 to tp_size - 1, {self._tp_size - 1}"
            raise ConfigError("tp_rank", tp_rank, why)
