"""A slow and lossy wire between two hosts: two TUN devices, and a process that carries packets.

    host ── wire0 ─▶ read ─▶ lost, or kept until due ─▶ write ─▶ wire0 ── host

What is lost is decided by a seed, packet by packet in each direction. Packets stay in order.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple, Self

from flexkv.testing.namespaces import DIES_WITH_US, Host

DEVICE = "wire0"
MTU_BYTES = 65_000
QUEUE_PACKETS_MAX = 10_000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class Quality(NamedTuple):
    """How good a wire is.

    Attributes:
        delay_ms: how long a packet is under way.
        loss_percent: how many are lost.
        seed: decides which.
    """

    delay_ms: float = 0.0
    loss_percent: float = 0.0
    seed: int = 0


class Wire:
    """A wire between two hosts, beside the bridge; a context manager.

    Attributes:
        addresses: of its ends, in the order of the hosts.
    """

    def __init__(self, hosts: tuple[Host, Host], quality: Quality, prefix: str = "10.78.0") -> None:
        self.addresses = f"{prefix}.1", f"{prefix}.2"
        with ExitStack() as opened:
            ends = []
            for host, own, other in zip(
                hosts, self.addresses, reversed(self.addresses), strict=True
            ):
                ends.append(end := host.inside(_device))
                opened.callback(os.close, end)
                host.run("ip", "address", "add", own, "peer", other, "dev", DEVICE)
                host.run("ip", "link", "set", DEVICE, "mtu", str(MTU_BYTES), "up")
            words = [str(word) for word in (*ends, *quality)]
            self._carrier = subprocess.Popen(
                [*DIES_WITH_US, sys.executable, "-m", "flexkv.testing.wire", *words],
                pass_fds=ends, stdin=subprocess.PIPE,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Return the process that carries packets."""
        return self._carrier.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """End the wire: its devices are gone then."""
        self._carrier.kill()
        self._carrier.wait()
        assert self._carrier.stdin is not None
        self._carrier.stdin.close()


def _device() -> int:
    """Return the descriptor of a new TUN device in the network of this thread."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    request = struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI)
    fcntl.ioctl(descriptor, TUNSETIFF, request)
    return descriptor


class _Direction:
    """The packets on their way from one end to the other."""

    def __init__(self, source: int, target: int, quality: Quality, number: int) -> None:
        self.source, self._target, self._quality = source, target, quality
        self._random = random.Random(f"{quality.seed} {number}")
        self._under_way: deque[tuple[float, bytes]] = deque()

    @property
    def due_s(self) -> float:
        """Return when the next packet arrives."""
        return self._under_way[0][0] if self._under_way else float("inf")

    def take(self) -> None:
        """Take what was sent."""
        due_s = time.monotonic() + self._quality.delay_ms / 1000
        while True:
            try:
                packet = os.read(self.source, MTU_BYTES + 1)
            except BlockingIOError:
                return
            is_lost = self._random.random() * 100 < self._quality.loss_percent
            if not is_lost and len(self._under_way) < QUEUE_PACKETS_MAX:
                self._under_way.append((due_s, packet))

    def deliver(self) -> None:
        """Hand over what is due; a device that takes no more loses it."""
        while self.due_s <= time.monotonic():
            try:
                os.write(self._target, self._under_way.popleft()[1])
            except OSError:  # its queue is full, or it is down
                continue


def carry(first: int, second: int, quality: Quality) -> None:
    """Carry packets between two devices until the process is killed, or its maker is.

    The maker's end of our input closes with it, even if it ends before we asked for its signal.
    """
    directions = {
        first: _Direction(first, second, quality, 1),
        second: _Direction(second, first, quality, 2),
    }
    poll = select.epoll()
    for source in directions:
        poll.register(source, select.EPOLLIN)
    maker = sys.stdin.fileno()
    poll.register(maker, select.EPOLLHUP)
    while True:
        wait_s = min(each.due_s for each in directions.values()) - time.monotonic()
        for source, _ in poll.poll(max(0.0, wait_s) if wait_s < float("inf") else None):
            if source == maker:
                return
            directions[source].take()
        for each in directions.values():
            each.deliver()


if __name__ == "__main__":
    fds, rest = sys.argv[1:3], sys.argv[3:]
    carry(int(fds[0]), int(fds[1]), Quality(float(rest[0]), float(rest[1]), int(rest[2])))
