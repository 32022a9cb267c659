"""The door of a manager whose engine is in a server's process.

    EngineClient ─┬─ Client ──match, start──▶ server     on the manager's loop
                  ├─ Agent ◀──copies───────── server     for each rank registered here
                  └─ an operator's commands ─▶ server    statistics, flush, clear, trace

Answers wake the loop by the connection's descriptor. A server that is lost costs hits: matches find
nothing, requests under way FAIL, later ones are UNREADY until there is a server again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from flexkv.actors.supervisor import Supervisor
from flexkv.common.arguments import index, member
from flexkv.common.config import ModelConfig, Settings
from flexkv.common.errors import (
    BackendUnavailableError,
    ClosedError,
    ConfigError,
    FlexKVError,
    error_from,
)
from flexkv.common.request import KVResponseStatus, Operation, Request
from flexkv.common.terms import Tier
from flexkv.engine.durability import FlushReport
from flexkv.engine.statistics import Statistics
from flexkv.engine.tickets import RequestSpec, nothing_moved
from flexkv.index.found import PrefixMatch
from flexkv.index.intake import Intake
from flexkv.index.keys import Namespace, scope_of
from flexkv.io.device.tensors import KVCaches
from flexkv.observe.logs import get_logger
from flexkv.process.stoppable import run_stoppable
from flexkv.server.agent import Agent
from flexkv.server.client import Client
from flexkv.server.frames import FrameSocket
from flexkv.server.operator import ask, ask_for_long
from flexkv.server.remote_ticket import RemoteTicket
from flexkv.server.wire import Answer, Done, Start
from flexkv.tiers.backend import Progress

log = get_logger(__name__)

LOOK_S = 0.05
"""Time between two looks at the connection: for a lost server, and for one that has come back."""
READY_S = 5.0
"""How long registering the last rank waits for the server to know all ranks."""
CLOSE_S = 10.0
"""How long closing waits for the ends of requests under way."""


class EngineClient:
    """A client of the engine in a server's process, for a manager to use like an engine.

    Attributes:
        model: the model, which must be the server's.
        supervisor: owns the tasks.
    """

    def __init__(self, model: ModelConfig, settings: Settings) -> None:
        """Check the configuration; nothing is connected before `open`.

        Args:
            model: the server's model.
            settings: the server's address, and the number of this instance. Block size and
                `key_secret` must be the server's.

        Raises:
            ConfigError: a part is enabled that is not built.
        """
        model.require_built()
        settings.require_built()
        self.model, self._settings = model, settings
        self._client = Client(settings, model, settings.instance_id)
        spaces = model.spaces(settings.cache_config.tokens_per_block)
        self._intake = Intake(self._client.key_chain, spaces=spaces)
        self._agents: dict[int, Agent] = {}
        self._under_way: dict[int, RemoteTicket] = {}
        self._is_open = self._is_used = self._is_closed = False
        self._probe: int | None = None
        """The match whose answer shows that the server runs, while cancelled requests wait."""
        self._watched: FrameSocket | None = None
        self._watched_fd = -1

    # -- life -----------------------------------------------------------------------------------

    async def open(self, progress: Progress | None = None) -> None:
        """Connect to the server; if it is not there yet, later calls do.

        Raises:
            ConfigError: the server refuses us, and says why.
            ClosedError: it was opened before.
        """
        if self._is_used:
            raise ClosedError("a client can be opened only once: create a new one")
        try:
            self._client.connect()
        except (OSError, ClosedError) as error:
            log.warning("no_server", path=self._settings.server_recv_port, reason=str(error))
        self.supervisor = Supervisor(self._failed)
        await self.supervisor.start()
        self._is_open = self._is_used = True
        self._loop = asyncio.get_running_loop()
        self.supervisor.keep("server", self._look())

    async def close(self) -> None:
        """Cancel the requests under way, wait for their ends, and disconnect. Idempotent."""
        if self.is_closed:
            return
        self._is_open = False
        try:
            self.cancel(list(self._under_way))
            until_s = time.monotonic() + CLOSE_S
            while self._under_way and time.monotonic() < until_s:
                self.receive()
                await asyncio.sleep(LOOK_S / 10)
            self._disconnect()
            await self.supervisor.stop()
        finally:
            self.abandon()

    def abandon(self) -> bool:
        """Disconnect at once; return whether there was anything to release."""
        if self.is_closed:
            return False
        self._is_open, self._is_closed = False, True
        with ExitStack() as undo:
            undo.callback(self.supervisor.abandon)
            for agent in self._agents.values():
                undo.callback(agent.close)
            self._disconnect()
        return True

    def _disconnect(self) -> None:
        """Close the connection, which ends the requests under way."""
        self._watch(None)
        self._client.close()
        self._take(self._client.poll())

    def _failed(self, cause: BaseException) -> None:
        log.error("client_failed", cause=repr(cause))
        self._is_open = False

    @property
    def is_open(self) -> bool:
        """Return whether requests are accepted."""
        return self._is_open

    @property
    def is_closed(self) -> bool:
        """Return whether everything was released, or nothing was ever acquired."""
        return self._is_closed or not self._is_used

    @property
    def streams(self) -> list[Agent]:
        """Return the agents, which know whether their devices have streams."""
        return list(self._agents.values())

    @property
    def has_device(self) -> bool:
        """Return whether the devices of all ranks are connected to the server."""
        return self._client.is_ready

    def _check_open(self) -> None:
        if not self._is_open:
            raise ClosedError("the manager is not open: not started yet, or shut down")

    # -- devices --------------------------------------------------------------------------------

    def register_kv_caches(
        self, kv_caches: KVCaches, layout: str | None = None, tp_rank: int = 0
    ) -> None:
        """Lend a rank's per-layer KV tensors to the server, by an agent in this process.

        Ranks in other processes have an `Agent` there. Registering the last rank of a model whose
        ranks are all here waits until the server knows them all, if it is there.

        Raises:
            ConfigError: the tensors do not fit the model, their layout is ambiguous, or the server
                refuses this rank.
            DeviceError, BackendUnavailableError: the device or the server's memory cannot be used.
            ClosedError: not open.
        """
        self._check_open()
        index("tp_rank", tp_rank, self.model.tp_size)
        if tp_rank in self._agents:
            raise ConfigError("tp_rank", tp_rank, "is registered already")
        settings = self._settings
        address, cache = settings.server_recv_port, settings.cache_config
        agent = Agent(address, self.model, cache, settings.instance_id, tp_rank)
        agent.start(kv_caches, layout)
        self._agents[tp_rank] = agent
        until_s = time.monotonic() + READY_S
        while self.orders_all and not self.has_device and time.monotonic() < until_s:
            self.receive()
            if self._client.connection is None:
                return
            time.sleep(LOOK_S / 10)
        if agent.fault is not None and not self.has_device:
            del self._agents[tp_rank]
            agent.close()
            raise agent.fault

    @property
    def orders_all(self) -> bool:
        """Return whether the devices of all ranks are in this process."""
        return len(self._agents) == self.model.tp_size

    def order_after(self, operation: Operation) -> None:
        """Make copies of later requests wait for what the calling thread's streams have queued.

        Raises:
            DeviceError: a driver refused.
        """
        if operation is not Operation.PREFETCH:
            for agent in self.streams:
                agent.order_after(operation is Operation.GET)

    def report_ready(self, number: int) -> None:
        """Tell the server that a request may go on: its copies are ordered behind the streams."""
        for agent in self._agents.values():
            agent.report_ready((number,))

    async def settle(self, number: int) -> None:
        """Return once no device of this process touches the blocks of a request."""
        for agent in self._agents.values():
            with suppress(ClosedError):  # a closed agent has finished its copies
                await agent.settle_soon((number,))

    def nudge_device(self) -> None:
        """Do nothing: no transfer runs in this process."""

    # -- requests -------------------------------------------------------------------------------

    def submit(self, spec: RequestSpec) -> RemoteTicket:
        """Check a caller's arguments, and return the ticket of the request.

        Raises:
            ConfigError: an argument breaks a rule.
            ClosedError: not open.
        """
        ticket = RemoteTicket(self, self._request(spec), self._client.order)
        return (
            ticket if spec.operation is Operation.PREFETCH else ticket.with_slots(spec.slot_mapping)
        )

    def prepare(self, spec: RequestSpec) -> RemoteTicket:
        """Return the ticket of what a get would load, or a put would have to store.

        Raises:
            ConfigError: an argument breaks a rule.
            ClosedError: not open.
        """
        request, is_get = self._request(spec), spec.operation is Operation.GET
        order = self._client.order  # of the keys: `find` may connect, and hear of another
        first, last = request.span.first_block, request.span.last_block
        matched = self._client.find(request.keys, first, hold=is_get)
        self.receive()
        if is_get:
            request = request.narrowed(first, max(first, matched.blocks))
            request = structs.replace(request, request_id=matched.number)
        else:
            request = request.narrowed(min(first + matched.host_run, last), last)
        return RemoteTicket(self, request, order, self._client.generation, holds=is_get)

    def ready(self, ticket: RemoteTicket, slot_mapping: Any) -> RemoteTicket:
        """Return a ticket with its slots, which is over if no device can serve it.

        Raises:
            ConfigError: the slots break a rule.
        """
        request, why = ticket.request, None
        if not self.has_device:
            why = self._why_unready()
        elif ticket.order != self._client.order:
            why = ClosedError("the request was made before the device was registered")
        if why is not None:
            ticket.response = nothing_moved(request, KVResponseStatus.UNREADY, why)
            return ticket
        request = self._intake.with_slots(request, slot_mapping, self._client.num_blocks)
        return ticket.with_request(request)

    def match(self, token_ids: Any, namespace: Namespace = None) -> PrefixMatch:
        """Return how much of a prompt is resident or far; nothing if the server does not answer."""
        request = self._request(RequestSpec(Operation.PREFETCH, token_ids, namespace=namespace))
        matched = self._client.result(self._client.ask(request.keys, with_far=True))
        self.receive()
        per_block = self._intake.tokens_per_block
        counts = {**dict.fromkeys(self._client.welcome.tiers, 0), **matched.by_tier}
        by_tier = {tier: counts[tier.label] * per_block for tier in Tier if tier.label in counts}
        far = {
            tier: matched.far[tier.label] * per_block for tier in Tier if tier.label in matched.far
        }
        return PrefixMatch(matched.blocks * per_block, by_tier, matched.pending * per_block, far)

    def _request(self, spec: RequestSpec) -> Request:
        self._check_open()
        if spec.watch is not None:
            why = "cannot move requests layer by layer: an `Agent` can (docs/server.md)"
            raise ConfigError("manager", "a client of a server", why)
        self._intake.rekey(self._client.key_chain)
        return self._intake.request(
            spec.operation, self._client.number(), spec.token_ids, spec.token_mask, spec.namespace
        )

    def _why_unready(self) -> FlexKVError:
        if self._client.connection is None:
            where = f"the server at {self._settings.server_recv_port}"
            return BackendUnavailableError(where, "it is not connected")
        return ClosedError("the devices of this instance are not connected to the server")

    # -- what tickets need ----------------------------------------------------------------------

    def send(self, ticket: RemoteTicket, start: Start) -> None:
        """Send a request; its ticket is told when it has ended."""
        self._under_way[start.number] = ticket
        self._client.begin(start)
        self._client.flush()
        if start.when_ready:
            self.report_ready(start.number)
        self.receive()

    def cancel(self, numbers: Sequence[int]) -> None:
        """Cancel requests, whose ends are reported all the same.

        A server that does not answer now counts as lost, which ends them.
        """
        self._client.cancel(numbers)
        if self._probe is None and numbers:
            self._probe = self._client.ask(self._intake.root(None))
        self.receive()

    def release(self, number: int) -> None:
        """End the hold of a prepared get."""
        self._client.release((number,))
        self.receive()

    @property
    def epoch(self) -> int:
        """Return what identifies the state of the devices: see `State`."""
        return self._client.epoch

    # -- the connection -------------------------------------------------------------------------

    async def _look(self) -> None:
        """Look at the connection again and again."""
        while True:
            self.receive()
            await asyncio.sleep(LOOK_S)

    def receive(self) -> None:
        """Take what the server has sent, and watch the connection for more."""
        if self._probe is not None and self._client.answer(self._probe) is not None:
            self._probe = None
        self._take(self._client.poll())
        self._watch(self._client.connection)

    def _take(self, ends: Sequence[Done]) -> None:
        for done in ends:
            ticket = self._under_way.pop(done.number, None)
            if ticket is not None:
                ticket.ended(done)

    def _watch(self, connection: FrameSocket | None) -> None:
        """Have the loop call `receive` when there is something to read."""
        if connection is self._watched:
            return
        if self._watched is not None:
            self._loop.remove_reader(self._watched_fd)
        if connection is not None:
            self._watched_fd = connection.fd
            self._loop.add_reader(self._watched_fd, self.receive)
        self._watched = connection

    # -- commands -------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """Return a frozen snapshot of every counter of the server's engine.

        Raises:
            BackendUnavailableError: there is no server.
        """
        return msgspec.convert(self._command("status")["statistics"], Statistics)

    async def flush(self) -> FlushReport:
        """Return once everything resident that was put before is on stable storage.

        Raises:
            BackendUnavailableError: there is no server.
            TransferError: as for `KVManager.flush`.
        """
        self._check_open()
        address = self._settings.server_recv_port
        answer = await run_stoppable("flush", lambda pause: ask_for_long(address, "flush", pause))
        return msgspec.convert(_value_of(answer), FlushReport)

    def clear(self, tier: Tier | None = None, namespace: Namespace = None) -> int:
        """Forget blocks, and return how many places they had; no crash can bring them back.

        Raises:
            BackendUnavailableError: there is no server.
        """
        name = None if tier is None else member("tier", tier, Tier).label
        parts = None if namespace is None else list(scope_of(namespace).parts)
        places = int(self._command("clear", tier=name, namespace=parts))
        self._client.match(self._intake.root(None))  # its answer comes after the new generation
        self.receive()
        return places

    async def clear_durably(self, tier: Tier | None = None, namespace: Namespace = None) -> int:
        """Do what `clear` does."""
        return self.clear(tier, namespace)

    async def reset_cluster(self) -> int:
        """Have the server begin a new generation of its cluster: see `KVManager.reset_cluster`.

        Raises:
            BackendUnavailableError: there is no server.
        """
        self._check_open()
        address = self._settings.server_recv_port
        return int(_value_of(await run_stoppable("reset", lambda _: ask(address, "cluster_reset"))))

    def trace_start(self, path: str | None = None, with_tokens: bool | None = None) -> None:
        """Have the server record to a file from now on; a relative path is relative to us."""
        name = None if path is None else str(Path(path).absolute())
        self._command("trace_start", path=name, tokens=with_tokens)

    def trace_stop(self) -> str | None:
        """Have the server stop recording; return the file's path, or None if no trace was on."""
        path: str | None = self._command("trace_stop")
        return path

    def _command(self, verb: str, **arguments: Any) -> Any:
        self._check_open()
        return _value_of(ask(self._settings.server_recv_port, verb, **arguments))


def _value_of(answer: Answer) -> Any:
    """Return what the server answered to a command.

    Raises:
        FlexKVError: the command failed.
    """
    if answer.error:
        raise error_from(answer.cause, answer.error)
    return answer.value
