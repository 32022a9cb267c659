"""Files in memory that other processes map: sealed against what would harm one of them.

Memory that shrinks kills every process that touches it by SIGBUS; so nobody can shrink or grow it,
or remove the seals. Nobody can execute it either, if the kernel supports that: a process that holds
the descriptor could otherwise run what the others have written.
"""

from __future__ import annotations

import fcntl
import os

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MFD_NOEXEC_SEAL = 8
"""The kernel's number. Some machines (`vm.memfd_noexec=2`) require this seal."""


def memory_file(name: str, nbytes: int, flags: int = 0) -> int:
    """Return the descriptor of a new file in memory, whose size and mode nobody can change.

    Args:
        name: shown in `/proc/self/fd`.
        nbytes: its size.
        flags: of memfd_create, besides those for seals.

    Raises:
        OSError: the kernel refuses.
        OverflowError: no file is so large.
    """
    flags |= os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError:
        fd = os.memfd_create(name, flags)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd
