"""`flexkv serve`: one engine for the schedulers and workers of several processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from flexkv.common.config import GB, ModelConfig, Settings, settings_of
from flexkv.common.config_keys import HIDDEN, kind_of
from flexkv.common.errors import ClosedError, ConfigError, FlexKVError
from flexkv.kvmanager import KVManager
from flexkv.metrics import MetricsServer
from flexkv.observe.logs import configure_logging, get_logger
from flexkv.process.stoppable import failure_within
from flexkv.process.wakeups import wake_promptly
from flexkv.server.address import socket_path
from flexkv.server.backend import ServerBackend
from flexkv.server.handshake import connect
from flexkv.server.launch import END_S, ENDED, LISTENING, ProcessHandle, refusal_of
from flexkv.server.listen import Listener
from flexkv.server.server import Server
from flexkv.server.wire import PROTOCOL_VERSION, Hello
from flexkv.settings import load_file, load_object, load_settings

log = get_logger(__name__)

INT_MAX = 2**31 - 1
LOOK_S = 1.0
"""Time between two checks whether the parent is alive, or the address free."""
FLUSH_S = 30.0
"""The most time that the flush at the server's end may take."""


def serve(
    context: typer.Context,
    model: Annotated[
        Path | None,
        typer.Argument(help="JSON file: num_layers, num_kv_heads, head_size, dtype, tp_size, …"),
    ] = None,
    with_parent: Annotated[
        bool,
        typer.Option(
            "--with-parent",
            help="For a program that launches the server: read model and settings from stdin, "
            "and end when that program ends.",
        ),
    ] = False,
    parent: Annotated[
        int, typer.Option(min=0, max=INT_MAX, hidden=True, help="Process id of the parent.")
    ] = 0,
    parent_fd: Annotated[
        int, typer.Option(min=-1, max=INT_MAX, hidden=True, help="Pidfd of the parent.")
    ] = -1,
) -> None:
    """Run one cache for several processes, until SIGTERM or ctrl-C.

    Sizes, directories, the address (server_recv_port) and all other settings come from the file
    that FLEXKV_CONFIG_PATH names, and from variables FLEXKV_<KEY>.
    """
    watch = None
    if with_parent:
        told = load_object(sys.stdin.buffer.readline(), "stdin", "the message of the parent")
        config, settings = ModelConfig(**_part(told, "model")), settings_of(_part(told, "settings"))
        configure_logging(context.obj or settings.log_level, settings.logging_prefix)
        watch = ProcessHandle(parent or os.getppid(), parent_fd)
        if told.get("waits"):
            _outwait(settings.server_recv_port)
    elif model is None:
        why = "name a JSON file that describes the model, as in `flexkv serve model.json`"
        raise ConfigError("model", HIDDEN, why)
    else:
        config, settings = ModelConfig(**load_file(model, "model")), load_settings()
        configure_logging(context.obj or settings.log_level, settings.logging_prefix)
    log.debug("server_scheduling", refused=wake_promptly())  # this thread will run the loop
    try:
        asyncio.run(run(config, settings, watch))
    except (FlexKVError, OSError, MemoryError) as error:
        if with_parent:
            _say(refusal_of(error))
        raise
    if with_parent:
        _say(ENDED)


def _say(line: bytes) -> None:
    """Write a line to the process that launched this one, if it still reads."""
    with suppress(BrokenPipeError):
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def _outwait(address: str) -> None:
    """Wait while a server that is ending still has the address; it may be writing to SSD.

    Without the wait, an engine that is restarted at once would fail because of its predecessor.
    """
    until_s = time.monotonic() + END_S
    while time.monotonic() < until_s:
        try:
            Listener(socket_path(address)).close()
        except ConfigError as error:
            if not error.why.startswith("is in use") or _answers(address):
                return  # taking it below raises this error again
            log.info("address_in_use", path=address, reason="its server is ending or starting")
            time.sleep(LOOK_S)
        else:
            return


def _answers(address: str) -> bool:
    """Return whether the server at an address still answers."""
    try:
        connect(address, Hello(PROTOCOL_VERSION, "control", os.getpid())).socket.close()
    except (OSError, ClosedError):
        return False
    except ConfigError:  # it refuses us, so it serves
        return True
    return True


def _part(told: dict[str, Any], name: str) -> dict[str, Any]:
    part = told.get(name)
    if not isinstance(part, dict):
        raise ConfigError(name, kind_of(part), "must be an object of keys")
    return part


async def run(model: ModelConfig, settings: Settings, parent: ProcessHandle | None = None) -> None:
    """Serve until a signal comes, or until the parent, if any, ends or closes our stdin.

    Either of them also ends a start that is still acquiring memory and files.

    Raises:
        ConfigError: another server has the address, or memory or files are not available.
    """
    ended = asyncio.Event()
    opening = asyncio.current_task()
    assert opening is not None
    is_open = False

    def end() -> None:
        ended.set()
        if not is_open:
            opening.cancel()

    _on_end(end, parent)
    cache = settings.cache_config
    async with AsyncExitStack() as stack:
        listener = Listener(socket_path(settings.server_recv_port))  # first: refusing is cheap
        stack.callback(listener.close)
        sizes = cache.sized(model)
        backend = ServerBackend(cache, sizes)
        log.info(
            "allocating_memory_and_files",
            host_gb=round(sizes.num_host_blocks * sizes.block_stride_bytes / GB, 1),
            ssd_gb=round(sizes.num_disk_blocks * sizes.block_stride_bytes / GB, 1),
        )
        try:
            manager = await stack.enter_async_context(KVManager(model, cache, backend=backend))
        except asyncio.CancelledError:
            if not ended.is_set():
                raise
            log.info("server_ending", reason="stopped before memory and files were allocated")
            return
        is_open = True
        if settings.enable_metrics:
            port, host = settings.py_metrics_port, settings.metrics_host
            served = MetricsServer(manager, port, host, instance=settings.instance_id)
            metrics = stack.enter_context(served)
            log.info("metrics_served", url=metrics.url)
        server = Server(manager.engine, backend, listener)
        manager.engine.on_failure = ended.set
        server.start()
        if parent is not None:
            _say(LISTENING)
        await ended.wait()
        log.info("server_ending")
        manager.engine.check_sound()
        await server.close()
        if reason := await failure_within(FLUSH_S, manager.flush()):
            log.warning("flush_failed", reason=reason)


def _on_end(ended: Callable[[], None], parent: ProcessHandle | None) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended)
    if parent is None:
        return
    # A child of the parent may keep our stdin open, so its end of file is not enough.
    if parent.fd >= 0:
        loop.add_reader(parent.fd, _gone, loop, parent.fd, ended)
    else:
        _look_at(loop, parent, ended)

    def look() -> None:
        with suppress(BlockingIOError):
            if not os.read(stdin, 4096):
                _gone(loop, stdin, ended)

    stdin = sys.stdin.fileno()
    os.set_blocking(stdin, False)
    loop.add_reader(stdin, look)


def _gone(loop: asyncio.AbstractEventLoop, fd: int, ended: Callable[[], None]) -> None:
    loop.remove_reader(fd)
    ended()


def _look_at(
    loop: asyncio.AbstractEventLoop, parent: ProcessHandle, ended: Callable[[], None]
) -> None:
    """Check repeatedly whether the parent has ended, where the kernel cannot report it."""
    if parent.has_ended:
        ended()
    else:
        loop.call_later(LOOK_S, _look_at, loop, parent, ended)
