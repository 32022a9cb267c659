"""Device memory in which blocks are put together, so that the copy engine moves few large runs.

    to the host      pages ──kernel──▶ slot ──copy engine──▶ host blocks
    to the device    host blocks ──copy engine──▶ slot ──kernel──▶ pages

There are two slots, used in turn, and two streams: the direction's for the kernel, and one for the
copy engine. So one slot is copied while the other is filled or emptied. Each half of a slot's use
ends with an event that the next half waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import NamedTuple

from flexkv.common.errors import DeviceError
from flexkv.io.cuda.driver import CudaDriver

SLOTS = 2
SLOT_BYTES = 32 << 20
"""A fast link takes over half a millisecond for it; queueing a slot's work, a tenth of that."""

Queue = Callable[[int], None]
"""Queues work on the stream that it is given."""


class _Slot(NamedTuple):
    address: int
    is_full: int
    """The event at the end of the first half of its use; `is_free` is that of the second."""
    is_free: int


class Stage:
    """The slots of one direction.

    Attributes:
        size: the bytes of a slot.
    """

    size = SLOT_BYTES

    def __init__(self, driver: CudaDriver, stream: int) -> None:
        """Allocate device memory, and open a stream for the copy engine.

        Raises:
            DeviceError: the driver reported an error.
        """
        self._driver, self._stream, self._next = driver, stream, 0
        with ExitStack() as undo:
            memory = driver.allocate(SLOTS * SLOT_BYTES)
            undo.callback(driver.free, memory)
            events = []
            for _ in range(2 * SLOTS):
                events.append(driver.open_event())
                undo.callback(driver.drop, events[-1])
            self._copying = driver.open_stream(urgent=True)
            undo.callback(driver.close_stream, self._copying)
            self._resources = undo.pop_all()
        self._slots = [
            _Slot(memory + number * SLOT_BYTES, events[2 * number], events[2 * number + 1])
            for number in range(SLOTS)
        ]

    def next_slot(self) -> int:
        """Return the address of the slot that the next call of `use` takes."""
        return self._slots[self._next].address

    def use(self, run_kernel: Queue, copy: Queue, kernel_first: bool) -> None:
        """Queue the kernel and the copy of one slot, in the order given by `kernel_first`.

        Raises:
            DeviceError: the driver reported an error.
        """
        driver, slot = self._driver, self._slots[self._next]
        self._next = (self._next + 1) % SLOTS
        halves = [(run_kernel, self._stream), (copy, self._copying)]
        (first, here), (second, there) = halves if kernel_first else reversed(halves)
        driver.wait(here, slot.is_free)
        first(here)
        driver.record(slot.is_full, here)
        driver.wait(there, slot.is_full)
        second(there)
        driver.record(slot.is_free, there)

    def join(self) -> None:
        """Make later work of the direction's stream wait for all copies queued so far.

        Raises:
            DeviceError: the driver reported an error.
        """
        for slot in self._slots:
            self._driver.wait(self._stream, slot.is_free)

    def settle(self) -> None:
        """Wait until all queued copies by the copy engine have ended, or its stream has failed."""
        with suppress(DeviceError):
            self._driver.synchronize(self._copying)

    def close(self) -> None:
        """Release everything. Only legal with nothing under way.

        Raises:
            DeviceError: the driver reported an error.
        """
        self._resources.close()
