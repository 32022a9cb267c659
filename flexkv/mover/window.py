"""The window: memory that an engine and one life of its mover share, in slots of one size.

free ──taken──▶ in use ──freed──▶ free
                  │
                  └─ the library may still write to it ──▶ never used again in this life
"""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
import weakref
from asyncio import Future
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv import _ext
from flexkv.process import forks
from flexkv.process.memory_files import memory_file

_PAGE_BYTES = 4096


def mapped(fd: int, nbytes: int) -> mmap.mmap:
    """Map a window, with huge pages where the kernel grants them to shared memory.

    Raises:
        OSError: it cannot be mapped.
    """
    memory = mmap.mmap(fd, nbytes)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Window:
    """Shared memory of some slots.

    Attributes:
        fd: a descriptor of it, open for as long as it is mapped.
        slots: how many there are.
        slot_bytes: the size of a slot.
        nbytes: the size of the window.
        spoiled: how many slots are never used again.
    """

    def __init__(self, slots: int, slot_bytes: int, freed: Callable[[], None]) -> None:
        """Map the memory without touching a page of it.

        Args:
            slots: how many slots.
            slot_bytes: their size at least.
            freed: called when a slot is free again, by any thread.

        Raises:
            OSError: there is no memory.
        """
        self.slot_bytes = -(-slot_bytes // _PAGE_BYTES) * _PAGE_BYTES
        self.nbytes = slots * self.slot_bytes
        self.slots, self.spoiled = slots, 0
        self.fd = memory_file("flexkv-mover", self.nbytes)
        try:
            memory = mapped(self.fd, self.nbytes)
        except BaseException:
            os.close(self.fd)
            raise
        self._memory: mmap.mmap | None = memory
        self._mapping = weakref.ref(memory)
        closing: weakref.finalize[Any, Any] = weakref.finalize(memory, os.close, self.fd)
        closing.atexit = False
        self._free, self._freed = list(range(slots)), freed
        # Making a slot may collect garbage, and that may free another one.
        self._lock = threading.RLock()
        forks.on_fork(self._let_go_in_child)

    def take(self) -> Slot | None:
        """Return the free slot that was freed last, so that few pages are touched; or None."""
        with self._lock:
            if self._memory is None or not self._free:
                return None
            return Slot(self, self._free.pop(), self._memory)

    def _give(self, number: int) -> None:
        with self._lock:
            self._free.append(number)
        self._freed()

    def close(self) -> None:
        """Hand out no more slots. Slots and bodies keep the memory mapped; the last one frees it.

        Threads may be filling slots now, and what has arrived is still to be copied.
        """
        self._freed, self._memory = _nothing, None

    def _let_go_in_child(self) -> None:
        """Release the parent's memory and descriptors in a forked child."""
        self._freed, self._lock = _nothing, threading.RLock()
        memory = self._mapping()
        if memory is not None:
            forks.replace_all(self.fd)
            _ext.disown(memory)


def _nothing() -> None:
    """Do nothing."""


class Slot:
    """A slot in use.

    Attributes:
        at: its first byte in the window.
        nbytes: its size.
    """

    __slots__ = ("_is_held", "_memory", "_number", "_window", "at", "nbytes")

    def __init__(self, window: Window, number: int, memory: mmap.mmap) -> None:
        self._window, self._number, self._is_held = window, number, True
        self._memory = memory
        self.nbytes = window.slot_bytes
        self.at = number * self.nbytes

    def free(self) -> None:
        """Free it for others. Idempotent."""
        if self._is_held:
            self._is_held = False
            self._window._give(self._number)

    def spoil(self) -> None:
        """Never use it again: the library may still write to it."""
        if self._is_held:
            self._is_held = False
            self._window.spoiled += 1

    def fill(self, buffers: list[memoryview]) -> None:
        """Copy buffers to the slot, one behind the other."""
        at = self.at
        for buffer in buffers:
            self._bytes(at, buffer.nbytes)[:] = np.frombuffer(buffer, np.uint8)
            at += buffer.nbytes

    def body(self, first: int, last: int) -> NDArray[np.uint8]:
        """Return bytes of the slot, which is freed once nothing refers to them any more."""
        body = self._bytes(self.at + first, last - first)
        ending: weakref.finalize[Any, Any] = weakref.finalize(body, self.free)
        ending.atexit = False
        return body

    def _bytes(self, at: int, size: int) -> NDArray[np.uint8]:
        """Return bytes of the window, which stays mapped as long as these are used."""
        return np.frombuffer(self._memory, np.uint8, size, at)


async def granted(taken: Future[Slot]) -> Slot:
    """Return a slot once it is granted; one that is granted as the call is cancelled is freed."""
    try:
        return await taken
    except asyncio.CancelledError:
        if taken.done() and not taken.cancelled() and not taken.exception():
            taken.result().free()
        raise
