"""The server: one engine for the schedulers and workers of several processes.

accept ─▶ Hello ─▶ client   one for an instance: match, start, cancel; gone, its requests are
                │           cancelled
                ├▶ agent    one for a rank of an instance: copies; gone, its copies have failed
                └▶ control  what an operator wants
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import ExitStack, suppress

import msgspec

from flexkv.common.errors import ClosedError, ConfigError, FlexKVError
from flexkv.engine import Engine
from flexkv.index.keys import blocks_are
from flexkv.logs import get_logger
from flexkv.server.backend import ServerBackend
from flexkv.server.changes import Watchers
from flexkv.server.control import Control
from flexkv.server.fleet import AgentPort
from flexkv.server.jobs import Jobs
from flexkv.server.link import Link
from flexkv.server.listen import Listener, is_same_user
from flexkv.server.wire import (
    LENGTH_BYTES,
    PROTOCOL_VERSION,
    TO_SERVER,
    Answer,
    Cancel,
    Command,
    Copied,
    Hello,
    Lent,
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
)

log = get_logger(__name__)

LOOK_S = 1.0
"""Between two looks whether the socket's file is there still."""
HELLO_S = 5.0
"""How long who connects may take to say who it is."""
CLOSE_S = 10.0
"""How long agents may take to end their copies when the server closes."""
UNSENT_BYTES_MAX = 16 << 20
"""A client that does not read what it is sent is cut off there: nobody else waits for it."""


class Server:
    """Serves an open engine at a socket, until it is closed."""

    def __init__(self, engine: Engine, backend: ServerBackend, listener: Listener) -> None:
        """Take an engine that stands on `backend`; all three stay the caller's to close."""
        self._engine, self._backend, self._listener = engine, backend, listener
        cache = engine.cache
        secret = cache.key_secret.get_secret_value()
        self._facts = blocks_are(engine.model, cache.tokens_per_block, secret)
        self._jobs: dict[int, Jobs] = {}
        self._links: set[Link[ToServer]] = set()
        self._agents: set[Link[ToServer]] = set()
        self._control = Control(engine, backend.fleet)
        self._watchers = Watchers(engine.residency)
        self._closing = False
        self._idle = asyncio.Event()

    def start(self) -> None:
        """Take connections from now on."""
        self._engine.register_kv_caches([])
        self._engine.clears.on_clear = self._tell_states
        self._listener.listen()
        self._engine.supervisor.keep("server", self._listen())
        self._engine.supervisor.keep("changes", self._watchers.run())
        log.info("server listens", path=str(self._listener.path), pid=os.getpid())

    async def close(self) -> None:
        """Take no more connections, and let the agents end what they do."""
        self._closing = True
        for jobs in self._jobs.values():
            jobs.cancel()
            jobs.release()
        for link in list(self._links):
            if link in self._agents:
                link.end()
            else:
                link.close()
        try:
            async with asyncio.timeout(CLOSE_S):
                while self._links:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            log.warning("peers_cut_off", count=len(self._links), reason="they did not end in time")
            for link in list(self._links):
                link.abort()

    async def _listen(self) -> None:
        """Take connections; at a new socket when the file of the old one was removed."""
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
                log.warning("connection_refused", reason=str(error))
                await asyncio.sleep(1.0)
                continue
            peer.setblocking(False)
            self._engine.supervisor.spawn("session", self._session(peer))

    async def _session(self, peer: socket.socket) -> None:
        """Serve one connection to its end; what goes wrong with it is its own affair."""
        with ExitStack() as undo:
            undo.callback(peer.close)
            try:
                async with asyncio.timeout(HELLO_S):
                    hello = await _hello(peer)
                if self._closing or not is_same_user(peer):
                    return
                self._check(hello)
                self._welcome(peer, hello)
                link = await Link.over(peer, TO_SERVER)
                undo.pop_all()  # the link closes it
                await self._serve(link, hello)
            except ConfigError as error:
                refusal = error.field, str(error.value), error.why
                log.warning("peer_refused", field=error.field, reason=error.why)
                with suppress(OSError):  # where there is a link it is closed by now
                    peer.send(framed(Welcome(PROTOCOL_VERSION, os.getpid(), refusal)))
            except (OSError, ProtocolError, TimeoutError) as error:
                log.warning("peer_dropped", reason=str(error) or type(error).__name__)

    def _check(self, hello: Hello) -> None:
        """Check that who connects may.

        Raises:
            ConfigError: it speaks another protocol, has other blocks, or is there already.
        """
        if hello.version != PROTOCOL_VERSION:
            why = f"this server speaks {PROTOCOL_VERSION}: use the same FlexKV everywhere"
            raise ConfigError("protocol_version", hello.version, why)
        if hello.role != "control":
            self._check_facts(hello)
        if hello.role == "client" and self._backend.fleet.client_of(hello.instance) is not None:
            raise ConfigError("instance_id", hello.instance, "has a client already")
        if hello.role == "agent":
            self._backend.fleet.check(hello.instance, hello.tp_rank, hello.num_blocks, hello.order)

    async def _serve(self, link: Link[ToServer], hello: Hello) -> None:
        if self._closing:
            link.close()
            return
        self._links.add(link)
        if hello.role == "agent":
            self._agents.add(link)
        else:
            link.unsent_bytes_max = UNSENT_BYTES_MAX
        try:
            match hello.role:
                case "client":
                    await self._client(link, hello)
                case "agent":
                    await self._agent(link, hello)
                case "control":
                    await self._commands(link)
        finally:
            link.close()
            self._links.discard(link)
            self._agents.discard(link)
            self._idle.set()

    def _check_facts(self, hello: Hello) -> None:
        for name in self._facts.keys() | hello.facts.keys():
            ours, theirs = self._facts.get(name), hello.facts.get(name)
            if ours != theirs:
                raise ConfigError(name, theirs, f"the server's blocks have {ours!r}")

    def _welcome(self, peer: socket.socket, hello: Hello) -> None:
        arena = self._backend.arena
        assert arena.fd is not None
        welcome = Welcome(
            PROTOCOL_VERSION,
            os.getpid(),
            None,
            arena.num_blocks,
            arena.block_stride_bytes,
            arena.fd_offset_bytes,
        )
        fds = [arena.fd] if hello.role == "agent" else []
        socket.send_fds(peer, [framed(welcome)], fds)

    # -- clients --------------------------------------------------------------------------------

    async def _client(self, link: Link[ToServer], hello: Hello) -> None:
        instance = hello.instance
        if self._backend.fleet.client_of(instance) is not None:  # two came at once
            raise ProtocolError(f"instance {instance} has a client already")
        jobs = self._jobs_of(instance)
        self._backend.fleet.attach(instance, link)
        log.info("client connected", instance=instance)
        self._tell_state(instance)
        if hello.watches:
            self._watchers.add(link)
        try:
            while (message := await link.receive()) is not None:
                self._ask(link, jobs, message)
        except (ConfigError, ClosedError) as error:
            raise ProtocolError(str(error)) from error
        finally:
            self._watchers.discard(link)
            self._backend.fleet.detach(instance)
            jobs.cancel()
            jobs.release()
            # Its devices may still be written by what is under way: agents ask for that.
            log.info("client gone", instance=instance)

    def _ask(self, link: Link[ToServer], jobs: Jobs, message: ToServer) -> None:
        """Take what a client has asked for."""

        watchers = self._watchers
        match message:
            case Match():
                link.send(jobs.match(message))
                if message.tell:
                    watchers.tell_of(link, message.keys)
            case Release():
                jobs.release(message.numbers)
            case Start():
                jobs.start(message, lambda done: watchers.answer(link, message, done))
            case Cancel():
                jobs.cancel(message.numbers)
            case _:
                raise ProtocolError(f"a client does not send {type(message).__name__}")

    def _jobs_of(self, number: int) -> Jobs:
        """Give the requests of an instance: those of an earlier client may be ending still."""
        jobs = self._jobs.get(number)
        if jobs is None:
            jobs = self._jobs[number] = Jobs(self._engine, self._backend.fleet, number)
        return jobs

    def _tell_state(self, number: int) -> None:
        """Tell an instance's client what its devices are."""
        fleet = self._backend.fleet
        link = fleet.client_of(number)
        if link is None:
            return
        instance, generation = fleet.instances.get(number), self._engine.clears.generation
        if instance is None or instance.slot is None:
            link.send(State(False, 0, "", generation=generation))
        else:
            order = fleet.order or ""
            link.send(State(True, instance.num_blocks, order, instance.slot, generation))

    def _tell_states(self) -> None:
        """Tell every client that the cache was cleared."""
        for number in self._backend.fleet.instances:
            self._tell_state(number)

    # -- agents ---------------------------------------------------------------------------------

    async def _agent(self, link: Link[ToServer], hello: Hello) -> None:
        fleet, number, rank = self._backend.fleet, hello.instance, hello.tp_rank
        if (message := await link.receive()) is None:
            return
        if not isinstance(message, Lent):
            raise ProtocolError("an agent's first word is that its device is lent")
        part_bytes = fleet.block_bytes // self._engine.model.parts
        port = AgentPort(link, part_bytes, hello.num_blocks)
        fleet.join(number, rank, port, hello.order)
        log.info("agent connected", instance=number, rank=rank, blocks=hello.num_blocks)
        self._tell_state(number)
        try:
            while (message := await link.receive()) is not None:
                self._hear(link, port, message, (number, rank))
        except ProtocolError as error:
            # It may be copying still: its copies end before its connection does.
            log.warning("agent_dismissed", instance=number, rank=rank, reason=str(error))
            link.end()
            await link.ignore()
        finally:
            fleet.leave(number, rank)
            self._jobs_of(number).cancel_unready()
            self._tell_state(number)
            log.info("agent gone", instance=number, rank=rank)

    def _hear(
        self, link: Link[ToServer], port: AgentPort, message: ToServer, who: tuple[int, int]
    ) -> None:
        """Take what an agent, of an instance and a rank, has said."""
        number, rank = who
        match message:
            case Copied():
                port.copied(message)
            case Ready():
                self._jobs_of(number).ready(message.numbers, rank)
            case Settle():
                work = self._settle(link, message, number)
                self._engine.supervisor.spawn("settle", work)
            case _:
                raise ProtocolError(f"an agent does not send {type(message).__name__}")

    async def _settle(self, link: Link[ToServer], message: Settle, number: int) -> None:
        await self._jobs_of(number).settled(message.requests)
        link.send(Settled(message.number))

    # -- control --------------------------------------------------------------------------------

    async def _commands(self, link: Link[ToServer]) -> None:
        while (message := await link.receive()) is not None:
            if not isinstance(message, Command):
                raise ProtocolError("an operator sends commands")
            try:
                value = await self._control.perform(message.verb, dict(message.arguments))
            except FlexKVError as error:
                link.send(Answer(message.number, None, str(error)))
            else:
                link.send(Answer(message.number, value))


async def _hello(peer: socket.socket) -> Hello:
    """Give the first message of who connects.

    Raises:
        ProtocolError: it is something else.
    """
    loop = asyncio.get_running_loop()

    async def read(count: int) -> bytes:
        got = b""
        while len(got) < count:
            more = await loop.sock_recv(peer, count - len(got))
            if not more:
                raise ProtocolError("it said nothing")
            got += more
        return got

    length = length_of(await read(LENGTH_BYTES))
    if length > UNSENT_BYTES_MAX:
        raise ProtocolError(f"a greeting of {length} bytes")
    try:
        hello = TO_SERVER.decode(await read(length))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ProtocolError(str(error)) from error
    if not isinstance(hello, Hello):
        raise ProtocolError("it did not say who it is")
    return hello
