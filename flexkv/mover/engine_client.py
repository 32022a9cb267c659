"""Mooncake's TransferEngine, as the mover uses it: it lends host memory, and reads others'.

Only this file imports it, and only in the mover.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import numpy as np

from flexkv.mover.codes import READ_FAILED
from flexkv.mover.engine_config import EngineConfig
from flexkv.mover.wire import Lent


class EngineClient:
    """An engine. Reads may be made in several threads.

    Attributes:
        endpoint: where the engines of other nodes reach it.
        address: the address of the lent memory, by which they read it; 0 if none is lent.
    """

    def __init__(self, config: EngineConfig, window: mmap.mmap, lent: Lent | None) -> None:
        """Start the engine, and give it the window and the memory to lend.

        Raises:
            ImportError: Mooncake, or a library that it needs, is not installed.
            OSError: Mooncake refuses the configuration or the memory.
        """
        from mooncake.engine import TransferEngine

        self._engine = TransferEngine()
        name = f"{config.host}:{config.engine_port or 1}"
        code = self._engine.initialize(name, "P2PHANDSHAKE", config.protocol, config.device_name)
        if code:
            raise OSError(f"Mooncake refuses its configuration with code {code}")
        self._window = ctypes.addressof(ctypes.c_char.from_buffer(window))
        self._register(self._window, len(window))
        self.endpoint, self.address = f"{config.host}:{self._engine.get_rpc_port()}", 0
        if lent is not None:
            self._memory = _mapped(lent, config.is_writable)
            begin = int(np.frombuffer(self._memory, np.uint8).__array_interface__["data"][0])
            self.address = begin + lent.offset
            self._register(self.address, lent.nbytes)

    def _register(self, address: int, nbytes: int) -> None:
        if code := self._engine.register_memory(address, nbytes):
            raise OSError(f"Mooncake refuses its memory with code {code}")

    def read(self, endpoint: str, addresses: Sequence[int], at: int, block_bytes: int) -> int:
        """Read blocks of another node to the window, one behind the other from byte `at` on.

        Returns:
            0, or `READ_FAILED`: then Mooncake may go on writing to these places.
        """
        begin = self._window + at
        ours = [begin + number * block_bytes for number in range(len(addresses))]
        sizes = [block_bytes] * len(addresses)
        read = self._engine.batch_transfer_sync_read
        return READ_FAILED if read(endpoint, ours, list(addresses), sizes) else 0


def _mapped(lent: Lent, is_writable: bool) -> mmap.mmap:
    """Map the memory that is lent. Where it is not writable here, nobody can write to it."""
    access = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
    return mmap.mmap(lent.fd, lent.offset + lent.nbytes, prot=access)
