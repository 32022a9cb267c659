"""Commands to a Redis or Valkey server, by redis.asyncio with hiredis.

The library's retries, its parsing of answers and its waits are switched off: the caller decides
when to try again, answers come as they are, and every wait has an end.

A node of a Redis Cluster says that another one has the keys (MOVED). All keys of a pool are in one
slot, so one node has them: commands go there from then on. If that fails, the node that was
configured is asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from flexkv.cluster.redis_store import Command
from flexkv.cluster.store import ClusterStoreError
from flexkv.common.errors import BackendUnavailableError
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

ANSWER_S = 2.0
"""How long the server may take to answer, besides what it was asked to wait."""
CONNECTIONS = 4
"""The log is read on one of them; the others are for what is written, and for the registry."""
MOVES_MAX = 3
"""How many MOVED answers one call follows: a node that just lost a slot may name a wrong node."""
_RAISED = (
    OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
    RuntimeError,
)  # fmt: skip
"""What the library raises besides its own errors, for answers that make no sense."""


class RedisCommands:
    """Connections to a server.

    Attributes:
        where: host and port.
    """

    def __init__(
        self, host: str, port: int, password: str = "", answer_s: float = ANSWER_S
    ) -> None:
        """Connect when the first command is sent.

        Raises:
            BackendUnavailableError: the library is not installed.
        """
        try:
            import redis.asyncio as library
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import MovedError, RedisError
        except ImportError as error:
            why = "the package redis is not installed: pip install 'flexkv[cluster]'"
            raise BackendUnavailableError("sharing over Redis", why) from error
        self.where = f"redis {host}:{port}"
        self._password, self._answer_s = password, answer_s
        self._raised, self._moved = (RedisError, *_RAISED), MovedError

        def connected(host: str, port: int) -> Any:
            pool = library.BlockingConnectionPool(
                max_connections=CONNECTIONS,
                timeout=answer_s,
                host=host,
                port=port,
                password=password or None,
                protocol=2,
                socket_connect_timeout=answer_s,
                socket_timeout=None,  # with one, the library can lose the cancellation of a task
                socket_keepalive=True,
                retry=Retry(NoBackoff(), 0),
                client_name="flexkv",
            )
            client = library.Redis(connection_pool=pool)
            client.response_callbacks.clear()
            return client

        self._connected = connected
        self._home = self._now = host, port
        self._clients = {self._home: connected(host, port)}

    async def run(self, commands: Sequence[Command], wait_s: float = 0.0) -> list[Any]:
        """Send commands and return their answers: see `Commands.run`.

        Cancellation: the connection is closed, since an answer may still come.
        """
        what = str(commands[0][0])
        try:
            async with asyncio.timeout(self._answer_s + wait_s):
                for moves in range(MOVES_MAX + 1):
                    try:
                        return await self._sent(commands)
                    except self._moved as error:
                        if moves == MOVES_MAX:
                            raise
                        self._follow(error.host, error.port)
        except TimeoutError as error:
            self._now = self._home
            raise ClusterStoreError(self.where, what, "no answer in time") from error
        except self._raised as error:
            self._now = self._home
            raise ClusterStoreError(self.where, what, self._said(error)) from error
        raise AssertionError("unreachable")

    async def _sent(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands to the node that is asked now, and return their answers."""
        pipeline = self._clients[self._now].pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        answers: list[Any] = await pipeline.execute()
        return answers

    def _follow(self, host: str, port: int) -> None:
        """Ask another node from now on; a node that does not know its own name leaves it out."""
        self._now = host or self._now[0], port
        if self._now not in self._clients:
            log.info("redis_moved", configured=self.where, to=f"{self._now[0]}:{port}")
            self._clients[self._now] = self._connected(*self._now)

    def _said(self, error: Exception) -> str:
        """Return what an error says, without the password."""
        text = f"{type(error).__name__}: {error}"
        return text.replace(self._password, "…") if self._password else text

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            with suppress(*self._raised):  # a connection that was broken is closed all the same
                await client.aclose(close_connection_pool=True)
                await client.connection_pool.disconnect()
