"""The checks of the configured tiers by `flexkv doctor`."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from flexkv.cli.remote_store import opened, run_until_signal
from flexkv.common.config import GB, CacheConfig
from flexkv.common.errors import BackendUnavailableError, ConfigError, RemoteError
from flexkv.io.memory.arena import check_memory
from flexkv.io.private import Folder
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.round_trip import RoundTrip, round_trip
from flexkv.io.ssd.allocation import room
from flexkv.io.ssd.files import FILE_PATTERN, StripedFiles
from flexkv.io.ssd.folders import lock_folder, open_folder
from flexkv.io.ssd.locks import NOTE_NAME
from flexkv.io.ssd.open import distinct
from flexkv.io.ssd.paths import shown

PROBE_NAME = ".flexkv-doctor"
ROUND_TRIP_S = 60.0
"""How long the remote tier's store may take to take an object and return it."""
ADVICE = defaultdict(
    lambda: "check its address, credentials and rights",
    directory="check that it is mounted, whether it has room, and who may write to it",
    mooncake="check that its master runs at this address, and that a node adds memory",
)
"""What to look at if a store cannot be used, by its kind."""
INSTALL = "install what is missing"
"""What to do if a package that a configured part needs is not there; the error names it."""
SWITCHES = {
    "remote_cache_path": "enable_remote",
    "mooncake_store_config_path": "use_mooncake_store_backend",
}
"""Which key makes the engine use the store that a key names."""


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    found: str
    good: bool
    advice: str = ""
    fatal: bool = False
    """Whether something configured cannot be used, so that the exit status is 1."""


def host_tier(cache: CacheConfig) -> Iterator[Finding]:
    """Yield whether memory has room for the host tier, if its size is given in GB."""
    if not cache.enable_cpu or "cpu_cache_gb" not in cache.model_fields_set:
        return
    if cache.num_cpu_blocks is not None:
        return
    given = cache.host_given
    hugepage_bytes = cache.hugepage_size_bytes if cache.use_hugepage_cpu_buffer else None
    try:
        check_memory(int(cache.cpu_cache_gb * GB), hugepage_bytes, given)
    except ConfigError as error:
        yield Finding("host tier", str(error), False, f"set {error.field} lower", fatal=True)
    else:
        yield Finding("host tier", f"{given.key}={given.value} fits", True)


def ssd_tier(cache: CacheConfig) -> Iterator[Finding]:
    """Yield a finding for each unusable directory of the SSD tier, and one for the tier."""
    directories = distinct(cache.ssd_cache_dir)
    faults: dict[Path, str] = {}
    free_bytes: dict[int, int] = {}
    for directory in directories:
        try:
            device, free = _try(directory)
        except ConfigError as error:
            faults[directory] = error.why
            name = f"SSD directory {shown(directory)}"
            advice = "its part of the tier is lost"
            yield Finding(name, error.why, False, advice, fatal=cache.strict)
        else:
            free_bytes[device] = free_bytes.get(device, 0) + free
    usable = len(directories) - len(faults)
    if not usable:
        why = "; ".join(f"{shown(path)} {why}" for path, why in faults.items())
        yield Finding(
            "SSD tier", f"cannot be used: {why}", False, "see each directory above", fatal=True
        )
        return
    found = f"{usable} of {len(directories)} directories can be used"
    wanted = int(cache.ssd_cache_gb * GB) if cache.num_ssd_blocks is None else 0
    wanted = wanted * usable // len(directories)
    if cache.ssd_preallocate and wanted > sum(free_bytes.values()):
        why = f"{found}, with room for {sum(free_bytes.values()) / GB:.1f} GB"
        yield Finding("SSD tier", why, False, "set ssd_cache_gb lower", fatal=True)
        return
    yield Finding("SSD tier", found, not faults)


def remote_tier(cache: CacheConfig) -> Iterator[Finding]:
    """Yield whether the remote tier's store takes an object and returns it, and how fast."""
    name = "remote tier"
    if not cache.has_remote:
        given = {"remote_cache_path", "mooncake_store_config_path"} & cache.model_fields_set
        for key in sorted(given):
            switch = SWITCHES[key]
            yield Finding(name, f"off, though {key} is given", False, f"set {switch} to use it")
        return
    try:
        requests = opened(cache, lists=False)
    except (ConfigError, BackendUnavailableError) as error:
        advice = INSTALL
        if isinstance(error, ConfigError):
            advice = f"see {re.split('[.:]', error.field)[0]} in the configuration"
        yield Finding(name, str(error), False, advice, True)
        return
    where = requests.store.where
    try:
        with Console(stderr=True).status(f"trying {where}, for {ROUND_TRIP_S:g} s at most"):
            found = run_until_signal(_round_trip(requests))
    except (RemoteError, TimeoutError) as error:
        why = str(error) or f"{where}: no answer within {ROUND_TRIP_S:g} s"
        yield Finding(name, why, False, ADVICE[requests.store.kind], fatal=True)
    else:
        text = (
            f"{where}: put {found.put_mb_per_s:.0f} MB/s, get {found.get_mb_per_s:.0f} MB/s, "
            f"{found.head_ms:.1f} ms a request"
        )
        yield Finding(name, text, True)
    finally:
        requests.store.close()


async def _round_trip(requests: Requests) -> RoundTrip:
    try:
        async with asyncio.timeout(ROUND_TRIP_S):
            return await round_trip(requests.store)
    finally:
        await requests.store.leave()


def _try(directory: Path) -> tuple[int, int]:
    """Open and lock a directory as an engine would, and leave it as it was.

    Returns:
        The number of its file system, and the bytes that its files occupy or could occupy.

    Raises:
        ConfigError: an engine could not use it.
    """
    was_there, had_note = _is_there(directory), _is_there(directory / NOTE_NAME)
    try:
        with ExitStack() as undo:
            folder = open_folder(directory, undo, make=True)
            lock_folder(folder, undo)
            StripedFiles.open([directory / PROBE_NAME], 1, 4096).close()
            found = room(folder.fd)
            free = (1 << 62) if found is None else found.free_bytes
            return os.fstat(folder.fd).st_dev, free + _allocated_bytes(folder)
    finally:
        shutil.rmtree(directory / PROBE_NAME, ignore_errors=True)
        with suppress(OSError):
            if not had_note:
                os.unlink(directory / NOTE_NAME)
            if not was_there:
                directory.rmdir()


def _is_there(path: Path) -> bool:
    with suppress(OSError):
        path.lstat()
        return True
    return False


def _allocated_bytes(folder: Folder) -> int:
    names = [name for name in os.listdir(folder.fd) if fnmatch(name, FILE_PATTERN)]
    return sum(os.stat(name, dir_fd=folder.fd).st_blocks * 512 for name in names)
