"""Mooncake Store's client, as the mover uses it: blocking calls over the window.

Only this file imports Mooncake, and only in the mover.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

from flexkv.mover.store_config import StoreConfig


class MooncakeClient:
    """A client of the store. Gets, puts and the other calls may have a thread each."""

    def __init__(self, config: StoreConfig, window: mmap.mmap) -> None:
        """Connect; this waits while the master does not answer.

        Raises:
            ImportError: Mooncake, or a library that it needs, is not installed.
            OSError: Mooncake refuses the configuration or the window.
        """
        from mooncake.store import MooncakeDistributedStore, ReplicateConfig

        self._store = MooncakeDistributedStore()
        code = self._store.setup(
            config.local_hostname,
            config.metadata_server,
            config.segment_bytes,
            config.buffer_bytes,
            config.protocol,
            config.device_name,
            config.master,
            None,
            bool(config.ssd_offload_path),
            config.ssd_offload_path,
            config.tenant_id,
        )
        if code:
            raise OSError(f"Mooncake refuses its configuration with code {code}")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(window))
        code = self._store.register_buffer(self._address, len(window))
        if code:
            raise OSError(f"Mooncake refuses its memory with code {code}")
        self._plain, self._kept = ReplicateConfig(), ReplicateConfig()
        self._kept.with_hard_pin = True
        self._has_segment = config.segment_bytes > 0

    def get(self, names: Sequence[str], at: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Read objects to places in the window; return the bytes or the error code of each."""
        where = [self._address + each for each in at]
        return list(self._store.batch_get_into(list(names), where, list(sizes)))

    def put(self, name: str, at: int, size: int, is_kept: bool) -> int:
        """Create an object from bytes in the window; return 0 or an error code."""
        store, config = self._store, self._kept if is_kept else self._plain
        # Of Mooncake's ways to put, only a session says whether the object exists.
        (code,) = store.batch_put_session_start([name], [size], config)
        if code < 0:
            return int(code)
        (code,) = store.batch_put_from_multi_buffer_ranges(
            [name], [[self._address + at]], [[size]], [[0]]
        )
        if code < 0:
            store.batch_put_session_revoke([name])
            return int(code)
        (code,) = store.batch_put_session_end([name])
        return int(code)

    def exist(self, names: list[str]) -> list[int]:
        """Return for each object 1 if it is there, 0 if it is not, an error code if unknown."""
        return list(self._store.batch_is_exist(names))

    def size(self, name: str) -> int:
        """Return how many bytes an object has, or an error code."""
        return int(self._store.get_size(name))

    def remove(self, name: str) -> int:
        """Remove an object, also while others read it; return 0 or an error code."""
        return int(self._store.remove(name, True))

    def close(self) -> None:
        """Leave the store if this node has added memory to it; that memory is gone then."""
        if self._has_segment:
            self._store.close()
