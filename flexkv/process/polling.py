"""Waits for descriptors of any number: `select.select` takes none above 1023."""

from __future__ import annotations

import math
import select
from typing import Protocol


class HasDescriptor(Protocol):
    """A file, a socket, or whatever else has a descriptor."""

    def fileno(self) -> int:
        """Return its number."""
        ...


def is_readable(file: int | HasDescriptor, wait_s: float | None = 0.0) -> bool:
    """Return whether a descriptor can be read or has come to its end, now or within `wait_s`.

    Args:
        file: the descriptor, or what has it.
        wait_s: how long to wait for that; None: until it can be.
    """
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(None if wait_s is None else math.ceil(wait_s * 1e3)))
