"""Opens the store of the remote tier. What is not used is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from flexkv.common.errors import BackendUnavailableError, ConfigError, RemoteError
from flexkv.io.remote.address import OPTIONS_KEY, PATH_KEY, RemoteAddress, parse_address
from flexkv.io.remote.directory import DirectoryStore
from flexkv.io.remote.landing import OpenStore
from flexkv.io.remote.mooncake import MooncakeStore, check_installed
from flexkv.io.remote.names import Pool
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.store import Store
from flexkv.mover.life import MoverSizes
from flexkv.mover.mover import Mover
from flexkv.mover.store_config import load_store_config
from flexkv.observe.logs import get_logger

log = get_logger(__name__)


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
    sizes = MoverSizes(slots + max(2, slots // 4), object_bytes, options.deadline_s)
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
    config = dict(address.config)
    if address.kind == "s3":
        config.setdefault("unsigned_payload", True)  # each block has its checksum
    client_options = {"timeout": f"{options.deadline_s:g}s", **address.client_options}
    try:
        client = stores.from_url(  # type: ignore[call-overload]
            address.url,
            config={name: _text(value) for name, value in config.items()},
            client_options=client_options,
            retry_config={"max_retries": 0},
        )
    except (BaseError, ValueError, TypeError) as error:
        raise _refused(error, config) from None  # its text may contain credentials
    return ObjectStore(client, address.kind, address.url)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refused(error: BaseException, config: Mapping[str, Any]) -> ConfigError:
    """Return the error of a client that could not be made; it names an option, and no value."""
    text = str(error)
    named = [name for name in config if f"'{name}'" in text or f": {name}" in text]
    if named:
        names = ", ".join(named)
        return ConfigError(OPTIONS_KEY, names, "the store does not have this option")
    why = f"the store's client refuses its options ({type(error).__name__})"
    return ConfigError(OPTIONS_KEY, sorted(config), why)


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
