"""A real server in a process of its own, with instances of engines in this one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.common.config import ModelConfig, Settings
from flexkv.common.request import Operation
from flexkv.index.keys import block_identity
from flexkv.links.framing import LENGTH_BYTES
from flexkv.server.agent import Agent
from flexkv.server.client import Client
from flexkv.server.handshake import Connected, connect, message
from flexkv.server.wire import (
    PROTOCOL_VERSION,
    DeviceReady,
    Done,
    Hello,
    Start,
    State,
    framed,
)

from .caches import MODEL, PER_BLOCK, bytes_of, cache_config, kv_caches

BLOCKS = 8
ANSWER_MS = 1000
"""Longer than by default, so that a slow machine is no fault."""


def settings_in(folder: Path, server_client_mode: bool = False, **changes: Any) -> Settings:
    """Return the settings of a server with its files in a folder."""
    cache, address = cache_config(folder, **changes), f"ipc://{folder}/socket"
    mode = server_client_mode
    return Settings(
        server_recv_port=address, server_client_mode=mode, server_answer_ms=ANSWER_MS,
        cache_config=cache,
    )  # fmt: skip


def eventually(what: Callable[[], Any], within_s: float = 60.0) -> Any:
    """Call a function until its result is true, and return that."""
    until_s = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < until_s, "it did not come about"
        time.sleep(0.005)
    return found


def is_running(pid: int) -> bool:
    """Return whether a process runs and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Instance:
    """An engine's scheduler and its workers, in this process."""

    def __init__(self, settings: Settings, model: ModelConfig = MODEL, number: int = 0) -> None:
        cache, address = settings.cache_config, settings.server_recv_port
        self.caches = [self._cache_of(model, number * 16 + rank) for rank in range(model.tp_size)]
        self.agents = [Agent(address, model, cache, number, rank) for rank in range(model.tp_size)]
        self.client = Client(settings, model, number)
        self.ends: dict[int, Done] = {}

    @staticmethod
    def _cache_of(model: ModelConfig, seed: int) -> list[NDArray[np.float16]]:
        heads = model.num_kv_heads // model.parts
        return [layer[:, :, :, :heads].copy() for layer in kv_caches(seed)]

    def begin(self) -> None:
        """Lend the caches, and wait until requests can be served."""
        for agent, caches in zip(self.agents, self.caches, strict=True):
            agent.start(caches)
        self.wait_ready()

    def wait_ready(self) -> None:
        """Return once requests can be served."""
        eventually(lambda: (self.client.poll(), self.client.is_ready)[1])

    def keys(self, prompt: int, blocks: int = BLOCKS) -> bytes:
        """Return the keys of a prompt that shares nothing with others."""
        return self.client.keys(np.arange(blocks * PER_BLOCK) + prompt * 10_000)

    def end_of(self, number: int) -> Done:
        """Wait for the end of a request, and return it."""

        def look() -> bool:
            self.ends |= {done.number: done for done in self.client.poll()}
            return number in self.ends

        eventually(look)
        return self.ends[number]

    def request(self, operation: Operation, prompt: int, device: range) -> Done:
        """Run a request of a whole prompt, and return its end."""
        keys = self.keys(prompt, len(device))
        ids = np.array(device, np.int64)
        return self.end_of(self.client.start(operation, keys, 0, ids))

    def content(self, device: range) -> list[NDArray[np.uint16]]:
        """Return the bytes of device blocks, by rank."""
        return [bytes_of(caches, device) for caches in self.caches]

    def close(self) -> None:
        """Disconnect."""
        self.client.close()
        for agent in self.agents:
            agent.close()


ORDER = "kv tokens heads dim"


class Peer:
    """A client or an agent whose every message comes from the test."""

    def __init__(
        self, settings: Settings, role: Any, instance: int = 0, tp_rank: int = 0, **more: Any
    ) -> None:
        model: ModelConfig = more.pop("model", MODEL)
        facts = block_identity(model.spaces(PER_BLOCK), "")
        words = {"num_blocks": 64, "order": ORDER, **more}
        hello = Hello(
            PROTOCOL_VERSION, role, os.getpid(), facts, instance, tp_rank, **words
        )  # fmt: skip
        self.connected: Connected = eventually(lambda: _try(settings, hello))
        self._socket = self.connected.socket
        self._socket.settimeout(10)
        self.epoch = 0
        if role == "agent":
            self.say(DeviceReady())

    def say(self, said: Any) -> None:
        """Send a message."""
        self._socket.sendall(framed(said))

    def say_bytes(self, said: bytes) -> None:
        """Send a frame with these bytes in it."""
        self._socket.sendall(len(said).to_bytes(LENGTH_BYTES, "little") + said)

    def hear(self, kind: type) -> Any:
        """Return the next message of a kind."""
        while True:
            heard = message(self._socket)
            if isinstance(heard, State):
                self.epoch = heard.epoch
            if isinstance(heard, kind):
                return heard

    def hear_ready(self) -> None:
        """Wait until the instance's devices are ready."""
        while not self.hear(State).ready:
            pass

    def put(self, number: int, keys: bytes | None = None) -> None:
        """Start a put from the first device blocks."""
        keys = keys or os.urandom(16 * (BLOCKS + 1))
        self.say(Start(number, "put", keys, 0, np.arange(BLOCKS).tobytes(), self.epoch))

    def close(self) -> None:
        """Close the connection. Idempotent."""
        fd = self.connected.arena_fd
        if fd is not None and self._socket.fileno() >= 0:
            os.close(fd)
        self._socket.close()


def _try(settings: Settings, hello: Hello) -> Connected | None:
    try:
        return connect(settings.server_recv_port, hello)
    except OSError:
        return None
