"""The server: one engine for the schedulers and workers of several processes.

accept ─▶ Hello ─▶ client   one per instance: match, start, cancel; when it disconnects,
                │           its requests are cancelled
                ├▶ agent    one per rank of an instance: copies; they fail when it disconnects
                └▶ control  commands of an operator

Each connection is a session of its own. An exception in it ends that connection and nothing else;
only a broken invariant of the engine's state ends the engine.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import ExitStack, suppress

from flexkv.common.config import MB
from flexkv.common.errors import (
    ClosedError,
    ConfigError,
    FlexKVError,
    InternalError,
    cause_of,
)
from flexkv.engine.engine import Engine
from flexkv.index.keys import block_identity
from flexkv.links.framing import LENGTH_BYTES
from flexkv.links.link import Link
from flexkv.observe.logs import get_logger
from flexkv.server.agent_port import AgentPort
from flexkv.server.backend import ServerBackend
from flexkv.server.change_feed import ChangeFeed
from flexkv.server.connections import INSTANCES_MAX, Connection, Connections
from flexkv.server.control import Control
from flexkv.server.deadlines import DeviceDeadlines
from flexkv.server.jobs import Jobs
from flexkv.server.listen import Listener, is_same_user
from flexkv.server.planning_turns import PlanningTurns
from flexkv.server.prompts import KeptPrompts
from flexkv.server.wire import (
    FRAME_BYTES_OF,
    FRAMING,
    HELLO_BYTES_MAX,
    PROTOCOL_VERSION,
    TO_SERVER,
    Answer,
    Cancel,
    Command,
    Copied,
    DeviceReady,
    Forget,
    Hello,
    Match,
    ProtocolError,
    Ready,
    Release,
    Settle,
    Settled,
    Start,
    State,
    ToServer,
    Welcome,
    framed,
    length_of,
    understood,
)

log = get_logger(__name__)

LOOK_S = 1.0
"""Time between two checks that the socket's file is still there."""
HELLO_S = 5.0
"""How long a new connection may take to send `Hello`."""
CLOSE_S = 10.0
"""How long agents may take to finish their copies when the server closes."""
UNSENT_BYTES_MAX = 16 << 20
"""A client or operator with more unread bytes than this is cut off: nobody waits for it."""
CONTROL_IDLE_S = 60.0
"""How long an operator's connection may be silent."""
SETTLES_MAX = 64
"""How many `Settle` messages of one agent may wait for an answer."""
KEYS_A_TURN = 4096
"""After a message with more known keys than this, a session lets the loop's other tasks run."""
WINDOWS_PER_AGENT = 2
"""How many times `device_window_mb` may be sent to an agent each way: see also `HOST_SHARE`."""
HOST_SHARE = 8
"""An agent that hangs keeps at most host memory divided by this in each direction."""


class Server:
    """The server of an open engine, at one socket."""

    def __init__(self, engine: Engine, backend: ServerBackend, listener: Listener) -> None:
        """Create the server of an engine that uses `backend`; the caller closes all three."""
        self._engine, self._backend, self._listener = engine, backend, listener
        cache = engine.cache
        secret = cache.key_secret.get_secret_value()
        self._facts = block_identity(engine.sizes.spaces, secret)
        self._jobs: dict[int, Jobs] = {}
        self._connections = Connections(engine.supervisor)
        self._deadlines = DeviceDeadlines(
            backend.fleet, engine.requests.runner, cache.io_deadline_s, self._turn_away
        )
        self._control = Control(engine, backend.fleet)
        self._change_feed = ChangeFeed(engine.residency, engine.changes)
        self._turns = PlanningTurns()
        self._closing = False

    def start(self) -> None:
        """Start to accept connections."""
        self._engine.register_kv_caches([])
        self._engine.clears.on_clear = self._tell_states
        self._listener.listen()
        self._engine.supervisor.keep("server", self._listen())
        self._engine.supervisor.keep("changes", self._change_feed.run())
        log.info("server_listens", path=str(self._listener.path), pid=os.getpid())

    async def close(self) -> None:
        """Accept no more connections, cancel all requests, and let agents finish their copies."""
        self._closing = True
        for jobs in self._jobs.values():
            jobs.cancel()
            jobs.release()
        for connection in self._connections.all():
            if connection.link is None:
                connection.leave()
            elif connection.kind == "agent":
                connection.link.end()
            else:
                connection.link.close()
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._connections.wait_none()
        except TimeoutError:
            count = len(self._connections)
            log.warning("peers_cut_off", count=count, reason=f"not disconnected after {CLOSE_S} s")
            for connection in self._connections.all():
                if connection.link is not None:
                    connection.link.abort()
        self._deadlines.close()

    async def _listen(self) -> None:
        """Accept connections; bind a new socket if the file of the old one was removed."""
        while True:
            listening = self._listener.socket
            accepting = self._engine.supervisor.spawn("accept", self._accept(listening))
            try:
                while True:
                    await asyncio.sleep(LOOK_S)
                    if self._listener.renew():
                        break
            finally:
                accepting.cancel()
            await asyncio.wait([accepting])
            listening.close()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                peer, _ = await loop.sock_accept(listening)
            except OSError as error:  # out of descriptors: it may get better
                log.warning("connection_not_accepted", reason=str(error))
                await asyncio.sleep(1.0)
                continue
            peer.setblocking(False)
            connection = Connection(peer)
            self._connections.arrive(connection, self._session(connection))

    async def _session(self, connection: Connection) -> None:
        """Serve one connection to its end; its errors end only this connection."""
        peer = connection.peer
        with ExitStack() as undo:
            undo.callback(peer.close)
            try:
                if not is_same_user(peer):
                    return
                async with asyncio.timeout(HELLO_S):
                    hello = await _hello(peer)
                if self._closing:
                    return
                self._check(hello)
                self._connections.take_role(
                    connection, "lending" if hello.role == "agent" else hello.role
                )
                self._welcome(peer, hello)
                link = connection.link = await Link.over(peer, FRAMING, TO_SERVER)
                undo.pop_all()  # the link closes it
                await self._serve(connection, link, hello)
            except ConfigError as error:
                refusal = error.field, str(error.value), error.why
                log.warning("peer_refused", field=error.field, reason=error.why)
                with suppress(OSError):  # if there was a link, it is closed by now
                    peer.send(framed(Welcome(PROTOCOL_VERSION, os.getpid(), refusal)))
            except (OSError, ProtocolError, TimeoutError) as error:
                log.warning("peer_dropped", reason=str(error) or type(error).__name__)

    def _check(self, hello: Hello) -> None:
        """Check that a newcomer may connect.

        Raises:
            ConfigError: it speaks another version of the protocol, its blocks differ, it is
                connected already, or there are too many instances.
        """
        if hello.version != PROTOCOL_VERSION:
            why = f"the server speaks version {PROTOCOL_VERSION}: use the same FlexKV everywhere"
            raise ConfigError("protocol_version", hello.version, why)
        if hello.role != "control":
            self._check_facts(hello)
            self._check_instance(hello.instance)
        if hello.role == "client" and self._backend.fleet.client_of(hello.instance) is not None:
            why = "already has a client: engines need different instance_ids"
            raise ConfigError("instance_id", hello.instance, why)
        if hello.role == "agent":
            self._backend.fleet.check(hello.instance, hello.tp_rank, hello.num_blocks, hello.order)

    async def _serve(self, connection: Connection, link: Link[ToServer], hello: Hello) -> None:
        if self._closing:
            link.close()
            return
        link.frame_bytes_max = FRAME_BYTES_OF[hello.role]
        if hello.role != "agent":  # cutting off an agent would not stop its copies
            link.unsent_bytes_max = UNSENT_BYTES_MAX
        try:
            match hello.role:
                case "client":
                    await self._client(link, hello)
                case "agent":
                    await self._agent(connection, link, hello)
                case "control":
                    await self._commands(connection, link)
        finally:
            link.close()
            for settling in connection.settling:
                settling.cancel()
            self._forget_idle(hello.instance)

    def _check_instance(self, number: int) -> None:
        if not 0 <= number < 1 << 63:
            raise ConfigError("instance_id", number, "must be from 0 to 2**63 - 1")
        known = self._jobs.keys() | self._backend.fleet.instances.keys()
        if number not in known and len(known) >= INSTANCES_MAX:
            why = f"is one too many: a server has at most {INSTANCES_MAX} instances"
            raise ConfigError("instance_id", number, why)

    def _check_facts(self, hello: Hello) -> None:
        for name in self._facts.keys() | hello.facts.keys():
            ours, theirs = self._facts.get(name), hello.facts.get(name)
            if ours != theirs:
                raise ConfigError(name, theirs, f"differs from the server's: {ours!r}")

    def _welcome(self, peer: socket.socket, hello: Hello) -> None:
        arena = self._backend.arena
        assert arena.fd is not None
        welcome = Welcome(
            PROTOCOL_VERSION,
            os.getpid(),
            None,
            tuple(tier.label for tier in self._engine.residency.tiers),
            arena.num_blocks,
            arena.block_stride_bytes,
            arena.fd_offset_bytes,
            tuple(p.tier.label for p in self._backend.tiers() if p.capacity_blocks is None),
            self._engine.planner.catalogue.span_blocks,
        )
        fds = [arena.fd] if hello.role == "agent" else []
        socket.send_fds(peer, [framed(welcome)], fds)

    # -- clients --------------------------------------------------------------------------------

    async def _client(self, link: Link[ToServer], hello: Hello) -> None:
        instance = hello.instance
        if self._backend.fleet.client_of(instance) is not None:  # two came at once
            raise ProtocolError(f"instance {instance} already has a client")
        jobs, prompts = self._jobs_of(instance), KeptPrompts()
        self._backend.fleet.attach(instance, link)
        log.info("client_connected", instance=instance)
        self._tell_state(instance)
        if hello.watches:
            self._change_feed.add(link)
        try:
            while (message := await link.receive()) is not None:
                self._ask(link, jobs, prompts, message)
                if isinstance(message, Match | Start) and message.known > KEYS_A_TURN:
                    await asyncio.sleep(0)
        except (ConfigError, ClosedError) as error:
            raise ProtocolError(str(error)) from error
        finally:
            self._change_feed.discard(link)
            self._backend.fleet.detach(instance)
            jobs.cancel()
            jobs.release()
            # Copies under way may still write to its devices; agents ask about that by `Settle`.
            log.info("client_gone", instance=instance)

    def _ask(
        self, link: Link[ToServer], jobs: Jobs, prompts: KeptPrompts, message: ToServer
    ) -> None:
        """Handle a message of a client."""
        watchers = self._change_feed
        match message:
            case Match():
                keys = prompts.keys_of(message)
                jobs.match(message, keys, link.send)
                if message.tell:
                    watchers.tell_of(link, keys)
            case Release():
                jobs.release(message.numbers)
            case Start():
                keys = prompts.keys_of(message)
                jobs.start(message, keys, lambda done: watchers.answer(link, message, keys, done))
            case Forget():
                prompts.forget(message.prompts)
            case Cancel():
                jobs.cancel(message.numbers)
            case _:
                raise ProtocolError(f"a client may not send {type(message).__name__}")

    def _jobs_of(self, number: int) -> Jobs:
        """Return the requests of an instance; some may be left from an earlier client."""
        jobs = self._jobs.get(number)
        if jobs is None:
            fleet, turns = self._backend.fleet, self._turns
            jobs = Jobs(self._engine, fleet, number, turns, lambda: self._forget_idle(number))
            self._jobs[number] = jobs
        return jobs

    def _turn_away(self, number: int, why: str) -> None:
        """Refuse the waiting puts of an instance whose devices do not answer."""
        if number in self._jobs:
            self._jobs[number].turn_away(why)

    def _forget_idle(self, number: int) -> None:
        """Forget an instance that is not connected and has no request under way."""
        jobs = self._jobs.get(number)
        if jobs is not None and jobs.is_idle and number not in self._backend.fleet.instances:
            del self._jobs[number]

    def _tell_state(self, number: int) -> None:
        """Send an instance's client the state of its devices."""
        fleet = self._backend.fleet
        link = fleet.client_of(number)
        if link is None:
            return
        instance, generation = fleet.instances.get(number), self._engine.clears.generation
        if instance is None or instance.epoch is None:
            link.send(State(False, 0, "", generation=generation))
        else:
            order = fleet.order or ""
            link.send(State(True, instance.num_blocks, order, instance.epoch, generation))

    def _tell_states(self) -> None:
        """Send every client its state, because the cache was cleared."""
        for number in self._backend.fleet.instances:
            self._tell_state(number)

    # -- agents ---------------------------------------------------------------------------------

    async def _agent(self, connection: Connection, link: Link[ToServer], hello: Hello) -> None:
        fleet, number, rank = self._backend.fleet, hello.instance, hello.tp_rank
        if (message := await link.receive()) is None:
            return
        if not isinstance(message, DeviceReady):
            raise ProtocolError("an agent's first message must be DeviceReady")
        port = self._port_of(link, hello)
        fleet.join(number, rank, port, hello.order)
        self._jobs_of(number).tell_ends(port)
        self._connections.take_role(connection, "agent")
        log.info("agent_connected", instance=number, rank=rank, blocks=hello.num_blocks)
        may_copy = True
        try:
            self._tell_state(number)
            while (message := await link.receive()) is not None:
                self._hear(connection, port, message, (number, rank))
                await link.wait_read()  # take no more from an agent that does not read
            may_copy = False
        except asyncio.CancelledError:
            may_copy = False  # the engine has ended, so its memory is not used again
            raise
        except ProtocolError as error:
            log.warning("agent_dismissed", instance=number, rank=rank, reason=str(error))
        finally:
            if may_copy:  # its copies must end before its connection does
                port.fail_unsent("the agent was dismissed")
                link.end()
                await link.ignore()
            fleet.leave(number, rank)
            self._deadlines.look()
            if number in self._jobs:
                self._jobs[number].cancel_unready()
            self._tell_state(number)
            log.info("agent_gone", instance=number, rank=rank)

    def _port_of(self, link: Link[ToServer], hello: Hello) -> AgentPort:
        engine, sizes = self._engine, self._engine.sizes
        host_bytes = sizes.num_host_blocks * max(sizes.block_bytes)
        window_bytes = int(engine.cache.device_window_mb * MB) * WINDOWS_PER_AGENT
        window_bytes = min(window_bytes, host_bytes // HOST_SHARE)
        part_bytes, parts = [space.part_bytes for space in sizes.spaces], sizes.spaces[0].parts
        return AgentPort(link, part_bytes, hello.num_blocks, window_bytes // parts)

    def _hear(
        self, connection: Connection, port: AgentPort, message: ToServer, who: tuple[int, int]
    ) -> None:
        """Handle a message of an agent; `who` is its instance and rank."""
        number, rank = who
        match message:
            case Copied():
                port.copied(message)
                if self._backend.fleet.instances[number].stuck:
                    self._deadlines.look()
            case Ready():
                self._jobs_of(number).ready(message.numbers, rank, message.layers)
            case Settle():
                self._settle(connection, message, self._jobs_of(number))
            case _:
                raise ProtocolError(f"an agent may not send {type(message).__name__}")

    def _settle(self, connection: Connection, message: Settle, jobs: Jobs) -> None:
        """Answer an agent's `Settle` once those requests are over, which may be at once."""
        link = connection.link
        assert link is not None
        unsettled = jobs.unsettled(message.requests)
        if not unsettled:
            link.send(Settled(message.number))
            return
        if len(connection.settling) >= SETTLES_MAX:
            raise ProtocolError(f"it already waits for {SETTLES_MAX} answers to Settle")

        async def settle() -> None:
            for job in unsettled:
                await job.over.wait()
            link.send(Settled(message.number))

        task = self._engine.supervisor.spawn_session("settle", settle())
        connection.settling.add(task)
        task.add_done_callback(connection.settling.discard)

    # -- control --------------------------------------------------------------------------------

    async def _commands(self, connection: Connection, link: Link[ToServer]) -> None:
        while True:
            async with asyncio.timeout(CONTROL_IDLE_S):
                message = await link.receive()
            if message is None:
                return
            if not isinstance(message, Command):
                raise ProtocolError("an operator may send only commands")
            connection.is_busy = True
            try:
                value = await self._control.perform(message.verb, dict(message.arguments))
            except InternalError:
                raise  # the engine's state is wrong, so the engine has to end
            except FlexKVError as error:
                link.send(Answer(message.number, None, str(error), cause_of(error)))
            else:
                link.send(Answer(message.number, value))
            connection.is_busy, connection.heard_s = False, time.monotonic()
            await link.wait_read()


async def _hello(peer: socket.socket) -> Hello:
    """Return the first message of a new connection.

    Raises:
        ProtocolError: it is not a `Hello`.
    """
    loop = asyncio.get_running_loop()

    async def read(count: int) -> bytes:
        got = b""
        while len(got) < count:
            more = await loop.sock_recv(peer, count - len(got))
            if not more:
                raise ProtocolError("it disconnected before its Hello was complete")
            got += more
        return got

    length = length_of(await read(LENGTH_BYTES), HELLO_BYTES_MAX)
    hello = understood(TO_SERVER, await read(length))
    if not isinstance(hello, Hello):
        raise ProtocolError("its first message is not a Hello")
    return hello
