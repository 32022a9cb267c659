"""What the commands of the remote tier share: the configured store, its pools, and a task group."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flexkv.common.config import CacheConfig
from flexkv.common.config_keys import HIDDEN
from flexkv.common.errors import ConfigError
from flexkv.io.remote.names import Pool
from flexkv.io.remote.offline import FoundPool, FoundPools, pools_of
from flexkv.io.remote.open import open_mooncake, open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.round_trip import ROUND_TRIP_BYTES
from flexkv.process.spawning import Spawn

T = TypeVar("T")


class Session(NamedTuple):
    """A store that a command uses."""

    requests: Requests
    spawn: Spawn
    progress: Progress


def run(
    cache: CacheConfig, work: Callable[[Session], Coroutine[Any, Any, T]], quiet: bool = False
) -> T:
    """Do some work with the configured store, and return its result.

    Args:
        cache: names the store.
        work: is given the open store.
        quiet: whether to show no progress.

    Raises:
        ConfigError: no store is configured, or the configuration is wrong.
        BackendUnavailableError: what the store needs is not installed.
        RemoteError: the store failed, or did not answer in time.
    """

    async def main() -> T:
        async with _session(cache, quiet) as session:
            return await work(session)

    return run_until_signal(main())


def run_until_signal(work: Coroutine[Any, Any, T]) -> T:
    """Run some work, which SIGTERM cancels as ctrl-C does, so that it can leave the store tidy.

    Raises:
        Exit: SIGTERM came; the status is what a shell reports of a process that it has ended.
    """
    is_ended = False

    async def main() -> T:
        running = asyncio.current_task()
        assert running is not None

        def end() -> None:
            nonlocal is_ended
            is_ended = True
            running.cancel()

        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
        return await work

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if is_ended:
            raise typer.Exit(128 + signal.SIGTERM) from None
        raise


@asynccontextmanager
async def _session(cache: CacheConfig, quiet: bool) -> AsyncIterator[Session]:
    requests = opened(cache)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    try:
        with Progress(*columns, TimeElapsedColumn(), console=console, disable=hidden) as progress:
            async with asyncio.TaskGroup() as group:
                yield Session(requests, lambda _, work: group.create_task(work), progress)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        await requests.store.leave()
        requests.store.close()


def opened(cache: CacheConfig, lists: bool = True) -> Requests:
    """Return requests to the configured store; `lists`: whether it will be listed.

    Raises:
        ConfigError: none is configured, or the configuration is wrong.
        BackendUnavailableError: what the store needs is not installed.
    """
    options = RemoteOptions(deadline_s=cache.io_deadline_s)
    if cache.use_mooncake_store_backend:
        if lists:
            why = "Mooncake Store has no listing, so there is nothing for this command to work on"
            raise ConfigError("use_mooncake_store_backend", True, why)
        path = cache.mooncake_store_config_path
        store = open_mooncake(path, options, ROUND_TRIP_BYTES, adds_memory=False)
        return Requests(store, options)
    if len(cache.remote_cache_path) != 1:
        why = "set it to the one address of the remote tier, as for the engine"
        raise ConfigError("remote_cache_path", HIDDEN, why)
    (address,) = cache.remote_cache_path
    custom = cache.remote_config_custom.get_secret_value()
    return Requests(open_store(address, custom, options), options)


async def found_pools(session: Session) -> FoundPools:
    """Return all pools of the store.

    Raises:
        RemoteError: the store failed, or did not answer in time.
    """
    bar = session.progress.add_task("objects listed", total=None)
    found = await pools_of(session.requests, lambda count: session.progress.advance(bar, count))
    session.progress.update(bar, total=session.progress.tasks[bar].completed)
    return found


def chosen_pools(found: FoundPools, wanted: str) -> list[tuple[FoundPool, Pool]]:
    """Return the pools whose names begin with `wanted`, and that are described.

    Raises:
        ConfigError: there is none, though some are wanted by name.
    """
    chosen = [
        (each, each.pool)
        for name, each in sorted(found.pools.items())
        if name.startswith(wanted) and each.pool is not None
    ]
    if wanted and not chosen:
        raise ConfigError("--pool", wanted, "no pool of the store has a name that begins so")
    return chosen
