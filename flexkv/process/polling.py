"""Waiting for descriptors of any number: `select.select` accepts none above 1023."""

from __future__ import annotations

import math
import select
from typing import Protocol


class HasDescriptor(Protocol):
    """A file, a socket, or anything else with a descriptor."""

    def fileno(self) -> int:
        """Return the descriptor's number."""
        ...


def is_readable(file: int | HasDescriptor, wait_s: float | None = 0.0) -> bool:
    """Return whether a descriptor is readable or at its end, now or within `wait_s`.

    Args:
        file: a descriptor, or an object that has one.
        wait_s: how long to wait for it; None waits without a limit.
    """
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(None if wait_s is None else math.ceil(wait_s * 1e3)))
