"""Limits of the remote tier's requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RemoteOptions:
    """Limits of requests; the configuration's keys of the remote tier set them.

    Attributes:
        deadline_s: a transfer has ended once nothing has moved for so long.
        gets_max: most spans being read at once. Each takes its size of private memory until it is
            copied from there, and as many more may be waiting for that.
        puts_max: most spans being written at once.
        retries: how often a request that failed is repeated.
        hedged_share: the most gets that may be asked for twice because the first is slow.
        copy_threads: threads that copy what arrived into host memory and sum it.
    """

    deadline_s: float = 10.0
    gets_max: int = 8
    puts_max: int = 4
    retries: int = 2
    hedged_share: float = 0.05
    copy_threads: int = 2
