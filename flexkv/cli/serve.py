"""`flexkv serve`: one engine for the schedulers and workers of several processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from flexkv.common.config import ModelConfig, Settings, settings_of
from flexkv.common.config_keys import kind_of
from flexkv.common.errors import ConfigError, FlexKVError
from flexkv.kvmanager import KVManager
from flexkv.logs import get_logger
from flexkv.metrics import MetricsServer
from flexkv.server.address import socket_path
from flexkv.server.backend import ServerBackend
from flexkv.server.launch import LISTENING
from flexkv.server.listen import Listener
from flexkv.server.server import Server
from flexkv.settings import load_file, load_object, load_settings

log = get_logger(__name__)

LOOK_S = 1.0
"""Between two looks whether the parent lives."""
FLUSH_S = 30.0
"""How long what was put may take to reach stable storage when the server ends."""


def serve(
    model: Annotated[
        Path | None, typer.Argument(help="JSON: num_layers, num_kv_heads, head_size, dtype, …")
    ] = None,
    with_parent: Annotated[
        bool,
        typer.Option(
            "--with-parent", help="Read model and settings from stdin, and end when it does."
        ),
    ] = False,
) -> None:
    """Serve one engine at `server_recv_port` until SIGTERM; settings as from FLEXKV_CONFIG_PATH."""
    if with_parent:
        told = load_object(sys.stdin.buffer.readline(), "stdin", "what the parent says")
        config, settings = ModelConfig(**_part(told, "model")), settings_of(_part(told, "settings"))
    elif model is None:
        raise ConfigError("model", None, "must name a file, or --with-parent be given")
    else:
        config, settings = ModelConfig(**load_file(model, "model")), load_settings()
    try:
        asyncio.run(run(config, settings, until_eof=with_parent))
    except FlexKVError as error:
        if with_parent:
            typer.echo(str(error))  # to who has started us
        raise


def _part(told: dict[str, Any], name: str) -> dict[str, Any]:
    part = told.get(name)
    if not isinstance(part, dict):
        raise ConfigError(name, kind_of(part), "must be an object of keys")
    return part


async def run(model: ModelConfig, settings: Settings, until_eof: bool = False) -> None:
    """Serve until a signal, or until stdin ends.

    Raises:
        ConfigError: another server has the address, or memory or files are not there.
    """
    ended = asyncio.Event()
    _on_end(ended.set, until_eof)
    cache = settings.cache_config
    async with AsyncExitStack() as stack:
        listener = Listener(socket_path(settings.server_recv_port))  # first: it is cheap to refuse
        stack.callback(listener.close)
        if until_eof:
            sys.stdout.buffer.write(LISTENING)
            sys.stdout.buffer.flush()
        backend = ServerBackend(model, cache, cache.sized(model))
        manager = await stack.enter_async_context(KVManager(model, cache, backend=backend))
        if settings.enable_metrics:
            metrics = stack.enter_context(MetricsServer(manager, settings.py_metrics_port))
            log.info("metrics", url=metrics.url)
        server = Server(manager.engine, backend, listener)
        manager.engine.on_failure = ended.set
        server.start()
        await ended.wait()
        log.info("server ends")
        manager.engine.check_sound()
        await server.close()
        try:
            async with asyncio.timeout(FLUSH_S):
                await manager.flush()
        except (TimeoutError, FlexKVError) as error:
            log.warning("not_flushed", reason=str(error) or "in time")


def _on_end(ended: Callable[[], None], until_eof: bool) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended)
    if until_eof:
        _on_orphaned(loop, os.getppid(), ended)

        def look() -> None:
            with suppress(BlockingIOError):
                if not os.read(stdin, 4096):
                    loop.remove_reader(stdin)
                    ended()

        stdin = sys.stdin.fileno()
        os.set_blocking(stdin, False)
        loop.add_reader(stdin, look)


def _on_orphaned(loop: asyncio.AbstractEventLoop, parent: int, ended: Callable[[], None]) -> None:
    """End when the parent has died: a child of its may keep our stdin open."""
    if os.getppid() != parent:
        ended()
    else:
        loop.call_later(LOOK_S, _on_orphaned, loop, parent, ended)
