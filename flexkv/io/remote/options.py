"""Limits of the remote tier's requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RemoteOptions:
    """Limits of requests; an engine takes most of them from its configuration.

    Attributes:
        deadline_s: a transfer ends once nothing has moved for so long.
        gets_max: the most spans being read at once. Unless the store is a directory, the bytes of
            each are in private memory until they are copied to host memory, and as many spans more
            may be waiting for that.
        puts_max: the most spans being written at once.
        retries: how often a request that failed is repeated.
        hedged_share: the largest share of gets that are sent again because they are slow.
        copy_threads: threads that copy what arrived into host memory and sum it.
    """

    deadline_s: float = 10.0
    gets_max: int = 8
    puts_max: int = 4
    retries: int = 2
    hedged_share: float = 0.05
    copy_threads: int = 2
