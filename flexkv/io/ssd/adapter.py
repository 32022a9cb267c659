"""Chooses the adapter of the SSD tier: io_uring if it is available, else threads."""

from __future__ import annotations

from flexkv.io.memory.arena import Arena
from flexkv.io.ssd.files import StripedFiles
from flexkv.io.ssd.port import DiskPort
from flexkv.io.ssd.posix import thread_port
from flexkv.io.ssd.uring import RingOptions, UringIo, uring_port
from flexkv.observe.logs import get_logger

log = get_logger(__name__)


def open_disk(arena: Arena, files: StripedFiles, options: RingOptions) -> DiskPort:
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
            port = uring_port(arena, files, options)
        except OSError as error:
            reason = f"io_uring refused ({error.strerror})"
        else:
            assert isinstance(port.io, UringIo)
            log.info(
                "disk_adapter",
                adapter=port.adapter,
                registered=port.io.registered,
                reason=port.io.why or "io_uring and O_DIRECT are available",
            )
            return port
    log.warning("disk_adapter", adapter="threads", direct=files.direct, reason=reason)
    return thread_port(arena, files, io_bytes_max=options.io_bytes_max)
