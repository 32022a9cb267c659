"""The agent of a device: it copies between its KV caches and the server's host memory.

It lives in the process that owns the KV caches, on a loop in a thread of its own. It connects when
there is a server, and again when a connection has ended. It always finishes its copies before it
closes a connection, so that no copy outlives the connection that asked for it.

    connecting ──welcome──▶ serving ──end──▶ draining ──▶ connecting
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from flexkv.actors.supervisor import Supervisor
from flexkv.common.arguments import index, integer, seconds
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.errors import (
    BackendUnavailableError,
    ClosedError,
    ConfigError,
    DeviceError,
    FlexKVError,
)
from flexkv.common.layout import order_of
from flexkv.common.terms import Layers, Route, Tier, Transfer
from flexkv.front.layerwise import TIMEOUT_S
from flexkv.front.loop_thread import LoopThread
from flexkv.index.keys import block_identity
from flexkv.io.device.tensors import KVCaches, kv_cache_list, layouts_of
from flexkv.io.ports import DevicePort
from flexkv.links.link import Link
from flexkv.observe.logs import get_logger
from flexkv.process.cpus import widen_affinity
from flexkv.server.fleet import ids_from
from flexkv.server.handshake import Connected, attached_arena, connect
from flexkv.server.layered_gets import LayeredGets
from flexkv.server.wire import (
    FRAMING,
    FROM_SERVER,
    PROTOCOL_VERSION,
    Copied,
    Copy,
    DeviceReady,
    FromServer,
    GetEnded,
    GetPlanned,
    Hello,
    ProtocolError,
    Ready,
    Settle,
    Settled,
    parts_of,
)
from flexkv.tiers.backend import LocalBackend

log = get_logger(__name__)

RETRY_S, RETRY_REFUSED_S = 0.1, 2.0
"""Pause between two attempts to connect: while nobody listens, and after a refusal."""
AGAIN_S = 0.01
"""Pause before connecting again after a connection: a server may end each one at once."""
GREET_S = 0.25
"""How long a server may take to answer. This blocks the loop, which has nothing else to do."""
SETTLE_S = 1.0
"""How long the server may take to answer `Settle`; then the agent disconnects."""
TELL_EVERY = 100
"""Failed attempts between two log lines."""


class Agent:
    """The agent that lends one rank's KV caches to a server.

    Attributes:
        fault: why the last attempt to connect failed, other than by an absent server.
    """

    def __init__(
        self,
        address: str,
        model: ModelConfig,
        cache: CacheConfig,
        instance: int = 0,
        tp_rank: int = 0,
    ) -> None:
        """Create an agent, which connects after `start`.

        Args:
            address: the server's address, as in `server_recv_port`.
            model: the server's model.
            cache: its block size, `key_secret` and settings of device copies are used.
            instance: the number of this engine among those that share the server.
            tp_rank: the rank of the KV caches.
        """
        self._address, self._model, self._cache = address, model, cache
        self._instance, self._tp_rank = instance, tp_rank
        self._groups = len(model.spaces(cache.tokens_per_block))
        self._thread = LoopThread()
        self._supervisor: Supervisor | None = None
        self._link: Link[FromServer] | None = None
        self._port: DevicePort | None = None
        self._under_way: dict[int, Transfer] = {}
        self._gets = LayeredGets(model.num_layers, tp_rank)
        self._drained = asyncio.Event()
        self._settling: dict[int, asyncio.Event] = {}
        self._next_settle = 0
        self._leaving = False
        self.fault: FlexKVError | None = None

    # -- the caller's side, from any thread -----------------------------------------------------

    def start(self, kv_caches: KVCaches, layout: str | None = None) -> None:
        """Lend KV caches from now on. Return at once, and connect when there is a server.

        Args:
            kv_caches: per-layer tensors, as for `KVManager.register_kv_caches`.
            layout: required if the shape is ambiguous.

        Raises:
            ConfigError: the tensors do not fit the model, or the layout must be given.
        """
        tensors = kv_cache_list(kv_caches)
        sizes = self._cache.sized(self._model)
        backend = LocalBackend(self._cache, sizes)
        layouts = layouts_of(sizes.spaces, tensors, layout, self._tp_rank)
        secret = self._cache.key_secret.get_secret_value()
        hello = Hello(
            PROTOCOL_VERSION,
            "agent",
            os.getpid(),
            block_identity(sizes.spaces, secret),
            self._instance,
            self._tp_rank,
            layouts[0].num_blocks,
            order_of(layouts),
        )
        self._thread.start()

        async def begin() -> None:
            widen_affinity()
            supervisor = self._supervisor = Supervisor(self._failed)
            await supervisor.start()

            def serve(connected: Connected, unstarted: ExitStack) -> asyncio.Task[None]:
                work = self._serve(backend, tensors, layout, connected, unstarted)
                return supervisor.spawn_session("connection", work)

            supervisor.keep("agent", self._run(hello, serve))

        self._thread.call(begin)

    def ready(self, numbers: Sequence[int], to_device: bool = False) -> None:
        """Report that requests may go on after what the calling thread's stream has queued by now.

        Args:
            numbers: the numbers of the requests.
            to_device: whether they are gets, whose blocks that work may still use; otherwise they
                are puts, whose blocks it writes.

        Raises:
            ClosedError: the agent is closed.
        """
        self._report(numbers, to_device, None)

    def layer_written(self, numbers: Sequence[int], layer: int) -> None:
        """Report that puts may copy the layers up to this one.

        The copies run after what the calling thread's stream has queued by now. A put copies a
        layer once the agents of all ranks have reported it or a later one. A put that was not
        started by layer begins when the last layer is reported. Cancel a put if not all of its
        layers will be written.

        Args:
            numbers: the numbers of the puts; a report may come before its put.
            layer: from 0.

        Raises:
            ConfigError: no such layer, or the model has several KV groups.
            ClosedError: the agent is closed.
        """
        self._report(numbers, False, self._layer(layer) + 1)

    def wait_for_layer(
        self,
        numbers: Sequence[int],
        layer: int,
        timeout: float = TIMEOUT_S,
        stream: int | None = None,
    ) -> bool:
        """Wait in this thread until a layer of gets is in the KV caches, or make a stream wait.

        Args:
            numbers: the numbers of gets that were started by layer. Those that the agent does not
                know yet are waited for, too.
            layer: from 0.
            timeout: in seconds, for all of them.
            stream: handle of a CUDA stream of the device. Work that is queued on it later waits
                for the layer; this thread waits only until the layer's copies are queued.

        Returns:
            True if the layer of every get is in the blocks that were planned for it, or will be
            when the stream goes on; `wait_for_end` says how many blocks these are. False if a get
            has ended without the layer, or the server is gone; the others were waited for.

        Raises:
            ConfigError: no such layer, or the model has several KV groups.
            TimeoutError: a layer was not there, or queued, in time. Its get goes on.
            DeviceError: the driver refused.
        """
        number = None if stream is None else integer("stream", stream)
        wanted, wait_s = self._layer(layer), seconds("timeout", timeout)
        return self._gets.wait(numbers, wanted, wait_s, number)

    def wait_for_end(self, number: int, timeout: float = TIMEOUT_S) -> int:
        """Return how many first blocks a get by layer has moved on every rank, once it is over.

        Raises:
            TimeoutError: it was not over in time, or the agent does not know the get.
        """
        return self._gets.wait_end(number, seconds("timeout", timeout))

    def _layer(self, layer: int) -> int:
        """Return the number of a layer, as an integer.

        Raises:
            ConfigError: no such layer, or the model has several KV groups.
        """
        if self._groups > 1:
            why = f"a model with several KV groups ({self._groups}) is not copied layer by layer"
            raise ConfigError("layer", layer, why)
        return index("layer", layer, self._model.num_layers)

    def _report(self, numbers: Sequence[int], to_device: bool, layers: int | None) -> None:
        if not numbers:
            return
        with suppress(DeviceError):  # its puts end with this connection
            self.order_after(to_device)
            self.report_ready(numbers, layers)

    def order_after(self, to_device: bool) -> None:
        """Make later copies in one direction wait for what the calling thread's stream has queued.

        Raises:
            DeviceError: a driver refused. The connection ends, and with it what waits for a report.
        """
        port = self._port
        if port is not None:
            try:
                port.order_after(to_device)
            except DeviceError as error:
                log.exception("device_down", call=error.call, code=error.code)
                self._thread.post(self._end_link)
                raise

    def report_ready(self, numbers: Sequence[int], layers: int | None = None) -> None:
        """Report that requests may go on, behind the work for which `order_after` was called.

        With `layers`, puts may copy that many of the first layers.

        Raises:
            ClosedError: the agent is closed.
        """
        messages = [Ready(part, layers) for part in parts_of(numbers)]

        def send() -> None:
            for message in messages:
                self._send(message)

        self._thread.post(send)

    def settle(self, numbers: Sequence[int]) -> None:
        """Return once no copy of these requests touches the KV caches any more.

        Raises:
            ClosedError: the agent is closed.
        """
        for part in parts_of(numbers):
            self._thread.call(partial(self._settle, part))

    async def settle_soon(self, numbers: Sequence[int]) -> None:
        """Do what `settle` does, for a caller that is a coroutine."""
        for part in parts_of(numbers):
            await self._thread.call_async(partial(self._settle, part))

    def close(self) -> None:
        """Finish the copies under way, and stop lending the KV caches. Idempotent."""
        if self._supervisor is None:
            return
        supervisor, self._supervisor = self._supervisor, None
        try:
            self._thread.call(supervisor.stop)
        finally:
            self._thread.stop()

    # -- on the loop ----------------------------------------------------------------------------

    def _failed(self, cause: BaseException) -> None:
        log.error("agent_failed", cause=repr(cause))

    async def _run(
        self, hello: Hello, serve: Callable[[Connected, ExitStack], asyncio.Task[None]]
    ) -> None:
        """Connect again and again; `serve` starts the task that serves each connection."""
        attempts = 0
        while True:
            wait_s, reason = RETRY_S, ""
            try:
                connected = connect(self._address, hello, GREET_S)
            except ConfigError as error:
                self.fault = error
                wait_s, reason = RETRY_REFUSED_S, str(error)
            except (OSError, ClosedError) as error:
                reason = f"{getattr(error, 'strerror', None) or error}; trying again"
            else:
                attempts = 0
                with ExitStack() as unstarted:  # the task may be cancelled before its first step
                    unstarted.callback(connected.socket.close)
                    if connected.arena_fd is not None:
                        unstarted.callback(os.close, connected.arena_fd)
                    await serve(connected, unstarted)
                await asyncio.sleep(AGAIN_S)
                continue
            if attempts % TELL_EVERY == (0 if wait_s > RETRY_S else TELL_EVERY // 2):
                log.warning("no_server", path=self._address, reason=reason)
            attempts += 1
            await asyncio.sleep(wait_s)

    async def _serve(
        self,
        backend: LocalBackend,
        tensors: list[Any],
        layout: str | None,
        connected: Connected,
        unstarted: ExitStack,
    ) -> None:
        """Serve one connection to its end, and close what `unstarted` would have closed."""
        unstarted.pop_all()
        connected.socket.setblocking(False)
        with ExitStack() as undo:
            undo.callback(connected.socket.close)  # does nothing if a link has closed it
            try:
                arena = attached_arena(connected)
                undo.callback(arena.close)
                backend.attach(arena)
                device = backend.device(tensors, layout, self._tp_rank)
            except (OSError, FlexKVError) as error:
                self.fault = (
                    error if isinstance(error, FlexKVError)
                    else BackendUnavailableError("the server's host memory", str(error))
                )  # fmt: skip
                log.warning("device_setup_failed", path=self._address, reason=str(error))
                await asyncio.sleep(RETRY_REFUSED_S)
                return
            port, self.fault = device.port, None
            self._port = port
            undo.callback(port.close)
            undo.callback(self._forget)
            port.connect(self._reap)
            link = self._link = await Link.over(connected.socket, FRAMING, FROM_SERVER)
            undo.callback(link.close)
            self._gets.connected()
            link.send(DeviceReady())
            server = connected.welcome.pid
            log.info("device_lent", path=self._address, server=server, **device.facts)
            try:
                while (message := await link.receive()) is not None:
                    self._take(message)
            except (FlexKVError, ValueError, OverflowError) as error:
                log.warning("server_message_invalid", reason=str(error))
            finally:
                # Then the connection may end: to the server its end means that no copy is left.
                await self._wait_drained()
                link.close()
            await link.wait_closed()
        log.info("device_taken_back", path=self._address)

    def _end_link(self) -> None:
        self._leaving = True
        if self._link is not None:
            self._link.end()

    async def _wait_drained(self) -> None:
        while self._under_way:
            self._drained.clear()
            await self._drained.wait()

    def _forget(self) -> None:
        self._link = self._port = None
        self._leaving = False
        self._gets.disconnected()
        for settled in self._settling.values():
            settled.set()

    def _take(self, message: FromServer) -> None:
        match message:
            case Copy():
                if not self._leaving:
                    self._copy(message)
            case GetPlanned():
                self._gets.plan(message)
            case GetEnded():
                self._gets.end(message)
            case Settled():
                if (settled := self._settling.get(message.number)) is not None:
                    settled.set()
            case _:
                raise ProtocolError(f"a server may not send {type(message).__name__} to an agent")

    def _copy(self, message: Copy) -> None:
        assert self._port is not None
        if message.op_id in self._under_way:
            raise ProtocolError(f"copy {message.op_id} is already under way")
        host_ids, device_ids = ids_from(message.host_ids), ids_from(message.device_ids)
        route = _TO_DEVICE if message.to_device else _TO_HOST
        sides = (host_ids, device_ids) if message.to_device else (device_ids, host_ids)
        layers = None if message.layers is None else self._layers_of(*message.layers)
        watch = None if layers is None else self._gets.watch_of(layers)
        group = message.group
        transfer = Transfer(message.op_id, 0, route, *sides, watch, layers, group=group)
        self._under_way[message.op_id] = transfer
        try:
            self._port.submit(transfer)
        except FlexKVError as error:
            self._end(message.op_id, str(error))
        except BaseException:
            del self._under_way[message.op_id]  # its end will not be reported
            raise
        else:
            self._reap()

    def _layers_of(self, whole: int, first: int, last: int) -> Layers:
        """Return the layers of a piece.

        Raises:
            ProtocolError: the model has no such layers, or several KV groups.
        """
        if self._groups > 1:
            raise ProtocolError("a copy by layer, for a model with several KV groups")
        if not first < last <= self._model.num_layers:
            raise ProtocolError(f"layers {first} to {last}: the model has {self._model.num_layers}")
        return Layers(first, last, whole)

    def _reap(self) -> None:
        if self._port is not None:
            for op_id, error, *_ in self._port.reap():
                self._end(op_id, "" if error is None else str(error))

    def _end(self, op_id: int, error: str) -> None:
        transfer = self._under_way.pop(op_id)
        if not self._under_way:
            self._drained.set()
        layers = transfer.layers
        if layers is not None and transfer.watch is not None and not error:
            transfer.watch.moved(layers.whole, layers.first, layers.last)
        self._send(Copied(op_id, error))

    def _send(self, message: Copied | Ready | Settle) -> None:
        if self._link is not None:
            self._link.send(message)

    async def _settle(self, numbers: tuple[int, ...]) -> None:
        if self._link is None:
            return
        self._next_settle += 1
        number, link = self._next_settle, self._link
        settled = self._settling[number] = asyncio.Event()
        self._send(Settle(number, numbers))
        try:
            async with asyncio.timeout(SETTLE_S):
                await settled.wait()
        except TimeoutError:
            if settled.is_set():  # just now; `self._link` may be the next connection by now
                return
            log.warning("server_timed_out", path=self._address, reason=f"no answer in {SETTLE_S} s")
            self._leaving = True  # from now on its copies are neither made nor answered
            await self._wait_drained()
            link.abort()
            await settled.wait()
        finally:
            del self._settling[number]


_TO_DEVICE = Route(Tier.HOST, Tier.DEVICE)
_TO_HOST = Route(Tier.DEVICE, Tier.HOST)
