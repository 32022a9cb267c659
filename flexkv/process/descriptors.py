"""How many files and sockets this process may have open."""

from __future__ import annotations

import resource
from contextlib import suppress
from errno import EMFILE, ENFILE, ENOBUFS, ENOMEM

_LACKING = {EMFILE, ENFILE, ENOBUFS, ENOMEM}


def is_lack(error: BaseException) -> bool:
    """Return whether a call failed because this machine has no descriptors or memory left."""
    return isinstance(error, OSError) and error.errno in _LACKING


def limit() -> int:
    """Return how many descriptors this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_limit() -> None:
    """Raise this process's limit of open descriptors as far as it may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
