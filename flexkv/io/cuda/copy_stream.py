"""One direction of a device's copies: its stream, the transfers on it, ids for its kernels."""

from __future__ import annotations

import mmap
import os
from collections import deque
from contextlib import ExitStack, suppress
from typing import NamedTuple

import numpy as np

from flexkv.common.errors import DeviceError
from flexkv.common.terms import BlockIds
from flexkv.io.cuda.choice import Choices, CopyMethod
from flexkv.io.cuda.driver import CudaDriver
from flexkv.io.cuda.stage import SLOT_BYTES, SLOTS, Stage
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

IDS_MAX = 1 << 17
"""Most block ids of kernel launches in flight on a stream; beyond, the copy engine copies."""


class Work(NamedTuple):
    """A transfer under way on a stream, and the error with which it will end, if any."""

    op_id: int
    ids_end: int
    """Where its ids end: an offset that counts on past IDS_MAX, and is used modulo that."""
    error: DeviceError | None


class CopyStream:
    """One direction of a device's copies.

    Attributes:
        choices: how to copy.
        stage: the memory in which blocks are staged; None if none are.
    """

    def __init__(self, driver: CudaDriver, urgent: bool, undo: ExitStack) -> None:
        self.choices = Choices.always(CopyMethod.ENGINE)
        self.stage: Stage | None = None
        self._driver = driver
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        undo.callback(os.close, self.eventfd)
        memory = mmap.mmap(-1, 8 * IDS_MAX)
        self.ids = np.frombuffer(memory, np.int64)
        driver.register(self.ids.ctypes.data, self.ids.nbytes)
        undo.callback(driver.unregister, self.ids.ctypes.data)
        self.stream = driver.open_stream(urgent)
        undo.callback(driver.close_stream, self.stream)  # waits, since a kernel may read the ids
        undo.callback(self.drop_stage)
        self.ids_begin = self.ids_end = 0
        self.under_way: deque[Work] = deque()

    def choose(self, choices: Choices) -> None:
        """Use these choices from now on; without memory to stage in, use the engine instead.

        The memory is allocated now, because an inference engine leaves none free for later.
        """
        if any(each.method is CopyMethod.STAGED for each in choices.choices) and self.stage is None:
            try:
                self.stage = Stage(self._driver, self.stream)
            except DeviceError as error:
                log.warning("staging_not_allocated", bytes=SLOTS * SLOT_BYTES, code=error.code)
                choices = choices.without(CopyMethod.STAGED)
        self.choices = choices

    def drop_stage(self) -> None:
        """Release the memory to stage in. Only legal with nothing under way."""
        stage, self.stage = self.stage, None
        if stage is not None:
            stage.close()

    def take_ids(self, ids: BlockIds) -> int | None:
        """Store ids where kernels can read them; return their address, or None if there is no room.

        They are stored once for each transfer, before it is in `under_way`.
        """
        wanted = len(ids)
        if not self.under_way:
            self.ids_begin = self.ids_end = 0
        begin = self.ids_end
        if begin % IDS_MAX + wanted > IDS_MAX:  # may not cross the end: start again
            begin += IDS_MAX - begin % IDS_MAX
        if begin + wanted - self.ids_begin > IDS_MAX:
            return None
        at = begin % IDS_MAX
        self.ids[at : at + wanted] = ids
        self.ids_end = begin + wanted
        return int(self.ids.ctypes.data) + 8 * at

    def ended(self) -> list[Work]:
        """Return the transfers that ended since the last call."""
        try:
            count = os.eventfd_read(self.eventfd)
        except BlockingIOError:
            return []
        works = [self.under_way.popleft() for _ in range(count)]
        self.ids_begin = works[-1].ids_end
        return works

    def settle(self) -> bool:
        """Wait for all queued work to end; return False if the stream has failed."""
        try:
            self._driver.synchronize(self.stream)
        except DeviceError:
            return False
        with suppress(BlockingIOError):
            os.eventfd_read(self.eventfd)
        return True
