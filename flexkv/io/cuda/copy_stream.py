"""One direction of a device's copies: a stream, what is under way on it, ids for its kernels."""

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
"""Block ids of kernel launches in flight on one stream; with more, the copy engine does it."""


class Work(NamedTuple):
    """A transfer under way on a stream, and how it will have ended."""

    op_id: int
    ids_end: int
    """Where in the ids of the stream the space that the kernel reads ends; ever growing."""
    error: DeviceError | None


class CopyStream:
    """One direction.

    Attributes:
        choices: how to copy.
        stage: the memory through which blocks go, unless nothing is to be staged.
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
        undo.callback(driver.close_stream, self.stream)  # waits: a kernel may read the ids
        undo.callback(self.drop_stage)
        self.ids_begin = self.ids_end = 0
        self.under_way: deque[Work] = deque()

    def choose(self, choices: Choices) -> None:
        """Copy so from now on; without the memory to stage in, by engine where it would be staged.

        The memory is taken now: an engine leaves none of it to who comes later.
        """
        if any(each.how is CopyMethod.STAGED for each in choices.choices) and self.stage is None:
            try:
                self.stage = Stage(self._driver, self.stream)
            except DeviceError as error:
                log.warning("no_memory_to_stage_in", bytes=SLOTS * SLOT_BYTES, code=error.code)
                choices = choices.without(CopyMethod.STAGED)
        self.choices = choices

    def drop_stage(self) -> None:
        """Let go of the memory to stage in. Only legal with nothing under way."""
        stage, self.stage = self.stage, None
        if stage is not None:
            stage.close()

    def take_ids(self, ids: BlockIds) -> int | None:
        """Put ids where kernels read them, and give the address; None when there is no room.

        Once for each transfer, before it is under way.
        """
        wanted = len(ids)
        if not self.under_way:
            self.ids_begin = self.ids_end = 0
        begin = self.ids_end
        if begin % IDS_MAX + wanted > IDS_MAX:  # not over the end: from the start
            begin += IDS_MAX - begin % IDS_MAX
        if begin + wanted - self.ids_begin > IDS_MAX:
            return None
        at = begin % IDS_MAX
        self.ids[at : at + wanted] = ids
        self.ids_end = begin + wanted
        return int(self.ids.ctypes.data) + 8 * at

    def ended(self) -> list[Work]:
        """Give what has ended since the last call."""
        try:
            count = os.eventfd_read(self.eventfd)
        except BlockingIOError:
            return []
        works = [self.under_way.popleft() for _ in range(count)]
        self.ids_begin = works[-1].ids_end
        return works

    def settle(self) -> bool:
        """Wait until all that is queued has ended, or never will; tells whether it has."""
        try:
            self._driver.synchronize(self.stream)
        except DeviceError:
            return False
        with suppress(BlockingIOError):
            os.eventfd_read(self.eventfd)
        return True
