"""Opens the store of the remote tier. What is not used is not imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from flexkv.common.errors import BackendUnavailableError, ConfigError, RemoteError
from flexkv.io.remote.address import (
    OPTIONS_KEY,
    PATH_KEY,
    SENT,
    UNSHOWN,
    RemoteAddress,
    check_sent,
    parse_address,
)
from flexkv.io.remote.directory import DirectoryStore
from flexkv.io.remote.landing import OpenStore
from flexkv.io.remote.mooncake import MooncakeStore
from flexkv.io.remote.names import Pool
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.store import Store
from flexkv.mover.installed import check_installed
from flexkv.mover.life import MoverSizes
from flexkv.mover.mover import Mover
from flexkv.mover.store_config import load_store_config
from flexkv.observe.logs import get_logger

log = get_logger(__name__)


DESCRIPTION_BYTES = 1 << 16
"""Room for the description of a pool: it may be larger than a span, if the model's blocks are small
and it has many KV groups."""


def open_store(url: str, custom: Mapping[str, Any], options: RemoteOptions) -> OpenStore:
    """Return the store at `remote_cache_path`, with the options of `remote_config_custom`.

    No request is made.

    Raises:
        ConfigError: the URL or an option is wrong.
        BackendUnavailableError: what the store needs is not installed.
        OSError: a thread cannot be started.
    """
    address = parse_address(url, custom)
    if address.kind == "directory":
        directory = DirectoryStore(Path(address.url), options.gets_max, options.puts_max)
        if doubts := directory.doubts():
            log.warning("remote_directory_is_open", directory=address.url, reason=doubts)
        return directory
    return _object_store(address, options)


def open_mooncake(
    path: str | None, options: RemoteOptions, object_bytes: int, adds_memory: bool = True
) -> MooncakeStore:
    """Return the Mooncake Store that a configuration file describes; no mover is started.

    Args:
        path: the file: `mooncake_store_config_path`.
        options: limits.
        object_bytes: the size of the largest object.
        adds_memory: whether the mover adds the memory that the file names to the store. Objects in
            it are lost with the mover, so one that lives only for a moment must add none.

    Raises:
        ConfigError: the file cannot be read, or a field is wrong.
        BackendUnavailableError: Mooncake, or a library that it needs, is not installed.
        OSError: a thread cannot be started.
    """
    config = load_store_config(path)
    if not adds_memory:
        config = replace(config, segment_bytes=0, ssd_offload_path="")
    check_installed()
    slots = options.gets_max + options.puts_max
    slot_bytes = max(object_bytes, DESCRIPTION_BYTES)
    sizes = MoverSizes(slots + max(2, slots // 4), slot_bytes, options.deadline_s)
    return MooncakeStore(Mover(config, sizes))


def _object_store(address: RemoteAddress, options: RemoteOptions) -> OpenStore:
    try:
        from obstore import store as stores
        from obstore.exceptions import BaseError

        from flexkv.io.remote.object_store import ObjectStore
    except ImportError as error:
        why = "obstore is not installed: pip install 'flexkv[remote]'"
        raise BackendUnavailableError(f"the remote tier at {address.url}", why) from error
    if address.kind == "memory":
        return ObjectStore(stores.MemoryStore(), "memory", "memory")
    config: dict[str, Any] = {}
    client_options = {"timeout": f"{options.deadline_s:g}s"}
    if address.kind == "s3":
        config["unsigned_payload"] = True  # each block has its checksum
        for name in SENT:
            if value := os.environ.get(f"AWS_{name.upper()}"):
                check_sent(f"AWS_{name.upper()}", value)

    def client(given: Mapping[str, Any]) -> Any:
        ours = {name: given[name] for name in address.config.keys() & given.keys()}
        theirs = {name: given[name] for name in address.client_options.keys() & given.keys()}
        return stores.from_url(  # type: ignore[call-overload]
            address.url,
            config={name: _text(value) for name, value in (config | ours).items()},
            client_options=client_options | theirs,
            retry_config={"max_retries": 0},
        )

    given = {**address.config, **address.client_options}
    refusals = BaseError, ValueError, TypeError
    try:
        return ObjectStore(client(given), address.kind, address.url)
    except refusals as error:
        blamed = [name for name in given if _is_made(client, given, name, refusals)]
        raise _refused(error, blamed, given) from None  # its text may contain credentials


def _is_made(
    make: Callable[[Mapping[str, Any]], Any],
    given: Mapping[str, Any],
    name: str,
    refusals: tuple[type[Exception], ...],
) -> bool:
    """Return whether a client can be made without one of its options."""
    try:
        make({each: value for each, value in given.items() if each != name})
    except refusals:
        return False
    return True


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refused(error: Exception, blamed: Sequence[str], given: Iterable[str]) -> ConfigError:
    """Return the error of a client that could not be made; it shows no value.

    Args:
        error: what the client said.
        blamed: the options each of which keeps it from being made.
        given: all of its options.
    """
    text = str(error)
    if len(blamed) > 1:
        return ConfigError(OPTIONS_KEY, sorted(blamed), "are names of one option: give one of them")
    if not blamed:
        why = f"the store's client refuses them, or lacks one ({type(error).__name__})"
        return ConfigError(OPTIONS_KEY, sorted(given), why)
    is_unknown = f"'{blamed[0]}'" in text or f": {blamed[0]}" in text
    why = "the store does not have this option" if is_unknown else "has a wrong value"
    return ConfigError(f"{OPTIONS_KEY}.{blamed[0]}", UNSHOWN, why)


async def join_pool(store: Store, pool: Pool) -> None:
    """Describe a pool in a store, unless it is described there already.

    Raises:
        ConfigError: what is described there differs.
        RemoteError: the store failed.
    """
    if not await store.put(pool.description_name, [pool.encoded]):
        try:
            found = await store.read(pool.description_name)
        except FileNotFoundError:
            why = "it was removed meanwhile"
            raise RemoteError(store.where, "get of the pool's description", why) from None
        pool.check(found, PATH_KEY)
