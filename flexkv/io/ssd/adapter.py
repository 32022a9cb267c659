"""Chooses the adapter of the SSD tier: io_uring if it is available, else threads."""

from __future__ import annotations

from flexkv.io.memory.arena import Arena
from flexkv.io.ssd.files import StripedFiles
from flexkv.io.ssd.posix import ThreadDiskPort
from flexkv.io.ssd.uring import RingOptions, UringDiskPort
from flexkv.observe.logs import get_logger

log = get_logger(__name__)


def open_disk(
    arena: Arena, files: StripedFiles, options: RingOptions
) -> UringDiskPort | ThreadDiskPort:
    """Return the best disk port that this machine has, and log which and why.

    Args:
        arena: the host end; owned by the caller, and must outlive the port.
        files: the disk end; owned by the caller, and must outlive the port.
        options: of the ring; with 0 entries, io_uring is not used.
    """
    if options.entries == 0:
        reason = "iouring_entries is 0"
    elif not files.direct:
        reason = files.why
    else:
        try:
            port = UringDiskPort(arena, files, options)
        except OSError as error:
            reason = f"io_uring refused ({error.strerror})"
        else:
            log.info(
                "disk_adapter",
                adapter="io_uring",
                registered=port.registered,
                reason=port.why or "io_uring and O_DIRECT are available",
            )
            return port
    log.warning("disk_adapter", adapter="threads", direct=files.direct, reason=reason)
    return ThreadDiskPort(arena, files, io_bytes_max=options.io_bytes_max)
